"""Properties of the text transformer that hold without any reference to compare with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sfumato.errors import UserError
from sfumato.networks.text import TextTransformer, TextTransformerConfig

TINY = TextTransformerConfig(
    vocab_size=30,
    max_position_embeddings=7,
    encoder_layers=2,
    encoder_ffn_dim=32,
    encoder_attention_heads=3,
    head_dim=8,
    d_model=20,
)


def build(config: TextTransformerConfig = TINY) -> TextTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextTransformer(config).eval()


IDS = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 9, 8, 7, 6, 2]])


def test_shape_and_names() -> None:
    network = build()
    assert network(IDS).shape == (2, 6, 20)
    assert "model.layers.1.self_attn.out_proj.bias" in network.state_dict()
    assert "model.layers.1.self_attn.q_proj.bias" not in network.state_dict()


def test_inner_width_is_heads_times_head_dim() -> None:
    assert build().state_dict()["model.layers.0.self_attn.q_proj.weight"].shape == (24, 20)


def test_masked_tokens_do_not_count() -> None:
    network, mask = build(), IDS != 0
    other = IDS.where(mask, torch.tensor(17))
    torch.testing.assert_close(network(IDS, mask)[0, :4], network(other, mask)[0, :4], rtol=0, atol=0)
    torch.testing.assert_close(network(IDS, mask)[0, :4], network(IDS[:1, :4])[0], rtol=0, atol=1e-5)
    assert not torch.allclose(network(IDS)[0, :4], network(other)[0, :4])


def test_order_counts_in_both_directions() -> None:
    network = build()
    first, last = IDS.clone(), IDS.clone()
    first[:, 0], last[:, -1] = 20, 21
    assert not torch.allclose(network(first)[:, -1], network(IDS)[:, -1])
    assert not torch.allclose(network(last)[:, 0], network(IDS)[:, 0])
    assert not torch.allclose(network(IDS.flip(1)).flip(1), network(IDS))


@pytest.mark.parametrize("name", ["dropout", "activation_dropout"])
def test_dropout_acts_in_training_only(name: str) -> None:
    config = dataclasses.replace(TINY, **{"dropout": 0.0, name: 0.5})
    network = build(config)
    still = network(IDS)
    assert torch.equal(network(IDS), still)
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert not torch.allclose(network(IDS), still)


def test_embeddings_start_small() -> None:
    weights = build(dataclasses.replace(TINY, vocab_size=2000)).state_dict()
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_config_round_trip() -> None:
    assert TextTransformerConfig.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"d_modle": 3}, r"unknown text network key 'd_modle' \(did you mean 'd_model'\?\)"),
        ({"d_model": 0}, "d_model must be a whole number of 1 or more, got 0"),
        ({"head_dim": 2.5}, r"head_dim must be a whole number of 1 or more, got 2\.5"),
        ({"encoder_layers": True}, "encoder_layers must be a whole number of 1 or more, got True"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"activation_dropout": "x"}, r"activation_dropout must lie in \[0, 1\), got 'x'"),
    ],
)
def test_wrong_configs(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TextTransformerConfig.from_dict(values)


def test_wrong_inputs() -> None:
    with pytest.raises(UserError, match=r"ids must be \(B, L\), L at most 7, got \(1, 8\)"):
        build()(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(UserError, match=r"mask must be \(2, 6\) as ids, got \(2, 5\)"):
        build()(IDS, torch.ones(2, 5, dtype=torch.bool))
