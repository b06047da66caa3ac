"""What conditions that are shown are made of while a network trains: random masks, and small pictures with faults.

All of it is drawn from the generator that it is given, so that a training step stays a function of its number.

>>> g = torch.Generator().manual_seed(0)
>>> masks = random_masks(4, 16, 16, g, full=0.25)
>>> masks.shape, sorted(set(masks.flatten().tolist()))
(torch.Size([4, 1, 16, 16]), [0.0, 1.0])
>>> blurred(torch.ones(1, 3, 8, 8), torch.tensor([2.0])).mean().round().item()
1.0
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_BOXES, MOST_STROKES, MOST_CORNERS = 3, 3, 4


def random_masks(count: int, height: int, width: int, generator: torch.Generator, *, full: float = 0.1) -> Tensor:
    """Masks (count, 1, height, width), 1 where a picture is to be redrawn, 0 elsewhere; none is empty.

    A share `full`, in [0, 1], covers everything; the others are boxes, strokes of a round brush, or all that lies on
    one side of an upright or level line, each as often.
    """
    masks = torch.empty(count, 1, height, width)
    for mask in masks:
        if _drawn(generator) < full:
            mask.fill_(1.0)
            continue
        kind = (_boxes, _strokes, _side)[int(_drawn(generator) * 3)]
        mask[0] = kind(height, width, generator).to(mask)
    return masks


def _drawn(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _boxes(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One to three boxes, each 0.2 to 0.7 of the sides."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(1 + int(_drawn(generator) * MOST_BOXES)):
        h, w = (max(1, round(side * _drawn(generator, 0.2, 0.7))) for side in (height, width))
        top, left = int(_drawn(generator) * (height - h + 1)), int(_drawn(generator) * (width - w + 1))
        mask[top : top + h, left : left + w] = True
    return mask


def _strokes(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One to three broken lines of up to four pieces, 0.08 to 0.3 of the smaller side thick."""
    side = min(height, width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    mask = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(1 + int(_drawn(generator) * MOST_STROKES)):
        radius = max(1.0, side * _drawn(generator, 0.04, 0.15))
        at = (_drawn(generator) * width, _drawn(generator) * height)
        for _ in range(1 + int(_drawn(generator) * MOST_CORNERS)):
            angle, length = _drawn(generator, 0, 2 * math.pi), side * _drawn(generator, 0.15, 0.6)
            to = (at[0] + length * math.cos(angle), at[1] + length * math.sin(angle))
            to = (min(max(to[0], 0.0), float(width)), min(max(to[1], 0.0), float(height)))
            mask |= _distance(x, y, at, to) <= radius
            at = to
    return mask


def _distance(x: Tensor, y: Tensor, a: tuple[float, float], b: tuple[float, float]) -> Tensor:
    """Of points (H, W) to the piece of a line from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = (((x - a[0]) * dx + (y - a[1]) * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)
    return torch.hypot(x - a[0] - along * dx, y - a[1] - along * dy)


def _side(height: int, width: int, generator: torch.Generator) -> Tensor:
    """All on one side of a line at 0.25 to 0.75 of the picture."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    share, which = _drawn(generator, 0.25, 0.75), int(_drawn(generator) * 4)
    if which < 2:
        mask[: max(1, round(height * share))] = True
    else:
        mask[:, : max(1, round(width * share))] = True
    return mask.flip(0, 1) if which % 2 else mask


def blurred(pictures: Tensor, sigmas: Tensor) -> Tensor:
    """Pictures (B, C, H, W), each by a Gaussian of its own deviation, `sigmas` (B,) in pixels; 0 changes nothing."""
    radius = min(max(1, math.ceil(3 * float(sigmas.max()))), min(pictures.shape[-2:]) - 1)
    place = torch.arange(-radius, radius + 1, dtype=pictures.dtype)
    weights = torch.exp(-(place**2) / (2 * sigmas.to(pictures).clamp(min=1e-3)[:, None] ** 2))
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(pictures.shape[1], dim=0)
    rows = pictures.flatten(0, 1)[None]
    padded = F.pad(rows, (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, weights[:, None, None, :], groups=len(weights))
    return F.conv2d(across, weights[:, None, :, None], groups=len(weights)).view_as(pictures)
