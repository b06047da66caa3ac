"""The pixel-space UNet of DDPM, improved DDPM and ADM, under the names of diffusers' `UNet2DModel`.

A checkpoint of that class loads by the identity map, and ours load there.

>>> level = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [32]}
>>> config = UNet2DConfig.from_dict(level)
>>> UNet2DModel(config)(torch.zeros(2, 3, 8, 8), torch.tensor([5, 10])).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import Attention, AttentionHost
from sfumato.networks.config import NetworkConfig, check_choices, check_levels
from sfumato.networks.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from sfumato.networks.norm import GroupNorm
from sfumato.networks.resnet import ACTIVATIONS, ResnetBlock2D
from sfumato.networks.transformer import Transformer2DModel
from sfumato.networks.unet_blocks import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    BlockStyle,
    UNetBlock,
    UNetMidBlock2D,
    down_block,
    up_block,
)


@dataclass(frozen=True)
class UNet2DConfig(NetworkConfig):
    """diffusers' fields of `UNet2DModel`, with its meanings and defaults.

    `attention_head_dim` is the width of a head here (None: one head); beyond diffusers it may be given by level,
    outermost first. `center_input_sample` maps [0, 1] to [-1, 1] inside. `time_embedding_type` is positional, fourier
    or learned.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | tuple[int, ...] | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        check_levels(self)
        choices = {
            "time_embedding_type": ("positional", "fourier", "learned"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "class_embed_type": (None, "timestep", "identity"),
            "mid_block_type": (None, "UNetMidBlock2D"),
            "act_fn": tuple(ACTIVATIONS),
        }
        check_choices(self, choices, DOWN_BLOCKS, UP_BLOCKS)
        if isinstance(self.attention_head_dim, tuple) and len(self.attention_head_dim) != len(self.block_out_channels):
            raise UserError(
                f"attention_head_dim must be one value or one for each level, got {self.attention_head_dim}"
            )
        if self.layers_per_block < 1:
            raise UserError(f"layers_per_block must be 1 or more, got {self.layers_per_block}")
        if self.attn_norm_num_groups and self.block_out_channels[-1] % self.attn_norm_num_groups:
            raise UserError(
                f"the innermost block_out_channels {self.block_out_channels[-1]} is not a multiple of "
                f"attn_norm_num_groups {self.attn_norm_num_groups}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {channels} is not a multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if self.time_embedding_type == "learned" and not self.num_train_timesteps:
            raise UserError("time_embedding_type 'learned' needs num_train_timesteps")
        if self.class_embed_type is not None and self.num_class_embeds is not None:
            raise UserError(
                f"class_embed_type {self.class_embed_type!r} has no table, so num_class_embeds must be None, "
                f"got {self.num_class_embeds}"
            )


class UNet2DModel(AttentionHost):
    """A UNet over pictures, told the time and optionally a class.

    Registration order is the ecosystem's: conv_in, time and class embeddings, down_blocks, up_blocks,
    mid_block.
    """

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = c = config
        widths, time_dim = c.block_out_channels, c.time_embedding_dim or 4 * c.block_out_channels[0]
        style = BlockStyle(
            time_channels=time_dim,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            dropout=c.dropout,
            act=c.act_fn,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
            downsample_padding=c.downsample_padding,
            downsample_type=c.downsample_type,
            upsample_type=c.upsample_type,
        )
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_proj, time_width = _time_projection(c)
        self.time_embedding = TimestepEmbedding(time_width, time_dim)
        self.class_embedding = _class_embedding(c, time_width, time_dim)
        last = len(widths) - 1
        wide = c.attention_head_dim
        heads = wide if isinstance(wide, tuple) else (wide,) * len(widths)
        styles = [replace(style, head_dim=head_dim) for head_dim in heads]
        self.down_blocks = nn.ModuleList(
            down_block(kind, widths[max(i - 1, 0)], widths[i], c.layers_per_block, styles[i], last=i == last)
            for i, kind in enumerate(c.down_block_types)
        )
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(c.up_block_types):
            level = last - i
            skips = [widths[level]] * c.layers_per_block + [widths[max(level - 1, 0)]]
            above = widths[min(level + 1, last)]
            self.up_blocks.append(up_block(kind, above, widths[level], skips, styles[level], last=i == last))
        if c.mid_block_type is not None:
            default_groups = c.norm_num_groups if c.resnet_time_scale_shift == "default" else None
            self.mid_block: UNetMidBlock2D | None = UNetMidBlock2D(
                widths[-1],
                styles[-1],
                attention=c.add_attention,
                groups=c.attn_norm_num_groups or default_groups,
                output_scale_factor=c.mid_block_scale_factor,
            )
        else:
            self.mid_block = None
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[0], c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, H, W), H and W multiples of 2^(levels - 1).
            t: () or (B,), the time as the schedule counts it.
            labels: (B,) class ids in [0, num_class_embeds); exactly when the network has classes.

        Returns:
            (B, out_channels, H, W).
        """
        times = torch.as_tensor(t, device=x.device)
        self._check(x, times, labels)
        times = times.expand(len(x))
        emb = self.time_embedding(self.time_proj(times).to(x.dtype))
        if labels is not None and self.class_embedding is not None:
            classes = (
                self.time_proj(labels).to(x.dtype) if self.config.class_embed_type == "timestep" else labels
            )
            emb = emb + self._embed_classes(classes).to(x.dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        hidden = self.conv_in(x)
        skips = [hidden]
        for down in self.down_blocks:
            hidden, more = down(hidden, emb)
            skips += more
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, emb)
        for up in self.up_blocks:
            hidden = up(hidden, skips, emb)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        if self.config.time_embedding_type == "fourier":
            out = out / times.to(out.dtype)[:, None, None, None]
        return out

    def _embed_classes(self, classes: Tensor) -> Tensor:
        assert self.class_embedding is not None
        try:
            embedded: Tensor = self.class_embedding(classes)
        except IndexError:
            raise UserError(
                f"labels must lie in 0 to {(self.config.num_class_embeds or 0) - 1}, "
                f"got {int(classes.min())} to {int(classes.max())}"
            ) from None
        return embedded

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.gradient_checkpointing = True

    def _check(self, x: Tensor, times: Tensor, labels: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise UserError(f"x must be (B, {self.config.in_channels}, H, W), got {tuple(x.shape)}")
        if times.shape not in ((), (1,), (len(x),)):
            raise UserError(f"t must be () or ({len(x)},), got {tuple(times.shape)}")
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise UserError(
                f"height and width must be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}"
            )
        if labels is None and self.class_embedding is not None:
            raise UserError("this network is class-conditional: it needs labels, got None")
        if labels is not None and self.class_embedding is None:
            raise UserError("this network is not class-conditional: it takes no labels")
        if labels is not None and len(labels) != len(x):
            raise UserError(f"labels must be one per picture ({len(x)}), got {tuple(labels.shape)}")


def _time_projection(c: UNet2DConfig) -> tuple[nn.Module, int]:
    width = c.block_out_channels[0]
    if c.time_embedding_type == "fourier":
        return GaussianFourierProjection(width), 2 * width
    if c.time_embedding_type == "learned":
        return nn.Embedding(c.num_train_timesteps or 0, width), width
    return Timesteps(width, c.flip_sin_to_cos, c.freq_shift), width


def _class_embedding(c: UNet2DConfig, time_width: int, time_dim: int) -> nn.Module | None:
    if c.class_embed_type == "timestep":
        return TimestepEmbedding(time_width, time_dim)
    if c.class_embed_type == "identity":
        return nn.Identity()
    return nn.Embedding(c.num_class_embeds, time_dim) if c.num_class_embeds is not None else None


def init_zero_outputs(network: nn.Module) -> None:
    """Start every residual branch at zero: the last convolution of each block, the outputs of attentions over
    pixels and of transformers, and `conv_out`.

    DDPM's and ADM's initialisation (Ho 2020, appendix B; Dhariwal 2021), and latent diffusion's: the network
    begins as the identity of its skips.
    """
    ends: list[Any] = [getattr(network, "conv_out", None)]
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            ends.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            ends.append(module.proj_out)
        elif isinstance(module, Attention) and module.residual_connection:
            ends.append(module.to_out[0])
    for end in ends:
        for parameter in end.parameters() if end is not None else ():
            nn.init.zeros_(parameter)
