"""Solvers against diffusers: single steps on random networks, whole loops on an analytic denoiser, golden scalars.

A network here is a function of the variance-preserving state and the time; diffusers' sigma schedulers keep
`x / alpha` and scale it themselves. Every loop starts from the same state (theirs is handed over, not drawn by them)
and both sides draw noise from one generator per picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

from sfumato.diffusion.analytic import MixtureData
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import leading, linspace, trailing
from sfumato.diffusion.guidance import clip_x0, unguided
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.parameterization import EPS, Parameterization, V
from sfumato.diffusion.posterior import transition
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar, scaled_linear_alpha_bar
from sfumato.diffusion.solvers import Ancestral, Euler, Heun, Solver
from sfumato.random import NoiseSource
from sfumato.systems.scheduler_config import from_diffusers

Network = Callable[[Tensor, Tensor], Tensor]

BETAS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "linear": (linear_alpha_bar(), {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}),
    "scaled_linear": (
        scaled_linear_alpha_bar(),
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    ),
}
KINDS: dict[str, tuple[Parameterization, str]] = {"eps": (EPS, "epsilon"), "v": (V, "v_prediction")}
SEEDS, SHAPE = (0, 1, 2), (2, 4, 4)

each_beta = pytest.mark.parametrize("betas", BETAS)
each_kind = pytest.mark.parametrize("kind", KINDS)


class TinyNet(nn.Module):
    """Random weights, smooth in x and t."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, outputs, 3, padding=1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
            p.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + torch.sin(t / 200)[:, None, None, None]))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def normal(streams: Sequence[torch.Generator]) -> Tensor:
    return torch.cat([torch.randn((1, *SHAPE), generator=g) for g in streams])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert bool(torch.isfinite(ours).all())
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- diffusers' loops ------------------------------------------------------------------------------------------------


def walk(scheduler: Any, network: Network, x: Tensor, streams: list[torch.Generator], **options: Any) -> Tensor:
    """A loop of DDPM's or DDIM's scheduler from the state `x`."""
    for t in scheduler.timesteps:
        out = network(x, t.expand(len(x)).float())
        x = scheduler.step(out, int(t), x, generator=streams, **options).prev_sample
    return x


def walk_in_ratios(scheduler: Any, network: Network, x: Tensor) -> Tensor:
    """A loop of the sigma schedulers from the variance-preserving state `x`; ends clean, where both states are one."""
    y = x * torch.sqrt(scheduler.sigmas[0] ** 2 + 1)
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(y, t), t.expand(len(y)))
        y = scheduler.step(out, t, y).prev_sample
    return y


def one_step_in_ratios(scheduler: Any, network: Network, x: Tensor) -> Tensor:
    """The first step of a grid of two whole times, back on the variance-preserving path."""
    y = x * torch.sqrt(scheduler.sigmas[0] ** 2 + 1)
    evaluations = 2 if isinstance(scheduler, HeunDiscreteScheduler) else 1
    for t in scheduler.timesteps[:evaluations]:
        out = network(scheduler.scale_model_input(y, t), t.expand(len(y)))
        y = scheduler.step(out, t, y).prev_sample
    return y / torch.sqrt(scheduler.sigmas[scheduler.step_index] ** 2 + 1)


# --- single steps on a random network --------------------------------------------------------------------------------

PAIRS = [(999, 979), (801, 601), (500, 499), (40, 20), (1, 0), (0, None)]
each_pair = pytest.mark.parametrize(("t", "nxt"), PAIRS, ids=[f"{a} to {b}" for a, b in PAIRS])


def our_step(
    method: Solver, denoiser: Denoiser, x: Tensor, t: int, nxt: int | None, noise: NoiseSource, **clip: Any
) -> Tensor:
    schedule = denoiser.schedule
    levels = [schedule.level(t), CLEAN if nxt is None else schedule.level(nxt)]
    denoise = clip_x0(unguided(denoiser), **clip) if clip else unguided(denoiser)
    return sample(denoise, method, x, levels, schedule, noise=noise)


def start_both() -> tuple[Tensor, NoiseSource, list[torch.Generator]]:
    """A random state, and two ends of the same streams just after it."""
    noise, streams = NoiseSource(SEEDS, SHAPE), generators()
    x = noise.draw()
    assert torch.equal(x, normal(streams))
    return x, noise, streams


@each_pair
@each_kind
@each_beta
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_step(variance: str, clip: bool, betas: str, kind: str, t: int, nxt: int | None) -> None:
    """"Cancelling tail": in float32 their 1 - alpha_bar of t = 0 is wrong by 3e-4, which shows in the step from 1 to 0
    as 5e-5; for that step alone the scheduler is handed the float64 table.
    """
    table, options = BETAS[betas]
    ours, theirs = KINDS[kind]
    learned = variance == "learned_range"
    network = TinyNet(4 if learned else 2)
    scheduler = DDPMScheduler(**options, prediction_type=theirs, variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(timesteps=[t] if nxt is None else [t, nxt])
    if t == 1:
        scheduler.alphas_cumprod = table
    x, noise, streams = start_both()
    wanted = scheduler.step(network(x, torch.full((3,), float(t))), t, x, generator=streams).prev_sample
    denoiser = Denoiser(network, TableSchedule(table), ours, learned_variance=learned)
    method = Ancestral(variance={"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}[variance])
    found = our_step(method, denoiser, x, t, nxt, noise, **({"low": -1.0} if clip else {}))
    assert difference(found, wanted) <= 1e-5


@pytest.mark.parametrize("t", [999, 801, 500, 120, 99, 0])
@each_kind
@each_beta
@pytest.mark.parametrize("clip", ["off", "clipped", "clipped, eps re-derived"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step(eta: float, clip: str, betas: str, kind: str, t: int) -> None:
    """`use_clipped_model_output` re-derives eps from the clipped x0. "Unchained steps": prev_timestep is t - 100."""
    table, options = BETAS[betas]
    ours, theirs = KINDS[kind]
    network, rederive = TinyNet(2), clip == "clipped, eps re-derived"
    scheduler = DDIMScheduler(**options, prediction_type=theirs, clip_sample=clip != "off")
    scheduler.set_timesteps(10)
    x, noise, streams = start_both()
    out = network(x, torch.full((3,), float(t)))
    wanted = scheduler.step(out, t, x, eta=eta, use_clipped_model_output=rederive, generator=streams).prev_sample
    denoiser = Denoiser(network, TableSchedule(table), ours)
    nxt = t - 100 if t >= 100 else None
    clipping = {} if clip == "off" else {"rederive_eps": rederive}
    assert difference(our_step(Euler(eta=eta), denoiser, x, t, nxt, noise, **clipping), wanted) <= 1e-5


@each_pair
@each_kind
@each_beta
@pytest.mark.parametrize(
    ("method", "scheduler"),
    [(Euler(), EulerDiscreteScheduler), (Heun(), HeunDiscreteScheduler)],
    ids=["euler", "heun"],
)
def test_sigma_step(method: Solver, scheduler: Any, betas: str, kind: str, t: int, nxt: int | None) -> None:
    table, options = BETAS[betas]
    ours, theirs = KINDS[kind]
    network, reference = TinyNet(2), scheduler(**options, prediction_type=theirs)
    reference.set_timesteps(timesteps=[t] if nxt is None else [t, nxt])
    x, noise, _ = start_both()
    wanted = one_step_in_ratios(reference, network, x)
    denoiser = Denoiser(network, TableSchedule(table), ours)
    assert difference(our_step(method, denoiser, x, t, nxt, noise), wanted) <= 1e-5


# --- whole loops on an analytic denoiser -----------------------------------------------------------------------------


def mixture() -> MixtureData:
    means = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    return MixtureData(means, torch.tensor([0.02, 0.05, 0.1, 0.2]))


class Analytic(nn.Module):
    """The mixture's optimal denoiser as a network with an eps or a v output."""

    def __init__(self, schedule: TableSchedule, kind: Parameterization) -> None:
        super().__init__()
        self.data, self.schedule, self.kind = mixture(), schedule, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.schedule.level(float(t[0]))
        prediction = self.data(x, level)
        return self.kind.target(prediction.x0, prediction.eps, level)


def ours(
    method: Solver, network: Analytic, levels: Sequence[NoiseLevel], noise: NoiseSource, x: Tensor, clip: bool = False
) -> Tensor:
    denoise = unguided(Denoiser(network, network.schedule, network.kind))
    denoise = clip_x0(denoise, rederive_eps=False) if clip else denoise
    return sample(denoise, method, x, levels, network.schedule, noise=noise)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_euler_with_eps_from_pure_noise(steps: int) -> None:
    """"The last level's output": their config of an eps network on a table of zero terminal SNR asks it at T - 1, where
    its output is `x_t`, so that their first step has x0 = 0 whatever the network knows; their DDIM divides by 0 there.
    Ours asks at a ratio of 100, and is over ten times as near to a network of v, which determines x0 there. With their
    x0 of the first step imposed the loops agree.
    """
    options = {**BETAS["scaled_linear"][1], "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    reference = EulerDiscreteScheduler(**options)
    reference.set_timesteps(steps)
    meaning = from_diffusers(json.loads(reference.to_json_string()))
    assert meaning.sampling.grid is not None and meaning.prediction.parameterization == "eps"
    schedule, method = meaning.schedule.build(), meaning.sampling.solver()
    levels, network = meaning.sampling.grid.build(schedule, steps), Analytic(schedule, EPS)
    denoiser, (x, noise, _) = Denoiser(network, schedule, EPS), start_both()

    def with_theirs(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        prediction = denoiser(x, level)
        return replace(prediction, x0=torch.zeros_like(x)) if level.is_noise else prediction

    found, imposed = (
        sample(d, method, x, levels, schedule, noise=noise) for d in (unguided(denoiser), with_theirs)
    )
    theirs = walk_in_ratios(reference, network, x)
    exact = ours(method, Analytic(schedule, V), levels, noise, x)
    assert difference(imposed, theirs) <= 2e-5
    assert 10 * difference(found, exact) < difference(theirs, exact)


SPACINGS = {"leading": leading, "trailing": trailing, "linspace": linspace}


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("variance", ["small", "large"])
@each_kind
@each_beta
def test_ddpm_loop(betas: str, kind: str, variance: str, spacing: str, steps: int) -> None:
    """Grids that end at t = 0. "Noise in the last step": on others diffusers adds noise to the last picture (t > 0)."""
    table, options = BETAS[betas]
    network = Analytic(TableSchedule(table), KINDS[kind][0])
    scheduler = DDPMScheduler(
        **options,
        prediction_type=KINDS[kind][1],
        variance_type=f"fixed_{variance}",
        clip_sample=False,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    x, noise, streams = start_both()
    wanted = walk(scheduler, network, x, streams)
    levels = SPACINGS[spacing](network.schedule, steps)
    assert difference(ours(Ancestral(variance=variance), network, levels, noise, x), wanted) <= 2e-5


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@each_kind
@each_beta
def test_ddim_loop(betas: str, kind: str, eta: float, clip: bool, spacing: str, steps: int) -> None:
    """Step counts that divide 1000. "Unchained steps": elsewhere theirs go to t - T // steps, not along the grid."""
    table, options = BETAS[betas]
    network = Analytic(TableSchedule(table), KINDS[kind][0])
    scheduler = DDIMScheduler(
        **options, prediction_type=KINDS[kind][1], clip_sample=clip, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    x, noise, streams = start_both()
    wanted = walk(scheduler, network, x, streams, eta=eta)
    levels = SPACINGS[spacing](network.schedule, steps)
    assert difference(ours(Euler(eta=eta), network, levels, noise, x, clip), wanted) <= 2e-5


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("method", "scheduler"),
    [(Euler(), EulerDiscreteScheduler), (Heun(), HeunDiscreteScheduler)],
    ids=["euler", "heun"],
)
@each_kind
@each_beta
def test_sigma_loop(betas: str, kind: str, method: Solver, scheduler: Any, spacing: str, steps: int) -> None:
    """"Fractional t": with linspace theirs keeps fractional times and interpolates nsr linearly; so do we here."""
    table, options = BETAS[betas]
    schedule = TableSchedule(table, interpolation="linear")
    network = Analytic(schedule, KINDS[kind][0])
    reference = scheduler(**options, prediction_type=KINDS[kind][1], timestep_spacing=spacing)
    reference.set_timesteps(steps)
    x, noise, _ = start_both()
    wanted = walk_in_ratios(reference, network, x)
    make = partial(linspace, round_t=False) if spacing == "linspace" else SPACINGS[spacing]
    assert difference(ours(method, network, make(schedule, steps), noise, x), wanted) <= 2e-5


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_diffusers_start_noise(scheduler: Any) -> None:
    """"Start noise": theirs has 0.99767 of the marginal's spread for linspace and trailing, all of it for leading."""
    for spacing, share in [("linspace", 0.99767), ("trailing", 0.99767), ("leading", 1.0)]:
        reference = scheduler(**BETAS["scaled_linear"][1], timestep_spacing=spacing)
        reference.set_timesteps(10)
        spread = float(reference.init_noise_sigma / torch.sqrt(reference.sigmas.max() ** 2 + 1))
        assert spread == pytest.approx(share, abs=1e-5)


# --- golden scalars --------------------------------------------------------------------------------------------------


def golden(method: Solver) -> float:
    """Stable Diffusion's table, x_t = 1, eps = 0.5, t from 801 to 601. Pure-Python float64 of the papers' formulas."""
    schedule = TableSchedule(scaled_linear_alpha_bar())
    half = nn.Identity()
    half.forward = lambda x, t: torch.full_like(x, 0.5)  # type: ignore[method-assign]
    one, noise = torch.ones((1, 1), dtype=torch.float64), NoiseSource([0], (1,), dtype=torch.float64)
    levels = [schedule.level(801), schedule.level(601)]
    return float(sample(unguided(Denoiser(half, schedule)), method, one, levels, schedule, noise=noise))


def test_golden_ddim_and_euler() -> None:
    """Song 2021, eq. 12 with eta 0, which is Euler's step in x / alpha: 5.230907 to 3.810118."""
    assert golden(Euler()) == pytest.approx(1.523173, abs=1e-6)
    schedule = TableSchedule(scaled_linear_alpha_bar())
    assert 1 / float(schedule.level(801).alpha) == pytest.approx(5.230907, abs=1e-6)
    assert golden(Euler()) / float(schedule.level(601).alpha) == pytest.approx(3.810118, abs=1e-6)


def test_golden_ddpm() -> None:
    """Ho 2020, eq. 7: mean 1.269529, variance 0.672634."""
    schedule = TableSchedule(scaled_linear_alpha_bar())
    variance = float(transition(schedule.level(801), schedule.level(601)).variance)
    assert variance == pytest.approx(0.672634, abs=1e-6)
    z = float(NoiseSource([0], (1,), dtype=torch.float64).draw())
    assert golden(Ancestral()) - variance**0.5 * z == pytest.approx(1.269529, abs=1e-6)
