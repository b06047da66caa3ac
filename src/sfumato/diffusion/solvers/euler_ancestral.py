"""Euler ancestral: each step goes down along the slope to less noise than the next level has, then adds fresh noise.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("Euler a").eta
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import Injection, ancestral, check_injection, spread
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.random import NoiseSource


@method(
    "euler_ancestral",
    "Euler a",
    "EulerAncestralDiscreteScheduler",
    "Euler ancestral",
    "k_euler_a",
    "k_euler_ancestral",
    stochastic=True,
)
@dataclass(frozen=True)
class EulerAncestral:
    """`x' = alpha' x0 + sigma_down eps + sigma_up z`: k-diffusion's method. Reads `x0` and `eps`.

    `sigma_up² = min(eta² beta-tilde, sigma'²)` and `sigma_down² = sigma'² - sigma_up²` (`posterior.ancestral`). Up to
    eta = 1 that is DDIM with the same eta (Song 2021, eq. 12); beyond, the noise is all new at last. A step that leaves
    pure noise renews all of it; one that arrives clean adds none.

    Attributes:
        eta: >= 0, share of the posterior's standard deviation that is injected.
        noise: S_noise, standard deviation of the unit noise.
        variance: of the noise, the method's "own" or "learned" by the network (`posterior.spread`).
    """

    eta: float = 1.0
    noise: float = 1.0
    variance: Injection = "own"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_injection(self.variance, self.eta)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> None:
        return None

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: None, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, None, Prediction]:
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean:
            return first_order(prediction, nxt), nxt, None, prediction
        down, own = ancestral(now, nxt, self.eta)
        std = self.noise * expand(spread(self.variance, own, prediction.var_frac, now, nxt), x)
        return first_order(prediction, down) + std * noise.draw(), nxt, None, prediction
