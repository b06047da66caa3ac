"""Parameterizations: target and solve are inverse on every path, and EDM's is the paper's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion.denoiser import edm_preconditioning, preconditioning
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.parameterization import EPS, FLOW, X0, Parameterization, V, edm, parameterization
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError

from .diffusion_cases import PARAMETERIZATIONS, SCHEDULES, normals, schedules, time

each = pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
kinds = st.sampled_from(sorted(PARAMETERIZATIONS)).map(PARAMETERIZATIONS.__getitem__)


def backward_error(kind: Parameterization, schedule: Schedule, fraction: float, seed: int) -> float:
    """Largest error of (x0, eps) after a round trip, relative to the terms whose difference they are."""
    level, (x0, eps) = schedule.level(time(schedule, fraction)), normals(seed=seed)
    x_t = level.noise(x0, eps)
    found_x0, found_eps = kind.solve(kind.target(x0, eps, level), x_t, level)
    alpha, sigma = float(level.alpha), float(level.sigma)
    terms = (alpha * x0).abs() + (sigma * eps).abs()
    errors = [alpha * (found_x0 - x0), sigma * (found_eps - eps)]
    return max(float((e.abs() / terms).max()) for e in errors)


@given(kinds, schedules(), st.floats(0, 0.999), st.integers(0, 1000))
def test_target_and_solve_are_inverse(kind: Parameterization, schedule: Schedule, fraction: float, seed: int) -> None:
    assert backward_error(kind, schedule, fraction, seed) < 1e-12


@given(kinds, schedules(), st.floats(0.05, 0.7), st.integers(0, 1000))
def test_the_round_trip_is_exact_where_it_is_well_conditioned(
    kind: Parameterization, schedule: Schedule, fraction: float, seed: int
) -> None:
    level, (x0, eps) = schedule.level(time(schedule, fraction)), normals(seed=seed)
    found = kind.solve(kind.target(x0, eps, level), level.noise(x0, eps), level)
    assert torch.allclose(found[0], x0, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found[1], eps, rtol=1e-12, atol=1e-12)


@given(kinds, schedules(), st.floats(0, 0.999), st.integers(0, 1000))
def test_whatever_the_network_says_the_pair_explains_x_t(
    kind: Parameterization, schedule: Schedule, fraction: float, seed: int
) -> None:
    """`alpha x0 + sigma eps = x_t` and `a x0 + b eps = out`, for any output."""
    level, (x_t, out) = schedule.level(time(schedule, fraction)), normals(seed=seed)
    x0, eps = kind.solve(out, x_t, level)
    size = (level.alpha * x0).abs() + (level.sigma * eps).abs() + x_t.abs()
    assert bool(((level.noise(x0, eps) - x_t).abs() <= 1e-12 * size).all())
    a, b = kind.coefficients(level)
    size = (a * x0).abs() + (b * eps).abs() + out.abs()
    assert bool(((kind.target(x0, eps, level) - out).abs() <= 1e-12 * size).all())


@pytest.mark.parametrize("name", ["zero_linear", "zero_scaled_linear", "flow"])
@each
def test_pure_noise(kind: Parameterization, name: str) -> None:
    """Where alpha = 0 everything but eps still determines x0."""
    level, (x0, eps) = SCHEDULES[name].level(SCHEDULES[name].t_range[1]), normals()
    out = kind.target(x0, eps, level)
    if kind is EPS:
        with pytest.raises(ValueError, match="cannot recover x0 where alpha = 0"):
            kind.solve(out, eps, level)
        return
    found = kind.solve(out, level.noise(x0, eps), level)
    assert torch.allclose(found[0], x0, rtol=1e-12) and torch.allclose(found[1], eps, rtol=1e-12)


@each
def test_a_clean_level_gives_x0_back(kind: Parameterization) -> None:
    x0, eps = normals()
    found_x0, found_eps = kind.solve(kind.target(x0, eps, CLEAN), x0, CLEAN)
    assert torch.allclose(found_x0, x0, rtol=1e-12)
    if kind is X0:
        assert torch.equal(found_eps, torch.zeros_like(eps))
    else:
        assert torch.allclose(found_eps, eps, rtol=1e-12)


@each
def test_levels_per_picture_mix_clean_and_noisy(kind: Parameterization) -> None:
    level = NoiseLevel(*torch.tensor([[0.0, 500.0], [1.0, 0.6], [0.0, 0.8]], dtype=torch.float64))
    x0, eps = (z.reshape(2, 1, 3) for z in normals(size=6))
    found_x0, _ = kind.solve(kind.target(x0, eps, level), level.noise(x0, eps), level)
    assert torch.allclose(found_x0, x0, rtol=1e-12)


@each
def test_single_precision_stays_single(kind: Parameterization) -> None:
    x0, eps = (z.float() for z in normals())
    level = NoiseLevel.of(0, 0.6, 0.8)
    out = kind.target(x0, eps, level)
    assert out.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in kind.solve(out, level.noise(x0, eps), level))


@given(st.floats(1e-3, 1e3), st.floats(0.1, 2.0), st.floats(1e-2, 1))
def test_edm_is_the_paper_s(nsr: float, sigma_data: float, alpha: float) -> None:
    """Karras 2022, table 1: `D(x) = c_skip x + c_out F(c_in x; c_noise)` in coordinates `x / alpha`, on any path."""
    level = NoiseLevel.of(0, alpha, alpha * nsr)
    square = nsr**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / square, nsr * sigma_data / math.sqrt(square), 1 / math.sqrt(square)
    x_ve, out = normals()
    x0, _ = edm(sigma_data).solve(out, alpha * x_ve, level)
    assert torch.allclose(x0, c_skip * x_ve + c_out * out, rtol=1e-12, atol=1e-12)
    shown = edm_preconditioning(sigma_data)
    assert torch.allclose(shown.scale(level) * alpha * x_ve, c_in * x_ve, rtol=1e-12)
    assert float(shown.time(level)) == pytest.approx(math.log(nsr) / 4, abs=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(0.1, 2.0))
def test_edm_s_plain_loss_is_the_paper_s_weighted_one(nsr: float, sigma_data: float) -> None:
    """`lambda(sigma) c_out² = 1`: an error of F by d is one of D by c_out d, and the paper weighs it by 1 / c_out²."""
    level, kind = NoiseLevel.of(0, 1, nsr), edm(sigma_data)
    x_t, out = normals()
    change = kind.solve(out + 1, x_t, level)[0] - kind.solve(out, x_t, level)[0]
    weight = (nsr**2 + sigma_data**2) / (nsr * sigma_data) ** 2
    assert torch.allclose(weight * change**2, torch.ones_like(change), rtol=1e-9)


def test_edm_s_inputs_and_targets_have_unit_variance() -> None:
    """For data of standard deviation sigma_data, at every level: `a² sigma_data² + b² = 1`, `c_in² Var x_t = 1`."""
    for schedule in SCHEDULES.values():
        level = schedule.level(time(schedule, 0.4))
        a, b = edm(0.5).coefficients(level)
        assert float(a**2 * 0.25 + b**2) == pytest.approx(1, rel=1e-12)
        scale = edm_preconditioning(0.5).scale(level)
        assert float(scale**2 * (level.alpha**2 * 0.25 + level.sigma**2)) == pytest.approx(1, rel=1e-12)


def test_edm_of_unit_data_on_a_preserving_path_is_minus_v() -> None:
    level, (x0, eps) = SCHEDULES["linear"].level(400), normals()
    assert torch.allclose(edm(1.0).target(x0, eps, level), -V.target(x0, eps, level), rtol=1e-12)


def test_definitions() -> None:
    level, (x0, eps) = NoiseLevel.of(0, 0.6, 0.8), normals()
    assert torch.equal(EPS.target(x0, eps, level), eps)
    assert torch.equal(X0.target(x0, eps, level), x0)
    assert torch.allclose(V.target(x0, eps, level), 0.6 * eps - 0.8 * x0)
    assert torch.allclose(FLOW.target(x0, eps, level), eps - x0)


def test_golden_v_and_x0_of_stable_diffusion() -> None:
    """One scalar at t = 801 of the scaled-linear table, x_t = 1 and eps = 0.5: pure-Python float64, six digits."""
    level = SCHEDULES["scaled_linear"].level(801)
    one, half = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 0.5))
    x0, eps = EPS.solve(half, one, level)
    assert float(x0) == pytest.approx(2.663691, abs=1e-6)
    assert float(V.target(x0, eps, level)) == pytest.approx(-2.518978, abs=1e-6)


def test_names() -> None:
    assert all(parameterization(name).name == name for name in PARAMETERIZATIONS)
    assert all(preconditioning(name).name == name for name in ("time", "time_1000", "signal", "edm"))
    with pytest.raises(UserError, match="did you mean 'flow'"):
        parameterization("flwo")
    with pytest.raises(UserError, match="did you mean 'signal'"):
        preconditioning("sginal")
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        edm(0)


@pytest.mark.parametrize(("name", "t", "told"), [("time", 7.5, 7.5), ("time_1000", 0.25, 250), ("signal", 0, 0.6)])
def test_what_the_network_is_told(name: str, t: float, told: float) -> None:
    shown, level = preconditioning(name), NoiseLevel.of(t, 0.6, 0.8)
    assert shown.scale is None and float(shown.time(level)) == told


def test_an_output_that_tells_nothing_at_a_noisy_level_is_refused() -> None:
    """`x_t` itself, say: it is no estimate of anything; at a clean level it is the picture."""
    x, same = torch.ones(2, 2), Parameterization("xt", lambda alpha, sigma: (alpha, sigma))
    with pytest.raises(ValueError, match="at a noisy level"):
        same.solve(x, x, NoiseLevel.of(0, 0.6, 0.8))
    assert torch.equal(same.solve(x, x, CLEAN)[0], x)
