"""Samplers for distilled networks whose `x0` is a consistency function: LCM and TCD.

Their networks map a noisy picture to the end of its trajectory at once; the samplers go there and add noise again.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("LCM").scaling, solver("TCD").gamma
(10.0, 0.3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import renoise
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError
from sfumato.random import NoiseSource


@method("lcm", "LCM", "LCMScheduler", stochastic=True, schedule="lcm")
@dataclass(frozen=True)
class LCM:
    """`x' = alpha' f + sigma' z`, `f = c_skip x + c_out x0`: latent consistency models (Luo 2023, alg. 3). Reads `x0`.

    `c_skip = d²/((s t)² + d²)` and `c_out = s t/sqrt((s t)² + d²)` make f the identity at `t = 0`; t is the index into
    the table. On a continuous schedule, whose t is another unit, and with `scaling` None, `f = x0`. No noise is added
    in the step that arrives clean. Ignores a learned variance.

    Attributes:
        scaling: s, > 0, of the time (diffusers' timestep_scaling), or None.
        sigma_data: d, > 0.
    """

    scaling: float | None = 10.0
    sigma_data: float = 0.5
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if (self.scaling is not None and self.scaling <= 0) or self.sigma_data <= 0:
            raise UserError(f"scaling and sigma_data must be positive, got {self.scaling} and {self.sigma_data}")

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Schedule:
        return schedule

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Schedule, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Schedule, Prediction]:
        prediction = ask(x, now).shifted(now)
        f = prediction.x0
        if self.scaling is not None and state.steps is not None:
            time, d = self.scaling * now.t, self.sigma_data
            total = time**2 + d**2
            f = expand(time / torch.sqrt(total), x) * f + expand(d**2 / total, x) * x
        end = expand(nxt.alpha, x) * f
        if not nxt.is_clean:
            end = end + expand(nxt.sigma, x) * noise.draw()
        return end, nxt, state, replace(prediction, x0=f)


@method("tcd", "TCD", "TCDScheduler", stochastic=True, schedule="lcm")
@dataclass(frozen=True)
class TCD:
    """To the level at `s = (1 - gamma) t'`, then noise back up to `t'` (Zheng 2024, alg. 4). Reads `x0` and `eps`.

    `x_s = alpha_s x0 + sigma_s eps`; on a table s is rounded down to an index. A step that leaves pure noise or arrives
    clean is first order, the latter without noise. Ignores a learned variance.

    Attributes:
        gamma: in [0, 1] (diffusers' eta); 0 is deterministic (DDIM), 1 goes to the cleanest time and back each step.
    """

    gamma: float = 0.3
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma must lie in [0, 1], got {self.gamma}")

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Schedule:
        return schedule

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Schedule, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Schedule, Prediction]:
        prediction = ask(x, now).shifted(now)
        if self.gamma == 0 or nxt.is_clean:
            return first_order(prediction, nxt), nxt, state, prediction
        s = (1 - self.gamma) * nxt.t
        below = state.level(torch.floor(s) if state.steps is not None else s)
        return renoise(first_order(prediction, below), below, nxt, noise.draw()), nxt, state, prediction
