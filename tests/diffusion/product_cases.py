"""The whole product of methods, parameterizations, schedules, learned variance and grids, measured without sampling.

On Gaussian data the optimal denoiser is affine, so a whole loop is an affine map of the initial state and of every
noise that it draws. One batch of impulses (a picture of zeros, then one for each unit of noise) gives that map, and
with it the exact mean and variance of what the loop makes: no sampling error, for deterministic and stochastic methods
alike. Brownian noise is built from impulses as the library builds it from draws, by bridges between the times
asked before. All parameterizations go through a loop side by side, each in its own part of the batch. A method that has
no use for a learned variance is given one and ignores it, which is the loop without it too.

The data have directions of five sizes, those of the five octaves of a picture of 32 x 32 pixels whose power falls with
the square of the frequency, as natural pictures' does (Field 1987): every octave then holds the same share of the
variance, and the variance of one of its modes falls by 4 from each to the next. With a single size the error passes
through 0 at some number of steps, where a coarse grid may look better than a fine one by accident.

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

from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import GRIDS, Grid, grid
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import SOLVERS
from sfumato.errors import UserError

from .diffusion_cases import PARAMETERIZATIONS
from .diffusion_cases import SCHEDULES as ALL_SCHEDULES

MEAN, VARIANCE, OCTAVES = 0.6, 0.25, 5  # of a pixel: pictures from -1 to 1
MODES = 1024  # of a picture of 32 x 32: 1, then 3 * 4^k in octave k
SIZES = torch.tensor([VARIANCE / OCTAVES * MODES / (3 * 4**k) for k in range(OCTAVES)], dtype=torch.float64)
FEW, MANY = 16, 64
FLOOR = 1e-3  # an eighth of a level of an 8-bit picture: what is below it at both has converged before
OPTIONS: dict[str, dict[str, Any]] = {"lcm": {"origin_steps": 100}}  # of its own 50 it cannot take 64
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
    """A noise source that draws, for each unit of noise, an impulse in a picture of its own.

    Pictures come in `copies` parts of `part` each: zeros, the initial state, then one for each draw and Brownian time.
    """

    def __init__(self, copies: int, part: int) -> None:
        self.copies, self.part, self.used = copies, part, 2
        self.path: dict[float, Tensor] = {}

    def new(self) -> Tensor:
        """An impulse that nothing else has, (part,)."""
        z = torch.zeros(self.part, dtype=torch.float64)
        z[self.used] = 1
        self.used += 1
        return z

    def new_path(self) -> None:
        self.path = {}

    def draw(self) -> Tensor:
        return self.pictures(self.new())

    def between(self, u: float, v: float) -> Tensor:
        u, v = (min(max(end, -SPAN), SPAN) for end in (u, v))
        increment = self.at(v) - self.at(u)
        return self.pictures(increment / math.copysign(math.sqrt(abs(v - u)), v - u))

    def at(self, u: float) -> Tensor:
        """The Brownian path at u, (part,): 0 where it is asked for first, then what its neighbours leave open."""
        if u not in self.path:
            below, above = [t for t in self.path if t < u], [t for t in self.path if t > u]
            if below and above:
                a, b = max(below), min(above)
                mean = torch.lerp(self.path[a], self.path[b], (u - a) / (b - a))
                self.path[u] = mean + math.sqrt((u - a) * (b - u) / (b - a)) * self.new()
            elif below or above:
                nearest = max(below) if below else min(above)
                self.path[u] = self.path[nearest] + math.sqrt(abs(u - nearest)) * self.new()
            else:
                self.path[u] = torch.zeros(self.part, dtype=torch.float64)
        return self.path[u]

    def pictures(self, z: Tensor) -> Tensor:
        return z[:, None].expand(-1, OCTAVES).repeat(self.copies, 1)


@cache
def readers(schedule: str, learned: bool) -> dict[str, Denoiser]:
    """Denoisers without a network, of every parameterization: what reads a raw output."""
    path = ALL_SCHEDULES[schedule]
    return {
        name: Denoiser(torch.nn.Identity(), path, kind, learned_variance=learned)
        for name, kind in PARAMETERIZATIONS.items()
    }


def oracle(cell: Cell, read_by: Sequence[Denoiser], with_variance: bool) -> Any:
    """What the solver asks: the exact answer as raw outputs, each part's read back by its own denoiser."""

    def output(reader: Denoiser, x: Tensor, level: NoiseLevel) -> Tensor:
        """Of the exact network, at the level that it is asked at."""
        alpha, sigma = float(level.alpha), float(level.sigma)
        share = SIZES / (alpha**2 * SIZES + sigma**2)
        gain = share.sqrt() if cell.method == "lcm" else alpha * share
        x0 = MEAN + gain * (x - alpha * MEAN)
        return reader.parameterization.target(x0, (x - alpha * x0) / sigma, level)

    def answer(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        parts = zip(read_by, x_t.chunk(len(read_by)), strict=True)
        read = [r.read(output(r, x, r.asked(level)), x, level) for r, x in parts]
        fraction = torch.full_like(x_t, FRACTION) if with_variance else None
        x0, eps, out = (torch.cat([getattr(p, name) for p in read]) for name in ("x0", "eps", "out"))
        return Prediction(x0, eps, out, fraction)

    return answer


def uses_variance(method: str) -> bool:
    """Whether a method, as it is registered, can inject the learned variance."""
    made = SOLVERS[method].build()
    return hasattr(made, "variance") and getattr(made, "eta", 1.0) != 0


def moments(cell: Cell, levels: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """For every parameterization, the means and standard deviations, (OCTAVES,) each, of what comes from the exact
    marginal at the start."""
    learned = cell.learned and uses_variance(cell.method)
    solver = SOLVERS[cell.method].build(**({"variance": "learned"} if learned else {}))
    read_by = list(readers(cell.schedule, cell.learned).values())
    ask = oracle(cell, read_by, cell.learned or not uses_variance(cell.method))
    noise = Impulses(len(read_by), 2 + 2 * len(levels) if SOLVERS[cell.method].stochastic else 2 + len(levels))
    alpha, sigma = float(levels[0].alpha), float(levels[0].sigma)
    x = torch.full((noise.part, OCTAVES), alpha * MEAN, dtype=torch.float64)
    x[1] += torch.sqrt(alpha**2 * SIZES + sigma**2)
    path = ALL_SCHEDULES[cell.schedule]
    out = sample(ask, solver, x.repeat(len(read_by), 1), levels, path, noise=noise)  # type: ignore[arg-type]
    for part in out.chunk(len(read_by)):
        yield part[0], (part[1:] - part[0]).square().sum(0).sqrt()


def error(cell: Cell, steps: int) -> tuple[float, float]:
    """(Wasserstein-2 distance of the clean pictures to the data, what of it no method can avoid on that grid).

    Both as the root mean square of a pixel; the first is the largest over parameterizations. The second is the bias of
    the last step, which returns the expected picture at the last noisy level and not a draw of it.
    """
    levels = grid(cell.grid, ALL_SCHEDULES[cell.schedule], steps, **OPTIONS.get(cell.grid, {}))
    alpha, sigma, data = float(levels[-2].alpha), float(levels[-2].sigma), torch.sqrt(SIZES)
    least = of_a_pixel(torch.zeros(()), alpha * SIZES / torch.sqrt(alpha**2 * SIZES + sigma**2) - data)
    return max(of_a_pixel(mean - MEAN, std - data) for mean, std in moments(cell, levels)), least


def of_a_pixel(mean: Tensor, std: Tensor) -> float:
    """The distance (root mean square) in a pixel of an error in the moments of the octaves, each (OCTAVES,)."""
    return math.hypot(float(mean.square().mean().sqrt()), math.sqrt(VARIANCE * float((std.square() / SIZES).mean())))


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
    try:
        (few, _), (many, least) = error(cell, FEW), error(cell, MANY)
    except UserError as refusal:
        return f"refused: {refusal}"
    if many <= 0.05 and (many <= max(few / 2, 1.5 * least) or max(few, many) <= FLOOR or cell.method == "lcm"):
        return "converges"  # LCM is as good as its network at any number of steps, and has nothing to halve
    return f"does not converge: {few:.2e} at {FEW}, {many:.2e} at {MANY}"


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
