"""Grids against diffusers' schedulers: the levels they visit and the times that the network is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from sfumato.diffusion.grid import (
    Grid,
    beta_sigma,
    dpm_leading,
    dpm_linspace,
    exponential,
    karras,
    lcm,
    leading,
    linspace,
    tail,
    trailing,
)
from sfumato.diffusion.schedule import FlowSchedule, TableSchedule, scaled_linear_alpha_bar

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = TableSchedule(scaled_linear_alpha_bar())
DPM: dict[str, tuple[Callable[..., Grid], dict[str, Any]]] = {
    "linspace": (dpm_linspace, {"timestep_spacing": "linspace"}),
    "leading": (partial(dpm_leading, offset=1), {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": (trailing, {"timestep_spacing": "trailing"}),
    "karras": (partial(karras, round_t=True), {"use_karras_sigmas": True}),
    "exponential": (partial(exponential, round_t="down"), {"use_exponential_sigmas": True}),
    "beta": (partial(beta_sigma, round_t="down"), {"use_beta_sigmas": True}),
}
EULER: dict[str, tuple[Callable[..., Grid], dict[str, Any]]] = {
    "linspace": (partial(linspace, round_t=False, linear_nsr=True), {"timestep_spacing": "linspace"}),
    "leading": (partial(leading, offset=1), {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": (trailing, {"timestep_spacing": "trailing"}),
    "karras": (karras, {"use_karras_sigmas": True}),
    "exponential": (exponential, {"use_exponential_sigmas": True}),
    "beta": (beta_sigma, {"use_beta_sigmas": True}),
}


def check(levels: Grid, sigmas: torch.Tensor, told: torch.Tensor, *, cut: bool) -> None:
    """"Cut times": where theirs is cut to a whole number, one that is whole but for float32's error may be one less."""
    nsr = torch.stack([level.nsr for level in levels])
    assert torch.allclose(nsr, sigmas.double(), rtol=1e-4, atol=1e-7)
    apart = np.abs(np.array([float(level.t) for level in levels[:-1]]) - told.double().numpy())
    assert float(apart.max()) <= (1.0 if cut else 5e-3) and int((apart > 5e-3).sum()) <= cut


@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize("kind", DPM)
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_dpm_and_unipc(scheduler: Any, kind: str, steps: int) -> None:
    make, options = DPM[kind]
    theirs = scheduler(**SD, **options)
    theirs.set_timesteps(steps)
    check(make(TABLE, steps), theirs.sigmas, theirs.timesteps, cut=kind in ("exponential", "beta"))


@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize("kind", EULER)
def test_euler(kind: str, steps: int) -> None:
    make, options = EULER[kind]
    theirs = EulerDiscreteScheduler(**SD, **options)
    theirs.set_timesteps(steps)
    check(make(TABLE, steps), theirs.sigmas, theirs.timesteps, cut=False)


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_lcm_and_tcd(scheduler: Any) -> None:
    theirs = scheduler()
    for steps in (1, 2, 3, 4, 7, 8, 50):
        theirs.set_timesteps(steps)
        assert [int(level.t) for level in lcm(TABLE, steps)[:-1]] == theirs.timesteps.tolist()
        if steps < 25:
            theirs.set_timesteps(steps, strength=0.6)
            assert [int(x.t) for x in lcm(TABLE, steps, strength=0.6)[:-1]] == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_matching(steps: int) -> None:
    """"Shifted twice": with a shift theirs ends at the shifted 1/1000 before it shifts every time."""
    for shift in (1.0, 3.0):
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(steps)
        last = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        ours = linspace(FlowSchedule(), steps, last_t=last, shift=shift)
        assert torch.allclose(torch.stack([x.sigma for x in ours]), theirs.sigmas.double(), atol=1e-6)
        assert torch.allclose(torch.stack([1000 * x.t for x in ours[:-1]]), theirs.timesteps.double(), atol=1e-3)


@pytest.mark.parametrize("strength", [0.1, 0.29, 0.5, 0.75, 0.8, 1.0])
def test_tail_is_where_picture_to_picture_begins(strength: float) -> None:
    """The rule of diffusers' pipelines: `min(int(N strength), N)` steps from the end."""
    steps = 50
    theirs = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    begin = max(steps - min(int(steps * strength), steps), 0)
    ours = tail(trailing(TABLE, steps), strength)
    assert [float(x.t) for x in ours[:-1]] == theirs.timesteps[begin:].tolist()
