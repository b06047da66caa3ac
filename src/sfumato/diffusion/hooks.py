"""Hooks for the sampling loop: functions `(x, level, prediction, noise) -> x` called after every step.

A hook may watch (previews, progress), replace `x`, or raise to cancel; one that returns nothing leaves `x` as it is. It
is also called once before the first step, with the initial `x`, the first level and no prediction (None).

>>> import torch
>>> x = torch.ones(1)
>>> keep(x, None, None, None) is x
True
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel
from sfumato.random import NoiseSource

Hook = Callable[[Tensor, NoiseLevel, Prediction | None, NoiseSource], Tensor | None]


def keep(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
    """The hook that does nothing."""
    return x


def told(hook: Hook, x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
    """What goes on after a hook was told of `x`. Raises `ValueError` where that is not a tensor of the shape of `x`."""
    seen = hook(x, level, prediction, noise)
    if seen is None:
        return x
    if not isinstance(seen, Tensor) or seen.shape != x.shape:
        said = f"a tensor {tuple(seen.shape)}" if isinstance(seen, Tensor) else f"a {type(seen).__name__}"
        raise ValueError(f"a hook returns nothing, or a tensor {tuple(x.shape)} that goes on; it gave {said}")
    return seen


def chain(*hooks: Hook) -> Hook:
    """One hook that calls several in order, each with the `x` of the one before."""

    def chained(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        for hook in hooks:
            x = told(hook, x, level, prediction, noise)
        return x

    return chained
