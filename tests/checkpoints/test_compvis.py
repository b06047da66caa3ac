"""The tables of single files are bijections between CompVis' names and ours, with the published counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sfumato.checkpoints.formats.compvis import stage_map, unet_map
from sfumato.checkpoints.formats.families import FAMILIES, VAE_F4, VAE_F8
from sfumato.checkpoints.formats.open_clip import (
    CLIP_L,
    OPEN_CLIP_H,
    clip_map,
    ignored_of_open_clip,
    open_clip_map,
)
from sfumato.checkpoints.formats.single_file import meta_tensors
from sfumato.checkpoints.keymap import KeyMap
from sfumato.errors import UserError
from sfumato.networks.autoencoder import AutoencoderConfig, VQConfig, VQModel
from sfumato.networks.clip_text import CLIPTextConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig

from .compvis_names import F4, F8, UNETS, clip, on_meta, open_clip, stage, unet

Tensors = dict[str, torch.Tensor]
COUNTS = {
    "sd1": (686, 859_520_964),
    "sd1-inpainting": (686, 859_535_364),
    "sd2-base": (686, 865_910_724),
    "sd2-v": (686, 865_910_724),
    "sd2-inpainting": (686, 865_925_124),
    "sd2-depth": (686, 865_913_604),
    "sd-x4-upscaler": (687, 473_398_020),
}


def counted(tensors: Tensors) -> tuple[int, int]:
    return len(tensors), sum(tensor.numel() for tensor in tensors.values())


def assert_bijection(table: KeyMap, theirs: Tensors, ours: Tensors) -> None:
    """All of theirs are all of ours with equal shapes, and the way back gives theirs again; each name has one rule."""
    found, unmatched = table.to_ours(theirs)
    assert not unmatched
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in ours.items()}
    back, unmatched = table.to_theirs(ours)
    assert not unmatched
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in theirs.items()}
    for name in theirs:
        assert sum(rule._theirs.fit(name) is not None for rule in table.rules) == 1, name
    for name in ours:
        fits = [one for rule in table.rules for one in rule._ours if one.fit(name) is not None]
        assert len(fits) == 1, name


@pytest.mark.parametrize("name", FAMILIES)
def test_unets(name: str) -> None:
    theirs: Tensors = on_meta(unet(**UNETS[name]))  # type: ignore[arg-type]
    assert counted(theirs) == COUNTS[name]
    config = FAMILIES[name].unet
    assert_bijection(unet_map(config), theirs, meta_tensors(config))


TINY: dict[str, Any] = {"mc": 32, "mult": (1, 2, 2, 2), "attention": (4, 2, 1), "context": 16}
CROSS = ["CrossAttnDownBlock2D", "DownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]


@pytest.mark.parametrize("res_blocks", [1, 2, 3])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("mult", "attention"), [((1,), (1,)), ((1, 2), (2,)), ((1, 2, 4), (4,)), ((1, 1, 2, 2, 3), (1, 4, 16))]
)
def test_any_depth_and_number_of_layers(
    mult: tuple[int, ...], attention: tuple[int, ...], res_blocks: int, linear: bool
) -> None:
    theirs = on_meta(
        unet(**{**TINY, "mult": mult, "attention": attention}, res_blocks=res_blocks, linear=linear, depth=2, adm=24)
    )
    told = [2**level in attention for level in range(len(mult))]
    config = UNet2DConditionConfig.from_dict(
        {
            "block_out_channels": [32 * m for m in mult],
            "down_block_types": [CROSS[0][0 if one else 1] for one in told],
            "up_block_types": [CROSS[1][0 if one else 1] for one in reversed(told)],
            "layers_per_block": res_blocks,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "use_linear_projection": linear,
            "transformer_layers_per_block": 2,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 24,
        }
    )
    assert_bijection(unet_map(config), theirs, meta_tensors(config))


def test_a_vector_beside_the_text() -> None:
    """The layout of Stable Diffusion XL's UNet, in small."""
    values = {**TINY, "mult": (1, 2, 2), "attention": (2, 4), "adm": 40, "linear": True}
    config = UNet2DConditionConfig.from_dict(
        {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        }
    )
    assert_bijection(unet_map(config), on_meta(unet(**values)), meta_tensors(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"mid_block_type": None}, "mid_block_type None"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim 8"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        ({"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 8}, "simple_projection"),
    ],
)
def test_a_network_without_counterpart_is_refused(change: dict[str, Any], says: str) -> None:
    config = UNet2DConditionConfig.from_dict({"cross_attention_dim": 16, **change})
    with pytest.raises(UserError, match=f"{re.escape(says)}.* has no place in the layout of single files"):
        unet_map(config)


# --- first stages


def kl(mult: tuple[int, ...], z: int, attention: tuple[int, ...] = ()) -> AutoencoderConfig:
    told = [256 // 2**level in attention for level in range(len(mult))]
    return AutoencoderConfig(
        block_out_channels=tuple(128 * m for m in mult),
        down_block_types=tuple("AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in told),
        up_block_types=tuple("AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(told)),
        layers_per_block=2,
        latent_channels=z,
    )


@pytest.mark.parametrize(
    ("config", "values", "counts"),
    [
        (VAE_F8, F8, (248, 83_653_863)),
        (VAE_F4, F4, (204, 55_325_927)),
        (kl((1, 2, 4), 3), {**F4, "z": 3}, (204, 55_312_063)),
        (
            kl((1, 1, 2, 2, 4), 16, (16,)),
            {"ch": 128, "mult": (1, 1, 2, 2, 4), "z": 16, "attention": (16,)},
            (342, 69_610_963),
        ),
        (
            kl((1, 1, 2, 2, 4, 4), 64, (16, 8)),
            {"ch": 128, "mult": (1, 1, 2, 2, 4, 4), "z": 64, "attention": (16, 8)},
            (436, 103_880_131),
        ),
    ],
    ids=["sd", "x4", "kl-f4", "kl-f16", "kl-f32"],
)
def test_autoencoders(config: AutoencoderConfig, values: dict[str, Any], counts: tuple[int, int]) -> None:
    theirs = on_meta(stage(**values))
    assert counted(theirs) == counts
    assert_bijection(stage_map(config), theirs, meta_tensors(config))


def test_an_autoencoder_with_codes() -> None:
    theirs = on_meta(stage(**{**F4, "z": 3}, codes=8192))
    assert counted(theirs) == (205, 55_322_782)
    config = VQConfig(
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        num_vq_embeddings=8192,
    )
    with torch.device("meta"):
        ours = VQModel(config).state_dict()
    assert_bijection(stage_map(config), theirs, ours)


# --- text towers


def test_clip() -> None:
    theirs = {name: t for name, t in on_meta(clip(CLIP_L)).items() if not name.endswith("position_ids")}
    assert counted(theirs) == (196, 123_060_480)
    assert_bijection(clip_map(), theirs, CLIP_L.tensors())
    flat = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    assert_bijection(clip_map(flat=True), flat, CLIP_L.tensors())


def test_open_clip_without_its_last_layer() -> None:
    assert counted(OPEN_CLIP_H.tensors()) == (372, 340_387_840)
    ignored = re.compile("|".join(one.names for one in ignored_of_open_clip(OPEN_CLIP_H)))
    theirs = on_meta(open_clip(OPEN_CLIP_H))
    used = {name: tensor for name, tensor in theirs.items() if ignored.fullmatch(name) is None}
    assert len(theirs) - len(used) == 12 + 2 and all("resblocks.23." not in name for name in used)
    assert_bijection(open_clip_map(OPEN_CLIP_H), used, OPEN_CLIP_H.tensors())


def test_open_clip_with_projection() -> None:
    """ViT-bigG, as Stable Diffusion XL has it."""
    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"
    )
    theirs = {n: t for n, t in on_meta(open_clip(config)).items() if "resblocks.32." not in n and n != "logit_scale"}
    ours = config.tensors() | {"text_projection.weight": torch.empty(1280, 1280, device="meta")}
    assert counted(ours) == (517, 694_659_840)
    assert_bijection(open_clip_map(config, projection=True), theirs, ours)


def test_the_names_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    values = {"vocab_size": 50000, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    config = CLIPTextConfig.from_dict({**values, "num_hidden_layers": 2, "architectures": ["CLIPTextModel"]})
    with torch.device("meta"):
        given = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**given)).state_dict()
    names = {"text_model." + name.removeprefix("text_model."): tensor.shape for name, tensor in theirs.items()}
    assert names == {name: tensor.shape for name, tensor in config.tensors().items()}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hiden_size": 3}, "hidden_size"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "not a multiple"),
        ({"num_hidden_layers": 0}, "1 or more"),
        ({"hidden_size": "8"}, "wrong type"),
    ],
)
def test_an_impossible_text_config_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CLIPTextConfig.from_dict(values)
