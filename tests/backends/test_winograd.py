"""Winograd's convolutions are convolutions: the same sums, in every tiling, and how they are rounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.backends import winograd
from sfumato.backends.winograd import (
    Convolution,
    convolve,
    convolve_doubled,
    convolve_unfolded,
    transformed,
    transformed_doubled,
)

SHAPES = [(1, 8, 8), (2, 16, 12), (3, 4, 4), (1, 2, 2), (1, 6, 40)]
OF_SIX = [(1, 8, 8), (2, 16, 12), (3, 4, 4), (1, 8, 40)]
WAYS = [*((2, shape) for shape in SHAPES), *((4, shape) for shape in OF_SIX)]


def _given(batch: int, height: int, width: int, *, channels: int = 12, out: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch * height * width)
    x = torch.randn(batch, channels, height, width, generator=g)
    weight = torch.randn(out, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    return x, weight, torch.randn(out, generator=g)


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tiles", [1, 7, 32, 512])  # bands of rows, several pictures together, all at once
@pytest.mark.parametrize(("outputs", "shape"), WAYS)
def test_it_is_the_convolution(
    outputs: int, shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    x, weight, bias = _given(*shape)
    exact, bound = F.conv2d(x.double(), weight.double(), bias.double(), padding=1), {2: 1e-6, 4: 5e-6}[outputs]
    for memory in (torch.contiguous_format, torch.channels_last):
        got = convolve(x.to(memory_format=memory), transformed(weight, outputs), bias)
        assert _error(got, exact) < bound and got.is_contiguous(memory_format=torch.channels_last)
    plain = convolve(x, transformed(weight, outputs), None)
    assert _error(plain, F.conv2d(x.double(), weight.double(), padding=1)) < bound


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3), (1, 1, 1)])
def test_one_product_of_the_unfolded_picture_is_the_convolution(shape: tuple[int, int, int]) -> None:
    x, weight, bias = _given(*shape)
    for memory in (torch.contiguous_format, torch.channels_last):
        got = convolve_unfolded(x.to(memory_format=memory), weight.to(memory_format=memory), bias)
        assert torch.allclose(got, F.conv2d(x, weight, bias, padding=1), atol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(convolve_unfolded(x, weight, None), F.conv2d(x, weight, padding=1), atol=1e-5)


def test_its_rounding_in_float32() -> None:
    x, weight, bias = _given(2, 32, 32, channels=320, out=320)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = _error(F.conv2d(x, weight, bias, padding=1), exact)
    assert _error(convolve(x, transformed(weight, 2), bias), exact) < direct
    assert _error(convolve(x, transformed(weight, 4), bias), exact) < 5e-6


@pytest.mark.parametrize("tiles", [1, 7, 32, 512])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3), (1, 1, 1)])
def test_it_is_a_doubling_and_the_convolution(
    shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    x, weight, bias = _given(*shape)
    doubled = F.interpolate(x.double(), scale_factor=2.0)
    exact = F.conv2d(doubled, weight.double(), bias.double(), padding=1)
    assert _error(convolve_doubled(x, transformed_doubled(weight), bias), exact) < 1e-6


def test_its_rounding_in_half_precision() -> None:
    x, weight, bias = (one.bfloat16() for one in _given(2, 16, 16, channels=192, out=192))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = _error(F.conv2d(x, weight, bias, padding=1), exact)
    assert direct < _error(convolve(x, transformed(weight, 2), bias), exact) < 4 * direct
    large = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), bias.double(), padding=1)
    assert _error(convolve_doubled(x, transformed_doubled(weight), bias), large) < 3 * direct


@pytest.mark.parametrize("tiles", [1, 3, 512])
@pytest.mark.parametrize("shape", OF_SIX)
def test_its_gradients(shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    given = [one.double().requires_grad_() for one in _given(*shape)]
    g = torch.Generator().manual_seed(5)
    slopes = torch.randn(shape[0], 20, *shape[1:], generator=g, dtype=torch.float64)
    own = torch.autograd.grad(Convolution.apply(*given), given, slopes)
    exact = torch.autograd.grad(F.conv2d(*given, padding=1), given, slopes)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(own, exact, strict=True))
    single = [one.detach().float().requires_grad_() for one in given]
    for memory in (torch.contiguous_format, torch.channels_last):
        rounded = torch.autograd.grad(Convolution.apply(*single), single, slopes.float().to(memory_format=memory))
        assert all(_error(a, b) < 1e-5 for a, b in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_needed(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [one.requires_grad_(i in wanted) for i, one in enumerate(_given(2, 8, 8))]
    if 1 not in wanted:
        monkeypatch.setattr(winograd, "weight_gradient", None)
    Convolution.apply(*given).sum().backward()
    assert [one.grad is not None for one in given] == [i in wanted for i in range(3)]


def test_gradients_of_gradients() -> None:
    given = [one.double().requires_grad_() for one in _given(1, 4, 4, channels=2, out=3)]
    assert torch.autograd.gradgradcheck(Convolution.apply, given)
    (slope,) = torch.autograd.grad(Convolution.apply(*given).sum(), given[0], create_graph=True)
    own = torch.autograd.grad(slope.square().sum(), given[1])[0]
    (slope,) = torch.autograd.grad(F.conv2d(*given, padding=1).sum(), given[0], create_graph=True)
    assert torch.allclose(own, torch.autograd.grad(slope.square().sum(), given[1])[0])
