"""What stochastic solvers share: pictures apart from their batch, every path, limits, learned variance, options.

And the distribution they draw from: on a mixture, at enough steps, no further from exact draws than those are from one
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.analytic import GaussianData, MixtureData
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.grid import exponential, trailing
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.posterior import ancestral, renoise, transition
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.schedule import FlowSchedule
from sfumato.diffusion.solvers import Ancestral, Euler, Heun, Solver, solver
from sfumato.diffusion.solvers.consistency import LCM, TCD
from sfumato.diffusion.solvers.dpm2 import DPM2, DPM2Ancestral
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive, DPMFast, ends, plan
from sfumato.diffusion.solvers.dpmpp_ancestral import DPMpp2SAncestral
from sfumato.diffusion.solvers.dpmpp_sde import DPMppMultistepSDE, DPMppSDE, SDEDPMSolver
from sfumato.diffusion.solvers.euler_ancestral import EulerAncestral
from sfumato.diffusion.solvers.flow_heun import FlowHeun
from sfumato.diffusion.solvers.sa_solver import SASolver
from sfumato.errors import UserError
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES
from .solver_cases import STOCHASTIC

LINEAR = SCHEDULES["linear"]
MIXTURE = MixtureData(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.2, -0.9]]), torch.tensor([0.05, 0.1, 0.02]), torch.tensor([0.3, 0.5, 0.2])
)
OURS = {name: method for name, method in STOCHASTIC.items() if not isinstance(method, Ancestral)}
OURS |= {"dpm 2": DPM2(), "dpm fast": DPMFast(), "dpm adaptive": DPMAdaptive(), "heun (flow)": FlowHeun()}
each = pytest.mark.parametrize("method", OURS.values(), ids=OURS.keys())


def run(method: Solver[Any], name: str, seeds: tuple[int, ...], steps: int) -> Tensor:
    schedule, noise = SCHEDULES[name], NoiseSource(seeds, (2,), dtype=torch.float64)
    levels = trailing(schedule, steps)
    return sample(MIXTURE, method, start(noise, levels[0]), levels, schedule, noise=noise)


@each
def test_a_picture_does_not_depend_on_its_batch(method: Solver[Any]) -> None:
    together = run(method, "linear", (5, 6, 7), 6)
    for i, seed in enumerate((5, 6, 7)):
        assert torch.allclose(run(method, "linear", (seed,), 6)[0], together[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "zero_linear", "ve", "flow, shift 3"])
@each
def test_every_path(method: Solver[Any], name: str) -> None:
    """Also from pure noise: finite, and near the data (LCM and TCD are for other networks: finite only)."""
    x = run(method, name, tuple(range(24)), 25)
    assert bool(torch.isfinite(x).all())
    near = (x[:, None] - MIXTURE.means).norm(dim=-1).min(1).values < 1.5
    assert float(near.double().mean()) > 0.9


@each
def test_one_step_to_clean_is_the_estimate(method: Solver[Any]) -> None:
    """From pure noise and from any other level; LCM's boundary scalings leave it alone there."""
    for schedule, first in ((LINEAR, LINEAR.level(800)), (FlowSchedule(), FlowSchedule().level(1.0))):
        noise = NoiseSource([1], (2,), dtype=torch.float64)
        x = noise.draw()
        plain = replace(method, churn=type(method.churn)()) if hasattr(method, "churn") else method
        found = sample(MIXTURE, plain, x, [first, CLEAN], schedule, noise=noise)
        assert torch.allclose(found, MIXTURE(x, first).x0, atol=1e-6)


RENEWED = ["euler ancestral", "dpm 2 ancestral", "dpm++ 2s ancestral", "dpm++ sde", "dpm++ 2m sde", "sde-dpm-solver"]


@pytest.mark.parametrize("name", RENEWED)
def test_leaving_pure_noise_renews_it_all(name: str) -> None:
    """The limit of the method's own formula: `alpha' x0 + sigma' z`, whatever the first noise was beside its `x0`."""
    schedule = FlowSchedule()
    levels = [schedule.level(1.0), schedule.level(0.8)]
    method = STOCHASTIC[name]
    noise, copy = (NoiseSource([3], (2,), dtype=torch.float64) for _ in range(2))
    x = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    found = sample(MIXTURE, method, x, levels, schedule, noise=noise)
    brownian = getattr(method, "increments", None) == "brownian"
    z = copy.between(math.inf, levels[1].log_nsr) if brownian else copy.draw()
    assert torch.allclose(found, levels[1].noise(MIXTURE(x, levels[0]).x0, z), atol=1e-12)


def test_brownian_noise_does_not_depend_on_the_number_of_steps() -> None:
    """More steps refine one picture; with fresh noise every number of steps draws another."""

    def picture(steps: int, increments: Any) -> Tensor:
        noise = NoiseSource([8], (2,), dtype=torch.float64)
        x = 20 * torch.tensor([[0.3, -0.5]], dtype=torch.float64)
        levels = [SCHEDULES["ve"].from_nsr(s) for s in torch.exp(torch.linspace(3, -4, steps + 1).double())]
        return sample(MIXTURE, DPMppMultistepSDE(increments=increments), x, levels, SCHEDULES["ve"], noise=noise)

    near = float((picture(400, "brownian") - picture(200, "brownian")).norm())
    far = float((picture(400, "fresh") - picture(200, "fresh")).norm())
    assert near < 0.1 < far


def test_with_eta_zero_the_family_is_deterministic_and_agrees_with_the_plain_methods() -> None:
    """DPM2 a with eta 0 is DPM2; Euler a is Euler; DPM++ SDE and 2M SDE draw nothing."""

    class Silent(NoiseSource):
        def draw(self) -> Tensor:
            return torch.zeros((1, 2), dtype=torch.float64)

        def between(self, u: float, v: float) -> Tensor:
            raise AssertionError("asked for noise")

    x = torch.tensor([[0.3, -0.5]], dtype=torch.float64)

    def end(method: Solver[Any]) -> Tensor:
        return sample(MIXTURE, method, x, trailing(LINEAR, 12), LINEAR, noise=Silent([0], (2,)))

    assert torch.allclose(end(DPM2Ancestral(eta=0.0)), end(DPM2()), atol=1e-12)
    assert torch.allclose(end(EulerAncestral(eta=0.0)), end(Euler()), atol=1e-12)
    assert torch.allclose(end(DPMpp2SAncestral(eta=0.0)), end(DPMppSDE(eta=0.0)), atol=1e-12)
    assert torch.allclose(end(DPMppMultistepSDE(1, eta=0.0)), end(Euler()), atol=1e-12)
    assert torch.allclose(end(SDEDPMSolver(1, eta=0.0)), end(Euler()), atol=1e-12)
    assert torch.allclose(end(SASolver(1, 0, tau=0.0)), end(Euler()), atol=1e-12)
    assert torch.allclose(end(TCD(0.0)), end(Euler()), atol=1e-12)


def test_euler_ancestral_is_ddim_with_eta_one() -> None:
    a, b = (run(method, "linear", (1, 2), 9) for method in (EulerAncestral(), Euler(eta=1.0)))
    assert torch.equal(a, b)


# --- learned variance ------------------------------------------------------------------------------------------------

LEARNERS: dict[str, Callable[..., Solver[Any]]] = {
    "euler ancestral": EulerAncestral,
    "euler ancestral, eta 0.5": lambda **options: EulerAncestral(eta=0.5, **options),
    "dpm 2 ancestral": DPM2Ancestral,
    "dpm++ 2s ancestral": DPMpp2SAncestral,
    "ddim, eta 1": lambda **options: Euler(eta=1.0, **options),
    "ddim, eta 0.5": lambda **options: Euler(eta=0.5, **options),
}


def learned(frac: Tensor | None) -> Callable[..., Prediction]:
    def denoise(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        return replace(MIXTURE(x, level), var_frac=frac)

    return denoise


@pytest.mark.parametrize("path", ["linear", "ve", "flow"])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_learned_variance_lies_between_the_method_s_own_and_beta(name: str, path: str) -> None:
    """Per coordinate `own^(1 - f) beta^f`; the mean is unchanged."""
    schedule = SCHEDULES[path]
    now, nxt = schedule.from_nsr(3.0), schedule.from_nsr(1.2)
    frac = torch.tensor([[0.0, 1.0], [0.3, 0.8]], dtype=torch.float64)
    x = torch.tensor([[0.4, -1.1], [0.2, 0.1]], dtype=torch.float64) * math.sqrt(float(now.alpha**2 + now.sigma**2))

    def end(noise: NoiseSource, **options: Any) -> Tensor:
        return sample(learned(frac), LEARNERS[name](**options), x, [now, nxt], schedule, noise=noise)

    z = NoiseSource([3, 4], (2,), dtype=torch.float64).draw()
    plain = end(NoiseSource([3, 4], (2,), dtype=torch.float64))
    found = end(NoiseSource([3, 4], (2,), dtype=torch.float64), variance="learned")
    own = float(ancestral(now, nxt, 0.5 if "0.5" in name else 1.0)[1])
    beta = float(transition(now, nxt).beta)
    std = torch.exp((frac * math.log(beta) + (1 - frac) * math.log(own)) / 2)
    assert torch.allclose(found - plain, (std - math.sqrt(own)) * z, atol=1e-10)
    assert float((found - plain)[1].abs().min()) > 1e-4  # the fractions inside do change something


def test_ddim_with_eta_one_and_a_learned_variance_is_ddpm() -> None:
    """Its own variance is beta-tilde and its mean DDPM's, so the interpolation is improved DDPM's exactly."""
    frac = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
    ends = []
    for method in (Euler(eta=1.0, variance="learned"), Ancestral(variance="learned")):
        noise = NoiseSource([2], (2,), dtype=torch.float64)
        ends.append(sample(learned(frac), method, noise.draw(), trailing(LINEAR, 10), LINEAR, noise=noise))
    assert torch.allclose(*ends, atol=1e-10)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learned_variance_has_to_be_there(name: str) -> None:
    noise, method = NoiseSource([2], (2,)), LEARNERS[name](variance="learned")
    with pytest.raises(UserError, match="no learned variance"):
        sample(learned(None), method, noise.draw(), trailing(LINEAR, 3), LINEAR, noise=noise)
    with pytest.raises(UserError, match="unknown variance 'learnd'.*learned"):
        LEARNERS[name](variance="learnd")


def test_no_noise_no_learned_variance() -> None:
    for make in (Euler, EulerAncestral, DPM2Ancestral, DPMpp2SAncestral):
        with pytest.raises(UserError, match="eta above 0"):
            make(eta=0.0, variance="learned")  # type: ignore[operator]


# --- methods with their own shape ------------------------------------------------------------------------------------


def test_dpm_adaptive_takes_smaller_steps_for_smaller_errors() -> None:
    """And each picture its own: an easy one is done early and then waits."""
    schedule, asked = SCHEDULES["ve"], []

    def counting(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
        asked.append(level)
        return MIXTURE(x, level)

    exact = sample(
        MIXTURE, Heun(), torch.full((1, 2), 9.0).double(), exponential(schedule, 3000), schedule, noise=source(0)
    )
    counts, errors = [], []
    for rtol in (0.05, 0.005, 0.0005):
        asked.clear()
        levels = ends(exponential(schedule, 20))
        method = DPMAdaptive(rtol=rtol, atol=rtol / 6)
        found = sample(counting, method, torch.full((1, 2), 9.0).double(), levels, schedule, noise=source(0))
        counts.append(len(asked))
        errors.append(float((found - exact).abs().max()))
    assert counts[0] < counts[1] < counts[2]
    assert errors[0] > errors[2] and errors[2] < 2e-3


def source(*seeds: int) -> NoiseSource:
    return NoiseSource(seeds, (2,), dtype=torch.float64)


def test_dpm_adaptive_stops_where_the_grid_says() -> None:
    seen: list[NoiseLevel] = []

    def watch(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        seen.append(level)
        return x

    levels = trailing(LINEAR, 5)
    sample(MIXTURE, DPMAdaptive(), source(0, 1).draw(), levels, LINEAR, noise=source(0, 1), on_step=watch)
    assert seen == levels


def test_the_ends_of_a_grid() -> None:
    levels = trailing(LINEAR, 6)
    assert ends(levels) == [levels[0], levels[-2], levels[-1]] and ends(levels[:-1]) == [levels[0], levels[-2]]
    flow = trailing(FlowSchedule(), 6)
    assert ends(flow) == [flow[0], flow[1], flow[-2], flow[-1]] and ends(levels[-2:]) == levels[-2:]


def test_dpm_fast_s_plan() -> None:
    """Lu 2022, section 3.4: as many evaluations as it says, for every remainder of three."""
    for nfe in range(3, 40):
        ending = {0: (2, 1), 1: (1,), 2: (2,)}[nfe % 3]
        orders = plan(nfe // 3 + 1, ending)
        assert sum(orders) == nfe and len(orders) == nfe // 3 + 1
    assert plan(1) == (1,) and plan(2) == (2, 1)


def test_sa_solver_corrects_what_a_hook_has_changed() -> None:
    """The correction is added to the picture as it is, so that kept parts of it are not forgotten."""

    def push(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        return x + 0.1 if prediction is not None and not level.is_clean else x

    data, x = GaussianData(torch.zeros(2, dtype=torch.float64), 0.25), torch.ones((1, 2), dtype=torch.float64)
    levels = [LINEAR.level(500), LINEAR.level(300), LINEAR.level(100)]
    results = [sample(data, SASolver(tau=0.0), x, levels, LINEAR, noise=source(0), on_step=h) for h in (push, keep_it)]
    assert 0.1 < float((results[0] - results[1]).min()) < 0.4


def keep_it(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
    return x


def test_tcd_goes_below_and_back() -> None:
    """Zheng 2024, algorithm 4, on a table (rounded down) and on a continuous path."""
    x = torch.ones((1, 2), dtype=torch.float64)
    for schedule, now, nxt, s in ((LINEAR, 800, 401, 280), (FlowSchedule(), 0.8, 0.4, 0.28)):
        levels, below = [schedule.level(now), schedule.level(nxt)], schedule.level(s)
        p = MIXTURE(x, levels[0])
        wanted = renoise(below.noise(p.x0, p.eps), below, levels[1], source(4).draw())
        found = sample(MIXTURE, TCD(0.3), x, levels, schedule, noise=source(4))
        assert torch.allclose(found, wanted, atol=1e-12)


def test_lcm_scales_on_tables_only() -> None:
    """c_skip and c_out are in units of a table's index; elsewhere, and with scaling None, f is x0."""
    x = torch.ones((1, 2), dtype=torch.float64)
    for schedule, t in ((LINEAR, 1), (FlowSchedule(), 0.01)):
        level = schedule.level(t)
        x0 = MIXTURE(x, level).x0
        scaled, plain = (
            sample(MIXTURE, LCM(scaling), x, [level, CLEAN], schedule, noise=source(0)) for scaling in (0.5, None)
        )
        assert torch.allclose(plain, x0)
        f = x0 / math.sqrt(2) + x / 2 if schedule is LINEAR else x0
        assert torch.allclose(scaled, f)


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (EulerAncestral, {"eta": -0.1}, "eta must not be negative"),
    (DPMppSDE, {"eta": -1.0}, "eta must not be negative"),
    (DPMppSDE, {"increments": "brown"}, "unknown increments 'brown'"),
    (DPMppSDE, {"r": 1.0}, "r must lie in"),
    (DPMppMultistepSDE, {"points": 4}, "points must be 1, 2 or 3"),
    (DPMppMultistepSDE, {"kind": "huen"}, "did you mean 'heun'"),
    (SDEDPMSolver, {"points": 3}, "points must be 1 or 2"),
    (DPMFast, {"ending": (4,)}, "orders of 1 to 3"),
    (DPMFast, {"eta": -1.0}, "eta must not be negative"),
    (DPMAdaptive, {"solver_order": 4}, "solver_order must be 2 or 3"),
    (DPMAdaptive, {"rtol": 0.0, "atol": 0.0}, "one of the tolerances"),
    (SASolver, {"predictor_order": 5}, "predictor_order must be 1 to 4"),
    (SASolver, {"corrector_order": -1}, "corrector_order must be 0 to 4"),
    (SASolver, {"tau": -1.0}, "tau must not be negative"),
    (SASolver, {"interval": (0.8, 0.2)}, "interval must be two fractions"),
    (LCM, {"scaling": 0.0}, "must be positive"),
    (TCD, {"gamma": 1.2}, "gamma must lie in"),
]


@pytest.mark.parametrize(("make", "options", "words"), REFUSED, ids=[f"{m.__name__} {o}" for m, o, _ in REFUSED])
def test_options_out_of_range_are_refused(make: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**options)


def test_brownian_noise_needs_one_level_for_all() -> None:
    levels = [LINEAR.level(torch.tensor([500.0, 400.0])), LINEAR.level(torch.tensor([300.0, 200.0]))]
    x = torch.ones((2, 2))
    with pytest.raises(UserError, match="increments='fresh'"):
        sample(MIXTURE, DPMppMultistepSDE(), x, levels, LINEAR, noise=NoiseSource([0, 1], (2,)))
    fresh = DPMppMultistepSDE(increments="fresh")
    together = sample(MIXTURE, fresh, x, levels, LINEAR, noise=NoiseSource([0, 1], (2,)))
    for i in range(2):
        own = [NoiseLevel(*(v[i] for v in (level.t, level.alpha, level.sigma))) for level in levels]
        alone = sample(MIXTURE, fresh, x[i : i + 1], own, LINEAR, noise=NoiseSource([i], (2,)))
        assert torch.allclose(alone[0], together[i], atol=1e-5)


NAMES = {
    "Euler a": EulerAncestral(),
    "k_euler_ancestral": EulerAncestral(),
    "EulerAncestralDiscreteScheduler": EulerAncestral(),
    "DPM2": DPM2(),
    "k_dpm_2_a": DPM2Ancestral(),
    "KDPM2AncestralDiscreteScheduler": DPM2Ancestral(),
    "DPM++ 2S a": DPMpp2SAncestral(),
    "sample_dpmpp_2s_ancestral": DPMpp2SAncestral(),
    "DPM++ SDE": DPMppSDE(),
    "DPMSolverSDEScheduler": DPMppSDE(),
    "dpmpp_2m_sde": DPMppMultistepSDE(),
    "sde-dpmsolver++": DPMppMultistepSDE(),
    "DPM++ 2M SDE Heun": DPMppMultistepSDE(kind="heun"),
    "dpmpp_3m_sde": DPMppMultistepSDE(3, "heun"),
    "sde-dpmsolver": SDEDPMSolver(),
    "DPM fast": DPMFast(),
    "k_dpm_ad": DPMAdaptive(),
    "SASolverScheduler": SASolver(),
    "lcm": LCM(),
    "TCDScheduler": TCD(),
    "FlowMatchHeunDiscreteScheduler": FlowHeun(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert solver(name) == NAMES[name]


# --- the distribution ------------------------------------------------------------------------------------------------

DRAWS, DIRECTIONS, LADDER = 20_000, 32, (8, 16, 32, 64, 128, 256, 512)


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 1-Wasserstein distance of two sets (n, 2)."""
    angles = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    directions = torch.stack([torch.cos(angles), torch.sin(angles)])
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def as_one_picture(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
    p = MIXTURE(x[0], level)
    return Prediction(p.x0[None], p.eps[None], p.out[None])


def consistency(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Prediction:
    """The mixture's consistency function, by Heun's method to nsr 0.01 and one step from there."""
    schedule = SCHEDULES["ve"]
    clock = torch.linspace(level.log_nsr, math.log(0.01), 40, dtype=torch.float64)
    levels = [*(schedule.from_nsr(nsr) for nsr in torch.exp(clock)), CLEAN]
    x0 = sample(as_one_picture, Heun(), x / level.alpha, levels, schedule, noise=NoiseSource([0], (1,)))
    return Prediction(x0, (x - level.alpha * x0) / level.sigma, x0)


DISTRIBUTED = {**STOCHASTIC, "lcm": LCM(scaling=None), "tcd": TCD(1.0)}


@pytest.fixture(scope="module")
def exact() -> tuple[Tensor, float]:
    """Exact draws, and how far from them others may be: mean + 5 standard deviations of 20 distances of exact pairs."""
    generator = torch.Generator().manual_seed(0)
    pairs = [sliced(MIXTURE.sample(DRAWS, generator), MIXTURE.sample(DRAWS, generator)) for _ in range(20)]
    distances = torch.tensor(pairs, dtype=torch.float64)
    return MIXTURE.sample(DRAWS, generator), float(distances.mean() + 5 * distances.std())


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_at_enough_steps_the_draws_are_the_mixture_s(name: str, exact: tuple[Tensor, float]) -> None:
    """From exact states at nsr 20, on a grid even in log nsr; prints the first N of the ladder that will do."""
    schedule, (draws, bound) = LINEAR, exact
    distilled = name in ("lcm", "tcd")
    denoise = consistency if distilled else as_one_picture
    found: dict[int, float] = {}
    for steps in (2, 4, 8) if distilled else LADDER:
        clock = torch.linspace(math.log(20), math.log(0.02), steps, dtype=torch.float64)
        levels = [*(schedule.from_nsr(nsr) for nsr in torch.exp(clock)), CLEAN]
        noise = NoiseSource([steps], (DRAWS, 2))
        x0 = MIXTURE.sample(DRAWS, torch.Generator().manual_seed(steps))[None]
        x = sample(denoise, DISTRIBUTED[name], levels[0].noise(x0, noise.draw()), levels, schedule, noise=noise)
        found[steps] = sliced(x[0], draws)
        if found[steps] <= bound:
            break
    print(f"{name}: N = {steps}, sliced Wasserstein {found[steps]:.4f} of at most {bound:.4f}")
    assert found[steps] <= bound, f"{name}: {found}, bound {bound:.4f}"
