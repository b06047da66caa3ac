"""Our group normalisation is torch's; its own backward pass agrees with double precision as closely as torch's does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.networks.norm import GroupNorm, _GroupNorm


def gradients(norm: GroupNorm, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)]


@pytest.mark.parametrize(("groups", "channels", "size"), [(8, 32, 8), (4, 16, 6), (1, 8, 5), (3, 96, 4)])
def test_the_gradient_in_bfloat16_is_right(groups: int, channels: int, size: int) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (2 * torch.randn(3, channels, size, size) + 1).bfloat16().to(memory_format=torch.channels_last)
    dy = torch.randn(3, channels, size, size).bfloat16().to(memory_format=torch.channels_last)
    ours = gradients(norm, x, dy)
    exact = gradients(norm.double(), x.double(), dy.double())
    for found, right in zip(ours, exact, strict=True):
        assert float((found.double() - right).norm() / right.norm()) < 1e-2


def test_the_formula_is_exact_in_double_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    w, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    ours = torch.autograd.grad(_GroupNorm.apply(x, w, b, 3, 1e-5), [x, w, b], dy)  # type: ignore[no-untyped-call]
    theirs = torch.autograd.grad(F.group_norm(x, 3, w, b, 1e-5), [x, w, b], dy)
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)  # sums are kept in float32


def test_elsewhere_it_is_torchs_own_bit_for_bit() -> None:
    norm = GroupNorm(4, 16)
    for x in (torch.randn(2, 16, 4, 4), torch.randn(2, 16, 9).bfloat16(), torch.randn(2, 16, 4, 4).bfloat16()):
        own = norm.to(x.dtype)
        assert torch.equal(own(x), F.group_norm(x, 4, own.weight, own.bias))
    assert list(norm.state_dict()) == ["weight", "bias"]
