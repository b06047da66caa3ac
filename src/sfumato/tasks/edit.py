"""Change pictures: from a picture and noise (SDEdit), within a mask, beyond the border, by depth, and enlarged.

An edit begins with a `Source`. What happens to it follows from the model: one that is shown masked pictures inpaints
with them, one that is shown depths follows these, one that is shown small pictures enlarges; every other one renoises
the picture as far as `strength` says, and with a mask puts the known part back after each step (Lugmayr 2022, Avrahami
2022). Outside the mask the finished picture is the source itself: `composited` sees to it.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> edit(model, Source(torch.zeros(3, 8, 8), strength=0.5), seeds=[0, 1], steps=4).shape
torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.backends.convolutions import holding
from sfumato.backends.fast import FastSettings
from sfumato.conditioners.layout import Coordinates
from sfumato.conditioners.shown import Depth, LowResolution, Masked, agreeing
from sfumato.diffusion.grid import Grid
from sfumato.diffusion.hooks import Hook, chain, keep
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import Solver
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive
from sfumato.errors import UserError
from sfumato.random import NoiseSource
from sfumato.systems import Drawing
from sfumato.systems.asked import Asked
from sfumato.systems.latent import Latent
from sfumato.tasks import guard
from sfumato.tasks.draw import (
    LOG,
    Guidance,
    at_rest,
    begun,
    completed,
    device_of,
    first_noise,
    guided,
    guided_less,
    planned,
    saving,
    shown_of,
    shown_picture,
)

STRENGTH = 0.8
NOISE_LEVEL = 20


@dataclass(frozen=True)
class Source:
    """What an edit begins with.

    Attributes:
        picture: (3, H, W) in [-1, 1], or one for each picture of the batch, (B, 3, H, W).
        mask: (H, W) in [0, 1], 1 where the picture is redrawn; None for all of it.
        depth: (H, W), inverse depth (near is large) in any unit, for models that follow it.
        strength: in (0, 1], how much of the way from noise to picture is gone again; 1 keeps the least.
        noise_level: step of the noise that a small picture gets before it is enlarged, for models that do that; None
            for 20, or the noisiest that the model was trained with, or none where it was trained without.
    """

    picture: Tensor
    mask: Tensor | None = None
    depth: Tensor | None = None
    strength: float = STRENGTH
    noise_level: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.picture.ndim not in (3, 4):
            raise UserError(f"a picture is (channels, height, width), got {tuple(self.picture.shape)}")
        for name, plane in (("mask", self.mask), ("depth", self.depth)):
            if plane is not None and plane.shape != self.picture.shape[-2:]:
                raise UserError(
                    f"the {name} is {plane.shape[-1]} x {plane.shape[0]} pixels, the picture "
                    f"{self.picture.shape[-1]} x {self.picture.shape[-2]}"
                )
        if self.mask is not None and not bool(((self.mask >= 0) & (self.mask <= 1)).all()):
            raise UserError("a mask lies in [0, 1]")
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise UserError(
                "the mask is empty, so there is nothing to redraw (white is redrawn; transparency is not read)"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.picture.shape[-1], self.picture.shape[-2]


def scale_of(model: Drawing) -> int:
    """How much larger an edit by this model is than its source: 1, or what an upscaler enlarges by."""
    name = _part(model, LowResolution)
    if name is None or not isinstance(model, Latent):
        return 1
    part = model.shown[name]
    assert isinstance(part, LowResolution)
    return part.scale or model.codec.factor


@at_rest
def edit(
    model: Drawing,
    source: Source,
    *,
    seeds: Sequence[int],
    asked: Sequence[Asked] | None = None,
    sampler: str | Solver[Any] | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    fast: FastSettings | None = None,
    tiled: bool = False,
    on_step: Hook = keep,
) -> Tensor:
    """Changed pictures, (B, 3, H, W) in about [-1, 1], float32; upscalers give them larger.

    Args:
        source: what to begin with; outside its mask the result is only near to it, see `composited`.
        seeds, asked, sampler, schedule, steps, guidance, fast, tiled, on_step: as in `draw`; `steps` are those of the
            whole way, of which `strength` takes its part.

    Raises:
        UserError: for a source that the model can do nothing with, and as `draw`.
    """
    x = edit_latents(
        model, source, seeds=seeds, asked=asked, sampler=sampler, schedule=schedule, steps=steps, guidance=guidance,
        fast=fast, tiled=tiled, on_step=on_step,
    )  # fmt: skip
    width, height = (side * scale_of(model) for side in source.size)
    pictures = shown_picture(model, x, tiled)[..., :height, :width]
    part = shown_of(model).get(_part(model, LowResolution) or "")
    if isinstance(part, LowResolution) and part.exact:
        small = source.picture.to(pictures)
        return agreeing(pictures, small if small.ndim == 4 else small[None], scale_of(model))
    return pictures


@at_rest
def edit_latents(
    model: Drawing,
    source: Source,
    *,
    seeds: Sequence[int],
    asked: Sequence[Asked] | None = None,
    sampler: str | Solver[Any] | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    fast: FastSettings | None = None,
    tiled: bool = False,
    on_step: Hook = keep,
) -> Tensor:
    """The latents of changed pictures, (B, C, h, w), before the codec; everything as in `edit`.

    Each picture's stream of noise is drawn from in this order: the spread of its latents, the noise they get, the
    spread of what the mask leaves (for a small picture that is enlarged: its noise, then that of the latents).
    """
    _check(model, source)
    scale = scale_of(model)
    method, levels = planned(model, sampler, schedule, steps)
    shape = _shape(model, source)
    said = list(asked) if asked is not None else [Asked()] * len(seeds)
    picture = _padded(source.picture.to(device_of(model)), shape, model, scale)
    picture = picture if picture.ndim == 4 else picture.expand(len(seeds), *picture.shape)
    noise = NoiseSource(seeds, shape if scale == 1 else picture.shape[1:], device=picture.device)
    alone = scale != 1 or (source.mask is not None and source.strength == 1)  # begins with noise alone
    shown: dict[str, list[Any]] = {}
    z0: Tensor | None = None
    if scale != 1:
        shown = _small(model, picture, source, noise, tiled)
        noise = noise.reshaped(shape)
    elif not (alone and _part(model, Masked) is not None):
        z0 = _encoded(model, picture, noise, tiled)
    z = first_noise(noise, said)
    if source.mask is not None and _part(model, Masked) is None:
        noise.draw()  # in the place of the spread of what the mask leaves, which only other networks are shown
    shown |= _shown(model, source, picture, noise, tiled)
    denoise = guided(model, said, guided_less(guidance, fast), shown)
    if not alone:
        levels = last_levels(levels, method, source.strength)
    x = begun(model, z, levels[0]) if alone or z0 is None else _noised(z0, z, levels[0])
    if source.mask is not None and z0 is not None and _part(model, Masked) is None:
        on_step = chain(_known(z0, z, _cells(source.mask.to(x), shape, model), levels[-1]), on_step)
    with saving(model, fast), holding(model.denoiser.network):
        drawn = sample(denoise, method, x, levels, model.denoiser.schedule, noise=noise, on_step=on_step)
    return completed(model, drawn, shown)


def _shape(model: Drawing, source: Source) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the result. Raises `UserError` where the model draws another size only."""
    width, height = (side * scale_of(model) for side in source.size)
    shape = model.shape_of(width, height)
    if not isinstance(model, Latent) and (height, width) != shape[1:]:
        raise UserError(f"this model draws {shape[2]} x {shape[1]} pixels; the picture is {width} x {height}")
    return shape


def last_levels(levels: Grid, method: Solver[Any], strength: float) -> Grid:
    """The levels that an edit of this strength goes through."""
    if isinstance(method, DPMAdaptive):
        raise UserError("DPM adaptive chooses its own steps and cannot begin in their midst; take another sampler")
    return levels[len(levels) - 1 - gone(len(levels) - 1, strength) :]


def composited(drawn: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Drawn inside the mask, the original outside, mixed where the mask is grey; 8-bit values.

    Args:
        drawn, original: (B, 3, H, W) and (3, H, W), uint8. The original may have a fourth channel, its opacity; then so
            has the result, what was drawn is opaque, and colours are mixed by how much of each is seen.
        mask: (H, W) in [0, 1]. Where it is 0 the result is the original bit for bit, where it is 1 what was drawn.
    """
    share = mask.to(torch.float64)
    if original.shape[-3] == drawn.shape[-3] + 1 == 4:
        drawn = torch.cat((drawn, torch.full_like(drawn[:, :1], 255)), 1)
        seen = share + (1 - share) * original[-1] / 255
        share = torch.stack([share / seen.clamp(min=1e-12)] * 3 + [share])
    mixed = (share * drawn + (1 - share) * original).round().to(torch.uint8)
    return torch.where(mask == 0, original, torch.where(mask == 1, drawn, mixed))


def extended(picture: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """A picture with room around it, filled with its border pixels, and the mask of that room.

    Args:
        picture: (3, H, W).
        left, top, right, bottom: pixels to add.

    Raises:
        UserError: for negative numbers, or nothing to add.
    """
    sides = (left, top, right, bottom)
    if min(sides) < 0 or not any(sides):
        raise UserError(f"outpainting adds pixels on the left, top, right and bottom, got {sides}")
    pads = (left, right, top, bottom)
    return F.pad(picture[None], pads, mode="replicate")[0], F.pad(torch.zeros(picture.shape[-2:]), pads, value=1.0)


def enlarged(pictures: Tensor, width: int, height: int) -> Tensor:
    """Pictures (B, 3, H, W) at another size, by bicubic interpolation, for a second pass."""
    return F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def _check(model: Drawing, source: Source) -> None:
    """Refuse what the model can do nothing with, and what it cannot do without."""
    if source.depth is not None and _part(model, Depth) is None:
        raise UserError("this model does not follow depths; leave the map of depths out")
    if source.depth is None and _part(model, Depth) is not None:
        raise UserError("this model needs the picture's map of depths")
    if source.mask is not None and scale_of(model) != 1:
        raise UserError("this model enlarges whole pictures; leave the mask out")
    if source.picture.shape[-3] != (3 if isinstance(model, Latent) else model.config.channels):
        raise UserError(f"this model's pictures have other channels than {source.picture.shape[-3]}")


def _part(model: Drawing, kind: type[Any]) -> str | None:
    """The name of the shown condition of a kind."""
    return next((name for name, part in shown_of(model).items() if isinstance(part, kind)), None)


def _padded(picture: Tensor, shape: Sequence[int], model: Drawing, scale: int) -> Tensor:
    """The picture with its border repeated to the right and below, as large as the latents' pixels."""
    factor = model.codec.factor if isinstance(model, Latent) else 1
    height, width = (side * factor // scale for side in shape[1:])
    return _stretched(picture, (height, width))


def _encoded(model: Drawing, pictures: Tensor, noise: NoiseSource, tiled: bool) -> Tensor:
    """Latents drawn from what the codec makes of pictures, each by its own stream."""
    with holding(model.codec.network):
        moments = guard.encoded(lambda: model.encode(pictures, tiled=tiled), model.codec.network, LOG.warning)
    return moments.mean if moments.std is None else moments.mean + moments.std * noise.draw()


def _shown(
    model: Drawing, source: Source, picture: Tensor, noise: NoiseSource, tiled: bool
) -> dict[str, list[Any]]:
    """What the model is shown beside its latents."""
    shown: dict[str, list[Any]] = {}
    h, w = noise.shape[1:]
    if (name := _part(model, Masked)) is not None:
        mask = source.mask if source.mask is not None else torch.ones(source.size[::-1])
        part = shown_of(model)[name]
        assert isinstance(part, Masked)
        holes = _stretched(mask.to(picture), picture.shape[-2:])[None, None] >= 0.5
        latents = _encoded(model, part.hidden(picture, holes), noise, tiled)
        cells = _cells(mask.to(picture), noise.shape, model).expand(len(latents), 1, h, w)
        shown[name] = list(part.laid(cells, latents))
    if (name := _part(model, Coordinates)) is not None:
        places = shown_of(model)[name]
        assert isinstance(places, Coordinates)
        shown[name] = [places.planes(h, w).to(picture)] * len(picture)
    if (name := _part(model, Depth)) is not None and source.depth is not None:
        depth = _stretched(source.depth.to(picture), picture.shape[-2:])[None, None]
        depth = F.interpolate(depth, size=(h, w), mode="bicubic", align_corners=False)[0]
        low, high = depth.min(), depth.max()
        shown[name] = [2 * (depth - low) / (high - low).clamp(min=1e-12) - 1] * len(picture)
    return shown


def _small(
    model: Drawing, picture: Tensor, source: Source, noise: NoiseSource, tiled: bool
) -> dict[str, list[Any]]:
    """What an upscaler is shown: the small picture, with noise of a known step where it was trained with some."""
    name = _part(model, LowResolution)
    assert name is not None and isinstance(model, Latent)
    part, step = model.shown[name], source.noise_level
    assert isinstance(part, LowResolution)
    if step is None:
        step = min(NOISE_LEVEL, part.most)
    elif part.most < 0:
        raise UserError("this model enlarges pictures without noise; leave the noise level out")
    elif not 0 <= step <= part.most:
        raise UserError(f"this model's small picture may have noise from 0 to {part.most}, got noise level {step}")
    if step >= 0:
        level = model.denoiser.schedule.level(torch.tensor(float(step), dtype=torch.float64))
        picture = _noised(picture, noise.draw(), level)
    planes = part.laid(picture, model.codec.factor, lambda larger: model.encode(larger, tiled=tiled).mean)
    return {name: [(one, step) for one in planes]}


def _stretched(x: Tensor, size: Sequence[int]) -> Tensor:
    """(…, H, W), with at most two dimensions before, with its border repeated to the right and below."""
    pads = (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2])
    whole = x[(None,) * (4 - x.ndim)]
    return F.pad(whole, pads, mode="replicate").reshape(*x.shape[:-2], *size)


def _cells(mask: Tensor, shape: Sequence[int], model: Drawing) -> Tensor:
    """(1, 1, h, w), 1 for every latent of which any pixel is to be redrawn, so that no thin line is missed."""
    factor = model.codec.factor if isinstance(model, Latent) else 1
    h, w = shape[1:]
    whole = _stretched((mask >= 0.5).to(torch.float32), (h * factor, w * factor))
    if not bool(whole.any()):
        whole = _stretched((mask > 0).to(torch.float32), (h * factor, w * factor))
    return F.max_pool2d(whole[None, None], factor)


def gone(steps: int, strength: float) -> int:
    """How many of the steps an edit goes, the last ones; at least one."""
    return max(1, min(int(steps * strength), steps))


def _noised(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def _known(z0: Tensor, eps: Tensor, cells: Tensor, last: NoiseLevel) -> Hook:
    """A hook that puts the known part, renoised to the level that was reached, back outside the mask."""

    def put_back(x: Tensor, level: NoiseLevel, prediction: Any, noise: NoiseSource) -> Tensor:
        if prediction is None:
            return x
        known = z0 if level is last else _noised(z0, eps, level)
        return torch.where(cells.bool(), x, known.to(x))

    return put_back
