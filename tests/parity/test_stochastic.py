"""Stochastic and singlestep solvers against diffusers, and against k-diffusion's formulas written down independently.

Both sides start from the same state and are handed the same levels and the same noise: diffusers a generator per
picture in the state that ours is in, k-diffusion's formulas the very functions that our solver asks. Where diffusers
cannot be met, the test says so under the quirk's name:

- "Float32 coefficients" (SASolver): differences of nearly equal float32 numbers; the scheduler is handed its own ratios
  in float64.
- "Third order's sign" (DPMSolverMultistep): sde-dpmsolver++ of order 3 subtracts the half that its deterministic
  formula, and k-diffusion's 3M SDE, add: `-(phi2/H + 1/2) D2` instead of `-(phi2/H - 1/2) D2`, which does not vanish
  with the step. Compared with k-diffusion's only.
- "No clean end" (SASolver, TCD; DPMSolverMultistep's sde-dpmsolver): they stop at t = 0, and so do our grids here.
- "Churn after the network" (EDMEuler): noise is added after the network has been asked, at the level it was asked of;
  compared without churn. Ours asks at the higher level, as algorithm 2 says.
- "Shifted twice" (FlowMatchEuler, FlowMatchHeun): the cleanest level is shifted once by the constructor and again with
  the grid; our grid is handed their levels.
- "Velocities" (FlowMatchHeun): its trapezoid is one of velocities, not of `eps` in sigma / alpha; hence `FlowHeun`.
- "Its own path" (DPMSolverSDEScheduler): needs torchsde, whose Brownian path no other can reproduce; its formula is
  k-diffusion's `sample_dpmpp_sde`, compared below with one path handed to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    TCDScheduler,
)
from torch import Tensor, nn

from sfumato.diffusion.denoiser import TIME_1000, Denoiser, edm_preconditioning
from sfumato.diffusion.guidance import unguided
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.parameterization import FLOW, edm
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import FlowSchedule, Schedule, TableSchedule, VESchedule, linear_alpha_bar
from sfumato.diffusion.solvers import Churn, Euler, Heun, Solver
from sfumato.diffusion.solvers.consistency import LCM, TCD
from sfumato.diffusion.solvers.dpm2 import DPM2, DPM2Ancestral
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive, DPMFast
from sfumato.diffusion.solvers.dpmpp_ancestral import DPMpp2SAncestral
from sfumato.diffusion.solvers.dpmpp_sde import DPMppMultistepSDE, DPMppSDE, SDEDPMSolver
from sfumato.diffusion.solvers.euler_ancestral import EulerAncestral
from sfumato.diffusion.solvers.flow_heun import FlowHeun
from sfumato.diffusion.solvers.sa_solver import SASolver
from sfumato.random import NoiseSource

from .test_solvers import BETAS, KINDS, SEEDS, SHAPE, Analytic, Network, TinyNet, difference, mixture, start_both

STEPS = (5, 10, 20, 50)
each_count = pytest.mark.parametrize("steps", STEPS)
each_pairing = pytest.mark.parametrize(("betas", "kind"), [("scaled_linear", "eps"), ("linear", "v")], ids=str)


# --- diffusers -------------------------------------------------------------------------------------------------------

Walk = Callable[[Any, Network, Tensor, list[torch.Generator]], Tensor]


def walk_in_ratios(scheduler: Any, network: Network, x: Tensor, streams: list[torch.Generator]) -> Tensor:
    """A loop, or its first step, of a scheduler that keeps `x / alpha`; returns the variance-preserving state."""
    draws = {} if isinstance(scheduler, KDPM2DiscreteScheduler) else {"generator": streams}
    y = x * torch.sqrt(scheduler.sigmas[0] ** 2 + 1)
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(y, t), t.expand(len(y)).float())
        y = scheduler.step(out, t, y, **draws).prev_sample
    return y / torch.sqrt(scheduler.sigmas[-1] ** 2 + 1)


def walk(scheduler: Any, network: Network, x: Tensor, streams: list[torch.Generator], **options: Any) -> Tensor:
    """A loop of a scheduler that keeps the variance-preserving state."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x)).float()), t, x, generator=streams, **options).prev_sample
    return x


def levels_of(scheduler: Any) -> list[NoiseLevel]:
    """The levels that a scheduler visits, by its own times and ratios; without the inner ones of two-stage methods."""
    two = isinstance(scheduler, KDPM2DiscreteScheduler | KDPM2AncestralDiscreteScheduler)
    times, ratios = scheduler.timesteps.double().tolist(), scheduler.sigmas.double().tolist()
    times, ratios = (times[::2], [ratios[0], *ratios[1 : len(times) + 1 : 2]]) if two else (times, ratios)
    levels = []
    for t, nsr in zip([*times, 0.0], ratios, strict=True):
        alpha = 1 / math.sqrt(1 + nsr**2)
        levels.append(NoiseLevel.of(t, alpha, nsr * alpha))
    return levels


def whole_levels(scheduler: Any, schedule: Schedule, end: NoiseLevel) -> list[NoiseLevel]:
    """The table's levels at a scheduler's times, and an end."""
    return [*(schedule.level(float(t)) for t in scheduler.timesteps), end]


def ours(method: Solver[Any], network: nn.Module, levels: Sequence[NoiseLevel], betas: str, kind: str) -> Tensor:
    x, noise, _ = start_both()
    denoiser = Denoiser(network, TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    return sample(unguided(denoiser), method, x, levels, denoiser.schedule, noise=noise)


def theirs(walking: Walk, scheduler: Any, network: nn.Module) -> Tensor:
    x, _, streams = start_both()
    return walking(scheduler, network, x, streams)


IN_RATIOS: dict[str, tuple[Solver[Any], Callable[..., Any]]] = {
    "euler ancestral": (EulerAncestral(), EulerAncestralDiscreteScheduler),
    "dpm 2": (DPM2(), KDPM2DiscreteScheduler),
    "dpm 2 ancestral": (DPM2Ancestral(), KDPM2AncestralDiscreteScheduler),
}


@each_count
@each_pairing
@pytest.mark.parametrize("spacing", [{"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}], ids=str)
@pytest.mark.parametrize("name", IN_RATIOS)
def test_loop_in_ratios(name: str, spacing: dict[str, Any], betas: str, kind: str, steps: int) -> None:
    """Between whole times a network stands in that reads t log-linearly, as their inner levels are made."""
    method, make = IN_RATIOS[name]
    scheduler = make(**BETAS[betas][1], prediction_type=KINDS[kind][1], **spacing)
    scheduler.set_timesteps(steps)
    network = Analytic(TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    wanted = theirs(walk_in_ratios, scheduler, network)
    assert difference(ours(method, network, levels_of(scheduler), betas, kind), wanted) <= 2e-5


EDGES = [(999, 979), (801, 601), (500, 499), (40, 20), (1, 0)]
each_pair = pytest.mark.parametrize(("t", "nxt"), EDGES, ids=[f"{a} to {b}" for a, b in EDGES])


def set_times(scheduler: Any, t: int, nxt: int) -> None:
    """Give a scheduler just two times, whatever its own grids are."""
    if isinstance(scheduler, LCMScheduler | TCDScheduler):
        scheduler.set_timesteps(timesteps=[t, nxt])
        return
    scheduler.set_timesteps(2)
    table = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
    scheduler.timesteps = torch.tensor([t, nxt])
    scheduler.sigmas = torch.tensor([table[t], table[nxt], table[0]])


@each_pair
@each_pairing
@pytest.mark.parametrize("name", ["euler ancestral", "dpm 2", "dpm 2 ancestral"])
def test_single_step_in_ratios(name: str, betas: str, kind: str, t: int, nxt: int) -> None:
    """On a random network. "Cancelling tail": their float32 1 - alpha_bar of t = 0 is wrong by 3e-4, so that a step
    to it is compared at their own ratio.
    """
    method, make = IN_RATIOS[name]
    scheduler = make(**BETAS[betas][1], prediction_type=KINDS[kind][1])
    ratios = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
    here, there = float(ratios[t]), float(ratios[nxt])
    network, (x, _, streams) = TinyNet(2), start_both()
    scheduler.set_timesteps(2)
    stages = hand_over(scheduler, here, there, float(t), float(nxt), betas)
    y = x * math.sqrt(1 + here**2)
    draws = {} if name == "dpm 2" else {"generator": streams}
    for time in scheduler.timesteps[:stages]:
        y = scheduler.step(network(scheduler.scale_model_input(y, time), time.expand(3)), time, y, **draws).prev_sample
    levels = [NoiseLevel.of(u, 1 / math.sqrt(1 + r**2), r / math.sqrt(1 + r**2)) for u, r in ((t, here), (nxt, there))]
    assert difference(ours(method, network, levels, betas, kind), y / math.sqrt(1 + there**2)) <= 1e-5


def hand_over(scheduler: Any, here: float, there: float, t: float, nxt: float, betas: str) -> int:
    """Give a scheduler in ratios two levels of a single step; returns how often it is asked in that step."""
    up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
    down = math.sqrt(there**2 - up**2)
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        scheduler.sigmas, scheduler.timesteps = torch.tensor([here, there, 0.0]), torch.tensor([t, nxt])
        return 1
    plain = isinstance(scheduler, KDPM2DiscreteScheduler)
    inner = math.sqrt(here * (there if plain else down))
    time = float(TableSchedule(BETAS[betas][0]).t_from_nsr(torch.tensor(inner, dtype=torch.float64)))
    scheduler.timesteps = torch.tensor([t, time, nxt])
    scheduler.sigmas = torch.tensor([here, there, there, 0.0])
    if plain:
        scheduler.sigmas_interpol = torch.tensor([0.0, inner, inner, 0.0])
    else:
        scheduler.sigmas_interpol = torch.tensor([inner, 0.0, 0.0, 0.0])
        scheduler.sigmas_up, scheduler.sigmas_down = torch.full((4,), up), torch.full((4,), down)
    return 2


SDE: dict[str, tuple[Solver[Any], dict[str, Any]]] = {
    "2m midpoint": (DPMppMultistepSDE(increments="fresh"), {"algorithm_type": "sde-dpmsolver++"}),
    "2m heun": (
        DPMppMultistepSDE(kind="heun", increments="fresh"),
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "1m": (DPMppMultistepSDE(points=1, increments="fresh"), {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "2m, ends at t = 0": (
        DPMppMultistepSDE(increments="fresh", lower_order_final=True),
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
    ),
    "noise prediction, midpoint": (
        SDEDPMSolver(increments="fresh", lower_order_final=True),
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "noise prediction, heun": (
        SDEDPMSolver(kind="heun", increments="fresh", lower_order_final=True),
        {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
    ),
}


@each_count
@each_pairing
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", SDE)
def test_sde_multistep_loop(name: str, spacing: str, betas: str, kind: str, steps: int) -> None:
    method, options = SDE[name]
    scheduler = DPMSolverMultistepScheduler(
        **BETAS[betas][1], prediction_type=KINDS[kind][1], timestep_spacing=spacing, **options
    )
    scheduler.set_timesteps(steps)
    network = Analytic(TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    wanted = theirs(walk, scheduler, network)
    assert difference(ours(method, network, levels_of(scheduler), betas, kind), wanted) <= 2e-5


SA: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2, 2": (2, 2, {}),
    "3, 4": (3, 4, {}),
    "1, 1": (1, 1, {}),
    "4, 3": (4, 3, {}),
    "3, 3, no lower order": (3, 3, {"lower_order_final": False}),
}


SA_RUNS = [(name, steps) for name, (_, _, options) in SA.items() for steps in STEPS if steps > 5 or not options]


@pytest.mark.parametrize(("name", "steps"), SA_RUNS)
@each_pairing
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver_loop(name: str, steps: int, tau: float, betas: str, kind: str) -> None:
    """Without lower orders the last of 5 steps, 3.3 long in lambda, multiplies float32's rounding: from 10 steps on."""
    predictor, corrector, options = SA[name]
    scheduler = SASolverScheduler(
        **BETAS[betas][1],
        prediction_type=KINDS[kind][1],
        predictor_order=predictor,
        corrector_order=corrector,
        tau_func=lambda t: torch.tensor(tau if 200 <= t <= 800 else 0.0, dtype=torch.float64),
        **options,
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    network = Analytic(TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    wanted = theirs(walk, scheduler, network)
    method = SASolver(predictor, corrector, tau, **options)
    assert difference(ours(method, network, levels_of(scheduler), betas, kind), wanted) <= 2e-5


@pytest.mark.parametrize("steps", [4, 5, 10, 20, 50])
@each_pairing
@pytest.mark.parametrize("scaling", [10.0, 0.01])
def test_lcm_loop(scaling: float, betas: str, kind: str, steps: int) -> None:
    scheduler = LCMScheduler(**BETAS[betas][1], prediction_type=KINDS[kind][1], timestep_scaling=scaling)
    scheduler.set_timesteps(steps)
    network = Analytic(TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    levels = whole_levels(scheduler, network.schedule, CLEAN)
    wanted = theirs(walk, scheduler, network)
    assert difference(ours(LCM(scaling=scaling), network, levels, betas, kind), wanted) <= 2e-5


@pytest.mark.parametrize("steps", [4, 5, 10, 20, 50])
@each_pairing
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_loop(gamma: float, betas: str, kind: str, steps: int) -> None:
    scheduler = TCDScheduler(**BETAS[betas][1], prediction_type=KINDS[kind][1])
    scheduler.set_timesteps(steps)
    network = Analytic(TableSchedule(BETAS[betas][0]), KINDS[kind][0])
    levels = whole_levels(scheduler, network.schedule, network.schedule.level(0))
    x, _, streams = start_both()
    wanted = walk(scheduler, network, x, streams, eta=gamma)
    assert difference(ours(TCD(gamma), network, levels, betas, kind), wanted) <= 2e-5


SINGLE: dict[str, tuple[Solver[Any], Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "lcm": (LCM(), LCMScheduler, {}, {}),
    "tcd": (TCD(), TCDScheduler, {}, {"eta": 0.3}),
    "tcd, all": (TCD(1.0), TCDScheduler, {}, {"eta": 1.0}),
    "sa solver": (SASolver(), SASolverScheduler, {}, {}),
    "2m sde": (
        DPMppMultistepSDE(increments="fresh"),
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        {},
    ),
    "sde of the noise": (
        SDEDPMSolver(increments="fresh"),
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {},
    ),
}


@each_pair
@each_pairing
@pytest.mark.parametrize("name", SINGLE)
def test_single_step(name: str, betas: str, kind: str, t: int, nxt: int) -> None:
    """On a random network. "Cancelling tail": LCM and TCD are handed the float64 table for the step from 1 to 0."""
    method, make, options, call = SINGLE[name]
    scheduler = make(**BETAS[betas][1], prediction_type=KINDS[kind][1], **options)
    set_times(scheduler, t, nxt)
    schedule, network = TableSchedule(BETAS[betas][0]), TinyNet(2)
    if isinstance(scheduler, LCMScheduler | TCDScheduler):
        levels = [schedule.level(t), schedule.level(nxt)]
        scheduler.alphas_cumprod = schedule.alpha_bar
    else:
        levels = levels_of(scheduler)[:2]
    x, _, streams = start_both()
    out = network(x, torch.full((3,), float(t)))
    time = scheduler.timesteps[0]
    wanted = scheduler.step(out, time, x, generator=streams, **call).prev_sample.float()
    assert difference(ours(method, network, levels, betas, kind), wanted) <= 1e-5


# --- EDM and flow matching -------------------------------------------------------------------------------------------


class EDMNetwork(nn.Module):
    """The mixture's optimal denoiser in EDM's form: hears `c_in x` and `ln(sigma) / 4`, returns F."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = torch.exp(4 * t[0].double())
        spread = torch.sqrt(sigma**2 + 0.25)
        y = x.double() * spread
        level = NoiseLevel(sigma, torch.ones_like(sigma), sigma)
        x0 = mixture()(y, level).x0
        return ((x0 - 0.25 / spread**2 * y) * spread / (0.5 * sigma)).float()


@each_count
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_edm_euler_loop(grid: str, steps: int) -> None:
    scheduler, network = EDMEulerScheduler(sigma_schedule=grid), EDMNetwork()
    scheduler.set_timesteps(steps)
    x, noise, _ = start_both()
    y = x * scheduler.sigmas[0]
    levels = [NoiseLevel.of(float(s), 1, float(s)) for s in scheduler.sigmas]
    denoiser = Denoiser(network, VESchedule(), edm(0.5), preconditioning=edm_preconditioning(0.5))
    found = sample(unguided(denoiser), Euler(), y, levels, denoiser.schedule, noise=noise)
    for t in scheduler.timesteps:
        y = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(3)), t, y).prev_sample
    assert difference(found, y) <= 2e-5


each_place = pytest.mark.parametrize("place", [0, 1, 7, 13])  # of 14 steps


@each_place
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_edm_euler_step(grid: str, place: int) -> None:
    """On a random network."""
    scheduler, network = EDMEulerScheduler(sigma_schedule=grid), TinyNet(2)
    scheduler.set_timesteps(14)
    x, noise, _ = start_both()
    y, t = x * scheduler.sigmas[place], scheduler.timesteps[place]
    levels = [NoiseLevel.of(float(s), 1, float(s)) for s in scheduler.sigmas[place : place + 2]]
    denoiser = Denoiser(network, VESchedule(), edm(0.5), preconditioning=edm_preconditioning(0.5))
    found = sample(unguided(denoiser), Euler(), y, levels, denoiser.schedule, noise=noise)
    wanted = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(3)), t, y).prev_sample
    assert difference(found, wanted) <= 1e-5


@each_place
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "euler, stochastic"])
def test_flow_euler_step(name: str, shift: float, place: int) -> None:
    """On a random network."""
    method, make, options = FLOWS[name]
    scheduler, network = make(shift=shift, **options), TinyNet(2)
    scheduler.set_timesteps(14)
    x, noise, streams = start_both()
    t = scheduler.timesteps[place]
    levels = [NoiseLevel.of(float(s), 1 - float(s), float(s)) for s in scheduler.sigmas[place : place + 2]]
    denoiser = Denoiser(network, FlowSchedule(), FLOW, preconditioning=TIME_1000)
    found = sample(unguided(denoiser), method, x, levels, FlowSchedule(), noise=noise)
    wanted = scheduler.step(network(x, t.expand(3)), t, x, generator=streams).prev_sample
    assert difference(found, wanted) <= 1e-5


FLOWS: dict[str, tuple[Solver[Any], Callable[..., Any], dict[str, Any]]] = {
    "euler": (Euler(), FlowMatchEulerDiscreteScheduler, {}),
    "euler, stochastic": (EulerAncestral(eta=1e6), FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "heun": (FlowHeun(), FlowMatchHeunDiscreteScheduler, {}),
}


@each_count
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_flow_loop(name: str, shift: float, steps: int) -> None:
    """From pure noise. Their stochastic sampling renews all noise each step: ours, with an eta beyond all bounds."""
    method, make, options = FLOWS[name]
    scheduler = make(shift=shift, **options)
    scheduler.set_timesteps(steps)
    data = mixture()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = float(t[0]) / 1000
        prediction = data(x, NoiseLevel.of(s, 1 - s, s))
        return prediction.eps - prediction.x0

    network = nn.Identity()
    network.forward = velocity  # type: ignore[method-assign]
    x, noise, streams = start_both()
    times = scheduler.timesteps.double().tolist()
    times = [times[0], *times[1::2]] if name == "heun" else times
    levels = [*(NoiseLevel.of(t, 1 - t / 1000, t / 1000) for t in times), CLEAN]
    found = sample(
        unguided(Denoiser(network, FlowSchedule(), FLOW)), method, x, levels, FlowSchedule(), noise=noise
    )
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(3)), t, x, generator=streams).prev_sample
    assert difference(found, x) <= 2e-5


# --- k-diffusion's formulas, in y = x / alpha and sigma = nsr, float64 -----------------------------------------------

Model = Callable[[Tensor, float], Tensor]
"""`(y, sigma) -> x0`."""
Noise = Callable[[float, float], Tensor]
"""Unit noise of the step from one sigma to another."""
MIXTURE = mixture()
MIXTURE.means, MIXTURE.variances, MIXTURE.weights = (
    v.double() for v in (MIXTURE.means, MIXTURE.variances, MIXTURE.weights)
)


def model(y: Tensor, sigma: float) -> Tensor:
    return MIXTURE(y, NoiseLevel.of(0, 1, sigma)).x0


def split(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up)."""
    up = min(to, eta * math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
    return math.sqrt(to**2 - up**2), up


def slope(y: Tensor, sigma: float) -> Tensor:
    return (y - model(y, sigma)) / sigma


def churned(y: Tensor, sigma: float, steps: int, amount: float, noise: Noise) -> tuple[Tensor, float]:
    hat = sigma * (1 + min(amount / steps, math.sqrt(2) - 1))
    return (y + math.sqrt(hat**2 - sigma**2) * noise(sigma, hat), hat) if amount else (y, sigma)


def k_euler(y: Tensor, sigmas: list[float], noise: Noise, churn: float = 0.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        y, sigma = churned(y, sigma, len(sigmas) - 1, churn, noise)
        y = y + (to - sigma) * slope(y, sigma)
    return y


def k_heun(y: Tensor, sigmas: list[float], noise: Noise, churn: float = 0.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        y, sigma = churned(y, sigma, len(sigmas) - 1, churn, noise)
        d = slope(y, sigma)
        if to > 0:
            d = (d + slope(y + (to - sigma) * d, to)) / 2
        y = y + (to - sigma) * d
    return y


def k_dpm_2(y: Tensor, sigmas: list[float], noise: Noise, churn: float = 0.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        y, sigma = churned(y, sigma, len(sigmas) - 1, churn, noise)
        d = slope(y, sigma)
        if to > 0:
            mid = math.exp((math.log(sigma) + math.log(to)) / 2)
            d = slope(y + (mid - sigma) * d, mid)
        y = y + (to - sigma) * d
    return y


def k_euler_ancestral(y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        down, up = split(sigma, to, eta)
        y = y + (down - sigma) * slope(y, sigma)
        y = y + up * noise(sigma, to) if to > 0 else y
    return y


def k_dpm_2_ancestral(y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        down, up = split(sigma, to, eta)
        d = slope(y, sigma)
        if down == 0:
            y = y + (down - sigma) * d
            continue
        mid = math.exp((math.log(sigma) + math.log(down)) / 2)
        y = y + (down - sigma) * slope(y + (mid - sigma) * d, mid) + up * noise(sigma, to)
    return y


def pull(y: Tensor, x0: Tensor, sigma: float, to: float) -> Tensor:
    """One exponential step towards x0, in t = -log sigma."""
    return to / sigma * y - math.expm1(math.log(to) - math.log(sigma)) * x0


def k_dpmpp_2s_ancestral(y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for sigma, to in pairwise(sigmas):
        x0 = model(y, sigma)
        down, up = split(sigma, to, eta)
        if down == 0:
            y = y + (down - sigma) * (y - x0) / sigma
        else:
            mid = math.exp((math.log(sigma) + math.log(down)) / 2)
            y = pull(y, model(pull(y, x0, sigma, mid), mid), sigma, down)
        y = y + up * noise(sigma, to) if to > 0 else y
    return y


def k_dpmpp_sde(y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0, r: float = 0.5) -> Tensor:
    for sigma, to in pairwise(sigmas):
        x0 = model(y, sigma)
        if to == 0:
            y = y + (to - sigma) * (y - x0) / sigma
            continue
        mid = math.exp((1 - r) * math.log(sigma) + r * math.log(to))
        down, up = split(sigma, mid, eta)
        inner = model(pull(y, x0, sigma, down) + up * noise(sigma, mid), mid)
        down, up = split(sigma, to, eta)
        share = 1 / (2 * r)
        y = pull(y, (1 - share) * x0 + share * inner, sigma, down) + up * noise(sigma, to)
    return y


def k_dpmpp_2m_sde(
    y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0, kind: str = "midpoint", s_noise: float = 1.0
) -> Tensor:
    before: tuple[Tensor, float] | None = None
    for sigma, to in pairwise(sigmas):
        x0 = model(y, sigma)
        if to == 0:
            return x0
        h = math.log(sigma) - math.log(to)
        y = to / sigma * math.exp(-eta * h) * y - math.expm1(-h - eta * h) * x0
        if before is not None:
            d = (x0 - before[0]) * h / before[1]
            heun = -math.expm1(-h - eta * h) / (-h - eta * h) + 1
            y = y + (heun if kind == "heun" else -0.5 * math.expm1(-h - eta * h)) * d
        if eta:
            y = y + noise(sigma, to) * to * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
        before = x0, h
    return y


def k_dpmpp_3m_sde(y: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    older: list[tuple[Tensor, float]] = []
    for sigma, to in pairwise(sigmas):
        x0 = model(y, sigma)
        if to == 0:
            return x0
        h = math.log(sigma) - math.log(to)
        total = h * (eta + 1)
        y = math.exp(-total) * y - math.expm1(-total) * x0
        phi2 = math.expm1(-total) / total + 1
        if len(older) == 1:
            y = y + phi2 * (x0 - older[0][0]) * h / older[0][1]
        elif older:
            (x1, h1), (x2, h2) = older
            r0, r1 = h1 / h, h2 / h
            d10, d11 = (x0 - x1) / r0, (x1 - x2) / r1
            y = y + phi2 * (d10 + (d10 - d11) * r0 / (r0 + r1)) - (phi2 / total - 0.5) * (d10 - d11) / (r0 + r1)
        if eta:
            y = y + noise(sigma, to) * to * math.sqrt(-math.expm1(-2 * h * eta))
        older = [(x0, h), *older][:2]
    return y


def k_solver(y: Tensor, t: float, to: float, order: int, r1: float, r2: float = 2 / 3) -> Tensor:
    """DPM-Solver-1, 2, 3 in t = -log sigma."""
    h, eps = to - t, slope(y, math.exp(-t))

    def at(r: float, u: Tensor) -> Tensor:
        return slope(u, math.exp(-(t + r * h))) - eps

    one = y - math.exp(-to) * math.expm1(h) * eps
    if order == 1:
        return one
    d1 = at(r1, y - math.exp(-(t + r1 * h)) * math.expm1(r1 * h) * eps)
    if order == 2:
        return one - math.exp(-to) / (2 * r1) * math.expm1(h) * d1
    s2 = math.exp(-(t + r2 * h))
    u2 = y - s2 * math.expm1(r2 * h) * eps - s2 * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    return one - math.exp(-to) / r2 * (math.expm1(h) / h - 1) * at(r2, u2)


def within(t: float, to: float, end: float, eta: float) -> tuple[float, float]:
    """Where a stochastic singlestep goes to, not beyond the end, and the sigma_up that is missing then."""
    if not eta:
        return to, 0.0
    down, _ = split(math.exp(-t), math.exp(-to), eta)
    reached = min(end, -math.log(down)) if down else end
    return reached, math.sqrt(max(math.exp(-2 * to) - math.exp(-2 * reached), 0))


def k_dpm_fast(y: Tensor, sigmas: list[float], noise: Noise, nfe: int, eta: float = 0.0) -> Tensor:
    m, first, last = nfe // 3 + 1, -math.log(sigmas[0]), -math.log(sigmas[-1])
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    for i, order in enumerate(orders):
        t, to = first + (last - first) * i / m, first + (last - first) * (i + 1) / m
        reached, up = within(t, to, last, eta)
        y = k_solver(y, t, reached, order, 1 / 3 if order == 3 else 1 / 2)
        y = y + up * noise(math.exp(-t), math.exp(-to)) if up else y
    return y


def k_dpm_adaptive(
    y: Tensor, sigmas: list[float], noise: Noise, order: int = 3, rtol: float = 0.05, eta: float = 0.0, p: float = 0.0
) -> Tensor:
    t, end, h, before, errors = -math.log(sigmas[0]), -math.log(sigmas[-1]), 0.05, y, [0.0] * 3
    scale, first = 1.5 if eta else order, True
    while t < end - 1e-5:
        to = min(end, t + h)
        reached, up = within(t, to, end, eta)
        low = k_solver(y, t, reached, order - 1, 1 / 3)
        high = k_solver(y, t, reached, order, 1 / 3 if order == 3 else 1 / 2)
        delta = (rtol * torch.maximum(low.abs(), before.abs())).clamp(min=0.0078)
        inverse = 1 / (float(torch.linalg.norm((low - high) / delta)) / y.numel() ** 0.5 + 1e-8)
        errors = [inverse] * 3 if first else [inverse, *errors[1:]]
        first = False
        factor = 1 + math.atan(errors[0] ** ((p + 1) / scale) * errors[1] ** (-p / scale) - 1)
        if factor >= 0.81:
            errors = [errors[0], errors[0], errors[1]]
            before, y = low, high + up * noise(math.exp(-t), math.exp(-to)) if up else high
            t = to
        h *= factor
    return y


PATHS: dict[str, Schedule] = {"vp": TableSchedule(linear_alpha_bar()), "ve": VESchedule(), "flow": FlowSchedule()}
HIGHEST, LOWEST = 20.0, 0.05
Formula = Callable[..., Tensor]
FORMULAS: dict[str, tuple[Solver[Any], Formula, dict[str, Any]]] = {
    "euler": (Euler(), k_euler, {}),
    "euler, churn": (Euler(churn=Churn(8.0)), k_euler, {"churn": 8.0}),
    "heun": (Heun(), k_heun, {}),
    "heun, churn": (Heun(churn=Churn(8.0)), k_heun, {"churn": 8.0}),
    "dpm_2": (DPM2(), k_dpm_2, {}),
    "dpm_2, churn": (DPM2(churn=Churn(8.0)), k_dpm_2, {"churn": 8.0}),
    "euler_ancestral": (EulerAncestral(), k_euler_ancestral, {}),
    "euler_ancestral, eta 0.4": (EulerAncestral(0.4), k_euler_ancestral, {"eta": 0.4}),
    "euler_ancestral, eta 3": (EulerAncestral(3.0), k_euler_ancestral, {"eta": 3.0}),
    "ddim, eta 1": (Euler(eta=1.0), k_euler_ancestral, {}),
    "dpm_2_ancestral": (DPM2Ancestral(), k_dpm_2_ancestral, {}),
    "dpm_2_ancestral, eta 0.4": (DPM2Ancestral(0.4), k_dpm_2_ancestral, {"eta": 0.4}),
    "dpmpp_2s_ancestral": (DPMpp2SAncestral(), k_dpmpp_2s_ancestral, {}),
    "dpmpp_2s_ancestral, eta 0.4": (DPMpp2SAncestral(0.4), k_dpmpp_2s_ancestral, {"eta": 0.4}),
    "dpmpp_sde": (DPMppSDE(), k_dpmpp_sde, {}),
    "dpmpp_sde, r 0.3": (DPMppSDE(eta=0.7, r=0.3), k_dpmpp_sde, {"eta": 0.7, "r": 0.3}),
    "dpmpp_2m_sde": (DPMppMultistepSDE(), k_dpmpp_2m_sde, {}),
    "dpmpp_2m_sde, heun": (
        DPMppMultistepSDE(kind="heun", eta=0.5, noise=1.1),
        k_dpmpp_2m_sde,
        {"kind": "heun", "eta": 0.5, "s_noise": 1.1},
    ),
    "dpmpp_2m_sde, eta 0": (DPMppMultistepSDE(eta=0.0), k_dpmpp_2m_sde, {"eta": 0.0}),
    "dpmpp_3m_sde": (DPMppMultistepSDE(3, "heun"), k_dpmpp_3m_sde, {}),
    "dpmpp_3m_sde, eta 0.5": (DPMppMultistepSDE(3, "heun", 0.5), k_dpmpp_3m_sde, {"eta": 0.5}),
}


def both_noises(method: Solver[Any], seeds: Sequence[int]) -> tuple[NoiseSource, Noise]:
    """The same noise for both: one Brownian path over log sigma, or one stream of draws."""
    mine, copy = (NoiseSource(seeds, SHAPE, dtype=torch.float64) for _ in range(2))
    brownian = getattr(method, "increments", None) == "brownian" or isinstance(method, DPMFast | DPMAdaptive)

    def between(sigma: float, to: float) -> Tensor:
        return copy.between(math.log(sigma), math.log(to)) if brownian else copy.draw()

    return mine, between


def beginning(seeds: Sequence[int]) -> Tensor:
    """Exact draws at `HIGHEST`, in y."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn((len(seeds), *SHAPE), generator=generator, dtype=torch.float64)
    return MIXTURE.sample(len(seeds), generator) + HIGHEST * z


def ours_in_ratios(method: Solver[Any], path: str, sigmas: list[float], noise: NoiseSource, y: Tensor) -> Tensor:
    schedule = PATHS[path]
    levels = [schedule.from_nsr(s) if s else CLEAN for s in sigmas]
    found = sample(MIXTURE, method, y * levels[0].alpha, levels, schedule, noise=noise)
    assert bool(torch.isfinite(found).all())
    return found / levels[-1].alpha


@each_count
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMULAS)
def test_k_diffusion_loop(name: str, path: str, steps: int) -> None:
    """On Karras' grid with rho = 7 and a clean end, on three paths: theirs is one formula, in x / alpha."""
    method, formula, options = FORMULAS[name]
    roots = [HIGHEST ** (1 / 7) + i / (steps - 1) * (LOWEST ** (1 / 7) - HIGHEST ** (1 / 7)) for i in range(steps)]
    sigmas = [*(root**7 for root in roots), 0.0]
    noise, copy = both_noises(method, SEEDS)
    found = ours_in_ratios(method, path, sigmas, noise, beginning(SEEDS))
    assert difference(found, formula(beginning(SEEDS), sigmas, copy, **options)) <= 1e-10


@pytest.mark.parametrize("nfe", [5, 6, 10, 20, 21, 50])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_k_diffusion_dpm_fast(eta: float, path: str, nfe: int) -> None:
    m, ending = nfe // 3 + 1, {0: (2, 1), 1: (1,), 2: (2,)}[nfe % 3]
    method = DPMFast(ending=ending, eta=eta)
    sigmas = [HIGHEST * (LOWEST / HIGHEST) ** (i / m) for i in range(m + 1)]
    noise, copy = both_noises(method, SEEDS)
    found = ours_in_ratios(method, path, sigmas, noise, beginning(SEEDS))
    assert difference(found, k_dpm_fast(beginning(SEEDS), sigmas, copy, nfe, eta)) <= 1e-10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(("rtol", "p"), [(0.05, 0.0), (0.001, 0.4)])
def test_k_diffusion_dpm_adaptive(rtol: float, p: float, eta: float, order: Any, path: str) -> None:
    """A batch of one: there every picture has its own steps, theirs shares one step among all."""
    method = DPMAdaptive(order, rtol=rtol, pcoeff=p, eta=eta)
    noise, copy = both_noises(method, [5])
    found = ours_in_ratios(method, path, [HIGHEST, LOWEST], noise, beginning([5]))
    wanted = k_dpm_adaptive(beginning([5]), [HIGHEST, LOWEST], copy, order, rtol, eta, p)
    assert difference(found, wanted) <= 1e-10
