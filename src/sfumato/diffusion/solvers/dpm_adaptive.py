"""DPM fast and DPM adaptive: the singlestep DPM-Solver of orders 1 to 3, with a fixed plan or with error control.

Both are k-diffusion's, from the authors' own code (Lu 2022). Neither was meant for an arbitrary grid: DPM fast takes
intervals even in lambda (the "exponential" grid), DPM adaptive chooses its steps itself and takes the grid's levels for
places where it has to stop, so it is best given `ends(grid)`.

>>> from sfumato.diffusion.solvers.registry import solver
>>> plan(5), solver("DPM adaptive").solver_order
((3, 3, 3, 2, 1), 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import ancestral
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, along, first_order
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError
from sfumato.random import NoiseSource


def ends(grid: Sequence[NoiseLevel]) -> list[NoiseLevel]:
    """What an adaptive method needs of a grid: its two ends of finite log nsr, and pure noise and clean beyond them."""
    first = 1 if grid[0].is_noise else 0
    last = len(grid) - 2 if grid[-1].is_clean else len(grid) - 1
    kept = sorted({0, min(first, len(grid) - 1), max(last, 0), len(grid) - 1})
    return [grid[i] for i in kept]


def plan(intervals: int, ending: Sequence[int] = (2, 1)) -> tuple[int, ...]:
    """Orders of DPM fast's intervals: threes, and `ending` for the last ones."""
    threes = max(intervals - len(ending), 0)
    return (3,) * threes + tuple(ending)[max(len(ending) - intervals, 0) :]


def lower_end(grid: Sequence[NoiseLevel]) -> Tensor:
    """The lowest noise-to-signal ratio of a grid that is not clean (0 if there is none)."""
    found = [level.nsr for level in grid if not level.is_clean]
    return torch.stack([nsr.min() for nsr in found]).min() if found else torch.zeros((), dtype=torch.float64)


def descent(now: NoiseLevel, nxt: NoiseLevel, eta: float, lowest: Tensor) -> tuple[NoiseLevel, Tensor]:
    """Where a stochastic singlestep goes before noise of that variance is added: not below the grid's lower end."""
    if eta == 0:
        return nxt, torch.zeros_like(nxt.sigma)
    down, _ = ancestral(now, nxt, eta)
    sigma = torch.minimum(torch.maximum(down.sigma, nxt.alpha * lowest), nxt.sigma)
    return NoiseLevel(nxt.t, nxt.alpha, sigma), nxt.sigma**2 - sigma**2


@dataclass
class Singlestep:
    """DPM-Solver-1, 2 and 3 from one level to another (Lu 2022, alg. 1-2), sharing their evaluations.

    With `h = lambda' - lambda`, `u_i` at `lambda + r_i h` and `d_i = eps(u_i) - eps`:
    order 1 `along(x, eps)`; order 2 `along(x, eps + d_1 / 2 r_1)`; order 3 `along(x, eps) - (s'/r_2) phi(h) d_2` with
    `u_2 = along(x, eps) - s_2 (r_2/r_1) phi(r_2 h) d_1` and `phi(h) = (e^h - 1)/h - 1`.
    """

    ask: Ask
    schedule: Schedule
    x: Tensor
    now: NoiseLevel
    nxt: NoiseLevel
    first: Prediction
    last: Prediction = field(init=False)
    _inner: dict[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.last = self.first

    def _difference(self, r: float, level: NoiseLevel, u: Tensor) -> Tensor:
        """`eps(u) - eps`, remembered by r."""
        if r not in self._inner:
            self.last = self.ask(u, level).shifted(level)
            self._inner[r] = self.last.eps - self.first.eps
        return self._inner[r]

    def _early(self, r: float) -> tuple[NoiseLevel, Tensor]:
        """The level at r, and Euler's state there."""
        level = self.schedule.between(self.now, self.nxt, r)
        return level, along(self.x, self.first.eps, self.now, level)

    def order1(self) -> Tensor:
        return along(self.x, self.first.eps, self.now, self.nxt)

    def order2(self, r1: float = 1 / 2) -> Tensor:
        d1 = self._difference(r1, *self._early(r1))
        return along(self.x, self.first.eps + d1 / (2 * r1), self.now, self.nxt)

    def order3(self, r1: float = 1 / 3, r2: float = 2 / 3) -> Tensor:
        h = self.nxt.half_log_snr - self.now.half_log_snr
        d1 = self._difference(r1, *self._early(r1))
        level, u = self._early(r2)
        d2 = self._difference(r2, level, u - expand(level.sigma * (r2 / r1) * _phi(r2 * h), u) * d1)
        return self.order1() - expand(self.nxt.sigma / r2 * _phi(h), self.x) * d2

    def order(self, number: int) -> Tensor:
        """The step of that order."""
        return (self.order1, self.order2, self.order3)[number - 1]()


def _phi(h: Tensor) -> Tensor:
    return torch.expm1(h) / h - 1


@dataclass(frozen=True)
class Course:
    """What DPM fast remembers: the schedule, the grid's lower end and the orders of the steps to come."""

    schedule: Schedule
    lowest: Tensor
    orders: tuple[int, ...]


@method("dpm_fast", "DPM fast", "k_dpm_fast", evaluations=3, schedule="exponential")
@dataclass(frozen=True)
class DPMFast:
    """DPM-Solver's plan for few evaluations: order 3 in all intervals but the last, `ending` there. Reads `eps`.

    k-diffusion's `sample_dpm_fast` (Lu 2022, section 3.4). On a grid of m intervals it spends 3 m - 3 evaluations with
    the ending (2, 1); (1,) and (2,) are those for 3 m - 2 and 3 m - 1. A step that leaves pure noise or arrives clean
    is first order (`x0` and `eps`). As a whole it is of second order, because of its last steps. Ignores a learned
    variance.

    Attributes:
        ending: orders of the last intervals, one or two numbers of 1 to 3.
        eta: >= 0; above 0 each step is an ancestral one, with Brownian noise.
        noise: S_noise, standard deviation of the unit noise.
    """

    ending: tuple[int, ...] = (2, 1)
    eta: float = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise UserError(f"eta must not be negative, got {self.eta}")
        if not self.ending or any(number not in (1, 2, 3) for number in self.ending):
            raise UserError(f"ending must be orders of 1 to 3, such as (2, 1), got {self.ending}")

    @property
    def order(self) -> int:
        return 2 if self.eta == 0 else 1

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Course:
        return Course(schedule, lower_end(grid), plan(len(grid) - 1, self.ending))

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Course, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Course, Prediction]:
        prediction, after = ask(x, now).shifted(now), replace(state, orders=state.orders[1:])
        if nxt.is_clean:
            return first_order(prediction, nxt), nxt, after, prediction
        down, variance = descent(now, nxt, self.eta, state.lowest)
        if now.is_noise:
            x = first_order(prediction, down)
        else:
            way = Singlestep(ask, state.schedule, x, now, down, prediction)
            x, prediction = way.order(state.orders[0]), way.last
        if bool((variance > 0).any()):
            x = x + self.noise * expand(torch.sqrt(variance), x) * noise.between(now.log_nsr, nxt.log_nsr)
        return x, nxt, after, prediction


@dataclass(frozen=True)
class Control:
    """What DPM adaptive remembers, one number per picture, float64 (B,).

    Attributes:
        schedule, lowest: the path and the grid's lower end.
        h: the next step in lambda.
        errors: (3, B), inverse errors of the last steps, newest first; None before the first.
        scale: `x / alpha` of the last accepted lower-order step, which the relative tolerance is of.
    """

    schedule: Schedule
    lowest: Tensor
    h: Tensor | None = None
    errors: Tensor | None = None
    scale: Tensor | None = None


@method("dpm_adaptive", "DPM adaptive", "k_dpm_ad", "k_dpm_adaptive", evaluations=3)
@dataclass(frozen=True)
class DPMAdaptive:
    """DPM-Solver-12 or -23 with a step chosen by its error, k-diffusion's `sample_dpm_adaptive`. Reads `eps`.

    The error is that of the lower-order step, in `x / alpha`, relative to `max(atol, rtol max(|x_low|, |x_prev|))`
    (Lu 2022, appendix C); the next step follows from a PID controller. Every picture has steps of its own, so that it
    does not depend on its batch (k-diffusion has one step for all: there the same for a batch of one). Stops at every
    level of the grid (see `ends`). A step that leaves pure noise or arrives clean is first order (`x0` and `eps`).
    Ignores a learned variance.

    Attributes:
        solver_order: 2 or 3, of the step that is kept.
        rtol, atol: relative and absolute tolerance.
        h_init: first step in lambda, > 0.
        pcoeff, icoeff, dcoeff: of the controller.
        accept: a step is accepted if the controller would change it by no less than this factor.
        eta: >= 0; above 0 each step is an ancestral one, with Brownian noise.
        noise: S_noise, standard deviation of the unit noise.
        climbs: it cannot walk up (inversion).
    """

    solver_order: Literal[2, 3] = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept: float = 0.81
    eta: float = 0.0
    noise: float = 1.0
    climbs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.solver_order not in (2, 3):
            raise UserError(f"solver_order must be 2 or 3, got {self.solver_order}")
        if min(self.rtol, self.atol) < 0 or self.rtol + self.atol == 0 or self.h_init <= 0 or self.eta < 0:
            raise UserError("DPM adaptive needs rtol, atol and eta not below 0, one of the tolerances and h_init above")

    @property
    def order(self) -> int:
        return self.solver_order if self.eta == 0 else 1

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Control:
        return Control(schedule, lower_end(grid))

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Control, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Control, Prediction]:
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean or now.is_noise:
            down, variance = descent(now, nxt, 0.0 if nxt.is_clean else self.eta, state.lowest)
            return self._noised(first_order(prediction, down), now, nxt, variance, noise), nxt, state, prediction
        each = () if len(x) == 1 else (len(x),)
        here, left = now.half_log_snr.expand(each), (nxt.half_log_snr - now.half_log_snr).expand(each)
        going = left > 1e-5
        h = torch.full(each, self.h_init, dtype=torch.float64) if state.h is None else state.h
        tried = torch.where(going, torch.minimum(h, left), 1e-3)
        target = _nearer(state.schedule.from_nsr(torch.exp(-here - tried)), nxt, going & (h >= left))
        start = NoiseLevel(*(v.expand(each) for v in (now.t, now.alpha, now.sigma)))
        down, variance = descent(start, target, self.eta, state.lowest)
        way = Singlestep(ask, state.schedule, x, start, down, prediction)
        low, high = (way.order1(), way.order2()) if self.solver_order == 2 else (way.order2(1 / 3), way.order3())
        previous = x / expand(start.alpha, x) if state.scale is None else state.scale
        low = low / expand(target.alpha, x)
        factor, errors = self._factor(low, high / expand(target.alpha, x), previous, state.errors)
        accepted = going & (factor >= self.accept)
        x = torch.where(_mask(accepted, x), self._noised(high, start, target, variance, noise), x)
        after = Control(
            state.schedule,
            state.lowest,
            torch.where(going, h * factor, h),
            torch.where(going, _accepted(errors, accepted), errors),
            torch.where(_mask(accepted, x), low, previous),
        )
        reached = _nearer(start, target, accepted)
        done = bool((nxt.half_log_snr - reached.half_log_snr <= 1e-5).all())
        return x, nxt if done else reached, after, way.last

    def _factor(self, low: Tensor, high: Tensor, previous: Tensor, errors: Tensor | None) -> tuple[Tensor, Tensor]:
        """By how much each picture's controller changes the step, and its inverse errors with this one in front."""
        allowed = (self.rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=self.atol)
        squares = (((low - high) / allowed) ** 2).flatten(1).mean(1)
        each = () if len(low) == 1 else (len(low),)
        inverse = 1 / (torch.sqrt(squares).to("cpu", torch.float64).reshape(each) + 1e-8)
        errors = torch.stack([inverse] * 3) if errors is None else torch.stack([inverse, errors[1], errors[2]])
        order = 1.5 if self.eta else self.solver_order
        p, i, d = self.pcoeff / order, self.icoeff / order, self.dcoeff / order
        raw = errors[0] ** (p + i + d) * errors[1] ** -(p + 2 * d) * errors[2] ** d
        return 1 + torch.atan(raw - 1), errors

    def _noised(
        self, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, variance: Tensor, noise: NoiseSource
    ) -> Tensor:
        """Add the noise of the interval, each picture's its own."""
        if not bool((variance > 0).any()):
            return x
        if nxt.alpha.ndim == 0:
            z = noise.between(now.log_nsr, nxt.log_nsr)
        else:
            pairs = zip((-now.half_log_snr).tolist(), (-nxt.half_log_snr).tolist(), strict=True)
            z = torch.stack([noise.between(u, v)[i] for i, (u, v) in enumerate(pairs)])
        return x + self.noise * expand(torch.sqrt(variance), x) * z


def _mask(each: Tensor, x: Tensor) -> Tensor:
    """One decision per picture, ready to choose between states like `x`."""
    return each.to(x.device).reshape(-1, *([1] * (x.ndim - 1)))


def _nearer(a: NoiseLevel, b: NoiseLevel, take_b: Tensor) -> NoiseLevel:
    """Per picture, `b` where it is taken and else `a`."""
    return NoiseLevel(*(torch.where(take_b, getattr(b, n), getattr(a, n)) for n in ("t", "alpha", "sigma")))


def _accepted(errors: Tensor, accepted: Tensor) -> Tensor:
    """The errors moved back by one where a step was accepted."""
    return torch.where(accepted, torch.stack([errors[0], errors[0], errors[1]]), errors)
