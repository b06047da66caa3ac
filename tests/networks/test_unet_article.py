"""The article's network: what is computed another way than it is written, against the way it is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.networks.unet_article import ChannelNorm, LinearAttention, Unet, Upsample


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(module: nn.Module, out: Tensor) -> list[Tensor]:
    """Of a fixed scalar, by every parameter."""
    return list(torch.autograd.grad((out * normals(*out.shape, seed=9)).sum(), list(module.parameters())))


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


# --- norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_norm_is_the_equation(shifted: bool) -> None:
    norm, x = ChannelNorm(6).double(), normals(2, 6, 3, 5).requires_grad_()
    norm.g.data = normals(1, 6, 1, 1, seed=1)
    scale, shift = normals(2, 6, 1, 1, seed=2), normals(2, 6, 1, 1, seed=3)
    wanted = F.normalize(x, dim=1) * 6**0.5 * norm.g
    found = norm(x, (scale, shift)) if shifted else norm(x)
    assert_same([found], [wanted * (1 + scale) + shift if shifted else wanted])


def test_norm_gradient() -> None:
    """Also where the vector is zero, or too short to be divided by its length."""
    x = normals(2, 5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(ChannelNorm(5).double(), (x,))
    short = torch.zeros(1, 5, 1, 2, dtype=torch.float64)
    short[..., 1] = 1e-14
    short.requires_grad_()
    weights = normals(1, 5, 1, 2)
    for given in (ChannelNorm(5).double()(short), F.normalize(short, dim=1) * 5**0.5):
        (slope,) = torch.autograd.grad((given * weights).sum(), short)
        torch.testing.assert_close(slope, weights * 5**0.5 * 1e12)


def test_norm_has_no_second_derivative() -> None:
    """It says so, and gives no wrong one."""
    x = normals(1, 3, 2, 2).requires_grad_()
    (slope,) = torch.autograd.grad(ChannelNorm(3).double()(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_half_precision(dtype: torch.dtype) -> None:
    """The type stays, and squares that it cannot hold do no harm."""
    x = 3e4 * normals(1, 64, 4, 4).sign().to(dtype)
    found = ChannelNorm(64)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), x.sign().float(), rtol=0.01, atol=0)


# --- attention -----------------------------------------------------------------------------------------------------


def as_written(attention: LinearAttention, x: Tensor) -> Tensor:
    """Shen 2018 with learned keys and values in front, every part of it in full."""
    qkv = attention.to_qkv(attention.norm(x)).flatten(2)
    q, k, v = (part.unflatten(1, (attention.heads, -1)) for part in qkv.chunk(3, dim=1))
    k, v = (
        torch.cat([memories.expand(len(x), -1, -1, -1), own], dim=-1)
        for memories, own in zip(attention.mem_kv, (k, v), strict=True)
    )
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
    mixed = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * attention.scale)
    out: Tensor = attention.to_out(mixed.flatten(1, 2).unflatten(2, x.shape[2:]))
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_linear_attention_is_the_equation(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    attention = LinearAttention(6, heads=2, dim_head=4).double()
    x = normals(3, 6, 4, 5).contiguous(memory_format=memory_format)
    found, wanted = attention(x), as_written(attention, x)
    assert_same([found], [wanted])
    assert_same(gradients(attention, found), gradients(attention, wanted))


@pytest.mark.parametrize("factor", [-400.0, 0.0, 400.0])
def test_linear_attention_of_extreme_keys(factor: float) -> None:
    torch.manual_seed(0)
    attention = LinearAttention(6, heads=2, dim_head=4).double()
    attention.to_qkv.weight.data.mul_(factor)
    attention.mem_kv.data.mul_(factor)
    x = normals(2, 6, 4, 4)
    found, wanted = attention(x), as_written(attention, x)
    assert_same([found, *gradients(attention, found)], [wanted, *gradients(attention, wanted)])


def test_linear_attention_stays_in_half_precision() -> None:
    """Even keys: sums over all pixels are as large as they can be."""
    torch.manual_seed(0)
    attention = LinearAttention(4, heads=1, dim_head=4)
    attention.to_qkv.weight.data[4:8] = 0
    x = normals(1, 4, 256, 256, dtype=torch.float32).abs()
    torch.testing.assert_close(attention.half()(x.half()).float(), attention.float()(x), rtol=0.05, atol=0.02)


# --- layout and precision --------------------------------------------------------------------------------------------


def test_upsample_is_repeat_and_convolve() -> None:
    torch.manual_seed(0)
    up, x = Upsample(4, 6).double(), normals(2, 4, 3, 5).requires_grad_()
    conv = up.get_submodule("1")
    found, wanted = up(x), conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    assert_same([found], [wanted])
    assert_same(gradients(up, found), gradients(up, wanted))


def test_layout_changes_nothing() -> None:
    torch.manual_seed(0)
    network, x, t = Unet(8, dim_mults=(1, 2)).double(), normals(2, 3, 8, 12), torch.tensor([3.0, 400.0]).double()
    rows = network(x, t)
    last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)  # type: ignore[call-overload]
    assert_same([last], [rows])


def test_autocast_keeps_pictures_in_half_precision() -> None:
    """No norm, attention or sum in between widens them, and the prediction is that of float32 but for the rounding."""
    torch.manual_seed(0)
    network, x, t = Unet(8, dim_mults=(1, 2)), normals(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 400.0])
    wide = network(x, t)
    seen: list[torch.dtype] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | ChannelNorm | LinearAttention):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = network(x, t)
    assert set(seen) == {torch.bfloat16}
    assert float(((narrow.float() - wide).norm() / wide.norm()).detach()) < 0.05
