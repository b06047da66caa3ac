"""CLIP's text tower: what a token sees, where the pooled output is taken, and configs that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.errors import UserError
from sfumato.networks.clip_text import CLIPTextConfig, CLIPTextModel, end_marks, visible

TINY = CLIPTextConfig(
    vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=5,
    max_position_embeddings=6, eos_token_id=19,
)  # fmt: skip


def tower(**options: Any) -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModel(TINY, **options).eval().requires_grad_(False)


def test_a_token_sees_none_that_come_later() -> None:
    one, two = tower()(torch.tensor([[18, 3, 4, 19], [18, 3, 5, 19]])).hidden_states[-1]
    assert torch.equal(one[:2], two[:2]) and not torch.allclose(one[2:], two[2:])


def test_a_mask_of_ones_is_none() -> None:
    ids = torch.tensor([[18, 3, 4, 19]])
    for a, b in zip(tower()(ids).hidden_states, tower()(ids, torch.ones(1, 4)).hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    seen = visible(torch.tensor([[1, 0, 1]]))
    assert seen.tolist() == [[[[True, False, False], [True, False, False], [True, False, True]]]]


def test_where_the_text_ends() -> None:
    ids = torch.tensor([[18, 2, 19, 19], [18, 2, 5, 19]])
    assert end_marks(ids, 19).tolist() == end_marks(ids, 2).tolist() == [2, 3]
    network = tower()
    found = network(ids)
    last = network.text_model.final_layer_norm(found.hidden_states[-1])
    torch.testing.assert_close(found.pooled, torch.stack([last[0, 2], last[1, 3]]))
    assert tower(projection=True)(ids).pooled.shape == (2, 5)


def test_names_and_shapes() -> None:
    seen = TINY.tensors()
    own = tower().state_dict()
    assert {name: t.shape for name, t in seen.items()} == {name: t.shape for name, t in own.items()}
    assert all(t.is_meta for t in seen.values()) and all(name.startswith("text_model.") for name in seen)
    assert set(tower(projection=True).state_dict()) - set(own) == {"text_projection.weight"}
    assert CLIPTextConfig.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_act": "gelluu"}, "did you mean 'gelu'"),
        ({"hidden_act": ["gelu"]}, "unknown hidden_act"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "not a multiple"),
        ({"num_hidden_layers": 0}, "1 or more"),
        ({"hiden_size": 8}, "hidden_size"),
        ({"hidden_size": "8"}, "wrong type"),
    ],
)
def test_configs_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CLIPTextConfig.from_dict(values)
