"""DDPM's ancestral sampling: draw from the Gaussian posterior with the predicted x0 in place of the true one.

>>> Ancestral(variance="large").variance
'large'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand, mix
from sfumato.diffusion.posterior import Transition, learned_log_variance, transition
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError, raise_unknown
from sfumato.random import NoiseSource

VARIANCES = ("small", "large", "learned")


@method("ddpm", "DDPM", "DDPMScheduler", "ddpm_ancestral", "p_sample", stochastic=True)
@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling (Ho 2020, alg. 2), on any grid and path. Reads `x0`.

    Attributes:
        variance: "small", the posterior's beta-tilde; "large", beta; "learned", interpolated by the network between
            the two, of this very step (Nichol 2021, eq. 15).

    No noise is added in the step that arrives at a clean level.
    """

    variance: Literal["small", "large", "learned"] = "small"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise_unknown("variance", self.variance, VARIANCES)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> None:
        return None

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: None, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, None, Prediction]:
        prediction, q = ask(x, now), transition(now, nxt)
        mean = mix(q.from_x, x, q.from_x0, prediction.x0)
        if nxt.is_clean:
            return mean, nxt, None, prediction
        variance = self._variance(prediction, q, x)
        if prediction.grad is not None:
            mean = mean + variance * prediction.grad
        return mean + torch.sqrt(variance) * noise.draw(), nxt, None, prediction

    def _variance(self, prediction: Prediction, q: Transition, x: Tensor) -> Tensor:
        if self.variance != "learned":
            return expand(q.variance if self.variance == "small" else q.beta, x)
        if prediction.var_frac is None:
            raise UserError("this model has no learned variance; use variance 'small' or 'large'")
        return torch.exp(learned_log_variance(prediction.var_frac, expand(q.beta, x), expand(q.variance, x)))
