"""UniPC: a predictor and a corrector of one family, the corrector free of charge.

The network's answer at the predicted state serves twice: to correct that state and to go on from it.

>>> UniPC(order=3, variant="bh1").order
3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, Number, mix
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask
from sfumato.diffusion.solvers.dpm import Kind, Span, check_options, expm1
from sfumato.diffusion.solvers.multistep import Past, Run, check_order, corrected, lagrange, quotient
from sfumato.diffusion.solvers.registry import method
from sfumato.errors import raise_unknown
from sfumato.random import NoiseSource

Variant = Literal["bh1", "bh2"]


@dataclass(frozen=True)
class Predicted:
    """A run, and how its last step was predicted: what the corrector needs.

    Attributes:
        run: the steps and the values remembered, the newest at the level of `span.start`.
        span: the last step; None where it is not to be corrected.
        used: the older values it was made with.
        weights: theirs.
    """

    run: Run
    span: Span | None = None
    used: tuple[Past, ...] = ()
    weights: tuple[Number, ...] = ()


@method("unipc_multistep", "UniPC 2", "UniPCMultistepScheduler", order=2)
@method("uni_pc_bh2", "UniPC bh2", order=3)
@method("uni_pc", "UniPC", order=3, variant="bh1")
@dataclass(frozen=True)
class UniPC:
    """Multistep predictor and corrector in lambda (Zhao 2023, algorithms 1 and 2). Reads `x0`, or `eps` (kind "noise").

    A sum of differences `D_j = (m_j - m) / r_j` is added to the first-order step, with weights that integrate
    polynomials exactly; where there is one difference its weight is `B(h) / 2`. The predictor of order 2 with bh2 is
    DPM-Solver++ 2M. The correction is the difference between the two formulas, added to the state as it is found: what
    a hook has done to that stays done.

    Attributes:
        order: of the predictor, 1 to 3. The corrector raises it by one while no step is of lower order.
        variant: `B(h)`, "bh1" `h` or "bh2" `expm1(h)`.
        kind: what is interpolated, "data" or "noise".
        lower_order_final: order at most the number of steps left, in runs of any length.
        disable_corrector: steps, counted from 0, whose result is not corrected.
    """

    order: int = 2
    variant: Variant = "bh2"
    kind: Kind = "data"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_order(self.order, 3)
        check_options(self.kind, "heun")
        if self.variant not in get_args(Variant):
            raise_unknown("variant", self.variant, get_args(Variant))

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Predicted:
        return Predicted(Run.along(schedule, grid))

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Predicted, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Predicted, Prediction]:
        prediction, run = ask(x, now).shifted(now), state.run
        span = Span(self.kind, now, nxt)
        m = span.value(prediction)
        if state.span is not None and run.done - 1 not in self.disable_corrector:
            x = x + self._correction(state, state.span, span.clock, m)
        used = run.past[: self._order(run, nxt) - 1]
        weights = self._weights(span, [clock for clock, _ in used])
        x = corrected(span.first_order(x, prediction), m, weights, used)
        after = run.after(now, span.clock, m, self.order)
        correctable = None if now.is_noise else span  # from pure noise nothing is remembered
        return x, nxt, Predicted(after, correctable, used, tuple(weights)), prediction

    def _order(self, run: Run, nxt: NoiseLevel) -> int:
        if nxt.is_clean:
            return 1
        return min(self.order, run.left) if self.lower_order_final else self.order

    def _weights(self, span: Span, clocks: Sequence[Number]) -> list[Number]:
        """Of `m_j - m`, for values at those points of lambda."""
        if not clocks:
            return []
        (u, moments), nodes = span.moments(len(clocks)), span.nodes(clocks)
        if len(clocks) == 1:
            b = moments[0] if self.variant == "bh2" else moments[0] * quotient(u, expm1(u))
            return lagrange(nodes, [b / 2])
        return lagrange(nodes, moments[1:])

    def _correction(self, state: Predicted, span: Span, clock: Number, m: Tensor) -> Tensor:
        """Corrector minus predictor over the last step, (B, *S); `m` is what was found at its end."""
        (_, old), *_ = state.run.past
        weights = self._weights(span, [*(c for c, _ in state.used), clock])
        found = mix(weights[-1], m - old, 0.0, old)
        changes = [new - before for new, before in zip(weights[:-1], state.weights, strict=True)]
        return corrected(found, old, changes, state.used)
