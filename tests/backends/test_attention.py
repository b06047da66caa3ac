"""The kernels of this machine, and the choice among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato import api
from sfumato.backends import attention
from sfumato.backends.attention import adaptive, blocks, chosen, using
from sfumato.networks.attention import KERNELS, attention_kernel, math, sdpa, set_attention_kernel


def given(tokens: int, keys: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = (tokens, keys, keys)
    q, k, v = (torch.randn(2, 3, n, width, generator=generator).to(dtype) for n in sizes)
    return q, k, v


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize("width", [8, 16, 40])
def test_blocks_are_the_equation(tokens: int, width: int) -> None:
    q, k, v = given(tokens, 77, width)
    found, wanted = blocks(q, k, v, None, 0.3), math(q, k, v, None, 0.3)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_take_strided_heads_and_leave_their_inputs_alone() -> None:
    x = torch.randn(2, 600, 24, generator=torch.Generator().manual_seed(0))
    q = k = v = x.view(2, 600, 3, 8).transpose(1, 2)
    before = x.clone()
    torch.testing.assert_close(blocks(q, k, v, None, 0.2), math(q, k, v, None, 0.2), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_half_precision_is_near_the_equation() -> None:
    q, k, v = given(1200, 1200, 40, torch.bfloat16)
    exact = math(q.float(), k.float(), v.float(), None, 0.16)
    found = [float((kernel(q, k, v, None, 0.16).float() - exact).norm() / exact.norm()) for kernel in (adaptive, sdpa)]
    assert found[0] < 0.01 and found[0] < 3 * found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 30.0])  # the largest score: about 2, 30, 60, 900
def test_scores_of_any_size(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bare: list[int] = []
    monkeypatch.setattr(torch, "exp2", lambda x, out, own=torch.exp2: bare.append(1) or own(x, out=out))
    q, k, v = given(600, 1100, 40, dtype)
    q, k = q / q.norm(dim=-1, keepdim=True) * 5, k / k.norm(dim=-1, keepdim=True) * 5
    k[:, :, -1] = -q[:, :, 0]  # one row in which a score is as low as can be
    exact = math(q.float(), k.float(), v.float(), None, scale)
    found = blocks(q, k, v, None, scale)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert float((found.float() - exact).norm() / exact.norm()) < bound * max(1, scale)
    assert bool(bare) == (scale <= 2 and dtype != torch.float16)


def test_masks_and_gradients_go_to_torch() -> None:
    q, k, v = given(40, 30, 8)
    mask = torch.rand(2, 1, 1, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    assert torch.equal(blocks(q, k, v, mask, 0.3), sdpa(q, k, v, mask, 0.3))
    q.requires_grad_()
    blocks(q, k, v, None, 0.3).sum().backward()
    assert q.grad is not None and bool(q.grad.abs().sum() > 0)


def test_short_inputs_and_float32_stay_with_torch() -> None:
    for q, k, v in (given(600, 600, 8, torch.bfloat16), given(1100, 77, 8, torch.bfloat16), given(1100, 1100, 8)):
        assert torch.equal(adaptive(q, k, v, None, 0.3), sdpa(q, k, v, None, 0.3))


def test_the_choice_follows_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert chosen(torch.float32, cpu) == "sdpa"
    for gain, name in ((0.9, "sdpa"), (1.1, "adaptive")):
        chosen.cache_clear()
        monkeypatch.setattr(attention, "times_as_fast", lambda one, other, gain=gain: gain)
        assert chosen(torch.bfloat16, cpu) == name
    chosen.cache_clear()


def test_a_kernel_is_used_within_a_block_only() -> None:
    before = attention_kernel()
    with pytest.raises(RuntimeError), using("math"):
        assert attention_kernel() is math
        raise RuntimeError
    assert attention_kernel() is before


def test_pictures_say_their_kernel_and_one_set_by_hand_stays() -> None:
    model = api.load("ddpm-emoji32", kernel="math")
    assert model.generate(seed=0, steps=1)[0].info["sfumato"]["made_with"]["kernel"] == "math"
    before = set_attention_kernel("math")
    try:
        by_hand = api.load("ddpm-emoji32").generate(seed=0, steps=1)[0]
    finally:
        set_attention_kernel(before)
    assert by_hand.info["sfumato"]["made_with"]["kernel"] == "math"
    with pytest.raises(api.UserError, match=r"unknown attention kernel 'blcks' \(did you mean 'blocks'\?\)"):
        api.load("ddpm-emoji32", kernel="blcks")
    assert set(KERNELS) >= {"sdpa", "math", "blocks", "adaptive"}
