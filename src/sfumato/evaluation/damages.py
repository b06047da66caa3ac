"""Known damages, which give a feeling for the scale of a figure: the same pictures, a little worse.

>>> import torch
>>> flat = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
>>> [name for name, damage in DAMAGES.items() if not torch.equal(damage(flat), flat)]
['noise 3/255']
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.random import derived_seed

Damage = Callable[[Tensor], Tensor]
"""Pictures, uint8 (N, 3, H, W), to the damaged ones."""


def blur(pictures: Tensor, deviation: float) -> Tensor:
    """Smoothed by a Gaussian of that standard deviation in pixels, the edge continued outwards."""
    reach = math.ceil(4 * deviation)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    bell = torch.exp(-places.square() / (2 * deviation**2))
    bell = bell / bell.sum()
    n, c, h, w = pictures.shape
    x = F.pad(pictures.reshape(n * c, 1, h, w).double(), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, bell.reshape(1, 1, -1, 1)), bell.reshape(1, 1, 1, -1))
    return x.reshape(n, c, h, w).round().clamp(0, 255).to(torch.uint8)


def jpeg(pictures: Tensor, quality: int) -> Tensor:
    """Stored as JPEG, with colours at half resolution, and opened again."""

    def stored(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        return Image.open(buffer)

    return _each(pictures, stored)


def half_size(pictures: Tensor) -> Tensor:
    """Shrunk to half their size and enlarged again, both bicubic."""

    def there_and_back(image: Image.Image) -> Image.Image:
        small = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return _each(pictures, there_and_back)


def noise(pictures: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """With normal noise of that standard deviation in 8-bit levels, clipped to what 8 bits hold."""
    generator = torch.Generator().manual_seed(derived_seed("noise damage", seed))
    drawn = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    return (pictures + deviation * drawn).round().clamp(0, 255).to(torch.uint8)


def _each(pictures: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [np.array(change(Image.fromarray(one.permute(1, 2, 0).numpy())).convert("RGB")) for one in pictures]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


DAMAGES: dict[str, Damage] = {
    "blur 0.5 px": lambda pictures: blur(pictures, 0.5),
    "blur 0.7 px": lambda pictures: blur(pictures, 0.7),
    "blur 1 px": lambda pictures: blur(pictures, 1.0),
    "JPEG 75": lambda pictures: jpeg(pictures, 75),
    "half size": half_size,
    "noise 3/255": lambda pictures: noise(pictures, 3.0),
}
