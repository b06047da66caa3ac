"""Euler's method on the probability-flow ODE, which is DDIM; with eta its stochastic form, with churn EDM's.

>>> Euler(eta=1.0, variance="learned").order
1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import Injection, ancestral, check_injection, renoise, spread
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError
from sfumato.random import NoiseSource


@dataclass(frozen=True)
class Churn:
    """EDM's stochastic churn (Karras 2022, alg. 2): before a step, go up to `nsr (1 + gamma)` by adding noise.

    Attributes:
        amount: S_churn >= 0; `gamma = min(amount / steps, sqrt(2) - 1)`.
        low, high: S_tmin, S_tmax: only where nsr lies within.
        noise: S_noise, standard deviation of the noise added.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def apply(self, x: Tensor, now: NoiseLevel, path: Path, noise: NoiseSource) -> tuple[Tensor, NoiseLevel]:
        """The churned state and its level; both unchanged where there is nothing to do."""
        if self.amount == 0 or now.is_noise or not self.low <= float(now.nsr) <= self.high:
            return x, now
        higher = path.schedule.from_nsr(now.nsr * (1 + min(self.amount / path.steps, math.sqrt(2) - 1)))
        return renoise(x, now, higher, self.noise * noise.draw()), higher


@dataclass(frozen=True)
class Path:
    """What a one-step method remembers: the schedule and how many steps the whole grid has."""

    schedule: Schedule
    steps: int


@method("ddim", "DDIM", "DDIMScheduler", "plain_ddim")
@method("euler", "Euler", "EulerDiscreteScheduler", "k_euler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler")
@dataclass(frozen=True)
class Euler:
    """`x' = alpha' x0 + sqrt(sigma'² - s²) eps + s z`, `s = eta sqrt(beta-tilde)`. Reads `x0` and `eps`.

    Attributes:
        eta: 0 is DDIM (Song 2021) and Euler's method, 1 has DDPM's small variance (eq. 16).
        churn: EDM's stochasticity, off by default.
        variance: of the noise that eta injects: its "own" (eq. 16), or "learned", the network's (`posterior.spread`).
    """

    eta: float = 0.0
    churn: Churn = Churn()
    variance: Injection = "own"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie in [0, 1], got {self.eta}")
        check_injection(self.variance, self.eta)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Path:
        return Path(schedule, len(grid) - 1)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Path, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Path, Prediction]:
        x, now = self.churn.apply(x, now, state, noise)
        prediction = ask(x, now).shifted(now)
        if self.eta == 0 or nxt.is_clean:
            return first_order(prediction, nxt), nxt, state, prediction
        down, own = ancestral(now, nxt, self.eta)
        std = expand(spread(self.variance, own, prediction.var_frac, now, nxt), x)
        return first_order(prediction, down) + std * noise.draw(), nxt, state, prediction
