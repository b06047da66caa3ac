"""The sampling loop: what hooks see, what is carried along, and grids that go up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.analytic import EmpiricalData, GaussianData, MixtureData
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.grid import trailing
from sfumato.diffusion.guidance import unguided
from sfumato.diffusion.hooks import chain, keep
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.posterior import transition
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.solvers import SOLVERS, Ancestral, Churn, Euler, Heun, Solver, solver
from sfumato.errors import UserError
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES

LINEAR = SCHEDULES["linear"]
DATA = GaussianData(torch.full((2,), 0.5), 0.09)
MIXTURE = MixtureData(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.05, 0.1]), torch.tensor([0.3, 0.7]))
EVERY: dict[str, Solver] = {
    "ddpm small": Ancestral(),
    "ddpm large": Ancestral(variance="large"),
    "ddim": Euler(),
    "ddim eta 0.5": Euler(eta=0.5),
    "ddim eta 1": Euler(eta=1.0),
    "euler churn": Euler(churn=Churn(amount=8)),
    "heun": Heun(),
    "heun churn": Heun(churn=Churn(amount=8)),
}
each = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())


def source(*seeds: int, size: int = 2) -> NoiseSource:
    return NoiseSource(seeds or (0, 1, 2), (size,), dtype=torch.float64)


def run(method: Solver, schedule_name: str = "linear", steps: int = 20, seeds: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    schedule, noise = SCHEDULES[schedule_name], source(*seeds)
    levels = trailing(schedule, steps)
    return sample(MIXTURE, method, start(noise, levels[0]), levels, schedule, noise=noise)


def test_a_bare_denoiser_is_asked_without_a_condition() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 2, 3, padding=1)

    class Timed(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = network(x) * (t / 1000)[:, None, None, None]
            return out

    denoiser = Denoiser(Timed(), LINEAR)
    levels, drawn = trailing(LINEAR, 5), []
    for asked in (denoiser, unguided(denoiser)):
        noise = NoiseSource((0, 1), (2, 4, 4))
        drawn.append(sample(asked, Heun(), start(noise, levels[0]), levels, LINEAR, noise=noise))
    assert torch.equal(*drawn)


@each
def test_a_picture_does_not_depend_on_its_batch(method: Solver) -> None:
    together = run(method, seeds=(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        assert torch.allclose(run(method, seeds=(seed,))[0], together[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@each
def test_every_solver_runs_on_every_path(method: Solver, name: str) -> None:
    """Pure noise, table, exploding or flow: finite samples near the data."""
    x = run(method, name, steps=30, seeds=tuple(range(40)))
    assert bool(torch.isfinite(x).all())
    away = (x[:, None] - MIXTURE.means).norm(dim=-1).min(1).values
    assert float((away < 1.5).double().mean()) > 0.95


def test_hooks_see_the_start_and_every_step() -> None:
    seen: list[tuple[NoiseLevel, Prediction | None, Tensor]] = []

    def watch(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        seen.append((level, prediction, x))
        return x

    noise, levels = source(), trailing(LINEAR, 5)
    x = start(noise, levels[0])
    result = sample(DATA, Euler(), x, levels, LINEAR, noise=noise, on_step=watch)
    assert [s[0] for s in seen] == levels
    assert seen[0][1] is None and seen[0][2] is x
    assert all(s[1] is not None for s in seen[1:]) and seen[-1][2] is result


def test_hooks_replace_the_picture() -> None:
    def freeze(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        return torch.full_like(x, 3.0)

    asked: list[Tensor] = []

    def data(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        asked.append(x)
        return DATA(x, level)

    noise, levels = source(), trailing(LINEAR, 4)
    result = sample(data, Euler(), noise.draw(), levels, LINEAR, noise=noise, on_step=freeze)
    assert all(bool((x == 3).all()) for x in asked) and bool((result == 3).all())


def test_hooks_chain_and_cancel() -> None:
    def add(x: Tensor, *rest: object) -> Tensor:
        return x + 1

    def stop(x: Tensor, level: NoiseLevel, *rest: object) -> Tensor:
        if float(level.t) < 500:
            raise InterruptedError
        return x

    assert float(chain(add, keep, add)(torch.zeros(()), CLEAN, None, source())) == 2
    noise, levels = source(), trailing(LINEAR, 4)
    with pytest.raises(InterruptedError):
        sample(DATA, Euler(), noise.draw(), levels, LINEAR, noise=noise, on_step=chain(add, stop))


@each
def test_the_previous_estimate_is_the_last_step_s(method: Solver) -> None:
    given: list[Tensor | None] = []
    shown: list[Tensor | None] = []

    def data(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        given.append(previous)
        return DATA(x, level)

    def watch(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        shown.append(None if prediction is None else prediction.x0)
        return x

    noise, levels = source(), trailing(LINEAR, 4)
    sample(data, method, noise.draw(), levels, LINEAR, noise=noise, on_step=watch)
    evaluations = 2 if isinstance(method, Heun) else 1
    wanted = [estimate for estimate in shown[:3] for _ in range(evaluations)] + [shown[3]]
    assert len(given) == len(wanted) and all(a is b for a, b in zip(given, wanted, strict=True))


def test_no_gradient_is_kept_but_a_denoiser_may_use_one() -> None:
    def data(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            grad = torch.autograd.grad(-(leaf**2).sum(), leaf)[0]
        p = DATA(x, level)
        return Prediction(p.x0, p.eps, p.out, grad=0.1 * grad)

    for method in (Euler(), Ancestral(), Heun()):
        noise, levels = source(), trailing(LINEAR, 4)
        x = sample(data, method, noise.draw(), levels, LINEAR, noise=noise)
        assert not x.requires_grad and bool(torch.isfinite(x).all())


def test_gradients_guide_each_solver_by_its_own_rule() -> None:
    """Ancestral adds its variance times the gradient (Dhariwal 2021, alg. 1), the others shift eps (alg. 2)."""
    now, nxt, x = LINEAR.level(500), LINEAR.level(400), torch.ones(1, 2, dtype=torch.float64)
    grad = torch.tensor([[1.0, -2.0]], dtype=torch.float64)

    def step(method: Solver, guided: bool) -> Tensor:
        def ask(x: Tensor, level: NoiseLevel) -> Prediction:
            p = DATA(x, level)
            return Prediction(p.x0, p.eps, p.out, grad=grad if guided else None)

        levels = [now, nxt]
        return method.step(ask, x, now, nxt, method.init(LINEAR, levels), source(0))[0]

    ancestral = step(Ancestral(), True) - step(Ancestral(), False)
    assert torch.allclose(ancestral, transition(now, nxt).variance * grad, rtol=1e-9)
    shift = nxt.alpha * now.sigma**2 / now.alpha - nxt.sigma * now.sigma
    assert torch.allclose(step(Euler(), True) - step(Euler(), False), shift * grad, rtol=1e-9)


def test_going_up_renoises_and_starts_afresh() -> None:
    """A Restart grid: down, up, down again. The way up is one draw per picture, and the estimate is forgotten."""
    down = [LINEAR.level(t) for t in (900, 500, 100)]
    levels = [*down, *[LINEAR.level(t) for t in (700, 300)], CLEAN]
    seen: list[tuple[float, bool]] = []
    previous: list[bool] = []

    def data(x: Tensor, level: NoiseLevel, last: Tensor | None) -> Prediction:
        previous.append(last is None)
        return DATA(x, level)

    def watch(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        seen.append((float(level.t), prediction is None))
        return x

    noise, twin = source(), source()
    x = noise.draw()
    result = sample(data, Euler(), x, levels, LINEAR, noise=noise, on_step=watch)
    assert [s[0] for s in seen] == [900, 500, 100, 700, 300, 0]
    assert [s[1] for s in seen] == [True, False, False, True, False, False]
    assert previous == [True, False, True, False]

    by_hand = sample(DATA, Euler(), twin.draw(), down, LINEAR, noise=twin)
    ratio = levels[3].alpha / levels[2].alpha
    z = twin.draw()
    by_hand = ratio * by_hand + torch.sqrt(levels[3].sigma ** 2 - (ratio * levels[2].sigma) ** 2) * z
    by_hand = sample(DATA, Euler(), by_hand, levels[3:], LINEAR, noise=twin)
    assert torch.allclose(result, by_hand, rtol=1e-12)


@pytest.mark.parametrize("method", [Euler(), Heun()], ids=["euler", "heun"])
@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "flow"])
def test_climbing_inverts(method: Solver, name: str) -> None:
    """DDIM inversion: up with the solver, down again, back at the start but for an error of the solver's order."""
    schedule, x0 = SCHEDULES[name], MIXTURE.sample(50, torch.Generator().manual_seed(0)).double()

    def lost(steps: int) -> float:
        noise = source(*range(50))
        levels = [schedule.from_nsr(n) for n in torch.logspace(1, -1.3, steps + 1, dtype=torch.float64)]
        x = levels[-1].noise(x0, noise.draw())
        up = sample(MIXTURE, method, x, levels[::-1], schedule, noise=noise, climb=True)
        assert float((up - x).abs().max()) > 0.3
        return float((sample(MIXTURE, method, up, levels, schedule, noise=noise) - x).abs().max())

    coarse, fine = lost(200), lost(400)
    assert fine < (0.1 if method.order == 1 else 1e-3)
    assert fine < coarse / 2 ** (method.order - 0.25)


@pytest.mark.parametrize("name", [name for name, method in SOLVERS.items() if method.stochastic])
def test_climbing_takes_a_solver_without_noise(name: str) -> None:
    noise, levels = source(), [LINEAR.level(t) for t in (0, 200, 400, 600)]
    with pytest.raises(UserError, match="take a deterministic one"):
        sample(MIXTURE, solver(name), noise.draw(), levels, LINEAR, noise=noise, climb=True)


def test_nearly_pure_noise_is_left_by_a_first_order_step() -> None:
    """The cosine table ends at 20,000 times more noise than signal: a trapezoid in that ratio would explode there."""
    schedule = SCHEDULES["cosine"]
    asked: list[float] = []

    def counted(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        asked.append(float(level.t))
        return DATA(x, level)

    for name, times in [("heun", [999]), ("dpm_2", [999, 997]), ("flow_heun", [999, 899])]:
        asked.clear()
        noise, levels = source(), [schedule.level(t) for t in (999, 899)]
        assert levels[0].is_nearly_noise and not levels[0].is_noise and not levels[1].is_nearly_noise
        x = sample(counted, solver(name), start(noise, levels[0]), levels, schedule, noise=noise)
        assert [round(t) for t in asked] == times and float(x.abs().max()) < 5
    assert NoiseLevel.of(0, 0.0, 1.0).is_nearly_noise and not SCHEDULES["linear"].level(999).is_nearly_noise


def test_deterministic_solvers_draw_nothing() -> None:
    for method in (Euler(), Heun()):
        noise, levels = source(), trailing(LINEAR, 4)
        x, before = noise.draw(), [g.get_state() for g in noise._generators]
        sample(DATA, method, x, levels, LINEAR, noise=noise)
        assert all(torch.equal(a, g.get_state()) for a, g in zip(before, noise._generators, strict=True))


@pytest.mark.parametrize(("name", "std"), [("linear", 1.0), ("flow", 1.0), ("ve", (1 + 80**2) ** 0.5)])
def test_the_start_has_the_marginal_s_spread(name: str, std: float) -> None:
    schedule, noise = SCHEDULES[name], source(0, size=20_000)
    x = start(noise, schedule.level(schedule.t_range[1]))
    assert float(x.std()) == pytest.approx(std, rel=0.03)


def test_eta_one_is_ancestral_with_the_small_variance() -> None:
    """Song 2021, eq. 16: same mean, same noise, on every path, step by step."""
    for name, schedule in SCHEDULES.items():
        x = source(3).draw()
        for now, nxt in zip(levels := trailing(schedule, 12), levels[1:], strict=False):
            found = [
                method.step(MIXTURE, x, now, nxt, method.init(schedule, levels), source(9))[0]
                for method in (Euler(eta=1.0), Ancestral())
            ]
            assert torch.allclose(*found, rtol=1e-10, atol=1e-12), name


def test_on_a_preserving_path_and_in_ratios_a_step_is_the_same() -> None:
    """VP and VE are one process in two scales: `x / alpha` of the one is the other's x (Euler, Heun)."""
    vp, ve = LINEAR, SCHEDULES["ve"]
    nsr = torch.logspace(1.5, -1, 12, dtype=torch.float64)
    for method in (Euler(), Heun(), Euler(eta=0.7), Euler(churn=Churn(5.0))):
        ends = []
        for schedule in (vp, ve):
            levels = [schedule.from_nsr(n) for n in nsr]
            x = source(4).draw() * levels[0].alpha
            ends.append(sample(MIXTURE, method, x, levels, schedule, noise=source(5)) / levels[-1].alpha)
        assert torch.allclose(*ends, rtol=1e-9)


def test_empirical_data_returns_what_it_has_seen() -> None:
    points = torch.tensor([[-1.0, 0.3], [0.4, 0.8], [1.0, -1.0]], dtype=torch.float64)
    noise = source(*range(30))
    levels = trailing(SCHEDULES["cosine"], 50)
    x = sample(EmpiricalData(points), Euler(), noise.draw(), levels, SCHEDULES["cosine"], noise=noise)
    assert float((x[:, None] - points).norm(dim=-1).min(1).values.max()) < 1e-6


def test_analytic_denoisers_agree_with_each_other() -> None:
    """A mixture of one is the Gaussian; its samples have its moments; the estimate explains x_t."""
    one = MixtureData(DATA.mean[None], 0.09)
    x, level = source().draw(), SCHEDULES["flow"].level(0.3)
    assert torch.allclose(one(x, level).x0, DATA(x, level).x0, rtol=1e-6)
    assert torch.allclose(level.noise(DATA(x, level).x0, DATA(x, level).eps), x, rtol=1e-6)
    draws = DATA.sample(50_000, torch.Generator().manual_seed(0))
    assert torch.allclose(draws.mean(0), DATA.mean, atol=4 * 0.3 / 50_000**0.5)
    assert torch.allclose(draws.var(0), torch.tensor(0.09), rtol=4 * (2 / 50_000) ** 0.5)


def test_names_and_options() -> None:
    assert solver("DDIM", eta=0.3) == Euler(eta=0.3) and solver(" heun ") == Heun()
    assert [SOLVERS[name].build().order for name in ("ddpm", "ddim", "euler", "heun")] == [1, 1, 1, 2]
    with pytest.raises(UserError, match="did you mean 'euler'"):
        solver("eular")
    with pytest.raises(UserError, match="did you mean 'small'"):
        Ancestral(variance="smal")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"eta must lie in \[0, 1\]"):
        Euler(eta=1.5)


def test_a_learned_variance_is_asked_for_only_where_there_is_one() -> None:
    noise, levels = source(), trailing(LINEAR, 3)
    with pytest.raises(UserError, match="no learned variance"):
        sample(DATA, Ancestral(variance="learned"), noise.draw(), levels, LINEAR, noise=noise)


@pytest.mark.parametrize(("frac", "variance"), [(0.0, "small"), (1.0, "large")])
def test_the_learned_variance_runs_from_small_to_large(frac: float, variance: str) -> None:
    def data(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        p = DATA(x, level)
        return Prediction(p.x0, p.eps, p.out, var_frac=torch.full_like(x, frac))

    ends = []
    for denoise, method in [(data, Ancestral(variance="learned")), (DATA, Ancestral(variance=variance))]:
        noise, levels = source(), trailing(LINEAR, 10)
        ends.append(sample(denoise, method, noise.draw(), levels, LINEAR, noise=noise))
    assert torch.allclose(*ends, rtol=1e-9)


STEADY = [name for name, method in SOLVERS.items() if not method.stochastic]


@pytest.mark.parametrize("path", ["linear", "cosine", "ve", "flow", "zero_linear"])
@pytest.mark.parametrize("name", STEADY)
def test_every_steady_method_walks_from_clean_to_noise_and_back(name: str, path: str) -> None:
    """Whole grids, from the clean end to pure or nearly pure noise, which no other solver's step could leave."""
    schedule, noise = SCHEDULES[path], source(*range(20))
    levels, x0 = trailing(schedule, 40), DATA.sample(20, torch.Generator().manual_seed(0)).double()
    try:
        up = sample(DATA, solver(name), x0, levels[::-1], schedule, noise=noise, climb=True)
    except UserError as error:
        assert name == "dpm_adaptive" and "cannot do" in str(error)
        return
    assert 0.8 < float((up / levels[0].sigma).std()) < 1.1
    down = sample(DATA, solver(name), up, levels, schedule, noise=noise)
    assert float((down - x0).abs().max()) < 0.15  # of data whose standard deviation is 0.3


def test_a_gradient_counts_for_nothing_in_pure_noise() -> None:
    def data(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        p = DATA(x, level)
        return Prediction(p.x0, p.eps, p.out, grad=torch.full_like(x, 0.1))

    for path in ("flow", "zero_linear"):
        levels, noise = trailing(SCHEDULES[path], 10), source()
        assert levels[0].is_noise
        for name in STEADY:
            x = sample(data, solver(name), noise.draw(), levels, SCHEDULES[path], noise=source())
            assert bool(torch.isfinite(x).all()), (path, name)
    one = Prediction(*[torch.ones(2, 2)] * 3, grad=torch.ones(2, 2))
    mixed = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in ([0, 1], [0.0, 0.6], [1.0, 0.8])))
    shifted = one.shifted(mixed)
    assert torch.equal(shifted.x0[0], one.x0[0]) and torch.equal(shifted.eps[0], one.eps[0])
    assert torch.allclose(shifted.x0[1], torch.tensor(1 + 0.8 / 0.6 * 0.8)) and torch.allclose(
        shifted.eps[1], torch.tensor(0.2)
    )


def test_what_a_hook_returns_must_be_the_picture() -> None:
    noise, levels = source(), trailing(LINEAR, 2)
    for wrong, said in ((5, "it gave a int"), (torch.zeros(1, 2), r"a tensor \(3, 2\) .* gave a tensor \(1, 2\)")):
        with pytest.raises(ValueError, match=said):
            sample(DATA, Euler(), noise.draw(), levels, LINEAR, noise=source(), on_step=lambda *_, one=wrong: one)  # type: ignore[misc]


def test_noise_is_that_of_as_many_pictures() -> None:
    levels = trailing(LINEAR, 2)
    for seeds in ((0,), (0, 1)):
        with pytest.raises(ValueError, match="3 pictures, one seed for each"):
            sample(DATA, SOLVERS["ddpm"].build(), source().draw(), levels, LINEAR, noise=source(*seeds))
