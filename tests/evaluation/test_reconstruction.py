"""PSNR, SSIM, background error and feature distance on known errors, and beside a direct implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d, label
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation.reconstruction import background, background_error, feature_distance, psnr, ssim


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    """Pictures of any bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("error", [1, 5, 100])
def test_psnr_of_a_known_error(error: int) -> None:
    grey = torch.full((2, 3, 4, 4), 120, dtype=torch.uint8)
    assert psnr(grey, grey + error).tolist() == pytest.approx([20 * math.log10(255 / error)] * 2)


def test_psnr_is_of_each_picture() -> None:
    """One wrong byte of n: MSE = e² / n. An equal picture is infinitely good, and says nothing of the other."""
    pictures = noise(2, 8)
    others = pictures.clone()
    others[1, 0, 0, 0] ^= 64
    found = psnr(pictures, others)
    assert math.isinf(found[0]) and found[1].item() == pytest.approx(10 * math.log10(255**2 / (64**2 / 192)))


def ssim_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang's index of one channel with scipy's filters, where the 11 x 11 window fits."""
    bell = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    bell /= bell.sum()

    def smooth(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, bell, 0), bell, 1)[5:-5, 5:-5]

    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    return float((luminance * (2 * cov + c2) / (vx + vy + c2)).mean())


def test_ssim_beside_a_direct_implementation() -> None:
    a, b = noise(2, 24), noise(2, 24, seed=1)
    b = ((a.float() * 3 + b.float()) / 4).to(torch.uint8)
    for i in range(2):
        expected = np.mean([ssim_by_scipy(a[i, c].numpy(), b[i, c].numpy()) for c in range(3)])
        assert ssim(a, b)[i].item() == pytest.approx(expected, rel=1e-10)


def test_ssim_of_known_pictures() -> None:
    pictures = noise(2, 16)
    assert ssim(pictures, pictures).tolist() == pytest.approx([1, 1], abs=1e-12)
    assert torch.equal(ssim(pictures, 255 - pictures), ssim(255 - pictures, pictures))
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)  # without structure only the luminance term is left
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat, flat + 50).item() == pytest.approx(expected)


def test_ground_is_white_that_reaches_the_edge() -> None:
    """As scipy labels white regions, with diagonal neighbours; white inside a ring is no ground."""
    pictures = (noise(4, 20) > 90).to(torch.uint8) * 255
    pictures[0] = 255
    pictures[0, :, 5:15, 5:15] = 0
    pictures[0, :, 8:12, 8:12] = 255
    found = background(pictures)
    for picture, ground in zip(pictures, found, strict=True):
        regions, _ = label((picture == 255).all(0).numpy(), structure=np.ones((3, 3)))
        edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        expected = np.isin(regions, edge[edge > 0])
        assert np.array_equal(ground.numpy(), expected)
    assert found[0].sum() == 400 - 100


def test_background_error_counts_the_ground_alone() -> None:
    picture = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    picture[0, :, 2:6, 2:6] = 10
    picture[1] = 0
    other = picture.clone()
    other[0, :, 3:5, 3:5] = 200  # inside the object
    other[0, 0, 0, 0] = 255 - 48  # one channel of one of the 48 pixels of the ground
    found = background_error(picture, other)
    assert found[0].item() == pytest.approx(48 / 3 / 48) and found[1].isnan()


def test_feature_distance_does_not_see_the_length() -> None:
    f = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert feature_distance([f], [3 * f]).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert feature_distance([f, f], [-f, f]).tolist() == pytest.approx([4, 4])  # |f - (-f)|² of unit vectors


def test_what_cannot_be_compared_is_refused() -> None:
    pictures = noise(1, 8)
    with pytest.raises(UserError, match="8-bit pictures"):
        psnr(pictures.float(), pictures.float())
    with pytest.raises(UserError, match="of one shape"):
        psnr(pictures, pictures[:, :, :4])
    with pytest.raises(UserError, match="at least 11 x 11"):
        ssim(pictures, pictures)
