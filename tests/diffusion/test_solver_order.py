"""Order of convergence of every deterministic solver on the probability-flow ODE of two distributions, in float64.

The reference is `d(x / alpha) / d(nsr) = eps` integrated to 1e-12 by DOP853 in the clock log nsr, from lambda = -4 to 3
(lambda = -log nsr), where it is smooth. Grids are even in lambda.

A multistep method above order 2 is not promised its order from its own start, which is of low order. Its starting
values are given exactly: the loop's hook replaces the states of the first `order - 1` steps by the reference, so that
what the method remembers are evaluations on the exact solution; from there on it is on its own. UniPC is not given any:
its corrector already makes the first step of second order, which is enough for order 3. With their own start, all must
still be of second order. One-step methods need no start; those that go in groups need whole ones, which is why the
step counts are multiples of 3.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sfumato.diffusion.analytic import GaussianData, MixtureData
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Solver
from sfumato.diffusion.solvers.dpm import DPM, DPMSingle
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive
from sfumato.diffusion.solvers.unipc import UniPC
from sfumato.random import NoiseSource

from .diffusion_cases import SCHEDULES
from .solver_cases import DETERMINISTIC

FIRST, LAST = -4.0, 3.0
STEPS = (96, 192, 384)  # fine enough for the order to have set in, fourth order too
GIVEN = 3  # the most states a method is given: order 4
PROBLEMS: dict[str, MixtureData | GaussianData] = {
    "mixture": MixtureData(
        torch.tensor([[-0.8, 0.1], [0.7, 0.6], [0.2, -0.9]], dtype=torch.float64), torch.tensor([0.10, 0.15, 0.20])
    ),
    "gaussian": GaussianData(
        torch.tensor([0.4, -0.7], dtype=torch.float64), torch.tensor([0.03, 1.5], dtype=torch.float64)
    ),
}


def clock(steps: int) -> Tensor:
    """log nsr of a grid even in lambda, (steps + 1,)."""
    return torch.linspace(-FIRST, -LAST, steps + 1, dtype=torch.float64)


def begin() -> Tensor:
    """States at `FIRST` in the coordinates `x / alpha`, (16, 2)."""
    z = torch.randn((16, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z * math.sqrt(1 + math.exp(-2 * FIRST))


@cache
def reference(problem: str, steps: int) -> Tensor:
    """The solution, `x / alpha`, at the first levels of a grid and at its last: (GIVEN + 2, 16, 2)."""
    y = begin()

    def slope(log_nsr: float, flat: np.ndarray) -> np.ndarray:
        nsr = math.exp(log_nsr)
        eps = PROBLEMS[problem](torch.from_numpy(flat).reshape(y.shape), NoiseLevel.of(0, 1, nsr)).eps
        return (nsr * eps).flatten().numpy()

    at = [*clock(steps)[: GIVEN + 1].tolist(), -LAST]
    found = solve_ivp(slope, (-FIRST, -LAST), y.flatten().numpy(), "DOP853", at, rtol=1e-12, atol=1e-12)
    assert found.success
    return torch.from_numpy(found.y.T.copy()).reshape(len(at), *y.shape)


def test_reference() -> None:
    """Of Gaussian data the solution is known: `y - m` grows as `sqrt(v + nsr²)`."""
    data, ends = PROBLEMS["gaussian"], torch.exp(torch.tensor([-2 * FIRST, -2 * LAST]))
    assert isinstance(data, GaussianData)
    spread = torch.sqrt(data.variance + ends[:, None])
    wanted = data.mean + (begin() - data.mean) * spread[1] / spread[0]
    assert torch.allclose(reference("gaussian", 24)[-1], wanted, rtol=1e-10)


def slope_of(method: Solver, problem: str, name: str, given: int) -> tuple[float, list[float]]:
    """Log-log slope of the largest error over `STEPS`, and the errors, relative to the largest coordinate.

    `given` is the number of states, after the first, that are replaced by exact ones.
    """
    schedule, errors = SCHEDULES[name], []
    for steps in STEPS:
        exact = reference(problem, steps)
        levels = [schedule.from_nsr(nsr) for nsr in torch.exp(clock(steps))]
        visited = iter(range(steps + 1))

        def give(x: Tensor, level: NoiseLevel, shown: Prediction | None, noise: NoiseSource) -> Tensor:
            i = next(visited)  # noqa: B023 (used within this round of the loop only)
            return exact[i] * level.alpha if 0 < i <= given else x  # noqa: B023

        noise = NoiseSource(range(16), (2,), dtype=torch.float64)
        x = sample(PROBLEMS[problem], method, exact[0] * levels[0].alpha, levels, schedule, noise=noise, on_step=give)
        errors.append(float((x / levels[-1].alpha - exact[-1]).abs().max() / exact[-1].abs().max()))
    return float(np.polyfit(np.log(STEPS), -np.log(errors), 1)[0]), errors


def needs_start(method: Solver) -> bool:
    return method.order > 2 and not isinstance(method, UniPC | DPMSingle | DPMAdaptive)


each_method = pytest.mark.parametrize("method", DETERMINISTIC.values(), ids=DETERMINISTIC.keys())


@pytest.mark.parametrize(("problem", "name"), [("mixture", "linear"), ("mixture", "flow"), ("gaussian", "ve")])
@each_method
def test_order_of_convergence(method: Solver, problem: str, name: str) -> None:
    """On every kind of path; what counts is `x / alpha`, so that these are the same but for rounding."""
    given = method.order - 1 if needs_start(method) else 0
    slope, errors = slope_of(method, problem, name, given)
    assert slope >= method.order - 0.15, f"slope {slope:.3f}, errors {errors}"
    assert errors[-1] < errors[0]


STARTED = {name: method for name, method in DETERMINISTIC.items() if needs_start(method)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", STARTED.values(), ids=STARTED.keys())
def test_order_with_its_own_start(method: Solver, problem: str) -> None:
    slope, errors = slope_of(method, problem, "linear", given=0)
    assert slope >= 1.85, f"slope {slope:.3f}, errors {errors}"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_corrector_raises_the_order(problem: str) -> None:
    """UniPC without lower orders at the end, with its own start: 2 for predictors of order 1, 3 for order 2."""
    for order in (1, 2):
        raised, errors = slope_of(UniPC(order, lower_order_final=False), problem, "linear", given=0)
        assert raised >= order + 0.85, f"slope {raised:.3f}, errors {errors}"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_published_third_order_is_second(problem: str) -> None:
    """DPM-Solver's multistep of order 3 as its authors' code and diffusers have it, with exact starting values."""
    slope, errors = slope_of(DPM(3, published=True), problem, "linear", given=2)
    assert 1.85 <= slope <= 2.5, f"slope {slope:.3f}, errors {errors}"
