"""Guidance: functions that build a `DenoiseFn = (x_t, level, previous_x0) -> Prediction` from denoisers and conditions.

They compose like functions: `clip_x0(classifier_free(denoiser, condition, null, 3.0))`. The convention is Stable
Diffusion's, `null + scale * (conditional - null)`: 1 switches guidance off and is bit-identical to `unguided`.

>>> import torch
>>> from sfumato.diffusion.analytic import GaussianData
>>> from sfumato.diffusion.level import NoiseLevel
>>> data = GaussianData(mean=torch.full((1,), 3.0), variance=0.01)
>>> clip_x0(data)(torch.zeros(1, 1), NoiseLevel.of(0, 0.6, 0.8), None).x0.item()
1.0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.errors import UserError

DenoiseFn = Callable[[Tensor, NoiseLevel, Tensor | None], Prediction]


def unguided(denoiser: Denoiser, condition: Condition | None = None) -> DenoiseFn:
    """The denoiser as it is, under one condition."""

    def denoise(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        prediction: Prediction = denoiser(x_t, level, condition, previous_x0)
        return prediction

    return denoise


def as_function(denoise: DenoiseFn | Denoiser) -> DenoiseFn:
    """What asks for an estimate: a function as it is, a bare denoiser unguided and without a condition."""
    return unguided(denoise) if isinstance(denoise, Denoiser) else denoise


def classifier_free(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    rescale: float = 0.0,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    every: int = 1,
    batched: bool = True,
) -> DenoiseFn:
    """Classifier-free guidance, `out = null + scale * (conditional - null)` (Ho & Salimans 2022, in SD's convention).

    Args:
        condition, null: the wanted condition and the one it is contrasted with (the null or a negative prompt).
        scale: 1 is off (the null branch is not evaluated), 0 is the null alone.
        rescale: phi of Lin 2023 (eq. 15-16): pull the output's standard deviation back to the conditional one's.
        channels: guide only the first so many channels (DiT guides 3 of 4); None for all.
        interval: guide only where `nsr` lies within (low, high) (Kynkaanniemi 2024); outside, unguided. Each picture by
            its own level where they differ.
        every: evaluate the null branch in every so-many-th guided call; for the calls between, the difference of both
            branches is kept (Lv 2024, CFG-Cache). What is returned then counts its calls: build one for each batch.
        batched: evaluate null and conditional in one call of twice the batch, null first.

    The learned variance, where there is one, is the conditional branch's.

    Raises:
        UserError: for what is no interval, and `every` below 1.
    """
    check_interval(interval)
    if every < 1:
        raise UserError(f"the null branch can be evaluated in every call or in fewer, every >= 1, got {every}")
    plain = unguided(denoiser, condition)
    if scale == 1:
        return plain
    difference = _Difference(every)

    def denoise(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        inside = torch.ones(()) if interval is None else (interval[0] <= level.nsr) & (level.nsr <= interval[1])
        if not bool(inside.any()):
            return plain(x_t, level, previous_x0)
        if (known := difference.known(denoiser)) is not None:
            with_ = plain(x_t, level, previous_x0)
            out = with_.out + (scale - 1) * known
        else:
            if batched:
                without, with_ = _both(denoiser, condition, null, x_t, level, previous_x0)
            else:
                without, with_ = denoiser(x_t, level, null, previous_x0), plain(x_t, level, previous_x0)
            out = without.out + scale * difference.kept(with_.out - without.out, denoiser)
        if rescale:
            out = _rescaled(out, with_.out, rescale)
        if channels is not None:
            out = torch.cat([out[:, :channels], with_.out[:, channels:]], dim=1)
        if not bool(inside.all()):
            out = torch.where(expand(inside.double(), x_t) > 0, out, with_.out)
        return denoiser.read(out, x_t, level, with_.var_frac)

    return denoise


def check_interval(interval: tuple[float, float] | None) -> None:
    """Refuse, with a `UserError`, what is not an interval of noise-to-signal ratios; None is all of them."""
    if interval is None:
        return
    numbers = isinstance(interval, tuple | list) and all(isinstance(one, int | float) for one in interval)
    if not numbers or len(interval) != 2 or not 0 <= interval[0] < interval[1] < math.inf:
        told = ", ".join(f"{one:g}" for one in interval) if numbers else repr(interval)
        raise UserError(f"the interval of guidance must be two finite, rising noise-to-signal ratios, got {told}")


class _Difference:
    """The difference of both branches of guidance, good for `every` calls in a row."""

    def __init__(self, every: int) -> None:
        self.every, self.left = every, 0
        self.value: Tensor | None = None
        self.weights: torch.dtype | None = None

    def known(self, denoiser: Denoiser) -> Tensor | None:
        """The one that is kept, if it is good for this call: not once the network's type has changed, which happens
        where it was not finite."""
        if not self.left or self.weights != _dtype_of(denoiser):
            return None
        self.left -= 1
        return self.value

    def kept(self, value: Tensor, denoiser: Denoiser) -> Tensor:
        """Keep one for the calls after this."""
        if self.every > 1:
            self.value, self.left, self.weights = value, self.every - 1, _dtype_of(denoiser)
        return value


def _dtype_of(denoiser: Denoiser) -> torch.dtype | None:
    return next((parameter.dtype for parameter in denoiser.network.parameters()), None)


def cfg_plus_plus(
    denoiser: Denoiser, condition: Condition, null: Condition, scale: float, *, batched: bool = True
) -> DenoiseFn:
    """CFG++: the clean estimate is guided, the noise that is put back is the null's (Chung 2024, alg. 2).

    `x0` belongs to `out = null + scale * (conditional - null)`, and `eps` is the null branch's own, so that a solver's
    `alpha' x0 + sigma' eps` interpolates between the two manifolds instead of leaving them. It takes a solver that
    reads both (DDIM, Euler, Euler ancestral); one that reads `x0` alone sees plain guidance, one that reads `eps` alone
    none.

    Args:
        scale: the paper's lambda, in [0, 1]. 0 is the null alone; 1 has the conditional's `x0` and still the null's
            `eps`, so it is not `unguided`: here no scale is "off". 0.6 is about as strong as 7.5 of `classifier_free`.
        batched: evaluate null and conditional in one call of twice the batch, null first.

    The learned variance, where there is one, is the conditional branch's.

    Raises:
        UserError: for a scale outside [0, 1].
    """
    if not 0 <= scale <= 1:
        raise UserError(f"CFG++ takes a scale in [0, 1] (0.6 is about classifier-free guidance of 7.5), got {scale}")

    def denoise(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        if batched:
            without, with_ = _both(denoiser, condition, null, x_t, level, previous_x0)
        else:
            without, with_ = (denoiser(x_t, level, c, previous_x0) for c in (null, condition))
        guided = denoiser.read(without.out + scale * (with_.out - without.out), x_t, level, with_.var_frac)
        return replace(guided, eps=without.eps)

    return denoise


def _both(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    x_t: Tensor,
    level: NoiseLevel,
    previous_x0: Tensor | None,
) -> tuple[Prediction, Prediction]:
    """Null and conditional predictions from one call of twice the batch."""
    previous = None if previous_x0 is None else torch.cat([previous_x0, previous_x0])
    numbers = (level.t, level.alpha, level.sigma)
    twice = level if level.alpha.ndim == 0 else NoiseLevel(*(torch.cat([v, v]) for v in numbers))
    both = denoiser(torch.cat([x_t, x_t]), twice, condition.stacked_on(null), previous)

    def half(value: Tensor | None, index: int) -> Tensor | None:
        return None if value is None else value.chunk(2)[index]

    def part(index: int) -> Prediction:
        return Prediction(
            both.x0.chunk(2)[index], both.eps.chunk(2)[index], both.out.chunk(2)[index], half(both.var_frac, index)
        )

    return part(0), part(1)


def _rescaled(out: Tensor, reference: Tensor, phi: float) -> Tensor:
    dims = tuple(range(1, out.ndim))
    ratio = reference.std(dim=dims, keepdim=True) / out.std(dim=dims, keepdim=True)
    return out * (phi * ratio + (1 - phi))


def clip_x0(denoise: DenoiseFn, low: float = -1.0, high: float = 1.0, *, rederive_eps: bool = True) -> DenoiseFn:
    """Clamp `x0` to the range of pictures (pixel space only, not latents).

    Args:
        rederive_eps: make `eps` agree with the clipped `x0` (guided-diffusion); False keeps the network's own
            (diffusers' DDIM by default).
    """

    def denoise_and_clip(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        prediction = denoise(x_t, level, previous_x0)
        return _with_x0(prediction, prediction.x0.clamp(low, high), x_t, level, rederive_eps)

    return denoise_and_clip


def dynamic_threshold(
    denoise: DenoiseFn, quantile: float = 0.995, maximum: float = 1.0, *, rederive_eps: bool = True
) -> DenoiseFn:
    """Imagen's dynamic thresholding (Saharia 2022, section 2.3): clamp to each picture's own quantile, then scale.

    Args:
        quantile: of `|x0|` per picture, in (0, 1].
        maximum: the range of pictures; a quantile below it leaves the picture clamped to it.

    Raises:
        ValueError: for a quantile outside (0, 1] and a maximum that is not positive.
    """
    if not (0 < quantile <= 1 and maximum > 0):
        raise ValueError(f"need a quantile in (0, 1] and a positive maximum, got {quantile} and {maximum}")

    def denoise_and_threshold(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        prediction = denoise(x_t, level, previous_x0)
        flat = prediction.x0.detach().abs().flatten(1).float()
        s = torch.quantile(flat, quantile, dim=1).clamp(min=maximum)
        limit = expand(s, prediction.x0)
        x0 = torch.minimum(torch.maximum(prediction.x0, -limit), limit) * (maximum / limit)
        return _with_x0(prediction, x0, x_t, level, rederive_eps)

    return denoise_and_threshold


def _with_x0(prediction: Prediction, x0: Tensor, x_t: Tensor, level: NoiseLevel, rederive_eps: bool) -> Prediction:
    if not rederive_eps or bool((level.sigma == 0).any()):
        return replace(prediction, x0=x0)
    eps = expand(1 / level.sigma, x_t) * (x_t - expand(level.alpha, x_t) * x0)
    return replace(prediction, x0=x0, eps=eps)
