"""Draw new pictures: condition, guidance, grid, solver, loop, and the codec's decoder where there is one.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> draw(model, seeds=[0, 1], steps=2).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from sfumato.backends import offload
from sfumato.backends.convolutions import holding
from sfumato.backends.fast import FastSettings, applied
from sfumato.condition import Condition
from sfumato.conditioners.layout import Coordinates
from sfumato.conditioners.shown import LowResolution, Masked, Shown
from sfumato.diffusion import grid as grids
from sfumato.diffusion.guidance import (
    DenoiseFn,
    check_interval,
    check_weight,
    classifier_free,
    clip_x0,
    dynamic_threshold,
    perp_neg,
)
from sfumato.diffusion.hooks import Hook, keep
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.names import fold
from sfumato.diffusion.sample import sample, started
from sfumato.diffusion.solvers import Solver, find
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive, ends
from sfumato.errors import UserError
from sfumato.random import NoiseSource
from sfumato.systems import Drawing
from sfumato.systems.asked import Asked
from sfumato.systems.latent import Latent
from sfumato.tasks import guard

LOG = logging.getLogger("sfumato")

P = ParamSpec("P")
T = TypeVar("T")


def at_rest(task: Callable[Concatenate[Drawing, P], T]) -> Callable[Concatenate[Drawing, P], T]:
    """The same task; where its model is offloaded, all weights rest again afterwards, whatever happened."""

    @wraps(task)
    def wrapped(model: Drawing, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with offload.resting(model.networks()):
            return task(model, *args, **kwargs)

    return wrapped


@at_rest
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
    shown: Mapping[str, Sequence[Any]] | None = None,
    fast: FastSettings | None = None,
    tiled: bool = False,
    on_step: Hook = keep,
) -> Tensor:
    """New pictures, (B, C, H, W) in about [-1, 1], on the device of the model's network, float32.

    Args:
        seeds: one per picture: its noise, whoever shares the batch.
        asked: what each picture is to be; None for nothing at all.
        sampler, schedule, steps, guidance: None for the model's own defaults; a sampler's name may carry the schedule's
            ("DPM++ 2M Karras"), and a respacing spec such as "ddim25" the number of steps.
        size: (width, height) in pixels; None for the model's own.
        shown: what the conditions of `model.shown` get, per picture, at the latents' size; None for nothing.
        fast: lossy savings; None for none. What they leave out where there is no guidance does nothing.
        tiled: decode in tiles, which takes less memory.
        on_step: hook of the sampling loop.

    Raises:
        PictureError: when a stage gives values that are not finite, in float32 too.
        UserError: unknown names, words or labels that the model does not know, guidance with nothing to lead to.
    """
    width, height = size or (model.config.size, model.config.size)
    x = draw_latents(
        model, seeds=seeds, asked=asked, sampler=sampler, schedule=schedule, steps=steps, guidance=guidance, size=size,
        shown=shown, fast=fast, on_step=on_step,
    )  # fmt: skip
    return shown_picture(model, x, tiled)[..., :height, :width]


def shown_picture(model: Drawing, latents: Tensor, tiled: bool) -> Tensor:
    """Latents to pictures, once more in float32 where half precision overflows."""
    with holding(model.codec.network):
        return guard.decoded(lambda: model.pictures(latents, tiled=tiled), model.codec.network, LOG.warning)


@at_rest
def draw_latents(
    model: Drawing,
    *,
    seeds: Sequence[int],
    asked: Sequence[Asked] | None = None,
    sampler: str | Solver[Any] | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    size: tuple[int, int] | None = None,
    shown: Mapping[str, Sequence[Any]] | None = None,
    fast: FastSettings | None = None,
    on_step: Hook = keep,
) -> Tensor:
    """The latents of new pictures, (B, C, h, w), before the codec; everything as in `draw`."""
    method, levels = planned(model, sampler, schedule, steps)
    width, height = size or (model.config.size, model.config.size)
    noise = NoiseSource(seeds, model.shape_of(width, height), device=device_of(model))
    said = list(asked) if asked is not None else [Asked()] * len(seeds)
    said = [_with_map_of(model, one, (width, height)) for one in said]
    seen = dict(shown) if shown is not None else _nothing_shown(model, len(seeds), noise.shape)
    denoise = guided(model, said, guided_less(guidance, fast), seen)
    x = begun(model, first_noise(noise, said), levels[0])
    with saving(model, fast), holding(model.denoiser.network):
        drawn = sample(denoise, method, x, levels, model.denoiser.schedule, noise=noise, on_step=on_step)
    return completed(model, drawn, seen)


def _with_map_of(model: Drawing, asked: Asked, size: tuple[int, int]) -> Asked:
    """The same with its map as large as the pixels of all latents, its border repeated to the right and below."""
    if asked.map is None or not isinstance(model, Latent):
        return asked
    if asked.map.size != size:
        (w, h), (width, height) = asked.map.size, size
        raise UserError(f"the map is {w} x {h} pixels, the picture {width} x {height}")
    _, h, w = model.shape_of(*size)
    rows, columns = (torch.arange(n * model.codec.factor) for n in (h, w))
    values = asked.map.values[rows.clamp(max=size[1] - 1)[:, None], columns.clamp(max=size[0] - 1)[None]]
    return replace(asked, map=replace(asked.map, values=values))


def planned(
    model: Drawing, sampler: str | Solver[Any] | None, schedule: str | None, steps: int | None
) -> tuple[Solver[Any], grids.Grid]:
    """Solver and levels, None standing for the model's own. Raises `UserError` for what does not go together."""
    defaults = model.config.sampling
    chosen = sampler if sampler is not None else defaults.sampler
    method, spacing = choose_solver(model, chosen), choose_schedule(model, chosen, schedule)
    levels = defaults.levels(spacing, model.denoiser.schedule, choose_steps(model, spacing, steps))
    if levels[-1].nsr > levels[0].nsr:
        raise UserError("this model's own schedule leads from pictures to noise; name another with --schedule")
    return method, ends(levels) if isinstance(method, DPMAdaptive) else levels  # it chooses its own steps between them


def device_of(model: Drawing) -> torch.device:
    """Where the model computes, wherever its weights rest."""
    return offload.device_of(model.denoiser.network)


def first_noise(noise: NoiseSource, asked: Sequence[Asked]) -> Tensor:
    """(B, C, h, w), the first noise of each picture, turned towards that of its second seed where it has one."""
    z = noise.draw()
    for i, one in enumerate(asked):
        if one.variation is not None and one.strength is not None:
            other = NoiseSource([one.variation], noise.shape, device=noise.device).draw()[0]
            z[i] = slerp(z[i], other, one.strength)
    return z


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation, `(sin((1 - s) w) a + sin(s w) b) / sin w` with `w` the angle between them (Shoemake
    1985): noise between two noises keeps its spread, which a straight line would not."""
    cosine = float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, share)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def begun(model: Drawing, z: Tensor, first: NoiseLevel) -> Tensor:
    """The noise that drawing begins with, from unit noise."""
    if model.config.sampling.start == "marginal":
        return started(z, first)
    return expand(first.sigma, z) * z


def completed(model: Drawing, x: Tensor, shown: Mapping[str, Sequence[Any]]) -> Tensor:
    """Latents (B, C, h, w) from what was drawn: where that is what a small picture lacks, with the picture."""
    for name, part in shown_of(model).items():
        if isinstance(part, LowResolution) and name in shown:
            x = part.completed(x, torch.stack([planes for planes, _ in shown[name]]).to(x))
    return x


def _nothing_shown(model: Drawing, count: int, shape: Sequence[int]) -> dict[str, list[Any]]:
    """What a model that inpaints is shown when all is to be redrawn; what has a null needs nothing."""
    shown = {}
    for name, part in shown_of(model).items():
        if isinstance(part, Coordinates):
            shown[name] = [part.planes(*shape[1:]).to(device_of(model))] * count
            continue
        if part.droppable:
            continue
        if not isinstance(part, Masked):
            raise UserError(f"this model needs {part.needs}: `sfumato edit` takes one")
        grey = torch.zeros(1, 3, *(side * model.codec.factor for side in shape[1:]), device=device_of(model))
        one = torch.cat([torch.ones(1, *shape[1:], device=grey.device), model.encode(grey).mean[0]])
        shown[name] = [one] * count
    return shown


def shown_of(model: Drawing) -> dict[str, Shown]:
    """The conditions that a model is shown beside its latents."""
    return model.shown if isinstance(model, Latent) else {}


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
        interval: noise-to-signal ratios (low, high) within which it acts (Kynkaanniemi 2024); None for the model's own,
            which mostly is all.
        every: it is reckoned anew in every so-many-th evaluation within, and kept between.
        perp_neg: weight of that part of a negative prompt which takes nothing from the prompt (Armandpour 2023); 0: the
            negative takes the null's place. None for the model's own.
    """

    scale: float | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    every: int = 1
    perp_neg: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not (self.scale >= 0 and math.isfinite(self.scale)):
            raise UserError(f"guidance must be a finite number of at least 0, got {self.scale}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"the rescaling of guidance must lie in [0, 1], got {self.rescale}")
        check_interval(self.interval)
        if self.perp_neg is not None:
            check_weight(self.perp_neg)


def guided_less(guidance: Guidance | float | None, fast: FastSettings | None) -> Guidance:
    """Guidance with what is saved of it. Raises `UserError` for two intervals."""
    how = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if fast is None:
        return how
    if how.interval is not None and fast.interval is not None:
        raise UserError("the interval of guidance is given twice, by itself and among the savings; leave one out")
    return replace(how, interval=how.interval or fast.interval, every=fast.guidance_every)


def saving(model: Drawing, fast: FastSettings | None) -> AbstractContextManager[None]:
    """The model's network with what is saved within it, while one batch is drawn."""
    return nullcontext() if fast is None else applied(model.denoiser.network, fast)


def guided(
    model: Drawing,
    asked: Sequence[Asked],
    guidance: Guidance | float | None,
    shown: Mapping[str, Sequence[Any]] | None = None,
) -> DenoiseFn:
    """The model's denoiser under what is asked and shown, guided and kept in the range of pictures."""
    how = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    speaking = any(one.says_anything for one in asked)
    contrast = any(one.negative is not None for one in asked)
    scale = how.scale if how.scale is not None else (model.config.sampling.guidance if speaking or contrast else 1.0)
    if scale != 1 and not (speaking or contrast):
        raise UserError("guidance needs a prompt or a label: without one there is nothing to guide towards")
    texts = model.networks().get("conditioner")
    weight = (how.perp_neg if how.perp_neg is not None else model.config.sampling.perp_neg) if contrast else 0.0
    interval = how.interval if how.interval is not None else model.config.sampling.guidance_interval
    options: dict[str, Any] = {"rescale": how.rescale, "interval": interval, "every": how.every}
    if scale != 1 and weight:
        three = guard.texts(lambda: _three(model, asked, shown), texts, LOG.warning)
        denoise = perp_neg(model.denoiser, *three, scale, weight, **options)
    else:
        condition, null = guard.texts(lambda: model.conditions(asked, shown), texts, LOG.warning)
        denoise = classifier_free(model.denoiser, condition, null, scale, **options)
    denoise = guard.guarded(denoise, [model.denoiser.network], LOG.warning)
    range_ = model.config.sampling
    if range_.threshold == "none":
        return denoise
    if range_.threshold == "static":
        return clip_x0(denoise, -range_.limit, range_.limit, rederive_eps=range_.rederive_eps)
    return dynamic_threshold(denoise, range_.quantile, range_.limit, rederive_eps=range_.rederive_eps)


def _three(
    model: Drawing, asked: Sequence[Asked], shown: Mapping[str, Sequence[Any]] | None
) -> tuple[Condition, Condition, Condition]:
    """What the pictures are to be, nothing, and what they are not to be; encoded together, so that all are as long."""
    nothing = [Asked(dialect=one.dialect, clip_skip=one.clip_skip) for one in asked]
    doubled = None if shown is None else {name: [*values, *values] for name, values in shown.items()}
    wanted, unwanted = model.conditions([*asked, *nothing], doubled)
    count = len(asked)
    return wanted.rows(0, count), unwanted.rows(count, 2 * count), unwanted.rows(0, count)
