"""3x3 convolutions with fewer products: Winograd's F(2x2, 3x3), for half precision on a CPU (Lavin and Gray 2015).

Four neighbouring outputs need 36 products of a channel by the definition. Written as `A' [(B' d B) * (G g G')] A`,
with d the 4x4 inputs that they see and g the kernel, they need 16, and these are 16 plain matrix products over all
channels and tiles, which a CPU does at its best rate. A picture that is doubled by repetition first repeats rows in
every tile: one of four differences is nought in each direction, and 9 products are left of 36.

The mathematics is that of the convolution. Sums are rounded at other places, so in bfloat16 the error of one
convolution is 2.5 times that of the definition, and of a whole UNet of Stable Diffusion 1.4 times.

`engage` gives a network's convolutions this way of computing, for calls without gradients; names, weights and
everything else of them stay. Where weights are changed in place the transformed kernels are made anew.

>>> x, conv = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0)), nn.Conv2d(4, 5, 3, padding=1)
>>> with torch.no_grad():
...     bool(torch.allclose(convolve(x, transformed(conv.weight), conv.bias), conv(x), atol=1e-5))
...     twice = convolve_doubled(x, transformed_doubled(conv.weight), conv.bias)
...     bool(torch.allclose(twice, conv(nn.functional.interpolate(x, scale_factor=2.0)), atol=1e-5))
True
True
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from sfumato.backends.driven import own_forward
from sfumato.backends.timing import times_as_fast
from sfumato.networks.resnet import Upsample2D

ALGORITHMS = ("direct", "winograd")
"""How a 3x3 convolution may be computed: by the definition (torch), or so."""
SCOPE = "sfumato::convolution"
"""What a profile calls the whole of it."""
LEAST_CHANNELS, LEAST_PIXELS = 192, 512
"""Channels in and out, and pixels of all pictures of a call, below which the definition is as fast: 16 matrices are
then read for a handful of rows."""
SHARE, LEAST_BUDGET = 0.43, 2**28
"""Transformed kernels take at most this share of the network's own weights, or so many bytes."""
_TILES = 512  # rows of one matrix product: what lies between the products stays in the cache
_ROWS = 32  # output channels whose kernels are transformed at a time
_PROBE = (2, 640, 16, 16)  # the shape that is measured: some hundredths of a second


# --- kernels ---------------------------------------------------------------------------------------------------------


def transformed(weight: Tensor) -> Tensor:
    """`G g G'` of every kernel: (K, C, 3, 3) -> (16, K, C), sums in float32."""
    return _transformed(weight, ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)))


def transformed_doubled(weight: Tensor) -> Tensor:
    """The same for a picture that is doubled first: (K, C, 3, 3) -> (9, K, C)."""
    return _transformed(weight, ((1, 0, 0), (1, 1, 1), (0, 0, 1)))


def _transformed(weight: Tensor, g: Sequence[Sequence[float]]) -> Tensor:
    """One product of the kernels with `G` for rows and columns at once. Its numbers are powers of two, so that products
    in bfloat16 are exact; those of other half types are reckoned in float32."""
    reckoned = weight.dtype if weight.dtype == torch.bfloat16 else torch.promote_types(weight.dtype, torch.float32)
    both = torch.kron(torch.tensor(g), torch.tensor(g)).to(reckoned)
    count, channels = weight.shape[:2]
    kernels = weight.permute(0, 2, 3, 1).reshape(count, 9, channels)
    out = weight.new_empty(len(both), count, channels)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        out[:, rows] = (both @ kernels[rows].to(reckoned)).transpose(0, 1)
    return out


# --- convolutions ----------------------------------------------------------------------------------------------------


class _Workspace(threading.local):
    """Memory between the products, kept from call to call, a piece for each name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised, of this shape and the type of `like`."""
        need = int(torch.Size(shape).numel())
        kept = self._kept.get(name)
        if kept is None or kept.numel() < need or kept.dtype != like.dtype:
            kept = self._kept[name] = like.new_empty(need)
        return kept[:need].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()


_work = _Workspace()


def convolve(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride and padding 1.

    Args:
        x: (B, C, H, W), H and W even; fastest in channels-last memory.
        kernels: (16, K, C), `transformed`.
        bias: (K,).

    Returns:
        (B, K, H, W) in channels-last memory.
    """
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, width, kernels.shape[1])
    rows = x.permute(0, 2, 3, 1)
    for b, top, n in _bands(batch, height // 2, width // 2):
        seen = _bordered(rows[b], 2 * top - 1, 2 * n + 2)
        products = _products(_tiles(seen), kernels, bias)
        _gathered(products, out[b, 2 * top : 2 * (top + n)])
    return out.permute(0, 3, 1, 2)


def convolve_doubled(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Double height and width by repetition, then a 3x3 convolution with stride and padding 1.

    Args:
        x: (B, C, H, W); fastest in channels-last memory.
        kernels: (9, K, C), `transformed_doubled`.
        bias: (K,).

    Returns:
        (B, K, 2 H, 2 W) in channels-last memory.
    """
    batch, _, height, width = x.shape
    out = x.new_empty(batch, 2 * height, 2 * width, kernels.shape[1])
    rows = x.permute(0, 2, 3, 1)
    for b, top, n in _bands(batch, height, width):
        seen = _bordered(rows[b], top - 1, n + 2)
        products = _products(_doubled_tiles(seen), kernels, bias)
        _gathered_doubled(products, out[b, 2 * top : 2 * (top + n)])
    return out.permute(0, 3, 1, 2)


def _bands(batch: int, height: int, width: int) -> Iterator[tuple[slice, int, int]]:
    """Pictures, first row and number of rows of tiles that are computed together."""
    together = max(1, _TILES // (height * width))
    rows = min(height, max(1, _TILES // width))
    for first in range(0, batch, together):
        for top in range(0, height, rows):
            yield slice(first, min(first + together, batch)), top, min(rows, height - top)


def _bordered(rows: Tensor, top: int, count: int) -> Tensor:
    """`count` rows from `top` on, nought outside: (b, H, W, C) -> (b, count, W + 2, C)."""
    batch, height, width, channels = rows.shape
    out = _work.take("seen", (batch, count, width + 2, channels), rows)
    out[:, :, 0] = 0
    out[:, :, -1] = 0
    first, last = max(top, 0), min(top + count, height)
    out[:, : first - top] = 0
    out[:, last - top :] = 0
    out[:, first - top : last - top, 1:-1] = rows[:, first:last]
    return out


def _tiles(seen: Tensor) -> Tensor:
    """`B' d B` of every tile: (b, 2 n + 2, 2 w + 2, C) -> (4, 4, b, n, w, C)."""
    batch, height, width, channels = seen.shape
    n, w = height // 2 - 1, width // 2 - 1
    half = _work.take("half", (4, batch, n, width, channels), seen)
    _differences(tuple(seen[:, i : i + 2 * n - 1 : 2] for i in range(4)), half.unbind(0))
    out = _work.take("tiles", (4, 4, batch, n, w, channels), seen)
    _differences(tuple(half[:, :, :, i : i + 2 * w - 1 : 2] for i in range(4)), out.unbind(1))
    return out


def _differences(d: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`B' d` with rows (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _doubled_tiles(seen: Tensor) -> Tensor:
    """The same of a doubled picture, without what is nought: (b, n + 2, w + 2, C) -> (3, 3, b, n, w, C)."""
    batch, height, width, channels = seen.shape
    n, w = height - 2, width - 2
    half = _work.take("half", (2, batch, n + 1, width, channels), seen)
    torch.sub(seen[:, :-1], seen[:, 1:], out=half[0])
    half[1, :, :n] = seen[:, 1:-1]
    out = _work.take("tiles", (3, 3, batch, n, w, channels), seen)
    for i, row in enumerate((half[0, :, :n], half[1, :, :n], half[0, :, 1:])):
        torch.sub(row[:, :, :-2], row[:, :, 1:-1], out=out[i, 0])
        out[i, 1] = row[:, :, 1:-1]
        torch.sub(row[:, :, 1:-1], row[:, :, 2:], out=out[i, 2])
    return out


def _products(tiles: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """(s, s, b, n, w, C) times (s s, K, C) -> (s, s, b, n, w, K). The bias joins the one product that every output has
    once, with weight 1."""
    side, _, *where, channels = tiles.shape
    out = _work.take("products", (side, side, *where, kernels.shape[1]), tiles)
    flat = out.view(side * side, -1, out.shape[-1])
    torch.bmm(tiles.view(side * side, -1, channels), kernels.transpose(1, 2), out=flat)
    if bias is not None:
        out[1, 1] += bias
    return out


def _gathered(products: Tensor, out: Tensor) -> None:
    """`A' m A` into the rows (b, 2 n, 2 w, K) of the output."""
    _, _, batch, n, w, channels = products.shape
    half = _work.take("gathered", (2, 4, batch, n, w, channels), products)
    _sums(products.unbind(0), half.unbind(0))
    places = out.view(batch, n, 2, w, 2, channels).permute(2, 4, 0, 1, 3, 5)
    _sums(half.unbind(1), places.unbind(1))


def _sums(m: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`A' m` with rows (1, 1, 1, 0), (0, 1, -1, -1)."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _gathered_doubled(products: Tensor, out: Tensor) -> None:
    """The same for a doubled picture, by (1, 1, 0), (0, 1, -1)."""
    _, _, batch, n, w, channels = products.shape
    half = _work.take("gathered", (2, 3, batch, n, w, channels), products)
    torch.add(products[0], products[1], out=half[0])
    torch.sub(products[1], products[2], out=half[1])
    places = out.view(batch, n, 2, w, 2, channels).permute(2, 4, 0, 1, 3, 5)
    torch.add(half[:, 0], half[:, 1], out=places[:, 0])
    torch.sub(half[:, 1], half[:, 2], out=places[:, 1])


# --- networks --------------------------------------------------------------------------------------------------------


class Convolving:
    """Stands in the place of the `forward` of a convolution, or of a doubling with its convolution.

    Args:
        module: a `Conv2d` that `fits`, or an `Upsample2D` whose convolution does.
        store: where the network's transformed kernels are.
    """

    def __init__(self, module: nn.Conv2d | Upsample2D, store: Store) -> None:
        self.module, self.store, self.own = module, store, own_forward(module)
        self.doubles = isinstance(module, Upsample2D)
        self.bytes = (9 if self.doubles else 16) * self.conv.weight.nbytes // 9  # of the transformed kernels
        self.wanted = True  # as far as is known
        store.members.append(self)

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        self.wanted = self._worthwhile(x, size)
        kernels = self.store.kernels(self) if self.wanted else None
        if kernels is not None:
            with record_function(SCOPE):
                return (convolve_doubled if self.doubles else convolve)(x, kernels, self.conv.bias)
        out: Tensor = self.own(x) if size is None else self.own(x, size)
        return out

    def _worthwhile(self, x: Tensor, size: tuple[int, int] | None) -> bool:
        """Whether this call can be computed so, and gains. `size`: what a doubling is told to give."""
        if self.doubles and not _untouched(self.conv):
            return False
        conv, weight = self.conv, self.conv.weight
        if x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in (x, *conv.parameters())):
            return False
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined,no-untyped-call]
            return False
        batch, _, height, width = x.shape
        if self.doubles:
            return size in (None, (2 * height, 2 * width))
        return height % 2 == 0 and width % 2 == 0 and batch * height * width >= LEAST_PIXELS

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution, as it is now."""
        conv = self.module.conv if isinstance(self.module, Upsample2D) else self.module
        assert conv is not None
        return conv

    def transformed(self) -> Tensor:
        """The kernels of the weights as they are now."""
        return (transformed_doubled if self.doubles else transformed)(self.conv.weight.detach())

    @property
    def state(self) -> tuple[int, int]:
        """Changes when the weights are replaced or changed in place."""
        weight = self.conv.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class Store:
    """The transformed kernels of one network, made when they are first needed, within a budget.

    Small kernels are those of high resolutions, which gain the most for each byte: room is kept for them.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.members = budget, list[Convolving]()
        self._kept: dict[Convolving, tuple[tuple[int, int], Tensor]] = {}

    def kernels(self, member: Convolving) -> Tensor | None:
        """Of a member; None where the budget has no room for them."""
        state, kept = member.state, self._kept.get(member)
        if kept is None and self._taken(member) + member.bytes > self.budget:
            return None
        if kept is None or kept[0] != state:
            kept = self._kept[member] = (state, member.transformed())
        return kept[1]

    def _taken(self, member: Convolving) -> int:
        """Bytes of what is there and of what has precedence, unless its last call had no use for it."""
        return sum(
            one.bytes for one in self.members if one in self._kept or (one.wanted and one.bytes < member.bytes)
        )

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        for one in self.members:
            one.wanted = True


def _untouched(conv: nn.Module) -> bool:
    """Whether a convolution that is not called itself is still the one that was there: no adapter, no hook."""
    return fits(conv) and "forward" not in vars(conv) and not (conv._forward_hooks or conv._forward_pre_hooks)


def fits(module: nn.Module) -> bool:
    """Whether a module is a 3x3 convolution that may be computed so, of a width that gains."""
    return (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )


def engage(network: nn.Module) -> None:
    """Let the convolutions of a network that fit be computed so from now on."""
    weights = sum(parameter.nbytes for parameter in network.parameters())
    store = Store(max(LEAST_BUDGET, int(SHARE * weights)))
    doublings = [m for m in network.modules() if isinstance(m, Upsample2D) and m.conv is not None and fits(m.conv)]
    inside = {one.conv for one in doublings}
    plain = [m for m in network.modules() if isinstance(m, nn.Conv2d) and fits(m) and m not in inside]
    members = [*(Convolving(module, store) for module in doublings), *(Convolving(module, store) for module in plain)]
    for one in members:
        vars(one.module)["forward"] = one


def release(network: nn.Module) -> None:
    """Let them be computed by the definition again."""
    for module in network.modules():
        if isinstance(vars(module).get("forward"), Convolving):
            del vars(module)["forward"]


@contextmanager
def holding(network: nn.Module | None) -> Iterator[None]:
    """The transformed kernels that are made in the block are forgotten at its end: their memory is free for what comes
    next, and what is computed so never depends on what was computed before."""
    try:
        yield
    finally:
        for module in network.modules() if network is not None else ():
            forward = vars(module).get("forward")
            if isinstance(forward, Convolving):
                forward.store.clear()
        _work.clear()


# --- choice ----------------------------------------------------------------------------------------------------------


@cache
def chosen(dtype: torch.dtype, device: torch.device) -> str:
    """"winograd" where it is faster than the definition here, which can only be in half precision on a CPU; else
    "direct". Measured once in a process, with 640 channels at 16 x 16, where the two are well apart."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return "direct"
    x = torch.ones(_PROBE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.ones(_PROBE[1], _PROBE[1], 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    kernels = transformed(weight)
    gain = times_as_fast(lambda: convolve(x, kernels, None), lambda: F.conv2d(x, weight, padding=1))
    return "winograd" if gain > 1 else "direct"
