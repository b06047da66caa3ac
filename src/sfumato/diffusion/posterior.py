"""The Gaussian transitions between two levels of one path: back, `q(x_s | x_t, x0)`, and forth, `renoise`.

Ancestral sampling, DDIM's eta and the variational bound all read it from here. Written in (alpha, sigma), it holds for
variance-preserving, variance-exploding and flow paths alike, and where `alpha_t = 0`.

>>> from sfumato.diffusion.level import CLEAN, NoiseLevel
>>> float(transition(NoiseLevel.of(1, 0.6, 0.8), CLEAN).variance)
0.0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, expand


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
    return expand(ratio, x) * x + expand(torch.sqrt(added), x) * z


def learned_log_variance(var_frac: Tensor, beta: Tensor, variance: Tensor) -> Tensor:
    """`f log(beta) + (1 - f) log(beta-tilde)` (Nichol 2021, eq. 15).

    Args:
        var_frac: f, (B, C, …), nominally in [0, 1].
        beta, variance: the two ends, > 0 and broadcastable to it.
    """
    return var_frac * torch.log(beta) + (1 - var_frac) * torch.log(variance)
