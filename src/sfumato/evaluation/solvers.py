"""What each solver's error is for a number of network evaluations: which one to pick for 8, 20 or 50.

Two rulers. The distance from the exact solution of the probability-flow ODE holds a deterministic solver to the very
picture that its noise belongs to. The sliced Wasserstein distance between what is drawn and the data themselves holds
stochastic ones to their distribution too; it needs data that can be drawn exactly, a mixture.

>>> a = torch.randn((500, 2), generator=torch.Generator().manual_seed(0))
>>> round(sliced_wasserstein(a, a + torch.tensor([1.0, 0.0])), 2)
0.64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion import grid as grids
from sfumato.diffusion.analytic import MixtureData
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.grid import Grid
from sfumato.diffusion.guidance import DenoiseFn
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers import SOLVERS, Heun, Method, find
from sfumato.errors import UserError
from sfumato.random import NoiseSource

BUDGETS = (8, 12, 20, 32, 50, 100)
"""Network evaluations at which solvers are compared."""

_FINE = 400  # steps of Heun's method that stand for the exact solution


def mixture() -> MixtureData:
    """Eight narrow modes on a circle and one wide one in the middle, in two dimensions."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    circle = 0.8 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return MixtureData(torch.cat([circle, torch.zeros(1, 2)]), torch.tensor([0.05**2] * 8 + [0.2**2]))


@dataclass(frozen=True)
class Error:
    """One solver at one budget.

    Attributes:
        method: its name. budget: evaluations that were allowed. evaluations: that it made.
        ode: root mean square distance from the exact solution, in units of the data; None for a stochastic solver.
        distribution: sliced Wasserstein distance to the data; None where they cannot be drawn.
    """

    method: str
    budget: int
    evaluations: int
    ode: float | None
    distribution: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Counted:
    """A `DenoiseFn` that counts its calls."""

    denoise: DenoiseFn
    calls: int = field(default=0, init=False)

    def __call__(self, x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        self.calls += 1
        return self.denoise(x_t, level, previous_x0)


class Together(NoiseSource):
    """Noise of many small pictures from one seed: as if they were a single one, which is many times faster.

    Args:
        count: of pictures. shape: of each.
    """

    def __init__(self, seed: int, count: int, shape: Sequence[int]) -> None:
        super().__init__([seed], (count, *shape))

    def draw(self) -> Tensor:
        return super().draw()[0]

    def between(self, u: float, v: float) -> Tensor:
        return super().between(u, v)[0]


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean over directions of the Wasserstein-1 distance of the projections. a, b (N, D), equally many.

    The directions are spread evenly in two dimensions, and drawn with a fixed seed in more.
    """
    if a.shape[1] == 2:
        angles = torch.arange(directions) * (math.pi / directions)
        lines = torch.stack([angles.cos(), angles.sin()])
    else:
        lines = torch.randn((a.shape[1], directions), generator=torch.Generator().manual_seed(0))
        lines = lines / lines.norm(dim=0)
    lines = lines.to(a)
    return float(((a @ lines).sort(dim=0).values - (b @ lines).sort(dim=0).values).abs().mean())


def methods(names: Iterable[str] | None = None) -> list[Method]:
    """The methods of these names, all by default."""
    return list(SOLVERS.values()) if names is None else [find(name)[0] for name in names]


def compare(
    denoise: DenoiseFn,
    schedule: Schedule,
    noise_of: Callable[[], NoiseSource],
    *,
    spacing: str,
    budgets: Sequence[int] = BUDGETS,
    names: Iterable[str] | None = None,
    data: Tensor | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> list[Error]:
    """Every method at every budget, from the same noise; stochastic ones only where there are data to compare with.

    Args:
        denoise: the denoiser, guided or not.
        noise_of: makes the noise source anew, the same each time.
        spacing: the grid, for all methods but those that want one of their own.
        names: methods; None for all.
        data: (B, …) exact draws from the data, as many as the noise has pictures; None if there are none.
        note: told which method is at work.
    """
    exact = exact_solution(denoise, schedule, noise_of(), spacing)
    found = []
    for method in methods(names):
        if method.stochastic and data is None:
            continue  # neither ruler fits
        note(method.title)
        for budget in budgets:
            grid = _grid(method, schedule, spacing, budget)
            if grid is None:
                continue
            counted, noise = Counted(denoise), noise_of()
            x = sample(counted, method.build(), start(noise, grid[0]), grid, schedule, noise=noise)
            ode = None if method.stochastic else float((x - exact).square().mean().sqrt())
            distribution = None if data is None else sliced_wasserstein(x.flatten(1), data.flatten(1))
            found.append(Error(method.name, budget, counted.calls, ode, distribution))
    return found


def exact_solution(denoise: DenoiseFn, schedule: Schedule, noise: NoiseSource, spacing: str) -> Tensor:
    """Where the probability-flow ODE leads from this noise: Heun's method on 400 steps, even in log nsr."""
    first = grids.grid(spacing, schedule, 2)[0]
    low, high = grids.nsr_ends(schedule)
    high = min(high, float(first.nsr))
    clock = torch.linspace(math.log(high), math.log(low), _FINE, dtype=torch.float64)
    levels = [first, *(schedule.from_nsr(nsr) for nsr in torch.exp(clock[1:])), CLEAN]
    return sample(denoise, Heun(), start(noise, first), levels, schedule, noise=noise)


def _grid(method: Method, schedule: Schedule, spacing: str, budget: int) -> Grid | None:
    """A grid on which the method makes about `budget` evaluations; None where the schedule has no such grid."""
    steps = max(1, (budget + method.evaluations - 1) // method.evaluations)
    try:
        return grids.grid(method.schedule or spacing, schedule, steps)
    except UserError:
        return None
