"""Every solver with every parameterization, schedule, learned variance and grid: what converges, and what does not.

A cell converges when its error at 64 steps is at most half that at 16, and at most 0.05, in units of pictures that run
from -1 to 1. Three more count, all within 0.05 at 64: where most of what is left is the bias of the grid's last step,
which no method can avoid; where both errors are below 0.001, an eighth of a level of an 8-bit picture, so that it has
converged before 16; and LCM, whose number of steps is no discretisation. `product_exceptions.tsv` lists the cells that
do not, with their errors: mostly SDE methods of several steps on grids whose last step is a jump (linspace, leading),
and first-order stochastic methods on grids that are dense at one end, which need more than 64 steps to be within 0.05.
Parameterizations go side by side (`product_cases`).
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sfumato.diffusion.grid import GRIDS
from sfumato.diffusion.solvers import SOLVERS

from .product_cases import (
    NOT_AFFINE,
    SCHEDULES,
    Cell,
    cells,
    error,
    exceptions,
    pairwise_cover,
    verdict,
    weight,
)


def check(chosen: list[Cell]) -> None:
    """Measure, print the counts, and hold every cell against the published list."""
    listed, wrong, counts = exceptions(), [], {"converges": 0, "listed": 0}
    for cell in chosen:
        found = verdict(cell)
        counts["converges" if found == "converges" else "listed"] += weight(cell)
        if (found != "converges") != (str(cell) in listed):
            wrong.append(f"{cell}: {found}")
    total = sum(counts.values())
    print(f"\n{total:,} cells: {counts['converges']:,} converge, {counts['listed']:,} are listed exceptions")
    assert not wrong, wrong


def test_a_cover_of_all_pairs() -> None:
    cover = pairwise_cover()
    methods = [m for m in SOLVERS if m not in NOT_AFFINE]
    assert {(c.method, c.grid) for c in cover} == set(product(methods, GRIDS))
    assert {(c.method, c.schedule) for c in cover} == set(product(methods, SCHEDULES))
    assert {(c.grid, c.schedule) for c in cover} == set(product(GRIDS, SCHEDULES))
    check(cover)


@pytest.mark.slow
def test_the_whole_product() -> None:
    check(list(cells()))


@pytest.mark.parametrize("learned", [False, True])
def test_the_measure_sees_an_error(learned: bool) -> None:
    """Euler's error in the moments of Gaussian data, against draws."""
    cell = Cell("ddpm" if learned else "euler", "cosine", "trailing", learned)
    few, many = error(cell, 8)[0], error(cell, 128)[0]
    assert many < few / 8 and few > 0.01
    assert torch.isfinite(torch.tensor([few, many])).all()
