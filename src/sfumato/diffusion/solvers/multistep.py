"""Linear multistep methods: `d(x / alpha) / d(nsr) = eps` integrated through the slopes of earlier steps.

`LMS` fits a polynomial in the noise-to-signal ratio through them and integrates it exactly, so it keeps its order on
any grid; `PLMS` uses the constant weights of equal steps, as PNDM, iPNDM and Stable Diffusion's first sampler do.
What every multistep solver remembers, `Run`, and the exact integration, `lagrange`, live here.

>>> [round(w * 12) for w in lagrange([-1.0, -2.0], [1 / 2, 1 / 3])]  # integrals of s and s² over [0, 1]
[-16, 5]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, Number, goes_up, mix
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, along, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError, raise_unknown
from sfumato.random import NoiseSource

Past = tuple[Number, Tensor]
"""One remembered evaluation: when, on the method's own clock, and what, (B, *S)."""

Start = Literal["heun", "prk", "euler"]

# Adams-Bashforth weights of equal steps, newest slope first; the longest is in Liu 2022, eq. 12
_EQUAL_STEPS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class Run:
    """Where a multistep method stands on its grid, and what it remembers.

    Attributes:
        schedule: the path.
        steps: that it goes in one direction; a grid that turns starts a new run.
        done: how many of them it has made.
        past: earlier evaluations, newest first.
    """

    schedule: Schedule
    steps: int
    done: int = 0
    past: tuple[Past, ...] = ()

    @classmethod
    def along(cls, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        """The run that begins at the grid's first level and ends where it turns, or with it."""
        ups = [goes_up(now, nxt) for now, nxt in pairwise(grid)]
        return cls(schedule, next((i for i, up in enumerate(ups) if up != ups[0]), len(ups)))

    @property
    def left(self) -> int:
        """Steps still to make, the present one counted."""
        return self.steps - self.done

    def after(self, now: NoiseLevel, clock: Number, value: Tensor, keep: int) -> Run:
        """The run one step on, remembering `keep` evaluations; one at pure noise lies infinitely far back and goes."""
        new = () if now.is_noise else ((clock, value),)
        return Run(self.schedule, self.steps, self.done + 1, (*new, *self.past)[:keep])


def quotient(a: Number, b: Number) -> Number:
    """`a / b`, not a number where b is 0."""
    return a / b if isinstance(b, Tensor) or b != 0 else math.nan


def _or_zero(w: Number) -> Number:
    if isinstance(w, Tensor):
        return torch.nan_to_num(w, nan=0.0, posinf=0.0, neginf=0.0)
    return w if math.isfinite(w) else 0.0


def lagrange(nodes: Sequence[Number], moments: Sequence[Number]) -> list[Number]:
    """Weights `w_j` with which `sum_j w_j (f(r_j) - f(0))` integrates exactly every polynomial `f` through 0 and `r_j`.

    With `L` the integral (linear in f, `L[s^k]` given), `w_j = L[l_j]`, `l_j = s prod_i (s - r_i) / (r_j - r_i) / r_j`.
    An infinite or repeated node, and an infinite step, have weight 0: the order falls, the result stays finite.

    Args:
        nodes: `r_1 … r_n`, different and not 0.
        moments: `L[s], …, L[s^n]`.
    """
    weights = []
    for j, r in enumerate(nodes):
        integrals, denominator = list(moments[: len(nodes)]), r
        for other in (*nodes[:j], *nodes[j + 1 :]):
            integrals = [higher - other * lower for lower, higher in pairwise(integrals)]
            denominator = denominator * (r - other)
        weights.append(_or_zero(quotient(integrals[0], denominator)))
    return weights


def corrected(x: Tensor, value: Tensor, weights: Sequence[Number], past: Sequence[Past]) -> Tensor:
    """`x + sum_j w_j (old_j - value)`. Shapes (B, *S)."""
    for w, (_, old) in zip(weights, past, strict=True):
        x = mix(1.0, x, w, old - value)
    return x


@method("ipndm_v", "iPNDM_v", denoise_last=True)
@method("lms", "LMS", "LMSDiscreteScheduler", "k_lms", "linear multistep")
@dataclass(frozen=True)
class LMS:
    """Adams-Bashforth in nsr: the polynomial through the last `order` slopes, integrated exactly. Reads `eps`.

    `x'/a' = x/a + int p(nsr) d nsr`, `p(nsr_j) = eps_j`; the first steps have fewer slopes. k-diffusion's `sample_lms`.
    With `denoise_last` it is iPNDM for unequal steps, `ipndm_v`; the weights that ComfyUI has for three and four slopes
    are right for equal steps only, these are exact on every grid.

    Attributes:
        order: 1 to 4; what the first steps lack is felt: 2 over a whole run with its own start.
        denoise_last: arrive at the clean end by `x0` instead of by the polynomial (`x0` is read there).
    """

    order: int = 4
    denoise_last: bool = False

    def __post_init__(self) -> None:
        check_order(self.order, 4)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        return Run.along(schedule, grid)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Run, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Run, Prediction]:
        prediction = ask(x, now).shifted(now)
        eps, clock = prediction.eps, _nsr(now)
        after = state.after(now, clock, eps, self.order - 1)
        if now.is_noise or nxt.is_noise or (self.denoise_last and nxt.is_clean):
            return first_order(prediction, nxt), nxt, after, prediction
        h = _nsr(nxt) - clock
        nodes = [quotient(then - clock, h) for then, _ in state.past]
        slope = corrected(eps, eps, lagrange(nodes, (1 / 2, 1 / 3, 1 / 4)), state.past)
        return along(x, slope, now, nxt), nxt, after, prediction


@method("ipndm", "iPNDM", "IPNDMScheduler", start="euler", denoise_last=True)
@method("pndm_prk", "PNDM with Runge-Kutta start", "PNDM PRK", start="prk")
@method("plms", "PLMS", "PNDM", "PNDMScheduler", "k_plms")
@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep: the last slopes with the weights of equal steps, `(55 e1 - 59 e2 + 37 e3 - 9 e4) / 24`.

    The step along the combined slope is exact for a constant one (Liu 2022, "PNDM", eq. 9 and 12). Reads `eps`. On a
    grid even in nsr four slopes are of fourth order; on any other smooth grid the constant weights are of second. A
    step that leaves nearly pure noise is first order, and its slope is forgotten.

    Attributes:
        start: of the first step. "heun": the mean of the slopes at both ends, of which only the first is kept, two
            evaluations (Stable Diffusion's PLMS, diffusers' `skip_prk_steps`); "prk": three pseudo Runge-Kutta steps of
            four evaluations, halfway in t (Liu 2022, eq. 13); "euler": one slope (iPNDM, Zhang 2023).
        depth: how many slopes, 1 to 4.
        denoise_last: arrive at the clean end by `x0` (`x0` is read there): ComfyUI's iPNDM, not diffusers'.
    """

    start: Start = "heun"
    depth: int = 4
    denoise_last: bool = False
    order: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        check_order(self.depth, 4, "depth")
        if self.start not in get_args(Start):
            raise_unknown("start", self.start, get_args(Start))

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        return Run.along(schedule, grid)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Run, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Run, Prediction]:
        prediction = ask(x, now).shifted(now)
        begins = now.is_nearly_noise
        after = state.after(now, _nsr(now), prediction.eps, 0 if begins else self.depth - 1)
        if begins or (self.denoise_last and nxt.is_clean):
            return first_order(prediction, nxt), nxt, after, prediction
        slopes, shown = [prediction.eps, *(old for _, old in state.past)], prediction
        if self.start == "prk" and state.done < 3 and not nxt.is_clean:
            slope, shown = self._runge_kutta(ask, x, prediction, now, nxt, state.schedule)
        elif self.start == "heun" and not state.past and not nxt.is_clean:
            shown = ask(along(x, slopes[0], now, nxt), nxt).shifted(nxt)
            slope = (slopes[0] + shown.eps) / 2
        else:
            slope = sum((w * e for w, e in zip(_EQUAL_STEPS[len(slopes) - 1], slopes, strict=True)), torch.zeros(()))
        return along(x, slope, now, nxt), nxt, after, shown

    def _runge_kutta(
        self, ask: Ask, x: Tensor, first: Prediction, now: NoiseLevel, nxt: NoiseLevel, schedule: Schedule
    ) -> tuple[Tensor, Prediction]:
        """The mean slope `(e1 + 2 e2 + 2 e3 + e4) / 6`, each step from `x`, and the last prediction."""
        middle = schedule.level(_halfway(now.t, nxt.t))
        second = ask(along(x, first.eps, now, middle), middle).shifted(middle)
        third = ask(along(x, second.eps, now, middle), middle).shifted(middle)
        fourth = ask(along(x, third.eps, now, nxt), nxt).shifted(nxt)
        return (first.eps + 2 * second.eps + 2 * third.eps + fourth.eps) / 6, fourth


def _nsr(level: NoiseLevel) -> Number:
    alpha, sigma = level.numbers
    return sigma / alpha if isinstance(alpha, Tensor) else quotient(sigma, alpha)


def _halfway(t: Tensor, s: Tensor) -> Tensor:
    """The time between two; a whole one between whole times more than 1 apart (a table's network knows those)."""
    half = (t - s) / 2
    whole = (t == t.round()) & (s == s.round()) & ((t - s).abs() > 1)
    return t - torch.where(whole, half.floor(), half)


def check_order(order: int, most: int, name: str = "order") -> None:
    """Raise `UserError` unless `order` is a whole number from 1 to `most`."""
    if order not in range(1, most + 1):
        raise UserError(f"{name} must be a whole number from 1 to {most}, got {order}")
