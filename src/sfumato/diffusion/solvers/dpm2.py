"""DPM2: the midpoint method of DPM-Solver-2 in log nsr, plain and ancestral, as k-diffusion has them.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("DPM2").order, solver("DPM2 a").order
(2, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import Injection, ancestral, check_injection, spread
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, along, first_order
from sfumato.diffusion.solvers.euler import Churn, Path
from sfumato.diffusion.solvers.registry import method
from sfumato.random import NoiseSource


@method("dpm_2", "DPM2", "KDPM2DiscreteScheduler", "k_dpm_2", "kdpm_2", evaluations=2)
@dataclass(frozen=True)
class DPM2:
    """Go half the way in log nsr, then the whole way along the slope found there. Reads `eps`.

    `x_s = alpha_s x0 + sigma_s eps` at `nsr_s = sqrt(nsr nsr')`, then `along(x, eps_s)`: DPM-Solver-2 with r = 1/2 (Lu
    2022, alg. 1), k-diffusion's `sample_dpm_2`. Two evaluations a step, one in a step that leaves pure noise or arrives
    clean (`x0` and `eps` there, and for the half step). Ignores a learned variance.

    Attributes:
        churn: EDM's stochasticity, off by default.
    """

    churn: Churn = Churn()
    order: int = field(default=2, init=False)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Path:
        return Path(schedule, len(grid) - 1)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Path, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Path, Prediction]:
        x, now = self.churn.apply(x, now, state, noise)
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean or now.is_noise:
            return first_order(prediction, nxt), nxt, state, prediction
        middle = state.schedule.between(now, nxt, 0.5)
        second = ask(first_order(prediction, middle), middle).shifted(middle)
        return along(x, second.eps, now, nxt), nxt, state, second


@method(
    "dpm_2_ancestral",
    "DPM2 a",
    "KDPM2AncestralDiscreteScheduler",
    "DPM2 ancestral",
    "k_dpm_2_a",
    "k_dpm_2_ancestral",
    "kdpm_2_a",
    evaluations=2,
    stochastic=True,
)
@dataclass(frozen=True)
class DPM2Ancestral:
    """DPM2 down to `sigma_down`, then noise of standard deviation `sigma_up` (`posterior.ancestral`). Reads `eps`.

    k-diffusion's `sample_dpm_2_ancestral`: the inner level lies at `nsr_s = sqrt(nsr nsr_down)`, which for eta = 1 is
    that of the next level. A step that leaves nearly pure noise or arrives clean is Euler
    ancestral's (`x0` and `eps`).

    Attributes:
        eta: >= 0, share of the posterior's standard deviation that is injected.
        noise: S_noise, standard deviation of the unit noise.
        variance: of the noise, the method's "own" or "learned" by the network at the step's first level.
    """

    eta: float = 1.0
    noise: float = 1.0
    variance: Injection = "own"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_injection(self.variance, self.eta)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Schedule:
        return schedule

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Schedule, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Schedule, Prediction]:
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean:
            return first_order(prediction, nxt), nxt, state, prediction
        down, own = ancestral(now, nxt, self.eta)
        std = self.noise * expand(spread(self.variance, own, prediction.var_frac, now, nxt), x)
        if down.is_clean or now.is_nearly_noise:
            return first_order(prediction, down) + std * noise.draw(), nxt, state, prediction
        middle = state.from_nsr(torch.sqrt(now.nsr * down.nsr))
        second = ask(first_order(prediction, middle), middle).shifted(middle)
        return along(x, second.eps, now, down) + std * noise.draw(), nxt, state, second
