"""Precision and recall of a set of pictures, and near-copies: who lies how near to whom in a space of features.

>>> import torch
>>> real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
>>> precision_recall(real[:1].repeat(50, 1), real).precision.value
1.0
>>> near_copies(real[:10], real, real + 0.1)[0].value
1.0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation.figures import Figure, share
from sfumato.evaluation.kid import nearest_neighbours

_ROWS = 512


class PrecisionRecall(NamedTuple):
    """Share of the new pictures that lie among the real ones, and of the real ones that lie among the new."""

    precision: Figure
    recall: Figure


def precision_recall(new: Tensor, real: Tensor, k: int = 3, seed: int = 0) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi 2019, arXiv:1904.06991, eqs. 1 and 2).

    A set's ground is the union of the balls around its pictures, each as wide as the distance to the picture's k-th
    nearest other. Both shares depend on the numbers of pictures; compare figures of equal numbers only.

    Args:
        new: features (N, D). real: features (M, D). Both sets have more than k.
        k: neighbours.
        seed: of the bootstrap.

    Raises:
        UserError: too few pictures, unlike shapes, or features that are not finite.
    """
    if k < 1 or min(len(new), len(real)) <= k:
        raise UserError(f"precision and recall with {k} neighbours need more pictures than {len(new)} and {len(real)}")
    return PrecisionRecall(share(_within(new, real, k), seed=seed), share(_within(real, new, k), seed=seed))


def _within(query: Tensor, bank: Tensor, k: int) -> Tensor:
    """Whether each of the query (N, D) lies in a ball of the bank (M, D); bool (N,)."""
    radius = nearest_neighbours(bank, bank, k + 1)[1][:, -1]  # the nearest of all is the picture itself
    found = []
    for part in torch.split(query.to(torch.float64), _ROWS):
        found.append((torch.cdist(part, bank.to(torch.float64)) <= radius * (1 + 1e-12)).any(1))
    return torch.cat(found)


def near_copies(
    new: Tensor, train: Tensor, validation: Tensor, percentile: float = 1.0, seed: int = 0
) -> tuple[Figure, Figure, float]:
    """Share of pictures that lie nearer to a training picture than nearly all real held-out ones do.

    Args:
        new, train, validation: features (N, D), (M, D), (V, D); the last are of real pictures that were not trained on.
        percentile: of their distances to the nearest training picture: what counts as near.
        seed: of the bootstrap.

    Returns:
        (share of the new ones, share of the held-out ones, the distance that counts as near).
    """
    if not 0 < percentile < 100:
        raise UserError(f"percentile must lie between 0 and 100, got {percentile}")
    real = nearest_neighbours(validation, train)[1].flatten()
    near = float(torch.quantile(real, percentile / 100))
    own = nearest_neighbours(new, train)[1].flatten()
    return share(own <= near, seed=seed), share(real <= near, seed=seed), near
