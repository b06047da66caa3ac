"""A point on the diffusion path: `x_t = alpha * x0 + sigma * eps`.

Every family of diffusion lives in these three numbers: variance preserving (`alpha**2 + sigma**2 = 1`), variance
exploding (`alpha = 1`) and flow (`alpha + sigma = 1`). The network's own time `t` is carried along, never recomputed.

>>> level = NoiseLevel.of(t=10.0, alpha=0.8, sigma=0.6)
>>> round(float(level.nsr), 4), round(float(level.half_log_snr), 4)
(0.75, 0.2877)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Number = float | Tensor
"""A number that belongs to a level: plain, or a tensor of the level's shape."""

_NEARLY = 1000.0  # the noise-to-signal ratio from which a level is nearly pure noise


def expand(value: Tensor, x: Tensor) -> Tensor:
    """Make a per-level number ready to multiply `x`: the one place that reshapes, moves and casts.

    Args:
        value: () float64, left as it is (a 0-dim CPU tensor promotes nothing and works on every device);
            (B,), becomes (B, 1, …, 1) of `x`'s type and device; or already broadcastable, such as (B, 1, F, 1, 1).
        x: (B, …).
    """
    if value.ndim == 0:
        return value if value.device.type == "cpu" else value.to(x.device)
    if value.ndim == 1:
        value = value.reshape(-1, *([1] * (x.ndim - 1)))
    return value.to(x.device, x.dtype)


def mix(a: Number, x: Tensor, b: Number, y: Tensor) -> Tensor:
    """`a x + b y`, for per-level numbers `a` and `b`, plain or as `expand` takes them: what most steps are made of.

    In as few passes over the pictures as can be; a term whose number is 0 is left out. May return `x` or `y` itself.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        if a.ndim or b.ndim or a.device.type != "cpu" or b.device.type != "cpu":
            return expand(a, x) * x + expand(b, y) * y
        a, b = float(a), float(b)
    if a == 0:
        return y if b == 1 else y * b
    if a == 1:
        return x if b == 0 else torch.add(x, y, alpha=b)
    return x * a if b == 0 else torch.add(x * a, y, alpha=b)


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level `(t, alpha, sigma)`, each float64 of shape (), (B,) or broadcastable to the picture.

    Attributes:
        t: the schedule's time, what the network was told in training (index of a table, [0, 1] of a flow, …).
        alpha: amplitude of the clean signal, in [0, 1].
        sigma: amplitude of the noise, >= 0.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, t: float, alpha: float, sigma: float) -> NoiseLevel:
        """A level from three plain numbers."""
        return cls(*(torch.tensor(float(v), dtype=torch.float64) for v in (t, alpha, sigma)))

    def like(self, x: Tensor) -> NoiseLevel:
        """This level, each number reshaped to broadcast against `x` and on its device in its type."""
        return NoiseLevel(expand(self.t, x), expand(self.alpha, x), expand(self.sigma, x))

    @cached_property
    def numbers(self) -> tuple[Number, Number]:
        """`(alpha, sigma)`: as plain floats where the level is one for all pictures: much faster to reckon with."""
        if self.alpha.ndim or self.sigma.ndim or self.alpha.device.type != "cpu":
            return self.alpha, self.sigma
        return float(self.alpha), float(self.sigma)

    @property
    def nsr(self) -> Tensor:
        """Noise-to-signal ratio `sigma / alpha`, in [0, inf]: what k-diffusion and EDM call sigma."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> Tensor:
        """`log(alpha / sigma)`, lambda of DPM-Solver: -inf for pure noise, inf for a clean picture."""
        return torch.log(self.alpha) - torch.log(self.sigma)

    @property
    def log_nsr(self) -> float:
        """`log(sigma / alpha)` of a scalar level as a plain number: the clock of `NoiseSource.between`."""
        return -float(self.half_log_snr)

    @property
    def is_noise(self) -> bool:
        """Whether no signal is left somewhere in it."""
        alpha = self.numbers[0]
        return bool((alpha == 0).any()) if isinstance(alpha, Tensor) else alpha == 0

    @property
    def is_nearly_noise(self) -> bool:
        """Whether the noise is over 1000 times the signal somewhere in it: where a picture is not to be seen yet.

        The slope of a step from there changes all the way, so that a method which takes it over the whole step in the
        noise-to-signal ratio would go wrong by as much; from pure noise it could not be reckoned at all. Tables that
        end so (cosine, sigmoid) have one or two such levels.
        """
        alpha, sigma = self.numbers
        nearly = _NEARLY * alpha < sigma
        return bool(nearly.any()) if isinstance(nearly, Tensor) else nearly

    @property
    def is_clean(self) -> bool:
        """Whether no noise is left anywhere in it."""
        sigma = self.numbers[1]
        return bool((sigma == 0).all()) if isinstance(sigma, Tensor) else sigma == 0

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The forward process in one jump, `alpha * x0 + sigma * eps` (Ho 2020, eq. 4). Shapes (B, …)."""
        alpha, sigma = self.numbers
        return mix(alpha, x0, sigma, eps)

    def __len__(self) -> int:
        return 0 if self.alpha.ndim == 0 else self.alpha.shape[0]


def goes_up(now: NoiseLevel, nxt: NoiseLevel) -> bool:
    """Whether `nxt` is noisier than `now` anywhere."""
    (alpha, sigma), (to_alpha, to_sigma) = now.numbers, nxt.numbers
    up = to_sigma * alpha > sigma * to_alpha
    return bool(up.any()) if isinstance(up, Tensor) else up


CLEAN = NoiseLevel.of(t=0.0, alpha=1.0, sigma=0.0)
"""The end of the path, `x_t = x0`. No network is ever asked there; its `t` carries no meaning."""
