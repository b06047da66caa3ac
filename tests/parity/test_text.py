"""The text transformer against diffusers' LDMBertModel: same names in the same order, same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.networks.text import TextTransformer, TextTransformerConfig

ldm = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "max_position_embeddings": 11,
    "encoder_layers": 3,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "head_dim": 12,
    "d_model": 32,
}
IDS = torch.tensor([[1, 5, 6, 2, 0, 0, 0], [1, 9, 8, 7, 6, 5, 2]])


def pair() -> tuple[TextTransformer, Any]:
    """Ours with theirs' weights; weights larger than at the start, so that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = ldm.LDMBertModel(ldm.LDMBertConfig(**TINY)).eval()
        for p in theirs.parameters():
            p.data.normal_(std=0.4)
        ours = TextTransformer(TextTransformerConfig.from_dict(TINY)).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("to_logits.")}
    assert list(weights) == list(ours.state_dict())
    ours.load_state_dict(weights)
    return ours, theirs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_states() -> None:
    ours, theirs = pair()
    with torch.no_grad():
        assert relative(ours(IDS), theirs(IDS, return_dict=True).last_hidden_state) < 1e-5


def test_states_with_a_mask() -> None:
    ours, theirs = pair()
    mask = IDS != 0
    with torch.no_grad():
        expected = theirs(IDS, attention_mask=mask.long(), return_dict=True).last_hidden_state
        assert relative(ours(IDS, mask)[mask], expected[mask]) < 1e-5


def test_gradients() -> None:
    ours, theirs = pair()
    ours(IDS).square().mean().backward()
    theirs(IDS, return_dict=True).last_hidden_state.square().mean().backward()
    gradients = {k: p.grad for k, p in theirs.named_parameters() if not k.startswith("to_logits.")}
    for name, p in ours.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_default_config_is_theirs() -> None:
    theirs = ldm.LDMBertConfig()
    assert all(getattr(theirs, key) == value for key, value in TextTransformerConfig().to_dict().items())
