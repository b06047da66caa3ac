"""Multistep and exponential solvers against diffusers, and against k-diffusion's formulas written down independently.

Both sides are handed the same levels, a scheduler's own times and ratios (`seen`), and start from the same state; the
grids have tests of their own. Where diffusers cannot be met, the test says so under the quirk's name:

- "Float32 coefficients": they are differences of nearly equal float32 numbers, and with few steps from high noise the
  noise forms magnify any rounding by exp(h). The exponential schedulers are handed their ratios and the state in
  float64, and then agree to 1e-9; only DPMSolverMultistep casts the state back ("State in float32").
- "Half a second difference": in order 3 of DPMSolverMultistep and EDMDPMSolverMultistep the quadratic term has half the
  weight of the expansion, which leaves order 2; ours has that on request (`published`).
- "No clean end": the noise forms refuse `final_sigmas_type="zero"`, DEIS has none, and UniPC bh1 is 0 times infinity
  there; these end at t = 0.
- "A repeated end": on Karras grids with another end the last level comes twice, and the step of length 0 is 0/0; there
  both sides go to half the ratio instead.
- "Order from the index" (LMS), "Velocities combined" and "Unchained steps" (PNDM), "No signal, no picture" (IPNDM),
  "Looking ahead" (DDIMInverse), "Truncated times" (flow): in the tests' own docstrings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from sfumato.diffusion.analytic import GaussianData, MixtureData
from sfumato.diffusion.denoiser import Denoiser, edm_preconditioning
from sfumato.diffusion.grid import exponential, karras, leading, trailing
from sfumato.diffusion.guidance import unguided
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.parameterization import EPS, FLOW, V, edm
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import (
    FlowSchedule,
    Schedule,
    TableSchedule,
    VESchedule,
    linear_alpha_bar,
    rescale_zero_terminal_snr,
    scaled_linear_alpha_bar,
)
from sfumato.diffusion.solvers import Euler, Heun, Solver, solver
from sfumato.diffusion.solvers.deis import DEIS
from sfumato.diffusion.solvers.dpm import DPM, DPMSingle
from sfumato.diffusion.solvers.multistep import LMS, PLMS
from sfumato.diffusion.solvers.unipc import UniPC
from sfumato.errors import UserError
from sfumato.random import NoiseSource
from sfumato.systems.scheduler_config import from_diffusers

from .test_solvers import BETAS, KINDS, SEEDS, SHAPE, Analytic, Network, TinyNet, difference, mixture, ours, start_both

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")  # of DPM-Solver's noise form

STEPS = (5, 10, 20, 50)
MIXED = [("scaled_linear", "eps"), ("linear", "v")]  # each table and each output once

each_count = pytest.mark.parametrize("steps", STEPS)
each_pairing = pytest.mark.parametrize(("betas", "kind"), MIXED, ids=["-".join(pair) for pair in MIXED])


def seen(scheduler: Any) -> list[NoiseLevel]:
    """The levels a variance-preserving scheduler visits: its own times, and what its own ratios say of alpha, sigma."""
    levels = []
    for t, nsr in zip([*scheduler.timesteps.tolist(), 0], scheduler.sigmas.double().tolist(), strict=True):
        alpha = 1 / math.sqrt(1 + nsr**2)
        levels.append(NoiseLevel.of(t, alpha, nsr * alpha))
    return levels


def follow(scheduler: Any, network: Network, x: Tensor) -> list[Tensor]:
    """The states of a scheduler's loop, the first one included."""
    states = [x]
    for t in scheduler.timesteps[scheduler.begin_index or 0 :]:
        states.append(scheduler.step(network(states[-1], t.expand(len(x)).float()), t, states[-1]).prev_sample)
    return states


def follow_in_ratios(scheduler: Any, network: Network, x: Tensor, **options: Any) -> list[Tensor]:
    """The same of a scheduler that keeps `x / alpha`, as variance-preserving states."""
    scale = torch.sqrt(scheduler.sigmas**2 + 1)
    states, y = [x], x * scale[0]
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(len(y))), t, y, **options).prev_sample
        states.append(y / scale[i + 1])
    return states


def table(betas: str) -> TableSchedule:
    return TableSchedule(BETAS[betas][0], interpolation="linear")


# --- schedulers of diffusers in terms of our solvers -----------------------------------------------------------------

Case = tuple[Solver[Any], Callable[..., Any], dict[str, Any]]


def exponential_cases() -> dict[str, Case]:
    """DPM-Solver(++) multistep and singlestep, DEIS and UniPC, every order and form."""
    cases: dict[str, Case] = {}
    for order in (1, 2, 3):
        cases[f"deis {order}"] = DEIS(order=order), DEISMultistepScheduler, {"solver_order": order}
        for kind in ("data", "noise"):
            end = {"final_sigmas_type": "zero" if kind == "data" else "sigma_min"}
            algorithm = {"algorithm_type": "dpmsolver++" if kind == "data" else "dpmsolver"}
            for form in ("midpoint", "heun")[: 1 if order == 1 else 2]:
                options = {"solver_order": order, "solver_type": form, **algorithm, **end}
                make = {"order": order, "kind": kind, "form": form}
                several, single = f"multistep {order} {kind} {form}", f"singlestep {order} {kind} {form}"
                cases[several] = DPM(**make, published=True), DPMSolverMultistepScheduler, options
                options = {**options, "lower_order_final": True}
                cases[single] = DPMSingle(**make), DPMSolverSinglestepScheduler, options
            for variant in ("bh1", "bh2"):
                last = "zero" if kind == "data" and variant == "bh2" else "sigma_min"
                options = {
                    "solver_order": order,
                    "solver_type": variant,
                    "predict_x0": kind == "data",
                    "final_sigmas_type": last,
                }
                make = {"order": order, "kind": kind, "variant": variant}
                cases[f"unipc {order} {kind} {variant}"] = UniPC(**make), UniPCMultistepScheduler, options
    return cases


EXPONENTIAL = exponential_cases()
each_case = pytest.mark.parametrize("case", EXPONENTIAL)


def build(case: Case, betas: str, kind: str, steps: int, **more: Any) -> Any:
    """The scheduler with its times set; "Float32 coefficients" and "A repeated end" mended."""
    _, scheduler, options = case
    made = scheduler(**BETAS[betas][1], prediction_type=KINDS[kind][1], **{**options, **more})
    made.set_timesteps(steps)
    made.sigmas = made.sigmas.double()
    if abs(made.sigmas[-1] / made.sigmas[-2] - 1) < 1e-3:
        made.sigmas[-1] /= 2
    return made


def agree(case: Case, method: Solver[Any], betas: str, kind: str, steps: int, **more: Any) -> bool:
    """Whether a whole float64 loop is the same: within 1e-9, where their state is rounded to float32 2e-5."""
    reference, network = build(case, betas, kind, steps, **more), Analytic(table(betas), KINDS[kind][0])
    noise = NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    x = noise.draw()
    found, wanted = ours(method, network, seen(reference), noise, x), follow(reference, network, x)[-1]
    return difference(found, wanted) <= (2e-5 if isinstance(reference, DPMSolverMultistepScheduler) else 1e-9)


LOOPS = [("scaled_linear", "eps", "linspace"), ("linear", "v", "karras")]


@each_count
@each_case
@pytest.mark.parametrize(("betas", "kind", "spacing"), LOOPS, ids=["-".join(loop) for loop in LOOPS])
def test_exponential_loop(case: str, betas: str, kind: str, spacing: str, steps: int) -> None:
    more = {"use_karras_sigmas": True} if spacing == "karras" else {}
    assert agree(EXPONENTIAL[case], EXPONENTIAL[case][0], betas, kind, steps, **more)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("case", ["deis 2", "multistep 2 data midpoint", "unipc 2 data bh2"])
def test_exponential_loop_on_other_grids(case: str, spacing: str, steps: int) -> None:
    more = {"timestep_spacing": spacing}
    assert agree(EXPONENTIAL[case], EXPONENTIAL[case][0], "linear", "v", steps, **more)


OPTIONS: dict[str, tuple[str, Solver[Any], dict[str, Any]]] = {
    "multistep, no lower order": (
        "multistep 3 data midpoint",
        DPM(order=3, lower_order_final=False, published=True),
        {"lower_order_final": False},
    ),
    "multistep, ends at t = 0": (
        "multistep 3 data heun",
        DPM(order=3, form="heun", published=True),
        {"final_sigmas_type": "sigma_min"},
    ),
    "multistep, Euler at the end": (
        "multistep 2 noise heun",
        DPM(kind="noise", form="heun", euler_at_final=True),
        {"euler_at_final": True},
    ),
    "singlestep 2, ends at t = 0": (
        "singlestep 2 data heun",
        DPMSingle(form="heun"),
        {"final_sigmas_type": "sigma_min"},
    ),
    "singlestep 2, no lower order": (
        "singlestep 2 noise midpoint",
        DPMSingle(kind="noise", lower_order_final=False),
        {"lower_order_final": False},
    ),
    "singlestep 3, no lower order": (
        "singlestep 3 noise heun",
        DPMSingle(order=3, kind="noise", form="heun", lower_order_final=False),
        {"lower_order_final": False},
    ),
    "deis, no lower order": ("deis 3", DEIS(order=3, lower_order_final=False), {"lower_order_final": False}),
    "unipc, no lower order": (
        "unipc 3 data bh2",
        UniPC(order=3, lower_order_final=False),
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    ),
    "unipc, uncorrected steps": ("unipc 2 data bh2", UniPC(disable_corrector=(0, 3)), {"disable_corrector": [0, 3]}),
}


@pytest.mark.parametrize("steps", [5, 6, 7, 14, 15, 24])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, steps: int) -> None:
    """Also where the steps do not fill whole groups, for which theirs turns lower orders on."""
    case, method, more = OPTIONS[name]
    assert agree(EXPONENTIAL[case], method, "scaled_linear", "eps", steps, **more)


@each_count
@pytest.mark.parametrize(
    "case", ["multistep 2 data midpoint", "singlestep 2 data midpoint", "unipc 2 data bh2", "deis 2"]
)
def test_flow_loop(case: str, steps: int) -> None:
    """Flow matching: "Truncated times", the network is told whole thousandths, here on both sides. The grids begin a
    little below pure noise; DEIS' ends with a level twice, a step that changes nothing.
    """
    method, scheduler, options = EXPONENTIAL[case]
    reference = scheduler(**options, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    reference.set_timesteps(steps)
    times, sigmas = [*reference.timesteps.tolist(), 0], reference.sigmas.double().tolist()
    data, levels = mixture(), [NoiseLevel.of(t, 1 - s, s) for t, s in zip(times, sigmas, strict=True)]
    noise = NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    x, reference.sigmas = noise.draw(), reference.sigmas.double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = max(float(t[0]), 1.0) / 1000
        prediction = data(x, NoiseLevel.of(0, 1 - s, s))
        return prediction.eps - prediction.x0

    network = nn.Identity()
    network.forward = velocity  # type: ignore[method-assign]
    denoiser = Denoiser(network, table("linear"), FLOW)
    found = sample(unguided(denoiser), method, x, levels, denoiser.schedule, noise=noise)
    assert difference(found, follow(reference, velocity, x)[-1]) <= 2e-5


# --- the linear multistep methods ------------------------------------------------------------------------------------


@each_count
@each_pairing
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", ["linspace", "leading", "trailing", "karras"])
def test_lms_loop(grid: str, order: int, betas: str, kind: str, steps: int) -> None:
    """Their integrals come from a numerical quadrature, exact for such polynomials."""
    spacing = {"use_karras_sigmas": True} if grid == "karras" else {"timestep_spacing": grid}
    network = Analytic(table(betas), KINDS[kind][0])
    reference = LMSDiscreteScheduler(**BETAS[betas][1], prediction_type=KINDS[kind][1], **spacing)
    reference.set_timesteps(steps)
    x, noise, _ = start_both()
    wanted = follow_in_ratios(reference, network, x, order=order)[-1]
    assert difference(ours(LMS(order), network, seen(reference), noise, x), wanted) <= 2e-5


@each_count
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("clean", [True, False], ids=["ends clean", "ends at t 0"])
@pytest.mark.parametrize("prk", [False, True], ids=["plms", "prk"])
def test_pndm_loop(prk: bool, clean: bool, betas: str, steps: int) -> None:
    """Step counts that divide 1000, leading: "Unchained steps", elsewhere theirs go to t - T // steps, off the grid.

    Epsilon output only: "Velocities combined", with v theirs combines the outputs of different times and only then
    turns the sum into an epsilon, with the coefficients and the state of one of them.
    """
    reference = PNDMScheduler(**BETAS[betas][1], skip_prk_steps=not prk, set_alpha_to_one=clean, steps_offset=1)
    reference.set_timesteps(steps)
    schedule = TableSchedule(BETAS[betas][0])
    network = Analytic(schedule, EPS)
    x, noise, _ = start_both()
    end = CLEAN if clean else schedule.level(0)
    states = [x]
    for t in reference.timesteps:
        states.append(reference.step(network(states[-1], t.expand(3)), int(t), states[-1]).prev_sample)
    method = PLMS(start="prk" if prk else "heun")
    levels = leading(schedule, steps, offset=1, end=end)
    assert difference(ours(method, network, levels, noise, x), states[-1]) <= 2e-5


class Circle(nn.Module):
    """The mixture's velocity on IPNDM's path `(alpha, sigma) = (cos, sin)(pi t / 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.data = mixture()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = float(t[0]) * math.pi / 2
        level = NoiseLevel.of(0, math.cos(angle), math.sin(angle))
        prediction = self.data(x, level)
        return V.target(prediction.x0, prediction.eps, level)


@each_count
def test_ipndm_loop(steps: int) -> None:
    """On levels below pure noise: "No signal, no picture", where alpha = 0 theirs takes x0 = 0 whatever the network
    says, and its own grid begins there. It has no `denoise_last`.
    """
    sigmas = torch.sin(torch.linspace(0.97, 0, steps + 1, dtype=torch.float64) * math.pi / 2)
    reference = IPNDMScheduler(trained_betas=sigmas.tolist())
    reference.set_timesteps(steps)
    times = [*reference.timesteps.tolist(), 0]
    levels = [
        NoiseLevel.of(t, float(a), float(s))
        for t, a, s in zip(times, reference.alphas, reference.betas, strict=True)
    ]
    x, noise, _ = start_both()
    network = Circle()
    denoiser = Denoiser(network, table("linear"), V)
    method = PLMS(start="euler")
    found = sample(unguided(denoiser), method, x, levels, denoiser.schedule, noise=noise)
    assert difference(found, follow(reference, network, x)[-1]) <= 2e-5


@each_count
def test_ipndm_from_its_config(steps: int) -> None:
    """Its own path, grid and start, as its config says them; the loop from the second level on, for in the first step
    "No signal, no picture", and ours forgets the slope of pure noise.
    """
    reference = IPNDMScheduler()
    reference.set_timesteps(steps)
    reference.set_begin_index(1)
    meaning = from_diffusers(json.loads(reference.to_json_string()))
    assert meaning.sampling.grid is not None
    schedule, network = meaning.schedule.build(), Circle()
    shown = meaning.prediction.build_preconditioning(meaning.schedule)
    denoiser = Denoiser(network, schedule, meaning.prediction.build_parameterization(), preconditioning=shown)
    levels = meaning.sampling.grid.build(schedule, steps)
    x, noise, _ = start_both()
    assert levels[0].is_noise and meaning.sampling.start == "marginal" and reference.init_noise_sigma == 1
    found = sample(unguided(denoiser), meaning.sampling.solver(), x, levels[1:], schedule, noise=noise)
    assert difference(found, follow(reference, network, x)[-1]) <= 2e-5


# --- EDM's path ------------------------------------------------------------------------------------------------------


class Exploding(nn.Module):
    """The mixture as EDM's network `F(c_in x, ln(sigma) / 4)`."""

    def __init__(self) -> None:
        super().__init__()
        self.data, self.conditioning = mixture(), edm_preconditioning(0.5)

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        level = NoiseLevel.of(0, 1, math.exp(4 * float(t[0])))
        prediction = self.data(scaled / self.conditioning.scale(level), level)
        return edm(0.5).target(prediction.x0, prediction.eps, level)


@each_count
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("form", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_edm_loop(order: int, form: str, spacing: str, steps: int) -> None:
    reference = EDMDPMSolverMultistepScheduler(solver_order=order, solver_type=form, sigma_schedule=spacing)
    reference.set_timesteps(steps)
    levels = [NoiseLevel.of(s, 1, s) for s in reference.sigmas.double().tolist()]
    reference.sigmas = reference.sigmas.double()  # "Float32 coefficients"
    x, noise, _ = start_both()
    network = Exploding()
    start = y = x * 80
    for t in reference.timesteps:
        y = reference.step(network(reference.scale_model_input(y, t), t.expand(3)), t, y).prev_sample
    denoiser = Denoiser(network, VESchedule(), edm(0.5), preconditioning=edm_preconditioning(0.5))
    method = DPM(order=order, form=form, published=True)  # type: ignore[arg-type]
    found = sample(unguided(denoiser), method, start, levels, denoiser.schedule, noise=noise)
    assert difference(found, y) <= 2e-5


# --- single steps on a random network --------------------------------------------------------------------------------


def first_steps(
    method: Solver[Any], denoiser: Denoiser, levels: Sequence[NoiseLevel], x: Tensor
) -> list[Tensor]:
    states: list[Tensor] = []

    def note(x: Tensor, *_: object) -> Tensor:
        states.append(x)
        return x

    noise = NoiseSource(SEEDS, SHAPE)
    sample(unguided(denoiser), method, x, levels, denoiser.schedule, noise=noise, on_step=note)
    return states


@pytest.mark.parametrize("begin", [0, 24, 42])
@each_pairing
@each_case
def test_exponential_steps(case: str, betas: str, kind: str, begin: int) -> None:
    """Four steps of 60 on a random network: enough for every order, few enough for errors not to grow."""
    reference, network = build(EXPONENTIAL[case], betas, kind, 60), TinyNet(2)
    reference.set_begin_index(begin)
    x, _, _ = start_both()
    denoiser = Denoiser(network, table(betas), KINDS[kind][0])
    found = first_steps(EXPONENTIAL[case][0], denoiser, seen(reference)[begin:], x)
    wanted = follow(reference, network, x)
    assert max(difference(a, b.float()) for a, b in zip(found[1:5], wanted[1:5], strict=True)) <= 1e-5


@each_pairing
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_steps(order: int, betas: str, kind: str) -> None:
    """From the start: "Order from the index", begun inside a grid theirs takes the first weights of a high order."""
    reference, network = LMSDiscreteScheduler(**BETAS[betas][1], prediction_type=KINDS[kind][1]), TinyNet(2)
    reference.set_timesteps(60)
    x, _, _ = start_both()
    found = first_steps(LMS(order), Denoiser(network, table(betas), KINDS[kind][0]), seen(reference), x)
    wanted = follow_in_ratios(reference, network, x, order=order)
    assert max(difference(a, b) for a, b in zip(found[1:5], wanted[1:5], strict=True)) <= 1e-5


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prk", [False, True], ids=["plms", "prk"])
def test_pndm_steps(prk: bool, betas: str) -> None:
    """Both reach a level after 2, 1, 1, … evaluations (PLMS) or 4, 4, 4, 1, … (Runge-Kutta start)."""
    reference, network = PNDMScheduler(**BETAS[betas][1], skip_prk_steps=not prk, set_alpha_to_one=True), TinyNet(2)
    reference.set_timesteps(50)
    x, _, _ = start_both()
    states = [x]
    for t in reference.timesteps:
        states.append(reference.step(network(states[-1], t.expand(3).float()), int(t), states[-1]).prev_sample)
    wanted = [states[i] for i in ([4, 8, 12, 13] if prk else [2, 3, 4, 5])]
    denoiser = Denoiser(network, TableSchedule(BETAS[betas][0]))
    found = first_steps(PLMS(start="prk" if prk else "heun"), denoiser, leading(denoiser.schedule, 50), x)
    assert max(difference(a, b) for a, b in zip(found[1:5], wanted, strict=True)) <= 1e-5


# --- inversion -------------------------------------------------------------------------------------------------------


@each_count
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@each_pairing
def test_inversion_loop(betas: str, kind: str, spacing: str, steps: int) -> None:
    """"Looking ahead": theirs asks the network about the state at one level with the time of the next, so that is the
    time our levels carry here. Step counts that divide 1000 ("Unchained steps"), no clipping.
    """
    reference = DDIMInverseScheduler(
        **BETAS[betas][1], prediction_type=KINDS[kind][1], clip_sample=False, timestep_spacing=spacing
    )
    reference.set_timesteps(steps)
    schedule = table(betas)
    visited = [CLEAN, *(schedule.level(t) for t in reference.timesteps.tolist())]
    if spacing == "trailing":  # "Unchained steps" once more: theirs starts at 1000 // steps below the first time, clean
        assert reference.timesteps[0] - 1000 // steps < 0
    levels = [NoiseLevel(b.t, a.alpha, a.sigma) for a, b in pairwise(visited)] + [visited[-1]]
    network = Analytic(schedule, KINDS[kind][0])
    x, noise, _ = start_both()
    x = mixture().means[:3] + 0.1 * x
    denoise = unguided(Denoiser(network, schedule, network.kind))
    found = sample(denoise, Euler(), x, levels, schedule, noise=noise, climb=True)
    y = x
    for t in reference.timesteps:
        y = reference.step(network(y, t.expand(3)), int(t), y).prev_sample
    assert difference(found, y) <= 2e-5


@pytest.mark.parametrize(
    "method", [Euler(), DPM(), LMS(2), PLMS(), DEIS(), UniPC()], ids=["euler", "2m", "lms", "plms", "deis", "unipc"]
)
def test_inversion_and_back(method: Solver[Any]) -> None:
    """Every one of them climbs: up the grid and down again returns to the picture, the better the finer the grid."""
    schedule, data = table("scaled_linear"), mixture()
    x = data.sample(3, torch.Generator().manual_seed(0)).double()
    noise, errors = NoiseSource(SEEDS, SHAPE, dtype=torch.float64), []
    for steps in (20, 40, 80):
        levels = exponential(schedule, steps)[:-1]
        up = sample(data, method, x, levels[::-1], schedule, noise=noise, climb=True)
        back = sample(data, method, up, levels, schedule, noise=noise)
        errors.append(float((back - x).abs().max()))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.1, errors


# --- k-diffusion's formulas, float64 ---------------------------------------------------------------------------------


def lms_by_quadrature(data: MixtureData, y: Tensor, sigmas: Sequence[float], order: int = 4) -> Tensor:
    """`sample_lms`: `y += sum_j c_j d_{i-j}`, `c_j` the integral of the Lagrange polynomial from sigma_i to
    sigma_{i+1}, here by Gauss-Legendre with as many points as make it exact; `d = (y - D(y)) / sigma`.
    """
    points, shares = np.polynomial.legendre.leggauss(order)
    slopes: list[Tensor] = []
    for i, (now, nxt) in enumerate(pairwise(sigmas)):
        slopes.insert(0, (y - data(y, NoiseLevel.of(0, 1, now)).x0) / now)
        have = min(order, i + 1)
        at = (nxt - now) / 2 * points + (nxt + now) / 2
        for j in range(have):
            basis = np.ones_like(at)
            for k in set(range(have)) - {j}:
                basis *= (at - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k])
            y = y + float((shares * basis).sum() * (nxt - now) / 2) * slopes[j]
    return y


def dpmpp_2m_by_the_book(data: MixtureData, y: Tensor, sigmas: Sequence[float]) -> Tensor:
    """`sample_dpmpp_2m`: `y' = (s'/s) y - (e^-h - 1) D`, `D = (1 + 1/2r) D_i - 1/2r D_{i-1}`, `r = h_{i-1} / h`; plain
    `D_i` in the first step and in the one to sigma 0.
    """
    old: Tensor | None = None
    for i, (now, nxt) in enumerate(pairwise(sigmas)):
        new = data(y, NoiseLevel.of(0, 1, now)).x0
        combined = new
        if old is not None and nxt > 0:
            r = math.log(sigmas[i - 1] / now) / math.log(now / nxt)
            combined = new + (new - old) / (2 * r)
        y = (nxt / now) * y + (1 - nxt / now) * combined
        old = new
    return y


def ipndm_by_the_book(data: MixtureData, y: Tensor, sigmas: Sequence[float]) -> Tensor:
    """ComfyUI's `sample_ipndm`: Adams-Bashforth weights of equal steps, and the estimate itself at sigma 0."""
    weights = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    slopes: list[Tensor] = []
    for now, nxt in pairwise(sigmas):
        estimate = data(y, NoiseLevel.of(0, 1, now)).x0
        slopes = [(y - estimate) / now, *slopes][:4]
        if nxt == 0:
            return estimate
        y = y + (nxt - now) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes, strict=True))
    return y


BOOK: dict[str, Callable[..., Tensor]] = {
    "lms": lms_by_quadrature,
    "dpmpp_2m": dpmpp_2m_by_the_book,
    "ipndm": ipndm_by_the_book,
}


@each_count
@pytest.mark.parametrize("name", BOOK)
@pytest.mark.parametrize("spacing", ["karras", "exponential", "trailing"])
@pytest.mark.parametrize("path", ["preserving", "exploding"])
def test_published_formulas(path: str, spacing: str, name: str, steps: int) -> None:
    """Whole loops in float64. The formulas know sigma = nsr and `x / alpha` only, ours every path."""
    schedule = TableSchedule(scaled_linear_alpha_bar()) if path == "preserving" else VESchedule()
    levels = {"karras": karras, "exponential": exponential, "trailing": trailing}[spacing](schedule, steps)
    data = MixtureData(mixture().means.double(), torch.tensor([0.02, 0.05, 0.1, 0.2]))
    noise = NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    y = noise.draw() * levels[0].nsr
    found = sample(data, solver(name), y * levels[0].alpha, levels, schedule, noise=noise)
    wanted = BOOK[name](data, y, [float(level.nsr) for level in levels])
    assert difference(found, wanted) <= 1e-10


# --- relations and goldens -------------------------------------------------------------------------------------------


def golden(method: Solver[Any], values: Sequence[float], steps: int) -> float:
    """Stable Diffusion's table at t = 801, 601, 401, a data-predicting network that says `values` in turn, states 1."""
    schedule = TableSchedule(scaled_linear_alpha_bar())
    levels = [schedule.level(t) for t in (801, 601, 401, 201)][: steps + 1]
    said = iter(values)

    def network(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Any:
        x0 = torch.full_like(x, next(said))
        return Denoiser(nn.Identity(), schedule, EPS).read((x - level.alpha * x0) / level.sigma, x, level)

    states: list[Tensor] = []

    def reset(x: Tensor, *_: object) -> Tensor:
        states.append(x)
        return torch.ones_like(x)

    one, noise = torch.ones((1, 1), dtype=torch.float64), NoiseSource([0], (1,), dtype=torch.float64)
    sample(network, method, one, levels, schedule, noise=noise, on_step=reset)
    return float(states[-1])


def test_goldens() -> None:
    """x = 1 at t = 601, x0 0.2 at 801 and 0.3 at 601, to t = 401; pure-Python float64 of the papers' formulas."""
    assert golden(DPM(lower_order_final=False), [0.2, 0.3], 2) == pytest.approx(0.937822, abs=1e-6)
    assert golden(DPM(form="heun", lower_order_final=False), [0.2, 0.3], 2) == pytest.approx(0.939310, abs=1e-6)
    uncorrected = UniPC(lower_order_final=False, disable_corrector=(0, 1))
    assert golden(uncorrected, [0.2, 0.3], 2) == pytest.approx(0.937822, abs=1e-6)


def test_first_orders_are_ddim() -> None:
    schedule, data = table("linear"), mixture()
    levels, noise = trailing(schedule, 10), NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    x = noise.draw()
    wanted = sample(data, Euler(), x, levels, schedule, noise=noise)
    alone = UniPC(order=1, disable_corrector=tuple(range(10)))
    kinds = [DPM(1), DPM(1, kind="noise"), DPMSingle(1), DEIS(1), LMS(1), PLMS("euler", 1), alone]
    for method in kinds:
        assert difference(sample(data, method, x, levels, schedule, noise=noise), wanted) <= 1e-12


# --- ends of the path, levels that differ within a batch, options, names ---------------------------------------------

EVERY: dict[str, Solver[Any]] = {
    "lms": LMS(),
    "ipndm_v": LMS(denoise_last=True),
    "plms": PLMS(),
    "prk": PLMS("prk"),
    "ipndm": PLMS("euler", denoise_last=True),
    "2m": DPM(),
    "3m": DPM(3, lower_order_final=False),
    "3m noise": DPM(3, kind="noise"),
    "2s": DPMSingle(),
    "3s": DPMSingle(3, form="heun"),
    "3s noise": DPMSingle(3, kind="noise"),
    "deis": DEIS(3),
    "unipc": UniPC(3, lower_order_final=False),
    "unipc bh1": UniPC(variant="bh1"),
    "unipc noise": UniPC(3, kind="noise"),
}
each_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())


@pytest.mark.parametrize("schedule", [TableSchedule(rescale_zero_terminal_snr(linear_alpha_bar())), FlowSchedule()])
@each_method
def test_from_pure_noise_to_clean(method: Solver[Any], schedule: Schedule) -> None:
    """The first step is Euler's; what follows converges to the same as a fine grid of Heun's method."""
    data, noise = mixture(), NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    x, states = noise.draw(), []
    levels = trailing(schedule, 60)
    assert levels[0].is_noise and levels[-1].is_clean

    def note(x: Tensor, *_: object) -> Tensor:
        states.append(x)
        return x

    found = sample(data, method, x, levels, schedule, noise=noise, on_step=note)
    assert difference(states[1], sample(data, Euler(), x, levels[:2], schedule, noise=noise)) <= 1e-12
    assert difference(found, sample(data, Heun(), x, trailing(schedule, 240), schedule, noise=noise)) <= 0.1


@each_method
def test_levels_within_a_batch(method: Solver[Any]) -> None:
    """A batch whose pictures are at different levels is each picture alone at its own; a clean one stays as it is."""
    schedule, data = table("scaled_linear"), GaussianData(torch.full(SHAPE, 0.5, dtype=torch.float64), 0.04)
    noise = NoiseSource(SEEDS, SHAPE, dtype=torch.float64)
    x, one = noise.draw(), NoiseSource([0], SHAPE, dtype=torch.float64)
    times = torch.tensor([[900, 700, 550, 300, 150, 20], [999, 980, 700, 400, 300, 200]], dtype=torch.float64)
    rows = [[schedule.level(t) for t in row] for row in times] + [[CLEAN] * 6]
    columns = [
        NoiseLevel(*(torch.stack([getattr(level, name) for level in column]) for name in ("t", "alpha", "sigma")))
        for column in zip(*rows, strict=True)
    ]
    together = sample(data, method, x, columns, schedule, noise=noise)
    for i, row in enumerate(rows[:2]):
        alone = sample(data, method, x[i : i + 1], row, schedule, noise=one)
        assert difference(together[i : i + 1], alone) <= 1e-9
    assert torch.allclose(together[2], x[2], atol=1e-12)


def test_options_are_checked() -> None:
    for make, said in [
        (lambda: LMS(5), "order must be a whole number from 1 to 4, got 5"),
        (lambda: PLMS("heum"), "did you mean 'heun'"),  # type: ignore[arg-type]
        (lambda: DPM(4), "from 1 to 3"),
        (lambda: DPM(kind="nois"), "did you mean 'noise'"),  # type: ignore[arg-type]
        (lambda: DPMSingle(form="midpont"), "did you mean 'midpoint'"),  # type: ignore[arg-type]
        (lambda: UniPC(variant="bh3"), "unknown variant 'bh3'"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(UserError, match=said):
            make()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("DPM++ 2M Karras", DPM()),
        ("DPMSolverMultistepScheduler", DPM()),
        ("k_dpmpp_2m", DPM()),
        ("DPMSolverSinglestepScheduler", DPMSingle()),
        ("LMS Karras", LMS()),
        ("LMSDiscreteScheduler", LMS()),
        ("PNDMScheduler", PLMS()),
        ("PLMS", PLMS()),
        ("ipndm", PLMS("euler", denoise_last=True)),
        ("ipndm_v", LMS(denoise_last=True)),
        ("uni_pc", UniPC(3, "bh1")),
        ("uni_pc_bh2", UniPC(3)),
        ("UniPCMultistepScheduler", UniPC()),
        ("deis", DEIS(3)),
        ("DEISMultistepScheduler", DEIS()),
    ],
)
def test_names(name: str, method: Solver[Any]) -> None:
    """Under the names of other programs, with the options they have there."""
    assert solver(name) == method
