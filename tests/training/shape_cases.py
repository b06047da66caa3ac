"""A detector for pictures of shapes: which colours are where, by the nearest of the colours that shapes have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from sfumato.training.shapes import COLOURS, Scene

_FAR = 80  # from every known colour: a border, or no colour at all


def colours_of(picture: Image.Image) -> np.ndarray:
    """(H, W): 0 for white, i for the i-th colour, -1 for none of them."""
    known = np.array([(255, 255, 255), *COLOURS.values()], dtype=np.float64)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    far = np.linalg.norm(pixels[:, :, None] - known, axis=-1)
    return np.where(far.min(-1) < _FAR, far.argmin(-1), -1)


def box_of_colour(found: np.ndarray, colour: str) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) in pixels of what has a colour, less lines with hardly any of it; None where it is not."""
    mask = found == list(COLOURS).index(colour) + 1
    rows, columns = (np.flatnonzero(mask.sum(axis) > len(found) // 32) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)


def boxes_iou(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[float]:
    """For every shape of every scene, how well its colour in the picture fills its box; 0 where it is not."""
    found = []
    for picture, scene in zip(pictures, scenes, strict=True):
        colours = colours_of(picture)
        for shape in scene.shapes:
            own = box_of_colour(colours, shape.colour)
            asked = (shape.left, shape.top, shape.left + shape.side, shape.top + shape.side)
            found.append(iou(own, asked) if own is not None else 0.0)
    return found


def colours_drawn(picture: Image.Image, least: int = 12) -> set[str]:
    """The colours of which there are at least so many pixels."""
    found = colours_of(picture)
    return {name for i, name in enumerate(COLOURS) if int((found == i + 1).sum()) >= least}


def maps_iou(pictures: Sequence[Image.Image], truths: Sequence[Image.Image]) -> Mapping[str, float]:
    """By colour, white included: pixels of it in the pictures and in the true ones, intersection over union."""
    names = ["white", *COLOURS]
    common, either = np.zeros(len(names)), np.zeros(len(names))
    for picture, truth in zip(pictures, truths, strict=True):
        a, b = colours_of(picture), colours_of(truth)
        for i in range(len(names)):
            common[i] += ((a == i) & (b == i)).sum()
            either[i] += ((a == i) | (b == i)).sum()
    return {name: float(c / e) for name, c, e in zip(names, common, either, strict=True) if e}
