"""Big pictures through an autoencoder in less memory, as if there were no tiles, or nearly so.

Tiles alone leave seams and shifts of colour, for two reasons: attention and normalisation look at the whole picture,
and a convolution at a tile's edge sees zeros. So the layers whose values for the whole picture take no more memory than
one tile (attention always) run on the whole picture. For the others there are two ways.

Layer by layer (no overlap): one layer runs over all tiles before the next one does, each norm's statistics are gathered
before any tile goes on, and the picture is the untiled one but for rounding. About 1.4 times the work; it holds the
values before and after one layer for the whole picture, and beside them what a tile needs (`layer_bytes`).

Tile by tile (an overlap): every `GroupNorm` has one mean and one variance for all tiles, gathered from every pixel in a
first walk over the tiles, and of an overlap only its middle is feathered, where both tiles have seen their
surroundings. Twice the work, the memory of one tile. What differs from untiled comes from the first walk, in which each
tile was normalised by its own statistics; `difference` measures it.

>>> from sfumato.codecs import KLCodec
>>> from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
>>> tiny = AutoencoderConfig(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
...                          up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2)
>>> codec = KLCodec(AutoencoderKL(tiny).eval())
>>> latents = torch.zeros(1, 2, 24, 20)
>>> decode_tiled(codec, latents, tile=12, overlap=4).shape
torch.Size([1, 3, 48, 40])
>>> decode_bytes(codec, 24, 20) < decode_bytes(codec, 48, 20)
True
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.codecs.base import Codec, Moments
from sfumato.codecs.kl import KLCodec
from sfumato.codecs.vq import VQCodec
from sfumato.errors import UserError
from sfumato.networks.autoencoder import Decoder, Encoder, FirstStage
from sfumato.networks.resnet import widen

_WEIGHTS = 2048  # feathering weights are multiples of its inverse: their products and sums are exact in float32
_SPARE = 1.25  # what an estimate of memory may fall short by
_COPIES = 2  # what a convolution holds beside its input and output: both again, in the order its kernel wants


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Attributes:
        tile: largest height and width of a tile, in latent pixels.
        overlap: of neighbouring tiles, in latent pixels, at most a third of `tile`; None goes layer by layer.

    Raises:
        UserError: for numbers outside their range.
    """

    tile: int = 64
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.tile < 8:
            raise UserError(f"a tile has a side of at least 8 latent pixels, got {self.tile}")
        if self.overlap is not None and not 0 <= 3 * self.overlap <= self.tile:
            raise UserError(f"tiles of {self.tile} overlap by 0 to {self.tile // 3} latent pixels, got {self.overlap}")


def decode_tiled(codec: Codec, latents: Tensor, *, tile: int = 64, overlap: int | None = None) -> Tensor:
    """Pictures (B, C, H, W) in about [-1, 1] from scaled latents (B, c, h, w), one at a time and tile by tile.

    Latents with no more pixels than a tile, and those of a codec without a network, take the plain way: what comes is
    `codec.decode(latents)`, bit for bit. The codec and its network are left as they are, and no gradient is kept.

    Args:
        tile, overlap: see `Tiling`.

    Raises:
        UserError: for numbers out of their range, and for a codec whose network is not an autoencoder of this library.
    """
    tiling = Tiling(tile, overlap)
    if codec.network is None or latents.shape[-2] * latents.shape[-1] <= tile**2:
        return codec.decode(latents)
    own, twin = _twin(codec)
    twin.decoder = _TiledDecoder(twin.decoder, tiling)
    with torch.no_grad():
        return replace(own, network=twin).decode(latents)


def encode_tiled(codec: Codec, pictures: Tensor, *, tile: int = 64, overlap: int | None = None) -> Moments:
    """Scaled latents of pictures (B, C, H, W) in [-1, 1], one at a time and tile by tile; see `decode_tiled`.

    `tile` and `overlap` count latent pixels here too. H and W must be multiples of the codec's factor.
    """
    tiling = Tiling(tile, overlap)
    if codec.network is None or pictures.shape[-2] * pictures.shape[-1] <= (tile * codec.factor) ** 2:
        return codec.encode(pictures)
    own, twin = _twin(codec)
    twin.encoder = _TiledEncoder(twin.encoder, tiling, codec.factor)
    with torch.no_grad():
        return replace(own, network=twin).encode(pictures)


@dataclass(frozen=True)
class Difference:
    """How far a tiled picture is from the untiled one, in levels of 255, over all its pixels and channels."""

    largest: float
    mean: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Difference:
        """Of two pictures in [-1, 1]; what lies outside is clamped, as it is shown."""
        apart = (one.float().clamp(-1, 1) - other.float().clamp(-1, 1)).abs() * 127.5
        return cls(float(apart.max()), float(apart.mean()))

    def __str__(self) -> str:
        return f"at most {self.largest:.2f} of 255 levels apart from untiled, {self.mean:.3f} in the mean"


def difference(
    codec: Codec, latents: Tensor, tile: int = 64, overlap: int | None = None
) -> Difference:
    """What tiling changes in the pictures of these latents (B, c, h, w), measured: it decodes them both ways.

    The untiled decoding takes the memory that tiles are to save (`decode_bytes`).
    """
    with torch.no_grad():
        whole = codec.decode(latents)
    return Difference.between(decode_tiled(codec, latents, tile=tile, overlap=overlap), whole)


def decode_bytes(codec: Codec, h: int, w: int) -> int:
    """Peak memory of decoding one picture from latents h x w untiled, beside the weights: an estimate in bytes.

    The most that any layer holds at once, counted from its channels, pixels and the weights' type: its input, what it
    makes of it on the way, and the copies in which convolutions work. Attention is counted without its scores, as
    torch's own kernel reckons.
    """
    network = codec.network
    if network is None:
        return 0
    own, _ = _autoencoder(codec)
    width = next(own.network.parameters()).element_size()
    return max(step.cost for step in _decoder_steps(own.network.decoder)) * h * w * width


def layer_bytes(codec: Codec, h: int, w: int, tile: int = 64) -> int:
    """The same for decoding layer by layer in tiles, whatever the number of pictures."""
    network = codec.network
    if network is None:
        return 0
    own, _ = _autoencoder(codec)
    steps, width = _decoder_steps(own.network.decoder), next(own.network.parameters()).element_size()
    return (max(step.stored for step in steps) * h * w + max(step.cost for step in steps) * tile**2) * width


def needs_tiles(codec: Codec, h: int, w: int, available_bytes: int, count: int = 1) -> bool:
    """Whether `count` pictures of latents h x w, decoded together, might take more memory than is available.

    A quarter is added to the estimate: measured peaks were 0.9 to 1.2 times it.
    """
    return count * decode_bytes(codec, h, w) * _SPARE > available_bytes


# --- where tiles lie ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tile along one side, in latent pixels: it covers [start, stop), and [first, last) is counted as its own."""

    start: int
    stop: int
    first: int
    last: int


def pieces(length: int, tile: int, overlap: int) -> list[Piece]:
    """Tiles of about equal size, none larger than `tile`, that cover `length`; neighbours overlap by exactly `overlap`.

    What is counted as their own divides the length without gap or overlap.

    >>> [(p.start, p.stop) for p in pieces(100, 64, 16)]
    [(0, 58), (42, 100)]
    """
    if length <= tile:
        return [Piece(0, length, 0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    at = [i * (length - overlap) // count for i in range(count + 1)]
    cut = [0, *(a + overlap // 2 for a in at[1:-1]), length]
    return [Piece(at[i], at[i + 1] + overlap, cut[i], cut[i + 1]) for i in range(count)]


def feathers(along: Sequence[Piece], overlap: int, margin: int, scale: int) -> list[Tensor]:
    """The weight of every pixel of every piece, float32, each of length `(stop - start) scale`.

    In an overlap they run linearly from one piece to the next, but for `margin` latent pixels at either end, where the
    piece that ends there has weight 0. At every pixel the weights sum to exactly 1, also as products over two sides.

    Args:
        scale: pixels per latent pixel.
    """
    ramp = (overlap - 2 * margin) * scale
    places = torch.arange(overlap * scale, dtype=torch.float64) - margin * scale + 0.5
    rising = ((places / max(ramp, 1)).clamp(0, 1) * _WEIGHTS).round() / _WEIGHTS
    weights = []
    for index, piece in enumerate(along):
        weight = torch.ones((piece.stop - piece.start) * scale, dtype=torch.float64)
        if index > 0:
            weight[: len(rising)] = rising
        if index < len(along) - 1:
            weight[len(weight) - len(rising) :] = 1 - rising
        weights.append(weight.float())
    return weights


Box = tuple[int, int, int, int]
"""Top, bottom, left and right, in latent pixels."""


def _cut(x: Tensor, box: Box, scale: int) -> Tensor:
    top, bottom, left, right = (v * scale for v in box)
    return x[..., top:bottom, left:right]


# --- normalisation with statistics from elsewhere -----------------------------------------------------------------


class _Now:
    """What the norms are to do at present; all of them look at one such object.

    "own" is plain normalisation, by the statistics of what is given. "gather" does that and adds up the statistics of
    `region`, within `size` latent pixels. "given" uses what was gathered before; only `target` gathers, and then stops
    the call with `_Enough`.
    """

    mode: Literal["own", "gather", "given"] = "own"
    region: Box = (0, 0, 0, 0)
    size: tuple[int, int] = (0, 0)
    target: _SharedNorm | None = None


class _Enough(Exception):
    """What a call was made for is known."""


class _SharedNorm(nn.Module):
    """A `GroupNorm` that can be told its mean and variance."""

    def __init__(self, norm: nn.GroupNorm, now: _Now) -> None:
        super().__init__()
        self.norm, self._now = norm, now
        self._mean = self._var = torch.zeros(())
        self._begin()

    def _begin(self) -> None:
        self._count = 0
        self._first = torch.zeros(self.norm.num_groups, dtype=torch.float64)
        self._second = torch.zeros(self.norm.num_groups, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        now = self._now
        if now.mode == "gather" or now.target is self:
            self._gather(_cut(x, now.region, x.shape[-1] // now.size[1]))
        if now.target is self:
            raise _Enough
        if now.mode == "given":
            return self._normalised(x)
        out: Tensor = self.norm(x)
        return out

    def _gather(self, x: Tensor) -> None:
        part = widen(x).reshape(self.norm.num_groups, -1)
        var, mean = (v.double().cpu() for v in torch.var_mean(part, dim=1, correction=0))
        self._count += part.shape[1]
        self._first += mean * part.shape[1]
        self._second += (var + mean.square()) * part.shape[1]

    def settle(self) -> None:
        """What has been gathered becomes what is given."""
        if self._count:
            self._mean = self._first / self._count
            self._var = (self._second / self._count - self._mean.square()).clamp(min=0)
            self._begin()

    def _normalised(self, x: Tensor) -> Tensor:
        """`x scale + shift` per channel, in float32 or wider."""
        norm, wide = self.norm, widen(x)
        each = norm.num_channels // norm.num_groups
        scale = (self._var + norm.eps).rsqrt().repeat_interleave(each)
        shift = -self._mean.repeat_interleave(each) * scale
        if norm.affine:
            weight, bias = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
            scale, shift = scale * weight, shift * weight + bias
        scale, shift = (v.to(wide)[:, None, None] for v in (scale, shift))
        return torch.addcmul(shift, wide, scale).to(x.dtype)


def _share(root: nn.Module, now: _Now) -> list[_SharedNorm]:
    """Put a `_SharedNorm` around every `GroupNorm` below `root`."""
    shared = []
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                norm = _SharedNorm(child, now)
                setattr(parent, name, norm)
                shared.append(norm)
    return shared


def _autoencoder(codec: Codec) -> tuple[KLCodec | VQCodec, FirstStage]:
    if not isinstance(codec, KLCodec | VQCodec):
        raise UserError(f"a codec of type {type(codec).__name__} cannot be cut into tiles; only KL and VQ codecs can")
    return codec, codec.network


def _twin(codec: Codec) -> tuple[KLCodec | VQCodec, Any]:
    """A codec and a second network of its own: other modules over the same weights, so that nothing has to be undone
    and another thread may use the first meanwhile."""
    own, network = _autoencoder(codec)
    shared = [*network.parameters(), *network.buffers()]
    return own, copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


# --- layers one by one --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One layer of an encoder or decoder.

    Attributes:
        run: `(x, z_q) -> x`.
        cost: elements held at once per latent pixel.
        stored: elements of its input and output per latent pixel.
        scale: pixels of its output per latent pixel.
        reach: how far it looks, in latent pixels.
        attends: to all pixels.
        normed: where its norms are, in the order of their use.
    """

    run: Callable[[Tensor, Tensor | None], Tensor]
    cost: int
    stored: int
    scale: int
    reach: float
    attends: bool = False
    normed: nn.Module | None = None

    @property
    def norms(self) -> list[_SharedNorm]:
        """Its norms, in the order of their use."""
        return [] if self.normed is None else [m for m in self.normed.modules() if isinstance(m, _SharedNorm)]


def _plainly(layer: Any, x: Tensor, z_q: Tensor | None) -> Tensor:
    out: Tensor = layer(x)
    return out


def _modulated(layer: Any, x: Tensor, z_q: Tensor | None) -> Tensor:
    out: Tensor = layer(x, z_q)
    return out


def _layer(resnet: Any, attention: Any | None, x: Tensor, z_q: Tensor | None) -> Tensor:
    x = resnet(x, z_q)
    if attention is None:
        return x
    out: Tensor = attention(x) if z_q is None else attention(x, temb=z_q)
    return out


def _finish(part: Any, x: Tensor, z_q: Tensor | None) -> Tensor:
    x = part.conv_norm_out(x) if z_q is None else part.conv_norm_out(x, z_q)
    out: Tensor = part.conv_out(F.silu(x))
    return out


def _resnets(block: Any, scale: int) -> Iterator[_Step]:
    """The residual blocks of a level, each with the attention that follows it.

    A block holds its input, then its norm and activation (3 in), its first convolution, the second norm and activation
    beside both convolutions' values (in + 3 out).
    """
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        into, out = resnet.conv1.in_channels, resnet.conv1.out_channels
        attention = attentions[index] if attentions is not None and index < len(attentions) else None
        held = max(3 * into, 2 * into + out + _COPIES * (into + out) // 2, into + 3 * out + _COPIES * out)
        cost = max(held, 0 if attention is None else 8 * out) * scale**2
        run, stored = partial(_layer, resnet, attention), (into + out) * scale**2
        yield _Step(run, cost, stored, scale, 2 / scale, attention is not None, resnet)


def _first(conv: Any, scale: int) -> _Step:
    cost = _convolution(conv.in_channels, conv.out_channels) * scale**2
    return _Step(partial(_plainly, conv), cost, (conv.in_channels + conv.out_channels) * scale**2, scale, 1 / scale)


def _middle(block: Any, scale: int) -> _Step:
    inner, run = list(_resnets(block, scale)), partial(_modulated, block)
    cost, stored = max(s.cost for s in inner), max(s.stored for s in inner)
    return _Step(run, cost, stored, scale, 4 / scale, any(s.attends for s in inner), block)


def _last(part: Any, scale: int) -> _Step:
    conv = part.conv_out
    into, out = conv.in_channels, conv.out_channels
    cost = max(3 * into, _convolution(into, out, into)) * scale**2
    return _Step(partial(_finish, part), cost, (into + out) * scale**2, scale, 1 / scale, normed=part.conv_norm_out)


def _convolution(into: int, out: int, more: int = 0) -> int:
    """Elements that a convolution holds, with `into` and `out` elements and `more` beside it."""
    return into + out + _COPIES * (into + out) // 2 + more


def _decoder_steps(decoder: Decoder) -> list[_Step]:
    steps, scale = [_first(decoder.conv_in, 1), _middle(decoder.mid_block, 1)], 1
    for block in decoder.up_blocks:
        steps += _resnets(block, scale)
        for layer in getattr(block, "upsamplers", None) or ():
            before, scale = layer.conv.in_channels * scale**2, 2 * scale
            into, out = layer.conv.in_channels * scale**2, layer.conv.out_channels * scale**2
            steps.append(
                _Step(partial(_plainly, layer), _convolution(into, out, before), before + out, scale, 1 / scale)
            )
    return [*steps, _last(decoder, scale)]


def _encoder_steps(encoder: Encoder, factor: int) -> list[_Step]:
    scale = factor
    steps = [_first(encoder.conv_in, scale)]
    for block in encoder.down_blocks:
        steps += _resnets(block, scale)
        for layer in getattr(block, "downsamplers", None) or ():
            into, reach, scale = layer.conv.in_channels * scale**2, 1 / scale, scale // 2
            out = layer.conv.out_channels * scale**2
            steps.append(_Step(partial(_plainly, layer), _convolution(into, out, into), into + out, scale, reach))
    return [*steps, _middle(encoder.mid_block, scale), _last(encoder, scale)]


def _fits(steps: Sequence[_Step], size: tuple[int, int], tile: int) -> list[bool]:
    """Which layers take, for a whole picture, no more memory than the most expensive one takes for a tile."""
    room = max(step.cost for step in steps) * tile**2
    return [step.cost * size[0] * size[1] <= room for step in steps]


# --- walks over tiles ---------------------------------------------------------------------------------------------


class _Walker:
    """Runs layers over one picture in tiles, all norms below `root` with the statistics of the whole."""

    def __init__(self, root: nn.Module, tiling: Tiling) -> None:
        self.tiling, self.now = tiling, _Now()
        self.norms = _share(root, self.now)

    def __call__(
        self, steps: Sequence[_Step], x: Tensor, z_q: Tensor | None, size: tuple[int, int], scale: int
    ) -> Tensor:
        """Values (1, C, H, W) of `size` latent pixels, `scale` to one -> what the layers make of them."""
        try:
            if self.tiling.overlap is not None:
                return self._tile_by_tile(steps, x, z_q, size, scale, self.tiling.overlap)
            for step in steps:
                x, scale = self._layer(step, x, z_q, size, scale), step.scale
            return x
        finally:
            self.now.mode, self.now.target = "own", None

    def _run(
        self, steps: Sequence[_Step], x: Tensor, z_q: Tensor | None, scale: int, box: Box, region: Box = (0, 0, 0, 0)
    ) -> Tensor:
        """The layers over one tile, of which `region` (within it) is gathered."""
        self.now.region, self.now.size = region, (box[1] - box[0], box[3] - box[2])
        values, codes = _cut(x, box, scale), None if z_q is None else _cut(z_q, box, 1)
        for step in steps:
            values = step.run(values, codes)
        return values

    def _tile_by_tile(
        self, steps: Sequence[_Step], x: Tensor, z_q: Tensor | None, size: tuple[int, int], scale: int, overlap: int
    ) -> Tensor:
        out = steps[-1].scale
        rows, columns = (pieces(length, self.tiling.tile, overlap) for length in size)
        self.now.mode = "gather"
        for row, column in product(rows, columns):
            self._run(steps, x, z_q, scale, _box(row, column), _own(row, column))
        for norm in self.norms:
            norm.settle()
        self.now.mode = "given"
        margin = min(math.ceil(sum(step.reach for step in steps)), 3 * overlap // 8)
        down, across = (feathers(along, overlap, margin, out) for along in (rows, columns))
        canvas: Tensor | None = None
        for (row, y), (column, w) in product(zip(rows, down, strict=True), zip(columns, across, strict=True)):
            part = self._run(steps, x, z_q, scale, _box(row, column))
            if canvas is None:
                kind, wide = part.dtype, torch.promote_types(part.dtype, torch.float32)
                canvas = part.new_zeros((*part.shape[:2], size[0] * out, size[1] * out), dtype=wide)
            _cut(canvas, _box(row, column), out).addcmul_(part.to(canvas), (y[:, None] * w).to(canvas))
        assert canvas is not None
        return canvas.to(kind)

    def _layer(self, step: _Step, x: Tensor, z_q: Tensor | None, size: tuple[int, int], scale: int) -> Tensor:
        """One layer over all tiles, which here have no overlap but see as far around them as the layer looks."""
        halo = math.ceil(step.reach)
        rows, columns = ([_widened(p, halo, length) for p in pieces(length, self.tiling.tile, 0)] for length in size)
        self.now.mode = "given"
        for norm in step.norms:
            self.now.target = norm
            for row, column in product(rows, columns):
                with suppress(_Enough):
                    self._run([step], x, z_q, scale, _box(row, column), _own(row, column))
            norm.settle()
        self.now.target = None
        whole: Tensor | None = None
        for row, column in product(rows, columns):
            part = self._run([step], x, z_q, scale, _box(row, column))
            if whole is None:
                whole = part.new_empty((*part.shape[:2], size[0] * step.scale, size[1] * step.scale))
            place = (row.first, row.last, column.first, column.last)
            _cut(whole, place, step.scale).copy_(_cut(part, _own(row, column), step.scale))
        assert whole is not None
        return whole


def _box(row: Piece, column: Piece) -> Box:
    return row.start, row.stop, column.start, column.stop


def _own(row: Piece, column: Piece) -> Box:
    """What is a tile's own, within the tile."""
    return (
        row.first - row.start, row.last - row.start, column.first - column.start, column.last - column.start,
    )  # fmt: skip


def _widened(piece: Piece, halo: int, length: int) -> Piece:
    """The piece with its surroundings, as far as the picture goes."""
    return replace(piece, start=max(piece.start - halo, 0), stop=min(piece.stop + halo, length))


class _TiledDecoder(nn.Module):
    """A decoder whose inner layers run on the whole picture and whose outer ones run on tiles."""

    def __init__(self, decoder: Decoder, tiling: Tiling) -> None:
        super().__init__()
        self._walker = _Walker(decoder, tiling)
        self._steps, self._tile = _decoder_steps(decoder), tiling.tile

    def forward(self, z: Tensor, z_q: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`, one picture after the other."""
        parts = range(len(z))
        return torch.cat([self._one(z[i : i + 1], None if z_q is None else z_q[i : i + 1]) for i in parts])

    def _one(self, x: Tensor, z_q: Tensor | None) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        fit = _fits(self._steps, size, self._tile)
        attending = [i for i, step in enumerate(self._steps) if step.attends]
        split = max(fit.index(False), *(i + 1 for i in (0, *attending)))
        for step in self._steps[:split]:
            x = step.run(x, z_q)
        return self._walker(self._steps[split:], x, z_q, size, self._steps[split - 1].scale)


class _TiledEncoder(nn.Module):
    """An encoder whose outer layers run on tiles and whose inner ones run on the whole picture."""

    def __init__(self, encoder: Encoder, tiling: Tiling, factor: int) -> None:
        super().__init__()
        self._walker = _Walker(encoder, tiling)
        self._steps, self._tile, self._factor = _encoder_steps(encoder, factor), tiling.tile, factor

    def forward(self, x: Tensor) -> Tensor:
        """As `Encoder.forward`, one picture after the other."""
        return torch.cat([self._one(x[i : i + 1]) for i in range(len(x))])

    def _one(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] // self._factor, x.shape[-1] // self._factor)
        fit = _fits(self._steps, size, self._tile)
        attending = [i for i, step in enumerate(self._steps) if step.attends]
        split = min(len(fit) - fit[::-1].index(False), *attending, len(fit) - 1)
        x = self._walker(self._steps[:split], x, None, size, self._factor)
        for step in self._steps[split:]:
            x = step.run(x, None)
        return x
