"""The assignment problem against scipy, and what training does with it."""

from __future__ import annotations

import pytest
import torch

from sfumato.diffusion.assignment import assign
from sfumato.diffusion.objective import Objective

optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("kind", ["real", "ties", "negative"])
def test_the_cost_is_the_least(n: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(n)
    cost = torch.rand((n, n), generator=generator, dtype=torch.float64)
    cost = (4 * cost).floor() if kind == "ties" else cost - 0.5 if kind == "negative" else cost
    found = assign(cost)
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(n))
    rows, columns = optimize.linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(n), found].sum().item() == pytest.approx(cost[rows, columns].sum().item(), abs=1e-9)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3), torch.full((2, 2), float("nan"))])
def test_other_costs_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="square matrix of finite costs"):
        assign(bad)


def test_immiscible_noise_is_the_same_noise_nearer() -> None:
    x0 = torch.randn((12, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    plain = Objective().noise(x0, torch.Generator().manual_seed(1))
    near = Objective(immiscible=True).noise(x0, torch.Generator().manual_seed(1))
    order = assign(torch.cdist(x0.flatten(1), plain.flatten(1)))
    assert torch.equal(near, plain[order])
    apart, nearer = ((x0 - noise).flatten(1).norm(dim=1).sum() for noise in (plain, near))
    assert float(nearer) < float(apart)


def test_offset_noise_moves_whole_channels() -> None:
    x0 = torch.zeros((400, 2, 3, 3))
    plain = Objective().noise(x0, torch.Generator().manual_seed(1))
    moved = Objective(offset_noise=0.5).noise(x0, torch.Generator().manual_seed(1)) - plain
    assert torch.allclose(moved, moved[..., :1, :1].expand_as(moved), atol=1e-6)
    assert float(moved[..., 0, 0].std()) == pytest.approx(0.5, rel=0.1)
    given = Objective(offset_noise=0.5).noise(x0, torch.Generator().manual_seed(1), eps=plain)
    assert not torch.equal(given, plain) and float((given - plain)[..., 0, 0].std()) == pytest.approx(0.5, rel=0.1)
    video = Objective(offset_noise=0.5).noise(torch.zeros(1, 2, 3, 4, 4), torch.Generator().manual_seed(1))
    assert video.shape == (1, 2, 3, 4, 4)
