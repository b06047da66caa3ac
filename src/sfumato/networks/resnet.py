"""Residual blocks and resampling, shared by every convolutional network of the package.

>>> ResnetBlock2D(32, 64, 16)(torch.zeros(1, 32, 4, 4), torch.zeros(1, 16)).shape
torch.Size([1, 64, 4, 4])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError, raise_unknown
from sfumato.networks.norm import GroupNorm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name. Unknown names raise `UserError` with the nearest."""
    if name not in ACTIVATIONS:
        raise_unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def activated(act: Callable[[Tensor], Tensor], x: Tensor, norm: nn.Module) -> Tensor:
    """`act(norm(x))`; without gradients a SiLU is put in the place of the norm's output, which nobody else has."""
    y: Tensor = norm(x)
    own = y is not x and not norm._forward_hooks
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined,no-untyped-call]
    if act is F.silu and own and not traced and not torch.is_grad_enabled():
        return F.silu(y, inplace=True)
    return act(y)


def widen(x: Tensor) -> Tensor:
    """`x` in float32 or wider, for sums that a half type would spoil; no copy where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Downsample2D(nn.Module):
    """Halve height and width: a stride-2 convolution, or 2x2 averaging when `use_conv` is off.

    Args:
        padding: 1 pads all sides; 0 pads right and bottom only, as the autoencoders and DDPM's first networks do.
    """

    def __init__(self, channels: int, *, use_conv: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)
        return out


class Upsample2D(nn.Module):
    """Double height and width by repetition, then a convolution unless `use_conv` is off."""

    def __init__(self, channels: int, *, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`size` overrides the doubled height and width."""
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
        return x if self.conv is None else self.conv(x)


class ResnetBlock2D(nn.Module):
    """GroupNorm, activation, convolution, twice, with the time embedding in between (Ho 2020; Dhariwal 2021).

    Args:
        channels, out_channels: in and out; a 1x1 convolution carries the skip when they differ.
        time_channels: width of the time embedding; None for a block without (autoencoders).
        scale_shift: the embedding scales and shifts after the second norm (ADM's AdaGN) instead of being added.
        resample: "up" or "down" resamples both branches inside the block.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_channels: int | None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        act: str = "silu",
        scale_shift: bool = False,
        output_scale_factor: float = 1.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.output_scale_factor = scale_shift, output_scale_factor
        self.act = activation(act)
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.resample: nn.Module | None = None
        if resample is not None:
            kind = Upsample2D if resample == "up" else Downsample2D
            self.resample = kind(channels, use_conv=False)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """(B, channels, H, W) and (B, time_channels) -> (B, out_channels, H', W')."""
        hidden = activated(self.act, x, self.norm1)
        if self.resample is not None:
            x, hidden = self.resample(x), self.resample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is None:
            hidden = activated(self.act, hidden, self.norm2)
        elif emb is None:
            raise UserError("this residual block is conditioned on a time embedding, got None")
        else:
            shift = self.time_emb_proj(self.act(emb))
            if self.scale_shift:
                scale, shift = (part[:, :, None, None] for part in shift.chunk(2, dim=1))
                hidden = self.act(torch.addcmul(shift, self.norm2(hidden), 1 + scale))
            else:
                hidden = activated(self.act, hidden + shift[:, :, None, None], self.norm2)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = x + hidden
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor
