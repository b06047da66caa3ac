"""The noise that training adds to pictures, where it is to be more than independent normals.

Offset noise moves whole channels, pyramid noise whole regions: with it a model learns to change what plain noise leaves
almost untouched. In sampling the noise stays plain.

>>> import torch
>>> eps = pyramid(torch.zeros(1, 3, 8, 8), 0.9, torch.Generator().manual_seed(0))
>>> eps.shape
torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError


def offset(eps: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """`eps + strength z`, one z for each channel of each picture (Guttenberg 2023).

    The variance of an element becomes `1 + strength²`, as published: it is not brought back to 1.

    Args:
        eps: (B, C, …).
        strength: 0.1 is usual.
        generator: on the CPU.
    """
    whole_channel = (*eps.shape[:2], *(1 for _ in eps.shape[2:]))
    return eps + strength * torch.randn(whole_channel, generator=generator).to(eps)


def pyramid(eps: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Multi-resolution noise (Whitaker 2023): `(eps + sum_i discount^i U_i z_i) / sqrt(sum_i discount^(2 i))`.

    `z_i` is normal noise at 1/2^i of the size, rounded up, down to one single value; `U_i` enlarges it linearly. Each
    enlarged layer is divided by its own standard deviation at every element, which linear interpolation makes smaller
    between the coarse values, so that **every element of the result has variance 1 exactly**, at any size; only
    neighbours are correlated. (The published recipe draws the ratios at random and divides each batch by its measured
    deviation.)

    Args:
        eps: (B, C, *S), unit normals; the finest layer.
        discount: in (0, 1]; 0.8 is usual.
        generator: on the CPU; draws from the finest layer to the coarsest.

    Raises:
        UserError: for data without a spatial axis.
    """
    sizes = tuple(eps.shape[2:])
    if not sizes:
        raise UserError("objective.pyramid_noise needs pictures, of at least one spatial axis")
    total, variance, i = eps, 1.0, 0
    while max(_smaller(sizes, i)) > 1:
        i += 1
        z = torch.randn((*eps.shape[:2], *_smaller(sizes, i)), generator=generator).to(eps)
        total = total + discount**i * _enlarged(z, sizes)
        variance += discount ** (2 * i)
    return total / math.sqrt(variance)


def _smaller(sizes: Sequence[int], halvings: int) -> tuple[int, ...]:
    return tuple(-(-size // 2**halvings) for size in sizes)


def _enlarged(z: Tensor, sizes: Sequence[int]) -> Tensor:
    """Noise (B, C, *s) enlarged linearly along each axis to `sizes`, at unit variance everywhere."""
    for axis, size in enumerate(sizes, start=2):
        weights = _interpolation(z.shape[axis], size).to(z)
        z = torch.movedim(torch.movedim(z, axis, -1) @ weights.T, -1, axis)
    return z


def _interpolation(small: int, large: int) -> Tensor:
    """(large, small): linear interpolation as a matrix whose rows have norm 1."""
    columns = F.interpolate(torch.eye(small)[None], size=large, mode="linear", align_corners=False)[0]
    return F.normalize(columns.T, dim=1)


def perturb(eps: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The noise that the network is shown, `eps + strength z`, while its target keeps `eps` (Ning 2023, alg. 1).

    It learns to take its own errors in sampling for noise. 0.1 is the published strength.

    Args:
        eps: (B, …).
        generator: on the CPU.
    """
    return eps + strength * torch.randn(eps.shape, generator=generator).to(eps)
