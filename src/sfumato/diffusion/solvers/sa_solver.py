"""SA-Solver: a stochastic Adams method, multistep predictor and corrector for the variance-controlled reverse SDE.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("SASolverScheduler").predictor_order
2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, toward
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import UserError
from sfumato.random import NoiseSource


@dataclass(frozen=True)
class Taken:
    """A prediction that is yet to be corrected: from `x` at `now` with tau and noise `z` to `end`."""

    x: Tensor
    now: NoiseLevel
    tau: float
    z: Tensor
    end: Tensor
    order: int


@dataclass(frozen=True)
class Adams:
    """What SA-Solver remembers: between which times tau acts, how many steps are left, whether it is warmed up,
    its last estimates of x0 with their levels, newest first, and the step to be corrected."""

    span: tuple[float, float]
    left: int
    done: int = 0
    seen: tuple[tuple[NoiseLevel, Tensor], ...] = ()
    taken: Taken | None = None


@method("sa_solver", "SA-Solver", "SASolverScheduler", stochastic=True)
@dataclass(frozen=True)
class SASolver:
    """Predict with the last estimates of `x0`, correct when the next one is known (Xue 2023, eq. 14-17). Reads `x0`.

    `x' = (s'/s) e^(-tau² h) x + sum_i b_i x0_i + s' sqrt(1 - e^(-2 tau² h)) z` with
    `b_i = (1 + tau²) a' integral over [-h, 0] of e^((1 + tau²) v) l_i(v) dv`, l_i Lagrange's polynomials on the levels
    of the estimates. The corrector repeats the step with the estimate at its end among them, and with the same noise.
    With two estimates the authors add a term of third order, kept here. One evaluation a step. The step that leaves
    pure noise is first order and neither remembered nor corrected; the one that arrives clean is `x0`. Noise comes from
    the picture's stream, one draw a step whether tau is 0 or not. Ignores a learned variance.

    Attributes:
        predictor_order: estimates that the predictor takes, 1 to 4.
        corrector_order: estimates that the corrector takes, the newest among them, 1 to 4; 0 is no corrector. It is the
            order of the whole, where the predictor's is at most one lower.
        tau: >= 0, how stochastic; 0 is a deterministic method, 1 has the noise of the usual reverse SDE.
        interval: tau acts only between these fractions of the training times, clean to noisy.
        lower_order_final: use no more estimates than steps are left.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau: float = 1.0
    interval: tuple[float, float] = (0.2, 0.8)
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.predictor_order <= 4:
            raise UserError(f"predictor_order must be 1 to 4, got {self.predictor_order}")
        if not 0 <= self.corrector_order <= 4:
            raise UserError(f"corrector_order must be 0 to 4, got {self.corrector_order}")
        if self.tau < 0:
            raise UserError(f"tau must not be negative, got {self.tau}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(f"interval must be two fractions of the time, clean to noisy, got {self.interval}")

    @property
    def order(self) -> int:
        if self.tau:
            return 1
        reached = min(self.corrector_order, self.predictor_order + 1) if self.corrector_order else self.predictor_order
        return min(reached, 2) if self.lower_order_final else reached

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Adams:
        low, high = (schedule.t_from_uniform(torch.tensor(u, dtype=torch.float64)) for u in self.interval)
        return Adams((float(low), float(high)), len(grid) - 1)

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Adams, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Adams, Prediction]:
        prediction = ask(x, now).shifted(now)
        seen = ((now, prediction.x0), *state.seen)
        if state.taken is not None:
            was = state.taken
            x = x + (adams(was.x, was.now, now, seen[: was.order], was.tau, was.z) - was.end)
        z = noise.draw() if self.tau else torch.zeros_like(x)
        if nxt.is_clean:
            return toward(x, prediction.x0, now, nxt), nxt, state, prediction
        tau = self.tau if state.span[0] <= float(now.t) <= state.span[1] else 0.0
        if now.is_noise:
            end = adams(x, now, nxt, seen[:1], tau, z)
            return end, nxt, Adams(state.span, state.left - 1), prediction
        left = state.left if self.lower_order_final else max(self.predictor_order, self.corrector_order)
        end = adams(x, now, nxt, seen[: min(self.predictor_order, left, state.done + 1)], tau, z)
        correct = min(self.corrector_order, left + 1, state.done + 2)
        taken = Taken(x, now, tau, z, end, correct) if self.corrector_order else None
        keep = max(self.predictor_order, self.corrector_order - 1)
        done = min(state.done + 1, keep)
        return end, nxt, Adams(state.span, state.left - 1, done, seen[:keep], taken), prediction


def adams(
    x: Tensor, now: NoiseLevel, nxt: NoiseLevel, seen: Sequence[tuple[NoiseLevel, Tensor]], tau: float, z: Tensor
) -> Tensor:
    """One step of the predictor, or of the corrector if `seen` begins with an estimate at `nxt`."""
    h = nxt.half_log_snr - now.half_log_snr
    decay = torch.exp(-(tau**2) * h) if tau else 1.0
    x = expand(nxt.sigma / now.sigma * decay, x) * x
    for weight, (_, x0) in zip(weights(h, nxt, [level for level, _ in seen], 1 + tau**2), seen, strict=True):
        x = x + expand(nxt.alpha * weight, x) * x0
    if not tau:
        return x
    return x + expand(nxt.sigma * torch.sqrt(-torch.expm1(-2 * tau**2 * h)), x) * z


def weights(h: Tensor, nxt: NoiseLevel, levels: Sequence[NoiseLevel], c: float) -> list[Tensor]:
    """`c integral over [-h, 0] of e^(c v) l_i(v) dv` for Lagrange's polynomials on `levels`, `v = lambda - lambda'`.

    Args:
        h: length of the step in lambda, > 0, inf with one level only.
        c: `1 + tau²`.
    """
    if len(levels) == 1:
        return [-torch.expm1(-c * h)]
    nodes = [level.half_log_snr - nxt.half_log_snr for level in levels]
    moments = [-torch.expm1(-c * h)]
    for k in range(1, len(levels)):
        moments.append(-((-h) ** k) * torch.exp(-c * h) - k / c * moments[-1])
    found = []
    for i, node in enumerate(nodes):
        polynomial = [torch.ones_like(h)]
        for other in nodes[:i] + nodes[i + 1 :]:
            higher, lower = [torch.zeros_like(h), *polynomial], [*(-other * a for a in polynomial), torch.zeros_like(h)]
            polynomial = [(a + b) / (node - other) for a, b in zip(higher, lower, strict=True)]
        found.append(sum((a * moment for a, moment in zip(polynomial, moments, strict=True)), torch.zeros_like(h)))
    if len(levels) == 2:
        extra = c * (h**2 / 2 - (c * h + torch.expm1(-c * h)) / c**2) / (nodes[0] - nodes[1])
        found = [found[0] + extra, found[1] - extra]
    return found
