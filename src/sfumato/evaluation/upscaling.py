"""How well a model enlarges: held-out pictures made small, enlarged again, and compared with what they were.

>>> white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
>>> torch.equal(interpolated(white, 2), white), nearness(white, white - 2)["mean colour error"].value
(True, 2.0)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.conditioners.shown import shrunk, upsampled
from sfumato.errors import UserError
from sfumato.evaluation import figures
from sfumato.evaluation.figures import Figure
from sfumato.evaluation.reconstruction import psnr
from sfumato.systems.latent import Latent
from sfumato.tasks.edit import Source, edit, scale_of


def enlarged_by(
    model: Latent,
    pictures: Tensor,
    *,
    seed: int = 0,
    batch: int = 16,
    steps: int | None = None,
    sampler: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W), uint8, made small by the mean of squares and enlarged by a model; picture i by seed + i.

    Raises:
        UserError: for a model that does not enlarge, or sides that its scale does not divide.
    """
    scale = _checked(pictures, scale_of(model))
    if scale == 1:
        raise UserError("this model does not enlarge pictures")
    found = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        small, seeds = shrunk(_to_float(part), scale), range(seed + start, seed + start + len(part))
        found.append(_to_bytes(edit(model, Source(small), seeds=seeds, steps=steps, sampler=sampler).cpu()))
        if on_batch is not None:
            on_batch(start + len(part), len(pictures))
    return torch.cat(found)


def interpolated(pictures: Tensor, scale: int) -> Tensor:
    """The same by bicubic interpolation."""
    return _to_bytes(upsampled(shrunk(_to_float(pictures), _checked(pictures, scale)), scale))


def nearness(pictures: Tensor, others: Tensor) -> dict[str, Figure]:
    """How near pictures are to the true ones, both (N, 3, H, W) uint8, mean over pictures.

    "PSNR" in dB; "mean colour error", by how many 8-bit levels the mean colour of a picture is off, mean of the
    channels; "mean absolute error" of all pixels, in levels.
    """
    apart = pictures.double() - others.double()
    return {
        "PSNR": figures.mean(psnr(pictures, others).clamp(max=100)),
        "mean colour error": figures.mean(apart.mean((2, 3)).abs().mean(1)),
        "mean absolute error": figures.mean(apart.abs().mean((1, 2, 3))),
    }


def _checked(pictures: Tensor, scale: int) -> int:
    if any(side % scale for side in pictures.shape[-2:]):
        raise UserError(f"pictures of {pictures.shape[-1]} x {pictures.shape[-2]} cannot be made {scale} times smaller")
    return scale


def _to_float(pictures: Tensor) -> Tensor:
    return pictures.to(torch.float32) / 127.5 - 1


def _to_bytes(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
