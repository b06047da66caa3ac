"""Bits per dimension of a model: batches do not matter, each picture has its own noise, both ways agree on what they
measure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.diffusion.guidance import clip_x0, unguided
from sfumato.diffusion.likelihood import bound, chain
from sfumato.errors import UserError
from sfumato.evaluation.bpd import measure_bound, measure_flow
from sfumato.random import NoiseSource, derived_seed
from sfumato.systems.ddpm import DDPM

from ..tiny import model_config, tiny_model


def pictures(n: int = 5) -> Tensor:
    return torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> DDPM:
    opened = tiny_model()
    opened.denoiser.network.eval()
    return opened


def test_the_bound_is_the_core_s(model: DDPM) -> None:
    found = measure_bound(model, pictures(2), ["cat", None], steps="6", seed=3)
    seeds = [derived_seed("bits per dimension", 3, i) for i in range(2)]
    denoise = clip_x0(unguided(model.denoiser, model.condition(["cat", None])))
    levels = chain(model.denoiser.schedule, "6")
    with torch.no_grad():
        wanted = bound(denoise, pictures(2) / 127.5 - 1, levels, NoiseSource(seeds, model.shape))
    assert torch.allclose(found.per_picture, wanted.total.double(), rtol=1e-6)
    assert found.total == pytest.approx(float(wanted.total.mean()), rel=1e-6)
    assert found.prior == pytest.approx(float(wanted.prior.mean()), rel=1e-6)
    assert found.decoder == pytest.approx(float(wanted.terms[:, -1].mean()), rel=1e-6)
    assert found.terms is not None and found.times is not None and found.x0_mse is not None
    assert torch.allclose(found.terms, wanted.terms.double().mean(0), rtol=1e-5, atol=1e-9)
    assert found.times.tolist() == [float(level.t) for level in levels[:-1]]
    assert (found.count, found.dims, found.evaluations) == (2, 192, 6)


@pytest.mark.parametrize("measure", [measure_bound, measure_flow])
def test_batches_change_nothing(model: DDPM, measure: Any) -> None:
    told: list[tuple[int, int]] = []
    steps: Any = "4" if measure is measure_bound else 3
    together = measure(model, pictures(), steps=steps, batch=8)
    parts = measure(model, pictures(), steps=steps, batch=2, on_batch=lambda *done: told.append(done))
    assert torch.allclose(together.per_picture, parts.per_picture, rtol=1e-4)
    assert together.deviation == pytest.approx(parts.deviation, rel=1e-3)
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert together.evaluations == parts.evaluations == (4 if measure is measure_bound else 19)
    other = measure(model, pictures(), steps=steps, seed=1)
    assert not torch.allclose(other.per_picture, together.per_picture, rtol=1e-6)


def test_the_deviation_is_that_of_the_mean(model: DDPM) -> None:
    found = measure_bound(model, pictures(12), steps="2")
    assert found.deviation == pytest.approx(float(found.per_picture.std(correction=0)) / math.sqrt(12), rel=0.15)
    assert measure_bound(model, pictures(1), steps="2").deviation is None


def test_clipping_and_variance_are_choices(model: DDPM) -> None:
    totals = [
        measure_bound(model, pictures(2), steps="5", **options).total
        for options in ({}, {"clip": False}, {"variance": "large"}, {"variance": "small"})  # type: ignore[arg-type]
    ]
    assert totals[0] == totals[3] and len({*totals}) == 3
    with pytest.raises(UserError, match="has no learned variance"):
        measure_bound(model, pictures(2), steps="5", variance="learned")


def test_a_learned_variance_is_used_where_there_is_one() -> None:
    config = model_config().model_copy(
        update={"prediction": model_config().prediction.model_copy(update={"learned_variance": True})}
    )
    model = DDPM.create(config)
    own, learned, small = (
        measure_bound(model, pictures(2), steps="5", **options).total
        for options in ({}, {"variance": "learned"}, {"variance": "small"})  # type: ignore[arg-type]
    )
    assert own == learned != small
    assert math.isfinite(measure_flow(model, pictures(2), steps=2).total)


def test_a_self_conditioned_model_sees_its_own_estimate() -> None:
    config = model_config().model_copy(
        update={"prediction": model_config().prediction.model_copy(update={"self_condition": True})}
    )
    found = measure_bound(DDPM.create(config), pictures(2), steps="3")
    assert found.evaluations == 6 and math.isfinite(found.total)


class Exact(nn.Module):
    """The noise of pictures that are themselves normal of deviation 1 / 2, on a variance-preserving path."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule, self.unused = schedule, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        level = self.schedule.level(t.double()).like(x)
        return x * level.sigma / (level.alpha**2 / 4 + level.sigma**2)


def test_both_ways_measure_the_same() -> None:
    """On data of which the model knows all: the flow is at the entropy, the bound above it by what its steps cost."""
    model = tiny_model()
    model.denoiser.network = Exact(model.denoiser.schedule)
    values = 0.5 * torch.randn((40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    data = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    flow = measure_flow(model, data, tolerance=1e-4)
    entropy = 0.5 * math.log2(2 * math.pi * math.e / 4) + math.log2(127.5)
    assert flow.deviation is not None
    assert abs(flow.total - entropy) < 4 * flow.deviation + 0.06  # clamped values are likelier than the tails
    tighter = measure_bound(model, data, batch=40)
    assert flow.total < tighter.total < flow.total + 1


def test_what_cannot_be_measured_is_refused(model: DDPM) -> None:
    for wrong in (pictures(2).float(), pictures(2)[:, :1], pictures(0)):
        with pytest.raises(UserError, match="need 8-bit pictures"):
            measure_bound(model, wrong)
    with pytest.raises(UserError, match="1 labels for 2 pictures"):
        measure_bound(model, pictures(2), ["cat"])
    with pytest.raises(UserError, match="batch must be at least 1"):
        measure_flow(model, pictures(2), batch=0)
    broken = tiny_model()
    with torch.no_grad():
        next(iter(broken.denoiser.network.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match="of 2 of 2 pictures are not finite"):
        measure_bound(broken, pictures(2), steps="3")


def test_results_are_values(model: DDPM) -> None:
    found = measure_bound(model, pictures(2), steps="2")
    assert replace(found, total=1.0).total == 1.0
