"""Quantiles of the Beta distribution."""

from __future__ import annotations

import pytest
import torch

from sfumato.diffusion.beta import beta_quantile
from sfumato.errors import UserError


def test_against_scipy() -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert float(beta_quantile(torch.tensor([1e-9]), 1.0, 1.0)) == pytest.approx(1e-9)
    p = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-4, 1 - 1e-4])])
    for a, b in [(0.6, 0.6), (0.5, 2.0), (3.0, 1.2), (1.0, 1.0)]:
        wanted = torch.from_numpy(scipy.beta.ppf(p.numpy(), a, b))
        assert float((beta_quantile(p, a, b) - wanted).abs().max()) < 1e-14


def test_closed_forms() -> None:
    """The arcsine law, and `F = 1 - (1 - x)^b` of a = 1."""
    p = torch.linspace(0, 1, 41, dtype=torch.float64)
    assert torch.allclose(beta_quantile(p, 0.5, 0.5), torch.sin(torch.pi / 2 * p) ** 2, rtol=0, atol=1e-13)
    assert torch.allclose(beta_quantile(p, 1.0, 3.0), 1 - (1 - p) ** (1 / 3), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, -2.0)])
def test_parameters_are_positive(alpha: float, beta: float) -> None:
    with pytest.raises(UserError, match="positive parameters"):
        beta_quantile(torch.zeros(1), alpha, beta)
