"""Order of convergence of every deterministic solver on the probability-flow ODE of a mixture, in float64.

The reference is `d(x / alpha) / d(nsr) = eps` integrated to 1e-12 by DOP853 in the clock log nsr, from lambda = -4 to 3
(lambda = -log nsr), where it is smooth. Grids are even in lambda.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sfumato.diffusion.analytic import MixtureData
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Solver
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES
from .solver_cases import DETERMINISTIC

FIRST, LAST = -4.0, 3.0
STEPS = (20, 40, 80, 160, 320)
MIXTURE = MixtureData(
    torch.tensor([[-0.8, 0.1], [0.7, 0.6], [0.2, -0.9]], dtype=torch.float64), torch.tensor([0.10, 0.15, 0.20])
)


def reference(y: torch.Tensor) -> torch.Tensor:
    """The solution at `LAST` in the coordinates `x / alpha`, from `y` (B, 2) at `FIRST`."""

    def slope(log_nsr: float, flat: np.ndarray) -> np.ndarray:
        nsr = math.exp(log_nsr)
        eps = MIXTURE(torch.from_numpy(flat).reshape(y.shape), NoiseLevel.of(0, 1, nsr)).eps
        return (nsr * eps).flatten().numpy()

    found = solve_ivp(slope, (-FIRST, -LAST), y.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    assert found.success
    return torch.from_numpy(found.y[:, -1]).reshape(y.shape)


def slope_of(method: Solver, name: str) -> tuple[float, list[float]]:
    """Log-log slope of the largest error over `STEPS`, and the errors, relative to the largest coordinate."""
    schedule = SCHEDULES[name]
    z = torch.randn((16, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = z * math.sqrt(1 + math.exp(-2 * FIRST))
    exact, errors = reference(y), []
    for steps in STEPS:
        clock = torch.linspace(-FIRST, -LAST, steps + 1, dtype=torch.float64)
        levels = [schedule.from_nsr(nsr) for nsr in torch.exp(clock)]
        noise = NoiseSource(range(16), (2,), dtype=torch.float64)
        x = sample(MIXTURE, method, y * levels[0].alpha, levels, schedule, noise=noise)
        errors.append(float((x / levels[-1].alpha - exact).abs().max() / exact.abs().max()))
    return float(np.polyfit(np.log(STEPS), -np.log(errors), 1)[0]), errors


@pytest.mark.parametrize("name", ["linear", "ve", "flow"])
@pytest.mark.parametrize("method", DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
def test_order_of_convergence(method: Solver, name: str) -> None:
    slope, errors = slope_of(method, name)
    assert slope >= method.order - 0.15, f"slope {slope:.3f}, errors {errors}"
    assert errors[-1] < errors[0]
