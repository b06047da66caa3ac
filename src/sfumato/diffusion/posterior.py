"""The Gaussian transitions between two levels of one path: back, `q(x_s | x_t, x0)`, and forth, `renoise`.

Ancestral sampling, DDIM's eta and the variational bound all read it from here. Written in (alpha, sigma), it holds for
variance-preserving, variance-exploding and flow paths alike, and where `alpha_t = 0`. `ancestral` divides a step into a
deterministic part and noise; `spread` says how much noise, which a network may have learned.

>>> from sfumato.diffusion.level import CLEAN, NoiseLevel
>>> float(transition(NoiseLevel.of(1, 0.6, 0.8), CLEAN).variance)
0.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, expand, mix
from sfumato.errors import UserError, raise_unknown

Injection = Literal["own", "learned"]
"""Where a stochastic step has the variance of its noise from: the method's formula, or the network."""


@dataclass(frozen=True)
class Transition:
    """`q(x_s | x_t, x0) = N(from_x * x_t + from_x0 * x0, variance I)`; float64 of the levels' shape.

    Attributes:
        beta: variance of the forward step, `x_t | x_s ~ N(alpha_t/alpha_s x_s, beta I)` (beta_t of DDPM).
        variance: of the posterior (beta-tilde of DDPM, eq. 7); 0 when `s` is clean.
        from_x, from_x0: coefficients of its mean.
    """

    beta: Tensor
    variance: Tensor
    from_x: Tensor
    from_x0: Tensor


def transition(now: NoiseLevel, nxt: NoiseLevel) -> Transition:
    """The transition from `now` to the cleaner `nxt` (Ho 2020, eq. 6-7, for any path)."""
    ratio = now.alpha / nxt.alpha
    kept = (ratio * nxt.sigma / now.sigma) ** 2  # share of x_t's noise that x_s already had
    beta = now.sigma**2 * (1 - kept)
    return Transition(
        beta=beta,
        variance=nxt.sigma**2 * (1 - kept),
        from_x=ratio * (nxt.sigma / now.sigma) ** 2,
        from_x0=nxt.alpha * (1 - kept),
    )


def renoise(x: Tensor, now: NoiseLevel, nxt: NoiseLevel, z: Tensor) -> Tensor:
    """Forward from `now` to the noisier `nxt`: `x a'/a + sqrt(s'² - (a'/a)² s²) z`. Shapes (B, *S)."""
    ratio = nxt.alpha / now.alpha
    added = (nxt.sigma**2 - (ratio * now.sigma) ** 2).clamp(min=0)
    return mix(ratio, x, torch.sqrt(added), z)


def learned_log_variance(var_frac: Tensor, beta: Tensor, variance: Tensor) -> Tensor:
    """`f log(beta) + (1 - f) log(beta-tilde)` (Nichol 2021, eq. 15).

    Args:
        var_frac: f, (B, C, …), nominally in [0, 1].
        beta, variance: the two ends, > 0 and broadcastable to it.
    """
    return var_frac * torch.log(beta) + (1 - var_frac) * torch.log(variance)


def ancestral(now: NoiseLevel, nxt: NoiseLevel, eta: float = 1.0) -> tuple[NoiseLevel, Tensor]:
    """Divide a step into a way down to less noise than `nxt` has, and the variance that brings it back up.

    Of the noise of `nxt`, `variance = min(eta² beta-tilde, sigma'²)` is new. `down` has `nxt`'s alpha and
    `sqrt(sigma'² - variance)` for sigma, so it lies beside the path; `x_down + sqrt(variance) z` is at `nxt`. In
    `x / alpha` these are k-diffusion's sigma_down and sigma_up, and DDIM's eta (Song 2021, eq. 16).

    Args:
        eta: >= 0; 0 is deterministic, 1 has the variance of DDPM's posterior.
    """
    variance = torch.minimum(eta**2 * transition(now, nxt).variance, nxt.sigma**2)
    return NoiseLevel(nxt.t, nxt.alpha, torch.sqrt(nxt.sigma**2 - variance)), variance


def check_injection(injection: str, eta: float) -> None:
    """Refuse an eta below 0, an unknown injection, and a learned variance in a step without noise, by `UserError`."""
    if eta < 0:
        raise UserError(f"eta must not be negative, got {eta}")
    if injection not in ("own", "learned"):
        raise_unknown("variance", injection, ("own", "learned"))
    if injection == "learned" and eta == 0:
        raise UserError("variance 'learned' needs an eta above 0: with eta 0 a step injects no noise")


def spread(injection: Injection, own: Tensor, var_frac: Tensor | None, now: NoiseLevel, nxt: NoiseLevel) -> Tensor:
    """Standard deviation of the noise that a stochastic step from `now` to `nxt` injects; broadcasts to the picture.

    "own" is the method's, `sqrt(own)`. "learned" interpolates in the logarithm between it and beta of this very step,
    as DDPM does between beta-tilde and beta (`learned_log_variance`); the step's mean stays what it is.

    Args:
        own: the method's own variance, > 0, of the levels' shape.
        var_frac: the network's (B, C, …), or None where it predicts none: then "learned" raises `UserError`.
    """
    if injection == "own":
        return torch.sqrt(own)
    if var_frac is None:
        raise UserError("this model has no learned variance; use variance 'own'")
    beta = expand(transition(now, nxt).beta, var_frac)
    return torch.exp(learned_log_variance(var_frac, beta, expand(own, var_frac)) / 2)
