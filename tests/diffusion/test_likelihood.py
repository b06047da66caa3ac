"""The variational bound and the probability flow's likelihood, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.analytic import GaussianData, MixtureData
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.grid import nsr_ends
from sfumato.diffusion.guidance import DenoiseFn
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.likelihood import Bound, bound, bound_term, chain, prior_term
from sfumato.diffusion.probability_flow import BIN, dequantize, flow_density
from sfumato.diffusion.schedule import FlowSchedule, Schedule, TableSchedule, VESchedule, linear_alpha_bar
from sfumato.errors import UserError
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES

MEAN, VARIANCE = 0.3, 0.25
NODES = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.float64)  # Gauss-Hermite: exact to degree five
WEIGHTS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)


class Fixed:
    """A noise source that always draws the same."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def draw(self) -> Tensor:
        return self.value


def with_variance(denoise: DenoiseFn, frac: float) -> DenoiseFn:
    def denoise_with(x_t: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        p = denoise(x_t, level, previous)
        return Prediction(p.x0, p.eps, p.out, var_frac=torch.full_like(p.x0, frac))

    return denoise_with


def expected(levels: Any, variance: Any = "small", frac: float = 0.0) -> tuple[Bound, Tensor]:
    """The bound of N(MEAN, VARIANCE) at nine points (x0, eps), and their weights: with them it is the expectation
    exactly, since each term is quadratic (Gauss-Hermite)."""
    x0 = (MEAN + math.sqrt(VARIANCE) * NODES).repeat_interleave(3)[:, None]
    data = with_variance(GaussianData(torch.full((1,), MEAN, dtype=torch.float64), VARIANCE), frac)
    found = bound(data, x0, levels, Fixed(NODES.repeat(3)[:, None]), variance=variance, continuous=True)
    return found, WEIGHTS.repeat_interleave(3) * WEIGHTS.repeat(3)


def closed_form(now: NoiseLevel, nxt: NoiseLevel, floor: float, variance: str, frac: float) -> float:
    """The expected term of one dimension of N(MEAN, VARIANCE), bits: written in Ho's alpha_bar-free way by hand."""
    a, s, a2, s2 = (float(v) for v in (now.alpha, now.sigma, nxt.alpha, nxt.sigma))
    beta = s**2 - (a / a2 * s2) ** 2
    left = VARIANCE * s**2 / (a**2 * VARIANCE + s**2)  # variance of x0 given x_t
    tilde = s2**2 * beta / s**2 if s2 else floor
    large = beta if s2 else floor
    model = {"small": tilde, "large": large, "learned": tilde ** (1 - frac) * beta**frac}[variance]
    if s2 == 0:  # the decoder: a density
        return 0.5 * (math.log(2 * math.pi * model) + left / model) / math.log(2)
    off = (a2 * beta / s**2) ** 2 * left
    return 0.5 * (math.log(model / tilde) - 1 + (tilde + off) / model) / math.log(2)


KINDS = [("small", 0.0), ("large", 0.0), ("learned", 0.3)]
CHAINS = [(name, 20, *kind) for name in SCHEDULES for kind in KINDS]
CHAINS += [(name, None, *KINDS[i % 3]) for i, name in enumerate(["linear", "cosine", "ve", "flow", "zero_linear"])]


@pytest.mark.parametrize(("name", "spec", "variance", "frac"), CHAINS)
def test_every_term_of_gaussian_data_has_its_closed_form(
    name: str, spec: int | None, variance: Any, frac: float
) -> None:
    levels = chain(SCHEDULES[name], spec)
    found, weights = expected(levels, variance, frac)
    mean = (found.terms * weights[:, None]).sum(0)
    tilde = [float(s2**2 * (1 - (a / a2 * s2 / s) ** 2)) for a, s, a2, s2 in [numbers(levels[-3], levels[-2])]]
    wanted = [closed_form(now, nxt, tilde[0], variance, frac) for now, nxt in pairwise(levels)]
    assert float((mean - torch.tensor(wanted, dtype=torch.float64)).abs().max()) < 1e-6
    a, s = float(levels[0].alpha), float(levels[0].sigma)
    total = a**2 + s**2
    prior = 0.5 * (math.log(total / s**2) - 1 + (s**2 + a**2 * (MEAN**2 + VARIANCE)) / total) / math.log(2)
    assert float((found.prior * weights).sum()) == pytest.approx(prior, abs=1e-6)
    assert torch.equal(found.total, found.terms.sum(1) + found.prior)
    assert torch.equal(found.decoder, found.terms[:, -1])
    left = [VARIANCE / (float(now.alpha / now.sigma) ** 2 * VARIANCE + 1) for now in levels[:-1]]
    errors = (found.x0_mse * weights[:, None]).sum(0)
    assert torch.allclose(errors, torch.tensor(left, dtype=torch.float64), rtol=1e-9)


def numbers(now: NoiseLevel, nxt: NoiseLevel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return now.alpha, now.sigma, nxt.alpha, nxt.sigma


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_more_steps_bring_the_bound_down_towards_the_entropy(name: str) -> None:
    """A model with fixed variances pays for its steps even where it knows the data."""
    totals = []
    for spec in ("10", "50", "250", None):
        found, weights = expected(chain(SCHEDULES[name], spec))
        totals.append(float((found.total * weights).sum()))
    print(totals)
    assert totals == sorted(totals, reverse=True)
    assert 0.1 < totals[-1] - 0.5 * math.log2(2 * math.pi * math.e * VARIANCE) < 0.9


@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "flow"])
def test_the_training_s_term_is_the_chain_s(name: str) -> None:
    """`bound_term` at each picture's own level against `bound`, on the chain that training knows."""
    schedule = SCHEDULES[name]
    data = with_variance(GaussianData(torch.full((4,), MEAN, dtype=torch.float64), VARIANCE), 0.4)
    u = torch.tensor([0.2505, 0.7505], dtype=torch.float64)
    level = schedule.level(schedule.t_from_uniform(u))
    nxt = schedule.previous(level.t)
    x0, eps = torch.rand((2, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    x_t = level.noise(x0, eps.double())
    found = bound_term(data(x_t, level, None), x0, x_t, level, schedule, continuous=True)
    for i in range(2):
        steps = [NoiseLevel(v.t[i], v.alpha[i], v.sigma[i]) for v in (level, nxt)]
        one = bound(data, x0[i : i + 1], [*steps, CLEAN], Fixed(eps[i : i + 1]), variance="learned", continuous=True)
        assert float(one.terms[0, 0]) == pytest.approx(float(found[i]), rel=1e-9)


def test_a_picture_s_bound_does_not_depend_on_its_batch() -> None:
    data, levels = GaussianData(torch.zeros(1, 2, 2), 0.5), chain(SCHEDULES["cosine"], 10)
    x0 = torch.arange(8).reshape(2, 1, 2, 2) / 127.5 - 1
    both = bound(data, x0, levels, NoiseSource([3, 4], (1, 2, 2)))
    alone = bound(data, x0[1:], levels, NoiseSource([4], (1, 2, 2)))
    assert torch.equal(both.terms[1], alone.terms[0]) and torch.equal(both.prior[1:], alone.prior)


def test_pure_noise_has_no_prior_term() -> None:
    assert float(prior_term(torch.ones(1, 3), SCHEDULES["flow"].level(1.0))) == 0
    assert float(prior_term(torch.ones(1, 3), SCHEDULES["zero_linear"].level(999))) == 0


def test_chains() -> None:
    table = TableSchedule(linear_alpha_bar(100, 1e-3, 0.2))
    assert [int(level.t) for level in chain(table)[:-1]] == list(range(99, -1, -1))
    assert [int(level.t) for level in chain(table, "ddim5")[:-1]] == [80, 60, 40, 20, 0]
    assert [int(level.t) for level in chain(table, 3)[:-1]] == [99, 50, 0]
    assert len(chain(FlowSchedule())) == 1001 and float(chain(FlowSchedule(), 5)[-2].t) == 1e-3
    assert all(levels[-1].is_clean for levels in (chain(table), chain(VESchedule(), 7)))
    for schedule, spec, words in (
        (table, 1, "at least 2 steps"),
        (table, 101, "101 steps of a section that has 100"),
        (table, "many", "is not understood"),
        (FlowSchedule(), "ddim5", "needs a schedule with discrete steps"),
    ):
        with pytest.raises(UserError, match=words):
            chain(schedule, spec)


def test_bounds_that_cannot_be_had_are_refused() -> None:
    data, x0, noise = GaussianData(torch.zeros(2), 1.0), torch.zeros(1, 2), NoiseSource([0], (2,))
    levels = chain(SCHEDULES["linear"], 5)
    with pytest.raises(UserError, match="has no learned variance"):
        bound(data, x0, levels, noise, variance="learned")
    with pytest.raises(UserError, match="unknown variance 'samll' .did you mean 'small'"):
        bound(data, x0, levels, noise, variance="samll")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends clean"):
        bound(data, x0, levels[:-1], noise)


# --- the probability flow --------------------------------------------------------------------------------------------

PATHS = ["linear", "scaled_linear", "cosine", "sigmoid", "zero_linear", "ve", "flow", "flow, shift 3"]
WIDE = (1e-4, 1e4)  # where the path has become the data at one end and pure noise at the other

GAUSSIAN = GaussianData(torch.linspace(-0.5, 0.5, 6, dtype=torch.float64), VARIANCE)
MIXTURE = MixtureData(
    torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64),
    torch.tensor([0.04, 0.09, 0.05], dtype=torch.float64),
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
)


def gaussian_bits(x: Tensor) -> Tensor:
    nats = 0.5 * ((x - GAUSSIAN.mean) ** 2 / VARIANCE + math.log(2 * math.pi * VARIANCE))
    return nats.mean(1) / math.log(2)


def mixture_bits(x: Tensor, blur: float = 0.0) -> Tensor:
    total = MIXTURE.variances + blur**2
    square = ((x[:, None] - MIXTURE.means) ** 2).sum(-1)
    logs = torch.log(MIXTURE.weights) - square / (2 * total) - torch.log(2 * math.pi * total)
    return -torch.logsumexp(logs, 1) / (2 * math.log(2))


def points(data: Any, n: int = 24) -> Tensor:
    return data.sample(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PATHS)
def test_the_flow_s_density_is_the_exact_one(name: str) -> None:
    for data, bits in ((GAUSSIAN, gaussian_bits), (MIXTURE, mixture_bits)):
        x = points(data)
        found = flow_density(data, x, SCHEDULES[name], divergence="exact", ends=WIDE)
        error = float((found.bits_per_dim() - bits(x)).abs().max())
        print(f"{name}, {type(data).__name__}: {error:.1e} bits/dim in {found.evaluations} evaluations")
        assert error < 1e-3


def carried(schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of the model of GAUSSIAN, and where x goes: its flow is linear, from N(0, 1 + nsr²) to the data."""
    low, high = nsr_ends(schedule)
    stretch = (VARIANCE + high**2) / (VARIANCE + low**2)
    end = GAUSSIAN.mean + (x - GAUSSIAN.mean) * math.sqrt(stretch)
    nats = 0.5 * (end**2 / (1 + high**2) + math.log(2 * math.pi * (1 + high**2)) - math.log(stretch))
    return -nats.sum(1), end / math.sqrt(1 + high**2)


@pytest.mark.parametrize("name", PATHS)
def test_between_the_schedule_s_own_ends_it_is_the_model_s(name: str) -> None:
    schedule, x = SCHEDULES[name], points(GAUSSIAN)
    found = flow_density(GAUSSIAN, x, schedule, divergence="exact")
    log_density, latent = carried(schedule, x)
    assert float((found.log_density - log_density).abs().max()) / (6 * math.log(2)) < 1e-4
    assert torch.allclose(found.latent, latent, atol=1e-3)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_s_estimate_has_no_bias(kind: Any) -> None:
    """The same picture many times, each with a probe of its own."""
    n, x = 1000, points(MIXTURE, 2)
    for i in range(2):
        many = x[i : i + 1].expand(n, -1).clone()
        noise = NoiseSource(range(n), (2,), dtype=torch.float64)
        found = flow_density(MIXTURE, many, SCHEDULES["cosine"], divergence=kind, noise=noise, steps=12)
        exact = flow_density(MIXTURE, x[i : i + 1], SCHEDULES["cosine"], divergence="exact", steps=12)
        error = float(found.log_density.std()) / math.sqrt(n)
        assert abs(float(found.log_density.mean() - exact.log_density)) < 4 * error + 1e-9


def test_rademacher_probes_are_exact_where_directions_do_not_mix() -> None:
    x, noise = points(GAUSSIAN, 3), NoiseSource(range(3), (6,), dtype=torch.float64)
    exact = flow_density(GAUSSIAN, x, SCHEDULES["linear"], divergence="exact")
    found = flow_density(GAUSSIAN, x, SCHEDULES["linear"], noise=noise)
    assert torch.allclose(found.log_density, exact.log_density, atol=1e-9)


def test_more_probes_scatter_less() -> None:
    def spread(probes: int) -> float:
        noise = NoiseSource(range(400), (2,), dtype=torch.float64)
        many = points(MIXTURE, 1).expand(400, -1).clone()
        found = flow_density(MIXTURE, many, SCHEDULES["cosine"], noise=noise, probes=probes, steps=15)
        return float(found.log_density.std())

    assert spread(8) < 0.5 * spread(1)


def test_fixed_steps_are_of_fifth_order() -> None:
    x, schedule = points(GAUSSIAN), FlowSchedule()
    exact, errors = carried(schedule, x)[0], []
    for steps in (25, 50):
        found = flow_density(GAUSSIAN, x, schedule, divergence="exact", steps=steps)
        assert found.evaluations == 6 * steps + 1
        errors.append(float((found.log_density - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 4.5


def test_a_tighter_tolerance_is_nearer() -> None:
    x = points(GAUSSIAN)
    exact, errors, asked = carried(SCHEDULES["cosine"], x)[0], [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = flow_density(GAUSSIAN, x, SCHEDULES["cosine"], divergence="exact", tolerance=tolerance)
        errors.append(float((found.log_density - exact).abs().max()))
        asked.append(found.evaluations)
    assert errors == sorted(errors, reverse=True) and asked == sorted(asked) and errors[-1] < 1e-4


def test_dequantized_pictures_stay_in_their_bins() -> None:
    x0 = torch.tensor([0.0, 127.0, 255.0]).expand(500, 3) / 127.5 - 1
    spread = (dequantize(x0, NoiseSource(range(500), (3,))) - x0) / BIN
    assert float(spread.abs().max()) <= 0.5 + 1e-4
    assert abs(float(spread.mean())) < 4 / math.sqrt(12 * 1500)
    assert float(spread.var()) == pytest.approx(1 / 12, rel=0.1)


def test_bits_of_bins_and_of_densities() -> None:
    """A standard normal in one dimension, whose bin at 0 has the probability `BIN / sqrt(2 pi)`."""
    data, x = GaussianData(torch.zeros(1, dtype=torch.float64), 1.0), torch.zeros(1, 1, dtype=torch.float64)
    found = flow_density(data, x, VESchedule(), divergence="exact")
    assert float(found.bits_per_dim()) == pytest.approx(0.5 * math.log2(2 * math.pi), abs=1e-3)
    assert float(found.bits_per_dim(bins=True)) == pytest.approx(-math.log2(BIN / math.sqrt(2 * math.pi)), abs=1e-3)


def test_float32_pictures_and_no_gradients_left() -> None:
    x = points(GAUSSIAN, 4)
    exact = flow_density(GAUSSIAN, x, SCHEDULES["linear"], divergence="exact")
    found = flow_density(GAUSSIAN, x.float(), SCHEDULES["linear"], divergence="exact", tolerance=1e-4)
    assert torch.allclose(found.log_density, exact.log_density, atol=3e-3)
    assert not found.log_density.requires_grad and not found.latent.requires_grad
    assert found.latent.dtype == torch.float32 and found.log_density.dtype == torch.float64


def test_densities_that_cannot_be_had_are_refused() -> None:
    x, cosine = torch.zeros(1, 2), SCHEDULES["cosine"]
    noise = NoiseSource([0], (2,))
    with pytest.raises(UserError, match="unknown divergence 'exakt' .did you mean 'exact'"):
        flow_density(MIXTURE, x, cosine, divergence="exakt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a noise source"):
        flow_density(MIXTURE, x, cosine)
    for options in ({"probes": 0}, {"steps": 0}, {"tolerance": 0.0}, {"ends": (1.0, 0.5)}):
        with pytest.raises(UserError, match="must"):
            flow_density(MIXTURE, x, cosine, noise=noise, **options)  # type: ignore[arg-type]

    def torn(x_t: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        return Prediction(x_t * float("nan"), x_t, x_t)

    with pytest.raises(UserError, match="cannot be followed to a tolerance"):
        flow_density(torn, x, cosine, noise=noise)
