"""Distances between two sets of pictures, by way of their features.

KID (Bińkowski et al. 2018, arXiv:1801.01401) is the squared maximum mean discrepancy under a cubic kernel,
with an estimator that has no bias at any number of pictures; two samples of one distribution give 0 on
average, at times a little below. The Fréchet distance (Heusel et al. 2017, arXiv:1706.08500) compares means
and covariances and is biased upwards for few pictures, the more so the more features there are. Nearest
neighbours show copies.

>>> import torch
>>> a, b = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0)).unbind()
>>> same, error = kid(a, b)
>>> shifted, _ = kid(a, b + 1)
>>> abs(same) < 4 * error, shifted > 1
(True, True)
>>> round(frechet_distance(a, a + 2), 6)
16.0
>>> indices, distances = nearest_neighbours(a[7:8], a)
>>> indices.tolist(), distances.tolist()
([[7]], [[0.0]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import UserError

_ROWS = 1024  # of a kernel matrix held at once
_SUBSET = 1000  # pictures in a subset, by default
_ENOUGH = 5 * _SUBSET  # with fewer pictures the subsets overlap so much that their spread misleads


def kid(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    degree: int = 3,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance of two sets: unbiased MMD² with `k(x, y) = (x·y/D + 1)^degree`, in float64.

    `MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean_{i,j} k(a_i, b_j)` (Bińkowski et al.
    2018; the unbiased estimator of Gretton et al. 2012, eq. 3). Usually quoted times 1,000.

    With `subset_size`, or where both sets have 5,000 pictures or more (the size is then 1,000), the result
    is the mean over `subsets` pairs of random subsets, drawn without replacement, and the standard deviation
    over them. Otherwise all pictures enter at once, which wastes none, and the standard deviation is that of
    `subsets` bootstrap resamplings of both sets in which a picture is never compared with itself. It is
    cautious: too large where the distance is near 0. The first deviation is that of one subset and means
    little where a subset is a large part of its set; the second is that of the result. Both ways estimate
    the same number.

    Args:
        features_a: (N, D), N at least 2.
        features_b: (M, D), M at least 2. Time and work grow with (N + M)²; memory does not.
        subsets: number of subsets or resamplings, at least 2.
        subset_size: pictures in each subset, from 2 to min(N, M).
        degree: of the kernel, at least 1.
        seed: of the subsets or resamplings.

    Returns:
        (distance, standard deviation).

    Raises:
        UserError: features of unlike shapes, too few of them, not finite, or a number out of its range.
    """
    a, b = _checked(features_a, features_b, least=2)
    smaller = min(len(a), len(b))
    if subsets < 2 or degree < 1:
        raise UserError(f"kid needs at least 2 subsets and a degree of at least 1; got {subsets}, {degree}")
    if subset_size is not None and not 2 <= subset_size <= smaller:
        raise UserError(f"kid's subset_size must be from 2 to {smaller}, the smaller set; got {subset_size}")
    generator = torch.Generator().manual_seed(seed)
    if subset_size is None and smaller < _ENOUGH:
        return _bootstrapped(a, b, subsets, degree, generator)
    size = _SUBSET if subset_size is None else subset_size
    values = torch.stack(
        [_mmd2(_subset(a, size, generator), _subset(b, size, generator), degree) for _ in range(subsets)]
    )
    return float(values.mean()), float(values.std())


class Reference:
    """One set that many are compared with: `kid` with what it alone decides measured once.

    Args:
        features: (M, D), M at least 2.
        subsets, degree, seed: as of `kid`.
    """

    def __init__(self, features: Tensor, *, subsets: int = 100, degree: int = 3, seed: int = 0) -> None:
        if subsets < 2 or degree < 1:
            raise UserError(f"kid needs at least 2 subsets and a degree of at least 1; got {subsets}, {degree}")
        self.features = _checked(features, features, least=2)[0]
        self.subsets, self.degree, self.seed = subsets, degree, seed
        self._weights = _with_counts(self.features, subsets, torch.Generator().manual_seed(seed))
        self._within = _kernel_mean(self.features, self.features, self._weights, self._weights, degree, distinct=True)

    def kid(self, features: Tensor) -> tuple[float, float]:
        """(distance, standard deviation) of features (N, D), N at least 2; see the function `kid`."""
        if min(len(features), len(self.features)) >= _ENOUGH:
            return kid(features, self.features, subsets=self.subsets, degree=self.degree, seed=self.seed)
        a, b = _checked(features, self.features, least=2)
        weights = _with_counts(a, self.subsets, torch.Generator().manual_seed(self.seed + 1))
        within = _kernel_mean(a, a, weights, weights, self.degree, distinct=True)
        between = _kernel_mean(a, b, weights, self._weights, self.degree, distinct=False)
        values = within + self._within - 2 * between
        return float(values[0]), float(values[1:].std())


def _with_counts(features: Tensor, resamplings: int, generator: torch.Generator) -> Tensor:
    """Weights (1 + resamplings, N) of N features: all alike, then as often as each is drawn in a resampling."""
    return torch.cat([features.new_ones(1, len(features)), _counts(features, resamplings, generator)])


def _subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]


def _mmd2(a: Tensor, b: Tensor, degree: int) -> Tensor:
    """The unbiased estimate from all of `a` (N, D) and `b` (M, D); a scalar."""
    ones_a, ones_b = a.new_ones(1, len(a)), b.new_ones(1, len(b))
    return _weighted_mmd2(a, b, ones_a, ones_b, degree)[0]


def _bootstrapped(
    a: Tensor, b: Tensor, resamplings: int, degree: int, generator: torch.Generator
) -> tuple[float, float]:
    weights = [_with_counts(x, resamplings, generator) for x in (a, b)]
    values = _weighted_mmd2(a, b, weights[0], weights[1], degree)
    return float(values[0]), float(values[1:].std())


def _counts(features: Tensor, resamplings: int, generator: torch.Generator) -> Tensor:
    """How often each of N features is drawn when N are drawn with replacement, (resamplings, N)."""
    n = len(features)
    drawn = torch.randint(n, (resamplings, n), generator=generator)
    counts = torch.zeros(resamplings, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)).to(features.device)


def _weighted_mmd2(a: Tensor, b: Tensor, weights_a: Tensor, weights_b: Tensor, degree: int) -> Tensor:
    """MMD² for R weightings of the pictures, (R,); weights (R, N) and (R, M), 1 for the plain estimate."""
    within_a = _kernel_mean(a, a, weights_a, weights_a, degree, distinct=True)
    within_b = _kernel_mean(b, b, weights_b, weights_b, degree, distinct=True)
    return within_a + within_b - 2 * _kernel_mean(a, b, weights_a, weights_b, degree, distinct=False)


def _kernel_mean(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, degree: int, *, distinct: bool) -> Tensor:
    """Weighted mean of k(x_i, y_j) over all pairs, or over i ≠ j if `distinct`; (R,)."""
    total = x.new_zeros(len(wx))
    weight = wx.sum(1) * wy.sum(1) - ((wx * wy).sum(1) if distinct else 0)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** degree
        if distinct:
            kernel.diagonal(start).zero_()
        total += ((kernel @ wy.T) * wx[:, rows].T).sum(0)
    return total / weight


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets, each taken for a Gaussian with its mean and its unbiased covariance.

    Args:
        features_a: (N, D), N at least 2.
        features_b: (M, D), M at least 2. With fewer than about ten pictures per feature, bias is large.

    Returns:
        The distance, at least 0 up to rounding, in float64.

    Raises:
        UserError: features of unlike shapes, too few of them, or not finite.
    """
    a, b = _checked(features_a, features_b, least=2)
    return frechet_of_gaussians(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """`|m_a - m_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)` (Dowson & Landau 1982), in float64.

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric and positive semi-definite; D = 1 may also be a scalar.
    """
    dim = mean_a.numel()
    s_a, s_b = (cov.to(torch.float64).reshape(dim, dim) for cov in (cov_a, cov_b))
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    apart = (mean_a.to(torch.float64) - mean_b.to(torch.float64)).square().sum()
    return float(apart + s_a.trace() + s_b.trace() - 2 * inner)


def nearest_neighbours(query: Tensor, bank: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest features of a bank for each query, by Euclidean distance.

    Args:
        query: (N, D).
        bank: (M, D).
        count: neighbours to return for each, from 1 to M.

    Returns:
        Indices into the bank, int64 (N, count), and distances, float64 (N, count), nearest first.

    Raises:
        UserError: features of unlike shapes or not finite, an empty set, or `count` out of its range.
    """
    q, b = _checked(query, bank, least=1)
    if not 1 <= count <= len(b):
        raise UserError(f"count must be from 1 to {len(b)}, the size of the bank; got {count}")
    found = [_nearest(q[start : start + _ROWS], b, count) for start in range(0, len(q), _ROWS)]
    return torch.cat([indices for indices, _ in found]), torch.cat([distances for _, distances in found])


def _nearest(query: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rank by `|b|² - 2 q·b`, then measure the few that are kept directly: equal pictures are at 0."""
    indices = (bank.square().sum(1) - 2 * query @ bank.T).topk(count, largest=False).indices
    distances = (query[:, None] - bank[indices]).square().sum(-1).sqrt()
    distances, order = distances.sort(dim=1, stable=True)
    return indices.gather(1, order), distances


def _checked(features_a: Tensor, features_b: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    shapes = f"{tuple(features_a.shape)} and {tuple(features_b.shape)}"
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise UserError(f"expected features of shapes (N, D) and (M, D); got {shapes}")
    if min(len(features_a), len(features_b)) < least:
        raise UserError(f"expected at least {least} pictures in each set; got {shapes}")
    for name, features in (("first", features_a), ("second", features_b)):
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise UserError(f"{bad} of the {len(features)} features of the {name} set are NaN or infinite")
    return features_a.to(torch.float64), features_b.to(features_a.device, torch.float64)
