"""Schedules: how signal and noise are mixed along the path, `t -> NoiseLevel`, and back from the noise-to-signal ratio.

`TableSchedule` is the discrete one (DDPM and all its heirs) and keeps its table exactly; `FlowSchedule`, `SineSchedule`
and `VESchedule` are continuous. The functions `*_alpha_bar` make tables of `alpha_bar = alpha**2` in float64.

>>> import torch
>>> schedule = TableSchedule(linear_alpha_bar())
>>> level = schedule.level(torch.tensor(999))
>>> f"{float(level.alpha) ** 2:.3e}"
'4.036e-05'
>>> round(float(schedule.t_from_nsr(schedule.level(torch.tensor(400)).nsr)), 6)
400.0
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfumato.diffusion.level import CLEAN, NoiseLevel

Times = Tensor | float | int


class Schedule(Protocol):
    """What grids, solvers, objectives and denoisers ask of a schedule.

    Attributes:
        t_range: first (cleanest) and last (noisiest) time that is trained, in the network's own unit.
        nsr_range: the noise-to-signal ratio there; the last may be inf.
        steps: the number of discrete times, or None for a continuous schedule.
    """

    t_range: tuple[float, float]
    nsr_range: tuple[float, float]
    steps: int | None

    def level(self, t: Times) -> NoiseLevel:
        """The level at `t`, () or (B,)."""
        ...

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        """The time at which `level(t).nsr` is `nsr`, clamped to `t_range`. Shape as `nsr`."""
        ...

    def from_nsr(self, nsr: Times) -> NoiseLevel:
        """The level whose noise-to-signal ratio is exactly `nsr`; its `t` may be fractional."""
        ...

    def between(self, now: NoiseLevel, nxt: NoiseLevel, r: float) -> NoiseLevel:
        """A level inside a step: `half_log_snr` at the fraction `r` in (0, 1) of the way from `now` to `nxt`."""
        ...

    def t_from_uniform(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers: maps `u` in [0, 1), shape (B,), to the schedule's default density."""
        ...

    def previous(self, t: Tensor) -> NoiseLevel:
        """The next cleaner level of the training chain (1,000 steps for continuous schedules); `CLEAN` at the end."""
        ...


def as_times(t: Times) -> Tensor:
    """Times as a float64 tensor on the CPU, shape () or (B,)."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu")


class _NSRPath:
    """What every schedule shares: a path parameterised by the noise-to-signal ratio."""

    t_range: tuple[float, float]
    nsr_range: tuple[float, float]
    steps: int | None = None
    _chain = 1000  # steps of the discrete chain that a continuous schedule is given for variances and bounds

    def level(self, t: Times) -> NoiseLevel:
        raise AssertionError("a schedule defines level()")

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        raise AssertionError("a schedule defines t_from_nsr()")

    def _mix(self, nsr: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a schedule defines (alpha, sigma) of a noise-to-signal ratio")

    def t_from_uniform(self, u: Tensor) -> Tensor:
        low, high = self.t_range
        return low + (high - low) * as_times(u)

    def _uniform_from_t(self, t: Tensor) -> Tensor:
        low, high = self.t_range
        return (t - low) / (high - low)

    def from_nsr(self, nsr: Times) -> NoiseLevel:
        n = as_times(nsr)
        alpha, sigma = self._mix(n)
        return NoiseLevel(self.t_from_nsr(n), alpha, sigma)

    def between(self, now: NoiseLevel, nxt: NoiseLevel, r: float) -> NoiseLevel:
        if bool((now.alpha == 0).any()) or bool((nxt.sigma == 0).any()):
            raise ValueError("there is no level at a fraction of an infinite step (pure noise or clean end)")
        return self.from_nsr(torch.exp(-torch.lerp(now.half_log_snr, nxt.half_log_snr, r)))

    def previous(self, t: Tensor) -> NoiseLevel:
        u = self._uniform_from_t(as_times(t)) - 1 / self._chain
        low, inside = u < 0, self.level(self.t_from_uniform(u.clamp(min=0)))
        return NoiseLevel(
            torch.where(low, CLEAN.t, inside.t),
            torch.where(low, CLEAN.alpha, inside.alpha),
            torch.where(low, CLEAN.sigma, inside.sigma),
        )


def _vp_mix(nsr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with `alpha**2 + sigma**2 = 1`, right at nsr = inf."""
    alpha = 1 / torch.sqrt(1 + nsr**2)
    return alpha, torch.where(torch.isinf(nsr), torch.ones_like(nsr), nsr * alpha)


class TableSchedule(_NSRPath):
    """A discrete variance-preserving schedule: `alpha = sqrt(alpha_bar[t])`, `sigma = sqrt(1 - alpha_bar[t])`.

    Args:
        alpha_bar: (T,), strictly decreasing in (0, 1); the last may be 0 (zero terminal SNR). Kept in float64, so
            that a system can reproduce a table that was accumulated in float32.
        interpolation: of the noise-to-signal ratio at a fractional `t`, "log" (k-diffusion) or "linear" (diffusers).
            In an interval that ends in alpha = 0, alpha itself is interpolated.

    Raises:
        ValueError: when the table is not strictly decreasing within [0, 1), or its first level is clean.
    """

    def __init__(self, alpha_bar: Tensor, *, interpolation: Literal["log", "linear"] = "log") -> None:
        table = as_times(alpha_bar)
        if table.ndim != 1 or len(table) < 2 or not bool((table[1:] < table[:-1]).all()):
            raise ValueError("alpha_bar must be a strictly decreasing table of at least two numbers")
        if not (float(table[0]) < 1 and float(table[-1]) >= 0):
            raise ValueError(f"alpha_bar must lie in [0, 1), got {float(table[0]):.4g} … {float(table[-1]):.4g}")
        if interpolation not in ("log", "linear"):
            raise ValueError(f"interpolation is 'log' or 'linear', not {interpolation!r}")
        self.alpha_bar, self.interpolation, self.steps = table, interpolation, len(table)
        self._nsr = torch.sqrt((1 - table) / table)
        self.t_range = (0.0, float(len(table) - 1))
        self.nsr_range = (float(self._nsr[0]), float(self._nsr[-1]))

    def level(self, t: Times) -> NoiseLevel:
        times = as_times(t)
        last = len(self.alpha_bar) - 1
        if not bool(((times >= 0) & (times <= last)).all()):
            raise ValueError(f"t must lie in [0, {last}], got {times.tolist()}")
        whole = times.round().long()
        bar, exact = self.alpha_bar[whole], times == whole
        alpha, sigma = torch.sqrt(bar), torch.sqrt(1 - bar)
        if not bool(exact.all()):
            between = self._mix(self._interpolate(times))
            alpha, sigma = torch.where(exact, alpha, between[0]), torch.where(exact, sigma, between[1])
        return NoiseLevel(times, alpha, sigma)

    def _interpolate(self, t: Tensor) -> Tensor:
        low = t.floor().long().clamp(max=len(self._nsr) - 2)
        w, a, b = t - low, self._nsr[low], self._nsr[low + 1]
        if self.interpolation == "log":
            inside = torch.exp(torch.log(a) * (1 - w) + torch.log(b) * w)
        else:
            inside = torch.lerp(a, b, w)
        alpha = (1 - w) * torch.sqrt(self.alpha_bar[low])
        towards_zero = torch.where(w == 0, a, torch.sqrt(1 - alpha**2) / alpha)
        return torch.where(torch.isinf(b), towards_zero, inside)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        n = as_times(nsr).clamp(min=self.nsr_range[0], max=self.nsr_range[1])
        low = torch.searchsorted(self._nsr, n.contiguous(), right=True).sub(1).clamp(0, len(self._nsr) - 2)
        a, b = self._nsr[low], self._nsr[low + 1]
        if self.interpolation == "log":
            w = (torch.log(n) - torch.log(a)) / (torch.log(b) - torch.log(a))
        else:
            w = (n - a) / (b - a)
        alpha, _ = self._mix(n)
        towards_zero = 1 - alpha / torch.sqrt(self.alpha_bar[low])
        return low + torch.where(torch.isinf(b), towards_zero, w).clamp(0, 1)

    def _mix(self, nsr: Tensor) -> tuple[Tensor, Tensor]:
        return _vp_mix(nsr)

    def t_from_uniform(self, u: Tensor) -> Tensor:
        steps = len(self.alpha_bar)
        return (as_times(u) * steps).floor().clamp(max=steps - 1)

    def previous(self, t: Tensor) -> NoiseLevel:
        times = as_times(t)
        inside, clean = self.level((times - 1).clamp(min=0)), times < 1
        return NoiseLevel(
            torch.where(clean, CLEAN.t, inside.t),
            torch.where(clean, CLEAN.alpha, inside.alpha),
            torch.where(clean, CLEAN.sigma, inside.sigma),
        )


class FlowSchedule(_NSRPath):
    """The straight path of flow matching, `alpha = 1 - s`, `sigma = s`, `s = shift * t / (1 + (shift - 1) * t)`.

    `t` runs over [0, 1]; `t_range` starts at 1/1000, the cleanest time that is trained. `shift` > 1 spends more of
    the times at high noise (Esser 2024, eq. 23).
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be positive and finite, got {shift}")
        self.shift = shift
        self.t_range = (1e-3, 1.0)
        self.nsr_range = (float(self.level(1e-3).nsr), math.inf)

    def level(self, t: Times) -> NoiseLevel:
        times = as_times(t)
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise ValueError(f"t must lie in [0, 1], got {times.tolist()}")
        sigma = self.shift * times / (1 + (self.shift - 1) * times)
        return NoiseLevel(times, 1 - sigma, sigma)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        sigma = self._mix(as_times(nsr))[1]
        return (sigma / (self.shift - (self.shift - 1) * sigma)).clamp(*self.t_range)

    def _mix(self, nsr: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 + nsr), torch.where(torch.isinf(nsr), torch.ones_like(nsr), nsr / (1 + nsr))


class SineSchedule(_NSRPath):
    """The variance-preserving path `sigma = sin²(pi t / 2)`, `alpha = sqrt(1 - sigma²)`, `t` in [0, 1] (IPNDM's).

    It ends in pure noise and begins to be noisy slowly; `t_range` starts where `sigma` is about 1/1000. Networks on it
    are told the angle `atan(sigma / alpha)` (`Preconditioning` "angle").
    """

    def __init__(self) -> None:
        self.t_range = (0.02, 1.0)
        self.nsr_range = (float(self.level(0.02).nsr), math.inf)

    def level(self, t: Times) -> NoiseLevel:
        times = as_times(t)
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise ValueError(f"t must lie in [0, 1], got {times.tolist()}")
        sigma = torch.sin(times * (math.pi / 2)) ** 2
        alpha = torch.cos(times * (math.pi / 2)) * torch.sqrt(1 + sigma)  # of which cos² is 1 - sigma
        return NoiseLevel(times, torch.where(times == 1, 0.0, alpha), sigma)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        alpha, sigma = self._mix(as_times(nsr))
        t: Tensor = torch.atan2(torch.sqrt(sigma), alpha / torch.sqrt(1 + sigma)) * (2 / math.pi)
        return t.clamp(*self.t_range)

    def _mix(self, nsr: Tensor) -> tuple[Tensor, Tensor]:
        return _vp_mix(nsr)


class VESchedule(_NSRPath):
    """The variance-exploding path of EDM, `alpha = 1`, `sigma = t` (Karras 2022), `t` in [sigma_min, sigma_max].

    Training times are log-uniform; the network's input scale and time come from `Preconditioning`. Outside the trained
    range `t` goes on being sigma, without a clamp: churn may go above `sigma_max`.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, both finite, got {sigma_min} and {sigma_max}")
        self.t_range = self.nsr_range = (sigma_min, sigma_max)

    def level(self, t: Times) -> NoiseLevel:
        times = as_times(t)
        if not bool((times >= 0).all()):
            raise ValueError(f"t must not be negative, got {times.tolist()}")
        return NoiseLevel(times, torch.ones_like(times), times)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        return as_times(nsr).clone()

    def _mix(self, nsr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(nsr), nsr

    def t_from_uniform(self, u: Tensor) -> Tensor:
        low, high = (math.log(t) for t in self.t_range)
        return torch.exp(low + (high - low) * as_times(u))

    def _uniform_from_t(self, t: Tensor) -> Tensor:
        low, high = (math.log(v) for v in self.t_range)
        return (torch.log(t) - low) / (high - low)


def alpha_bar_from_betas(betas: Tensor) -> Tensor:
    """`alpha_bar_t = prod_{s<=t} (1 - beta_s)` in float64, (T,) -> (T,)."""
    return torch.cumprod(1 - betas.to(torch.float64), dim=0)


def linear_alpha_bar(steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Betas linear from `start` to `end` (Ho 2020, section 4). Returns alpha_bar, (steps,) float64."""
    return alpha_bar_from_betas(torch.linspace(start, end, steps, dtype=torch.float64))


def scaled_linear_alpha_bar(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Square roots of the betas linear (latent diffusion and Stable Diffusion, where it is called "linear")."""
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64)
    return alpha_bar_from_betas(roots**2)


def cosine_alpha_bar(steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """`f(u) = cos²((u + s) / (1 + s) * pi / 2)`, betas clipped at `max_beta` (Nichol 2021, eq. 17)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return alpha_bar_from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def sigmoid_alpha_bar(
    steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
    *,
    ends: torch.dtype = torch.float64,
) -> Tensor:
    """`alpha_bar` falls as a sigmoid from u = 0 to 1 (Jabri 2022, section 3), betas clipped at `max_beta`.

    `ends` is the type in which the two end values are rounded: denoising_diffusion_pytorch's tables have them in
    float32, which shows at the noisiest levels.
    """
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    low, high = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=ends)).to(torch.float64)
    f = (high - torch.sigmoid((u * (end - start) + start) / tau)) / (high - low)
    return alpha_bar_from_betas((1 - f[1:] / f[:-1]).clamp(0, max_beta))


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale `sqrt(alpha_bar)` so that the last is exactly 0 and the first is kept (Lin 2023, alg. 1)."""
    root = torch.sqrt(alpha_bar.to(torch.float64))
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
