"""Draw new pictures with a pixel-space model: condition, guidance, grid, solver, loop.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> draw(model, seeds=[0, 1], steps=2).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sfumato.diffusion import grid as grids
from sfumato.diffusion.guidance import DenoiseFn, classifier_free, clip_x0, dynamic_threshold, unguided
from sfumato.diffusion.hooks import Hook, keep
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.solvers import Ancestral, Solver, solver
from sfumato.errors import UserError
from sfumato.random import NoiseSource
from sfumato.systems.ddpm import DDPM


def draw(
    model: DDPM,
    *,
    seeds: Sequence[int],
    labels: Sequence[str | int | None] | None = None,
    sampler: str | Solver[Any] | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    on_step: Hook = keep,
) -> Tensor:
    """New pictures, (B, C, H, W) in about [-1, 1], on the device of the model's network, float32.

    Args:
        seeds: one per picture: its noise, whoever shares the batch.
        labels: one per picture, a name, an id or None for the null class; None for no labels at all.
        sampler, schedule, steps, guidance: None for the model's own defaults.
        on_step: hook of the sampling loop.

    Raises:
        UserError: unknown names, labels that the model does not know, guidance without labels.
    """
    defaults, denoiser = model.config.sampling, model.denoiser
    method = choose_solver(model, sampler if sampler is not None else defaults.sampler)
    levels = grids.grid(schedule or defaults.schedule, denoiser.schedule, steps or defaults.steps)
    device = next(denoiser.network.parameters()).device
    noise = NoiseSource(seeds, model.shape, device=device)
    denoise = guided(model, list(labels) if labels is not None else [None] * len(seeds), guidance)
    return sample(denoise, method, start(noise, levels[0]), levels, denoiser.schedule, noise=noise, on_step=on_step)


def choose_solver(model: DDPM, sampler: str | Solver[Any]) -> Solver[Any]:
    """The solver by name; DDPM's own uses the learned variance where the model has one."""
    method = solver(sampler) if isinstance(sampler, str) else sampler
    if sampler == "ddpm" and model.denoiser.learned_variance:
        return Ancestral(variance="learned")
    return method


def guided(model: DDPM, labels: Sequence[str | int | None], guidance: float | None) -> DenoiseFn:
    """The model's denoiser under these labels, guided and kept in the range of pictures."""
    labelled = any(label is not None for label in labels)
    scale = guidance if guidance is not None else (model.config.sampling.guidance if labelled else 1.0)
    if scale != 1 and not labelled:
        raise UserError("guidance needs a label: without one there is nothing to guide towards")
    condition = model.condition(labels)
    denoise = unguided(model.denoiser, condition)
    if scale != 1:
        null = model.condition([None] * len(labels))
        denoise = classifier_free(model.denoiser, condition, null, scale)
    threshold = model.config.sampling.threshold
    if threshold == "none":
        return denoise
    return clip_x0(denoise) if threshold == "static" else dynamic_threshold(denoise)
