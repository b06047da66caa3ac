"""Grids: which levels a sampler visits, noisy to clean. Pure functions from a schedule and a number of steps.

Every function returns `steps + 1` levels; the last is `end`, by default the clean picture. Discrete spacings work on a
table's indices; on a continuous schedule they space its training density.

>>> from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
>>> schedule = TableSchedule(linear_alpha_bar())
>>> [int(level.t) for level in trailing(schedule, 4)[:-1]]
[999, 749, 499, 249]
>>> [int(level.t) for level in respaced(schedule, "ddim5")[:-1]]
[800, 600, 400, 200, 0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, raise_unknown

Grid = list[NoiseLevel]

_FINITE_NSR = 4096.0  # where a grid in nsr starts if the schedule ends in pure noise: alpha_bar = 2^-24
_SMALL_NSR = 1e-3  # and where it stops if the schedule begins clean


def _levels(schedule: Schedule, times: Sequence[float] | Tensor, end: NoiseLevel) -> Grid:
    return [schedule.level(float(t)) for t in times] + [end]


def _check(schedule: Schedule, steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if schedule.steps is not None and steps > schedule.steps:
        raise UserError(f"steps must be at most the schedule's {schedule.steps}, got {steps}")


def _from_density(schedule: Schedule, u: Tensor, end: NoiseLevel) -> Grid:
    return _levels(schedule, schedule.t_from_uniform(u), end)


def leading(schedule: Schedule, steps: int, *, offset: int = 0, end: NoiseLevel = CLEAN) -> Grid:
    """`t = k (T // steps) + offset`, k = steps-1 … 0: every so-many-th index from the clean end (SD uses offset 1)."""
    _check(schedule, steps)
    if schedule.steps is None:
        return _from_density(schedule, torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps, end)
    stride = schedule.steps // steps
    times = [min(k * stride + offset, schedule.steps - 1) for k in range(steps - 1, -1, -1)]
    return _levels(schedule, times, end)


def trailing(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """`t = round(T - k T / steps) - 1`, k = 0 … steps-1: starts at the noisiest index (Lin 2023, table 2)."""
    _check(schedule, steps)
    if schedule.steps is None:
        return _from_density(schedule, torch.arange(steps, 0, -1, dtype=torch.float64) / steps, end)
    times = [round(schedule.steps - k * schedule.steps / steps) - 1 for k in range(steps)]
    return _levels(schedule, times, end)


def linspace(schedule: Schedule, steps: int, *, round_t: bool = True, end: NoiseLevel = CLEAN) -> Grid:
    """Evenly from the noisiest time to the cleanest, both included; rounded half to even, or fractional."""
    _check(schedule, steps)
    if schedule.steps is None:
        return _from_density(schedule, torch.linspace(1, 0, steps, dtype=torch.float64), end)
    times = torch.linspace(schedule.steps - 1, 0, steps, dtype=torch.float64)
    return _levels(schedule, times.round() if round_t else times, end)


def respaced(schedule: Schedule, spec: str, *, end: NoiseLevel = CLEAN) -> Grid:
    """improved-diffusion's spacing: "250", "ddim50" or "10,15,20" (so many in each equal section, clean to noisy).

    Raises:
        UserError: for a continuous schedule, a spec that cannot be read, or one that does not fit the table.
    """
    if schedule.steps is None:
        raise UserError("respacing needs a schedule with discrete steps")
    times = respaced_times(schedule.steps, spec)
    return _levels(schedule, [float(t) for t in reversed(times)], end)


def respaced_times(total: int, spec: str) -> list[int]:
    """The kept indices of a table of `total` steps, ascending, for a respacing spec (Nichol 2021, section 4)."""
    if spec.startswith("ddim"):
        count = _whole(spec.removeprefix("ddim"), spec)
        for whole in range(1, total):
            if len(range(0, total, whole)) == count:
                return list(range(0, total, whole))
        raise UserError(f"no whole stride gives {count} of {total} steps (spacing {spec!r})")
    counts = [_whole(part, spec) for part in spec.split(",")]
    size, longer = divmod(total, len(counts))
    start = 0
    times: list[int] = []
    for i, count in enumerate(counts):
        section = size + (i < longer)
        if count > section:
            raise UserError(f"spacing {spec!r} asks for {count} steps of a section that has {section}")
        stride = 1.0 if count <= 1 else (section - 1) / (count - 1)
        times += [start + round(k * stride) for k in range(count)]
        start += section
    return times


def _whole(text: str, spec: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"spacing {spec!r} is not understood; write e.g. '250', 'ddim50' or '10,15,20'")
    return int(text)


def nsr_ends(schedule: Schedule) -> tuple[float, float]:
    """The schedule's noise-to-signal range with finite, positive ends, for grids that are spaced in it."""
    low, high = schedule.nsr_range
    return max(low, _SMALL_NSR) if low <= 0 else low, min(high, _FINITE_NSR) if math.isinf(high) else high


def _in_nsr(schedule: Schedule, nsr: Tensor, round_t: bool, end: NoiseLevel) -> Grid:
    levels = [schedule.from_nsr(n) for n in nsr]
    return [schedule.level(level.t.round()) if round_t else level for level in levels] + [end]


def karras(
    schedule: Schedule, steps: int, *, rho: float = 7.0, round_t: bool = False, end: NoiseLevel = CLEAN
) -> Grid:
    """`nsr_i = (max^(1/rho) + i/(steps-1) (min^(1/rho) - max^(1/rho)))^rho` (Karras 2022, eq. 5).

    `round_t` snaps each level to a whole time (diffusers does so for DPM-Solver, not for Euler).
    """
    _check(schedule, steps)
    low, high = nsr_ends(schedule)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    nsr = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _in_nsr(schedule, nsr, round_t, end)


def exponential(schedule: Schedule, steps: int, *, round_t: bool = False, end: NoiseLevel = CLEAN) -> Grid:
    """Evenly in log nsr from the noisiest to the cleanest."""
    _check(schedule, steps)
    low, high = nsr_ends(schedule)
    nsr = torch.exp(torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64))
    return _in_nsr(schedule, nsr, round_t, end)


GRIDS: dict[str, Callable[..., Grid]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
}


def grid(name: str, schedule: Schedule, steps: int) -> Grid:
    """The grid of that name with `steps` steps. Unknown names raise `UserError` with the nearest."""
    folded = name.casefold().strip()
    if folded not in GRIDS:
        raise_unknown("schedule", name, GRIDS)
    return GRIDS[folded](schedule, steps)
