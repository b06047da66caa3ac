"""The denoiser: a network together with the schedule, parameterization and preconditioning it was trained with.

`Denoiser` is the one place where a network is called and where types are cast: solvers, guidance and objectives see
`(x_t, level, condition) -> Prediction` and nothing else.

>>> import torch
>>> from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
>>> zero = lambda x, t: torch.zeros_like(x)
>>> denoiser = Denoiser(torch.nn.Identity(), TableSchedule(linear_alpha_bar()))
>>> denoiser.network.forward = zero
>>> p = denoiser(torch.ones(1, 3, 4, 4), denoiser.schedule.level(0))
>>> bool((p.eps == 0).all())
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.parameterization import EPS, Parameterization
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import raise_unknown


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a denoiser says of one level. Shapes (B, C, …) like `x_t`.

    Attributes:
        x0: estimate of the clean signal.
        eps: estimate of the noise. Kept apart from `x0`: clipping `x0` may or may not derive it anew.
        out: the raw output in its own parameterization (guidance combines and rescales it).
        var_frac: learned variance as a fraction in [0, 1] (in log space) between the smallest and the largest
            posterior variance; the variance itself depends on the step and is the solver's.
        grad: gradient of a log-probability with respect to `x_t` (classifier or CLIP guidance), already scaled.
    """

    x0: Tensor
    eps: Tensor
    out: Tensor
    var_frac: Tensor | None = None
    grad: Tensor | None = None

    def shifted(self, level: NoiseLevel) -> Prediction:
        """Fold `grad` in: `eps - sigma grad` and the `x0` that goes with it (Dhariwal 2021, alg. 2).

        Every solver but the ancestral one (which adds its variance times `grad`) starts from this. In pure noise
        (alpha = 0) there is nothing to tell one picture from another by: the true gradient is 0 there, and none is
        folded in.
        """
        if self.grad is None:
            return self
        noise = level.alpha == 0
        shift = expand(torch.where(noise, 0.0, level.sigma), self.eps) * self.grad
        to_x0 = expand(torch.where(noise, 0.0, level.sigma / level.alpha), self.x0)
        return replace(self, eps=self.eps - shift, x0=self.x0 + to_x0 * shift, grad=None)


@dataclass(frozen=True)
class Preconditioning:
    """How a level is shown to the network: a scale for its input and the time that it is told.

    Attributes:
        name: how configs call it.
        scale: `level -> c_in`, multiplies `x_t`; float64 of the level's shape. None leaves `x_t` as it is.
        time: `level -> c_noise`, what the network's time embedding gets.
    """

    name: str
    scale: Callable[[NoiseLevel], Tensor] | None
    time: Callable[[NoiseLevel], Tensor]


TIME = Preconditioning("time", None, lambda level: level.t)
"""The schedule's own `t`, input as it is: DDPM, latent diffusion, Stable Diffusion."""

TIME_1000 = Preconditioning("time_1000", None, lambda level: 1000 * level.t)
"""`1000 t` for schedules whose `t` runs over [0, 1] (flow matching)."""

SIGNAL = Preconditioning("signal", None, lambda level: level.alpha)
"""SR3: the network is told the amplitude `alpha = sqrt(alpha_bar)` itself (Saharia 2021)."""

ANGLE = Preconditioning("angle", None, lambda level: torch.atan2(level.sigma, level.alpha) * (2 / math.pi))
"""The angle on the circle of `(alpha, sigma)`, in quarters: 0 is clean and 1 pure noise (IPNDM's networks)."""


def edm_preconditioning(sigma_data: float = 0.5) -> Preconditioning:
    """EDM: unit-variance input and `c_noise = ln(nsr) / 4` (Karras 2022, table 1), for any (alpha, sigma) path."""

    def scale(level: NoiseLevel) -> Tensor:
        return 1 / torch.sqrt(level.sigma**2 + (level.alpha * sigma_data) ** 2)

    def time(level: NoiseLevel) -> Tensor:
        return -level.half_log_snr.clamp(-20, 20) / 4

    return Preconditioning("edm", scale, time)


def preconditioning(name: str, *, sigma_data: float = 0.5) -> Preconditioning:
    """The preconditioning of that name: time, time_1000, signal, angle or edm. Unknown names raise `UserError`."""
    known = {p.name: p for p in (TIME, TIME_1000, SIGNAL, ANGLE)}
    if name == "edm":
        return edm_preconditioning(sigma_data)
    if name not in known:
        raise_unknown("preconditioning", name, [*known, "edm"])
    return known[name]


EPS_LIMIT = 100.0
"""The noise-to-signal ratio up to which a network of eps is asked on a path that ends in pure noise.

An error of eps is one of x0 that many times as large. 100 is of the size at which the usual tables end (15 and 157),
and what it leaves out, at most a hundredth of the picture's amplitude, is too little to see. Learned toys sample the
same from 10 to 300, whether x0 is kept in range or not; with 10 steps and x0 free, limits of 1,000 (a flow), 2,254 and
15,406 (the neighbours of pure noise in tables) lose about half of the samples, and 10,000 (a flow) all.
"""


def _limit(schedule: Schedule, parameterization: Parameterization) -> NoiseLevel | None:
    """The noisiest level of the schedule within `EPS_LIMIT`; None where every level's output determines x0."""
    noisiest = schedule.level(schedule.t_range[1])
    if not noisiest.is_noise or float(parameterization.determinant(noisiest)) != 0:
        return None
    nsr = torch.tensor(EPS_LIMIT, dtype=torch.float64)
    return schedule.from_nsr(nsr) if schedule.steps is None else schedule.level(schedule.t_from_nsr(nsr).floor())


def _noisier(a: NoiseLevel, b: NoiseLevel) -> Tensor:
    """Where `a` has more noise for its signal than `b`, both of one path or broadcastable."""
    return a.sigma * b.alpha > b.sigma * a.alpha


class Denoiser(nn.Module):
    """A network with everything that gives its output a meaning.

    Args:
        network: called as `network(x, t, **slots)` with x (B, C, *S), t (B,) and the filled slots of the condition;
            returns (B, C, *S), or (B, 2C, *S) with a learned variance; as a tensor, or as the attribute `sample` of
            what it returns (diffusers' networks).
        schedule: the one it was trained with.
        parameterization: what it outputs.
        preconditioning: how the level is shown to it.
        learned_variance: it outputs 2C channels; the second half v gives `var_frac = (v + 1) / 2` (Nichol 2021,
            eq. 15).
        self_condition: its input is `concat[previous x0, x_t]` on channels (Chen 2022, "analog bits").

    Attributes:
        limit: the noisiest level that the network is asked at, or None where it can be asked at all of them. At
            alpha = 0 (zero terminal SNR, flows) an output of eps is `x_t` itself and says nothing of the picture. What
            a step from there needs is the limit of `E[x0 | x_t]` as the signal vanishes, so the network is asked about
            the same `x_t` at the noisiest level (of a table: whole index) whose noise-to-signal ratio is at most
            `EPS_LIMIT`.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization = EPS,
        *,
        preconditioning: Preconditioning = TIME,
        learned_variance: bool = False,
        self_condition: bool = False,
    ) -> None:
        super().__init__()
        self.limit = _limit(schedule, parameterization)
        self.network, self.schedule, self.parameterization = network, schedule, parameterization
        self.preconditioning = preconditioning
        self.learned_variance, self.self_condition = learned_variance, self_condition

    def forward(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        previous_x0: Tensor | None = None,
    ) -> Prediction:
        """Predict at one level.

        Args:
            x_t: (B, C, *S).
            level: of shape () or (B,), or broadcastable to `x_t`.
            condition: its slots; None for none.
            previous_x0: (B, C, *S) estimate of the step before, for a self-conditioned network (None: zeros).

        Raises:
            ValueError: where the network returns anything but a tensor of the shape that `x_t` asks for.
        """
        dtype = self._dtype(x_t)
        moved = None if condition is None else condition.to(x_t.device, dtype)
        scale, asked = self.preconditioning.scale, self.asked(level)
        inputs = x_t if scale is None else expand(scale(asked), x_t) * x_t
        if self.self_condition:
            inputs = torch.cat([torch.zeros_like(x_t) if previous_x0 is None else previous_x0, inputs], dim=1)
        if moved is not None and moved.concat is not None:
            beside = moved.concat.to(inputs.dtype).expand(-1, -1, *x_t.shape[2:])
            inputs = torch.cat([inputs, beside], dim=1)
        time = self.preconditioning.time(asked).to(x_t.device, torch.float32)
        if time.ndim == 0:
            time = time.expand(x_t.shape[0])
        slots = {} if moved is None else moved.for_network()
        out = self._checked(self.network(inputs.to(dtype), time, **slots), x_t).to(x_t.dtype)
        var_frac = None
        if self.learned_variance:
            out, v = out.chunk(2, dim=1)
            var_frac = (v + 1) / 2
        return self.read(out, x_t, level, var_frac)

    def read(self, out: Tensor, x_t: Tensor, level: NoiseLevel, var_frac: Tensor | None = None) -> Prediction:
        """Give a raw output (B, C, *S) its meaning: the `Prediction` with `x0` and `eps` solved for."""
        asked = self.asked(level)
        x0, eps = self.parameterization.solve(out, x_t, asked)
        if asked is not level:  # the noise that goes with this x0 in this x_t: at alpha = 0 all of x_t
            own = expand(1 / level.sigma, x_t) * (x_t - expand(level.alpha, x_t) * x0)
            eps = torch.where(expand(_noisier(level, asked).double(), x_t) > 0, own, eps)
        return Prediction(x0, eps, out, var_frac)

    def asked(self, level: NoiseLevel) -> NoiseLevel:
        """The level that the network is asked at: `level` itself, or `limit` where it is noisier than that.

        An objective trains at these levels: the others' outputs are never read.
        """
        if self.limit is None:
            return level
        noisier = _noisier(level, self.limit)
        if not bool(noisier.any()):
            return level
        if level.alpha.ndim == 0:
            return self.limit
        pairs = ((self.limit.t, level.t), (self.limit.alpha, level.alpha), (self.limit.sigma, level.sigma))
        return NoiseLevel(*(torch.where(noisier, float(instead), own) for instead, own in pairs))

    def _checked(self, out: Any, x_t: Tensor) -> Tensor:
        """What the network returned, if it is a tensor of the right shape: another would be broadcast."""
        found = getattr(out, "sample", out)
        wanted = (len(x_t), x_t.shape[1] * (2 if self.learned_variance else 1), *x_t.shape[2:])
        if isinstance(found, Tensor) and found.shape == wanted:
            return found
        said = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        doubled = ", two halves for a learned variance" if self.learned_variance else ""
        raise ValueError(f"the network must return a tensor {wanted} for {tuple(x_t.shape)}{doubled}; it gave {said}")

    def _dtype(self, x_t: Tensor) -> torch.dtype:
        parameter = next(self.network.parameters(), None)
        return x_t.dtype if parameter is None else parameter.dtype
