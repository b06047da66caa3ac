"""A text transformer that is trained together with the picture network, as latent diffusion's BERT (Rombach 2022).

Its tokens are the words of the training captions, kept in the model's own config, or BERT's word pieces.

>>> words = WordVocabulary.from_texts(["a red heart"])
>>> small = TextTransformerConfig(vocab_size=words.size, max_position_embeddings=12, encoder_layers=1,
...     encoder_ffn_dim=32, encoder_attention_heads=2, head_dim=8, d_model=16)
>>> [tuple(one.shape) for one in JointText(words, small).states(["red heart", ""])]
[(4, 16), (2, 16)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.conditioners.base import check_keys
from sfumato.conditioners.words import Tokenizer, WordVocabulary, quoted, tokenizer_from_config
from sfumato.errors import UserError, raise_unknown
from sfumato.networks.text import TextTransformer, TextTransformerConfig

__all__ = ["JointText", "TextTransformerConfig", "WordVocabulary"]

Padding = Literal["longest", "full"]


class JointText:
    """Texts -> states of a `TextTransformer`, with gradients where they are enabled.

    Args:
        tokenizer: text -> ids; its size must be the network's `vocab_size`.
        config: the network's.
        padding: "longest": padding is masked out and does not change a state. "full": every text is padded to
            `max_position_embeddings` and padding is read as tokens, as in latent diffusion's own models.
    """

    kind = "joint"

    def __init__(self, tokenizer: Tokenizer, config: TextTransformerConfig, padding: Padding = "longest") -> None:
        if config.vocab_size != tokenizer.size:
            raise UserError(f"vocab_size must be the tokenizer's {tokenizer.size}, got {config.vocab_size}")
        if config.max_position_embeddings < 2:
            raise UserError("max_position_embeddings must leave room for the start and end mark: 2 or more")
        if padding not in ("longest", "full"):
            raise_unknown("padding", str(padding), ["longest", "full"])
        self.tokenizer, self.padding = tokenizer, padding
        self.network = TextTransformer(config)

    @property
    def width(self) -> int:
        """C."""
        return self.network.config.d_model

    @property
    def max_tokens(self) -> int:
        """The number of learned positions."""
        return self.network.config.max_position_embeddings

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(L_i, C) per text, start and end mark included; ("full": L_i = max_tokens).

        Raises:
            UserError: for words that the tokenizer does not know, naming them, and for a text that is too long.
        """
        rows = [self._ids(text) for text in texts]
        length = self.max_tokens if self.padding == "full" else max(len(row) for row in rows)
        device = self.network.model.embed_tokens.weight.device
        ids = torch.tensor([row + [self.tokenizer.pad] * (length - len(row)) for row in rows], device=device)
        if self.padding == "full":
            return list(self.network(ids).float().unbind())
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(length, device=device) < lengths[:, None]
        states = self.network(ids, mask).float()
        return [one[: len(row)] for one, row in zip(states, rows, strict=True)]

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.ids(text)
        if len(ids) > self.max_tokens:
            raise UserError(
                f"the prompt {quoted([text])} has {len(ids)} tokens; this model reads at most {self.max_tokens}"
            )
        return ids

    def describe(self) -> dict[str, Any]:
        """Network, tokenizer and padding."""
        return {
            "kind": self.kind,
            "network": self.network.config.to_dict(),
            "tokenizer": self.tokenizer.describe(),
            "padding": self.padding,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> JointText:
        """From `describe`, freshly initialised."""
        check_keys(config, ("kind", "network", "tokenizer", "padding"), "the text encoder's config")
        tokenizer = tokenizer_from_config(config["tokenizer"])
        return cls(tokenizer, TextTransformerConfig.from_dict(config["network"]), config["padding"])
