"""The conditional UNet against diffusers' UNet2DConditionModel: same names in the same order, same numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.networks.embeddings import sinusoidal
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel

diffusers = pytest.importorskip("diffusers")

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
SD1: dict[str, Any] = {
    **TINY,
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}
SD2: dict[str, Any] = {
    **SD1,
    "block_out_channels": [16, 32, 48, 48],
    "attention_head_dim": [1, 2, 3, 3],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL: dict[str, Any] = {
    **TINY,
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "sd1": SD1,
    "sd1_inpainting": {**SD1, "in_channels": 9},
    "sd2": SD2,
    "sdxl": SDXL,
    "classes": {**TINY, "num_class_embeds": 10},
    "class_timestep": {**TINY, "class_embed_type": "timestep", "act_fn": "gelu"},
    "class_identity": {**TINY, "class_embed_type": "identity"},
    "unclip": {**SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "simple_projection": {
        **TINY,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 20,
    },
    "told_its_guidance": {**TINY, "time_cond_proj_dim": 14},
    "projected_text": {**TINY, "encoder_hid_dim": 18, "encoder_hid_dim_type": "text_proj"},
    "upscaler": {**SD1, "in_channels": 7, "num_class_embeds": 30, "only_cross_attention": [True, True, True, False]},
    "only_cross": {**TINY, "only_cross_attention": True},
    "no_text": {
        **TINY,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": [8, 16],
    },
    "no_mid_block": {**TINY, "mid_block_type": None},
    "depths_by_layer": {
        **TINY,
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [[2, 1], 1],
        "reverse_transformer_layers_per_block": [1, [1, 2, 1]],
    },
    "other_settings": {
        **TINY,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "mid_block_scale_factor": 1.5,
        "dropout": 0.1,
        "act_fn": "relu",
        "norm_eps": 1e-6,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": 24,
        "layers_per_block": [1, 2],
        "down_block_types": ["CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"],
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "out_channels": 3,
    },
}
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def build(name: str) -> tuple[UNet2DConditionModel, Any]:
    """Both networks with the same random weights, normalisations and biases included."""
    values = CONFIGS[name]
    theirs = diffusers.UNet2DConditionModel(**values).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours = UNet2DConditionModel(UNet2DConditionConfig.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def slots(ours: UNet2DConditionModel, batch: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the config asks for, as our slots and as diffusers' arguments."""
    c = ours.config
    mine: dict[str, Any] = {}
    their: dict[str, Any] = {"encoder_hidden_states": None}
    if c.context_dim is not None:
        mine["context"] = their["encoder_hidden_states"] = randn(batch, 5, c.context_dim, seed=2)
    if c.num_class_embeds is not None:
        mine["labels"] = their["class_labels"] = torch.tensor([0, 9])[:batch]
    if c.class_embed_type == "timestep":
        mine["labels"] = their["class_labels"] = torch.tensor([20, 700])[:batch]
    elif c.class_embed_type is not None:
        width = c.projection_class_embeddings_input_dim or 4 * c.block_out_channels[0]
        mine["vector"] = their["class_labels"] = randn(batch, width, seed=3)
    if c.addition_embed_type == "text_time":
        pooled, sizes = randn(batch, 10, seed=4), torch.tensor([[512, 768, 0, 31, 1024, 1023]] * batch)
        mine["vector"] = ours.added_vector(pooled, sizes)
        their["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    if c.time_cond_proj_dim is not None:
        mine["guidance"] = torch.tensor([7.5, 1.0])[:batch]
        waves = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        their["timestep_cond"] = waves(None, mine["guidance"] - 1, c.time_cond_proj_dim)
    return mine, their


def inputs(config: UNet2DConditionConfig, size: int = 8) -> tuple[Tensor, Tensor]:
    return randn(2, config.in_channels, size, size, seed=1), torch.tensor([3, 977])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_same_names_same_order_same_output(name: str) -> None:
    ours, theirs = build(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    x, t = inputs(ours.config)
    mine, their = slots(ours)
    with torch.no_grad():
        expected = theirs(x, t, **their).sample
        assert relative(ours(x, t, **mine), expected) <= 1e-5
        channels_last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        assert relative(channels_last(x, t, **mine), expected) <= 1e-5


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_context_mask_means_the_same(name: str) -> None:
    ours, theirs = build(name)
    x, t = inputs(ours.config)
    mine, their = slots(ours)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    with torch.no_grad():
        expected = theirs(x, t, **their, encoder_attention_mask=mask).sample
        assert relative(ours(x, t, **mine, context_mask=mask), expected) <= 1e-5
        assert relative(ours(x, t, **mine), expected) > 1e-4


@pytest.mark.parametrize("name", ["sd1", "sdxl", "other_settings"])
def test_same_gradients(name: str) -> None:
    ours, theirs = build(name)
    x, t = inputs(ours.config)
    mine, their = slots(ours)
    ours.zero_grad()
    theirs.zero_grad()
    ours(x, t, **mine).square().mean().backward()
    theirs(x, t, **their).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in reference.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - reference[key].grad).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize("name", ["sd1", "no_text"])
def test_residuals_of_a_controlnet_are_added_where_theirs_are(name: str) -> None:
    ours, theirs = build(name)
    x, t = inputs(ours.config)
    mine, their = slots(ours)
    shapes: list[tuple[int, ...]] = []
    hooks = [ours.conv_in.register_forward_hook(lambda *call: shapes.append(call[2].shape[1:]))]
    for down in ours.down_blocks:
        hooks.append(down.register_forward_hook(lambda *call: shapes.extend(skip.shape[1:] for skip in call[2][1])))
    hooks.append(ours.mid_block.register_forward_hook(lambda *call: shapes.append(call[2].shape[1:])))
    with torch.no_grad():
        plain = ours(x, t, **mine)
    for hook in hooks:
        hook.remove()
    residuals = tuple(randn(2, *shape, seed=i) for i, shape in enumerate(shapes))
    with torch.no_grad():
        expected = theirs(
            x,
            t,
            **their,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
        ).sample
        assert relative(ours(x, t, **mine, residuals=residuals), expected) <= 1e-5
    assert relative(plain, expected) > 1e-3


def test_config_fields_and_defaults_are_theirs() -> None:
    reference = {k: v for k, v in diffusers.UNet2DConditionModel(**TINY).config.items() if not k.startswith("_")}
    stored = json.loads(json.dumps(reference))
    assert UNet2DConditionConfig.from_dict(stored).to_dict() == stored
    assert [field.name for field in dataclasses.fields(UNet2DConditionConfig)] == list(reference)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "projected_text"])
def test_files_load_both_ways(name: str, tmp_path: Path) -> None:
    ours, theirs = build(name)
    x, t = inputs(ours.config)
    mine, their = slots(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    opened = UNet2DConditionModel(UNet2DConditionConfig.from_dict(config)).eval()
    opened.load_state_dict(load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "ours").mkdir()
    named = {"_class_name": "UNet2DConditionModel", **ours.config.to_dict()}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(named))
    save_file(ours.state_dict(), tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    reopened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        assert torch.equal(opened(x, t, **mine), ours(x, t, **mine))
        assert torch.equal(reopened(x, t, **their).sample, theirs(x, t, **their).sample)


def test_added_vector_is_theirs_before_its_embedding() -> None:
    ours, _ = build("sdxl")
    vector = ours.added_vector(torch.ones(1, 10), torch.tensor([[5, 6, 0, 0, 7, 8]]))
    assert vector.shape == (1, 58)
    torch.testing.assert_close(vector[:, 18:26], sinusoidal(torch.tensor([6]), 8))


@pytest.mark.slow
def test_stable_diffusion_1_5_in_full() -> None:
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**SD15)
        ours = UNet2DConditionModel(UNet2DConditionConfig.from_dict(SD15))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in theirs.state_dict().items():
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        state[key] = torch.randn(value.shape, generator=generator).mul_(scale)
        if "norm" in key and key.endswith("weight"):
            state[key] += 1
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict(state, assign=True)
    x, t, context = randn(1, 4, 64, 64, seed=1), torch.tensor([301]), randn(1, 77, 768, seed=2)
    with torch.no_grad():
        expected = theirs.eval()(x, t, context).sample
        assert relative(ours.eval()(x, t, context=context), expected) <= 1e-5
