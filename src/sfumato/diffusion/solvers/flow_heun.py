"""Heun's second-order method in the path's own coordinates: on a flow, the trapezoid of its velocities.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("FlowMatchHeunDiscreteScheduler").order
2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.random import NoiseSource


@method("flow_heun", "Heun (flow)", "FlowMatchHeunDiscreteScheduler", evaluations=2)
@dataclass(frozen=True)
class FlowHeun:
    """Euler to the next level, then `x' = x + (a' - a) mean(x0) + (s' - s) mean(eps)`. Reads `x0` and `eps`.

    The probability flow is `dx = x0 d alpha + eps d sigma`; this is its trapezoid, over both predictions. On the
    straight path that is Heun's method for the velocity `eps - x0` (Liu 2022), on the exploding one it is EDM's;
    `Heun`, the trapezoid in `sigma / alpha`, is another second-order method on all paths but that. Works from pure
    noise, of second order there too. Two evaluations a step, one in the step that arrives clean. Ignores a learned
    variance.
    """

    order: int = field(default=2, init=False)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> None:
        return None

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: None, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, None, Prediction]:
        prediction = ask(x, now).shifted(now)
        guess = first_order(prediction, nxt)
        if nxt.is_clean:
            return guess, nxt, None, prediction
        second = ask(guess, nxt).shifted(nxt)
        x0, eps = torch.lerp(prediction.x0, second.x0, 0.5), torch.lerp(prediction.eps, second.eps, 0.5)
        change = expand(nxt.alpha - now.alpha, x) * x0 + expand(nxt.sigma - now.sigma, x) * eps
        return x + change, nxt, None, second
