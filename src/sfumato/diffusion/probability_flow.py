"""The likelihood of data under the probability-flow ODE (Song 2021, eq. 39): exact, but for the integration's error.

Every path is integrated in one pair of coordinates, `log nsr` and `c = x / sqrt(alpha² + sigma²)`. With `n = tan(u)`
the flow is `c = cos(u) x0 + sin(u) eps` on variance-preserving, exploding and flow paths alike, so that
`dc / d log n = sin(u) cos(u) (cos(u) eps - sin(u) x0)`: bounded, and the noise at its end is N(0, I). The divergence
that the change of variables needs is exact, for a few dimensions, or Hutchinson's estimate, `z · J z` for random z.

>>> import torch
>>> from sfumato.diffusion.analytic import GaussianData
>>> from sfumato.diffusion.schedule import VESchedule
>>> data, x = GaussianData(torch.zeros(2, dtype=torch.float64), 1.0), torch.zeros(1, 2, dtype=torch.float64)
>>> found = flow_density(data, x, VESchedule(), divergence="exact")
>>> round(float(found.log_density), 3)  # of the origin: -log(2 pi)
-1.838
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.grid import nsr_ends
from sfumato.diffusion.guidance import DenoiseFn, as_function
from sfumato.diffusion.level import expand
from sfumato.diffusion.likelihood import Noise
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, raise_unknown

Divergence = Literal["rademacher", "gaussian", "exact"]
DIVERGENCES = ("rademacher", "gaussian", "exact")

State = tuple[Tensor, Tensor]
"""The point (B, *S) and what its log-density has changed by so far, (B,) float64 on the CPU, in nats."""

Field = Callable[[float, State], State]

BIN = 2 / 255
"""Width of one 8-bit value in pictures in [-1, 1]."""


@dataclass(frozen=True)
class FlowDensity:
    """What the integration found.

    Attributes:
        log_density: (B,) float64, nats, of each `x0` as a point of the path's cleanest level.
        latent: (B, *S) where each picture goes: standard normal for data like the model's.
        evaluations: of the denoiser.
    """

    log_density: Tensor
    latent: Tensor
    evaluations: int

    def bits_per_dim(self, *, bins: bool = False) -> Tensor:
        """(B,) bits per dimension; with `bins` of 8-bit values of width `BIN` (see `dequantize`), not of a density."""
        dims = self.latent[0].numel()
        return -self.log_density / (dims * math.log(2)) - (math.log2(BIN) if bins else 0.0)


def dequantize(x0: Tensor, noise: Noise) -> Tensor:
    """8-bit pictures (B, …) on the grid `k / 127.5 - 1` spread evenly over their bins: `x0 + BIN (u - 1/2)`.

    The density of the result, averaged over u, bounds the probability of the picture from below (Theis 2016, section
    3.1). u is the normal distribution's CDF of one draw of `noise`.
    """
    u: Tensor = torch.special.ndtr(noise.draw().to(x0.device, torch.float32))
    return x0 + BIN * (u - 0.5).to(x0)


def flow_density(
    denoise: DenoiseFn | Denoiser,
    x0: Tensor,
    schedule: Schedule,
    *,
    divergence: Divergence = "rademacher",
    noise: Noise | None = None,
    probes: int = 1,
    tolerance: float = 1e-5,
    steps: int | None = None,
    ends: tuple[float, float] | None = None,
) -> FlowDensity:
    """Log-density of `x0` under the model that draws from N(0, I) and follows the probability-flow ODE to the data.

    Args:
        denoise: (x_t, level, None) -> Prediction, or a `Denoiser`; differentiable in `x_t`, without clipping, which
            would bend the flow.
        x0: (B, *S).
        divergence: "rademacher" or "gaussian" (Hutchinson's estimate with such probes, unbiased) or "exact", which
            takes one derivative per dimension.
        noise: each picture's own, where the probes come from.
        probes: how many are averaged.
        tolerance: of one step of the Dormand-Prince method, in each coordinate and in the log-density per dimension.
            The step is common to the batch.
        steps: so many equal steps in log nsr instead, at six evaluations each.
        ends: noise-to-signal ratios between which to integrate; None for those the schedule is trained on, with pure
            noise and the clean end moved to 4096 and 1e-3.

    Raises:
        UserError: for an unknown divergence or numbers out of range, or when the tolerance cannot be met.
        ValueError: for probes without `noise`.
    """
    _check(divergence, noise, probes, tolerance, steps)
    low, high = ends or nsr_ends(schedule)
    if not 0 < low < high < math.inf:
        raise UserError(f"ends must be two rising, finite, positive noise-to-signal ratios, got {low} and {high}")
    found = [] if noise is None or divergence == "exact" else [_probe(divergence, noise, x0) for _ in range(probes)]
    field = _Flow(as_function(denoise), schedule, found)
    begin = (x0.detach() / math.sqrt(1 + low**2), torch.zeros(len(x0), dtype=torch.float64))
    span = (math.log(low), math.log(high))
    if steps is not None:
        latent, change = _march(field, begin, span, steps)
    else:
        latent, change = _adapt(field, begin, span, tolerance)
    dims = x0[0].numel()
    squares = latent.flatten(1).to("cpu", torch.float64).square().sum(1)
    normal = -0.5 * (squares + dims * math.log(2 * math.pi))
    return FlowDensity(normal + change - 0.5 * dims * math.log1p(low**2), latent, field.evaluations)


def _check(divergence: str, noise: Noise | None, probes: int, tolerance: float, steps: int | None) -> None:
    if divergence not in DIVERGENCES:
        raise_unknown("divergence", divergence, DIVERGENCES)
    if divergence != "exact" and noise is None:
        raise ValueError("Hutchinson's estimate needs a noise source for its probes")
    if probes < 1 or (steps is not None and steps < 1):
        raise UserError(f"probes and steps must be at least 1, got {probes} and {steps}")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance must lie between 0 and 1, got {tolerance}")


def _probe(kind: str, noise: Noise, x0: Tensor) -> Tensor:
    """A random direction with E[z zᵀ] = I, (B, *S)."""
    z = noise.draw().to(x0)
    return torch.where(z < 0, -1.0, 1.0).to(x0) if kind == "rademacher" else z


class _Flow:
    """The vector field and its divergence; counts how often it asks the denoiser.

    Args:
        probes: of Hutchinson's estimate; none for the exact divergence.
    """

    def __init__(self, denoise: DenoiseFn, schedule: Schedule, probes: list[Tensor]) -> None:
        self.denoise, self.schedule, self.probes = denoise, schedule, probes
        self.evaluations = 0

    def __call__(self, log_nsr: float, state: State) -> State:
        self.evaluations += 1
        nsr = math.exp(log_nsr)
        level = self.schedule.from_nsr(nsr)
        cos, sin = 1 / math.sqrt(1 + nsr**2), nsr / math.sqrt(1 + nsr**2)
        with torch.enable_grad():
            c = state[0].detach().requires_grad_()
            x_t = expand(torch.sqrt(level.alpha**2 + level.sigma**2), c) * c
            prediction = self.denoise(x_t, level, None).shifted(level)
            velocity = sin * cos * (cos * prediction.eps - sin * prediction.x0)
        divergence = self._estimated(velocity, c) if self.probes else _exact_divergence(velocity, c)
        return velocity.detach(), divergence.to("cpu", torch.float64)

    def _estimated(self, velocity: Tensor, c: Tensor) -> Tensor:
        """Mean over the probes of `z · (J z)`, by one reverse pass each; (B,)."""
        total = c.new_zeros(len(c))
        for i, z in enumerate(self.probes):
            more = i + 1 < len(self.probes)
            (pulled,) = torch.autograd.grad(velocity, c, z, retain_graph=more)
            total = total + (pulled * z).flatten(1).sum(1)
        return total / len(self.probes)


def _exact_divergence(velocity: Tensor, c: Tensor) -> Tensor:
    """The trace of the Jacobian, (B,): one reverse pass per dimension."""
    flat = velocity.flatten(1)
    dims = flat.shape[1]
    total = c.new_zeros(len(c))
    for d in range(dims):
        (row,) = torch.autograd.grad(flat[:, d].sum(), c, retain_graph=d + 1 < dims)
        total = total + row.flatten(1)[:, d]
    return total


# Dormand & Prince 1980, table 2: a method of order 5 with one of order 4 inside.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 less order 4


def _plus(state: State, h: float, weights: tuple[float, ...], slopes: list[State]) -> State:
    """`state + h sum_i weights_i slopes_i`."""
    c, change = state
    for weight, (dc, ddiv) in zip(weights, slopes, strict=True):
        if weight:
            c, change = c + (h * weight) * dc, change + (h * weight) * ddiv
    return c, change


def _step(field: Field, u: float, h: float, state: State, first: State) -> tuple[State, list[State]]:
    """One step from `u` to `u + h`: where it arrives, and all seven slopes (the last is the next step's first)."""
    slopes = [first]
    for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
        there = _plus(state, h, weights, slopes)
        slopes.append(field(u + node * h, there))
    return there, slopes


def _march(field: Field, state: State, span: tuple[float, float], steps: int) -> State:
    """So many equal steps."""
    h, slope = (span[1] - span[0]) / steps, field(span[0], state)
    for i in range(steps):
        state, slopes = _step(field, span[0] + i * h, h, state, slope)
        slope = slopes[-1]
    return state


def _adapt(field: Field, state: State, span: tuple[float, float], tolerance: float) -> State:
    """Steps as long as the tolerance allows (Hairer 1993, section II.4)."""
    u, h, slope = span[0], min(0.1, (span[1] - span[0]) / 10), field(span[0], state)
    while u < span[1]:
        last = u + h >= span[1] * (1 - 1e-12 * math.copysign(1, span[1]))
        h = span[1] - u if last else h
        there, slopes = _step(field, u, h, state, slope)
        error = _size(state, there, h, slopes) / tolerance
        if error <= 1:
            u, state, slope = (span[1] if last else u + h), there, slopes[-1]
        elif h < 1e-6:
            raise UserError(
                f"the probability flow cannot be followed to a tolerance of {tolerance} (stuck at a noise-to-signal "
                f"ratio of {math.exp(u):.4g}); give a larger tolerance, or a number of steps"
            )
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
    return state


def _size(state: State, there: State, h: float, slopes: list[State]) -> float:
    """How wrong a step is: the worst picture's root mean square over coordinates, or its log-density per dimension."""
    nothing = (torch.zeros_like(state[0]), torch.zeros_like(state[1]))
    off_c, off_change = _plus(nothing, h, _ERROR, slopes)
    scale = 1 + torch.maximum(state[0].abs(), there[0].abs())
    per_picture = (off_c / scale).flatten(1).square().mean(1).sqrt().max()
    per_dim = off_change.abs().max() / state[0][0].numel()
    worst = max(float(per_picture), float(per_dim))
    return worst if math.isfinite(worst) else math.inf
