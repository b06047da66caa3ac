"""The one sampling loop: a grid of levels, a solver that makes one transition, a denoiser that says where to go.

>>> import torch
>>> from sfumato.diffusion import grid
>>> from sfumato.diffusion.analytic import GaussianData
>>> from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar
>>> from sfumato.diffusion.solvers import Euler
>>> from sfumato.random import NoiseSource
>>> schedule, data = TableSchedule(cosine_alpha_bar()), GaussianData(torch.full((2,), 3.0), 0.01)
>>> levels, noise = grid.trailing(schedule, 10), NoiseSource([0], (2,))
>>> x = sample(data, Euler(), noise.draw(), levels, schedule, noise=noise)
>>> bool(((x - 3).abs() < 0.5).all())
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.guidance import DenoiseFn, as_function
from sfumato.diffusion.hooks import Hook, keep, told
from sfumato.diffusion.level import NoiseLevel, expand, goes_up
from sfumato.diffusion.posterior import renoise
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Solver, first_order
from sfumato.errors import UserError
from sfumato.random import NoiseSource, NoNoise

_INVERSION = "climb=True inverts, which a method that draws noise cannot do: take a deterministic one, or eta (tau) 0"


@torch.no_grad()
def sample(
    denoise: DenoiseFn | Denoiser,
    solver: Solver[Any],
    x: Tensor,
    grid: Sequence[NoiseLevel],
    schedule: Schedule,
    *,
    noise: NoiseSource,
    on_step: Hook = keep,
    climb: bool = False,
) -> Tensor:
    """Follow `grid` from its first level to its last. Returns `x` there, (B, *S).

    Args:
        denoise: `(x_t, level, previous_x0) -> Prediction`, the previous estimate being the last step's; or a
            `Denoiser`, which is then asked without a condition.
        solver: makes one transition; may stop short of the next level, and is asked again.
        x: (B, *S) at `grid[0]`: `start(noise, grid[0])` for pure noise.
        grid: levels, noisy to clean. Where it goes up again the picture is renoised (Restart, RePaint), and its
            Brownian noise begins anew …
        climb: … unless this is set: then the solver itself walks up (inversion), and may draw no noise. Steps out of a
            clean level, and those to nearly pure noise, are first order (`alpha' x0 + sigma' eps`), as those down from
            there are: in log SNR or in nsr they are too long for any other.
        noise: each picture's own stream.
        on_step: called with the initial state and after every step; what it returns goes on, where that is not None.

    Raises:
        UserError: where a solver draws noise with `climb`, or cannot walk up.
        ValueError: where `noise` is not of as many pictures as `x`.

    `torch.no_grad`, not inference mode: guidance may need gradients.
    """
    denoise = as_function(denoise)
    if type(noise) is NoiseSource and len(noise.seeds) != len(x):  # others draw as they please
        raise ValueError(f"noise must be that of {len(x)} pictures, one seed for each, got {len(noise.seeds)}")
    if climb and not getattr(solver, "climbs", True):
        raise UserError(f"climb=True inverts, which {type(solver).__name__} cannot do: it chooses its steps downwards")
    x = told(on_step, x, grid[0], None, noise)
    own = NoNoise(_INVERSION) if climb else noise
    state, previous_x0 = solver.init(schedule, grid), None
    for i, (now, nxt) in enumerate(pairwise(grid)):
        if not climb and goes_up(now, nxt):
            x = renoise(x, now, nxt, noise.draw())
            noise.new_path()
            state, previous_x0 = solver.init(schedule, grid[i + 1 :]), None
            x = told(on_step, x, nxt, None, noise)
            continue
        if climb and (now.is_clean or nxt.is_nearly_noise):
            prediction = denoise(x, now, previous_x0).shifted(now)
            x, previous_x0 = told(on_step, first_order(prediction, nxt), nxt, prediction, noise), prediction.x0
            state = solver.init(schedule, grid[i + 1 :])
            continue
        level = now
        while level is not nxt:
            ask: Callable[[Tensor, NoiseLevel], Prediction] = partial(_ask, denoise, previous_x0)
            x, level, state, prediction = solver.step(ask, x, level, nxt, state, own)
            previous_x0 = prediction.x0
        x = told(on_step, x, nxt, prediction, noise)
    return x


def _ask(denoise: DenoiseFn, previous_x0: Tensor | None, x: Tensor, level: NoiseLevel) -> Prediction:
    return denoise(x, level, previous_x0)


def start(noise: NoiseSource, first: NoiseLevel) -> Tensor:
    """The state that sampling begins with at level `first`: noise of standard deviation `sqrt(alpha² + sigma²)`.

    On a variance-preserving path that is 1; on an exploding one it counts the (unit-variance) data in, and on a flow
    that begins at pure noise it is 1 too.
    """
    return started(noise.draw(), first)


def started(z: Tensor, first: NoiseLevel) -> Tensor:
    """`start` from unit noise that has been drawn."""
    return expand(torch.sqrt(first.alpha**2 + first.sigma**2), z) * z
