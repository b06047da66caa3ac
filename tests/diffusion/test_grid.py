"""Grids: golden time lists, and what every grid promises on every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from sfumato.diffusion.grid import (
    GRIDS,
    Grid,
    exponential,
    grid,
    karras,
    leading,
    linspace,
    respaced,
    respaced_times,
    trailing,
)
from sfumato.diffusion.level import CLEAN
from sfumato.diffusion.posterior import transition
from sfumato.diffusion.schedule import Schedule, TableSchedule, linear_alpha_bar
from sfumato.errors import UserError

from .diffusion_cases import SCHEDULES

LINEAR, SD = SCHEDULES["linear"], SCHEDULES["scaled_linear"]


def times(levels: Grid) -> list[float]:
    return [float(level.t) for level in levels[:-1]]


# Golden times for T = 1000: pure-Python evaluations of the rules of improved-diffusion's respacing (Nichol 2021), of
# table 2 of Lin 2023 and of NumPy's rounding to even.
GOLDEN: dict[str, tuple[Callable[[Schedule], Grid], list[int]]] = {
    "linspace 10": (partial(linspace, steps=10), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    "linspace 7": (partial(linspace, steps=7), [999, 832, 666, 500, 333, 166, 0]),
    "linspace 25": (
        partial(linspace, steps=25),
        [999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500, 458, 416, 375, 333, 291, 250, 208, 166, 125]
        + [83, 42, 0],
    ),
    "leading 50, offset 1": (partial(leading, steps=50, offset=1), list(range(981, 0, -20))),
    "leading 10, offset 1": (partial(leading, steps=10, offset=1), list(range(901, 0, -100))),
    "trailing 10": (partial(trailing, steps=10), list(range(999, 0, -100))),
    "respaced 10": (partial(respaced, spec="10"), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    "respaced 3,2": (partial(respaced, spec="3,2"), [999, 500, 499, 250, 0]),
    "respaced ddim50": (partial(respaced, spec="ddim50"), list(range(980, -1, -20))),
    "respaced ddim25": (partial(respaced, spec="ddim25"), list(range(960, -1, -40))),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_times(name: str) -> None:
    make, wanted = GOLDEN[name]
    assert times(make(SD)) == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"), [("5", [0, 5, 10, 14, 19]), ("3,2", [0, 4, 9, 10, 19]), ("ddim5", [0, 4, 8, 12, 16])]
)
def test_golden_respacing_of_twenty_steps(spec: str, wanted: list[int]) -> None:
    assert respaced_times(20, spec) == wanted


def test_golden_respaced_process() -> None:
    """improved-diffusion's linear betas for T = 50 (scaled by 1000 / 50), kept at 5 steps: the betas between them."""
    schedule = TableSchedule(linear_alpha_bar(50, start=20 * 1e-4, end=20 * 0.02))
    levels = respaced(schedule, "5")
    assert times(levels) == [49, 37, 24, 12, 0]
    betas = [float(transition(a, b).beta) for a, b in zip(levels, levels[1:], strict=False)]
    assert betas[::-1] == pytest.approx([0.002, 0.494161, 0.863143, 0.977998, 0.994905], abs=1e-6)


def test_golden_karras() -> None:
    """Karras 2022, eq. 5, rho 7, on Stable Diffusion's table."""
    nsr = [float(level.nsr) for level in karras(SD, 5)]
    assert nsr == pytest.approx([14.614641, 4.796535, 1.274100, 0.247950, 0.029167, 0], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 250])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_grids_go_from_noisy_to_clean(schedule: Schedule, name: str, steps: int) -> None:
    levels = grid(name, schedule, steps)
    assert len(levels) == steps + 1 and levels[-1] is CLEAN
    alpha, sigma = (torch.stack([getattr(level, n) for level in levels]) for n in ("alpha", "sigma"))
    assert bool((sigma[1:] * alpha[:-1] < sigma[:-1] * alpha[1:]).all())
    low, high = schedule.t_range
    assert all(low <= float(level.t) <= high for level in levels[:-1])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_which_ends_a_grid_visits(schedule: Schedule) -> None:
    low, high = schedule.nsr_range
    for make in (trailing, linspace, karras, exponential):
        first = make(schedule, 10)[0].nsr
        if math.isinf(high) and make in (karras, exponential):
            assert float(first) == pytest.approx(4096, rel=1e-9)
        else:
            assert float(first) == pytest.approx(high, rel=1e-9)
    for make in (leading, linspace, karras, exponential):
        assert float(make(schedule, 10)[-2].nsr) == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("make", [karras, exponential])
def test_ratios_are_spaced_by_their_rule(make: Callable[[Schedule, int], Grid]) -> None:
    nsr = torch.stack([level.nsr for level in make(SD, 12)[:-1]])
    even = nsr ** (1 / 7) if make is karras else nsr.log()
    steps = even.diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-10)


@pytest.mark.parametrize("make", [karras, exponential])
def test_levels_can_be_snapped_to_whole_times(make: Callable[..., Grid]) -> None:
    exact, snapped = make(SD, 8), make(SD, 8, round_t=True)
    for a, b in zip(exact[:-1], snapped[:-1], strict=True):
        assert float(b.t) == round(float(a.t))
        assert float(b.alpha) == float(SD.level(float(b.t)).alpha)


def test_fractional_linspace() -> None:
    found = times(linspace(LINEAR, 5, round_t=False))
    assert found == pytest.approx([999, 749.25, 499.5, 249.75, 0])


def test_another_end() -> None:
    end = LINEAR.level(0)
    for levels in [*(GRIDS[name](LINEAR, 4, end=end) for name in GRIDS), respaced(LINEAR, "4", end=end)]:
        assert levels[-1] is end and len(levels) == 5


def test_offset_stays_inside_the_table() -> None:
    assert times(leading(LINEAR, 1000, offset=1))[0] == 999


def test_the_whole_table_one_by_one() -> None:
    whole = [float(t) for t in range(999, -1, -1)]
    for levels in (leading(LINEAR, 1000), trailing(LINEAR, 1000), linspace(LINEAR, 1000), respaced(LINEAR, "1000")):
        assert times(levels) == whole


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trailing(LINEAR, 0), "at least 1"),
        (lambda: karras(LINEAR, 1001), "at most the schedule's 1000"),
        (lambda: grid("karas", LINEAR, 10), "did you mean 'karras'"),
        (lambda: respaced(SCHEDULES["flow"], "10"), "discrete steps"),
        (lambda: respaced(LINEAR, "ten"), "not understood"),
        (lambda: respaced(LINEAR, "10,,5"), "not understood"),
        (lambda: respaced(LINEAR, "0"), "not understood"),
        (lambda: respaced(LINEAR, "ddim300"), "no whole stride"),
        (lambda: respaced(LINEAR, "600,10"), "600 steps of a section that has 500"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(call: Callable[[], Grid], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


def test_names_are_forgiving() -> None:
    assert times(grid(" Trailing", LINEAR, 4)) == times(trailing(LINEAR, 4))
