"""Restart sampling: a grid that goes back up through part of its way, again and again.

The sampling loop adds noise wherever a grid goes up, so Restart is nothing but a grid: any solver follows it.

>>> from sfumato.diffusion.grid import karras
>>> from sfumato.diffusion.schedule import VESchedule
>>> schedule = VESchedule()
>>> grid = restart(schedule, karras(schedule, 18), low=0.06, high=0.3, steps=3, repeats=2)
>>> [round(float(level.nsr), 2) for level in grid][13:20]
[0.14, 0.06, 0.3, 0.18, 0.11, 0.06, 0.3]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sfumato.diffusion.grid import Grid, karras, nsr_ends
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError


def restart(
    schedule: Schedule,
    levels: Sequence[NoiseLevel],
    *,
    low: float,
    high: float,
    steps: int,
    repeats: int = 1,
    rho: float = 7.0,
) -> Grid:
    """A grid with a restart interval (Xu 2023, alg. 1): at t_min, up to t_max and down again, `repeats` times.

    t_min is the last level of `levels` whose nsr is nearest `low`. Apply it again, to the result, for a further
    interval.

    Args:
        levels: the main grid, noisy to clean.
        low, high: t_min and t_max in nsr, `0 < low < high`; `high` may lie anywhere the schedule reaches.
        steps: of each way down, >= 1, with the spacing of `karras`.
        repeats: K, >= 1.
        rho: of the spacing.

    Raises:
        UserError: for an interval that is empty, outside the schedule or the grid, or a count below 1.
    """
    if steps < 1 or repeats < 1:
        raise UserError(f"a restart needs at least 1 step and 1 repeat, got {steps} and {repeats}")
    candidates = [i for i, level in enumerate(levels) if not level.is_clean and math.isfinite(float(level.nsr))]
    ratios = [float(levels[i].nsr) for i in candidates]
    if not ratios or not min(ratios) * (1 - 1e-9) <= low <= max(ratios) * (1 + 1e-9):
        reach = f"{min(ratios):.4g} … {max(ratios):.4g}" if ratios else "none"
        raise UserError(f"a restart's low end must lie within the grid's noise-to-signal ratios ({reach}), got {low}")
    at = min(reversed(candidates), key=lambda i: abs(float(levels[i].nsr) - low))
    bottom = float(levels[at].nsr)
    if not bottom < high <= nsr_ends(schedule)[1] * (1 + 1e-9):
        raise UserError(
            f"a restart's high end must lie above its low end ({bottom:.4g}) and within the schedule "
            f"(up to {nsr_ends(schedule)[1]:.4g}), got {high}"
        )
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1]
    inside = (high ** (1 / rho) + ramp * (bottom ** (1 / rho) - high ** (1 / rho))) ** rho
    way = [schedule.from_nsr(nsr) for nsr in inside] + [levels[at]]
    return [*levels[: at + 1], *(way * repeats), *levels[at + 1 :]]


def restart_karras(schedule: Schedule, steps: int) -> Grid:
    """Karras' grid with the restart that A1111 gives its sampler "Restart" (with Heun) for that many steps.

    Below 20 steps none; from 20 on one from 0.1 up to 2 with 9 steps; from 36 on two, of a quarter of the steps each.
    The restart's steps are taken from the main grid's.
    """
    if steps < 20:
        return karras(schedule, steps)
    each, repeats = (steps // 4, 2) if steps >= 36 else (9, 1)
    return restart(schedule, karras(schedule, steps - each * repeats), low=0.1, high=2.0, steps=each, repeats=repeats)
