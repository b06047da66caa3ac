"""The whole product of methods, parameterizations, schedules, learned variance and grids, measured without sampling.

On Gaussian data the optimal denoiser is affine, so a whole loop is an affine map of the initial state and of every
noise that it draws. One batch of impulses (a picture of zeros, then one for each unit of noise) gives that map, and
with it the exact mean and variance of what the loop makes: no sampling error, for deterministic and stochastic methods
alike. Brownian noise is resolved into the increments between all times that the method asks for. All parameterizations
go through a loop side by side, each in its own part of the batch. A method that has no use for a learned variance is
given one and ignores it, which is the loop without it too.

The consistency sampler LCM is given the exact consistency function in the place of x0, which is what it expects.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import GRIDS, Grid, grid
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import SOLVERS
from sfumato.errors import UserError

from .diffusion_cases import PARAMETERIZATIONS
from .diffusion_cases import SCHEDULES as ALL_SCHEDULES

MEAN, VARIANCE = 0.6, 0.25
DATA = GaussianData(torch.full((1,), MEAN, dtype=torch.float64), VARIANCE)
FEW, MANY = 16, 64
STEPS_OF = {"lcm": (12, 48)}  # of the grids that have no 64 steps
SPAN = 20.0  # the Brownian path ends there, as the library's own does
EXCEPTIONS = Path(__file__).with_name("product_exceptions.tsv")
FRACTION = 0.3  # of the learned variance, where there is one
SCHEDULES = (
    "linear", "linear, linear interpolation", "scaled_linear", "cosine", "sigmoid", "zero_scaled_linear", "ve", "flow",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way to sample, with every parameterization.

    Attributes:
        method, schedule, grid: names.
        learned: whether the network learns its variance.
    """

    method: str
    schedule: str
    grid: str
    learned: bool = False

    def __str__(self) -> str:
        return " / ".join([self.method, self.schedule, self.grid, *(["learned variance"] if self.learned else [])])


class Impulses:
    """A noise source that draws, for each unit of noise, an impulse in a picture of its own, in `copies` parts.

    A first walk over the loop, in which all noise is 0, counts the draws and collects the times of Brownian noise.
    """

    def __init__(self, copies: int) -> None:
        self.copies, self.draws, self.times = copies, 0, set[float]()
        self.learning, self.drawn, self.ordered = True, 0, list[float]()

    @property
    def part(self) -> int:
        """Pictures of a part in the second walk: zeros, the initial state, the draws, the elementary intervals."""
        return 2 + self.draws + max(0, len(self.times) - 1)

    def replay(self) -> Impulses:
        self.learning, self.drawn, self.ordered = False, 0, sorted(self.times)
        return self

    def draw(self) -> Tensor:
        if self.learning:
            self.draws += 1
            return torch.zeros((self.copies, 1), dtype=torch.float64)
        z = torch.zeros((self.part, 1), dtype=torch.float64)
        z[2 + self.drawn] = 1
        self.drawn += 1
        return z.repeat(self.copies, 1)

    def between(self, u: float, v: float) -> Tensor:
        u, v = (min(max(end, -SPAN), SPAN) for end in (u, v))
        if self.learning:
            self.times |= {u, v}
            return torch.zeros((self.copies, 1), dtype=torch.float64)
        z, (low, high) = torch.zeros((self.part, 1), dtype=torch.float64), sorted((u, v))
        first, last = self.ordered.index(low), self.ordered.index(high)
        ends = torch.tensor(self.ordered[first : last + 1], dtype=torch.float64)
        z[2 + self.draws + first : 2 + self.draws + last, 0] = ends.diff().sqrt()
        return z.repeat(self.copies, 1) / math.copysign(math.sqrt(high - low), v - u)


@cache
def readers(schedule: str, learned: bool) -> dict[str, Denoiser]:
    """Denoisers without a network, of every parameterization that the schedule allows: what reads a raw output."""
    found = {}
    for name, kind in PARAMETERIZATIONS.items():
        try:
            found[name] = Denoiser(torch.nn.Identity(), ALL_SCHEDULES[schedule], kind, learned_variance=learned)
        except ValueError:
            assert name == "eps" and float(ALL_SCHEDULES[schedule].level(ALL_SCHEDULES[schedule].t_range[1]).alpha) == 0
    return found


def oracle(cell: Cell, read_by: Sequence[Denoiser], with_variance: bool) -> Any:
    """What the solver asks: the exact answer as raw outputs, each part's read back by its own denoiser."""

    def answer(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        found = DATA(x_t, level)
        x0, eps = found.x0, found.eps
        if cell.method == "lcm":
            alpha, sigma = float(level.alpha), float(level.sigma)
            x0 = MEAN + math.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)) * (x_t - alpha * MEAN)
            eps = (x_t - alpha * x0) / sigma
        parts = zip(read_by, *(t.chunk(len(read_by)) for t in (x_t, x0, eps)), strict=True)
        read = [r.read(r.parameterization.target(clean, noise, level), x, level) for r, x, clean, noise in parts]
        fraction = torch.full_like(x_t, FRACTION) if with_variance else None
        return Prediction(torch.cat([p.x0 for p in read]), torch.cat([p.eps for p in read]), x0, fraction)

    return answer


def uses_variance(method: str) -> bool:
    """Whether a method, as it is registered, can inject the learned variance."""
    made = SOLVERS[method].build()
    return hasattr(made, "variance") and getattr(made, "eta", 1.0) != 0


def moments(cell: Cell, levels: Grid) -> list[tuple[float, float]]:
    """For every parameterization, mean and standard deviation of what comes from the exact marginal at the start."""
    learned = cell.learned and uses_variance(cell.method)
    solver = SOLVERS[cell.method].build(**({"variance": "learned"} if learned else {}))
    read_by = list(readers(cell.schedule, cell.learned).values())
    ask, noise = oracle(cell, read_by, cell.learned or not uses_variance(cell.method)), Impulses(len(read_by))
    alpha, sigma = float(levels[0].alpha), float(levels[0].sigma)
    path = ALL_SCHEDULES[cell.schedule]
    centre = torch.full((len(read_by), 1), alpha * MEAN, dtype=torch.float64)
    sample(ask, solver, centre, levels, path, noise=noise)  # type: ignore[arg-type]
    x = torch.full((noise.part, 1), alpha * MEAN, dtype=torch.float64)
    x[1] += math.sqrt(alpha**2 * VARIANCE + sigma**2)
    out = sample(ask, solver, x.repeat(len(read_by), 1), levels, path, noise=noise.replay())  # type: ignore[arg-type]
    return [(float(o[0]), float((o[1:] - o[0]).square().sum().sqrt())) for o in out.chunk(len(read_by))]


def error(cell: Cell, steps: int) -> tuple[float, float]:
    """(Wasserstein-2 distance of the clean pictures to the data, what of it no method can avoid on that grid).

    The largest over parameterizations. The second is the bias of the last step, which returns the expected picture at
    the last noisy level and not a draw of it.
    """
    levels = grid(cell.grid, ALL_SCHEDULES[cell.schedule], steps)
    alpha, sigma, data = float(levels[-2].alpha), float(levels[-2].sigma), math.sqrt(VARIANCE)
    least = data * (1 - math.sqrt(alpha**2 * VARIANCE / (alpha**2 * VARIANCE + sigma**2)))
    return max(math.hypot(mean - MEAN, std - data) for mean, std in moments(cell, levels)), least


NOT_AFFINE = {
    "tcd": "its number of steps is no discretisation: a distilled model decides what a step can do",
    "dpm_adaptive": "it chooses its own steps, so a loop is no affine map",
}
"""Methods that this measurement does not fit; their own tests hold them."""


def cells() -> Iterator[Cell]:
    """All of them, each standing for all parameterizations."""
    for method, schedule, spacing in product([m for m in SOLVERS if m not in NOT_AFFINE], SCHEDULES, GRIDS):
        yield Cell(method, schedule, spacing)
        if uses_variance(method):
            yield Cell(method, schedule, spacing, learned=True)


def pairwise_cover() -> list[Cell]:
    """Few cells in which every method meets every grid, and every method and grid every schedule."""
    methods = [m for m in SOLVERS if m not in NOT_AFFINE]
    return [
        Cell(method, SCHEDULES[(i + j) % len(SCHEDULES)], spacing, learned=uses_variance(method) and j % 2 == 1)
        for i, method in enumerate(methods)
        for j, spacing in enumerate(GRIDS)
    ]


def weight(cell: Cell) -> int:
    """How many cells of the product this one stands for: parameterizations, and both variances where one is ignored."""
    return len(readers(cell.schedule, False)) * (1 if uses_variance(cell.method) else 2)


def verdict(cell: Cell) -> str:
    """ "converges", or what stands against it."""
    at_few, at_many = STEPS_OF.get(cell.grid, (FEW, MANY))
    try:
        (few, _), (many, least) = error(cell, at_few), error(cell, at_many)
    except UserError as refusal:
        return f"refused: {refusal}"
    if many <= 0.05 and (cell.method == "lcm" or many <= max(few / 2, 1.5 * least)):
        return "converges"
    return f"does not converge: {few:.2e} at {at_few}, {many:.2e} at {at_many}"


def exceptions() -> dict[str, str]:
    """The published list: cell -> what stands against it."""
    lines = EXCEPTIONS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if line and not line.startswith("#"))


def lines_of(part: int, parts: int) -> Iterator[str]:
    """The list's lines, from every `parts`-th cell."""
    for index, cell in enumerate(cells()):
        if index % parts == part and (found := verdict(cell)) != "converges":
            yield f"{cell}\t{found}"


if __name__ == "__main__":  # `python -m tests.diffusion.product_cases [PART PARTS]`: lines of product_exceptions.tsv
    for one in lines_of(*(int(a) for a in sys.argv[1:] or (0, 1))):
        print(one, flush=True)
