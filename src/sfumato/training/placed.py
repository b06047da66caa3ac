"""What lies on a picture, where the picture as it is trained on has it: boxes and maps under fits, crops and mirrors.

>>> from sfumato.conditioners.layout import Box
>>> wide = fitted((20, 10), 10, "crop")  # the middle of a picture twice as wide as high
>>> placed_boxes([Box("cat", 0.25, 0, 0.25, 1)], (20, 10), wide, View(mirrored=True), 10)
(Box(label='cat', x=0.5, y=0.0, width=0.5, height=1.0),)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sfumato.conditioners.layout import Box
from sfumato.errors import DataError
from sfumato.training.data import DataConfig, View
from sfumato.training.pictures import Fitted, fit_map, fitted

UNKNOWN = -1


def placed_boxes(
    boxes: Sequence[Box], picture: tuple[int, int], fit: Fitted, view: View, size: int
) -> tuple[Box, ...]:
    """Boxes in fractions of what is seen of the picture; those of which less than a pixel is seen are left out.

    Args:
        boxes: in fractions of the whole picture of (width, height) `picture`.
        fit: how that was fitted.
        view: what is seen of it, a square of `size` pixels.
    """
    found = []
    for box in boxes:
        corners = []
        for axis, start in ((0, view.left), (1, view.top)):
            ends = (box.corners[axis], box.corners[axis + 2])
            low, high = (end * picture[axis] * fit.scale[axis] + fit.shift[axis] - start for end in ends)
            corners.append((min(max(low, 0), size), min(max(high, 0), size)))
        (x0, x1), (y0, y1) = corners
        if view.mirrored:
            x0, x1 = size - x1, size - x0
        if min(x1 - x0, y1 - y0) >= 1:
            found.append(Box(box.label, x0 / size, y0 / size, (x1 - x0) / size, (y1 - y0) / size))
    return tuple(found)


def boxes_seen(boxes: Sequence[Box], picture: tuple[int, int], config: DataConfig, view: View) -> tuple[Box, ...]:
    """`placed_boxes` for a data set's way of fitting."""
    return placed_boxes(boxes, picture, fitted(picture, config.stored_size, config.fit), view, config.size)


def stored_map(values: np.ndarray, picture: tuple[int, int], config: DataConfig) -> Tensor:
    """A map of classes (H, W) of the picture's size as it is stored beside it, int16.

    Raises:
        DataError: for a map of another size.
    """
    if values.shape != picture[::-1]:
        raise DataError(
            f"the map has {values.shape[1]}x{values.shape[0]} pixels, its picture {picture[0]}x{picture[1]}"
        )
    return torch.from_numpy(fit_map(values, config.stored_size, config.fit, UNKNOWN).astype(np.int16))


def map_seen(stored: Tensor, config: DataConfig, view: View) -> Tensor:
    """What is seen of a stored map, (size, size) int64."""
    part = stored[view.top : view.top + config.size, view.left : view.left + config.size]
    return (part.flip(-1) if view.mirrored else part).long()
