"""The levels of a UNet: stacks of residual blocks with attention and resampling, under the ecosystem's block
names.

>>> sorted(DOWN_BLOCKS)
['AttnDownBlock2D', 'DownBlock2D', 'ResnetDownsampleBlock2D']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import UserError, raise_unknown
from sfumato.networks.attention import Attention
from sfumato.networks.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from sfumato.networks.transformer import Attended, Transformer2DModel


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


@dataclass(frozen=True)
class CrossStyle:
    """The transformers of one level: `depths` has the number of transformer blocks of each layer."""

    heads: int
    context_dim: int
    depths: tuple[int, ...]
    linear_projection: bool = False
    only_cross: bool = False
    upcast: bool = False

    def transformers(self, channels: int, groups: int) -> list[Transformer2DModel]:
        """One for each layer."""
        return [
            Transformer2DModel(
                channels,
                heads=self.heads,
                context_dim=self.context_dim,
                depth=depth,
                groups=groups,
                linear_projection=self.linear_projection,
                only_cross=self.only_cross,
                upcast=self.upcast,
            )
            for depth in self.depths
        ]


NOTHING = Attended()
"""For blocks that are told nothing but the time."""


class UNetBlock(nn.Module):
    """Residual blocks, each followed by its attention or transformer where there is one."""

    gradient_checkpointing = False

    def __init__(
        self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[Attention | Transformer2DModel]
    ) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def layer(self, index: int, x: Tensor, emb: Tensor, attended: Attended) -> Tensor:
        """The `index`-th residual block and its attention."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._layer, index, x, emb, attended, use_reentrant=False)
            return out
        return self._layer(index, x, emb, attended)

    def _layer(self, index: int, x: Tensor, emb: Tensor, attended: Attended) -> Tensor:
        x = self.resnets[index](x, emb)
        if "attentions" not in self._modules:
            return x
        attention = self.attentions[index]
        out: Tensor = attention(x, attended) if isinstance(attention, Transformer2DModel) else attention(x)
        return out


class DownBlock(UNetBlock):
    """A level on the way down: `layers` residual blocks, then halving unless it is the last level.

    Args:
        attention: after each residual block: none, over pixels, or the transformers of a `CrossStyle`.
        resample: how to halve: "conv", "resnet", or None for not at all.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        layers: int,
        style: BlockStyle,
        *,
        attention: bool | CrossStyle,
        resample: str | None,
    ) -> None:
        resnets = [style.resnet(channels if i == 0 else out_channels, out_channels) for i in range(layers)]
        super().__init__(resnets, _attentions(attention, out_channels, layers, style))
        self.downsamplers: nn.ModuleList | None = None
        if resample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=style.downsample_padding)])
        elif resample == "resnet":
            self.downsamplers = nn.ModuleList([style.resnet(out_channels, out_channels, resample="down")])

    def forward(self, x: Tensor, emb: Tensor, attended: Attended = NOTHING) -> tuple[Tensor, list[Tensor]]:
        """The output and all skip features of this level, in order."""
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, attended)
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
        attention: bool | CrossStyle,
        resample: str | None,
    ) -> None:
        resnets = [
            style.resnet((channels if i == 0 else out_channels) + skip, out_channels)
            for i, skip in enumerate(skip_channels)
        ]
        super().__init__(resnets, _attentions(attention, out_channels, len(skip_channels), style))
        self.upsamplers: nn.ModuleList | None = None
        if resample == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])
        elif resample == "resnet":
            self.upsamplers = nn.ModuleList([style.resnet(out_channels, out_channels, resample="up")])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, attended: Attended = NOTHING) -> Tensor:
        """Uses up the last `len(resnets)` of `skips`, last first."""
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), emb, attended)
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
        x = self.layer(0, x, emb, NOTHING)
        out: Tensor = self.resnets[1](x, emb)
        return out


class UNetMidBlock2DCrossAttn(UNetBlock):
    """The innermost level: residual block, and for each depth in `cross` a transformer and a residual block.

    Without `cross` it is a single residual block, which the ecosystem calls `UNetMidBlock2D` in networks that are
    told a text.
    """

    def __init__(
        self, channels: int, style: BlockStyle, cross: CrossStyle | None, *, output_scale_factor: float
    ) -> None:
        transformers = cross.transformers(channels, style.groups) if cross is not None else []
        resnets = [
            style.resnet(channels, channels, output_scale_factor=output_scale_factor)
            for _ in range(len(transformers) + 1)
        ]
        super().__init__(resnets, transformers)

    def forward(self, x: Tensor, emb: Tensor, attended: Attended = NOTHING) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        for index in range(len(self.resnets) - 1):
            x = self.layer(index, x, emb, attended)
        out: Tensor = self.resnets[-1](x, emb)
        return out


def _attentions(
    attention: bool | CrossStyle, channels: int, layers: int, style: BlockStyle
) -> Sequence[Attention | Transformer2DModel]:
    if isinstance(attention, CrossStyle):
        return attention.transformers(channels, style.groups)
    return [style.attention(channels, style.groups) for _ in range(layers)] if attention else []


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


CROSS_DOWN_BLOCKS = {**DOWN_BLOCKS, "CrossAttnDownBlock2D": {"attention": True, "resample": "conv"}}
CROSS_UP_BLOCKS = {**UP_BLOCKS, "CrossAttnUpBlock2D": {"attention": True, "resample": "conv"}}
"""With the blocks of networks that are told a text; `down_block` and `up_block` need a `CrossStyle` for those."""


def down_block(
    kind: str,
    channels: int,
    out_channels: int,
    layers: int,
    style: BlockStyle,
    *,
    last: bool,
    cross: CrossStyle | None = None,
) -> DownBlock:
    """A block by the ecosystem's name; the last level does not halve. `cross` is for the CrossAttn block alone."""
    attention, resample = _how("down", kind, CROSS_DOWN_BLOCKS, style.downsample_type, cross)
    resample = None if last else resample
    return DownBlock(channels, out_channels, layers, style, attention=attention, resample=resample)


def up_block(
    kind: str,
    channels: int,
    out_channels: int,
    skips: list[int],
    style: BlockStyle,
    *,
    last: bool,
    cross: CrossStyle | None = None,
) -> UpBlock:
    """A block by the ecosystem's name; the last level does not double. `cross` is for the CrossAttn block alone."""
    attention, resample = _how("up", kind, CROSS_UP_BLOCKS, style.upsample_type, cross)
    resample = None if last else resample
    return UpBlock(channels, out_channels, skips, style, attention=attention, resample=resample)


def _how(
    way: str, kind: str, blocks: dict[str, dict[str, Any]], resample: str, cross: CrossStyle | None
) -> tuple[bool | CrossStyle, str | None]:
    if kind not in blocks:
        raise_unknown(f"{way} block type", kind, blocks)
    if kind.startswith("CrossAttn") and cross is None:
        raise UserError(f"{kind} needs a text to attend to: this network has none")
    attention = cross if cross is not None and kind.startswith("CrossAttn") else blocks[kind]["attention"]
    return attention, blocks[kind]["resample"] or resample
