"""Precision, recall and near-copies of sets whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation.coverage import near_copies, precision_recall


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_cover_each_other() -> None:
    x = normal(50, 4)
    found = precision_recall(x, x)
    assert (found.precision.value, found.recall.value) == (1, 1)


def test_disjoint_sets_do_not() -> None:
    found = precision_recall(normal(50, 4), normal(60, 4, 1) + 100)
    assert (found.precision.value, found.recall.value) == (0, 0)


def test_one_mode_of_two() -> None:
    """New pictures in one of two clusters: all of them are right, half of the real ones are met."""
    modes = torch.cat([normal(40, 4), normal(40, 4, 1) + 100])
    found = precision_recall(normal(40, 4), modes)
    assert (found.precision.value, found.recall.value) == (1, 0.5)


def test_on_paper() -> None:
    """One feature, k = 1. Real {0, 1, 10}: radii 1, 1, 9. New {2, 12}: radii 10, 10."""
    real, new = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[2.0], [20.0]])
    found = precision_recall(new, real, k=1)  # 2 is 1 from 1; 20 is 10 from 10
    assert (found.precision.value, found.recall.value) == (0.5, 1)  # 0, 1 and 10 are within 18 of 2


def test_halves_of_one_law() -> None:
    x = normal(800, 2)
    found = precision_recall(x[::2], x[1::2])
    assert min(found.precision.value, found.recall.value) > 0.9 and 0 < found.precision.deviation < 0.05  # type: ignore[operator]


def test_near_copies() -> None:
    """Held-out pictures 1, 2 … 100 away from the training set: the 1 % quantile is 1.99."""
    train = torch.zeros(1, 2)
    held_out = torch.stack([torch.arange(1.0, 101), torch.zeros(100)], 1)
    new = torch.tensor([[0.0, 0.0], [0.0, 1.9], [2.0, 0.0], [0.0, 50.0]])
    rate, real, near = near_copies(new, train, held_out)
    assert (rate.value, real.value) == (0.5, 0.01) and near == pytest.approx(1.99)


def test_refusals() -> None:
    with pytest.raises(UserError, match="need more pictures than 3 and 9"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(UserError, match="percentile must lie between"):
        near_copies(normal(3, 2), normal(3, 2), normal(3, 2), percentile=100)
