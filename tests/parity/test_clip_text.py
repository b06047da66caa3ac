"""Our text tower of CLIP against transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.networks.clip_text import ACTIVATIONS, CLIPTextConfig, CLIPTextModel

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "projection_dim": 12, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": 11, "bos_token_id": 58, "eos_token_id": 59,
}  # fmt: skip
START, END = 58, 59
IDS = torch.tensor([[START, 4, 9, 31, END, END, END], [START, 7, END, 0, 0, 0, 0], [START, 5, 6, 7, 8, 9, END]])
KEEP = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1]])


@functools.cache
def pair(projection: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[CLIPTextModel, Any]:
    """Ours and theirs with the same weights, large enough that every part counts."""
    values = SIZES | changes
    ours = CLIPTextModel(CLIPTextConfig(**values), projection=projection)
    generator = torch.Generator().manual_seed(0)
    for name, weight in ours.state_dict().items():
        weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if name.endswith("bias") else 0.3))
        if "norm" in name and name.endswith("weight"):
            weight.add_(1)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = kind(transformers.CLIPTextConfig(**values))
    own = theirs.state_dict()
    nested = any(name.startswith("text_model.") for name in own)
    theirs.load_state_dict({n if nested else n.removeprefix("text_model."): t for n, t in ours.state_dict().items()})
    return ours.to(dtype).eval().requires_grad_(False), theirs.to(dtype).eval().requires_grad_(False)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


def compare(ours: CLIPTextModel, theirs: Any, keep: Tensor | None, most: float) -> None:
    """Every hidden state, the normed last one, and the pooled output."""
    found = ours(IDS, keep)
    expected = theirs(input_ids=IDS, attention_mask=keep, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative(a, b) <= most
    last = ours.text_model.final_layer_norm(found.hidden_states[-1])
    assert relative(last, expected.last_hidden_state) <= most
    pooled = expected.pooler_output if ours.text_projection is None else expected.text_embeds
    assert relative(found.pooled, pooled) <= most


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("keep", [None, KEEP], ids=["all seen", "masked"])
@pytest.mark.parametrize("eos", [2, END])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_all_states(act: str, eos: int, keep: Tensor | None, projection: bool) -> None:
    compare(*pair(projection, hidden_act=act, eos_token_id=eos), keep, 1e-5)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_every_activation(act: str) -> None:
    compare(*pair(hidden_act=act, layer_norm_eps=1e-3), None, 1e-5)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all seen", "masked"])
def test_bfloat16(keep: Tensor | None) -> None:
    compare(*pair(dtype=torch.bfloat16), keep, 2e-2)


def test_the_mask_hides() -> None:
    ours, _ = pair()
    other = IDS.clone()
    other[0, 2] = 44
    assert torch.equal(ours(IDS, KEEP).hidden_states[-1][0, 3:], ours(other, KEEP).hidden_states[-1][0, 3:])
    assert not torch.allclose(ours(IDS).hidden_states[-1][0, 3:], ours(other).hidden_states[-1][0, 3:])


def test_the_two_rules_of_the_end_mark() -> None:
    """By number its first place; by the old rule the highest id, wherever the number 2 stands."""
    ids = torch.tensor([[START, 2, 9, END, 3, END]])
    by_number, old = pair()[0](ids), pair(eos_token_id=2)[0](ids)
    assert torch.equal(by_number.pooled, old.pooled)
    ids = torch.tensor([[START, 2, 9, 30, 3, 30]])  # no end mark: the first place, and the highest id
    expected = [theirs(input_ids=ids).pooler_output for _, theirs in (pair(), pair(eos_token_id=2))]
    found = [ours(ids).pooled for ours, _ in (pair(), pair(eos_token_id=2))]
    assert relative(found[0], expected[0]) < 1e-5 and relative(found[1], expected[1]) < 1e-5


def test_gradients() -> None:
    """For training along: the same gradient in every weight."""
    ours, theirs = (network.requires_grad_(True) for network in pair(hidden_act="gelu", layer_norm_eps=1e-4))
    ours(IDS).hidden_states[-1].square().mean().backward()
    theirs(input_ids=IDS, output_hidden_states=True).hidden_states[-1].square().mean().backward()
    expected = {"text_model." + name.removeprefix("text_model."): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if "final_layer_norm" not in name:
            assert p.grad is not None and relative(p.grad, expected[name]) < 1e-4, name


def test_new_weights_tell_texts_apart() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = CLIPTextModel(CLIPTextConfig(**SIZES), projection=True)
    spread = {name: float(t.std()) for name, t in tower.state_dict().items() if t.ndim == 2}
    assert spread["text_model.embeddings.token_embedding.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["text_model.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(48**-0.5, rel=0.1)
    assert spread["text_projection.weight"] == pytest.approx(24**-0.5, rel=0.2)
    pooled = tower(IDS).pooled
    assert torch.isfinite(pooled).all() and not torch.allclose(pooled[0], pooled[1])
