"""The whole product of methods, parameterizations, schedules, learned variance and grids, measured without sampling.

On Gaussian data the optimal denoiser is affine, so a whole loop is an affine map of the initial state and of every
noise that it draws. One batch of impulses (a picture of zeros, then one for each unit of noise) gives that map, and
with it the exact mean and variance of what the loop makes: no sampling error, for deterministic and stochastic methods
alike. Brownian noise is resolved into the increments between all times that the method asks for.

A consistency sampler (LCM, TCD) is given the exact consistency function in the place of x0, which is what it expects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import GRIDS, Grid, grid
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import SOLVERS, Method
from sfumato.errors import UserError

from .diffusion_cases import PARAMETERIZATIONS
from .diffusion_cases import SCHEDULES as ALL_SCHEDULES

MEAN, VARIANCE = 0.6, 0.25
FEW, MANY = 16, 64
FRACTION = 0.3  # of the learned variance, where there is one
CONSISTENCY = ("lcm", "tcd")
STEPS_OF = {"lcm": (12, 48)}  # of the grids that have no 64 steps
SCHEDULES = (
    "linear", "linear, linear interpolation", "scaled_linear", "cosine", "sigmoid", "zero_scaled_linear", "ve", "flow",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way to sample."""

    method: str
    parameterization: str
    schedule: str
    learned: bool
    grid: str

    def __str__(self) -> str:
        return f"{self.method} / {self.parameterization} / {self.schedule} / {self.learned} / {self.grid}"


class Impulses:
    """A noise source that draws, for each unit of noise, an impulse in a picture of its own.

    A first walk over the loop, in which all noise is 0, counts the draws and collects the times of Brownian noise.
    """

    def __init__(self) -> None:
        self.draws, self.times, self.learning = 0, set[float](), True

    @property
    def batch(self) -> int:
        """Pictures of the second walk: zeros, the initial state, the draws, the elementary intervals."""
        return 2 + self.draws + max(0, len(self.times) - 1)

    def replay(self) -> Impulses:
        self.learning, self.drawn, self.ordered = False, 0, sorted(self.times)
        return self

    def draw(self) -> Tensor:
        if self.learning:
            self.draws += 1
            return torch.zeros((1, 1), dtype=torch.float64)
        z = torch.zeros((self.batch, 1), dtype=torch.float64)
        z[2 + self.drawn] = 1
        self.drawn += 1
        return z

    def between(self, u: float, v: float) -> Tensor:
        if self.learning:
            self.times |= {u, v}
            return torch.zeros((1, 1), dtype=torch.float64)
        z, (low, high) = torch.zeros((self.batch, 1), dtype=torch.float64), sorted((u, v))
        for i, (a, b) in enumerate(zip(self.ordered[:-1], self.ordered[1:], strict=True)):
            if low <= a and b <= high:
                z[2 + self.draws + i] = math.sqrt(b - a)
        return z / math.copysign(math.sqrt(high - low), v - u)


@cache
def denoiser(parameterization: str, schedule: str, learned: bool) -> Denoiser:
    """A denoiser without a network: what gives a raw output its meaning. Impossible pairs raise `ValueError`."""
    kind, path = PARAMETERIZATIONS[parameterization], ALL_SCHEDULES[schedule]
    return Denoiser(torch.nn.Identity(), path, kind, learned_variance=learned)


def oracle(cell: Cell) -> Any:
    """What the cell's solver asks: the exact answer, as the network's raw output, read back by the denoiser."""
    reader, data = (
        denoiser(cell.parameterization, cell.schedule, cell.learned),
        GaussianData(torch.full((1,), MEAN, dtype=torch.float64), VARIANCE),
    )

    def answer(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        found = data(x_t, level)
        x0, eps = found.x0, found.eps
        if cell.method in CONSISTENCY:
            alpha, sigma = float(level.alpha), float(level.sigma)
            x0 = MEAN + math.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)) * (x_t - alpha * MEAN)
            eps = (x_t - alpha * x0) / sigma
        out = reader.parameterization.target(x0, eps, level)
        return reader.read(out, x_t, level, torch.full_like(x_t, FRACTION) if cell.learned else None)

    return answer


def built(method: Method, learned: bool) -> Any:
    """The solver, with the learned variance where it can use one."""
    made = method.build()
    uses = learned and hasattr(made, "variance") and not (hasattr(made, "eta") and made.eta == 0)
    return method.build(variance="learned") if uses else made


def moments(cell: Cell, levels: Grid) -> tuple[float, float]:
    """Mean and standard deviation of what the loop makes from the exact marginal at the first level."""
    solver, schedule, ask, noise = (
        built(SOLVERS[cell.method], cell.learned),
        ALL_SCHEDULES[cell.schedule],
        oracle(cell),
        Impulses(),
    )
    alpha, sigma = float(levels[0].alpha), float(levels[0].sigma)
    centre = torch.full((1, 1), alpha * MEAN, dtype=torch.float64)
    sample(ask, solver, centre, levels, schedule, noise=noise)  # type: ignore[arg-type]
    x = centre.repeat(noise.batch, 1)
    x[1] += math.sqrt(alpha**2 * VARIANCE + sigma**2)
    out = sample(ask, solver, x, levels, schedule, noise=noise.replay())  # type: ignore[arg-type]
    return float(out[0]), float((out[1:] - out[0]).square().sum().sqrt())


def error(cell: Cell, steps: int) -> tuple[float, float]:
    """(Wasserstein-2 distance of the clean pictures to the data, what of it no method can avoid on that grid).

    The second is the bias of the last step, which returns the expected picture at the last noisy level and not a draw
    of it.
    """
    levels = grid(cell.grid, ALL_SCHEDULES[cell.schedule], steps)
    mean, std = moments(cell, levels)
    alpha, sigma, data = float(levels[-2].alpha), float(levels[-2].sigma), math.sqrt(VARIANCE)
    least = data * (1 - math.sqrt(alpha**2 * VARIANCE / (alpha**2 * VARIANCE + sigma**2)))
    return math.hypot(mean - MEAN, std - data), least


def cells() -> Iterator[Cell]:
    """All of them."""
    for method, kind, path, learned, spacing in product(SOLVERS, PARAMETERIZATIONS, SCHEDULES, (False, True), GRIDS):
        yield Cell(method, kind, path, learned, spacing)


def verdict(cell: Cell) -> str:
    """ "converges", or what stands against it."""
    at_few, at_many = STEPS_OF.get(cell.grid, (FEW, MANY))
    try:
        (few, _), (many, least) = error(cell, at_few), error(cell, at_many)
    except (UserError, ValueError) as refusal:
        return f"refused: {refusal}"
    if many <= 0.05 and (cell.method in CONSISTENCY or many <= max(few / 2, 1.5 * least)):
        return "converges"
    return f"does not converge: {few:.2e} at {at_few}, {many:.2e} at {at_many}"
