"""Restart's grid, and that following it keeps the distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.grid import Grid, karras, trailing
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.restart import restart, restart_karras
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import VESchedule
from sfumato.diffusion.solvers import Heun, solver
from sfumato.errors import UserError
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES

VE = VESchedule()


def climbs(grid: Grid) -> list[tuple[float, float]]:
    return [(float(a.nsr), float(b.nsr)) for a, b in pairwise(grid) if float(b.nsr) > float(a.nsr)]


@pytest.mark.parametrize("name", ["linear", "zero_linear", "ve", "flow"])
@pytest.mark.parametrize(("steps", "repeats"), [(1, 1), (3, 2), (5, 4)])
def test_the_main_grid_is_kept_and_the_interval_repeated(name: str, steps: int, repeats: int) -> None:
    schedule = SCHEDULES[name]
    main = trailing(schedule, 20)
    grid = restart(schedule, main, low=0.5, high=3.0, steps=steps, repeats=repeats)
    at = min(range(20), key=lambda i: abs(float(main[i].nsr) - 0.5))
    assert grid[: at + 1] == main[: at + 1] and grid[len(grid) - (20 - at) :] == main[at + 1 :]
    middle = grid[at + 1 : len(grid) - (20 - at)]
    assert len(middle) == repeats * (steps + 1)
    bottom = float(main[at].nsr)
    for k in range(repeats):
        way = middle[k * (steps + 1) : (k + 1) * (steps + 1)]
        wanted = [(3 ** (1 / 7) + i / steps * (bottom ** (1 / 7) - 3 ** (1 / 7))) ** 7 for i in range(steps + 1)]
        assert [float(level.nsr) for level in way] == pytest.approx(wanted, rel=1e-9)
        assert way[-1] is main[at]
    assert climbs(grid) == [(bottom, pytest.approx(3.0))] * repeats


def test_intervals_compose() -> None:
    main = karras(VE, 18)
    grid = restart(VE, restart(VE, main, low=1.0, high=5.0, steps=4), low=0.05, high=0.3, steps=3, repeats=2)
    assert [round(high, 6) for _, high in climbs(grid)] == [5.0, 0.3, 0.3]
    assert len(grid) == 19 + 5 + 2 * 4


def test_the_grid_of_the_sampler_called_restart() -> None:
    assert climbs(restart_karras(VE, 19)) == [] and len(restart_karras(VE, 19)) == 20
    for steps, each, repeats in ((20, 9, 1), (35, 9, 1), (36, 9, 2), (50, 12, 2)):
        grid = restart_karras(VE, steps)
        assert len(grid) == 1 + steps + repeats  # as many steps, and the ways up
        assert [high for _, high in climbs(grid)] == [pytest.approx(2.0)] * repeats
        assert sum(1 for level in grid if float(level.nsr) == pytest.approx(2.0)) >= repeats
        assert each * repeats < steps


@pytest.mark.parametrize("name", ["linear", "ve", "flow"])
def test_following_it_keeps_the_distribution(name: str) -> None:
    """Up and down through the interval four times: mean and variance stay the data's, each climb has its own noise."""
    schedule, n = SCHEDULES[name], 20_000
    main = [schedule.from_nsr(s) for s in torch.exp(torch.linspace(math.log(20), math.log(0.02), 60).double())]
    grid = restart(schedule, main, low=0.1, high=2.0, steps=40, repeats=4)
    noise, data = NoiseSource([0], (n,)), GaussianData(torch.full((n,), 0.6), 0.25)
    counted: list[int] = []
    source = noise.draw
    noise.draw = lambda: (counted.append(1), source())[1]  # type: ignore[method-assign]
    x = main[0].noise(data.sample(1, torch.Generator().manual_seed(0)), source())
    end: NoiseLevel = grid[-1]
    x = sample(data, Heun(), x, grid, schedule, noise=noise) / end.alpha
    assert len(counted) == 4
    variance = 0.25 + float(end.nsr) ** 2
    assert abs(float(x.mean()) - 0.6) < 4 * math.sqrt(variance / n) + 0.003
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) + 0.02)


def test_brownian_noise_is_new_each_time_through_the_interval() -> None:
    """With the same increments on every way down the pictures would spread too far."""
    schedule, n = SCHEDULES["ve"], 20_000
    main = [schedule.from_nsr(s) for s in torch.exp(torch.linspace(math.log(20), math.log(0.02), 80).double())]
    grid = restart(schedule, main, low=0.1, high=2.0, steps=40, repeats=4)
    noise, data = NoiseSource([0], (n,)), GaussianData(torch.full((n,), 0.6), 0.25)
    x = main[0].noise(data.sample(1, torch.Generator().manual_seed(0)), noise.draw())
    x = sample(data, solver("dpmpp_2m_sde"), x, grid, schedule, noise=noise)
    variance = 0.25 + float(grid[-1].nsr) ** 2
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) + 0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"repeats": 0}, "at least 1 step and 1 repeat"),
        ({"low": 1e-6}, "within the grid's"),
        ({"low": 200.0}, "within the grid's"),
        ({"high": 0.01}, "above its low end"),
        ({"high": 500.0}, "within the schedule"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        restart(VE, karras(VE, 18), **{"low": 0.1, "high": 2.0, "steps": 3, **options})  # type: ignore[arg-type]
