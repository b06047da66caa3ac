"""The pixel UNet against diffusers' UNet2DModel: same names in the same order, same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sfumato.networks.attention import Attention
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel

diffusers = pytest.importorskip("diffusers")
attention_processor = pytest.importorskip("diffusers.models.attention_processor")

TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
RESNET_RESAMPLING: dict[str, Any] = {
    **TINY,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "class_conditional": {**TINY, "num_class_embeds": 10},
    "class_timestep": {**TINY, "class_embed_type": "timestep"},
    "class_identity": {**TINY, "class_embed_type": "identity"},
    "scale_shift_resnet_resampling": RESNET_RESAMPLING,
    "scale_shift_attn_groups": {**RESNET_RESAMPLING, "attn_norm_num_groups": 4, "layers_per_block": 2},
    "google_ddpm": {
        **TINY,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "head_width_not_dividing": {**TINY, "block_out_channels": [24, 40], "attention_head_dim": 12},
    "fourier": {**TINY, "time_embedding_type": "fourier"},
    "learned": {**TINY, "time_embedding_type": "learned", "num_train_timesteps": 1000},
    "no_mid_block": {**TINY, "mid_block_type": None},
    "other_settings": {
        **TINY,
        "in_channels": 4,
        "out_channels": 6,
        "center_input_sample": True,
        "time_embedding_dim": 24,
        "add_attention": False,
        "mid_block_scale_factor": 1.5,
        "act_fn": "gelu",
        "dropout": 0.1,
        "layers_per_block": 2,
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    },
    "one_level": {
        **TINY,
        "block_out_channels": [16],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
    },
}
MEDIUM: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [128, 128, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "num_class_embeds": 10,
}


def build(values: dict[str, Any]) -> tuple[UNet2DModel, Any]:
    """Both networks with the same random weights, normalisations and biases included."""
    theirs = diffusers.UNet2DModel(**values).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours = UNet2DModel(UNet2DConfig.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(config: UNet2DConfig, batch: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, size, size, generator=generator)
    t = torch.tensor([3, 977])[:batch]
    if config.time_embedding_type == "fourier":
        t = torch.tensor([0.3, 7.0])[:batch]
    labels = torch.tensor([0, 9])[:batch]
    if config.class_embed_type == "identity":
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        labels = torch.randn(batch, width, generator=generator)
    conditional = config.class_embed_type is not None or config.num_class_embeds is not None
    return (x, t, labels) if conditional else (x, t)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_same_names_same_order_same_output(name: str) -> None:
    ours, theirs = build(CONFIGS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    arguments = inputs(ours.config)
    with torch.no_grad():
        assert relative(ours(*arguments), theirs(*arguments).sample) <= 1e-5


@pytest.mark.parametrize("name", ["class_conditional", "scale_shift_resnet_resampling"])
def test_same_gradients(name: str) -> None:
    ours, theirs = build(CONFIGS[name])
    arguments = inputs(ours.config)
    ours(*arguments).square().mean().backward()
    theirs(*arguments).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in reference.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - reference[key].grad).abs().max()) <= 1e-5 * largest, key


def test_config_fields_and_defaults_are_theirs() -> None:
    reference = {k: v for k, v in diffusers.UNet2DModel(**TINY).config.items() if not k.startswith("_")}
    assert UNet2DConfig.from_dict(reference).to_dict() == {
        key: list(value) if isinstance(value, tuple) else value for key, value in reference.items()
    }
    assert [field.name for field in dataclasses.fields(UNet2DConfig)] == list(reference)


def test_a_scalar_time_is_every_pictures_time() -> None:
    ours, theirs = build(TINY)
    x = inputs(ours.config)[0]
    with torch.no_grad():
        assert relative(ours(x, torch.tensor(41)), theirs(x, 41).sample) <= 1e-5


@pytest.mark.parametrize("name", ["tiny", "scale_shift_resnet_resampling"])
def test_attention_processor_names_follow_their_modules(name: str) -> None:
    ours, theirs = build(CONFIGS[name])
    expected = [
        f"{key}.processor"
        for key, module in theirs.named_modules()
        if isinstance(module, attention_processor.Attention)
    ]
    assert list(ours.attn_processors) == expected


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("name", ["tiny", "scale_shift_resnet_resampling", "head_width_not_dividing"])
def test_their_processors_run_unchanged_in_the_network(name: str, processor: str) -> None:
    ours, _ = build(CONFIGS[name])
    arguments = inputs(ours.config)
    with torch.no_grad():
        before = ours(*arguments)
        ours.set_attn_processor(getattr(attention_processor, processor)())
        assert relative(ours(*arguments), before) <= 2e-5


LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "self": ({"heads": 4, "head_dim": 8}, {"heads": 4, "dim_head": 8}),
    "cross": (
        {"heads": 2, "head_dim": 8, "context_dim": 20},
        {"heads": 2, "dim_head": 8, "cross_attention_dim": 20},
    ),
    "pixels": (
        {
            "heads": 2,
            "head_dim": 8,
            "bias": True,
            "groups": 4,
            "residual": True,
            "rescale_output_factor": 1.4,
        },
        {
            "heads": 2,
            "dim_head": 8,
            "bias": True,
            "norm_num_groups": 4,
            "residual_connection": True,
            "rescale_output_factor": 1.4,
        },
    ),
}


@pytest.mark.parametrize("processor", ["ours", "AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_layer(name: str, masked: bool, processor: str) -> None:
    generator = torch.Generator().manual_seed(2)
    mine, reference = LAYERS[name]
    theirs = attention_processor.Attention(32, **reference)
    ours = Attention(32, **mine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    if processor != "ours":
        ours.set_processor(getattr(attention_processor, processor)())
    context = None
    if ours.is_cross_attention:
        context = torch.randn(2, 5, ours.cross_attention_dim, generator=generator)
    x = torch.randn(2, 16, 32, generator=generator)
    if name == "pixels":
        x = x.transpose(1, 2).unflatten(2, (4, 4)).contiguous()
    mask = None
    if masked:
        kept = torch.rand(2, 1, 16 if context is None else 5, generator=generator) > 0.4
        mask = (~kept).float() * -10000.0
    with torch.no_grad():
        assert relative(ours(x, context, mask), theirs(x, context, mask)) <= 2e-5


def test_medium_network() -> None:
    ours, theirs = build(MEDIUM)
    assert 25e6 < sum(parameter.numel() for parameter in ours.parameters()) < 45e6
    x, t, labels = inputs(ours.config, size=32)
    with torch.no_grad():
        expected = theirs(x, t, labels).sample
        assert relative(ours(x, t, labels), expected) <= 1e-5
        ours = ours.to(memory_format=torch.channels_last)
        assert relative(ours(x.to(memory_format=torch.channels_last), t, labels), expected) <= 1e-5
