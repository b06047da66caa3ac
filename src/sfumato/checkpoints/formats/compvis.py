"""The names of latent diffusion's first code base (CompVis), which single files use, for any UNet and autoencoder here.

There a network is one list of numbered blocks; here and in diffusers it is levels of residual blocks, transformers and
samplers. The tables follow from a network's config.

>>> level = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
>>> table = unet_map(UNet2DConditionConfig.from_dict({**level, "block_out_channels": [32], "layers_per_block": 1}))
>>> [(rule.theirs, *rule.ours) for rule in table.rules if rule.theirs.startswith("input_blocks.1.1")]
[('input_blocks.1.1.{rest}', 'down_blocks.0.attentions.0.{rest}')]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from sfumato.checkpoints.keymap import CONVOLVED, FLATTENED, KeyMap, Rule, Via
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import FirstStageConfig, VQConfig
from sfumato.networks.unet_2d import UNet2DConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MLP = {"0": "linear_1", "2": "linear_2"}
_STAGE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_STAGE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_HAS_ATTENTION = {
    **dict.fromkeys(("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"), True),
    **dict.fromkeys(("DownBlock2D", "UpBlock2D", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), False),
}
CONVOLVED_1D = Via(CONVOLVED.to_ours, lambda ours: ours[0][..., None])
"""The weight of a 1x1 convolution over a line, (C, D, 1) <-> a linear layer's, (C, D)."""


def _inside(theirs: str, ours: str, names: dict[str, str]) -> Iterator[Rule]:
    """Rules for the layers of one block."""
    for a, b in names.items():
        yield Rule(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}")


# --- UNet ----------------------------------------------------------------------------------------------------------


UNetConfig = UNet2DConditionConfig | UNet2DConfig


def unet_map(config: UNetConfig) -> KeyMap:
    """CompVis' names of a UNet, without prefix.

    Raises:
        UserError: when the network has a part that their layout has no place for.
    """
    _check_has_counterpart(config)
    last = len(config.block_out_channels) - 1
    rules = [
        *_inside("time_embed", "time_embedding", _MLP),
        Rule("input_blocks.0.0.{p}", "conv_in.{p}"),
        *_inside("middle_block.0", "mid_block.resnets.0", _RESNET),
        *_attention("middle_block.1", "mid_block.attentions.0", config, last),
        *_inside("middle_block.2", "mid_block.resnets.1", _RESNET),
        Rule("out.0.{p}", "conv_norm_out.{p}"),
        Rule("out.2.{p}", "conv_out.{p}"),
    ]
    return KeyMap([*rules, *_labels(config), *_down(config), *_up(config)])


def _check_has_counterpart(config: UNetConfig) -> None:
    told = isinstance(config, UNet2DConditionConfig)
    for kind in (*config.down_block_types, *config.up_block_types):
        if kind not in _HAS_ATTENTION or (kind.startswith(("Attn", "Resnet")) and told):
            raise UserError(f"a block of type {kind!r} has no place in the layout of single files")
    if not isinstance(config, UNet2DConditionConfig):
        for name, wanted in (("time_embedding_type", "positional"), ("add_attention", True)):
            if (value := getattr(config, name)) != wanted:
                raise UserError(f"a network with {name} {value!r} has no place in the layout of single files")
        return
    for name, only in (
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("encoder_hid_dim", None),
        ("time_cond_proj_dim", None),
    ):
        if (value := getattr(config, name)) != only:
            raise UserError(f"a network with {name} {value!r} has no place in the layout of single files")
    if config.class_embed_type in ("identity", "simple_projection"):
        raise UserError(f"class_embed_type {config.class_embed_type!r} has no place in the layout of single files")


def _attention(theirs: str, ours: str, config: UNetConfig, level: int) -> Iterator[Rule]:
    """A transformer, whose names are the same; or a self-attention over pixels, which they keep as one convolution with
    the rows of q, k and v of one head after the other."""
    if isinstance(config, UNet2DConditionConfig):
        yield Rule(f"{theirs}.{{rest}}", f"{ours}.{{rest}}")
        return
    wide, channels = config.attention_head_dim, config.block_out_channels[level]
    width = wide[level] if isinstance(wide, tuple) else wide or channels
    qkv = tuple(f"{ours}.to_{part}.{{p}}" for part in "qkv")
    yield Rule(f"{theirs}.norm.{{p}}", f"{ours}.group_norm.{{p}}")
    for part, via in (("weight", by_head(channels // width, 3)), ("bias", by_head(channels // width, 1))):
        yield Rule(f"{theirs}.qkv.{part}", tuple(name.format(p=part) for name in qkv), via)
    yield Rule(f"{theirs}.proj_out.weight", f"{ours}.to_out.0.weight", CONVOLVED_1D)
    yield Rule(f"{theirs}.proj_out.bias", f"{ours}.to_out.0.bias")


@cache
def by_head(heads: int, dims: int) -> Via:
    """One tensor with the rows (q, k, v) of each of so many heads <-> the three; `dims` 3 for a convolution's weight
    (3 C, C, 1), 1 for its bias."""

    def to_ours(t: Tensor) -> tuple[Tensor, ...]:
        if t.shape[:1].numel() % (3 * heads):
            raise ModelFileError(f"a tensor that holds q, k and v of {heads} heads has {t.shape[0]} rows")
        rows = t.flatten(1) if t.ndim > 1 else t
        parted = rows.reshape(heads, 3, len(rows) // (3 * heads), *rows.shape[1:])
        return tuple(part.flatten(0, 1).contiguous() for part in parted.unbind(1))

    def to_theirs(parts: tuple[Tensor, ...]) -> Tensor:
        parted = [part.reshape(heads, len(part) // heads, *part.shape[1:]) for part in parts]
        rows = torch.stack(parted, dim=1).flatten(0, 2)
        return rows[..., None] if dims == 3 else rows

    return Via(to_ours, to_theirs)


def _labels(config: UNetConfig) -> Iterator[Rule]:
    """What is added to the embedded time: a table of classes, or an embedded vector."""
    if config.num_class_embeds is not None:
        yield Rule("label_emb.{p}", "class_embedding.{p}")
    if config.class_embed_type is not None:
        yield from _inside("label_emb.0", "class_embedding", _MLP)
    if isinstance(config, UNet2DConditionConfig) and config.addition_embed_type is not None:
        yield from _inside("label_emb.0", "add_embedding", _MLP)


def _layers(config: UNetConfig) -> tuple[int, ...]:
    """Residual blocks of each level on the way down, outermost first."""
    if isinstance(config, UNet2DConditionConfig):
        return config.by_level("layers_per_block")
    return (config.layers_per_block,) * len(config.block_out_channels)


def _resampled(config: UNetConfig, kind: str, way: str) -> bool:
    """Whether a level is resampled by a residual block."""
    if isinstance(config, UNet2DConditionConfig):
        return False
    chosen = config.downsample_type if way == "down" else config.upsample_type
    return kind.startswith("Resnet") or (kind.startswith("Attn") and chosen == "resnet")


def _down(config: UNetConfig) -> Iterator[Rule]:
    layers, number = _layers(config), 1
    for level, kind in enumerate(config.down_block_types):
        ours = f"down_blocks.{level}"
        for layer in range(layers[level]):
            yield from _inside(f"input_blocks.{number}.0", f"{ours}.resnets.{layer}", _RESNET)
            if _HAS_ATTENTION[kind]:
                yield from _attention(f"input_blocks.{number}.1", f"{ours}.attentions.{layer}", config, level)
            number += 1
        if level < len(config.down_block_types) - 1:
            if _resampled(config, kind, "down"):
                yield from _inside(f"input_blocks.{number}.0", f"{ours}.downsamplers.0", _RESNET)
            else:
                yield Rule(f"input_blocks.{number}.0.op.{{p}}", f"{ours}.downsamplers.0.conv.{{p}}")
            number += 1


def _up(config: UNetConfig) -> Iterator[Rule]:
    layers, number, last = _layers(config)[::-1], 0, len(config.up_block_types) - 1
    for block, kind in enumerate(config.up_block_types):
        ours = f"up_blocks.{block}"
        for layer in range(layers[block] + 1):
            theirs = f"output_blocks.{number}"
            yield from _inside(f"{theirs}.0", f"{ours}.resnets.{layer}", _RESNET)
            if _HAS_ATTENTION[kind]:
                yield from _attention(f"{theirs}.1", f"{ours}.attentions.{layer}", config, last - block)
            if layer == layers[block] and block < last:
                place = f"{theirs}.{2 if _HAS_ATTENTION[kind] else 1}"
                if _resampled(config, kind, "up"):
                    yield from _inside(place, f"{ours}.upsamplers.0", _RESNET)
                else:
                    yield Rule(f"{place}.conv.{{p}}", f"{ours}.upsamplers.0.conv.{{p}}")
            number += 1


# --- text ----------------------------------------------------------------------------------------------------------

_BERT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def text_map(layers: int) -> KeyMap:
    """CompVis' names of the transformer that latent diffusion trains with its UNet, without prefix.

    There attentions and feed-forwards alternate in one list; each is a norm and the layer itself.
    """
    rules = [
        Rule("token_emb.{p}", "model.embed_tokens.{p}"),
        Rule("pos_emb.emb.{p}", "model.embed_positions.{p}"),
        Rule("norm.{p}", "model.layer_norm.{p}"),
    ]
    for n in range(layers):
        ours = f"model.layers.{n}"
        attention, forward = (f"attn_layers.layers.{2 * n + i}" for i in range(2))
        rules.append(Rule(f"{attention}.0.{{p}}", f"{ours}.self_attn_layer_norm.{{p}}"))
        rules += _inside(f"{attention}.1", f"{ours}.self_attn", _BERT_ATTENTION)
        rules.append(Rule(f"{forward}.0.{{p}}", f"{ours}.final_layer_norm.{{p}}"))
        rules += _inside(f"{forward}.1.net", ours, {"0.0": "fc1", "2": "fc2"})
    return KeyMap(rules)


# --- first stages --------------------------------------------------------------------------------------------------


def stage_map(config: FirstStageConfig) -> KeyMap:
    """CompVis' names of an autoencoder, without prefix; its codes too where it has them."""
    last = len(config.block_out_channels) - 1
    rules = [Rule("quant_conv.{p}", "quant_conv.{p}"), Rule("post_quant_conv.{p}", "post_quant_conv.{p}")]
    if isinstance(config, VQConfig):
        if config.norm_type != "group":
            raise UserError(f"an autoencoder with norm_type {config.norm_type!r} has no place in single files")
        rules.append(Rule("quantize.embedding.{p}", "quantize.embedding.{p}"))
    for half in ("encoder", "decoder"):
        rules += [
            Rule(f"{half}.conv_in.{{p}}", f"{half}.conv_in.{{p}}"),
            Rule(f"{half}.norm_out.{{p}}", f"{half}.conv_norm_out.{{p}}"),
            Rule(f"{half}.conv_out.{{p}}", f"{half}.conv_out.{{p}}"),
            *_inside(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _STAGE_RESNET),
            *_inside(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _STAGE_RESNET),
        ]
        if config.mid_block_add_attention:
            rules += _stage_attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    for level in range(last + 1):
        attention = config.down_block_types[level] == "AttnDownEncoderBlock2D"
        theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        rules += _stage_level(theirs, ours, config.layers_per_block, attention=attention)
        if level < last:
            rules.append(Rule(f"{theirs}.downsample.conv.{{p}}", f"{ours}.downsamplers.0.conv.{{p}}"))
        attention = config.up_block_types[level] == "AttnUpDecoderBlock2D"
        theirs, ours = f"decoder.up.{last - level}", f"decoder.up_blocks.{level}"
        rules += _stage_level(theirs, ours, config.layers_per_block + 1, attention=attention)
        if level < last:
            rules.append(Rule(f"{theirs}.upsample.conv.{{p}}", f"{ours}.upsamplers.0.conv.{{p}}"))
    return KeyMap(rules)


def diffusers_stage_map(*, old: bool = False) -> KeyMap:
    """diffusers' names of an autoencoder, which are ours.

    Args:
        old: for files from before its version 0.15, whose attention has other names.
    """
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    rules = [Rule(f"{part}.{{rest}}", f"{part}.{{rest}}") for part in parts]
    for half in ("encoder", "decoder") if old else ():
        for theirs, ours in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            place = f"{half}.mid_block.attentions.0"
            rules.append(Rule(f"{place}.{theirs}.weight", f"{place}.{ours}.weight", FLATTENED))
            rules.append(Rule(f"{place}.{theirs}.bias", f"{place}.{ours}.bias"))
    return KeyMap(rules)


def _stage_level(theirs: str, ours: str, layers: int, *, attention: bool) -> Iterator[Rule]:
    for n in range(layers):
        yield from _inside(f"{theirs}.block.{n}", f"{ours}.resnets.{n}", _STAGE_RESNET)
        if attention:
            yield from _stage_attention(f"{theirs}.attn.{n}", f"{ours}.attentions.{n}")


def _stage_attention(theirs: str, ours: str) -> Iterator[Rule]:
    """A self-attention whose linear layers are 1x1 convolutions there."""
    yield Rule(f"{theirs}.norm.{{p}}", f"{ours}.group_norm.{{p}}")
    for a, b in _STAGE_ATTENTION.items():
        yield Rule(f"{theirs}.{a}.weight", f"{ours}.{b}.weight", CONVOLVED)
        yield Rule(f"{theirs}.{a}.bias", f"{ours}.{b}.bias")
