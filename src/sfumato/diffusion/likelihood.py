"""Terms of the variational bound (Ho 2020, eq. 5), in bits per dimension.

One term is the KL divergence between the true posterior and the model's transition, or at the clean end the negative
log-likelihood of an 8-bit picture under the model's Gaussian.

>>> import torch
>>> zero = torch.zeros(1, 2)
>>> float(gaussian_kl(zero, zero, zero, zero).sum())
0.0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import learned_log_variance, transition
from sfumato.diffusion.schedule import Schedule


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """`KL(N(mean_p, e^log_var_p) || N(mean_q, e^log_var_q))` per element, in nats."""
    ratio = torch.exp(log_var_p - log_var_q)
    return 0.5 * (log_var_q - log_var_p - 1 + ratio + (mean_p - mean_q) ** 2 * torch.exp(-log_var_q))


def gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Negative log-density of continuous data per element, in nats."""
    return 0.5 * (math.log(2 * math.pi) + log_var + (x - mean) ** 2 * torch.exp(-log_var))


def discretized_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Negative log-likelihood of 8-bit values under a Gaussian binned to 256 levels, per element, in nats.

    Args:
        x: values in [-1, 1] on the grid k / 127.5 - 1; the outermost bins reach to infinity (Ho 2020, eq. 13).
        mean, log_var: of the Gaussian, broadcastable to `x`.

    The Gaussian's CDF is the tanh approximation that the published figures use.
    """
    inv_std = torch.exp(-0.5 * log_var)
    upper = _cdf(inv_std * (x - mean + 1 / 255))
    lower = _cdf(inv_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -torch.log(probability.clamp(min=1e-12))


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def variance_floor(schedule: Schedule) -> Tensor:
    """Posterior variance of the last-but-one step of the training chain; stands in for the last one's, which is 0."""
    steps = schedule.steps or 1000
    second = schedule.level(schedule.t_from_uniform(torch.tensor(1.5 / steps, dtype=torch.float64)))
    return transition(second, schedule.previous(second.t)).variance


def bound_term(
    prediction: Prediction,
    x0: Tensor,
    x_t: Tensor,
    level: NoiseLevel,
    schedule: Schedule,
    *,
    continuous: bool = False,
) -> Tensor:
    """One term of the bound at each picture's own level, with the model's learned variance. Returns (B,) bits/dim.

    Args:
        prediction: of `x_t` at `level`, with `var_frac`.
        x0, x_t: (B, …); `x0` in [-1, 1] on the 8-bit grid unless `continuous`.
        level: of shape (B,).
        continuous: take the data as continuous at the clean end (a density, not 256 bins).
    """
    if prediction.var_frac is None:
        raise ValueError("a bound with learned variance needs a network that outputs one")
    nxt = schedule.previous(level.t)
    step = transition(level, nxt)
    variance = torch.where(nxt.sigma == 0, variance_floor(schedule), step.variance)
    from_x, from_x0 = expand(step.from_x, x_t), expand(step.from_x0, x_t)
    log_var_q = expand(torch.log(variance), x_t)
    log_var_p = learned_log_variance(prediction.var_frac, expand(step.beta, x_t), expand(variance, x_t))
    mean_p = from_x * x_t + from_x0 * prediction.x0
    kl = gaussian_kl(from_x * x_t + from_x0 * x0, log_var_q, mean_p, log_var_p)
    nll = (gaussian_nll if continuous else discretized_nll)(x0, mean_p, log_var_p)
    at_end = expand((nxt.sigma == 0).to(torch.float64), x_t) > 0
    return torch.where(at_end, nll, kl).flatten(1).mean(1) / math.log(2)
