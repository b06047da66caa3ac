"""The DPM++ SDE family: exponential integrators of the reverse SDE whose noise is the picture's own Brownian path.

`DPMppSDE` asks twice a step; `DPMppMultistepSDE` combines the estimates of up to three steps. Their noise belongs to
the interval of log nsr that it covers (`NoiseSource.between`), so that it is the same whatever the number of steps.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("DPM++ 2M SDE Heun").kind, solver("DPM++ 3M SDE").points
('heun', 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand, mix
from sfumato.diffusion.posterior import ancestral
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, first_order, toward
from sfumato.diffusion.solvers.multistep import Past, Run
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError, raise_unknown
from sfumato.random import NoiseSource

Increments = Literal["brownian", "fresh"]
"""Noise of an interval: the picture's Brownian path over log nsr, or the next numbers of its stream."""


def increment(kind: Increments, noise: NoiseSource, now: NoiseLevel, nxt: NoiseLevel) -> Tensor:
    """Unit noise (B, *S) of the step from `now` to `nxt`.

    Raises:
        UserError: for Brownian noise at a level per picture: the path is asked for one interval of the whole batch.
    """
    if kind == "fresh":
        return noise.draw()
    if now.alpha.numel() > 1 or nxt.alpha.numel() > 1:
        raise UserError("Brownian noise needs one level for the whole batch; take increments='fresh'")
    return noise.between(now.log_nsr, nxt.log_nsr)


def _check(eta: float, increments: str, kind: str = "midpoint") -> None:
    if eta < 0:
        raise UserError(f"eta must not be negative, got {eta}")
    if increments not in ("brownian", "fresh"):
        raise_unknown("increments", increments, ("brownian", "fresh"))
    if kind not in ("midpoint", "heun"):
        raise_unknown("kind", kind, ("midpoint", "heun"))


@method(
    "dpmpp_sde",
    "DPM++ SDE",
    "DPMSolverSDEScheduler",
    "k_dpmpp_sde",
    evaluations=2,
    stochastic=True,
)
@dataclass(frozen=True)
class DPMppSDE:
    """DPM-Solver++(2S) for the SDE, k-diffusion's `sample_dpmpp_sde`. Reads `x0`.

    An ancestral step towards `x0` to the level at the fraction r of the way in log nsr, where `x0_s` is estimated; then
    an ancestral step from where it began towards `(1 - 1/2r) x0 + 1/2r x0_s`. Both parts of the noise are increments
    of one Brownian path. A step that leaves pure noise or arrives clean has one evaluation. Ignores a learned variance.

    Attributes:
        eta: >= 0; 0 is the deterministic DPM-Solver++(2S).
        noise: S_noise, standard deviation of the unit noise.
        r: place of the inner level, in (0, 1).
        increments: "brownian", or "fresh" numbers for every evaluation.
    """

    eta: float = 1.0
    noise: float = 1.0
    r: float = 0.5
    increments: Increments = "brownian"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _check(self.eta, self.increments)
        if not 0 < self.r < 1:
            raise UserError(f"r must lie in (0, 1), got {self.r}")

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Schedule:
        return schedule

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Schedule, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Schedule, Prediction]:
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean:
            return toward(x, prediction.x0, now, nxt), nxt, state, prediction
        x0 = prediction.x0
        if not now.is_noise:
            middle = state.between(now, nxt, self.r)
            prediction = ask(self._ancestral(x, x0, now, middle, noise), middle).shifted(middle)
            weight = 1 / (2 * self.r)
            x0 = (1 - weight) * x0 + weight * prediction.x0
        return self._ancestral(x, x0, now, nxt, noise), nxt, state, prediction

    def _ancestral(self, x: Tensor, x0: Tensor, now: NoiseLevel, nxt: NoiseLevel, noise: NoiseSource) -> Tensor:
        down, variance = ancestral(now, nxt, self.eta)
        x = toward(x, x0, now, down)
        if self.eta == 0:
            return x
        return x + self.noise * expand(torch.sqrt(variance), x) * increment(self.increments, noise, now, nxt)


def gap(now: NoiseLevel, nxt: NoiseLevel) -> Tensor:
    """`h = lambda' - lambda`, float64 of the levels' shape; positive towards clean."""
    return nxt.half_log_snr - now.half_log_snr


def differences(m0: Tensor, now: NoiseLevel, h: Tensor, past: Sequence[Past]) -> tuple[Tensor, ...]:
    """First, and with three points second, divided differences of an estimate in units of the step h to come.

    `D1_0 = (h / h0)(m0 - m1)`; with a third, `D1 = D1_0 + r0/(r0 + r1) (D1_0 - D1_1)` and
    `D2 = (D1_0 - D1_1)/(r0 + r1)`, `r_i = h_i / h` (Lu 2022b). As many as there are past estimates.
    """
    if not past:
        return ()
    (lambda1, m1), r0 = past[0], (now.half_log_snr - past[0][0]) / h
    first = expand(1 / r0, m0) * (m0 - m1)
    if len(past) == 1:
        return (first,)
    lambda2, m2 = past[1]
    r1 = torch.as_tensor((lambda1 - lambda2) / h)
    curve = first - expand(1 / r1, m0) * (m1 - m2)
    return first + expand(r0 / (r0 + r1), m0) * curve, expand(1 / (r0 + r1), m0) * curve


@method("dpmpp_2m_sde", "DPM++ 2M SDE", "sde-dpmsolver++", "k_dpmpp_2m_sde", stochastic=True)
@method("dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", stochastic=True, kind="heun")
@method("dpmpp_3m_sde", "DPM++ 3M SDE", "k_dpmpp_3m_sde", stochastic=True, points=3, kind="heun")
@dataclass(frozen=True)
class DPMppMultistepSDE:
    """SDE-DPM-Solver++ with the estimates of up to three steps, k-diffusion's 2M SDE and 3M SDE. Reads `x0`.

    With `H = (1 + eta) h`: `x' = (s'/s) e^(-eta h) x + a' (1 - e^-H) x0 + a' (…) + s' sqrt(1 - e^(-2 eta h)) z` (Lu
    2022b, section 5). The correction is `(1 - e^-H)/2 D1` ("midpoint"), `phi2 D1` ("heun"), or with three points
    `phi2 D1 - phi3 D2`, where `phi2 = 1 - (1 - e^-H)/H` and `phi3 = phi2/H - 1/2`. One evaluation a step. The step
    that leaves pure noise is first order and is not remembered; the one that arrives clean is `x0`. Ignores a learned
    variance.

    Attributes:
        points: how many estimates are combined, 1 to 3.
        kind: of the correction with two estimates. k-diffusion's 3M takes "heun" for its second step.
        eta: >= 0; 0 is the deterministic DPM-Solver++(2M or 3M).
        noise: S_noise, standard deviation of the unit noise.
        increments: "brownian", or "fresh" numbers each step (diffusers' DPMSolverMultistepScheduler).
        lower_order_final: in grids of fewer than 15 steps combine no more estimates than steps are left (diffusers;
            k-diffusion does not).
    """

    points: Literal[1, 2, 3] = 2
    kind: Literal["midpoint", "heun"] = "midpoint"
    eta: float = 1.0
    noise: float = 1.0
    increments: Increments = "brownian"
    lower_order_final: bool = False
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _check(self.eta, self.increments, self.kind)
        if self.points not in (1, 2, 3):
            raise UserError(f"points must be 1, 2 or 3, got {self.points}")

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        return Run.along(schedule, grid)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Run, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Run, Prediction]:
        prediction = ask(x, now).shifted(now)
        x0, after = prediction.x0, state.after(now, now.half_log_snr, prediction.x0, 2)
        if nxt.is_clean:
            return toward(x, x0, now, nxt), nxt, after, prediction
        points = min(self.points, state.left) if self.lower_order_final and state.steps < 15 else self.points
        h = gap(now, nxt)
        total = (1 + self.eta) * h
        taken = -torch.expm1(-total)
        kept = nxt.sigma / now.sigma * (torch.exp(-self.eta * h) if self.eta else 1)
        end = mix(kept, x, nxt.alpha * taken, x0)
        terms = differences(x0, now, h, state.past[: points - 1])
        if len(terms) == 1 and self.kind == "midpoint":
            end = end + expand(nxt.alpha * taken / 2, x) * terms[0]
        elif terms:
            phi2 = 1 - taken / total
            end = end + expand(nxt.alpha * phi2, x) * terms[0]
            if len(terms) == 2:
                end = end - expand(nxt.alpha * (phi2 / total - 0.5), x) * terms[1]
        if self.eta:
            std = expand(nxt.sigma * torch.sqrt(-torch.expm1(-2 * self.eta * h)), x)
            end = end + self.noise * std * increment(self.increments, noise, now, nxt)
        return end, nxt, after, prediction


@method("sde_dpmsolver", "SDE-DPM-Solver", "sde-dpmsolver", stochastic=True)
@dataclass(frozen=True)
class SDEDPMSolver:
    """SDE-DPM-Solver of the noise prediction, with the estimates of up to two steps. Reads `eps`.

    `x' = (a'/a) x - (1 + eta) s' (e^h - 1) eps + (…) + s' sqrt(eta (e^(2h) - 1)) z` (Lu 2022b, appendix), where the
    correction is `-(1 + eta) s' (e^h - 1)/2 D1` ("midpoint") or `-(1 + eta) s' ((e^h - 1)/h - 1) D1` ("heun"). A step
    that leaves nearly pure noise or arrives clean is the first-order one from `x0` and `eps`, the former with all its
    noise renewed. Ignores a learned variance.

    Attributes:
        points: how many estimates are combined, 1 or 2.
        kind: of the correction.
        eta: >= 0; 0 is the deterministic DPM-Solver (multistep).
        noise: S_noise, standard deviation of the unit noise.
        increments: "brownian", or "fresh" numbers each step (diffusers).
        lower_order_final: in grids of fewer than 15 steps the last is first order (diffusers).
    """

    points: Literal[1, 2] = 2
    kind: Literal["midpoint", "heun"] = "midpoint"
    eta: float = 1.0
    noise: float = 1.0
    increments: Increments = "brownian"
    lower_order_final: bool = False
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _check(self.eta, self.increments, self.kind)
        if self.points not in (1, 2):
            raise UserError(f"points must be 1 or 2, got {self.points}")

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Run:
        return Run.along(schedule, grid)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Run, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Run, Prediction]:
        prediction = ask(x, now).shifted(now)
        eps, after = prediction.eps, state.after(now, now.half_log_snr, prediction.eps, 1)
        if nxt.is_clean:
            return first_order(prediction, nxt), nxt, after, prediction
        if now.is_nearly_noise:
            down, variance = ancestral(now, nxt, self.eta)
            end, std = first_order(prediction, down), torch.sqrt(variance)
        else:
            points = min(self.points, state.left) if self.lower_order_final and state.steps < 15 else self.points
            h = gap(now, nxt)
            for d1 in differences(eps, now, h, state.past[: points - 1]):
                weight = torch.full_like(h, 0.5) if self.kind == "midpoint" else 1 / h - 1 / torch.expm1(h)
                eps = eps + expand(weight, eps) * d1
            drift = (1 + self.eta) * (nxt.alpha / now.alpha * now.sigma - nxt.sigma)
            end = mix(nxt.alpha / now.alpha, x, -drift, eps)
            std = nxt.sigma * torch.sqrt(self.eta * torch.expm1(2 * h))
        if self.eta:
            end = end + self.noise * expand(std, x) * increment(self.increments, noise, now, nxt)
        return end, nxt, after, prediction
