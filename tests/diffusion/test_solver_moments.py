"""Stochastic solvers on Gaussian data: sampled moments against each solver's own recursion, and its convergence.

For `x0 ~ N(m, v)` the optimal denoiser is affine in x, so every step is an affine map plus independent noise:
`x' = A x + B + C z`. Mean and variance then follow `mean' = A mean + B`, `var' = A² var + C²` exactly. The steps are
written here from the papers, in alpha_bar and in the noise-to-signal ratio, not from the solvers' own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.grid import trailing
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Ancestral, Churn, Euler, Heun, Solver
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES

MEAN, VARIANCE, CHURN = 0.6, 0.25, 10.0
N = 50_000  # pixels of one picture: independent, identical, from one stream

Step = Callable[[NoiseLevel, NoiseLevel, int], tuple[float, float, float]]
"""(now, nxt, number of steps) -> (A, B, C)."""


def estimate(alpha: float, sigma: float) -> tuple[float, float]:
    """`E[x0 | x] = p x + q` for the Gaussian data."""
    p = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    return p, MEAN * (1 - p * alpha)


def ddpm(large: bool) -> Step:
    """Ho 2020, algorithm 2 and eq. 7, in the betas of the visited levels."""

    def step(now: NoiseLevel, nxt: NoiseLevel, steps: int) -> tuple[float, float, float]:
        bar, bar_next = float(now.alpha) ** 2, float(nxt.alpha) ** 2
        beta = 1 - bar / bar_next
        c1, c2 = math.sqrt(bar_next) * beta / (1 - bar), math.sqrt(bar / bar_next) * (1 - bar_next) / (1 - bar)
        p, q = estimate(float(now.alpha), float(now.sigma))
        variance = beta if large else beta * (1 - bar_next) / (1 - bar)
        return c1 * p + c2, c1 * q, 0.0 if bar_next == 1 else math.sqrt(variance)

    return step


def ddim(eta: float) -> Step:
    """Song 2021, eq. 12 and 16."""

    def step(now: NoiseLevel, nxt: NoiseLevel, steps: int) -> tuple[float, float, float]:
        alpha, sigma, bar, bar_next = float(now.alpha), float(now.sigma), float(now.alpha) ** 2, float(nxt.alpha) ** 2
        std = eta * math.sqrt((1 - bar_next) / (1 - bar) * (1 - bar / bar_next))
        p, q = estimate(alpha, sigma)
        kept = math.sqrt(1 - bar_next - std**2) / sigma
        return math.sqrt(bar_next) * p + kept * (1 - alpha * p), (math.sqrt(bar_next) - kept * alpha) * q, std

    return step


def churned_euler(now: NoiseLevel, nxt: NoiseLevel, steps: int) -> tuple[float, float, float]:
    """Karras 2022, algorithm 2 without its second-order correction, in `y = x / alpha`."""
    here, there = float(now.nsr), float(nxt.nsr)
    hat = here * (1 + min(CHURN / steps, math.sqrt(2) - 1))
    p, q = estimate(1.0, hat)
    slope = (there - hat) / hat
    a = 1 + slope * (1 - p)
    alpha, alpha_next = float(now.alpha), float(nxt.alpha)
    return a * alpha_next / alpha, -slope * q * alpha_next, a * math.sqrt(hat**2 - here**2) * alpha_next


CASES: dict[str, tuple[Solver, Step]] = {
    "ddpm small": (Ancestral(), ddpm(large=False)),
    "ddpm large": (Ancestral(variance="large"), ddpm(large=True)),
    "ddim eta 0.5": (Euler(eta=0.5), ddim(0.5)),
    "ddim eta 1": (Euler(eta=1.0), ddim(1.0)),
    "euler churn": (Euler(churn=Churn(CHURN)), churned_euler),
}
each = pytest.mark.parametrize("name", CASES)


def recursion(step: Step, levels: Sequence[NoiseLevel], mean: float, variance: float) -> tuple[float, float]:
    for now, nxt in pairwise(levels):
        a, b, c = step(now, nxt, len(levels) - 1)
        mean, variance = a * mean + b, a**2 * variance + c**2
    return mean, variance


@pytest.mark.parametrize("steps", [10, 50, 250])
@each
def test_sampled_moments_are_the_recursion_s(name: str, steps: int) -> None:
    """Within four standard errors, from unit noise to clean on the linear schedule."""
    method, step = CASES[name]
    schedule, noise = SCHEDULES["linear"], NoiseSource([steps], (N,))
    levels = trailing(schedule, steps)
    data = GaussianData(torch.full((N,), MEAN), VARIANCE)
    x = sample(data, method, noise.draw(), levels, schedule, noise=noise)
    mean, variance = recursion(step, levels, 0.0, 1.0)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / N)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / N)


def convergence(step: Step) -> tuple[float, list[float]]:
    """Slope and errors of the recursion's moments against the marginal's, from exact moments at lambda -4 to 3."""
    schedule, errors = SCHEDULES["linear"], []
    counts = (100, 200, 400, 800)
    for steps in counts:
        clock = torch.linspace(4, -3, steps + 1, dtype=torch.float64)
        levels = [schedule.from_nsr(nsr) for nsr in torch.exp(clock)]

        def moments(level: NoiseLevel) -> tuple[float, float]:
            alpha, sigma = float(level.alpha), float(level.sigma)
            return alpha * MEAN, alpha**2 * VARIANCE + sigma**2

        found, wanted = recursion(step, levels, *moments(levels[0])), moments(levels[-1])
        errors.append(max(abs(found[0] / wanted[0] - 1), abs(found[1] / wanted[1] - 1)))
    return float(np.polyfit(np.log(counts), -np.log(errors), 1)[0]), errors


@each
def test_the_recursion_converges_to_the_data_at_first_order(name: str) -> None:
    slope, errors = convergence(CASES[name][1])
    assert 0.85 < slope < 1.15, f"slope {slope:.3f}, errors {errors}"
    assert errors[-1] < 0.05


@pytest.mark.parametrize("method", [Heun(), Heun(churn=Churn(CHURN))], ids=["heun", "heun churn"])
def test_a_second_order_solver_is_near_the_data_itself(method: Solver) -> None:
    """With and without churn, at 250 steps: mean and variance of the data within a percent."""
    schedule, noise = SCHEDULES["linear"], NoiseSource([1], (N,))
    levels = trailing(schedule, 250)
    data = GaussianData(torch.full((N,), MEAN), VARIANCE)
    x = levels[0].noise(data.sample(1, torch.Generator().manual_seed(0)), noise.draw())
    x = sample(data, method, x, levels, schedule, noise=noise)
    assert float(x.mean()) == pytest.approx(MEAN, rel=0.01)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.02)
