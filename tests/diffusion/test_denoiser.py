"""Where a network of eps is asked on paths that end in pure noise, and what becomes of everything that asks there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.denoiser import EPS_LIMIT, Denoiser, edm_preconditioning
from sfumato.diffusion.grid import reversed_, trailing
from sfumato.diffusion.guidance import classifier_free, clip_x0, unguided
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.likelihood import bound, chain
from sfumato.diffusion.objective import DENSITIES, WEIGHTINGS, Objective
from sfumato.diffusion.parameterization import EPS, Parameterization, V
from sfumato.diffusion.probability_flow import flow_density
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers import solver
from sfumato.random import NoiseSource

from .diffusion_cases import PARAMETERIZATIONS, SCHEDULES

NOISY = [name for name, schedule in SCHEDULES.items() if math.isinf(schedule.nsr_range[1])]
MEAN, VARIANCE, SHAPE = 0.5, 0.3, (2, 3, 3)
DATA = GaussianData(torch.full(SHAPE, MEAN, dtype=torch.float64), VARIANCE)
each = pytest.mark.parametrize("name", NOISY)


class Exact(nn.Module):
    """The optimal network of Gaussian data; notes what it is asked."""

    def __init__(self, schedule: Schedule, kind: Parameterization, channels: int = 2) -> None:
        super().__init__()
        self.schedule, self.kind, self.channels = schedule, kind, channels
        self.times: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.times.append(t)
        self.inputs.append(x)
        x = x[:, -self.channels :]
        level = self.schedule.level(t.double())
        prediction = DATA(x, level)
        out = self.kind.target(prediction.x0, prediction.eps, level)
        return out if labels is None else out + 0.01 * labels[:, None, None, None]


def exact(name: str, kind: Parameterization = EPS, **options: Any) -> Denoiser:
    return Denoiser(Exact(SCHEDULES[name], kind), SCHEDULES[name], kind, **options)


def noisiest(name: str, n: int | None = None) -> NoiseLevel:
    end = SCHEDULES[name].t_range[1]
    return SCHEDULES[name].level(end if n is None else torch.full((n,), end))


def normals(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@pytest.mark.parametrize("name", SCHEDULES)
def test_only_eps_on_paths_to_pure_noise_has_a_limit(name: str, kind: Parameterization) -> None:
    """The noisiest whole time within the limit on tables, the ratio itself elsewhere."""
    schedule, limit = SCHEDULES[name], Denoiser(nn.Identity(), SCHEDULES[name], kind).limit
    if kind is not EPS or name not in NOISY:
        level = schedule.level(schedule.t_range[1])
        assert limit is None and Denoiser(nn.Identity(), schedule, kind).asked(level) is level
        return
    assert limit is not None
    if schedule.steps is None:
        assert float(limit.nsr) == pytest.approx(EPS_LIMIT, rel=1e-12)
    else:
        assert float(limit.nsr) <= EPS_LIMIT < float(schedule.level(limit.t + 1).nsr)


@each
def test_which_levels_are_asked(name: str) -> None:
    schedule, denoiser = SCHEDULES[name], exact(name)
    assert denoiser.limit is not None
    for fraction in (0.1, 0.5, 0.9):
        level = schedule.level(schedule.t_range[1] * fraction)
        assert denoiser.asked(level) is level
    assert denoiser.asked(denoiser.limit) is denoiser.limit
    for level in (noisiest(name), schedule.from_nsr(1e5), schedule.from_nsr(1.01 * EPS_LIMIT)):
        assert denoiser.asked(level) is denoiser.limit
    many = schedule.from_nsr(torch.tensor([0.5, 1e4, math.inf, 50.0], dtype=torch.float64))
    found = denoiser.asked(many)
    for number in ("t", "alpha", "sigma"):
        values, own, limit = (getattr(v, number) for v in (found, many, denoiser.limit))
        assert values.tolist() == [float(own[0]), float(limit), float(limit), float(own[3])]


@each
def test_a_prediction_at_pure_noise(name: str) -> None:
    """The same x_t at the limit's time; x0 is about the data's mean, as it is exactly where alpha = 0; eps is x_t."""
    denoiser, x = exact(name), normals()
    found = denoiser(x, noisiest(name))
    assert denoiser.limit is not None
    assert float(denoiser.network.times[0][0]) == float(denoiser.limit.t.float())
    assert torch.equal(denoiser.network.inputs[0], x)
    alpha, sigma = float(denoiser.limit.alpha), float(denoiser.limit.sigma)
    wanted = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * MEAN)
    assert torch.allclose(found.x0, wanted, atol=1e-4)  # the told time is a float32
    assert float((found.x0 - MEAN).abs().max()) < 0.02
    assert torch.equal(found.eps, x)


@each
def test_predictions_of_many_levels_are_those_of_each(name: str) -> None:
    """And `x_t = alpha x0 + sigma eps` at the level that was meant."""
    denoiser, x = exact(name), normals(4)
    level = SCHEDULES[name].from_nsr(torch.tensor([0.5, 1e4, math.inf, 50.0], dtype=torch.float64))
    found = denoiser(x, level)
    assert torch.allclose(level.noise(found.x0, found.eps), x, atol=1e-12)
    for i in range(4):
        one = denoiser(x[i : i + 1], NoiseLevel(level.t[i], level.alpha[i], level.sigma[i]))
        assert torch.allclose(one.x0[0], found.x0[i], rtol=1e-9) and torch.allclose(one.eps[0], found.eps[i], rtol=1e-9)


@each
def test_the_preconditioning_is_the_limit_s(name: str) -> None:
    denoiser, x = Denoiser(nn.Identity(), SCHEDULES[name], EPS, preconditioning=edm_preconditioning()), normals()
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((x, t))
        return x

    denoiser.network.forward = network  # type: ignore[method-assign]
    denoiser(x, noisiest(name))
    limit, own = denoiser.limit, denoiser.preconditioning
    assert limit is not None and own.scale is not None
    assert torch.allclose(seen[0], own.scale(limit) * x) and float(seen[1][0]) == float(own.time(limit).float())


@each
def test_guidance_at_pure_noise(name: str) -> None:
    """What is combined are outputs at the limit, and what is read from them is x0 there."""
    x, limit = normals(), exact(name).limit
    conditions = [Condition(labels=torch.full((3,), c)) for c in (1, 0)]
    guided = classifier_free(exact(name), *conditions, 3.0)(x, noisiest(name), None)
    plain = exact(name)(x, noisiest(name), conditions[1])
    assert limit is not None
    assert torch.allclose(guided.x0 - plain.x0, -limit.nsr * torch.full_like(x, 0.03), rtol=1e-6)
    assert torch.equal(guided.eps, x)
    kept = clip_x0(classifier_free(exact(name), *conditions, 3.0))(x, noisiest(name), None)
    assert bool((kept.x0.abs() <= 1).all()) and torch.equal(kept.eps, x)


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m", "unipc_multistep", "lms", "ddpm", "euler_ancestral"])
@each
def test_whole_loops_are_those_of_v(name: str, method: str) -> None:
    """A v network determines x0 at pure noise; what the limit leaves out of an exact one is under a thousandth."""
    schedule, found = SCHEDULES[name], []
    for kind in (EPS, V):
        noise, levels = NoiseSource([0, 1, 2], SHAPE, dtype=torch.float64), trailing(schedule, 20)
        x = start(noise, levels[0])
        found.append(sample(unguided(exact(name, kind)), solver(method), x, levels, schedule, noise=noise))
    assert levels[0].is_noise and float((found[0] - found[1]).abs().max()) < 1e-3


@each
def test_inversion_goes_up_to_pure_noise_and_back(name: str) -> None:
    schedule, levels, denoise = SCHEDULES[name], trailing(SCHEDULES[name], 200), unguided(exact(name))
    noise = NoiseSource([0, 1, 2], SHAPE, dtype=torch.float64)
    x = MEAN + math.sqrt(VARIANCE) * noise.draw()
    up = sample(denoise, solver("heun"), x, reversed_(levels[:-1]), schedule, noise=noise, climb=True)
    back = sample(denoise, solver("heun"), up, levels[:-1], schedule, noise=noise)
    assert float((back - x).abs().max()) < 0.02


# --- training --------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((1, outputs, 1, 1), 0.3))
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times += t.tolist()
        return self.values.expand(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("density", DENSITIES)
@each
def test_losses_and_gradients_are_finite(name: str, density: Any, weighting: Any) -> None:
    """Weights too: of debiased, 1 / sqrt(SNR), the greatest is the limit's ratio."""
    objective = Objective(weighting=weighting, density=density)
    for level in (None, noisiest(name, 64)):
        denoiser = Denoiser(Learner(), SCHEDULES[name])
        x0, generator = normals(64).float(), torch.Generator().manual_seed(0)
        loss = objective(denoiser, x0, generator=generator, level=level)
        loss.value.backward()
        assert bool(torch.isfinite(loss.each).all() and torch.isfinite(denoiser.network.values.grad).all())
        assert loss.level is not None and float(loss.level.nsr.max()) <= EPS_LIMIT * (1 + 1e-9)
        assert float(objective.weight(denoiser, loss.level).max()) <= EPS_LIMIT * 1.01


@each
def test_training_teaches_the_level_that_is_asked(name: str) -> None:
    """Its picture too: a network that was shown pure noise there would learn a mixture of the two."""
    denoiser, x0, eps = exact(name), normals(3, seed=1), normals(3, seed=2)
    Objective().measure(denoiser, x0, noisiest(name, 3), eps)
    limit = denoiser.limit
    assert limit is not None and torch.allclose(denoiser.network.inputs[0], limit.noise(x0, eps), rtol=1e-12)
    assert denoiser.network.times[0].tolist() == [float(limit.t.float())] * 3


@each
def test_a_learned_variance_with_its_bound(name: str) -> None:
    denoiser = Denoiser(Learner(4), SCHEDULES[name], learned_variance=True)
    objective = Objective(vlb_weight=0.001, continuous_data=True)
    generator = torch.Generator().manual_seed(0)
    loss = objective(denoiser, normals(16).float(), generator=generator, level=noisiest(name, 16))
    loss.value.backward()
    assert bool(torch.isfinite(loss.each).all() and torch.isfinite(denoiser.network.values.grad).all())


# --- likelihood ------------------------------------------------------------------------------------------------------


@each
def test_the_bound_is_that_of_v(name: str) -> None:
    """Its terms above the limit need x0 only, which is nearly the mean there; the prior's is 0."""
    levels, x0, found = chain(SCHEDULES[name], 50), MEAN + math.sqrt(VARIANCE) * normals(), []
    for kind in (EPS, V):
        noise = NoiseSource([0, 1, 2], SHAPE, dtype=torch.float64)
        found.append(bound(unguided(exact(name, kind)), x0, levels, noise, continuous=True))
    assert torch.allclose(found[0].terms, found[1].terms, rtol=2e-3, atol=2e-4)
    assert torch.allclose(found[0].total, found[1].total, atol=2e-4)
    assert bool((found[0].prior.abs() < 1e-12).all())


@pytest.mark.parametrize("name", ["zero_scaled_linear", "flow"])
def test_the_probability_flow_s_density(name: str) -> None:
    """Within 1e-3 bits per dimension of the data's own."""
    schedule, x0 = SCHEDULES[name], MEAN + math.sqrt(VARIANCE) * normals()
    found = flow_density(unguided(exact(name)), x0, schedule, divergence="exact", tolerance=1e-5)
    squares = (x0 - MEAN).square().flatten(1).sum(1) / VARIANCE
    dims = x0[0].numel()
    wanted = 0.5 * (squares / dims + math.log(2 * math.pi * VARIANCE)) / math.log(2)
    assert torch.allclose(found.bits_per_dim(), wanted, atol=1e-3)


class Returns(nn.Module):
    """A network that returns what it was given."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.out


def test_an_output_of_another_shape_is_refused_not_broadcast() -> None:
    x, level = torch.zeros(2, 3, 4, 4), SCHEDULES["linear"].level(5)
    for shape, learned in (((2, 1, 4, 4), False), ((1, 3, 4, 4), False), ((2, 6, 4, 4), False), ((2, 3, 4, 4), True)):
        denoiser = Denoiser(Returns(torch.zeros(shape)), SCHEDULES["linear"], learned_variance=learned)
        with pytest.raises(ValueError, match=r"must return a tensor \(2, ., 4, 4\) for \(2, 3, 4, 4\)"):
            denoiser(x, level)
    with pytest.raises(ValueError, match="it gave a tuple"):
        Denoiser(Returns((x,)), SCHEDULES["linear"])(x, level)


def test_a_network_may_wrap_its_output_as_diffusers_do() -> None:
    class Output:
        sample = torch.ones(2, 3, 4, 4)

    found = Denoiser(Returns(Output()), SCHEDULES["linear"])(torch.zeros(2, 3, 4, 4), SCHEDULES["linear"].level(5))
    assert torch.equal(found.eps, Output.sample)
