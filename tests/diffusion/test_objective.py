"""Training objectives: weights in closed form, options by their definitions, randomness from one generator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.likelihood import bound_term
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import EPS, X0, Parameterization, V
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError

from .diffusion_cases import PARAMETERIZATIONS, SCHEDULES, normals, time

LINEAR, SD = SCHEDULES["linear"], SCHEDULES["scaled_linear"]


class Constant(nn.Module):
    """Says the same of every picture: one value per channel, a parameter."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.inputs: list[Tensor] = []
        self.slots: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **slots: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        self.slots.append(slots)
        return self.values.reshape(-1, 1, 1).expand(len(x), len(self.values), *x.shape[2:])


def net(*values: float, schedule: Schedule = LINEAR, kind: Parameterization = EPS, **options: bool) -> Denoiser:
    return Denoiser(Constant(*values), schedule, kind, **options)


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, 1, 4, 4), generator=generator), torch.randn((n, 1, 4, 4), generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(objective: Objective, schedule: Schedule, kind: Parameterization) -> tuple[Tensor, Tensor]:
    level = schedule.level(schedule.t_from_uniform((torch.arange(500, dtype=torch.float64) + 0.5) / 500))
    return objective.weight(net(0.0, schedule=schedule, kind=kind), level), (level.alpha / level.sigma) ** 2


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_min_snr_on_preserving_paths(name: str, gamma: float) -> None:
    """Hang 2023: `min(SNR, gamma)` for x0, `/ SNR` for eps, `/ (SNR + 1)` for v."""
    objective = Objective(weighting="min_snr", min_snr_gamma=gamma)
    for kind in (EPS, X0, V):
        found, snr = weights(objective, SCHEDULES[name], kind)
        wanted = snr.clamp(max=gamma) / {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[kind.name]
        assert torch.allclose(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr_weighs_the_same_error_of_x0_whatever_is_predicted(name: str, kind: Parameterization) -> None:
    schedule = SCHEDULES[name]
    level, (x_t, out) = schedule.level(time(schedule, 0.45)), normals()
    found = Objective(weighting="min_snr").weight(net(0.0, schedule=schedule, kind=kind), level)
    change = kind.solve(out + 1e-3, x_t, level)[0] - kind.solve(out, x_t, level)[0]
    snr = (level.alpha / level.sigma) ** 2
    assert torch.allclose(found * 1e-6, snr.clamp(max=5) * change**2, rtol=1e-8)


# Pure-Python float64 values of the formulas on Stable Diffusion's table: t -> (SNR, weight of eps, weight of v).
GOLDEN = {1: (585.864, 0.008534, 0.008520), 201: (3.034591, 1, 0.752143), 801: (0.037933, 1, 0.036547)}


@pytest.mark.parametrize("t", GOLDEN)
def test_golden_min_snr(t: int) -> None:
    snr, eps, v = GOLDEN[t]
    level = SD.level(t)
    assert float(level.nsr) ** -2 == pytest.approx(snr, rel=2e-5)
    found = [float(Objective(weighting="min_snr").weight(net(0.0, schedule=SD, kind=k), level)) for k in (EPS, V)]
    assert found == pytest.approx([eps, v], abs=1e-6)


@pytest.mark.parametrize(("k", "gamma"), [(1.0, 0.5), (1.0, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "zero_linear"])
def test_p2(name: str, k: float, gamma: float) -> None:
    """Choi 2022: `(k + SNR)^-gamma`."""
    found, snr = weights(Objective(weighting="p2", p2_k=k, p2_gamma=gamma), SCHEDULES[name], V)
    assert torch.allclose(found, 1 / (k + snr) ** gamma, rtol=1e-12, atol=0)


def test_weights_multiply_each_picture_s_error() -> None:
    x0, eps = batch()
    level = LINEAR.level(torch.arange(8) * 100)
    for weighting in ("uniform", "p2", "min_snr"):
        objective = Objective(weighting=weighting)  # type: ignore[arg-type]
        denoiser = net(0.3)
        loss = objective.measure(denoiser, x0, level, eps)
        errors = ((eps - 0.3) ** 2).mean((1, 2, 3))
        assert torch.allclose(loss.per_picture, errors, rtol=1e-6)
        wanted = (objective.weight(denoiser, level) * errors).mean().item()
        assert loss.value.item() == pytest.approx(wanted, rel=1e-5)
        assert not loss.per_picture.requires_grad and loss.value.requires_grad


# --- kinds of loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_kinds_of_loss(delta: float) -> None:
    x0, eps = batch()
    level, error = LINEAR.level(torch.arange(8) * 100), (eps - 0.3).abs()
    wanted = {
        "l1": error.mean(),
        "l2": (error**2).mean(),
        "huber": torch.where(error < delta, error**2 / (2 * delta), error - delta / 2).mean(),
    }
    for kind, value in wanted.items():
        objective = Objective(loss=kind, huber_delta=delta)  # type: ignore[arg-type]
        assert objective.measure(net(0.3), x0, level, eps).value.item() == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@pytest.mark.parametrize("name", ["cosine", "ve", "flow"])
def test_the_truth_costs_nothing(name: str, kind: Parameterization) -> None:
    """A network that outputs the target has no loss, whatever it predicts."""
    schedule, (x0, eps) = SCHEDULES[name], batch()
    level = schedule.level(schedule.t_from_uniform(torch.rand(8, generator=seeded(), dtype=torch.float64)))
    oracle = nn.Identity()
    oracle.forward = lambda x, t: kind.target(x0, eps, level)  # type: ignore[method-assign]
    for objective in (Objective(), Objective(loss="l1", weighting="min_snr"), Objective(loss="huber")):
        assert objective.measure(Denoiser(oracle, schedule, kind), x0, level, eps).value.item() < 1e-10


# --- randomness ------------------------------------------------------------------------------------------------------


def test_all_randomness_is_the_generator_s() -> None:
    x0, _ = batch(64)
    before = torch.get_rng_state()
    one, two, three = (Objective()(net(0.3), x0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.value, two.value) and torch.equal(one.level.t, two.level.t)
    assert not torch.equal(one.value, three.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_drawn_from_the_schedule_s_density(name: str) -> None:
    schedule, x0 = SCHEDULES[name], torch.zeros(4000, 1, 1, 1)
    level = Objective()(net(0.0, schedule=schedule, kind=V), x0, generator=seeded()).level
    low, high = schedule.t_range
    assert len(level.t) == 4000 and float(level.t.min()) >= low and float(level.t.max()) <= high
    middle = schedule.t_from_uniform(torch.tensor(0.5))
    assert float((level.t < middle).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))


def test_noise_has_unit_variance() -> None:
    loss = Objective()(net(0.0), torch.zeros(500, 1, 8, 8), generator=seeded())
    assert loss.value.item() == pytest.approx(1, abs=4 * math.sqrt(2 / 32_000))


def test_the_condition_reaches_the_network() -> None:
    denoiser, labels = net(0.0), torch.arange(4)
    Objective()(denoiser, torch.zeros(4, 1, 2, 2), Condition(labels=labels), generator=seeded())
    assert torch.equal(denoiser.network.slots[-1]["labels"], labels)


# --- self-conditioning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "looks"), [(0.0, 1), (1.0, 2)])
def test_self_conditioning_looks_twice_at_its_rate(rate: float, looks: int) -> None:
    denoiser, (x0, _) = net(0.3, self_condition=True), batch()
    loss = Objective(self_condition_rate=rate)(denoiser, x0, generator=seeded())
    seen = denoiser.network.inputs
    assert len(seen) == looks
    assert bool((seen[0][:, :1] == 0).all())
    if looks == 2:
        x_t = seen[1][:, 1:]
        guess = EPS.solve(torch.full_like(x_t, 0.3), x_t, loss.level)[0]
        assert torch.allclose(seen[1][:, :1], guess, rtol=1e-5)
    loss.value.backward()


def test_half_of_the_batches_look_twice() -> None:
    denoiser, generator = net(0.3, self_condition=True), seeded()
    for _ in range(400):
        Objective()(denoiser, torch.zeros(1, 1, 1, 1), generator=generator)
    assert abs(len(denoiser.network.inputs) - 600) < 4 * 10


def test_the_first_look_leaves_no_gradient() -> None:
    """d/dv of `(eps - v)²` and no more: the estimate that was fed back is a constant."""
    denoiser, (x0, eps) = net(0.3, self_condition=True), batch()
    level = LINEAR.level(torch.full((8,), 500))
    Objective().measure(denoiser, x0, level, eps, look_twice=True).value.backward()
    assert float(denoiser.network.values.grad) == pytest.approx(float(2 * (0.3 - eps).mean()), rel=1e-5)


def test_a_plain_network_never_looks_twice() -> None:
    denoiser = net(0.3)
    Objective(self_condition_rate=1.0)(denoiser, batch()[0], generator=seeded())
    assert len(denoiser.network.inputs) == 1


# --- learned variance ------------------------------------------------------------------------------------------------


def test_learned_variance_and_hybrid_loss_need_each_other() -> None:
    x0, _ = batch()
    with pytest.raises(UserError, match="needs the hybrid loss"):
        Objective()(net(0.0, 0.0, learned_variance=True), x0, generator=seeded())
    with pytest.raises(UserError, match="needs a network that learns its variance"):
        Objective(vlb_weight=0.001)(net(0.0), x0, generator=seeded())


@pytest.mark.parametrize("name", ["linear", "cosine", "zero_linear", "ve", "flow"])
@pytest.mark.parametrize("continuous", [True, False])
def test_the_hybrid_loss_is_the_sum_of_its_parts(name: str, continuous: bool) -> None:
    """Nichol 2021: `L_simple + lambda T L_t`, with T = 1000 also on continuous paths."""
    schedule, (x0, eps) = SCHEDULES[name], batch()
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    level = schedule.level(schedule.t_from_uniform(torch.arange(8, dtype=torch.float64) / 8))
    denoiser = net(0.3, -0.2, schedule=schedule, kind=V, learned_variance=True)
    found = Objective(vlb_weight=0.001, continuous_data=continuous).measure(denoiser, x0, level, eps)
    x_t = level.noise(x0, eps)
    term = bound_term(denoiser(x_t, level), x0, x_t, level, schedule, continuous=continuous)
    assert term.shape == (8,) and bool(torch.isfinite(term).all())
    assert found.value.item() == pytest.approx((found.per_picture.mean() + term.mean()).item(), rel=1e-5)


def test_the_bound_trains_the_variance_only() -> None:
    x0, eps = batch()
    level = LINEAR.level(torch.arange(8) * 100)
    grads = []
    for weight in (0.001, 0.1):
        denoiser = net(0.3, -0.2, learned_variance=True)
        Objective(vlb_weight=weight, continuous_data=True).measure(denoiser, x0, level, eps).value.backward()
        grads.append(denoiser.network.values.grad)
    assert float(grads[0][0]) == pytest.approx(float(2 * (0.3 - eps).mean()), rel=1e-5)
    assert torch.equal(grads[0][:1], grads[1][:1])
    assert float(grads[1][1]) == pytest.approx(100 * float(grads[0][1]), rel=1e-4) and float(grads[0][1]) != 0


def test_objectives_are_values() -> None:
    assert Objective() == Objective(loss="l2") and hash(Objective()) == hash(Objective())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "l3"}, "unknown loss 'l3'"),
        ({"weighting": "minsnr"}, "did you mean 'min_snr'"),
        ({"huber_delta": 0.0}, "huber_delta must be positive"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma must be positive"),
        ({"vlb_weight": -0.1}, "vlb_weight must not be negative"),
        ({"self_condition_rate": 1.5}, r"self_condition_rate must lie in \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Objective(**options)


# --- weights, carried over to every parameterization, pure noise included ---------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "zero_linear", "zero_scaled_linear", "ve", "flow", "flow, shift 3"])
def test_weights_in_closed_form_for_every_parameterization(name: str) -> None:
    """A weight w on x0 is `w (sigma / D)²` on the output; written out for each parameterization, in alpha and sigma."""
    schedule = SCHEDULES[name]
    level = schedule.level(schedule.t_from_uniform((torch.arange(400, dtype=torch.float64) + 0.5) / 400))
    a, s = level.alpha, level.sigma
    carried = {
        "eps": s**2 / a**2,
        "x0": torch.ones_like(a),
        "v": s**2 / (a**2 + s**2) ** 2,
        "flow": s**2 / (a + s) ** 2,
        "edm": (0.5 * s) ** 2 / (s**2 + 0.25 * a**2),
    }
    for kind in PARAMETERIZATIONS.values():
        if kind is EPS and math.isinf(schedule.nsr_range[1]):
            continue
        denoiser = net(0.0, schedule=schedule, kind=kind)
        snr = (a / s) ** 2
        minimum = Objective(weighting="min_snr").weight(denoiser, level)
        debiased = Objective(weighting="debiased").weight(denoiser, level)
        assert torch.allclose(minimum, snr.clamp(max=5) * carried[kind.name], rtol=1e-10)
        assert torch.allclose(debiased, torch.sqrt(snr) * carried[kind.name], rtol=1e-10)


@pytest.mark.parametrize("name", ["zero_linear", "zero_scaled_linear", "flow"])
@pytest.mark.parametrize("weighting", ["uniform", "p2", "min_snr", "debiased"])
def test_weights_are_finite_at_pure_noise(name: str, weighting: Any) -> None:
    """At alpha = 0, where SNR is 0: min-SNR and debiased are 0, p2 is `k^-gamma`; losses and gradients are finite."""
    schedule, objective = SCHEDULES[name], Objective(weighting=weighting, p2_k=2.0)
    level = schedule.level(torch.full((8,), schedule.t_range[1]))
    assert float(level.alpha.max()) == 0
    wanted = {"uniform": 1.0, "p2": 0.5, "min_snr": 0.0, "debiased": 0.0}[weighting]
    for kind in PARAMETERIZATIONS.values():
        if kind is not EPS:
            denoiser = net(0.3, schedule=schedule, kind=kind)
            assert torch.equal(objective.weight(denoiser, level), torch.full((8,), wanted, dtype=torch.float64))
            loss = objective.measure(denoiser, *batch()[:1], level, batch()[1])
            loss.value.backward()
            assert math.isfinite(loss.value.item()) and bool(torch.isfinite(denoiser.network.values.grad).all())


def test_debiased_is_one_over_the_root_of_snr_for_eps() -> None:
    """Yu 2024, eq. 10."""
    for name in ("linear", "scaled_linear", "cosine"):
        found, snr = weights(Objective(weighting="debiased"), SCHEDULES[name], EPS)
        assert torch.allclose(found, snr**-0.5, rtol=1e-10)


# --- what the noise is made of ----------------------------------------------------------------------------------------


def drawn(objective: Objective, *shape: int, seed: int = 0) -> Tensor:
    return objective.noise(torch.zeros(shape), seeded(seed))


def test_offset_noise_moves_whole_channels() -> None:
    n, strength = 4000, 0.5
    plain, moved = (drawn(Objective(offset_noise=s), n, 2, 3, 3) for s in (0.0, strength))
    shift = moved - plain
    assert float((shift - shift[:, :, :1, :1]).abs().max()) < 1e-6
    assert float(shift[:, :, 0, 0].std()) == pytest.approx(strength, rel=4 / math.sqrt(4 * n))
    assert float(moved.var()) == pytest.approx(1 + strength**2, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7), (1, 9), (1, 2, 4, 6)])
def test_pyramid_noise_has_unit_variance_in_every_element(shape: tuple[int, ...]) -> None:
    n = 6000
    eps = drawn(Objective(pyramid_noise=0.8), n, *shape)
    assert eps.shape == (n, *shape)
    deviation = eps.var(0) - 1
    assert float(deviation.abs().max()) < 5 * math.sqrt(2 / n)
    assert float(eps.mean(0).abs().max()) < 5 / math.sqrt(n)


def test_pyramid_noise_is_coarse_by_its_discount() -> None:
    """Neighbours are correlated, channels are not; a mean over the picture keeps `sum d^2i v_i / sum d^2i`."""
    n, correlations = 4000, []
    for discount in (0.0, 0.3, 0.9):
        eps = drawn(Objective(pyramid_noise=discount), n, 2, 4, 4)
        correlations.append(float((eps[:, 0, 1, 1] * eps[:, 0, 1, 2]).mean()))
        assert abs(float((eps[:, 0] * eps[:, 1]).mean((1, 2)).mean())) < 0.05
    assert correlations == sorted(correlations) and abs(correlations[0]) < 0.05 and correlations[2] > 0.3
    coarsest = drawn(Objective(pyramid_noise=1.0), n, 1, 2)  # two layers: plain, and one value for both
    assert float((coarsest[:, 0, 0] * coarsest[:, 0, 1]).mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1.25 / n))


def test_no_discount_is_plain_noise_and_points_have_no_pyramid() -> None:
    assert torch.equal(drawn(Objective(), 3, 1, 4, 4), torch.randn((3, 1, 4, 4), generator=seeded()))
    with pytest.raises(UserError, match="pyramid_noise needs pictures"):
        drawn(Objective(pyramid_noise=0.5), 3, 2)


def test_input_perturbation_is_shown_and_not_asked_for() -> None:
    """Ning 2023, alg. 1: x_t is made with `eps + gamma z`, the target is eps."""
    x0 = torch.zeros(2000, 1, 2, 2)
    plain, shaken = net(0.0), net(0.0)
    one = Objective()(plain, x0, generator=seeded())
    two = Objective(input_perturbation=0.5)(shaken, x0, generator=seeded())
    assert torch.equal(one.level.t, two.level.t) and torch.equal(one.per_picture, two.per_picture)
    sigma = one.level.sigma.float()[:, None, None, None]
    z = (shaken.network.inputs[0] - plain.network.inputs[0]) / sigma / 0.5
    assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 8000))
    assert abs(float(z.mean())) < 5 / math.sqrt(8000)


@pytest.mark.parametrize(
    "options",
    [{"pyramid_noise": 0.7}, {"input_perturbation": 0.1}, {"density": "logit_normal"}, {"density": "log_normal"}],
)
def test_every_option_s_randomness_is_the_generator_s(options: dict[str, Any]) -> None:
    x0, objective = torch.zeros(16, 1, 4, 4), Objective(**options)
    before = torch.get_rng_state()
    one, two, three = (objective(net(0.3), x0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.value, two.value) and not torch.equal(one.value, three.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": "lognormal"}, "unknown density 'lognormal' .did you mean 'log_normal'"),
        ({"importance": "moment"}, "unknown importance 'moment'"),
        ({"weighting": "debias"}, "did you mean 'debiased'"),
        ({"logit_std": 0.0}, "logit_std must be positive"),
        ({"log_nsr_std": -1.0}, "log_nsr_std must be positive"),
        ({"log_nsr_mean": math.nan}, "log_nsr_mean must be a finite number"),
        ({"huber_delta": math.inf}, "huber_delta must be a finite number"),
        ({"pyramid_noise": 1.5}, r"pyramid_noise must lie in \[0, 1\]"),
        ({"input_perturbation": -0.1}, "input_perturbation must not be negative"),
        ({"importance_history": 0}, "importance_history must be at least 1"),
        ({"importance_uniform": 2.0}, r"importance_uniform must lie in \[0, 1\]"),
        ({"p2_k": -1.0}, "p2_k must not be negative"),
        ({"p2_gamma": -1.0}, "p2_gamma must not be negative"),
    ],
)
def test_bad_new_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Objective(**options)
    assert Objective(min_snr_gamma=math.inf).min_snr_gamma == math.inf


def test_a_weight_that_would_be_infinite_is_refused() -> None:
    Objective(weighting="p2", p2_k=0.0).check(net(0.0))
    with pytest.raises(UserError, match="p2_k must be positive with a schedule that ends in pure noise"):
        Objective(weighting="p2", p2_k=0.0).check(net(0.0, schedule=SCHEDULES["zero_linear"], kind=V))
