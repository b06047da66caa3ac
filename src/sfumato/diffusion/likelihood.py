"""The variational bound on the likelihood of data (Ho 2020, eq. 5), term by term, in bits per dimension.

One term is the KL divergence between the true posterior and the model's transition, or at the clean end the negative
log-likelihood of an 8-bit picture under the model's Gaussian; the prior's is that of the noisiest level against the
noise that sampling starts from. `bound` adds up a whole chain, which may be respaced; `bound_term` is one term at each
picture's own level, for training.

>>> import torch
>>> from sfumato.diffusion.analytic import GaussianData
>>> from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
>>> from sfumato.random import NoiseSource
>>> data, pictures = GaussianData(torch.zeros(1, 4, 4), 0.25), torch.zeros(2, 1, 4, 4)
>>> levels = chain(TableSchedule(linear_alpha_bar()), "25")
>>> found = bound(data, pictures, levels, NoiseSource([0, 1], (1, 4, 4)))
>>> found.terms.shape, bool(torch.allclose(found.total, found.prior + found.terms.sum(1)))
(torch.Size([2, 25]), True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfumato.diffusion import grid as grids
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.guidance import DenoiseFn, as_function
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import learned_log_variance, transition
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, raise_unknown

Variance = Literal["small", "large", "learned"]
VARIANCES = ("small", "large", "learned")


class Noise(Protocol):
    """What noise is asked for: one picture's own unit normals after another (`sfumato.random.NoiseSource`)."""

    def draw(self) -> Tensor:
        """(B, *S)."""
        ...


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
    nxt, floor = schedule.previous(level.t), variance_floor(schedule)
    return _term(prediction, x0, x_t, level, nxt, floor, variance="learned", continuous=continuous)


def _term(
    prediction: Prediction,
    x0: Tensor,
    x_t: Tensor,
    now: NoiseLevel,
    nxt: NoiseLevel,
    floor: Tensor,
    *,
    variance: Variance,
    continuous: bool,
) -> Tensor:
    """The term of the step from `now` to `nxt`, (B,) bits/dim; `floor` stands in for the last step's variance, 0."""
    step, at_end = transition(now, nxt), nxt.sigma == 0
    small = torch.where(at_end, floor, step.variance)
    log_var_q = expand(torch.log(small), x_t)
    if variance == "learned":
        assert prediction.var_frac is not None
        log_var_p = learned_log_variance(prediction.var_frac, expand(step.beta, x_t), expand(small, x_t))
    else:
        large = torch.where(at_end, floor, step.beta)
        log_var_p = expand(torch.log(small if variance == "small" else large), x_t)
    from_x, from_x0 = expand(step.from_x, x_t), expand(step.from_x0, x_t)
    apart = from_x0 * (prediction.x0 - x0)  # of the means: both have from_x * x_t in common
    nats = gaussian_kl(torch.zeros_like(apart), log_var_q, apart, log_var_p)
    if bool(at_end.any()):
        likelihood = gaussian_nll if continuous else discretized_nll
        nll = likelihood(x0, from_x * x_t + from_x0 * prediction.x0, log_var_p)
        nats = torch.where(expand(at_end.to(torch.float64), x_t) > 0, nll, nats)
    return nats.flatten(1).mean(1) / math.log(2)


def prior_term(x0: Tensor, noisiest: NoiseLevel) -> Tensor:
    """`KL(q(x_T | x0) || N(0, (alpha² + sigma²) I))`, (B,) bits/dim: against what sampling starts from (`start`).

    On a variance-preserving path that is the N(0, I) of Ho 2020; at pure noise the term is 0.

    Args:
        x0: (B, …).
        noisiest: the chain's first level, of shape ().
    """
    log_var_p = torch.log(noisiest.alpha**2 + noisiest.sigma**2)
    mean = expand(noisiest.alpha, x0) * x0
    nats = gaussian_kl(mean, 2 * torch.log(noisiest.sigma), torch.zeros_like(mean), log_var_p)
    return nats.flatten(1).mean(1) / math.log(2)


@dataclass(frozen=True)
class Bound:
    """The bound of a batch, in bits per dimension, for a chain of T steps, noisy to clean.

    Attributes:
        terms: (B, T) one for each step; the last is the decoder's.
        prior: (B,).
        x0_mse, eps_mse: (B, T) mean squared error of the estimates of the picture and of its noise that the steps
            were made with (after clipping, if the denoiser clips).
        times: (T,) the schedule's times of the steps.
    """

    terms: Tensor
    prior: Tensor
    x0_mse: Tensor
    eps_mse: Tensor
    times: Tensor

    @property
    def decoder(self) -> Tensor:
        """(B,) the last step's negative log-likelihood of the picture."""
        return self.terms[:, -1]

    @property
    def total(self) -> Tensor:
        """(B,) the bound itself: all terms and the prior's."""
        return self.terms.sum(1) + self.prior


def chain(schedule: Schedule, spec: str | int | None = None) -> grids.Grid:
    """The levels that a bound runs over, noisy to clean, with the clean one last.

    Args:
        spec: None for every step of the table (1,000 of a continuous schedule); a number of steps; or, for a table,
            improved-diffusion's respacing ("250", "ddim50", "10,15,20").

    Raises:
        UserError: for fewer than two steps, more than the table has, or a spec that cannot be read.
    """
    if spec is None:
        levels = grids.linspace(schedule, schedule.steps or 1000)
    elif schedule.steps is not None:
        levels = grids.respaced(schedule, str(spec))
    elif str(spec).isdecimal():
        levels = grids.linspace(schedule, int(spec))
    else:
        raise UserError(f"spacing {spec!r} needs a schedule with discrete steps; give a number")
    if len(levels) < 3:
        raise UserError("a variational bound needs at least 2 steps: the last one's variance is that of the one before")
    return levels


@torch.no_grad()
def bound(
    denoise: DenoiseFn | Denoiser,
    x0: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise,
    *,
    variance: Variance = "small",
    continuous: bool = False,
) -> Bound:
    """The whole bound, one draw of noise at each level: an unbiased estimate of each picture's.

    `prior + sum_t KL(q(x_s | x_t, x0) || p(x_s | x_t)) + decoder`, as improved-diffusion evaluates it: give
    `clip_x0(unguided(denoiser))` for its default, `clip_denoised=True`. Holds on every path.

    Args:
        denoise: (x_t, level, None) -> Prediction, or a `Denoiser`.
        x0: (B, *S) in [-1, 1], on the 8-bit grid unless `continuous`.
        levels: of shape (), noisy to clean; the last is clean (`chain`).
        noise: each picture's own; one draw per step, noisiest first.
        variance: of the model's transitions: "small", the posterior's beta-tilde; "large", beta; or "learned",
            the network's, interpolated in this very chain. At the last step the fixed ones are beta-tilde of the step
            before, since its own is 0.
        continuous: the data are not 8-bit: the last term is a density.

    Raises:
        UserError: for an unknown variance, or a learned one that the network does not have.
        ValueError: for a chain that does not end clean or has fewer than two steps.
    """
    if variance not in VARIANCES:
        raise_unknown("variance", variance, VARIANCES)
    if len(levels) < 3 or not levels[-1].is_clean:
        raise ValueError("a bound needs a chain of at least two steps that ends clean")
    denoise = as_function(denoise)
    floor = transition(levels[-3], levels[-2]).variance
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for now, nxt in zip(levels[:-1], levels[1:], strict=True):
        eps = noise.draw().to(x0)
        x_t = now.noise(x0, eps)
        prediction = denoise(x_t, now, None)
        if variance == "learned" and prediction.var_frac is None:
            raise UserError("this model has no learned variance; use variance 'small' or 'large'")
        term = _term(prediction, x0, x_t, now, nxt, floor, variance=variance, continuous=continuous)
        rows.append((term, _mean_square(prediction.x0 - x0), _mean_square(prediction.eps - eps)))
    terms, x0_mse, eps_mse = (torch.stack(column, dim=1) for column in zip(*rows, strict=True))
    times = torch.stack([level.t for level in levels[:-1]])
    return Bound(terms, prior_term(x0, levels[0]), x0_mse, eps_mse, times)


def _mean_square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).mean(1)
