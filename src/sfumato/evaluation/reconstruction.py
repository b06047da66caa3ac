"""How near a picture is to the one that it should be: PSNR, SSIM, the error on white ground, a distance of features.

All of them compare 8-bit RGB pictures (N, 3, H, W) one by one and give one number for each.

>>> import torch
>>> white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
>>> round(float(psnr(white, white - 1)), 2), float(ssim(white, white))
(48.13, 1.0)
>>> float(background_error(white, white - 3))
3.0
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_WINDOW, _SIGMA = 11, 1.5


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, float64 (N,): `10 log10(255² / MSE)`; infinite for equal ones.

    The mean over pictures of this is what is quoted, not the ratio of the mean error.

    Raises:
        UserError: not 8-bit RGB pictures, or of unlike shapes.
    """
    a, b = _checked(pictures, others)
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each picture, float64 (N,), at most 1 (Wang 2004, eqs. 13-15).

    Means, variances and the covariance are weighted by a Gaussian of 11 x 11 pixels with a standard deviation of 1.5,
    wherever it fits into the picture; `K1 = 0.01`, `K2 = 0.03`, `L = 255`. Measured on each of the three colour
    channels, of which the mean is taken.

    Raises:
        UserError: as of `psnr`, or pictures smaller than the window.
    """
    a, b = _checked(pictures, others)
    if min(a.shape[-2:]) < _WINDOW:
        raise UserError(f"SSIM needs pictures of at least {_WINDOW} x {_WINDOW}; got {tuple(a.shape[-2:])}")
    places = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    bell = torch.exp(-places.square() / (2 * _SIGMA**2))
    bell = (bell / bell.sum()).to(a.device)

    def smooth(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = F.conv2d(x.reshape(n * c, 1, h, w), bell.reshape(1, 1, -1, 1))
        return F.conv2d(x, bell.reshape(1, 1, 1, -1)).reshape(n, c, h - _WINDOW + 1, w - _WINDOW + 1)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * cov + _C2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))
    return likeness.mean((1, 2, 3))


def background(pictures: Tensor) -> Tensor:
    """Where each picture is white ground, bool (N, H, W): pure white, and joined to its edge by pure white."""
    white = (pictures == 255).all(1)
    ground = white.clone()
    ground[:, 1:-1, 1:-1] = False
    while True:
        grown = F.max_pool2d(ground.float().unsqueeze(1), 3, 1, 1).squeeze(1).bool() & white
        if torch.equal(grown, ground):
            return ground
        ground = grown


def background_error(pictures: Tensor, others: Tensor) -> Tensor:
    """Mean absolute error of each picture's white ground in 8-bit levels, float64 (N,); NaN where it has none.

    Args:
        pictures: the true ones, which say where the ground is.

    Raises:
        UserError: as of `psnr`.
    """
    a, b = _checked(pictures, others)
    ground = background(pictures)
    error = (a - b).abs().mean(1)
    return (error * ground).sum((1, 2)) / ground.sum((1, 2))


def feature_distance(maps: list[Tensor], others: list[Tensor]) -> Tensor:
    """Distance of each picture in a network's feature maps, float64 (N,).

    The sum over layers of the mean over places of `|f - g|²`, with every place's features scaled to unit length (Zhang
    2018, arXiv:1801.03924, eq. 1 with all weights 1).

    Args:
        maps, others: of each layer (N, C, h, w).
    """
    total = torch.zeros(len(maps[0]), dtype=torch.float64, device=maps[0].device)
    for f, g in zip(maps, others, strict=True):
        apart = (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1)
        total += apart.mean((1, 2)).double()
    return total


def _checked(pictures: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    shapes = f"{tuple(pictures.shape)} of {pictures.dtype} and {tuple(others.shape)} of {others.dtype}"
    if pictures.dtype != torch.uint8 or others.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise UserError(f"8-bit pictures (N, 3, H, W) are compared; got {shapes}")
    if pictures.shape != others.shape:
        raise UserError(f"pictures of one shape are compared; got {shapes}")
    return pictures.double(), others.to(pictures.device).double()
