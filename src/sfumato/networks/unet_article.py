"""The network of the first tutorials: the `Unet` of denoising_diffusion_pytorch, its architecture and its names.

Residual blocks with RMS norms and a scale and shift from the time, linear attention on every level but the innermost,
full attention there, four learned keys and values in each attention. Every parameter has the name, shape and place that
it has in denoising_diffusion_pytorch 2.3.4, so that its state dicts open by the identity map.

>>> Unet(dim=8, dim_mults=(1, 2))(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape
torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Never, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sfumato.errors import UserError, nearest

_MEMORIES = 4  # learned keys and values in front of the picture's own
_SHORTEST = 1e-12  # a shorter vector is divided by this, not by its length
_OPTIONS = (
    "dim",
    "init_dim",
    "out_dim",
    "dim_mults",
    "channels",
    "self_condition",
    "learned_variance",
    "learned_sinusoidal_cond",
    "random_fourier_features",
    "learned_sinusoidal_dim",
    "sinusoidal_pos_emb_theta",
    "dropout",
    "attn_dim_head",
    "attn_heads",
    "full_attn",
    "flash_attn",
)


class ChannelNorm(nn.Module):
    """RMS norm over channels, `x / |x| sqrt(C) g` (Zhang & Sennrich 2019), with an optional scale and shift after it.

    Scale and gain are multiplied while they are small, so that the picture is passed over less often. The length is
    summed in float32 at least, as half precision would overflow; what comes out has the type of what came in, so that
    under autocast the picture stays in half precision.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, C, H, W); scale and shift (B, C, 1, 1), applied as `(1 + scale) x + shift`."""
        unit: Tensor = _Unit.apply(x)  # type: ignore[no-untyped-call]
        gain = self.g * math.sqrt(x.shape[1])
        if scale_shift is None:
            return unit * gain.to(x.dtype)
        scale, shift = scale_shift
        return torch.addcmul(shift.to(x.dtype), unit, (gain * (scale + 1)).to(x.dtype))


class _Unit(torch.autograd.Function):
    """`y = x / max(|x|, 1e-12)` over channels; backwards `(g - y (y · g)) / |x|`, in two passes over the picture.

    (Torch's own way back through the length takes four, in float32.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = length.clamp_min(_SHORTEST).reciprocal()
        y: Tensor = x * inverse.to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = (g * y).sum(dim=1, keepdim=True) * -inverse
        along = torch.where(inverse < 1 / _SHORTEST, along, 0)  # shorter than that, x is only divided by a constant
        out: Tensor = (g * inverse.to(g.dtype)).addcmul_(y, along.to(g.dtype))
        return out


class SinusoidalTime(nn.Module):
    """(B,) -> (B, dim): sines, then cosines, of frequencies from 1 down to `1 / theta`, both ends included."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(half, device=t.device) * (-math.log(self.theta) / (half - 1))
        angles = t[:, None] * torch.exp(exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierTime(nn.Module):
    """(B,) -> (B, dim + 1): the time itself, sines and cosines of random frequencies, which may be learned."""

    def __init__(self, dim: int, *, learned: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(dim // 2).normal_(), requires_grad=learned)

    def forward(self, t: Tensor) -> Tensor:
        column = t.to(self.weights.dtype)[:, None]
        angles = column * self.weights * (2 * math.pi)
        return torch.cat([column, angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    """3x3 convolution, norm, scale and shift, SiLU, dropout."""

    def __init__(self, dim_in: int, dim_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm = ChannelNorm(dim_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out: Tensor = self.dropout(F.silu(self.norm(self.proj(x), scale_shift)))
        return out


class ResnetBlock(nn.Module):
    """Two blocks around a skip; the time gives the first one's scale and shift."""

    def __init__(self, dim_in: int, dim_out: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1 = Block(dim_in, dim_out, dropout)
        self.block2 = Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        out: Tensor = self.block2(self.block1(x, (scale, shift))) + self.res_conv(x)
        return out


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C); a view of a channels-last picture."""
    return x.flatten(2).transpose(1, 2)


def _to_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H W, C) -> (B, C, H, W), channels-last, of the height and width of `like`."""
    return tokens.transpose(1, 2).view(len(tokens), -1, *like.shape[2:])


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of pixels N, not its square (Shen 2018): `softmax(q) (softmax(k)' v)`.

    Queries are normalized over their D components, keys over the pixels. Of what is N long only x, q and k are ever
    made: the values' weights and the output's are multiplied into the small matrix in the middle, as
    `k' (x Wv) = (k' x) Wv` and `(q context) Wo = q (context Wo)`.
    """

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = ChannelNorm(dim)
        self.mem_kv = nn.Parameter(torch.empty(2, heads, dim_head, _MEMORIES).normal_())
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), ChannelNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        tokens = _to_tokens(self.norm(x))
        to_q, to_k, to_v = self.to_qkv.weight.flatten(1).chunk(3)  # each (heads D, C)
        q, k = F.linear(tokens, to_q), F.linear(tokens, to_k)
        q = q.view(*q.shape[:2], self.heads, -1).softmax(dim=-1).flatten(2)
        project = cast(nn.Conv2d, self.to_out[0])
        onward = project.weight.flatten(1).t().reshape(self.heads, -1, x.shape[1])
        onward = (self._context(tokens, k, to_v) * self.scale) @ onward
        mixed = torch.baddbmm(cast(Tensor, project.bias), q, onward.flatten(1, 2))
        out: Tensor = self.to_out[1](_to_picture(mixed, x))
        return out

    def _context(self, tokens: Tensor, k: Tensor, to_v: Tensor) -> Tensor:
        """`softmax(k)' v` over pixels and memories, (B, heads, D, D), from tokens (B, N, C) and k (B, N, heads D).

        The softmax is divided by its sum at the end, where it is small. Exponentials are kept below `N^(-1/2)`, so that
        neither they nor their sums leave the range of half precision.
        """
        mem_k, mem_v = self.mem_kv
        each = (len(k), *mem_k.shape[:2], -1)  # batch, heads, D
        top = torch.maximum(k.detach().amax(dim=1), mem_k.detach().amax(dim=-1).flatten().to(k.dtype))
        top = top + math.log(k.shape[1]) / 2
        k, mem_k = (k - top[:, None]).exp(), (mem_k - top.view(each)).exp()
        total = k.sum(dim=1).view(each) + mem_k.sum(dim=-1, keepdim=True)
        own = (k.transpose(1, 2) @ tokens).view(each) @ to_v.reshape(*mem_k.shape[1:3], -1).transpose(1, 2)
        context: Tensor = (own + mem_k @ mem_v.transpose(1, 2)) / total
        return context


class Attention(nn.Module):
    """Full attention over all pixels: the equation as written, or torch's fused kernel with `flash`."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, flash: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.flash = heads, dim_head**-0.5, flash
        self.norm = ChannelNorm(dim)
        self.mem_kv = nn.Parameter(torch.empty(2, heads, _MEMORIES, dim_head).normal_())
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        qkv = _to_tokens(self.to_qkv(self.norm(x)))
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        mem_k, mem_v = self.mem_kv.to(q.dtype)[:, None].expand(-1, len(x), -1, -1, -1)
        k, v = torch.cat([mem_k, k], dim=2), torch.cat([mem_v, v], dim=2)
        if self.flash:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            mixed = ((q * self.scale) @ k.transpose(2, 3)).softmax(dim=-1) @ v
        out: Tensor = self.to_out(_to_picture(mixed.transpose(1, 2).flatten(2), x))
        return out


class Downsample(nn.Module):
    """Halve: each 2x2 square's channels side by side, mixed by a 1x1 convolution; done as one strided convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.add_module("1", nn.Conv2d(4 * dim_in, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.get_submodule("1"))
        kernel = conv.weight.view(conv.out_channels, -1, 2, 2)
        return F.conv2d(x, kernel, conv.bias, stride=2)


class Upsample(nn.Module):
    """Double: every pixel repeated to a 2x2 square, then a 3x3 convolution; done as one transposed convolution.

    Repeated pixels share their products: summing the 3x3 weights that fall on the same pixel leaves a 4x4 kernel of
    stride 2, with 16 products for each pixel that comes in where the two steps have 36.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.add_module("1", nn.Conv2d(dim_in, dim_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.get_submodule("1"))
        rows = _widen(conv.weight.permute(2, 3, 1, 0), dim=0)
        kernel = _widen(rows, dim=1).permute(2, 3, 0, 1)
        return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def _widen(kernel: Tensor, dim: int) -> Tensor:
    """The three weights (a, b, c) along `dim` -> the transposed convolution's four, (c, b + c, a + b, a)."""
    a, b, c = kernel.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


@dataclass(frozen=True)
class _Parts:
    """What the levels of one network are made of; `widths` has each level's width outside and, one on, inside."""

    time_dim: int
    dropout: float
    full: tuple[bool, ...]
    heads: tuple[int, ...]
    head_widths: tuple[int, ...]
    flash: bool

    def resnet(self, dim_in: int, dim_out: int) -> ResnetBlock:
        return ResnetBlock(dim_in, dim_out, self.time_dim, self.dropout)

    def attention(self, width: int, level: int, *, full: bool) -> nn.Module:
        heads, head_width = self.heads[level], self.head_widths[level]
        if full:
            return Attention(width, heads, head_width, flash=self.flash)
        return LinearAttention(width, heads, head_width)

    def down(self, level: int, widths: Sequence[int]) -> nn.ModuleList:
        """Two residual blocks, attention, and half the size; the last level only changes the width."""
        outer, inner, last = widths[level], widths[level + 1], level + 2 == len(widths)
        blocks = [self.resnet(outer, outer), self.resnet(outer, outer)]
        attention = self.attention(outer, level, full=self.full[level])
        change = nn.Conv2d(outer, inner, 3, padding=1) if last else Downsample(outer, inner)
        return nn.ModuleList([*blocks, attention, change])

    def up(self, level: int, widths: Sequence[int]) -> nn.ModuleList:
        """The way back: both blocks take a skip, and the size doubles on all levels but the outermost."""
        outer, inner = widths[level], widths[level + 1]
        blocks = [self.resnet(inner + outer, inner), self.resnet(inner + outer, inner)]
        attention = self.attention(inner, level, full=self.full[level])
        change = Upsample(inner, outer) if level else nn.Conv2d(inner, outer, 3, padding=1)
        return nn.ModuleList([*blocks, attention, change])


def _per_level(value: int | Sequence[int], levels: int, name: str) -> tuple[Any, ...]:
    """One value for all levels, or one for each."""
    if isinstance(value, int):
        return (value,) * levels
    if len(value) != levels:
        raise UserError(f"{name} needs one value, or one for each of the {levels} levels (dim_mults), got {len(value)}")
    return tuple(value)


class Unet(nn.Module):
    """Noise prediction network of denoising_diffusion_pytorch (Ho 2020's UNet, as grown there until 2.3.4).

    Args:
        dim: base width, even and at least 4; level i is `dim * dim_mults[i]` channels wide.
        init_dim: width after the first convolution; None for `dim`.
        out_dim: channels of the output; None for `channels`, or twice that with `learned_variance`.
        dim_mults: width factors, outermost level first. Height and width must divide by `2^(levels - 1)`.
        channels: of the pictures.
        self_condition: also takes an estimate of the clean picture (Chen 2022).
        learned_variance: twice the output channels, the second half for the variance (Nichol 2021).
        learned_sinusoidal_cond, random_fourier_features: tell the time by Fourier features of learned or of fixed
            random frequencies, `learned_sinusoidal_dim` (even) of them. Meant for times of the size of a log SNR.
        sinusoidal_pos_emb_theta: longest period of the sinusoids, over 2 pi.
        dropout: in every residual block.
        attn_heads, attn_dim_head: number and width of attention heads; one value, or one for each level.
        full_attn: which levels have full rather than linear attention, one bool or one for each level; None or False
            for the innermost alone. The middle always has it.
        flash_attn: compute full attention with torch's fused kernel: less memory, the same numbers but for rounding.

    Raises:
        UserError: for sizes that cannot work and options that do not exist.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        dropout: float = 0.0,
        attn_dim_head: int | Sequence[int] = 32,
        attn_heads: int | Sequence[int] = 4,
        full_attn: bool | Sequence[bool] | None = None,
        flash_attn: bool = False,
        **unknown: Never,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise UserError(f"Unet has no option {name!r}{nearest(name, _OPTIONS)}")
        _check_whole(dim=dim, init_dim=init_dim, out_dim=out_dim, channels=channels)
        _check_whole(**{f"dim_mults[{i}]": mult for i, mult in enumerate(dim_mults)})
        widths, levels = [init_dim or dim, *(dim * mult for mult in dim_mults)], len(dim_mults)
        fourier = learned_sinusoidal_cond or random_fourier_features
        _check_sizes(dim, levels, fourier, learned_sinusoidal_dim)
        self.channels, self.self_condition = channels, self_condition
        self.out_dim = out_dim or channels * (2 if learned_variance else 1)
        self.random_or_learned_sinusoidal_cond = fourier
        full = full_attn or tuple(i == levels - 1 for i in range(levels))
        parts = _Parts(
            time_dim=4 * dim,
            dropout=dropout,
            full=_per_level(full, levels, "full_attn"),
            heads=_per_level(attn_heads, levels, "attn_heads"),
            head_widths=_per_level(attn_dim_head, levels, "attn_dim_head"),
            flash=flash_attn,
        )
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), widths[0], 7, padding=3)
        time: nn.Module = SinusoidalTime(dim, sinusoidal_pos_emb_theta)
        if fourier:
            time = FourierTime(learned_sinusoidal_dim, learned=not random_fourier_features)
        time_width = learned_sinusoidal_dim + 1 if fourier else dim
        self.time_mlp = nn.Sequential(time, nn.Linear(time_width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            self.downs.append(parts.down(level, widths))
        self.mid_block1 = parts.resnet(widths[-1], widths[-1])
        self.mid_attn = parts.attention(widths[-1], levels - 1, full=True)
        self.mid_block2 = parts.resnet(widths[-1], widths[-1])
        for level in reversed(range(levels)):
            self.ups.append(parts.up(level, widths))
        self.final_res_block = parts.resnet(2 * widths[0], widths[0])
        self.final_conv = nn.Conv2d(widths[0], self.out_dim, 1)

    @property
    def downsample_factor(self) -> int:
        """Height and width must be multiples of it."""
        return int(2 ** (len(self.downs) - 1))

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict at one time.

        Args:
            x: (B, channels, H, W).
            time: (B,).
            x_self_cond: (B, channels, H, W), an estimate of the clean picture; None for zeros. Only a network with
                `self_condition` looks at it.

        Returns:
            (B, out_dim, H, W).
        """
        factor = self.downsample_factor
        if any(side % factor for side in x.shape[-2:]):
            raise UserError(f"height and width must be multiples of {factor} for this Unet, got {tuple(x.shape[-2:])}")
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        x = first = self.init_conv(x.contiguous(memory_format=torch.channels_last))
        t = self.time_mlp(time)
        skips: list[Tensor] = []
        for level in self.downs:
            block1, block2, attention, change = cast(nn.ModuleList, level)
            x = block1(x, t)
            skips.append(x)
            x = block2(x, t)
            x = attention(x) + x
            skips.append(x)
            x = change(x)
        x = self.mid_block1(x, t)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, t)
        for level in self.ups:
            block1, block2, attention, change = cast(nn.ModuleList, level)
            x = block1(torch.cat([x, skips.pop()], dim=1), t)
            x = block2(torch.cat([x, skips.pop()], dim=1), t)
            x = change(attention(x) + x)
        out: Tensor = self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), t))
        return out


def _check_whole(**sizes: int | None) -> None:
    """Refuse sizes that are not whole numbers of at least 1; None is left to its default."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {size!r}")


def _check_sizes(dim: int, levels: int, fourier: bool, fourier_dim: int) -> None:
    if levels < 1:
        raise UserError("dim_mults must name at least one level")
    if not fourier and (dim < 4 or dim % 2):
        raise UserError(f"dim must be even and at least 4 (half of it are sines of the time), got {dim}")
    if fourier and (fourier_dim < 2 or fourier_dim % 2):
        raise UserError(f"learned_sinusoidal_dim must be even and at least 2, got {fourier_dim}")
