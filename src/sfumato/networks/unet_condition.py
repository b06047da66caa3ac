"""The UNet of latent diffusion, told a text, under the names of diffusers' `UNet2DConditionModel`: Stable Diffusion
1, 2 and XL, their inpainting and unCLIP variants, and class-conditional networks.

A checkpoint of that class loads by the identity map, and ours load there.

>>> level = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
>>> config = UNet2DConditionConfig.from_dict({**level, "block_out_channels": [32], "cross_attention_dim": 6})
>>> UNet2DConditionModel(config)(torch.zeros(2, 4, 8, 8), 5, context=torch.zeros(2, 3, 6)).shape
torch.Size([2, 4, 8, 8])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import AttentionHost
from sfumato.networks.config import NetworkConfig, check_choices, check_levels
from sfumato.networks.embeddings import TimestepEmbedding, Timesteps, sinusoidal
from sfumato.networks.norm import GroupNorm
from sfumato.networks.resnet import ACTIVATIONS, activation
from sfumato.networks.transformer import Attended
from sfumato.networks.unet_blocks import (
    CROSS_DOWN_BLOCKS,
    CROSS_UP_BLOCKS,
    BlockStyle,
    CrossStyle,
    UNetBlock,
    UNetMidBlock2DCrossAttn,
    down_block,
    up_block,
)

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "dual_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type": (None, "text_time"),
    "addition_embed_type_num_heads": (64,),
    "encoder_hid_dim_type": (None, "text_proj"),
}
"""Fields that other networks of the family use, with the values that this one can have."""

VECTOR_CLASSES = ("identity", "projection", "simple_projection")
"""Values of `class_embed_type` that embed the slot `vector`; the others embed `labels`."""


@dataclass(frozen=True)
class UNet2DConditionConfig(NetworkConfig):
    """diffusers' fields of `UNet2DConditionModel`, with its meanings and defaults.

    `attention_head_dim` is the *number* of heads of the transformers, in spite of its name, unless
    `num_attention_heads` is given; in `AttnDownBlock2D` and `AttnUpBlock2D` it is a head's width. A field that may
    be given by level is listed from the outermost level to the innermost. `reverse_transformer_layers_per_block`
    is listed in the order of the up blocks.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64

    def __post_init__(self) -> None:
        self._check_levels()
        self._check_choices()
        self._check_embeddings()
        self._check_text()

    def by_level(self, name: str) -> tuple[Any, ...]:
        """A field's value at each level, outermost first; one value stands for all levels."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of heads at each level, outermost first."""
        return self.by_level("attention_head_dim" if self.num_attention_heads is None else "num_attention_heads")

    @property
    def told_text(self) -> tuple[bool, ...]:
        """Which levels have transformers, outermost first."""
        pairs = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        told = [any(kind.startswith("CrossAttn") for kind in pair) for pair in pairs]
        return (*told[:-1], told[-1] or self.mid_block_type == "UNetMidBlock2DCrossAttn")

    @property
    def context_dim(self) -> int | None:
        """The width of the slot `context`; None for a network without."""
        return self.encoder_hid_dim or self.attended_dim if any(self.told_text) else None

    @property
    def attended_dim(self) -> int:
        """The width of what the transformers attend to: of the context, after `encoder_hid_proj` if there is one."""
        widths = zip(self.by_level("cross_attention_dim"), self.told_text, strict=True)
        return cast(int, next((width for width, told in widths if told), None))

    def _check_levels(self) -> None:
        check_levels(self)
        for name in (
            "only_cross_attention",
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "attention_head_dim",
            "num_attention_heads",
        ):
            if len(self.by_level(name)) != len(self.block_out_channels):
                raise UserError(f"{name} must be one value or one for each level, got {getattr(self, name)}")
        if min(self.by_level("layers_per_block")) < 1:
            raise UserError(f"layers_per_block must be 1 or more, got {self.layers_per_block}")
        for channels in self.block_out_channels:
            if self.norm_num_groups is None or channels % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {channels} is not a multiple of norm_num_groups {self.norm_num_groups}"
                )

    def _check_choices(self) -> None:
        choices = {
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep", *VECTOR_CLASSES),
            "mid_block_type": (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
            "act_fn": tuple(ACTIVATIONS),
        }
        check_choices(self, choices, CROSS_DOWN_BLOCKS, CROSS_UP_BLOCKS)
        for name, built in NOT_BUILT.items():
            if getattr(self, name) not in built:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is not supported; it can be {' or '.join(map(repr, built))}"
                )
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, name) % 2 == 0:
                raise UserError(f"{name} must be odd, got {getattr(self, name)}")

    def _check_embeddings(self) -> None:
        if self.class_embed_type is not None and self.num_class_embeds is not None:
            raise UserError(
                f"class_embed_type {self.class_embed_type!r} has no table, so num_class_embeds must be None, "
                f"got {self.num_class_embeds}"
            )
        if self.addition_embed_type == "text_time" and self.class_embed_type in VECTOR_CLASSES:
            raise UserError(
                f"class_embed_type {self.class_embed_type!r} and addition_embed_type 'text_time' would both embed "
                "the one vector: a network can have one of them"
            )
        projected = self.class_embed_type in ("projection", "simple_projection")
        if (projected or self.addition_embed_type) and self.projection_class_embeddings_input_dim is None:
            kind = "addition_embed_type 'text_time'" if not projected else f"class_embed_type {self.class_embed_type!r}"
            raise UserError(f"{kind} needs projection_class_embeddings_input_dim")
        if self.addition_embed_type == "text_time" and not self.addition_time_embed_dim:
            raise UserError("addition_embed_type 'text_time' needs addition_time_embed_dim")

    def _check_text(self) -> None:
        for width, told in zip(self.by_level("cross_attention_dim"), self.told_text, strict=True):
            if told and (width is None or width != self.attended_dim):
                raise UserError(
                    f"all transformers attend to one context: cross_attention_dim must be its width at every level "
                    f"that has them, got {self.cross_attention_dim}"
                )
        if self.encoder_hid_dim is not None and not any(self.told_text):
            raise UserError("encoder_hid_dim projects the context, and no block of this network takes one")
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise UserError(f"encoder_hid_dim_type {self.encoder_hid_dim_type!r} needs encoder_hid_dim")
        nested = any(isinstance(depth, tuple) for depth in self.by_level("transformer_layers_per_block"))
        if nested and self.reverse_transformer_layers_per_block is None:
            raise UserError(
                "transformer_layers_per_block by layer needs reverse_transformer_layers_per_block for the up blocks"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON, as every network's; a width of encoder states without a kind means that they are projected."""
        projected = values.get("encoder_hid_dim") is not None and values.get("encoder_hid_dim_type") is None
        return super().from_dict({**values, "encoder_hid_dim_type": "text_proj"} if projected else values)


class UNet2DConditionModel(AttentionHost):
    """A UNet over latents (or pictures), told the time, a text, and optionally a class or a vector.

    Registration order is the ecosystem's: conv_in, embeddings, down_blocks, up_blocks, mid_block.
    """

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__()
        self.config = c = config
        widths, last = c.block_out_channels, len(c.block_out_channels) - 1
        time_dim = c.time_embedding_dim or 4 * widths[0]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], c.conv_in_kernel, padding=c.conv_in_kernel // 2)
        self.time_proj = Timesteps(widths[0], c.flip_sin_to_cos, c.freq_shift)
        self.time_embedding = TimestepEmbedding(
            widths[0], time_dim, act=c.act_fn, condition_dim=c.time_cond_proj_dim
        )
        self.encoder_hid_proj: nn.Module | None = None
        if c.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(c.encoder_hid_dim, c.attended_dim)
        self.class_embedding = _class_embedding(c, time_dim)
        self.add_embedding: nn.Module | None = None
        if c.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim or 0, time_dim)
        style = BlockStyle(
            time_channels=time_dim,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            dropout=c.dropout,
            act=c.act_fn,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
            downsample_padding=c.downsample_padding,
        )
        layers, head_dims = c.by_level("layers_per_block"), c.by_level("attention_head_dim")
        self.down_blocks = nn.ModuleList(
            down_block(
                kind,
                widths[max(i - 1, 0)],
                widths[i],
                layers[i],
                replace(style, head_dim=head_dims[i]),
                last=i == last,
                cross=_cross(c, i, c.by_level("transformer_layers_per_block")[i], layers[i]),
            )
            for i, kind in enumerate(c.down_block_types)
        )
        up_depths = c.reverse_transformer_layers_per_block or c.by_level("transformer_layers_per_block")[::-1]
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(c.up_block_types):
            level = last - i
            skips = [widths[level]] * layers[level] + [widths[max(level - 1, 0)]]
            above = widths[min(level + 1, last)]
            cross = _cross(c, level, up_depths[i], len(skips))
            here = replace(style, head_dim=head_dims[i])  # not of this level, but so are the family's networks
            self.up_blocks.append(up_block(kind, above, widths[level], skips, here, last=i == last, cross=cross))
        self.mid_block = _mid_block(c, style)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[0], c.norm_eps)
        self.conv_act = activation(c.act_fn)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, c.conv_out_kernel, padding=c.conv_out_kernel // 2)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        labels: Tensor | None = None,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: tuple[Tensor, ...] | None = None,
        adapters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict. Each slot is given exactly when the config has a use for it; masks, residuals and adapters
        may always be left out.

        Args:
            x: (B, in_channels, H, W), H and W multiples of 2^(levels - 1).
            t: () or (B,), the time as the schedule counts it.
            context: (B, L, D) tokens, D the config's `context_dim`.
            context_mask: (B, L) bool, True where a token is real.
            labels: (B,) class ids; for `class_embed_type` "timestep", (B,) numbers.
            vector: (B, D): what `class_embed_type` "identity", "projection" and "simple_projection" embed; for
                "text_time" what `added_vector` returns.
            guidance: (B,) the guidance weight that a distilled network imitates; 1 is no guidance.
            residuals: added to the skips, conv_in's first and down the levels, then one for the middle (ControlNet).
            adapters: keyword arguments for the attention processors. A name that none of them takes is ignored,
                with a warning.

        Returns:
            (B, out_channels, H, W).

        Raises:
            UserError: a slot is missing, not used by this network, or of the wrong shape.
        """
        times = torch.as_tensor(t, device=x.device)
        self._check(x, times)
        self._check_slots(len(x), context, context_mask, labels, vector, guidance)
        emb = self._embed(x, times.expand(len(x)), labels, vector, guidance)
        attended = self._attended(x, context, context_mask, adapters)
        if self.config.center_input_sample:
            x = 2 * x - 1
        hidden = self.conv_in(x)
        skips = [hidden]
        for down in self.down_blocks:
            hidden, more = down(hidden, emb, attended)
            skips += more
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, emb, attended)
        if residuals is not None:
            skips, hidden = _with_residuals(skips, hidden, residuals, middle=self.mid_block is not None)
        for up in self.up_blocks:
            hidden = up(hidden, skips, emb, attended)
        out: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return out

    def added_vector(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """The slot `vector` of a "text_time" network (Podell 2023, section 2.2).

        Args:
            pooled: (B, P), the pooled text.
            sizes: (B, n), numbers that are embedded as times are: original height and width, top and left of the
                crop, target height and width.

        Returns:
            (B, P + n addition_time_embed_dim), of `pooled`'s type.
        """
        c = self.config
        if c.addition_embed_type != "text_time":
            raise UserError("this network has no added embedding: addition_embed_type is not 'text_time'")
        waves = sinusoidal(
            sizes.flatten(),
            c.addition_time_embed_dim or 0,
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        )
        return torch.cat([pooled, waves.reshape(len(sizes), -1).to(pooled.dtype)], dim=1)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.gradient_checkpointing = True

    def _embed(
        self, x: Tensor, times: Tensor, labels: Tensor | None, vector: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        waves = self.time_proj(times).to(x.dtype)
        told = None
        if guidance is not None:
            told = _guidance_waves(guidance, self.config.time_cond_proj_dim or 0).to(x.dtype)
        emb: Tensor = self.time_embedding(waves, told)
        if labels is not None:
            emb = emb + self._embed_labels(labels, x.dtype)
        elif vector is not None and self.class_embedding is not None:
            emb = emb + self.class_embedding(vector.to(x.dtype))
        if vector is not None and self.add_embedding is not None:
            emb = emb + self.add_embedding(vector.to(x.dtype))
        return emb

    def _embed_labels(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.class_embedding is not None
        if self.config.class_embed_type == "timestep":
            labels = self.time_proj(labels).to(dtype)
        try:
            return cast(Tensor, self.class_embedding(labels)).to(dtype)
        except IndexError:
            raise UserError(
                f"labels must lie in 0 to {(self.config.num_class_embeds or 0) - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            ) from None

    def _attended(
        self,
        x: Tensor,
        context: Tensor | None,
        context_mask: Tensor | None,
        adapters: Mapping[str, Tensor] | None,
    ) -> Attended:
        if adapters:
            self.warn_of_unused(adapters)
        if context is not None and self.encoder_hid_proj is not None:
            context = self.encoder_hid_proj(context)
        mask = None
        if context_mask is not None:
            mask = torch.zeros(context_mask.shape, dtype=x.dtype, device=x.device)
            mask = mask.masked_fill(~context_mask, -10_000.0)[:, None]
        return Attended(context, mask, adapters or {})

    def _check(self, x: Tensor, times: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise UserError(f"x must be (B, {self.config.in_channels}, H, W), got {tuple(x.shape)}")
        if times.shape not in ((), (1,), (len(x),)):
            raise UserError(f"t must be () or ({len(x)},), got {tuple(times.shape)}")
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise UserError(f"height and width must be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}")

    def _check_slots(
        self,
        batch: int,
        context: Tensor | None,
        context_mask: Tensor | None,
        labels: Tensor | None,
        vector: Tensor | None,
        guidance: Tensor | None,
    ) -> None:
        c, classes = self.config, self.class_embedding is not None
        of_vector = c.class_embed_type in VECTOR_CLASSES
        width = c.projection_class_embeddings_input_dim
        if c.class_embed_type == "identity":
            width = self.time_embedding.linear_2.out_features
        _check_slot("context", context, (batch, None, c.context_dim), used=c.context_dim is not None)
        _check_slot("labels", labels, (batch,), used=classes and not of_vector)
        _check_slot("vector", vector, (batch, width), used=of_vector or self.add_embedding is not None)
        _check_slot("guidance", guidance, (batch,), used=c.time_cond_proj_dim is not None)
        if context_mask is not None:
            if context is None or not isinstance(context_mask, Tensor) or context_mask.dtype != torch.bool:
                raise UserError("context_mask must be bool and come with a context")
            _check_slot("context_mask", context_mask, tuple(context.shape[:2]), used=True)


def _check_slot(name: str, value: Tensor | None, shape: tuple[int | None, ...], *, used: bool) -> None:
    """Refuse a slot that is missing, not used, or of another shape (None: any length)."""
    if (value is not None) != used:
        raise UserError(f"this network needs {name}, got None" if used else f"this network takes no {name}")
    if value is None:
        return
    wanted = "(" + ", ".join("L" if size is None else str(size) for size in shape) + ("," * (len(shape) == 1)) + ")"
    if not isinstance(value, Tensor):
        more = "; what processors take besides goes into adapters" if name == "context" else ""
        raise UserError(f"{name} must be one tensor {wanted}, got {type(value).__name__}{more}")
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        raise UserError(f"{name} must be {wanted}, got {tuple(value.shape)}")


def _with_residuals(
    skips: list[Tensor], hidden: Tensor, residuals: tuple[Tensor, ...], *, middle: bool
) -> tuple[list[Tensor], Tensor]:
    places = [*skips, hidden] if middle else skips
    if [tuple(r.shape[1:]) for r in residuals] != [tuple(p.shape[1:]) for p in places]:
        raise UserError(
            f"residuals must be {len(places)} tensors of shapes {[tuple(p.shape[1:]) for p in places]} after the "
            f"batch, got {[tuple(r.shape[1:]) for r in residuals]}"
        )
    added = [place + residual for place, residual in zip(places, residuals, strict=True)]
    return added[: len(skips)], added[-1] if middle else hidden


def _guidance_waves(guidance: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 (guidance - 1), as guided networks are distilled with (Luo 2023, section 4.3)."""
    return sinusoidal(1000 * (guidance.float() - 1), dim, flip_sin_to_cos=False, freq_shift=1)


def _class_embedding(c: UNet2DConditionConfig, time_dim: int) -> nn.Module | None:
    if c.class_embed_type == "timestep":
        return TimestepEmbedding(c.block_out_channels[0], time_dim, act=c.act_fn)
    if c.class_embed_type == "identity":
        return nn.Identity()
    if c.class_embed_type == "projection":
        return TimestepEmbedding(c.projection_class_embeddings_input_dim or 0, time_dim)
    if c.class_embed_type == "simple_projection":
        return nn.Linear(c.projection_class_embeddings_input_dim or 0, time_dim)
    return nn.Embedding(c.num_class_embeds, time_dim) if c.num_class_embeds is not None else None


def _cross(
    c: UNet2DConditionConfig, level: int, depth: int | tuple[int, ...], layers: int, *, only_cross: bool | None = None
) -> CrossStyle | None:
    """How the transformers of a level look; None where no text comes."""
    if not c.told_text[level]:
        return None
    depths = depth if isinstance(depth, tuple) else (depth,) * layers
    if len(depths) < layers:
        raise UserError(f"a block of {layers} layers has only the transformer depths {list(depths)}")
    return CrossStyle(
        heads=c.heads[level],
        context_dim=c.attended_dim,
        depths=depths[:layers],
        linear_projection=c.use_linear_projection,
        only_cross=c.by_level("only_cross_attention")[level] if only_cross is None else only_cross,
        upcast=c.upcast_attention,
    )


def _mid_block(c: UNet2DConditionConfig, style: BlockStyle) -> UNetMidBlock2DCrossAttn | None:
    if c.mid_block_type is None:
        return None
    cross, last = None, len(c.block_out_channels) - 1
    if c.mid_block_type == "UNetMidBlock2DCrossAttn":
        cross = _cross(c, last, c.by_level("transformer_layers_per_block")[last], 1, only_cross=False)
    return UNetMidBlock2DCrossAttn(
        c.block_out_channels[-1], style, cross, output_scale_factor=c.mid_block_scale_factor
    )
