"""What a solver is: one transition from a level to a cleaner one, with explicit state and explicit noise.

A solver is a small frozen dataclass of options. It never holds state: `init` makes it, `step` takes and returns it,
so one solver object serves any number of threads. Solvers are written in (alpha, sigma), never in `x / alpha`; a step
that leaves pure noise (alpha = 0) is the first-order `alpha' x0 + sigma' eps`.

>>> from sfumato.diffusion.solvers import Euler
>>> Euler().order
1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, mix
from sfumato.diffusion.schedule import Schedule
from sfumato.random import NoiseSource

State = TypeVar("State")
Ask = Callable[[Tensor, NoiseLevel], Prediction]
"""What a solver asks: `(x_t, level) -> Prediction`."""


class Solver(Protocol[State]):
    """One transition of a sampling method.

    Attributes:
        order: of convergence on the probability-flow ODE (1 for stochastic methods); asserted by a test.
    """

    @property
    def order(self) -> int: ...

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> State:
        """The state before the first step; knows the path and all levels that will be visited."""
        ...

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: State, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, State, Prediction]:
        """Go from `now` towards `nxt`. May ask any number of times.

        Returns `x`, the level it reached (`nxt` itself, unless an adaptive method stops short), the new state, and the
        prediction to show as this step's preview.
        """
        ...


def first_order(prediction: Prediction, nxt: NoiseLevel) -> Tensor:
    """`alpha' x0 + sigma' eps`: DDIM with eta 0, which is Euler's step on any path (Song 2021, eq. 12)."""
    alpha, sigma = nxt.numbers
    return mix(alpha, prediction.x0, sigma, prediction.eps)


def along(x: Tensor, eps: Tensor, now: NoiseLevel, nxt: NoiseLevel) -> Tensor:
    """Move along a given slope `eps = d(x/alpha)/d(nsr)`: `(a'/a) x + (s' - (a'/a) s) eps`; needs alpha > 0."""
    (alpha, sigma), (to_alpha, to_sigma) = now.numbers, nxt.numbers
    ratio = to_alpha / alpha
    return mix(ratio, x, to_sigma - ratio * sigma, eps)


def toward(x: Tensor, x0: Tensor, now: NoiseLevel, nxt: NoiseLevel) -> Tensor:
    """Move towards a given `x0`: `(s'/s) x + (a' - a s'/s) x0`, DPM-Solver++'s first order; needs sigma > 0.

    Of levels that differ within a batch some may be clean: there the picture stays.
    """
    (alpha, sigma), (to_alpha, to_sigma) = now.numbers, nxt.numbers
    ratio = to_sigma / sigma
    if isinstance(ratio, Tensor):
        ratio = torch.where(torch.as_tensor(sigma) == 0, torch.as_tensor(to_alpha / alpha), ratio)
    return mix(ratio, x, to_alpha - ratio * alpha, x0)
