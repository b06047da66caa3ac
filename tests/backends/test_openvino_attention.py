"""OpenVINO's attention among torch's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato import api
from sfumato.api import native_bfloat16
from sfumato.backends import attention, openvino_attention
from sfumato.backends.openvino_attention import attend
from sfumato.images import save_picture
from sfumato.networks.attention import math, sdpa
from sfumato.replay import replay

from .. import tiny

pytest.importorskip("openvino", reason="OpenVINO is not installed")

half = pytest.mark.skipif(not native_bfloat16(), reason="this CPU has no bfloat16")


def given(tokens: int, keys: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As a processor gives them: heads and tokens change places in memory."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = (tokens, keys, keys)
    q, k, v = (torch.randn(2, n, 3, width, generator=generator).to(dtype).transpose(1, 2) for n in sizes)
    return q, k, v


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (64, 64), (65, 77), (300, 5)])
@pytest.mark.parametrize("width", [8, 40, 65])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_the_equation(tokens: int, keys: int, width: int, scale: float | None) -> None:
    q, k, v = given(tokens, keys, width)
    scale = width**-0.5 if scale is None else scale
    before = [one.clone() for one in (q, k, v)]
    found = attend(q, k, v, scale)
    assert found.shape == q.shape and found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found, math(q, k, v, None, scale), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip((q, k, v), before, strict=True))
    assert torch.equal(found, attend(q.contiguous(), k.contiguous(), v.contiguous(), scale))


@half
@pytest.mark.parametrize("scale", [40**-0.5, 0.16])
def test_half_precision_is_near_the_equation(scale: float) -> None:
    q, k, v = given(400, 400, 40, torch.bfloat16)
    exact = math(q.float(), k.float(), v.float(), None, scale)
    found, torchs = (float((one.float() - exact).norm() / exact.norm()) for one in
                     (attend(q, k, v, scale), sdpa(q, k, v, None, scale)))  # fmt: skip
    assert found < 0.01 and found < 3 * torchs


def test_results_are_memory_of_their_own() -> None:
    q, k, v = given(20, 20, 8)
    first = attend(q, k, v, 0.3)
    kept = first.clone()
    attend(-q, k, 2 * v, 0.3)
    assert torch.equal(first, kept)


def test_small_calls_masks_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []
    monkeypatch.setattr(openvino_attention, "attend", lambda q, k, v, scale: asked.append(q.shape) or q)
    q, k, v = given(40, 30, 8)
    assert torch.equal(attention.openvino(q, k, v, None, 0.3), sdpa(q, k, v, None, 0.3))
    monkeypatch.setattr(attention, "WORTH", 2 * 3 * 40 * 30 * 8)
    mask = torch.rand(2, 1, 1, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    assert torch.equal(attention.openvino(q, k, v, mask, 0.3), sdpa(q, k, v, mask, 0.3))
    trained = q.clone().requires_grad_()
    attention.openvino(trained, k, v, None, 0.3).sum().backward()
    assert trained.grad is not None and not asked
    attention.openvino(q, k, v, None, 0.3)
    assert asked == [q.shape]


def test_programs_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_attention, "KEPT", 2)
    openvino_attention._requests.clear()
    for tokens in (10, 11, 10, 12):
        attend(*given(tokens, 7, 8), 0.3)
    assert [key[0][0][1] for key in openvino_attention._requests] == [10, 12]


def test_a_picture_says_it_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    path = tiny.write_tiny_model(tmp_path / "m.safetensors")
    openvino_attention._requests.clear()
    picture = api.load(path, kernel="openvino").generate(seed=3, label="dog")[0]
    assert openvino_attention._requests
    made = picture.info["sfumato"]["made_with"]
    assert made["kernel"] == "openvino" and made["openvino"][0].isdigit()
    save_picture(picture, tmp_path / "picture.png")
    again = replay(tmp_path / "picture.png")
    assert again.differences == [] and again.picture.tobytes() == picture.tobytes()
