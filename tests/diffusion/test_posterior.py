"""Transitions between levels against Bayes' rule, and the variational bound's terms against their closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from sfumato.diffusion import likelihood
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.posterior import learned_log_variance, renoise, transition
from sfumato.diffusion.schedule import Schedule

from .diffusion_cases import SCHEDULES, TABLES, normals, schedules, time

fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


def apart(schedule: Schedule, cleaner: float, noisier: float) -> tuple[NoiseLevel, NoiseLevel]:
    """Two levels whose ratios differ by a percent at least: nearer ones differ by rounding."""
    now, nxt = schedule.level(time(schedule, noisier)), schedule.level(time(schedule, cleaner))
    assume(float(now.sigma * nxt.alpha) > 1.01 * float(nxt.sigma * now.alpha))
    return now, nxt


@given(schedules(), fractions, st.floats(-3, 3), st.floats(-3, 3))
def test_the_posterior_is_bayes_rule(schedule: Schedule, ends: list[float], x_t: float, x0: float) -> None:
    """Product of two Gaussians, `q(x_s | x0) q(x_t | x_s)`: precisions add, means are weighted by them."""
    now, nxt = apart(schedule, *ends)
    alpha_t, sigma_t, alpha_s, sigma_s = (float(v) for v in (now.alpha, now.sigma, nxt.alpha, nxt.sigma))
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - (ratio * sigma_s) ** 2
    precision = 1 / sigma_s**2 + ratio**2 / beta
    mean = (alpha_s * x0 / sigma_s**2 + ratio * x_t / beta) / precision
    q = transition(now, nxt)
    size = abs(float(q.from_x) * x_t) + abs(float(q.from_x0) * x0)
    assert float(q.beta) == pytest.approx(beta, rel=1e-12)
    assert float(q.variance) == pytest.approx(1 / precision, rel=1e-12)
    assert abs(float(q.from_x) * x_t + float(q.from_x0) * x0 - mean) <= 1e-12 * size


@given(schedules(), fractions)
def test_back_and_forth_leave_the_marginal_as_it_is(schedule: Schedule, ends: list[float]) -> None:
    """Averaged over x_t the posterior is `q(x_s | x0)`; `x_s` sent forward again is `q(x_t | x0)`."""
    now, nxt = apart(schedule, *ends)
    q = transition(now, nxt)
    assert float(q.from_x * now.alpha + q.from_x0) == pytest.approx(float(nxt.alpha), rel=1e-12)
    assert float(q.variance + (q.from_x * now.sigma) ** 2) == pytest.approx(float(nxt.sigma**2), rel=1e-12)
    forward = (now.alpha / nxt.alpha * nxt.sigma) ** 2 + q.beta
    assert float(forward) == pytest.approx(float(now.sigma**2), rel=1e-12)
    assert float(q.variance) <= float(q.beta)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("stride", [1, 20])
def test_ho_s_formulas(name: str, stride: int) -> None:
    """Ho 2020, eq. 6-7, for a table and its respaced copies; written in betas."""
    bar = TABLES[name][::stride].flip(0)
    for bar_t, bar_s in pairwise(bar.tolist()):
        now, nxt = (NoiseLevel.of(0, math.sqrt(b), math.sqrt(1 - b)) for b in (bar_t, bar_s))
        q, beta = transition(now, nxt), 1 - bar_t / bar_s
        scale = 1e-16 / beta * 50 + 1e-12  # 1 - x loses digits where beta is small
        assert float(q.beta) == pytest.approx(beta, rel=scale)
        assert float(q.variance) == pytest.approx(beta * (1 - bar_s) / (1 - bar_t), rel=scale)
        assert float(q.from_x0) == pytest.approx(math.sqrt(bar_s) * beta / (1 - bar_t), rel=scale)
        assert float(q.from_x) == pytest.approx(math.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t), rel=scale)


def test_the_last_step_is_certain() -> None:
    q = transition(SCHEDULES["linear"].level(0), CLEAN)
    assert (float(q.variance), float(q.from_x), float(q.from_x0)) == (0, 0, 1)


def test_a_step_from_pure_noise_forgets_it() -> None:
    flow = SCHEDULES["flow"]
    q, nxt = transition(flow.level(1.0), flow.level(0.25)), flow.level(0.25)
    assert float(q.from_x) == 0 and float(q.from_x0) == float(nxt.alpha) and float(q.variance) == float(nxt.sigma) ** 2


@given(schedules(), st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted))
def test_renoising_composes(schedule: Schedule, ends: list[float]) -> None:
    """Two jumps up have the mean and variance of one."""
    low, middle, high = (schedule.level(time(schedule, f)) for f in ends)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def mean(now: NoiseLevel, nxt: NoiseLevel) -> float:
        return float(renoise(one, now, nxt, zero))

    def std(now: NoiseLevel, nxt: NoiseLevel) -> float:
        return float(renoise(zero, now, nxt, one))

    assume(float(middle.alpha) > 0)
    assert mean(low, middle) * mean(middle, high) == pytest.approx(mean(low, high), rel=1e-12)
    twice = std(low, middle) ** 2 * mean(middle, high) ** 2 + std(middle, high) ** 2
    assert twice == pytest.approx(std(low, high) ** 2, rel=1e-9, abs=1e-12)


def test_renoising_by_less_than_rounding_is_no_change() -> None:
    level = SCHEDULES["linear"].level(300)
    back = NoiseLevel(level.t, level.alpha, level.sigma * (1 - 1e-16))
    x = torch.ones(2, dtype=torch.float64)
    assert bool(torch.isfinite(renoise(x, level, back, x)).all())


def test_renoising_from_clean_is_the_forward_process() -> None:
    x0, z = normals()
    level = SCHEDULES["cosine"].level(700)
    assert torch.allclose(renoise(x0, CLEAN, level, z), level.noise(x0, z), rtol=1e-12)


# --- the bound -------------------------------------------------------------------------------------------------------


def test_kl_and_density_are_those_of_torch() -> None:
    a, b, c, d = normals(4, size=50)
    p, q = Normal(a, torch.exp(b / 2)), Normal(c, torch.exp(d / 2))
    assert torch.allclose(likelihood.gaussian_kl(a, b, c, d), kl_divergence(p, q), rtol=1e-12, atol=1e-13)
    assert torch.allclose(likelihood.gaussian_nll(c, a, b), -p.log_prob(c), rtol=1e-12)


@pytest.mark.parametrize("mean", [-1.3, -0.999, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("std", [0.003, 0.02, 0.5])
def test_bins_share_out_all_probability(mean: float, std: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    at = torch.full_like(x, mean)
    log_var = torch.full_like(x, 2 * math.log(std))
    probability = torch.exp(-likelihood.discretized_nll(x, at, log_var))
    assert float(probability.sum()) == pytest.approx(1, abs=1e-9)
    exact = normal(mean, std**2)
    bins = exact.cdf(x + 1 / 255) - exact.cdf(x - 1 / 255)
    assert torch.allclose(probability[1:-1], bins[1:-1], atol=1e-3)  # the published tanh approximation of the CDF


def test_the_learned_variance_runs_between_its_ends_in_log_space() -> None:
    beta, variance = torch.tensor([0.02]), torch.tensor([0.01])
    found = [float(learned_log_variance(torch.tensor([f]), beta, variance).exp()) for f in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.01, math.sqrt(0.01 * 0.02), 0.02], rel=1e-6)


def normal(mean: float, variance: float) -> Normal:
    return Normal(*torch.tensor([mean, math.sqrt(variance)], dtype=torch.float64))


def bound_of(
    schedule: Schedule, times: list[float], frac: float, error: float, *, continuous: bool = True
) -> torch.Tensor:
    level = schedule.level(torch.tensor(times, dtype=torch.float64))
    x0, eps = (torch.full((len(times), 4), v, dtype=torch.float64) for v in (0.2, -0.5))
    x_t = level.noise(x0, eps)
    guess = Prediction(x0 + error, eps, eps, var_frac=torch.full_like(x0, frac))
    return likelihood.bound_term(guess, x0, x_t, level, schedule, continuous=continuous)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_perfect_model_with_the_posterior_s_variance_pays_nothing_inside(name: str) -> None:
    schedule = SCHEDULES[name]
    times = [float(schedule.t_from_uniform(torch.tensor(u))) for u in (0.1, 0.5, 0.9)]
    assert torch.allclose(bound_of(schedule, times, 0.0, 0.0), torch.zeros(3, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inside_terms_are_the_divergence_in_bits(name: str) -> None:
    schedule = SCHEDULES[name]
    t = float(schedule.t_from_uniform(torch.tensor(0.5)))
    q = transition(schedule.level(t), schedule.previous(torch.tensor(t, dtype=torch.float64)))
    variance = math.exp(0.3 * math.log(float(q.beta)) + 0.7 * math.log(float(q.variance)))
    true, model = normal(0.0, float(q.variance)), normal(float(q.from_x0) * 0.1, variance)
    wanted = float(kl_divergence(true, model)) / math.log(2)
    assert float(bound_of(schedule, [t], 0.3, 0.1)) == pytest.approx(wanted, rel=1e-9)


def test_the_last_term_is_the_picture_s_own_likelihood() -> None:
    """At t = 0: a density, or the bin of an 8-bit value, with the variance between beta_0 and the floor."""
    schedule = SCHEDULES["linear"]
    floor = float(transition(schedule.level(1), schedule.level(0)).variance)
    assert float(likelihood.variance_floor(schedule)) == pytest.approx(floor, rel=1e-12)
    model = normal(0.2 + 0.01, math.sqrt(1e-4 * floor))
    wanted = -float(model.log_prob(torch.tensor(0.2, dtype=torch.float64))) / math.log(2)
    assert float(bound_of(schedule, [0], 0.5, 0.01)) == pytest.approx(wanted, rel=1e-9)
    assert float(bound_of(schedule, [0], 0.5, 0.01, continuous=False)) > 0


def test_a_bound_needs_a_learned_variance() -> None:
    level, x = SCHEDULES["linear"].level(torch.tensor([5])), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="needs a network that outputs one"):
        likelihood.bound_term(Prediction(x, x, x), x, x, level, SCHEDULES["linear"])
