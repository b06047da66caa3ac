"""Heun's second-order method in noise-to-signal ratio, EDM's own solver.

>>> Heun().order
2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, along, first_order
from sfumato.diffusion.solvers.euler import Churn, Path
from sfumato.diffusion.solvers.registry import method
from sfumato.random import NoiseSource


@method("heun", "Heun", "HeunDiscreteScheduler", "k_heun", evaluations=2)
@dataclass(frozen=True)
class Heun:
    """Euler to the next level, then the trapezoid of both slopes (Karras 2022, alg. 1-2). Reads `eps`.

    Two evaluations a step, one in a step that leaves nearly pure noise or arrives clean (`x0` and `eps` there).

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
        guess = first_order(prediction, nxt)
        if nxt.is_clean or now.is_nearly_noise:
            return guess, nxt, state, prediction
        second = ask(guess, nxt).shifted(nxt)
        return along(x, torch.lerp(prediction.eps, second.eps, 0.5), now, nxt), nxt, state, second
