"""Schedules and grids against diffusers, which accumulates its tables in float32."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from sfumato.diffusion.grid import Grid, karras, leading, linspace, trailing
from sfumato.diffusion.schedule import (
    TableSchedule,
    cosine_alpha_bar,
    linear_alpha_bar,
    rescale_zero_terminal_snr,
    scaled_linear_alpha_bar,
    sigmoid_alpha_bar,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "linear": (linear_alpha_bar(), {"beta_schedule": "linear"}),
    "linear, other ends": (
        linear_alpha_bar(500, 1e-3, 0.03),
        {"num_train_timesteps": 500, "beta_start": 1e-3, "beta_end": 0.03},
    ),
    "scaled_linear": (scaled_linear_alpha_bar(), SD),
    "squaredcos_cap_v2": (cosine_alpha_bar(), {"beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_alpha_bar(name: str) -> None:
    ours, options = TABLES[name]
    theirs = DDPMScheduler(**options).alphas_cumprod.double()
    assert float((ours - theirs).abs().max()) <= 1e-6
    assert float((ours / theirs - 1).abs()[:-1].max()) <= 2e-4  # float32 products, cosine's tail is of order 1e-9


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr(name: str) -> None:
    ours, options = TABLES[name]
    theirs = DDPMScheduler(**options, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert float((rescale_zero_terminal_snr(ours) - theirs).abs().max()) <= 1e-6
    assert float(theirs[-1]) == 0


def test_diffusers_sigmoid_is_another_schedule() -> None:
    """There the betas follow a sigmoid, here (and in Jabri 2022) alpha_bar does: the two share a name only.

    Ours is checked against its closed form and golden betas in `tests/diffusion/test_schedule.py`.
    """
    theirs = DDPMScheduler(beta_schedule="sigmoid").alphas_cumprod.double()
    assert float((sigmoid_alpha_bar() - theirs).abs().max()) > 0.1


SPACINGS: dict[str, Callable[[TableSchedule, int], Grid]] = {
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
}


def exact_times(name: str, steps: int) -> list[Fraction]:
    """The times before rounding, in exact arithmetic."""
    if name == "linspace":
        return [Fraction(999 * (steps - 1 - k), steps - 1) for k in range(steps)]
    if name == "trailing":
        return [1000 - Fraction(1000 * k, steps) - 1 for k in range(steps)]
    return [Fraction(k * (1000 // steps)) for k in range(steps - 1, -1, -1)]


@pytest.mark.parametrize("name", SPACINGS)
def test_whole_times_of_every_length(name: str) -> None:
    """2 to 129 steps and some more. Where the two part, by name:

    "One step": their linspace of a single step starts at the clean end (t = 0), ours at the noisy one.
    "Drifting halves": theirs count in floats, so that an exact half may round either way (trailing 48: 936, not 937;
    linspace 103: 833, not 832). "One too many": for the same reason trailing 61 gives 62 times.
    """
    schedule, scheduler = TableSchedule(linear_alpha_bar()), DDIMScheduler(timestep_spacing=name)
    parted = set()
    for steps in [*range(2, 130), 200, 250, 333, 400, 500, 666, 750, 999, 1000]:
        scheduler.set_timesteps(steps)
        ours, theirs = [int(level.t) for level in SPACINGS[name](schedule, steps)[:-1]], scheduler.timesteps.tolist()
        if len(theirs) == steps + 1:
            parted.add(steps)
            theirs.pop()
        for exact, a, b in zip(exact_times(name, steps), ours, theirs, strict=True):
            half = exact.denominator == 2
            assert abs(a - exact) <= Fraction(1, 2)
            assert a == b or (half and abs(a - b) == 1), steps
            parted |= {steps} if a != b else set()
    assert parted == {"leading": set(), "linspace": {103}, "trailing": {48, 61, 96, 103, 112, 121, 122}}[name]


def test_leading_with_an_offset() -> None:
    schedule, scheduler = TableSchedule(scaled_linear_alpha_bar()), DDIMScheduler(**SD, steps_offset=1)
    for steps in (4, 10, 30, 50):
        scheduler.set_timesteps(steps)
        assert [int(level.t) for level in leading(schedule, steps, offset=1)[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("steps", [7, 10, 30])
@pytest.mark.parametrize("kind", ["linspace", "leading", "trailing", "karras"])
def test_ratios_of_the_sigma_schedulers(scheduler: Any, kind: str, steps: int) -> None:
    """What they call sigma is our nsr. "Fractional t": their linspace is not rounded and interpolates nsr linearly.

    Karras' levels are the same; the time that the network is told is found in log nsr on both sides.
    """
    table = scaled_linear_alpha_bar()
    make, schedule = {
        "linspace": (partial(linspace, round_t=False), TableSchedule(table, interpolation="linear")),
        "leading": (leading, TableSchedule(table)),
        "trailing": (trailing, TableSchedule(table)),
        "karras": (karras, TableSchedule(table)),
    }[kind]
    options = {"use_karras_sigmas": True} if kind == "karras" else {"timestep_spacing": kind}
    theirs = scheduler(**SD, **options)
    theirs.set_timesteps(steps)
    once = 2 if scheduler is HeunDiscreteScheduler else 1  # Heun lists inner levels twice
    sigmas = torch.cat([theirs.sigmas[:1], theirs.sigmas[1:-1][::once], theirs.sigmas[-1:]]).double()
    times = torch.cat([theirs.timesteps[:1], theirs.timesteps[1:][::once]]).double()
    ours = make(schedule, steps)
    assert torch.allclose(torch.stack([level.nsr for level in ours]), sigmas, rtol=1e-5, atol=1e-7)
    assert torch.allclose(torch.stack([level.t for level in ours[:-1]]), times, rtol=0, atol=2e-3)
