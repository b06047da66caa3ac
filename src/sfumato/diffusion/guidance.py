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
from collections.abc import Callable, Sequence
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
    if scale == 1:
        _check(interval, every)
        return unguided(denoiser, condition)

    def lead(with_: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
        difference = with_ - without
        return without + scale * difference, (scale - 1) * difference

    return _contrasted(
        denoiser, condition, [null], lead,
        rescale=rescale, channels=channels, interval=interval, every=every, batched=batched,
    )  # fmt: skip


def perp_neg(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    negative: Condition,
    scale: float,
    weight: float = 1.0,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    every: int = 1,
    batched: bool = True,
) -> DenoiseFn:
    """Guidance whose negative takes nothing from the wanted condition (Perp-Neg, Armandpour 2023).

    `out = null + scale * (d - weight * (n - (<n, d> / <d, d>) d))` with `d = conditional - null` and
    `n = negative - null`, the inner products over each whole picture: of the negative only what is perpendicular to the
    wanted is led away from. In `classifier_free(denoiser, condition, negative, scale)` the negative takes the null's
    place, and what both have in common is lost: hearts that are "not red" also become less like hearts. It costs three
    branches instead of two.

    Args:
        condition, null, negative: the wanted condition, nothing, and the unwanted one. A picture whose negative is the
            null is guided as by `classifier_free`.
        scale: as there, but 1 is not off: the negative is still led away from.
        weight: of the negative, at least 0 and finite; 0 is without it, 1 as strong as the wanted one.
        rescale, interval, every: as there.
        batched: evaluate all three in one call of three times the batch: null, negative, conditional.

    Raises:
        UserError: for what is no interval, `every` below 1, and a weight out of range.
    """
    check_weight(weight)

    def lead(with_: Tensor, without: Tensor, unwanted: Tensor) -> tuple[Tensor, Tensor]:
        towards = with_ - without
        out = without + scale * (towards - weight * _perpendicular(unwanted - without, towards))
        return out, out - with_

    return _contrasted(
        denoiser, condition, [null, negative], lead,
        rescale=rescale, channels=None, interval=interval, every=every, batched=batched,
    )  # fmt: skip


def _perpendicular(value: Tensor, to: Tensor) -> Tensor:
    """Each picture's part of `value` (B, ...) that is perpendicular to `to`; all of it where that is zero."""
    dims = tuple(range(1, value.ndim))
    along, length = ((one.float() * to.float()).sum(dims, keepdim=True) for one in (value, to))
    return (value - along / length.clamp(min=1e-30) * to).to(value.dtype)


def _contrasted(
    denoiser: Denoiser,
    condition: Condition,
    others: Sequence[Condition],
    lead: Callable[..., tuple[Tensor, Tensor]],
    *,
    rescale: float,
    channels: int | None,
    interval: tuple[float, float] | None,
    every: int,
    batched: bool,
) -> DenoiseFn:
    """Guidance by what `lead` makes of the outputs under the condition and under each of the others: the guided output,
    and what that adds to the conditional one."""
    _check(interval, every)
    plain, more = unguided(denoiser, condition), _More(every)

    def denoise(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        inside = torch.ones(()) if interval is None else (interval[0] <= level.nsr) & (level.nsr <= interval[1])
        if not bool(inside.any()):
            return plain(x_t, level, previous_x0)
        if (known := more.known(denoiser)) is not None:
            with_ = plain(x_t, level, previous_x0)
            out = with_.out + known
        else:
            *without, with_ = _branches(denoiser, [*others, condition], x_t, level, previous_x0, batched)
            out, added = lead(with_.out, *(one.out for one in without))
            more.keep(added, denoiser)
        if rescale:
            out = _rescaled(out, with_.out, rescale)
        if channels is not None:
            out = torch.cat([out[:, :channels], with_.out[:, channels:]], dim=1)
        if not bool(inside.all()):
            out = torch.where(expand(inside.double(), x_t) > 0, out, with_.out)
        return denoiser.read(out, x_t, level, with_.var_frac)

    return denoise


def _check(interval: tuple[float, float] | None, every: int) -> None:
    check_interval(interval)
    if every < 1:
        raise UserError(f"the null branch can be evaluated in every call or in fewer, every >= 1, got {every}")


def check_weight(weight: float) -> None:
    """Refuse, with a `UserError`, what is not the weight of a negative prompt."""
    if not (weight >= 0 and math.isfinite(weight)):
        raise UserError(f"the weight of the negative prompt must be a finite number of at least 0, got {weight}")


def check_interval(interval: tuple[float, float] | None) -> None:
    """Refuse, with a `UserError`, what is not an interval of noise-to-signal ratios; None is all of them."""
    if interval is None:
        return
    numbers = isinstance(interval, tuple | list) and all(isinstance(one, int | float) for one in interval)
    if not numbers or len(interval) != 2 or not 0 <= interval[0] < interval[1] < math.inf:
        told = ", ".join(f"{one:g}" for one in interval) if numbers else repr(interval)
        raise UserError(f"the interval of guidance must be two finite, rising noise-to-signal ratios, got {told}")


class _More:
    """What guidance adds to the conditional output, good for `every` calls in a row."""

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

    def keep(self, value: Tensor, denoiser: Denoiser) -> None:
        """Keep one for the calls after this."""
        if self.every > 1:
            self.value, self.left, self.weights = value, self.every - 1, _dtype_of(denoiser)


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
        without, with_ = _branches(denoiser, [null, condition], x_t, level, previous_x0, batched)
        guided = denoiser.read(without.out + scale * (with_.out - without.out), x_t, level, with_.var_frac)
        return replace(guided, eps=without.eps)

    return denoise


def _branches(
    denoiser: Denoiser,
    conditions: Sequence[Condition],
    x_t: Tensor,
    level: NoiseLevel,
    previous_x0: Tensor | None,
    batched: bool,
) -> list[Prediction]:
    """The predictions under each condition: one by one, or from one call of as many times the batch, in their order."""
    if not batched:
        return [denoiser(x_t, level, condition, previous_x0) for condition in conditions]
    count, stacked = len(conditions), conditions[0]
    for condition in conditions[1:]:
        stacked = condition.stacked_on(stacked)
    previous = None if previous_x0 is None else torch.cat([previous_x0] * count)
    numbers = (level.t, level.alpha, level.sigma)
    repeated = level if level.alpha.ndim == 0 else NoiseLevel(*(torch.cat([v] * count) for v in numbers))
    together = denoiser(torch.cat([x_t] * count), repeated, stacked, previous)
    var = [None] * count if together.var_frac is None else together.var_frac.chunk(count)
    parts = zip(*(value.chunk(count) for value in (together.x0, together.eps, together.out)), var, strict=True)
    return [Prediction(x0, eps, out, share) for x0, eps, out, share in parts]


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
