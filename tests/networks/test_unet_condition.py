"""Properties of the conditional UNet that hold without any reference to compare with."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
from sfumato.errors import UserError
from sfumato.networks.transformer import Attended, Transformer2DModel
from sfumato.networks.unet_2d import init_zero_outputs
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel

TINY = UNet2DConditionConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=4,
)
PLAIN = dataclasses.replace(
    TINY,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    mid_block_type="UNetMidBlock2D",
)
CLASSES = dataclasses.replace(TINY, num_class_embeds=4)
UNCLIP = dataclasses.replace(TINY, class_embed_type="projection", projection_class_embeddings_input_dim=6)
GUIDED = dataclasses.replace(TINY, time_cond_proj_dim=8)
SDXL = dataclasses.replace(
    TINY,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 + 2 * 8,
    use_linear_projection=True,
    transformer_layers_per_block=(2, 1),
)

SD1: dict[str, Any] = {"cross_attention_dim": 768}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
XL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER: dict[str, Any] = {
    **XL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UNCLIP_H: dict[str, Any] = {
    **SD2,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2048,
}
IMAGENET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [192, 384, 576, 960],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "attention_head_dim": 1,
    "cross_attention_dim": 512,
}
PUBLISHED: list[tuple[dict[str, Any], int, int]] = [
    (SD1, 686, 859_520_964),
    ({**SD1, "in_channels": 9}, 686, 859_535_364),
    (SD2, 686, 865_910_724),
    (UNCLIP_H, 690, 870_173_124),
    (XL, 1680, 2_567_463_684),
    (REFINER, 1220, 2_259_526_660),
    (IMAGENET, 688, 400_920_579),
    ({"cross_attention_dim": 1280}, 686, 872_300_484),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config: UNet2DConditionConfig) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(config).eval()


def slots(network: UNet2DConditionModel) -> dict[str, Tensor]:
    c, given = network.config, {}
    if c.context_dim is not None:
        given["context"] = noise(2, 5, c.context_dim, seed=1)
    if c.num_class_embeds is not None:
        given["labels"] = torch.tensor([0, 3])
    if c.projection_class_embeddings_input_dim is not None:
        given["vector"] = noise(2, c.projection_class_embeddings_input_dim, seed=2)
    if c.time_cond_proj_dim is not None:
        given["guidance"] = torch.tensor([1.0, 7.5])
    return given


def arguments(network: UNet2DConditionModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return noise(2, network.config.in_channels, 8, 8), torch.tensor([1, 900]), slots(network)


@pytest.mark.parametrize(
    ("values", "keys", "parameters"),
    PUBLISHED,
    ids=["sd1", "sd1-inpainting", "sd2", "unclip-h", "sdxl", "sdxl-refiner", "ldm-cin256", "ldm-txt2img"],
)
def test_the_published_networks_have_their_tensors(values: dict[str, Any], keys: int, parameters: int) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(UNet2DConditionConfig.from_dict(values))
    state = network.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (keys, parameters)


@pytest.mark.parametrize("config", [TINY, PLAIN, CLASSES, UNCLIP, GUIDED, SDXL])
def test_pictures_do_not_see_each_other(config: UNet2DConditionConfig) -> None:
    network = build(config)
    x, t, given = arguments(network)
    with torch.no_grad():
        together = network(x, t, **given)
        assert together.shape == x.shape
        for i in range(2):
            alone = network(x[i : i + 1], t[i : i + 1], **{key: value[i : i + 1] for key, value in given.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CLASSES, UNCLIP, GUIDED, SDXL])
def test_every_slot_matters(config: UNet2DConditionConfig) -> None:
    network = build(config)
    x, t, given = arguments(network)
    with torch.no_grad():
        out = network(x, t, **given)
        assert not torch.equal(out, network(x, t + 50, **given))
        for name, value in given.items():
            assert not torch.equal(out, network(x, t, **{**given, name: value.flip(0)})), name


def test_a_context_mask_hides_tokens_in_every_block() -> None:
    for config in (TINY, SDXL, dataclasses.replace(TINY, only_cross_attention=True)):
        network = build(config)
        x, t, given = arguments(network)
        mask = torch.tensor([[True, True, True, False, False]] * 2)
        with torch.no_grad():
            masked = network(x, t, **given, context_mask=mask)
            cut = network(x, t, **{**given, "context": given["context"][:, :3]})
        torch.testing.assert_close(masked, cut, rtol=1e-5, atol=1e-5)


def test_a_text_of_masked_tokens_alone_is_a_number() -> None:
    network = build(TINY)
    x, t, given = arguments(network)
    out = network(x, t, **given, context_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("config", [TINY, PLAIN, SDXL])
def test_channels_last_gives_the_same_values_and_stays_channels_last(config: UNet2DConditionConfig) -> None:
    network = build(config)
    x, t, given = arguments(network)
    with torch.no_grad():
        expected = network(x, t, **given)
        assert expected.is_contiguous()
        out = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, **given)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_registration_order_is_down_up_mid() -> None:
    network = build(dataclasses.replace(CLASSES, encoder_hid_dim=7, encoder_hid_dim_type="text_proj"))
    names = list(dict.fromkeys(key.split(".")[0] for key in network.state_dict()))
    assert names == [
        "conv_in",
        "time_embedding",
        "encoder_hid_proj",
        "class_embedding",
        "down_blocks",
        "up_blocks",
        "mid_block",
        "conv_norm_out",
        "conv_out",
    ]


def test_a_denoiser_fills_the_slots() -> None:
    network = build(dataclasses.replace(CLASSES, in_channels=5))
    given = slots(network)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    denoiser = Denoiser(network, TableSchedule(linear_alpha_bar()))
    concat, x = noise(2, 1, 8, 8, seed=3), noise(2, 4, 8, 8)
    level = denoiser.schedule.level(300)
    with torch.no_grad():
        out = denoiser(x, level, Condition(**given, context_mask=mask, concat=concat)).out
        expected = network(torch.cat([x, concat], 1), torch.tensor(300.0), **given, context_mask=mask)
    assert torch.equal(out, expected)


def test_config_round_trip() -> None:
    nested = dataclasses.replace(
        TINY,
        layers_per_block=(2, 1),
        transformer_layers_per_block=((2, 1), 1),
        reverse_transformer_layers_per_block=(1, (1, 2, 1)),
        only_cross_attention=(True, False),
    )
    for config in (UNet2DConditionConfig(), TINY, SDXL, nested):
        stored = json.loads(json.dumps(config.to_dict()))
        assert stored == config.to_dict()
        noted = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0", **stored}
        assert UNet2DConditionConfig.from_dict(noted) == config


def test_num_attention_heads_has_the_last_word() -> None:
    by_other_name = dataclasses.replace(TINY, attention_head_dim=8, num_attention_heads=(2, 4))
    assert [m.heads for m in build(by_other_name).modules() if hasattr(m, "heads")] == [2] * 6 + [4] * 2
    assert by_other_name.heads == (2, 4)
    assert TINY.heads == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dims": 2}, "unknown network key 'cross_attention_dims' .did you mean 'cross_attention_dim'"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlok2D"]}, "did you mean 'DownBlock2D'"),
        (
            {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
            "unknown entry in down_block_types 'SimpleCrossAttnDownBlock2D'",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "must have equally many levels, got 2, 2 and 1"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "unknown mid_block_type"),
        ({"attention_head_dim": [4]}, r"attention_head_dim must be one value or one for each level, got \(4,\)"),
        ({"layers_per_block": [1, 0]}, "layers_per_block must be 1 or more"),
        ({"block_out_channels": [16, 30]}, "30 is not a multiple of norm_num_groups 8"),
        ({"norm_num_groups": None}, "not a multiple of norm_num_groups None"),
        ({"act_fn": "sillu"}, "did you mean 'silu'"),
        ({"class_embed_type": "projections"}, "did you mean 'projection'"),
        ({"resnet_time_scale_shift": "scale-shift"}, "did you mean 'scale_shift'"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "num_class_embeds must be None"),
        ({"class_embed_type": "projection"}, "'projection' needs projection_class_embeddings_input_dim"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
            "'text_time' needs projection_class_embeddings_input_dim",
        ),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
            "'text_time' needs addition_time_embed_dim",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "class_embed_type": "projection",
                "projection_class_embeddings_input_dim": 8,
            },
            "would both embed the one vector",
        ),
        ({"addition_embed_type": "text_image"}, "addition_embed_type 'text_image' is not supported"),
        ({"encoder_hid_dim": 4, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj' is not"),
        ({"encoder_hid_dim_type": "text_proj"}, "'text_proj' needs encoder_hid_dim"),
        ({"dual_cross_attention": True}, "dual_cross_attention True is not supported; it can be False"),
        ({"attention_type": "gated"}, "attention_type 'gated' is not supported; it can be 'default'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supported"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat True is not supported"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm 'layer_norm' is not supported"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act True is not supported"),
        ({"conv_in_kernel": 4}, "conv_in_kernel must be odd"),
        ({"cross_attention_dim": None}, "cross_attention_dim must be its width"),
        (
            {
                "cross_attention_dim": [12, 14],
                "down_block_types": ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2,
            },
            "all transformers attend to one context",
        ),
        ({"transformer_layers_per_block": [[1], 1]}, "needs reverse_transformer_layers_per_block"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet2DConditionConfig.from_dict({**TINY.to_dict(), **change})


def test_text_settings_without_a_text_are_refused() -> None:
    with pytest.raises(UserError, match="no block of this network takes one"):
        dataclasses.replace(PLAIN, encoder_hid_dim=4)
    with pytest.raises(UserError, match="16 channels cannot be split into 3 attention heads"):
        build(dataclasses.replace(TINY, attention_head_dim=3))
    short = dataclasses.replace(
        TINY, transformer_layers_per_block=((1,), 1), reverse_transformer_layers_per_block=(1, (1,))
    )
    with pytest.raises(UserError, match=r"a block of 2 layers has only the transformer depths \[1\]"):
        build(short)


def test_inputs_that_do_not_fit_are_refused() -> None:
    tiny, plain, classes, guided, unclip = (build(c) for c in (TINY, PLAIN, CLASSES, GUIDED, UNCLIP))
    x, t, given = arguments(classes)
    context, labels = given["context"], given["labels"]
    refused: list[tuple[UNet2DConditionModel, Tensor, dict[str, Any], str]] = [
        (tiny, x, {}, "this network needs context, got None"),
        (plain, x, {"context": context}, "this network takes no context"),
        (tiny, x, {"context": context[..., :7]}, r"context must be \(2, L, 12\), got \(2, 5, 7\)"),
        (tiny, x, {"context": context[:1]}, r"context must be \(2, L, 12\), got \(1, 5, 12\)"),
        (tiny, x, {"context": (context, [context])}, r"one tensor \(2, L, 12\), got tuple; .* goes into adapters"),
        (tiny, x, {"context": context.tolist()}, "one tensor .*, got list"),
        (tiny, x, {"context": context, "context_mask": [True]}, "context_mask must be bool"),
        (classes, x, {"context": context, "labels": 3}, r"labels must be one tensor \(2,\), got int$"),
        (tiny, x, {"context": context, "labels": labels}, "takes no labels"),
        (classes, x, {"context": context}, "needs labels"),
        (classes, x, {"context": context, "labels": labels[:1]}, r"labels must be \(2,\), got \(1,\)"),
        (classes, x, {"context": context, "labels": labels + 1}, "labels must lie in 0 to 3, got 1 to 4"),
        (guided, x, {"context": context}, "needs guidance"),
        (unclip, x, {"context": context, "vector": noise(2, 5)}, r"vector must be \(2, 6\), got \(2, 5\)"),
        (tiny, x, {"context": context, "vector": noise(2, 5)}, "takes no vector"),
        (tiny, x, {"context": context, "context_mask": torch.ones(2, 5)}, "context_mask must be bool"),
        (
            tiny,
            x,
            {"context": context, "context_mask": torch.ones(2, 4, dtype=torch.bool)},
            r"context_mask must be \(2, 5\), got \(2, 4\)",
        ),
        (tiny, x, {"context": context, "residuals": (x, x)}, "residuals must be 5 tensors of shapes"),
        (tiny, x[..., :7], {"context": context}, "multiples of 2, got 8 x 7"),
        (tiny, x[:, :3], {"context": context}, r"x must be \(B, 4, H, W\), got \(2, 3, 8, 8\)"),
    ]
    for network, picture, wrong, message in refused:
        with pytest.raises(UserError, match=message):
            network(picture, t, **wrong)
    with pytest.raises(UserError, match=r"t must be \(\) or \(2,\), got \(3,\)"):
        plain(x, torch.zeros(3))
    with pytest.raises(UserError, match="this network has no added embedding"):
        tiny.added_vector(noise(1, 4), noise(1, 6))


def test_added_vector_keeps_large_sizes_apart_in_half_precision() -> None:
    network = build(SDXL)
    sizes = torch.tensor([[1023.0, 1024.0]])
    vector = network.added_vector(noise(1, 6).bfloat16(), sizes)
    assert vector.dtype == torch.bfloat16
    assert not torch.equal(vector[:, 6:14], vector[:, 14:])


@pytest.mark.parametrize("config", [TINY, PLAIN, SDXL])
def test_gradient_checkpointing_changes_no_gradient(config: UNet2DConditionConfig) -> None:
    network = build(config).train()
    other = copy.deepcopy(network)
    other.enable_gradient_checkpointing()
    x, t, given = arguments(network)
    for one in (network, other):
        one(x, t, **given).square().mean().backward()
    for (key, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key


def test_zeroed_outputs_start_at_zero_and_leave_every_transformer_trainable() -> None:
    network = build(TINY).train()
    init_zero_outputs(network)
    x, t, given = arguments(network)
    assert torch.count_nonzero(network(x, t, **given)) == 0
    transformers = [module for module in network.modules() if isinstance(module, Transformer2DModel)]
    for module in transformers:
        hidden = noise(2, module.norm.num_channels, 4, 4)
        assert torch.equal(module(hidden, Attended(given["context"])), hidden)
        assert torch.count_nonzero(module.transformer_blocks[0].attn2.to_out[0].weight) > 0
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = (network(x, t, **given) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.count_nonzero(module.proj_out.weight) > 0 for module in transformers)


def test_half_precision_and_autocast() -> None:
    network = build(SDXL)
    x, t, given = arguments(network)
    with torch.no_grad():
        exact = network(x, t, **given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network(x, t, **given)
        network = network.to(torch.bfloat16)
        mask = torch.ones(2, 5, dtype=torch.bool)
        half = network(
            x.bfloat16(), t, **{key: value.bfloat16() for key, value in given.items()}, context_mask=mask
        )
    assert half.dtype == mixed.dtype == torch.bfloat16
    for out in (mixed, half):
        assert (out - exact).abs().max() < 0.05 * exact.abs().max()
