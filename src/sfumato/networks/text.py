"""The text transformer that latent diffusion trains with its UNet (Rombach 2022, appendix E.2: "BERTEmbedder").

Learned positions, pre-norm layers of self-attention (its inner width is heads x head_dim whatever the width) and a GELU
feed-forward, a last norm. Names are diffusers' of `LDMBertModel`, less its `to_logits`, which no picture needs.

>>> import torch
>>> config = TextTransformerConfig(vocab_size=50, max_position_embeddings=9, encoder_layers=1, encoder_ffn_dim=64,
...                                encoder_attention_heads=2, head_dim=8, d_model=16)
>>> TextTransformer(config)(torch.zeros(2, 5, dtype=torch.int64)).shape
torch.Size([2, 5, 16])
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import attention_kernel
from sfumato.networks.config import NetworkConfig


@dataclass(frozen=True)
class TextTransformerConfig(NetworkConfig):
    """diffusers' fields of `LDMBertConfig`, with its meanings and defaults (those of the 1.4 billion model).

    `dropout` acts on the embeddings and on every branch's end, `activation_dropout` inside the feed-forward.
    """

    called: ClassVar[str] = "text network"
    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280
    dropout: float = 0.1
    activation_dropout: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("dropout"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                    raise UserError(f"{f.name} must lie in [0, 1), got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{f.name} must be a whole number of 1 or more, got {value!r}")


class TextAttention(nn.Module):
    """Self-attention of heads x head_dim; q, k, v without bias."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.encoder_attention_heads, config.head_dim
        inner = self.heads * self.head_dim
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C); `mask` (B, 1, 1, L) bool, True where a token may be attended to."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        out = attention_kernel()(q, k, v, mask, self.head_dim**-0.5)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class TextLayer(nn.Module):
    """Pre-norm self-attention and feed-forward. `final_layer_norm` stands before the feed-forward."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.self_attn = TextAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), self.dropout, self.training)
        hidden = F.dropout(F.gelu(self.fc1(self.final_layer_norm(x))), self.activation_dropout, self.training)
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)


class TextEncoderStack(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.embed_positions.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L) -> (B, L, C)."""
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, mask)
        return cast(Tensor, self.layer_norm(x))


class TextTransformer(nn.Module):
    """Token ids -> states. Weights of diffusers' `LDMBertModel` load by the identity map, `to_logits` left out."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextEncoderStack(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            ids: (B, L) int64, L at most max_position_embeddings.
            mask: (B, L) bool, True where a token is real; None: all are (latent diffusion reads its padding).

        Returns:
            (B, L, d_model); at masked places of no meaning.
        """
        if ids.ndim != 2 or ids.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"ids must be (B, L), L at most {self.config.max_position_embeddings}, got {tuple(ids.shape)}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise UserError(f"mask must be {tuple(ids.shape)} as ids, got {tuple(mask.shape)}")
        return cast(Tensor, self.model(ids, None if mask is None else mask[:, None, None, :]))
