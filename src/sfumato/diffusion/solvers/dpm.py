"""DPM-Solver and DPM-Solver++: exponential integrators in lambda = log(alpha / sigma), over several steps or in groups.

Both solve the linear part of the probability-flow ODE exactly and put a polynomial in lambda for the rest: the estimate
of the noise (DPM-Solver, Lu 2022a) or of the clean signal (DPM-Solver++, Lu 2022b). `Span` is that one formula; DEIS
and UniPC use it too.

>>> from sfumato.diffusion.solvers import solver
>>> solver("DPM++ 2M").order, solver("dpmpp_2m") == DPM(order=2)
(2, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, Number
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, along, first_order, toward
from sfumato.diffusion.solvers.multistep import Past, Run, check_order, corrected, lagrange, quotient
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import raise_unknown
from sfumato.random import NoiseSource

Kind = Literal["data", "noise"]
Form = Literal["midpoint", "heun"]

_FEW_STEPS = 15  # in shorter runs the end is of lower order: found by experiment by DPM-Solver's authors


def log_snr(level: NoiseLevel) -> Number:
    """lambda of a level, `log(alpha / sigma)`; infinite at its ends."""
    alpha, sigma = level.numbers
    if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
        return level.half_log_snr
    return math.log(alpha / sigma) if alpha and sigma else math.inf if alpha else -math.inf


def expm1(u: Number) -> Number:
    """`exp(u) - 1`, exactly where it is small."""
    return torch.expm1(u) if isinstance(u, Tensor) else math.expm1(u)


class Span:
    """An exponential step from `start` to `end`, `s` in [0, 1] being the share of it in lambda.

    With `h = lambda' - lambda` and `m` the quantity that is interpolated:

        data:   x' = (sigma'/sigma) x + alpha' h int exp(-h (1 - s)) x0(s) ds
        noise:  x' = (alpha'/alpha) x - sigma' h int exp( h (1 - s)) eps(s) ds

    so `M_0 = -c expm1(u)`, `M_k = c + k M_{k-1} / u` are the integrals of `s^k`, `(c, u)` being `(alpha', -h)` for data
    and `(sigma', h)` for noise (Lu 2022b, proposition 4.1; Lu 2022a, proposition 3.1).
    """

    def __init__(self, kind: Kind, start: NoiseLevel, end: NoiseLevel) -> None:
        self.kind, self.start, self.end, self.clock = kind, start, end, log_snr(start)
        self._data = kind == "data"

    def value(self, prediction: Prediction) -> Tensor:
        """What is interpolated, (B, *S): `x0` or `eps`."""
        return prediction.x0 if self._data else prediction.eps

    def first_order(self, x: Tensor, prediction: Prediction) -> Tensor:
        """The step with `m` constant, DDIM's. From a start without noise (data) or signal (noise) it reads both."""
        if self.start.is_clean if self._data else self.start.is_noise:
            return first_order(prediction, self.end)
        return self.constant(x, self.value(prediction))

    def constant(self, x: Tensor, m: Tensor) -> Tensor:
        """The same from `m` (B, *S) itself: `(s'/s) x + (a' - a s'/s) x0` or `(a'/a) x + (s' - s a'/a) eps`."""
        move = toward if self._data else along
        return move(x, m, self.start, self.end)

    @cached_property
    def h(self) -> Number:
        """Its length in lambda; infinite to a clean end."""
        return log_snr(self.end) - self.clock

    def nodes(self, clocks: Sequence[Number]) -> list[Number]:
        """Points of lambda as shares of the step; negative ones lie before it."""
        return [quotient(clock - self.clock, self.h) for clock in clocks]

    def moments(self, count: int) -> tuple[Number, list[Number]]:
        """`u`, and `M_0 … M_count`."""
        alpha, sigma = self.end.numbers
        c, u = (alpha, -self.h) if self._data else (sigma, self.h)
        found = [-c * expm1(u)]
        for k in range(1, count + 1):
            found.append(c + quotient(k * found[-1], u))
        return u, found

    def weights(self, past: Sequence[Past], form: Form = "heun", published: bool = False) -> list[Number]:
        """Of `old_j - m` in the sum that is added to the first-order step.

        "heun" integrates the polynomial exactly; "midpoint" takes `M_0 / 2` for `M_1` where there is one old value;
        `published` takes `M_2 / 2` for `M_2` where there are two.
        """
        if not past:
            return []
        (_, moments), nodes = self.moments(len(past)), self.nodes([clock for clock, _ in past])
        if len(past) == 1 and form == "midpoint":
            return lagrange(nodes, [moments[0] / 2])
        if len(past) == 2 and published:
            return lagrange(nodes, [moments[1], moments[2] / 2])
        return lagrange(nodes, moments[1:])


def check_options(kind: str, form: str) -> None:
    """Raise `UserError` unless both are known."""
    if kind not in get_args(Kind):
        raise_unknown("kind", kind, get_args(Kind))
    if form not in get_args(Form):
        raise_unknown("form", form, get_args(Form))


@method("dpm_3m", "DPM-Solver 3M", order=3, kind="noise")
@method("dpm_2m", "DPM-Solver 2M", kind="noise")
@method("dpmpp_3m", "DPM++ 3M", "DPM-Solver++(3M)", order=3)
@method(
    "dpmpp_2m",
    "DPM++ 2M",
    "DPM-Solver++(2M)",
    "DPM-Solver++",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "k_dpmpp_2m",
)
@dataclass(frozen=True)
class DPM:
    """DPM-Solver++ (kind "data", reads `x0`) and DPM-Solver (kind "noise", reads `eps`), multistep.

    The last `order` values are interpolated in lambda (Lu 2022b, algorithm 2; Lu 2022a, appendix B). One evaluation a
    step. A step that arrives clean is first order, which there is `x0`; so are the first steps, for want of values.
    2M "midpoint" is k-diffusion's `sample_dpmpp_2m`, to the letter where the run ends clean.

    Attributes:
        order: 1 (DDIM), 2 or 3; a whole run with its own start has order 2 at most.
        kind: what is interpolated.
        form: of the second order, "midpoint" or "heun".
        lower_order_final: in runs of fewer than 15 steps, order 2 at most in the last but one and 1 in the last.
        euler_at_final: order 1 in the last step of every run.
        published: order 3 to the letter of its authors' code, which diffusers follows. There the second difference has
            half the weight that the expansion gives it, and what converges is of order 2.
    """

    order: int = 2
    kind: Kind = "data"
    form: Form = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        check_order(self.order, 3)
        check_options(self.kind, self.form)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        return Run.along(schedule, grid)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Run, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Run, Prediction]:
        prediction = ask(x, now).shifted(now)
        span = Span(self.kind, now, nxt)
        m, past = span.value(prediction), state.past[: self._order(state, nxt) - 1]
        x = corrected(span.first_order(x, prediction), m, span.weights(past, self.form, self.published), past)
        return x, nxt, state.after(now, span.clock, m, self.order - 1), prediction

    def _order(self, state: Run, nxt: NoiseLevel) -> int:
        if nxt.is_clean or (self.euler_at_final and state.left == 1):
            return 1
        return min(self.order, state.left) if self.lower_order_final and state.steps < _FEW_STEPS else self.order


@dataclass(frozen=True)
class Group:
    """What a singlestep method remembers: its plan, and the group of steps it is in.

    Attributes:
        plan: the order of each step of the run; 1 begins a group.
        done: steps made.
        start: the level where the group began, None before the first and where that was clean or noise (nearly, for
            eps).
        x: (B, *S), the state there.
        values: the group's evaluations, oldest first.
    """

    plan: tuple[int, ...]
    done: int = 0
    start: NoiseLevel | None = None
    x: Tensor | None = None
    values: tuple[Past, ...] = ()


@method("dpm_3s", "DPM-Solver 3S", order=3, kind="noise")
@method("dpm_2s", "DPM-Solver 2S", kind="noise")
@method("dpmpp_3s", "DPM++ 3S", "DPM-Solver++(3S)", order=3)
@method("dpmpp_2s", "DPM++ 2S", "DPM-Solver++(2S)", "DPMSolverSinglestepScheduler")
@dataclass(frozen=True)
class DPMSingle:
    """DPM-Solver++ (reads `x0`) and DPM-Solver (reads `eps`) in groups of `order` steps, one evaluation each.

    A group's last step goes from the group's first level, with the values that were found on the way (Lu 2022b,
    algorithm 1; Lu 2022a, algorithms 1 and 2, with the grid's own levels for the intermediate ones). Nothing is carried
    from group to group. A step that arrives clean is first order.

    Attributes:
        order: 1, 2 or 3. The third order of "midpoint" holds where groups are cut in thirds of lambda.
        kind: what is interpolated.
        form: "midpoint" or "heun"; with three values "midpoint" uses the first and the last of them.
        lower_order_final: the last groups are of lower order, so that the last step is of order 1 (2, where two remain
            of order 3).
    """

    order: int = 2
    kind: Kind = "data"
    form: Form = "midpoint"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        check_order(self.order, 3)
        check_options(self.kind, self.form)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Group:
        return Group(tuple(self.plan(Run.along(schedule, grid).steps)))

    def plan(self, steps: int) -> list[int]:
        """The order of each step: [1, 2, 3, 1, 2, 3, …]; only the end differs."""
        plan = [1 + i % self.order for i in range(steps)]
        if self.lower_order_final and plan and plan[-1] == self.order:
            plan[-1] = 1
        return plan

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Group, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Group, Prediction]:
        prediction = ask(x, now).shifted(now)
        order = 1 if nxt.is_clean or state.start is None else min(state.plan[state.done], len(state.values) + 1)
        here = Span(self.kind, now, nxt)
        value = here.value(prediction)
        if order == 1 or state.start is None or state.x is None:
            from_noise = now.is_nearly_noise if self.kind == "noise" else now.is_noise
            begun = None if from_noise or now.is_clean else now
            group = Group(state.plan, state.done + 1, begun, x, ((here.clock, value),))
            return here.first_order(x, prediction), nxt, group, prediction
        values = (*state.values, (here.clock, value))
        group = Group(state.plan, state.done + 1, state.start, state.x, values)
        span, (_, first), later = Span(self.kind, state.start, nxt), values[0], values[1:]
        if len(later) == 2 and self.form == "midpoint":
            x = corrected(span.constant(state.x, first), first, span.weights(later[1:]), later[1:])
        else:
            x = corrected(span.constant(state.x, first), first, span.weights(later, self.form), later)
        return x, nxt, group, prediction
