"""Draw new pictures: condition, guidance, grid, solver, loop, and the codec's decoder where there is one.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> draw(model, seeds=[0, 1], steps=2).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from sfumato.diffusion import grid as grids
from sfumato.diffusion.guidance import DenoiseFn, classifier_free, clip_x0, dynamic_threshold, unguided
from sfumato.diffusion.hooks import Hook, keep
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.names import fold
from sfumato.diffusion.sample import sample, start
from sfumato.diffusion.solvers import Solver, find
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive, ends
from sfumato.errors import UserError
from sfumato.random import NoiseSource
from sfumato.systems import Drawing
from sfumato.systems.asked import Asked


def draw(
    model: Drawing,
    *,
    seeds: Sequence[int],
    asked: Sequence[Asked] | None = None,
    sampler: str | Solver[Any] | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    size: tuple[int, int] | None = None,
    on_step: Hook = keep,
) -> Tensor:
    """New pictures, (B, C, H, W) in about [-1, 1], on the device of the model's network, float32.

    Args:
        seeds: one per picture: its noise, whoever shares the batch.
        asked: what each picture is to be; None for nothing at all.
        sampler, schedule, steps, guidance: None for the model's own defaults; a sampler's name may carry the schedule's
            ("DPM++ 2M Karras"), and a respacing spec such as "ddim25" the number of steps.
        size: (width, height) in pixels; None for the model's own.
        on_step: hook of the sampling loop.

    Raises:
        UserError: unknown names, words or labels that the model does not know, guidance with nothing to lead to.
    """
    defaults, denoiser = model.config.sampling, model.denoiser
    chosen = sampler if sampler is not None else defaults.sampler
    method, spacing = choose_solver(model, chosen), choose_schedule(model, chosen, schedule)
    levels = defaults.levels(spacing, denoiser.schedule, choose_steps(model, spacing, steps))
    if levels[-1].nsr > levels[0].nsr:
        raise UserError("this model's own schedule leads from pictures to noise; name another with --schedule")
    if isinstance(method, DPMAdaptive):
        levels = ends(levels)  # it chooses its own steps between them
    device = next(denoiser.network.parameters()).device
    width, height = size or (model.config.size, model.config.size)
    noise = NoiseSource(seeds, model.shape_of(width, height), device=device)
    denoise = guided(model, list(asked) if asked is not None else [Asked()] * len(seeds), guidance)
    x = _begin(model, noise, levels[0])
    x = sample(denoise, method, x, levels, denoiser.schedule, noise=noise, on_step=on_step)
    return model.pictures(x)[..., :height, :width]


def _begin(model: Drawing, noise: NoiseSource, first: NoiseLevel) -> Tensor:
    """The noise that drawing begins with."""
    if model.config.sampling.start == "marginal":
        return start(noise, first)
    z = noise.draw()
    return expand(first.sigma, z) * z


def choose_solver(model: Drawing, sampler: str | Solver[Any]) -> Solver[Any]:
    """The solver by name, with the model's own options where it is the model's own; the variance a model has learned is
    used by every solver that can."""
    if not isinstance(sampler, str):
        return sampler
    method, defaults = find(sampler)[0], model.config.sampling
    own = method.name == find(defaults.sampler)[0].name
    chosen = defaults.solver() if own else method.build()
    return _learned(chosen) or chosen if model.denoiser.learned_variance else chosen


def _learned(solver: Solver[Any]) -> Solver[Any] | None:
    """The same solver with the network's variance, None where it cannot use it or has one of its own choice."""
    if not is_dataclass(solver) or getattr(solver, "variance", None) not in ("small", "own"):
        return None
    if "variance" not in {field.name for field in fields(solver) if field.init}:
        return None
    try:
        return replace(solver, variance="learned")
    except UserError:  # a step that injects no noise has no use for a variance
        return None


def ignores_learned_variance(model: Drawing, sampler: str | Solver[Any] | None) -> bool:
    """Whether the model has learned a variance that this sampler (None: the model's own) makes no use of."""
    chosen = choose_solver(model, sampler if sampler is not None else model.config.sampling.sampler)
    return model.denoiser.learned_variance and getattr(chosen, "variance", None) != "learned"


def choose_schedule(model: Drawing, sampler: str | Solver[Any], schedule: str | None) -> str:
    """The canonical name of the grid: the one asked for, the one that the sampler's name carries, the one that the
    sampler is made for, or the model's own. "automatic" asks for none."""
    if schedule is not None and fold(schedule) != "automatic":
        return grids.canonical(schedule)
    method, carried = find(sampler) if isinstance(sampler, str) else (None, None)
    wanted = method.schedule if method is not None else None
    return grids.canonical(carried or wanted or model.config.sampling.schedule)


def choose_steps(model: Drawing, schedule: str, steps: int | None) -> int:
    """How many steps: those asked for, those that a respacing spec has of itself, or the model's own."""
    return steps if steps is not None else grids.spec_steps(schedule) or model.config.sampling.steps


@dataclass(frozen=True)
class Guidance:
    """How strongly pictures are led towards what is asked.

    Attributes:
        scale: of classifier-free guidance; 1 is off, None the model's own where something is asked.
        rescale: phi in [0, 1], how far the spread of the guided output is pulled back (Lin 2023).
        interval: noise-to-signal ratios (low, high) within which it acts (Kynkaanniemi 2024); None for all.
    """

    scale: float | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not (self.scale >= 0 and math.isfinite(self.scale)):
            raise UserError(f"guidance must be a finite number of at least 0, got {self.scale}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"the rescaling of guidance must lie in [0, 1], got {self.rescale}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] < math.inf:
            low, high = self.interval
            raise UserError(
                f"the interval of guidance must be two finite, rising noise-to-signal ratios, got {low}, {high}"
            )


def guided(model: Drawing, asked: Sequence[Asked], guidance: Guidance | float | None) -> DenoiseFn:
    """The model's denoiser under what is asked, guided and kept in the range of pictures."""
    how = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    speaking = any(one.says_anything for one in asked)
    contrast = any(one.negative is not None for one in asked)
    scale = how.scale if how.scale is not None else (model.config.sampling.guidance if speaking or contrast else 1.0)
    if scale != 1 and not (speaking or contrast):
        raise UserError("guidance needs a prompt or a label: without one there is nothing to guide towards")
    condition, null = model.conditions(asked)
    denoise = unguided(model.denoiser, condition)
    if scale != 1:
        denoise = classifier_free(
            model.denoiser, condition, null, scale, rescale=how.rescale, interval=how.interval
        )
    range_ = model.config.sampling
    if range_.threshold == "none":
        return denoise
    if range_.threshold == "static":
        return clip_x0(denoise, -range_.limit, range_.limit, rederive_eps=range_.rederive_eps)
    return dynamic_threshold(denoise, range_.quantile, range_.limit, rederive_eps=range_.rederive_eps)
