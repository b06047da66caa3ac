"""What a file holds is told from names and shapes; what is not supported is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from sfumato.checkpoints.formats.families import (
    FAMILIES,
    PARTS_KEY,
    VAE_F4,
    VAE_F8,
    Place,
    detect,
    family_named,
    stage_config,
    stored_parts,
)
from sfumato.checkpoints.formats.single_file import meta_tensors
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig
from sfumato.systems.scheduler_config import from_diffusers

from .compvis_names import SD1, SD2, X4, on_meta, stage, tiny_family, unet, whole_file

Tensors = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


def unet_of(**values: Any) -> Tensors:
    return on_meta(unet(**values), UNET)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_files_are_known(name: str) -> None:
    found = detect(whole_file(name), {})
    expected = ["sd2-base", "sd2-v"] if name in ("sd2-base", "sd2-v") else [name]
    assert [family.name for family in found.families] == expected
    layout = "open_clip" if FAMILIES[name].open_clip else "clip"
    assert {part: place.layout for part, place in found.places.items()} == {
        "unet": "compvis", "vae": "compvis", "text": layout,
    }  # fmt: skip
    assert found.vae is None and not found.averaged
    if len(expected) == 1:
        assert found.prediction == FAMILIES[name].prediction and "does" in found.why
        assert found.family() == FAMILIES[name]
    else:
        assert found.prediction == "unknown"


def test_two_models_of_one_shape() -> None:
    found = detect(unet_of(**SD2), {})
    with pytest.raises(UserError, match=r"Stable Diffusion 2 base \(eps\) or .*768 pixels \(v\).*eps or v$"):
        found.family()
    assert found.family("eps") == FAMILIES["sd2-base"] and found.family("v") == FAMILIES["sd2-v"]


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"modelspec.predict_key": "v"}, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "eps"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.prediction_type": "epsilon"}, "eps"),
        ({"modelspec.architecture": "stable-diffusion-v9"}, "unknown"),
        ({"global_step": "875000"}, "eps"),
        ({"global_step": "110000"}, "v"),
        ({"global_step": "220000"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_metadata_tells_what_is_predicted(metadata: dict[str, str], prediction: str) -> None:
    found = detect(unet_of(**SD2), metadata)
    assert found.prediction == prediction
    assert (found.why == "") == (prediction == "unknown")


def test_steps_mean_nothing_for_other_models() -> None:
    assert detect(unet_of(**SD1), {"global_step": "110000"}).prediction == "eps"


def test_metadata_that_cannot_be_is_refused() -> None:
    with pytest.raises(ModelFileError, match="modelspec.prediction_type 'flow'"):
        detect(unet_of(**SD1), {"modelspec.prediction_type": "flow"})


def test_a_tuned_model_keeps_its_family_and_changes_its_scheduler() -> None:
    marks = on_meta({"v_pred": (), "ztsnr": ()})
    family = detect(unet_of(**SD1) | marks, {}).family()
    assert (family.name, family.prediction) == ("sd1", "v")
    assert family.scheduler["prediction_type"] == "v_prediction" and family.scheduler["rescale_betas_zero_snr"]
    assert detect(unet_of(**SD1), {}).family("v").scheduler["prediction_type"] == "v_prediction"
    assert "rescale_betas_zero_snr" not in FAMILIES["sd1"].scheduler


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lambda: unet_of(**{**SD1, "in_channels": 8}), "InstructPix2Pix"),
        (lambda: unet_of(**{**SD2, "context": 2048, "adm": 2816}), "a Stable Diffusion XL model"),
        (lambda: unet_of(**{**SD2, "context": 2048, "adm": 2816, "in_channels": 9}), "a Stable Diffusion XL model"),
        (lambda: unet_of(**{**SD2, "context": 1280, "adm": 2560}), "refiner"),
        (lambda: unet_of(**{**SD2, "adm": 2048}), "unCLIP"),
        (lambda: {n: t for n, t in unet_of(**SD1).items() if "attn2" not in n}, "not told a text"),
        (lambda: unet_of(**SD1) | on_meta({f"{UNET}x.attn2.to_k.weight": (1, 9)}), "several texts"),
        (lambda: unet_of(**{**SD1, "context": 1280}), "4 input channels and a text of width 1280"),
        (lambda: unet_of(**{**SD1, "in_channels": 5}), "5 input channels"),
        (lambda: unet_of(**{**SD2, "in_channels": 7}), "7 input channels"),
        (lambda: unet_of(**{**X4, "in_channels": 4}), "and a table of classes"),
        (lambda: unet_of(**SD1) | on_meta({"control_model.time_embed.0.weight": (1,)}), "a ControlNet"),
        (lambda: unet_of(**SD1) | on_meta({"cc_projection.weight": (1,)}), "Zero-1-to-3"),
        (lambda: on_meta({"double_blocks.0.img_attn.qkv.weight": (1,)}), "a Flux model"),
        (lambda: on_meta({f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale": (1,)}), "a Flux model"),
        (lambda: on_meta({f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": (1,)}), "Stable Diffusion 3"),
        (lambda: on_meta({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1,)}), "a LoRA"),
        (lambda: on_meta({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (1,)}), "a LoRA"),
        (lambda: on_meta({"emb_params": (1, 768)}), "a textual inversion, which changes a model and is not a model"),
        (lambda: on_meta({"<cat>": (768,)}), "a textual inversion"),
        (lambda: on_meta({"cat": (2, 1024), "dog": (1024,)}), "a textual inversion"),
        (lambda: on_meta({"cat": (8, 8)}), "no model that is known here"),
        (lambda: on_meta({"body.0.in_conv.weight": (8, 8, 1, 1), "conv_in.weight": (8, 8, 1, 1)}), "a T2I-Adapter, wh"),
        (lambda: on_meta({"adapter.body.0.resnets.0.block1.weight": (8, 8, 1, 1)}), "a T2I-Adapter"),
        (lambda: on_meta({"body.0.rdb1.conv1.weight": (8, 8, 1, 1)}), "an upscaler of another kind"),
        (lambda: on_meta({"mid.to_q.base_layer.weight": (8, 8), "mid.to_q.lora_A.d.weight": (4, 8)}), "fuse them into"),
        (lambda: unet_of(**SD1) | on_meta({"down.motion_modules.0.weight": (1,)}), "a motion module"),
        (lambda: on_meta({"down_blocks.0.resnets.0.conv1.weight": (1,)}), "one network of a diffusers folder"),
        (lambda: on_meta({"text_model.embeddings.token_embedding.weight": (1,)}), "a text encoder alone"),
        (lambda: on_meta({"something.else": (1,)}), "no model that is known here .*something.else"),
        (dict, "no tensors"),
        (lambda: on_meta(stage(ch=128, mult=(1, 2, 4), z=3, codes=8192)), "rounds its latents"),
        (lambda: on_meta({"encoder.conv_in.weight": (1, 1, 3, 3, 3), "decoder.conv_in.weight": (1,)}), "of videos"),
        (lambda: on_meta({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8,)}), "another kind"),
    ],
)
def test_what_is_not_supported_is_named(tensors: Any, says: str) -> None:
    with pytest.raises(ModelFileError, match=says) as error:
        detect(tensors(), {})
    assert "\n" not in str(error.value)


# --- autoencoders


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize(("values", "config"), [((1, 2, 4, 4), VAE_F8), ((1, 2, 4), VAE_F4)])
def test_an_autoencoder_alone(values: tuple[int, ...], config: AutoencoderConfig, prefix: str) -> None:
    found = detect(on_meta(stage(ch=128, mult=values, z=4), prefix), {})
    assert found.families == () and found.vae == config and found.places == {"vae": Place(prefix, "compvis")}
    with pytest.raises(UserError, match="an autoencoder and no diffusion model"):
        found.family("eps")


def test_an_autoencoder_of_diffusers() -> None:
    found = detect(meta_tensors(VAE_F8), {})
    assert found.vae == VAE_F8 and found.places == {"vae": Place("", "diffusers")}


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_a_config_is_read_off_shapes(layout: str) -> None:
    config = AutoencoderConfig(
        in_channels=3,
        block_out_channels=(32, 64, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=3,
        latent_channels=5,
        sample_size=256,
        scaling_factor=0.08333,
        force_upcast=False,
    )
    theirs = on_meta(stage(ch=32, mult=(1, 2, 1), z=5, res_blocks=3, attention=(64,)))
    assert stage_config(theirs if layout == "compvis" else meta_tensors(config), Place("", layout)) == config


# --- configs that travel


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_configs_come_back(name: str) -> None:
    family = replace(tiny_family(name), size=64)
    found = detect(on_meta(unet(**{**SD1, "mc": 32})), {PARTS_KEY: stored_parts(family)})
    assert found.families == (family,) and found.prediction == family.prediction


def damaged(**changes: Any) -> str:
    return json.dumps({**json.loads(stored_parts(tiny_family())), **changes})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "must hold"),
        (damaged(more=1), "must hold"),
        (damaged(family="sd9"), "'sd9' is not known"),
        (damaged(prediction="flow"), "eps or v"),
        (damaged(size="8"), "whole number"),
        (damaged(scheduler=3), "a scheduler must be a table"),
        (damaged(unet=3), "must be a table"),
        (damaged(unet={"block_out_chanels": [1]}), "block_out_channels"),
        (damaged(unet={"block_out_channels": 3}), "impossible value|wrong type"),
        (damaged(vae={"scaling_factor": 0}), "scaling_factor"),
        (damaged(text={"hidden_size": 7}), "multiple"),
    ],
)
def test_damaged_configs_are_refused(text: str, says: str) -> None:
    with pytest.raises(ModelFileError, match=f"own configs cannot be used: .*{says}"):
        detect(unet_of(**SD1), {PARTS_KEY: text})


# --- published values


@pytest.mark.parametrize("name", FAMILIES)
def test_bundled_schedulers_are_understood(name: str) -> None:
    family = FAMILIES[name]
    read = from_diffusers(family.scheduler)
    assert read.prediction.parameterization == family.prediction
    if family.low_res_scheduler is not None:
        from_diffusers(family.low_res_scheduler)


def test_a_family_by_name() -> None:
    assert family_named("sd2-v") is FAMILIES["sd2-v"]
    with pytest.raises(UserError, match="unknown family 'sd2v' .*sd2-v"):
        family_named("sd2v")
    assert len({family.architecture for family in FAMILIES.values()}) == len(FAMILIES)
