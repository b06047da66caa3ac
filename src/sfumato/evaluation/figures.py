"""A measured number and how much the choice of pictures matters to it.

>>> import torch
>>> share(torch.tensor([True, True, False, True])).value
0.75
>>> print(Figure(0.75, 0.2), Figure(3.0))
0.75 ± 0.2 3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.random import derived_seed

RESAMPLINGS = 1000


@dataclass(frozen=True)
class Figure:
    """A number with its standard deviation over bootstrap resamplings of the pictures; None where that says nothing."""

    value: float
    deviation: float | None = None

    def __str__(self) -> str:
        spread = f" ± {self.deviation:.2g}" if self.deviation is not None else ""
        return f"{self.value:.4g}{spread}"

    def times(self, factor: float) -> Figure:
        """In another unit."""
        return Figure(self.value * factor, None if self.deviation is None else self.deviation * factor)

    def json(self) -> dict[str, Any]:
        """As JSON values; null for what is not finite, such as the PSNR of equal pictures."""
        values = {"value": self.value, "deviation": self.deviation}
        return {name: x if x is not None and math.isfinite(x) else None for name, x in values.items()}


def mean(values: Tensor, groups: Sequence[str] | None = None, seed: int = 0) -> Figure:
    """The mean of a number that was measured for each picture.

    Args:
        values: (N,), N at least 1.
        groups: of each picture; those of one group stand or fall together (drawings of one caption), so whole groups
            are resampled. None for pictures of their own.
        seed: of the resamplings.
    """
    values = values.to(torch.float64)
    return Figure(float(values.mean()), deviation(values, groups, seed))


def share(hits: Tensor, groups: Sequence[str] | None = None, seed: int = 0) -> Figure:
    """The share of pictures for which something is true; arguments as of `mean`, hits bool (N,)."""
    return mean(hits.to(torch.float64), groups, seed)


def deviation(values: Tensor, groups: Sequence[str] | None = None, seed: int = 0) -> float | None:
    """Standard deviation of the mean of values (N,) over resamplings; None for one picture or group, or infinity."""
    sums, counts = values.to(torch.float64), torch.ones(len(values), dtype=torch.float64)
    if groups is not None:
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        rows = torch.tensor([names[name] for name in groups])
        counts = torch.zeros(len(names), dtype=torch.float64).index_add_(0, rows, counts)
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, rows, sums)
    if len(sums) < 2:
        return None
    drawn = resamplings(len(sums), RESAMPLINGS, seed)
    found = float(torch.stack([sums[rows].sum() / counts[rows].sum() for rows in drawn]).std())
    return found if math.isfinite(found) else None


def bootstrapped(statistic: Callable[[Tensor], float], count: int, times: int = 100, seed: int = 0) -> float:
    """Standard deviation of a statistic over resamplings of `count` pictures; it is told their rows (count,)."""
    found = [statistic(rows) for rows in resamplings(count, times, seed)]
    return float(torch.tensor(found, dtype=torch.float64).std())


def resamplings(count: int, times: int, seed: int) -> list[Tensor]:
    """`times` draws with replacement of `count` rows out of as many."""
    generator = torch.Generator().manual_seed(derived_seed("bootstrap", seed))
    return [torch.randint(count, (count,), generator=generator) for _ in range(times)]
