"""Stochastic solvers on Gaussian data: sampled moments against each solver's own recursion, and its convergence.

For `x0 ~ N(m, v)` the optimal denoiser is affine in x, so every step is an affine map plus independent noise:
`x' = A x + B + C z`. Mean and variance then follow `mean' = A mean + B`, `var' = A² var + C²` exactly. A method that
remembers estimates is affine in them too: there the state is a vector, with a covariance matrix. The steps are written
here from the papers, in alpha_bar and in the noise-to-signal ratio, not from the solvers' own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.grid import trailing
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Ancestral, Churn, Euler, Heun, Solver
from sfumato.diffusion.solvers.consistency import LCM, TCD
from sfumato.diffusion.solvers.dpm2 import DPM2Ancestral
from sfumato.diffusion.solvers.dpm_adaptive import DPMFast
from sfumato.diffusion.solvers.dpmpp_ancestral import DPMpp2SAncestral
from sfumato.diffusion.solvers.dpmpp_sde import DPMppMultistepSDE, DPMppSDE, SDEDPMSolver
from sfumato.diffusion.solvers.euler_ancestral import EulerAncestral
from sfumato.diffusion.solvers.sa_solver import SASolver
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


# --- methods with several estimates, in y = x / alpha and sigma = nsr ------------------------------------------------
#
# A row says how a quantity depends on (y, the corrected y before, its noise, three remembered estimates, 1, z, z').

Row = np.ndarray
Y, BASE, LAST, M1, M2, M3, ONE, Z, Z2 = np.eye(9)
STATE = 6
Rows = tuple[list[Row], float]
"""The new state, and the correlation of z and z'."""
Method = Callable[[Sequence[NoiseLevel], int], Rows]
"""(levels, number of this step) -> rows; 0 is the first step."""


def seen(row: Row, sigma: float) -> Row:
    """`E[x0 | y]`."""
    p = VARIANCE / (VARIANCE + sigma**2)
    return p * row + MEAN * (1 - p) * ONE


def ends_of(levels: Sequence[NoiseLevel], i: int) -> tuple[float, float]:
    return float(levels[i].nsr), float(levels[i + 1].nsr)


def up_and_down(sigma: float, to: float, eta: float = 1.0) -> tuple[float, float]:
    up = min(to, eta * to * math.sqrt(1 - (to / sigma) ** 2))
    return math.sqrt(to**2 - up**2), up


def pulled(row: Row, x0: Row, sigma: float, to: float) -> Row:
    return to / sigma * row + (1 - to / sigma) * x0


def euler_a(levels: Sequence[NoiseLevel], i: int) -> Rows:
    sigma, to = ends_of(levels, i)
    down, up = up_and_down(sigma, to)
    return [Y + (down - sigma) * (Y - seen(Y, sigma)) / sigma + up * Z], 0.0


def two_stage(midpoint_of_slopes: bool) -> Method:
    """DPM2 ancestral and DPM++ 2S ancestral: the inner level is the geometric mean of sigma and sigma_down."""

    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        if to == 0:
            return [seen(Y, sigma)], 0.0
        down, up = up_and_down(sigma, to)
        middle = math.sqrt(sigma * down)
        inner = pulled(Y, seen(Y, sigma), sigma, middle)
        if midpoint_of_slopes:
            return [Y + (down - sigma) * (inner - seen(inner, middle)) / middle + up * Z], 0.0
        return [pulled(Y, seen(inner, middle), sigma, down) + up * Z], 0.0

    return step


def dpmpp_sde(correlation: float) -> Method:
    """r = 1/2. Brownian increments of nested intervals correlate with the root of their lengths' ratio in log sigma."""

    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        if to == 0:
            return [seen(Y, sigma)], 0.0
        middle = math.sqrt(sigma * to)
        down, up = up_and_down(sigma, middle)
        inner = pulled(Y, seen(Y, sigma), sigma, down) + up * Z
        down, up = up_and_down(sigma, to)
        return [pulled(Y, seen(inner, middle), sigma, down) + up * Z2], correlation

    return step


def multistep_sde(points: int, heun: bool) -> Method:
    """k-diffusion's 2M and 3M SDE with eta = 1."""

    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        m0 = seen(Y, sigma)
        if to == 0:
            return [m0], 0.0
        before = range(i - 1, max(i - 3, -1), -1)
        h, old = math.log(sigma / to), [math.log(float(levels[j].nsr / levels[j + 1].nsr)) for j in before]
        big = 2 * h
        end = to / sigma * math.exp(-h) * Y + (1 - math.exp(-big)) * m0 + to * math.sqrt(1 - math.exp(-big)) * Z
        phi2 = 1 - (1 - math.exp(-big)) / big
        if i and (i == 1 or points == 2):
            end = end + (phi2 if heun else (1 - math.exp(-big)) / 2) * (m0 - M1) * h / old[0]
        elif i and points == 3:
            d10, d11 = (m0 - M1) * h / old[0], (M1 - M2) * h / old[1]
            d2 = (d10 - d11) / ((old[0] + old[1]) / h)
            end = end + phi2 * (d10 + old[0] / h * d2) - (phi2 / big - 0.5) * d2
        return [end, BASE, LAST, m0, M1], 0.0

    return step


def sde_of_the_noise(levels: Sequence[NoiseLevel], i: int) -> Rows:
    """SDE-DPM-Solver-2M, midpoint; what is remembered are estimates of the noise."""
    sigma, to = ends_of(levels, i)
    e0 = (Y - seen(Y, sigma)) / sigma
    if to == 0:
        return [seen(Y, sigma)], 0.0
    d1 = (e0 - M1) * math.log(sigma / to) / math.log(float(levels[i - 1].nsr) / sigma) if i else 0 * Y
    return [Y - 2 * (sigma - to) * (e0 + d1 / 2) + math.sqrt(sigma**2 - to**2) * Z, BASE, LAST, e0], 0.0


def dpm_fast(levels: Sequence[NoiseLevel], i: int) -> Rows:
    """Lu 2022, algorithms 1 and 2, down to sigma_down; never below the last level that is not clean."""
    sigma, to = ends_of(levels, i)
    order = {len(levels) - 2: 1, len(levels) - 3: 2}.get(i, 3)
    eps = (Y - seen(Y, sigma)) / sigma
    if to == 0:
        return [seen(Y, sigma)], 0.0
    down = max(up_and_down(sigma, to)[0], float(levels[-1].nsr) or float(levels[-2].nsr))
    h = math.log(sigma / down)

    def difference(r: float, row: Row) -> Row:
        level = sigma * math.exp(-r * h)
        return (row - seen(row, level)) / level - eps

    def early(r: float) -> Row:
        return Y + (sigma * math.exp(-r * h) - sigma) * eps

    if order == 1:
        end = Y + (down - sigma) * eps
    elif order == 2:
        end = Y + (down - sigma) * (eps + difference(0.5, early(0.5)))
    else:
        s2, phi = sigma * math.exp(-2 / 3 * h), math.expm1(2 / 3 * h) / (2 / 3 * h) - 1
        inner = early(2 / 3) - 2 * s2 * phi * difference(1 / 3, early(1 / 3))
        end = Y + (down - sigma) * eps - 1.5 * down * (math.expm1(h) / h - 1) * difference(2 / 3, inner)
    return [end + math.sqrt(max(to**2 - down**2, 0)) * Z], 0.0


NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)


def sa_weights(h: float, at: list[float], tau: float) -> np.ndarray:
    """Integrals over [-h, 0] of `(1 + tau²) e^((1 + tau²) v) l_i(v)` by quadrature, and the authors' extra term."""
    c, v = 1 + tau**2, (NODES - 1) * h / 2
    kernel = c * np.exp(c * v) * WEIGHTS * h / 2
    found = []
    for i, node in enumerate(at):
        others = at[:i] + at[i + 1 :]
        found.append(float((kernel * np.prod([(v - o) / (node - o) for o in others], axis=0)).sum()))
    if len(at) == 2:
        extra = c * (h**2 / 2 - (c * h - 1 + math.exp(-c * h)) / c**2) / (at[0] - at[1])
        found = [found[0] + extra, found[1] - extra]
    return np.array(found)


def sa_solver(predictor: int, corrector: int, low: float, high: float) -> Method:
    """Xue 2023 with tau = 1 for t in [low, high] and 0 outside, lower order at the end."""

    def adams(row: Row, z: Row, levels: Sequence[NoiseLevel], i: int, order: int, known: list[Row], first: int) -> Row:
        """The step from level i to the next with estimates at the levels first, first - 1, …"""
        sigma, to = ends_of(levels, i)
        tau, h = float(low <= float(levels[i].t) <= high), math.log(sigma / to)
        at = [math.log(to / float(levels[first - k].nsr)) for k in range(order)]
        pulls = sa_weights(h, at, tau) @ np.array(known[:order])
        return to / sigma * math.exp(-(tau**2) * h) * row + pulls + to * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * z

    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        m0, count = seen(Y, sigma), len(levels) - 1
        known = [m0, M1, M2, M3]
        here = Y
        if i:
            here = adams(BASE, LAST, levels, i - 1, min(corrector, count - i + 2, i + 1), known, i)
        if to == 0:
            return [m0], 0.0
        end = adams(here, Z, levels, i, min(predictor, count - i, i + 1), known, i)
        return [end, here, Z, m0, M1, M2], 0.0

    return step


def exact(row: Row, sigma: float) -> Row:
    """The consistency function: the end of the probability flow's trajectory through y."""
    shrink = math.sqrt(VARIANCE / (VARIANCE + sigma**2))
    return shrink * row + MEAN * (1 - shrink) * ONE


def lcm(scaled: bool) -> Method:
    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        f, time = exact(Y, sigma), 10 * float(levels[i].t)
        if scaled:
            total = time**2 + 0.25
            f = 0.25 / total * float(levels[i].alpha) * Y + time / math.sqrt(total) * f
        return [f + to * Z], 0.0

    return step


def tcd(gamma: float) -> Method:
    def step(levels: Sequence[NoiseLevel], i: int) -> Rows:
        sigma, to = ends_of(levels, i)
        f = exact(Y, sigma)
        if to == 0:
            return [f], 0.0
        below = float(SCHEDULES["linear"].level(math.floor((1 - gamma) * float(levels[i + 1].t))).nsr)
        return [f + below / sigma * (Y - f) + math.sqrt(to**2 - below**2) * Z], 0.0

    return step


CLOSED: dict[str, tuple[Solver, Method]] = {
    "euler ancestral": (EulerAncestral(), euler_a),
    "dpm 2 ancestral": (DPM2Ancestral(), two_stage(True)),
    "dpm++ 2s ancestral": (DPMpp2SAncestral(), two_stage(False)),
    "dpm++ sde": (DPMppSDE(), dpmpp_sde(math.sqrt(0.5))),
    "dpm++ sde, fresh": (DPMppSDE(increments="fresh"), dpmpp_sde(0.0)),
    "dpm++ 2m sde": (DPMppMultistepSDE(), multistep_sde(2, heun=False)),
    "dpm++ 2m sde heun": (DPMppMultistepSDE(kind="heun"), multistep_sde(2, heun=True)),
    "dpm++ 3m sde": (DPMppMultistepSDE(3, "heun"), multistep_sde(3, heun=True)),
    "sde-dpm-solver": (SDEDPMSolver(), sde_of_the_noise),
    "dpm fast, eta 1": (DPMFast(eta=1.0), dpm_fast),
    "sa-solver": (SASolver(), sa_solver(2, 2, 200, 800)),
    "sa-solver 3, 4": (SASolver(3, 4, interval=(0.0, 1.0)), sa_solver(3, 4, 0, 1000)),
}
CONSISTENT: dict[str, tuple[Solver, Method]] = {
    "lcm": (LCM(), lcm(True)),
    "lcm, unscaled": (LCM(scaling=None), lcm(False)),
    "tcd": (TCD(), tcd(0.3)),
    "tcd, gamma 1": (TCD(1.0), tcd(1.0)),
    "tcd, gamma 0": (TCD(0.0), tcd(0.0)),
}


def closed_form(method: Method, levels: Sequence[NoiseLevel], mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of y at the last level, from those of y at the first."""
    means, cov = np.zeros(STATE), np.zeros((STATE, STATE))
    means[0], cov[0, 0] = mean, variance
    for i in range(len(levels) - 1):
        rows, correlation = method(levels, i)
        all_rows = np.array([*rows, *np.zeros((STATE - len(rows), 9))])
        f, b, g = all_rows[:, :STATE], all_rows[:, STATE], all_rows[:, STATE + 1 :]
        means = f @ means + b
        cov = f @ cov @ f.T + g @ np.array([[1, correlation], [correlation, 1]]) @ g.T
    return float(means[0]), float(cov[0, 0])


def consistency_function(x: torch.Tensor, level: NoiseLevel, previous: torch.Tensor | None) -> Prediction:
    """The exact one of the Gaussian data, in `x0`'s place."""
    shrink = math.sqrt(VARIANCE / (VARIANCE + float(level.nsr) ** 2))
    x0 = MEAN + shrink * (x / level.alpha - MEAN)
    return Prediction(x0, (x - level.alpha * x0) / level.sigma, x0)


def assert_moments(solver: Solver, method: Method, denoise: Callable, steps: int) -> None:
    schedule, noise = SCHEDULES["linear"], NoiseSource([steps], (N,))
    levels = trailing(schedule, steps)
    x = sample(denoise, solver, noise.draw(), levels, schedule, noise=noise)
    mean, variance = closed_form(method, levels, 0.0, float(1 / levels[0].alpha**2))
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / N)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / N)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", CLOSED)
def test_sampled_moments_are_the_closed_form_s(name: str, steps: int) -> None:
    """Within four standard errors. DPM adaptive is not here: it chooses its steps by what it sees."""
    assert_moments(*CLOSED[name], GaussianData(torch.full((N,), MEAN), VARIANCE), steps)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("name", CONSISTENT)
def test_consistency_samplers_on_the_exact_function(name: str, steps: int) -> None:
    assert_moments(*CONSISTENT[name], consistency_function, steps)


def test_lcm_on_the_exact_function_returns_the_data_and_on_the_denoiser_does_not() -> None:
    """From exact noise, any number of steps. On the optimal denoiser eight steps keep a third of the variance."""
    levels = trailing(SCHEDULES["linear"], 8)
    start = MEAN, VARIANCE + float(levels[0].nsr) ** 2
    assert closed_form(lcm(False), levels, *start) == pytest.approx((MEAN, VARIANCE), rel=1e-9)
    noise = NoiseSource([3], (N,))
    data = GaussianData(torch.full((N,), MEAN), VARIANCE)
    x = sample(data, LCM(), noise.draw(), levels, SCHEDULES["linear"], noise=noise)
    assert 0.2 < float(x.var()) / VARIANCE < 0.5


@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_form_converges_to_the_data(name: str) -> None:
    """From exact moments at lambda -4 to 3, at first order at least."""
    schedule, errors, counts = SCHEDULES["linear"], [], (50, 100, 200, 400)
    for steps in counts:
        clock = torch.linspace(4, -3, steps + 1, dtype=torch.float64)
        levels = [schedule.from_nsr(nsr) for nsr in torch.exp(clock)]
        first, last = float(levels[0].nsr), float(levels[-1].nsr)
        mean, variance = closed_form(CLOSED[name][1], levels, MEAN, VARIANCE + first**2)
        errors.append(max(abs(mean / MEAN - 1), abs(variance / (VARIANCE + last**2) - 1)))
    slope = float(np.polyfit(np.log(counts), -np.log(errors), 1)[0])
    assert slope > 0.85 and errors[-1] < 0.05, f"slope {slope:.3f}, errors {errors}"
