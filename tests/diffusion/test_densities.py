"""Where levels are drawn: densities against their closed-form distributions, importance sampling by its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.distributions import Normal

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.densities import CONTINUOUS_BINS, LossHistory, log_normal, logit_normal, signal, uniform
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import V
from sfumato.diffusion.schedule import FlowSchedule, TableSchedule, VESchedule, cosine_alpha_bar

from .diffusion_cases import SCHEDULES

N = 20_000


def uniforms(n: int = N, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(mean: float, std: float, low: float, high: float) -> Callable[[Any], Any]:
    """The distribution function of a normal number within (low, high)."""
    normal = Normal(torch.tensor(mean).double(), torch.tensor(std).double())
    below, above = (float(normal.cdf(torch.tensor(v).double())) for v in (low, high))
    return lambda z: ((normal.cdf(torch.as_tensor(z)) - below) / (above - below)).numpy()


def place(schedule: Any, t: Tensor) -> Tensor:
    """Where on the path a time is, in [0, 1]."""
    low, high = schedule.t_range
    if isinstance(schedule, VESchedule):
        return (torch.log(t) - math.log(low)) / math.log(high / low)
    return t / high


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-2.0, 2.0)])
@pytest.mark.parametrize("name", ["linear", "zero_linear", "ve", "flow", "flow, shift 3"])
def test_logit_normal_has_its_distribution(name: str, mean: float, std: float) -> None:
    schedule = SCHEDULES[name]
    level = logit_normal(schedule, uniforms(), mean, std)
    low = math.log(1e-3) - math.log1p(-1e-3) if isinstance(schedule, FlowSchedule) else -math.inf
    z = torch.logit(place(schedule, level.t))
    assert kstest(z.numpy(), cut(mean, std, low, math.inf)).pvalue > 1e-3
    assert float(level.t.min()) >= schedule.t_range[0] and float(level.t.max()) <= schedule.t_range[1]


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 2.0)])
@pytest.mark.parametrize("name", ["linear", "cosine", "zero_linear", "ve", "flow"])
def test_log_normal_has_its_distribution(name: str, mean: float, std: float) -> None:
    schedule = SCHEDULES[name]
    level = log_normal(schedule, uniforms(), mean, std)
    low, high = (math.log(v) if v < math.inf else math.inf for v in schedule.nsr_range)
    assert kstest(-level.half_log_snr.numpy(), cut(mean, std, low, high)).pvalue > 1e-3
    assert float(level.nsr.min()) >= schedule.nsr_range[0] * (1 - 1e-9)
    assert float(level.nsr.max()) <= schedule.nsr_range[1] * (1 + 1e-9)
    assert torch.allclose(schedule.level(level.t).nsr, level.nsr, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_has_its_distribution(name: str) -> None:
    schedule = SCHEDULES[name]
    level = uniform(schedule, uniforms())
    if schedule.steps is not None:  # whole times: spread each over its own unit
        spread = (level.t + uniforms(seed=1)) / schedule.steps
    else:
        low, high = place(schedule, torch.tensor(schedule.t_range, dtype=torch.float64))
        spread = (place(schedule, level.t) - low) / (high - low)
    assert kstest(spread.numpy(), "uniform").pvalue > 1e-3


def test_amplitudes_lie_evenly_between_a_tables_neighbours() -> None:
    """SR3's: every index as often, and within it every amplitude."""
    schedule = SCHEDULES["linear"]
    alphas = torch.cat([torch.ones(1).double(), schedule.alpha_bar.sqrt()])
    level = signal(schedule, uniforms())
    place = (alphas[:, None] - level.alpha).sign().clamp(min=0).sum(0).long()  # how many amplitudes are larger
    inside = (alphas[place - 1] - level.alpha) / (alphas[place - 1] - alphas[place])
    keep = (place > 1) & (place < len(alphas))
    assert kstest(inside[keep].numpy(), "uniform").pvalue > 1e-3
    assert kstest((place[keep].double() - 2 + inside[keep]).numpy() / (len(alphas) - 2), "uniform").pvalue > 1e-3
    assert bool((level.t != level.t.round())[keep].any())
    flow = SCHEDULES["flow"]
    assert torch.equal(signal(flow, uniforms()).t, uniform(flow, uniforms()).t)


@pytest.mark.parametrize("density", [uniform, signal, logit_normal, log_normal])
@pytest.mark.parametrize("name", SCHEDULES)
def test_densities_rise_with_noise_and_bear_both_ends(name: str, density: Any) -> None:
    u = torch.cat([torch.zeros(1), torch.linspace(0.001, 0.999, 200), torch.tensor([1 - 1e-16])]).double()
    level = density(SCHEDULES[name], u)
    assert bool((level.nsr[1:] >= level.nsr[:-1] * (1 - 1e-12)).all())
    assert bool(torch.isfinite(level.t).all()) and bool(torch.isfinite(level.alpha + level.sigma).all())
    assert level.t.dtype == torch.float64 and level.t.shape == u.shape


# --- importance ------------------------------------------------------------------------------------------------------


def filled(parts: int = 5, length: int = 3, mix: float = 0.01) -> LossHistory:
    history = LossHistory(parts, length, mix)
    for _ in range(length):
        history.record(torch.arange(parts), torch.arange(1.0, parts + 1))
    return history


def test_probabilities_are_by_second_moment_once_every_part_is_full() -> None:
    history = LossHistory(2, length=2, uniform=0.1)
    history.record(torch.tensor([0, 0, 0, 1]), torch.tensor([9.0, 3.0, 4.0, 5.0]))
    assert not history.warm and history.probabilities().tolist() == [0.5, 0.5]
    history.record(torch.tensor([1]), torch.tensor([0.0]))
    assert history.losses.tolist() == [[3, 4], [5, 0]] and history.warm
    moments = [math.sqrt((9 + 16) / 2), math.sqrt(25 / 2)]
    assert moments[0] == moments[1]
    history.record(torch.tensor([1]), torch.tensor([12.0]))
    assert history.losses.tolist() == [[3, 4], [0, 12]]
    moments = [math.sqrt(12.5), math.sqrt(72)]
    wanted = [0.9 * m / sum(moments) + 0.05 for m in moments]
    assert history.probabilities().tolist() == pytest.approx(wanted)


def test_recording_together_is_recording_one_by_one() -> None:
    """Oldest first, whatever comes at once: more of a part than it remembers, or nothing."""
    generator = torch.Generator().manual_seed(0)
    together, single = LossHistory(4, 3), LossHistory(4, 3)
    for n in (1, 0, 2, 30, 5, 7):
        parts = torch.randint(4, (n,), generator=generator)
        losses = torch.rand(n, generator=generator)
        together.record(parts, losses)
        for part, loss in zip(parts, losses, strict=True):
            single.record(part[None], loss[None])
        assert torch.equal(together.losses, single.losses) and torch.equal(together.counts, single.counts)
    last = losses[parts == 1]
    assert together.losses[1, -len(last) :].tolist() == last.double().tolist()[-3:]


def test_defaults_are_the_published_ones() -> None:
    history = Objective(importance="second_moment").history(SCHEDULES["linear"])
    assert history is not None and history.losses.shape == (1000, 10) and history.uniform == 0.001
    assert Objective().history(SCHEDULES["linear"]) is None
    flow = Objective(importance="second_moment").history(FlowSchedule())
    assert flow is not None and len(flow.counts) == CONTINUOUS_BINS


def test_parts_are_drawn_as_often_as_they_should_be() -> None:
    history = filled()
    u, weights = history.draw(uniforms())
    parts = history.part_of(u)
    p = history.probabilities()
    shares = torch.bincount(parts, minlength=5) / N
    assert bool(((shares - p).abs() < 4 * torch.sqrt(p * (1 - p) / N)).all())
    assert torch.allclose(weights, 1 / (5 * p[parts]))
    inside = u * 5 - parts
    assert kstest(inside.numpy(), "uniform").pvalue > 1e-3


def test_a_table_s_parts_are_its_indices() -> None:
    schedule = SCHEDULES["linear"]
    history = LossHistory(1000, 1)
    history.record(torch.arange(1000), torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    u, _ = history.draw(torch.cat([torch.zeros(1).double(), uniforms()]))
    assert torch.equal(uniform(schedule, u).t.long(), history.part_of(u))


def test_equal_losses_and_a_cold_history_change_nothing() -> None:
    u = uniforms(100)
    cold, even = LossHistory(5), LossHistory(5, 1)
    even.record(torch.arange(5), torch.full((5,), 2.0))
    nothing = LossHistory(5, 1)
    nothing.record(torch.arange(5), torch.zeros(5))
    for history in (cold, even, nothing):
        found, weights = history.draw(u)
        assert torch.equal(found, u) and bool((weights == 1).all())


@pytest.mark.parametrize("density", [uniform, logit_normal, log_normal])
def test_importance_keeps_every_mean(density: Any) -> None:
    """`E[w f(level)]` under the history's draws is `E[f(level)]` under the density's, for loss-like f."""
    schedule, history = SCHEDULES["cosine"], LossHistory(1000, 1)
    history.record(torch.arange(1000), torch.linspace(0.1, 3, 1000) ** 2)
    u, weights = history.draw(uniforms())

    def f(v: Tensor) -> Tensor:
        return 1 / (1 + density(schedule, v).nsr) ** 0.5

    exact = f((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).mean()
    found = weights * f(u)
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / math.sqrt(N)


def test_drawing_by_the_losses_scatters_less() -> None:
    """The point of it: where the losses are what is averaged, the weighted ones vary less."""
    losses = torch.exp(torch.linspace(-4, 1, 1000)).double()
    history = LossHistory(1000, 1)
    history.record(torch.arange(1000), losses)
    u, weights = history.draw(uniforms())
    assert float((weights * losses[history.part_of(u)]).std()) < 0.05 * float(losses.std())


class Scale(nn.Module):
    """Says nothing, whatever it sees: the loss is the target's square."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


def measured(n: int, history: LossHistory | None, seed: int = 0, **options: Any) -> Any:
    schedule = TableSchedule(cosine_alpha_bar(20))
    objective = Objective(importance="second_moment", **options)
    x0 = torch.full((n, 1, 2, 2), 2.0)
    return objective(
        Denoiser(Scale(), schedule, V), x0, generator=torch.Generator().manual_seed(seed), history=history
    )


def test_the_objective_draws_by_its_history_and_keeps_the_mean_loss() -> None:
    history = LossHistory(20, 2)
    while not history.warm:
        loss = measured(200, history, seed=int(history.counts.sum()))
        history.record(loss.parts, loss.sampled)
    plain, drawn = measured(N, None), measured(N, history, weighting="uniform")
    assert plain.parts is None and plain.sampled is None
    assert torch.equal(drawn.parts, drawn.level.t.long())
    share = 1 / (20 * history.probabilities()[drawn.parts])
    assert torch.allclose(drawn.each.double(), drawn.sampled.double() * share, rtol=1e-5)
    assert float(drawn.value.detach()) == pytest.approx(float(drawn.each.detach().mean()), rel=1e-6)
    spread = [float(loss.each.detach().std()) for loss in (plain, drawn)]
    error = math.hypot(*spread) / math.sqrt(N)
    assert abs(float((plain.value - drawn.value).detach())) < 4 * error
    assert spread[1] < spread[0]
    assert not drawn.sampled.requires_grad and drawn.each.requires_grad


def test_a_cold_history_leaves_the_draws_as_they_are() -> None:
    plain, cold = measured(50, None), measured(50, LossHistory(20))
    assert torch.equal(plain.level.t, cold.level.t) and torch.equal(plain.value, cold.value)


def test_the_state_comes_back() -> None:
    one, two = filled(), LossHistory(5, 3, 0.01)
    two.restore(one.tensors())
    assert torch.equal(one.probabilities(), two.probabilities())
    two.record(torch.tensor([0]), torch.tensor([50.0]))
    assert not torch.equal(one.losses, two.losses)
    for wrong in ({}, filled(4).tensors(), {k: v.float() for k, v in one.tensors().items()}):
        with pytest.raises(ValueError, match="history of losses needs"):
            two.restore(wrong)


class Hundreds(FlowSchedule):
    """The straight path, told in times from 1 to 999."""

    def __init__(self) -> None:
        super().__init__()
        self.t_range = (1.0, 999.0)

    def level(self, t: Any) -> NoiseLevel:
        inside = super().level(torch.as_tensor(t, dtype=torch.float64) / 1000)
        return NoiseLevel(inside.t * 1000, inside.alpha, inside.sigma)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        return (nsr / (1 + nsr) * 1000).clamp(*self.t_range)


def test_a_foreign_path_s_own_times_are_spread_over_their_range() -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    found = logit_normal(Hundreds(), u).t
    assert float(found.min()) >= 1 and float(found.max()) <= 999
    assert float(found[500]) == pytest.approx(500, abs=1) and float(found.std()) > 150
