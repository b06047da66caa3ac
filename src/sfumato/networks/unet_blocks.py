"""The levels of a UNet: stacks of residual blocks with attention and resampling, under the ecosystem's block
names.

>>> sorted(DOWN_BLOCKS)
['AttnDownBlock2D', 'DownBlock2D', 'ResnetDownsampleBlock2D']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import raise_unknown
from sfumato.networks.attention import Attention
from sfumato.networks.resnet import Downsample2D, ResnetBlock2D, Upsample2D


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network have in common."""

    time_channels: int | None
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    act: str = "silu"
    scale_shift: bool = False
    head_dim: int | None = None
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"

    def resnet(self, channels: int, out_channels: int, **extra: Any) -> ResnetBlock2D:
        """A residual block of this style."""
        return ResnetBlock2D(
            channels,
            out_channels,
            self.time_channels,
            groups=self.groups,
            eps=self.eps,
            dropout=self.dropout,
            act=self.act,
            scale_shift=self.scale_shift,
            **extra,
        )

    def attention(self, channels: int, groups: int | None, rescale: float = 1.0) -> Attention:
        """Self-attention over pixels, with residual; `head_dim` None means a single head."""
        width = self.head_dim or channels
        return Attention(
            channels,
            heads=channels // width,
            head_dim=width,
            bias=True,
            groups=groups,
            eps=self.eps,
            residual=True,
            rescale_output_factor=rescale,
        )


class UNetBlock(nn.Module):
    """Residual blocks, each followed by its attention where there is one."""

    gradient_checkpointing = False

    def __init__(self, resnets: list[ResnetBlock2D], attentions: list[Attention]) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def layer(self, index: int, x: Tensor, emb: Tensor) -> Tensor:
        """The `index`-th residual block and its attention."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._layer, index, x, emb, use_reentrant=False)
            return out
        return self._layer(index, x, emb)

    def _layer(self, index: int, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[index](x, emb)
        return self.attentions[index](x) if "attentions" in self._modules else x


class DownBlock(UNetBlock):
    """A level on the way down: `layers` residual blocks, then halving unless it is the last level.

    Args:
        attention: after each residual block.
        resample: how to halve: "conv", "resnet", or None for not at all.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        layers: int,
        style: BlockStyle,
        *,
        attention: bool,
        resample: str | None,
    ) -> None:
        resnets = [style.resnet(channels if i == 0 else out_channels, out_channels) for i in range(layers)]
        attentions = [style.attention(out_channels, style.groups) for _ in range(layers)] if attention else []
        super().__init__(resnets, attentions)
        self.downsamplers: nn.ModuleList | None = None
        if resample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=style.downsample_padding)])
        elif resample == "resnet":
            self.downsamplers = nn.ModuleList([style.resnet(out_channels, out_channels, resample="down")])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and all skip features of this level, in order."""
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb)
            skips.append(x)
        if self.downsamplers is not None:
            sampler = self.downsamplers[0]
            x = sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x)
            skips.append(x)
        return x, skips


class UpBlock(UNetBlock):
    """A level on the way up: each residual block takes one skip feature; then doubling unless it is the first
    level.

    Args:
        skip_channels: of the skips, one per layer, in the order they are used.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        skip_channels: list[int],
        style: BlockStyle,
        *,
        attention: bool,
        resample: str | None,
    ) -> None:
        resnets = [
            style.resnet((channels if i == 0 else out_channels) + skip, out_channels)
            for i, skip in enumerate(skip_channels)
        ]
        attentions = [style.attention(out_channels, style.groups) for _ in skip_channels] if attention else []
        super().__init__(resnets, attentions)
        self.upsamplers: nn.ModuleList | None = None
        if resample == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])
        elif resample == "resnet":
            self.upsamplers = nn.ModuleList([style.resnet(out_channels, out_channels, resample="up")])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Uses up the last `len(resnets)` of `skips`, last first."""
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), emb)
        if self.upsamplers is not None:
            sampler = self.upsamplers[0]
            x = sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x)
        return x


class UNetMidBlock2D(UNetBlock):
    """The innermost level: residual block, attention, residual block."""

    def __init__(
        self,
        channels: int,
        style: BlockStyle,
        *,
        attention: bool,
        groups: int | None,
        output_scale_factor: float,
    ) -> None:
        resnets = [
            style.resnet(channels, channels, output_scale_factor=output_scale_factor) for _ in range(2)
        ]
        super().__init__(
            resnets, [style.attention(channels, groups, output_scale_factor)] if attention else []
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = self.layer(0, x, emb)
        out: Tensor = self.resnets[1](x, emb)
        return out


DOWN_BLOCKS: dict[str, dict[str, Any]] = {
    "DownBlock2D": {"attention": False, "resample": "conv"},
    "ResnetDownsampleBlock2D": {"attention": False, "resample": "resnet"},
    "AttnDownBlock2D": {"attention": True, "resample": None},
}
UP_BLOCKS: dict[str, dict[str, Any]] = {
    "UpBlock2D": {"attention": False, "resample": "conv"},
    "ResnetUpsampleBlock2D": {"attention": False, "resample": "resnet"},
    "AttnUpBlock2D": {"attention": True, "resample": None},
}


def down_block(
    kind: str, channels: int, out_channels: int, layers: int, style: BlockStyle, *, last: bool
) -> DownBlock:
    """A block by the ecosystem's name; the last level does not halve."""
    if kind not in DOWN_BLOCKS:
        raise_unknown("down block type", kind, DOWN_BLOCKS)
    how = DOWN_BLOCKS[kind]
    resample = None if last else how["resample"] or style.downsample_type
    return DownBlock(channels, out_channels, layers, style, attention=how["attention"], resample=resample)


def up_block(
    kind: str, channels: int, out_channels: int, skips: list[int], style: BlockStyle, *, last: bool
) -> UpBlock:
    """A block by the ecosystem's name; the last level does not double."""
    if kind not in UP_BLOCKS:
        raise_unknown("up block type", kind, UP_BLOCKS)
    how = UP_BLOCKS[kind]
    resample = None if last else how["resample"] or style.upsample_type
    return UpBlock(channels, out_channels, skips, style, attention=how["attention"], resample=resample)
