"""Properties of the pixel UNet that hold without any reference to compare with."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import Attention, AttnProcessor, attention_kernel, sdpa, set_attention_kernel
from sfumato.networks.embeddings import sinusoidal
from sfumato.networks.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel, init_zero_outputs

TINY = UNet2DConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
ADM = dataclasses.replace(
    TINY,
    block_out_channels=(16, 16, 32),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=4,
)


@pytest.fixture
def kernel() -> Iterator[None]:
    previous = attention_kernel()
    yield
    set_attention_kernel(previous)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config: UNet2DConfig) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(config).eval()


def arguments(config: UNet2DConfig, size: int = 8) -> tuple[Tensor, ...]:
    x, t = noise(2, config.in_channels, size, size), torch.tensor([1, 900])
    return (x, t, torch.tensor([0, 3])) if config.num_class_embeds else (x, t)


class Recorder(nn.Module):
    """Counts its calls and attends as the default processor does."""

    def __init__(self) -> None:
        super().__init__()
        self.default = AttnProcessor()
        self.calls = 0

    def forward(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.default(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("config", [TINY, ADM, dataclasses.replace(TINY, out_channels=6, in_channels=4)])
@pytest.mark.parametrize("size", [(8, 8), (4, 16)])
def test_output_shape(config: UNet2DConfig, size: tuple[int, int]) -> None:
    network = build(config)
    _, t, *labels = arguments(config)
    out = network(noise(2, config.in_channels, *size), t, *labels)
    assert out.shape == (2, config.out_channels, *size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("config", [TINY, ADM])
def test_pictures_do_not_see_each_other(config: UNet2DConfig) -> None:
    network = build(config)
    batch = arguments(config)
    with torch.no_grad():
        together = network(*batch)
        for i in range(2):
            alone = network(*(argument[i : i + 1] for argument in batch))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, ADM])
def test_channels_last_gives_the_same_values_and_stays_channels_last(config: UNet2DConfig) -> None:
    network = build(config)
    x, *rest = arguments(config)
    with torch.no_grad():
        expected = network(x, *rest)
        assert expected.is_contiguous()
        network = network.to(memory_format=torch.channels_last)
        out = network(x.to(memory_format=torch.channels_last), *rest)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_time_and_labels_matter() -> None:
    network = build(ADM)
    x, t, labels = arguments(ADM)
    with torch.no_grad():
        out = network(x, t, labels)
        assert not torch.equal(out, network(x, t + 50, labels))
        assert not torch.equal(out, network(x, t, labels.flip(0)))


def test_registration_order_is_down_up_mid() -> None:
    network = build(TINY)
    names = list(dict.fromkeys(key.split(".")[0] for key in network.state_dict()))
    assert names == [
        "conv_in",
        "time_embedding",
        "down_blocks",
        "up_blocks",
        "mid_block",
        "conv_norm_out",
        "conv_out",
    ]
    assert list(network.attn_processors) == [
        "down_blocks.1.attentions.0.processor",
        "up_blocks.0.attentions.0.processor",
        "up_blocks.0.attentions.1.processor",
        "mid_block.attentions.0.processor",
    ]
    assert list(build(ADM).state_dict()).index("class_embedding.weight") == 6


def test_processors_are_set_called_and_restored_bit_for_bit() -> None:
    network = build(ADM)
    batch = arguments(ADM)
    keys, processors = list(network.state_dict()), network.attn_processors
    with torch.no_grad():
        before = network(*batch)
        recorder = Recorder()
        network.set_attn_processor(recorder)
        assert torch.equal(network(*batch), before)
        assert recorder.calls == len(processors)
        network.set_attn_processor({name: lambda attn, h, *_, **__: h for name in processors})
        assert not torch.equal(network(*batch), before)
        network.set_attn_processor(processors)
        assert torch.equal(network(*batch), before)
        assert network.attn_processors == processors
        network.set_attn_processor(Recorder())
        network.set_default_attn_processor()
        assert all(isinstance(one, AttnProcessor) for one in network.attn_processors.values())
        assert torch.equal(network(*batch), before)
    assert list(network.state_dict()) == keys


def test_a_processor_gets_only_keywords_it_names() -> None:
    seen: dict[str, Any] = {}

    def processor(
        attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, tokens=None
    ):
        seen["tokens"] = tokens
        return hidden_states

    layer = Attention(8, heads=1, head_dim=8)
    layer.set_processor(processor)
    layer(noise(1, 3, 8), tokens="t", temb="unused")
    assert seen == {"tokens": "t"}


def test_wrong_processor_sets_are_refused_and_change_nothing() -> None:
    network = build(TINY)
    processors = network.attn_processors
    name = next(iter(processors))
    with pytest.raises(UserError, match="expected exactly the 4 names .*is missing"):
        network.set_attn_processor({name: Recorder()})
    with pytest.raises(UserError, match=r"did you mean 'mid_block\.attentions\.0\.processor'"):
        network.set_attn_processor({**processors, "mid_block.attention.0.processor": Recorder()})
    with pytest.raises(UserError, match="must be callable"):
        network.set_attn_processor({**processors, name: 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"not the class: Recorder\(\)"):
        network.set_attn_processor(Recorder)
    assert network.attn_processors == processors


@pytest.mark.usefixtures("kernel")
def test_another_kernel_is_used_by_every_layer() -> None:
    network = build(TINY)
    batch = arguments(TINY)
    calls = []

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append(tuple(q.shape))
        return sdpa(q, k, v, mask, scale)

    with torch.no_grad():
        expected = network(*batch)
        assert set_attention_kernel(counting) is sdpa
        assert torch.equal(network(*batch), expected)
    assert calls == [(2, 4, 16, 8)] * 4


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5), (2, 16, 5)])
def test_masked_tokens_are_not_attended_to(shape: tuple[int, ...]) -> None:
    layer = Attention(8, context_dim=6, heads=2, head_dim=4)
    x, context = noise(2, 16, 8), noise(2, 5, 6, seed=1)
    kept = torch.ones(shape, dtype=torch.bool)
    kept[..., 3:] = False
    expected = layer(x, context[:, :3])
    torch.testing.assert_close(layer(x, context, kept), expected)
    torch.testing.assert_close(layer(x, context, (~kept).float() * -1e4), expected)
    query, key, value = (
        layer.head_to_batch_dim(p) for p in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    mask = layer.prepare_attention_mask(kept, 5, 2)
    scores = layer.get_attention_scores(query, key, mask if mask.ndim == 3 else mask[:, None])
    torch.testing.assert_close(layer.to_out[0](layer.batch_to_head_dim(scores @ value)), expected)


def test_config_round_trip() -> None:
    for config in (UNet2DConfig(), TINY, dataclasses.replace(ADM, sample_size=(8, 16), mid_block_type=None)):
        stored = json.loads(json.dumps(config.to_dict()))
        assert stored == config.to_dict()
        assert (
            UNet2DConfig.from_dict({"_class_name": "UNet2DModel", "_diffusers_version": "0", **stored})
            == config
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_per_block": 2},
            "unknown network key 'layer_per_block' .did you mean 'layers_per_block'",
        ),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlok2D"]}, "did you mean 'AttnDownBlock2D'"),
        (
            {"up_block_types": ["UpBlok2D", "UpBlock2D"]},
            "unknown entry in up_block_types 'UpBlok2D' .did you mean 'UpBlock2D'",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "must have equally many levels, got 2, 2 and 1"),
        ({"mid_block_type": "UNetMidBlock"}, "did you mean 'UNetMidBlock2D'"),
        ({"time_embedding_type": "fourrier"}, "did you mean 'fourier'"),
        ({"time_embedding_type": "learned"}, "needs num_train_timesteps"),
        ({"resnet_time_scale_shift": "scale-shift"}, "did you mean 'scale_shift'"),
        ({"downsample_type": "convolution"}, "unknown downsample_type 'convolution'"),
        ({"act_fn": "sillu"}, "unknown act_fn 'sillu' .did you mean 'silu'"),
        ({"class_embed_type": "timesteps"}, "did you mean 'timestep'"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "num_class_embeds must be None"),
        ({"block_out_channels": [16, 30]}, "30 is not a multiple of norm_num_groups 8"),
        ({"attn_norm_num_groups": 5}, "32 is not a multiple of attn_norm_num_groups 5"),
        ({"layers_per_block": 0}, "layers_per_block must be 1 or more"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet2DConfig.from_dict({**TINY.to_dict(), **change})


def test_a_head_wider_than_its_block_is_refused() -> None:
    with pytest.raises(UserError, match="attention over 32 channels with heads of width 64 has no head"):
        UNet2DModel(dataclasses.replace(TINY, attention_head_dim=64))


def test_inputs_that_do_not_fit_are_refused() -> None:
    plain, conditional = build(TINY), build(ADM)
    x, t, labels = arguments(ADM)
    with pytest.raises(UserError, match="class-conditional: it needs labels"):
        conditional(x, t)
    with pytest.raises(UserError, match="not class-conditional"):
        plain(x, t, labels)
    with pytest.raises(UserError, match=r"labels must lie in 0 to 3, got 0 to 4"):
        conditional(x, t, torch.tensor([0, 4]))
    with pytest.raises(UserError, match=r"labels must be one per picture \(2\), got \(1,\)"):
        conditional(x, t, labels[:1])
    with pytest.raises(UserError, match="multiples of 4, got 8 x 6"):
        conditional(x[..., :6], t, labels)
    with pytest.raises(UserError, match=r"x must be \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        plain(x[:, :1], t)
    with pytest.raises(UserError, match=r"t must be \(\) or \(2,\), got \(3,\)"):
        plain(x, torch.zeros(3))


@pytest.mark.parametrize("config", [TINY, ADM])
def test_gradient_checkpointing_changes_no_gradient(config: UNet2DConfig) -> None:
    network = build(config).train()
    other = copy.deepcopy(network)
    other.enable_gradient_checkpointing()
    batch = arguments(config)
    for one in (network, other):
        one(*batch).square().mean().backward()
    for (key, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key


@pytest.mark.parametrize("config", [TINY, ADM])
def test_zeroed_outputs_start_at_zero_and_can_be_trained(config: UNet2DConfig) -> None:
    network = build(config).train()
    init_zero_outputs(network)
    batch = arguments(config)
    out = network(*batch)
    assert torch.count_nonzero(out) == 0
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = (network(*batch) - batch[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.count_nonzero(network.mid_block.resnets[0].conv2.weight) > 0


def test_half_precision_runs() -> None:
    network = build(TINY).to(torch.bfloat16)
    x, t = arguments(TINY)
    assert network(x.to(torch.bfloat16), t).dtype == torch.bfloat16


def test_sinusoids_layout() -> None:
    t = torch.tensor([0.0, 2.5])
    sin_first = sinusoidal(t, 9, flip_sin_to_cos=False)
    cos_first = sinusoidal(t, 9, flip_sin_to_cos=True)
    assert torch.equal(sin_first[:, :4], cos_first[:, 4:8])
    assert torch.equal(sin_first[:, 8], torch.zeros(2))
    torch.testing.assert_close(sin_first[1, 0], torch.tensor(2.5).sin())
    shifted = sinusoidal(t, 8, flip_sin_to_cos=False, freq_shift=1)
    torch.testing.assert_close(shifted[1, 3], (t[1] / 1e4).sin())


@pytest.mark.usefixtures("kernel")
def test_kernels_by_name() -> None:
    network = build(TINY)
    batch = arguments(TINY)
    with torch.no_grad():
        expected = network(*batch)
        set_attention_kernel("math")
        torch.testing.assert_close(network(*batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="unknown attention kernel 'sdp' .did you mean 'sdpa'"):
        set_attention_kernel("sdp")


def test_a_conditioned_block_refuses_no_embedding() -> None:
    with pytest.raises(UserError, match="conditioned on a time embedding"):
        ResnetBlock2D(8, 8, 6, groups=4)(noise(1, 8, 4, 4))


def test_unconditioned_block_and_resamplers() -> None:
    block = ResnetBlock2D(8, 4, None, groups=4)
    assert block(noise(1, 8, 4, 4)).shape == (1, 4, 4, 4)
    assert not any("time_emb_proj" in key for key in block.state_dict())
    assert Upsample2D(8)(noise(1, 8, 4, 4), (7, 9)).shape == (1, 8, 7, 9)
    assert Upsample2D(8, use_conv=False)(noise(1, 8, 4, 4)).shape == (1, 8, 8, 8)
    assert Downsample2D(8, padding=0)(noise(1, 8, 6, 4)).shape == (1, 8, 3, 2)
    assert Downsample2D(8, use_conv=False)(noise(1, 8, 6, 4)).shape == (1, 8, 3, 2)
