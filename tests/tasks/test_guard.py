"""The guard: half precision that overflows goes on in float32, broken weights are an error, the rest is left alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.codecs import KLCodec, Moments
from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import trailing
from sfumato.diffusion.guidance import DenoiseFn, clip_x0, unguided
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
from sfumato.diffusion.solvers import Euler
from sfumato.images import PictureError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.random import NoiseSource
from sfumato.tasks.guard import decoded, encoded, guarded, narrower, texts

SCHEDULE = TableSchedule(linear_alpha_bar())
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


class Overflowing(nn.Module):
    """`x / 2`, by way of a number that float16 does not hold; from the `after`th call on."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 7e3))
        self.register_buffer("unused", torch.zeros(1, dtype=torch.int64))
        self.after, self.calls = after, 0

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x / 2 if self.calls <= self.after else x * self.weight * 100 / 14e5


def made(after: int = 0) -> tuple[Denoiser, Overflowing]:
    network = Overflowing(after)
    return Denoiser(network, SCHEDULE), network


def drawn(denoise: DenoiseFn) -> Tensor:
    noise = NoiseSource([0, 1], (3, 4, 4))
    return sample(denoise, Euler(), noise.draw(), trailing(SCHEDULE, 5), SCHEDULE, noise=noise)


def test_where_all_is_well_nothing_is_touched() -> None:
    denoiser, network = made(after=100)
    network.half()
    said: list[str] = []
    results: list[Prediction] = []

    def remembered(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        results.append(unguided(denoiser)(x_t, level, previous_x0))
        return results[-1]

    watched = guarded(remembered, [network], said.append)
    level = SCHEDULE.level(500)
    assert watched(torch.ones(1, 3, 2, 2), level, None) is results[0]
    assert network.calls == 1 and said == [] and network.weight.dtype == torch.float16


def test_an_overflow_goes_on_in_float32() -> None:
    denoiser, network = made()
    with torch.no_grad():
        expected = drawn(unguided(denoiser))
        network.half()
        assert not bool(drawn(unguided(denoiser)).isfinite().all())
        said: list[str] = []
        network.calls = 0
        got = drawn(guarded(unguided(denoiser), [network], said.append))
    assert torch.equal(got, expected)
    assert said == [
        "the network gave values that are not finite in float16 in evaluation 1 (t = 999); it goes on in float32"
    ]
    assert network.weight.dtype == torch.float32 and network.calls == 6
    assert network.unused.dtype == torch.int64


def test_an_overflow_on_the_way() -> None:
    """What was drawn before it stays; the sentence names the evaluation."""
    denoiser, network = made(after=3)
    network.half()
    said: list[str] = []
    got = drawn(guarded(unguided(denoiser), [network], said.append))
    assert bool(got.isfinite().all())
    assert len(said) == 1 and "in evaluation 4 (t = 399)" in said[0]


def test_a_clamp_does_not_hide_an_infinity() -> None:
    denoiser, network = made()
    network.half()
    said: list[str] = []
    drawn(guarded(clip_x0(unguided(denoiser)), [network], said.append))
    assert len(said) == 1


@HALF
def test_what_is_broken_in_float32_too_is_an_error(dtype: torch.dtype) -> None:
    denoiser, network = made()
    with torch.no_grad():
        network.weight.fill_(float("inf"))
    network.to(dtype)
    said: list[str] = []
    message = re.escape("finite in float32 in evaluation 1 (t = 999): its weight 'weight' has such values itself")
    with pytest.raises(PictureError, match=message):
        drawn(guarded(unguided(denoiser), [network], said.append))
    assert len(said) == 1 and str(dtype).removeprefix("torch.") in said[0]


def test_weights_narrowed_too_far_are_named() -> None:
    """7e4 is an infinity in float16 already, which no wider type brings back."""
    network = nn.Linear(2, 2, bias=False)
    nn.init.constant_(network.weight, 7e4)
    network.half()
    with pytest.raises(PictureError, match="its weight 'weight' has such values itself, so the file is damaged or was"):
        decoded(lambda: network(torch.ones(1, 2, dtype=network.weight.dtype)), network, lambda sentence: None)


def test_float32_is_not_tried_twice() -> None:
    denoiser, network = made()
    broken = torch.full((1, 3, 2, 2), float("nan"))
    with pytest.raises(PictureError, match=r"not finite in float32 in evaluation 1 \(t = 500\)$"):
        guarded(unguided(denoiser), [network], pytest.fail)(broken, SCHEDULE.level(500), None)
    assert network.calls == 1


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_a_sum_that_overflows_is_no_alarm(value: float) -> None:
    result = torch.full((4, 4), value)
    assert not bool(result.sum().isfinite())
    assert decoded(lambda: result, None, pytest.fail) is result
    half = torch.full((64, 64), 6e4, dtype=torch.float16)
    assert decoded(lambda: half, None, pytest.fail) is half


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 63])
def test_a_single_value_is_found(bad: float, place: int) -> None:
    result = torch.linspace(-1, 1, 64)
    result[place] = bad
    with pytest.raises(PictureError, match="the codec's decoder gave values that are not finite in float32$"):
        decoded(lambda: result, None, pytest.fail)


def test_levels_of_their_own() -> None:
    denoiser, network = made()
    network.half()
    said: list[str] = []
    each = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in ([7.0, 9.0], [0.8, 0.6], [0.6, 0.8])))
    guarded(unguided(denoiser), [network], said.append)(torch.ones(2, 3, 2, 2), each, None)
    assert len(said) == 1 and "(t = 7)" in said[0]


# --- other stages -------------------------------------------------------------------------------------------------


def codec() -> KLCodec:
    values: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 2, "scaling_factor": 1.0,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KLCodec(AutoencoderKL(AutoencoderConfig(**values)).eval())


@torch.no_grad()
def test_the_decoder_and_the_encoder() -> None:
    """A first convolution too strong for float16, whose strength the norms behind it take away."""
    own = codec()
    for conv in (own.network.decoder.conv_in, own.network.encoder.conv_in):
        conv.weight.fill_(3e4)
    latents, pictures = torch.full((1, 2, 8, 8), 2.0), torch.full((1, 3, 8, 8), 0.9)
    latents[..., 4:], pictures[..., 4:] = -1, -0.5
    own.network.half()
    expected = KLCodec(codec().network)
    expected.network.load_state_dict(own.network.state_dict())
    said: list[str] = []

    def ours(x: Tensor) -> Tensor:
        return x.to(next(own.network.parameters()).dtype)

    found = decoded(lambda: own.decode(ours(latents)), own.network, said.append)
    torch.testing.assert_close(found, expected.decode(latents))
    own.network.half()
    moments: Moments = encoded(lambda: own.encode(ours(pictures)), own.network, said.append)
    torch.testing.assert_close(moments.mean, expected.encode(pictures).mean)
    assert [sentence.partition(" gave")[0] for sentence in said] == ["the codec's decoder", "the codec's encoder"]


def test_all_parts_of_conditions_are_looked_at() -> None:
    network = nn.Linear(2, 2).bfloat16()
    good, bad = torch.ones(1, 2), torch.tensor([[1.0, float("nan")]])
    words = torch.ones(1, 3, 2)
    for broken in (
        Condition(vector=bad), Condition(context=words, residuals=(good, bad)), Condition(adapters={"image": bad}),
    ):  # fmt: skip
        results = iter([(Condition(vector=good), broken), (Condition(vector=good), Condition(labels=torch.ones(1)))])
        said: list[str] = []
        network.bfloat16()
        texts(lambda: next(results), network, said.append)  # noqa: B023
        assert said == ["the text encoder gave values that are not finite in bfloat16; it goes on in float32"]
        assert network.weight.dtype == torch.float32


def test_the_narrowest_type_is_told() -> None:
    assert narrower(nn.Linear(2, 2)) is None and narrower(nn.Linear(2, 2).double()) is None
    assert narrower(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())) == torch.float16
    assert narrower(nn.Identity()) is None
