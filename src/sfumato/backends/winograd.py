"""3x3 convolutions with fewer products: Winograd's F(2x2, 3x3) and F(4x4, 3x3) on a CPU (Lavin and Gray 2015).

Four neighbouring outputs need 36 products of a channel by the definition. Written as `A' [(B' d B) * (G g G')] A`,
with d the 4x4 inputs that they see and g the kernel, they need 16, and these are 16 plain matrix products over all
channels and tiles, which a CPU does at its best rate. Sixteen outputs need 144, or 36 with the 6x6 inputs that they
see. A picture that is doubled by repetition first repeats rows in every tile: one of four differences is nought in each
direction, and 9 products are left of 36.

The mathematics is that of the convolution. Sums are rounded at other places. In bfloat16, where only the tiles of four
are used, the error of one convolution is 2.5 times that of the definition, and of a whole UNet of Stable Diffusion 1.4
times. In float32 tiles of four are more exact than torch's own (3e-7 against 7e-7), those of sixteen less (3e-6).

`backends.convolutions` gives the convolutions of a network this way of computing.

>>> x, conv = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)), torch.nn.Conv2d(4, 5, 3, padding=1)
>>> with torch.no_grad():
...     bool(torch.allclose(convolve(x, transformed(conv.weight, 2), conv.bias), conv(x), atol=1e-5))
...     bool(torch.allclose(convolve(x, transformed(conv.weight, 4), conv.bias), conv(x), atol=1e-5))
...     twice = convolve_doubled(x, transformed_doubled(conv.weight), conv.bias)
...     bool(torch.allclose(twice, conv(F.interpolate(x, scale_factor=2.0)), atol=1e-5))
True
True
True
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILES = 512  # rows of one matrix product: what lies between the products stays in the cache
_ROWS = 32  # output channels whose kernels are transformed at a time
_KERNELS: dict[int, Sequence[Sequence[float]]] = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    ),
}  # fmt: skip
"""`G` for tiles of so many outputs a side."""


# --- kernels ---------------------------------------------------------------------------------------------------------


def transformed(weight: Tensor, outputs: int) -> Tensor:
    """`G g G'` of every kernel, for tiles of so many outputs a side, 2 or 4: (K, C, 3, 3) -> (16 or 36, K, C), sums in
    float32."""
    return _transformed(weight, _KERNELS[outputs])


def transformed_doubled(weight: Tensor) -> Tensor:
    """The same for a picture that is doubled first: (K, C, 3, 3) -> (9, K, C)."""
    return _transformed(weight, ((1, 0, 0), (1, 1, 1), (0, 0, 1)))


def _transformed(weight: Tensor, g: Sequence[Sequence[float]]) -> Tensor:
    """One product of the kernels with `G` for rows and columns at once. In bfloat16 its numbers are powers of two, so
    that products are exact; those of other half types are reckoned in float32."""
    reckoned = weight.dtype if weight.dtype == torch.bfloat16 else torch.promote_types(weight.dtype, torch.float32)
    both = torch.kron(*[torch.tensor(g, dtype=reckoned, device=weight.device)] * 2)
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
            with torch.inference_mode(False):  # else calls outside it could not write there
                kept = self._kept[name] = torch.empty(need, dtype=like.dtype, device=like.device)
        return kept[:need].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()


work = _Workspace()
"""Of all convolutions of a thread."""


def convolve(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride and padding 1.

    Args:
        x: (B, C, H, W), H and W multiples of a tile's outputs; fastest in channels-last memory.
        kernels: (16, K, C) or (36, K, C), `transformed`, which tells the tiles.
        bias: (K,).

    Returns:
        (B, K, H, W) in channels-last memory.

    Raises:
        ValueError: where H or W are no such multiples.
    """
    batch, _, height, width = x.shape
    m = math.isqrt(len(kernels)) - 2
    if height % m or width % m:
        raise ValueError(f"{height} x {width} pixels are no whole number of {m} x {m} tiles")
    out = _empty(x, kernels.shape[1], height, width)
    rows, places = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    for b, top, n in _bands(batch, height // m, width // m):
        seen = _bordered(rows[b], m * top - 1, m * n + 2)
        products = _products(_tiles(seen, m), kernels, bias)
        _gathered(products, places[b, m * top : m * (top + n)])
    return out


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
    out = _empty(x, kernels.shape[1], 2 * height, 2 * width)
    rows, places = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    for b, top, n in _bands(batch, height, width):
        seen = _bordered(rows[b], top - 1, n + 2)
        products = _products(_doubled_tiles(seen), kernels, bias)
        _gathered_doubled(products, places[b, 2 * top : 2 * (top + n)])
    return out


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """For the output: in channels-last memory, and no view of anything, so that it may be changed in place."""
    shape = (len(x), channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def convolve_unfolded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride and padding 1 as one matrix product, by the definition.

    Args:
        x: (B, C, H, W). weight: (K, C, 3, 3), both fastest in channels-last memory. bias: (K,).

    Returns:
        (B, K, H, W) in channels-last memory.
    """
    batch, channels, height, width = x.shape
    seen = _bordered(x.permute(0, 2, 3, 1), -1, height + 2).unfold(1, 3, 1).unfold(2, 3, 1)
    patches = work.take("patches", (batch, height, width, 3, 3, channels), x)
    patches.copy_(seen.permute(0, 1, 2, 4, 5, 3))
    kernels = weight.permute(0, 2, 3, 1).reshape(-1, 9 * channels)
    out = F.linear(patches.view(-1, 9 * channels), kernels, bias)
    return out.view(batch, height, width, len(weight)).permute(0, 3, 1, 2)


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
    out = work.take("seen", (batch, count, width + 2, channels), rows)
    out[:, :, 0] = 0
    out[:, :, -1] = 0
    first, last = max(top, 0), min(top + count, height)
    out[:, : first - top] = 0
    out[:, last - top :] = 0
    out[:, first - top : last - top, 1:-1] = rows[:, first:last]
    return out


def _tiles(seen: Tensor, m: int) -> Tensor:
    """`B' d B` of every tile: (b, m n + 2, m w + 2, C) -> (m + 2, m + 2, b, n, w, C)."""
    batch, height, width, channels = seen.shape
    side, n, w = m + 2, (height - 2) // m, (width - 2) // m
    differences = _differences if m == 2 else _differences_of_six
    half = work.take("half", (side, batch, n, width, channels), seen)
    differences(tuple(seen[:, i : i + m * n - m + 1 : m] for i in range(side)), half.unbind(0))
    out = work.take("tiles", (side, side, batch, n, w, channels), seen)
    differences(tuple(half[:, :, :, i : i + m * w - m + 1 : m] for i in range(side)), out.unbind(1))
    return out


def _differences(d: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`B' d` with rows (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _differences_of_six(d: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`B' d` with rows (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1). Those in the middle are sum and difference of the same two."""
    torch.add(d[4], d[0], alpha=4, out=out[0]).sub_(d[2], alpha=5)
    torch.sub(d[4], d[2], alpha=4, out=out[1])
    torch.sub(d[3], d[1], alpha=4, out=out[2])
    out[1].add_(out[2])
    torch.sub(out[1], out[2], alpha=2, out=out[2])
    torch.sub(d[4], d[2], out=out[3])
    torch.sub(d[3], d[1], out=out[4])
    out[3].add_(out[4], alpha=2)
    torch.sub(out[3], out[4], alpha=4, out=out[4])
    torch.add(d[5], d[1], alpha=4, out=out[5]).sub_(d[3], alpha=5)


def _doubled_tiles(seen: Tensor) -> Tensor:
    """The same of a doubled picture, without what is nought: (b, n + 2, w + 2, C) -> (3, 3, b, n, w, C)."""
    batch, height, width, channels = seen.shape
    n, w = height - 2, width - 2
    half = work.take("half", (2, batch, n + 1, width, channels), seen)
    torch.sub(seen[:, :-1], seen[:, 1:], out=half[0])
    half[1, :, :n] = seen[:, 1:-1]
    out = work.take("tiles", (3, 3, batch, n, w, channels), seen)
    for i, row in enumerate((half[0, :, :n], half[1, :, :n], half[0, :, 1:])):
        torch.sub(row[:, :, :-2], row[:, :, 1:-1], out=out[i, 0])
        out[i, 1] = row[:, :, 1:-1]
        torch.sub(row[:, :, 1:-1], row[:, :, 2:], out=out[i, 2])
    return out


def _products(tiles: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """(s, s, b, n, w, C) times (s s, K, C) -> (s, s, b, n, w, K). The bias joins the one product that every output has
    once, with weight 1."""
    side, _, *where, channels = tiles.shape
    out = work.take("products", (side, side, *where, kernels.shape[1]), tiles)
    flat = out.view(side * side, -1, out.shape[-1])
    torch.bmm(tiles.view(side * side, -1, channels), kernels.transpose(1, 2), out=flat)
    if bias is not None:
        out[1, 1] += bias
    return out


def _gathered(products: Tensor, out: Tensor) -> None:
    """`A' m A` into the rows (b, m n, m w, K) of the output."""
    side, _, batch, n, w, channels = products.shape
    m, sums = side - 2, _sums if side == 4 else _sums_of_six
    half = work.take("gathered", (m, side, batch, n, w, channels), products)
    sums(products.unbind(0), half.unbind(0))
    places = out.view(batch, n, m, w, m, channels).permute(2, 4, 0, 1, 3, 5)
    sums(half.unbind(1), places.unbind(1))


def _sums(m: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`A' m` with rows (1, 1, 1, 0), (0, 1, -1, -1)."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _sums_of_six(m: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`A' m` with rows (1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)."""
    for i, combine in enumerate((torch.add, torch.sub)):
        combine(m[1], m[2], out=out[i])
        combine(m[3], m[4], out=out[i + 2])
        out[i].add_(out[i + 2], alpha=1 + i)
        torch.add(out[i], out[i + 2], alpha=3 + 3 * i, out=out[i + 2])
    out[0].add_(m[0])
    out[3].add_(m[5])


def _gathered_doubled(products: Tensor, out: Tensor) -> None:
    """The same for a doubled picture, by (1, 1, 0), (0, 1, -1)."""
    _, _, batch, n, w, channels = products.shape
    half = work.take("gathered", (2, 3, batch, n, w, channels), products)
    torch.add(products[0], products[1], out=half[0])
    torch.sub(products[1], products[2], out=half[1])
    places = out.view(batch, n, 2, w, 2, channels).permute(2, 4, 0, 1, 3, 5)
    torch.add(half[:, 0], half[:, 1], out=places[:, 0])
    torch.sub(half[:, 1], half[:, 2], out=places[:, 1])


# --- gradients -------------------------------------------------------------------------------------------------------


class Convolution(torch.autograd.Function):
    """A 3x3 convolution with stride and padding 1 in tiles of sixteen outputs, whose gradients have as few products.

    With `y = A' [U * V] A`, `U = G g G'` and `V = B' d B`, the gradient of a kernel is `G' [sum over tiles of
    (A dy A') * V] G`; that of the input is a convolution of `dy` with the turned kernels.

    >>> x, weight = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    >>> x.requires_grad_(), weight.requires_grad_()  # doctest: +ELLIPSIS
    (...)
    >>> torch.autograd.gradcheck(Convolution.apply, (x, weight, None))
    True
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Args as `convolve`'s, but for the weight (K, C, 3, 3)."""
        ctx.save_for_backward(x, weight)
        return convolve(x, transformed(weight, 4), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of what needs one. Those that are to have gradients themselves, and many at once, are torch's own."""
        (dy,), (x, weight) = grads, ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            return _own_gradients(dy, x, weight, ctx.needs_input_grad)
        with torch.autocast("cpu", enabled=False):
            turned = weight.flip(2, 3).transpose(0, 1)
            return (
                convolve(dy, transformed(turned, 4), None) if of_input else None,
                torch.empty_like(weight).copy_(weight_gradient(x, dy)) if of_weight else None,
                dy.sum((0, 2, 3)) if of_bias else None,
            )


def _own_gradients(dy: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    found = torch.ops.aten.convolution_backward(
        dy, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(wanted)
    )
    return tuple(found)


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the kernels (K, C, 3, 3), from the input (B, C, H, W) and the output's gradient (B, K, H, W); H
    and W multiples of 4."""
    batch, channels, height, width = x.shape
    count, g = dy.shape[1], torch.tensor(_KERNELS[4], dtype=x.dtype, device=x.device)
    total = x.new_zeros(36, count, channels)
    rows, slopes = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    for b, top, n in _bands(batch, height // 4, width // 4):
        tiles = _tiles(_bordered(rows[b], 4 * top - 1, 4 * n + 2), 4)
        spread = _spread(slopes[b, 4 * top : 4 * (top + n)])
        total.baddbmm_(spread.view(36, -1, count).transpose(1, 2), tiles.view(36, -1, channels))
    out = torch.kron(g, g).t() @ total.view(36, -1)
    return out.view(3, 3, count, channels).permute(2, 3, 0, 1)


def _spread(slopes: Tensor) -> Tensor:
    """`A dy A'` of every tile: (b, 4 n, 4 w, K) -> (6, 6, b, n, w, K)."""
    batch, height, width, count = slopes.shape
    n, w = height // 4, width // 4
    b, y, x, k = slopes.stride()
    places = slopes.as_strided((4, 4, batch, n, w, count), (y, x, b, 4 * y, 4 * x, k))
    half = work.take("spread half", (6, 4, batch, n, w, count), slopes)
    _spread_four(places.unbind(0), half.unbind(0))
    out = work.take("spread", (6, 6, batch, n, w, count), slopes)
    _spread_four(half.unbind(1), out.unbind(1))
    return out


def _spread_four(d: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """`A d` with rows (1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1). Those in
    the middle are sum and difference of the same two."""
    out[0].copy_(d[0])
    for i, times in ((1, 1), (3, 2)):
        torch.add(d[0], d[2], alpha=times**2, out=out[i])
        torch.add(d[1], d[3], alpha=times**2, out=out[i + 1])
        out[i].add_(out[i + 1], alpha=times)
        torch.sub(out[i], out[i + 1], alpha=2 * times, out=out[i + 1])
    out[5].copy_(d[3])
