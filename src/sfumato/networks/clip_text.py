"""CLIP's text tower (Radford 2021, section 2.4), with the names and meanings of transformers' `CLIPTextModel`.

Embeddings of tokens and places, pre-norm layers in which a token attends to those before it and to itself, a last norm.
The pooled output is the last state at the end mark, after that norm. No mask hides padding unless one is given.

>>> import torch
>>> config = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
...                         num_attention_heads=2, max_position_embeddings=5, eos_token_id=8)
>>> found = CLIPTextModel(config)(torch.tensor([[7, 3, 8, 8]]))
>>> [tuple(states.shape) for states in found.hidden_states], tuple(found.pooled.shape)
([(1, 4, 8), (1, 4, 8), (1, 4, 8)], (1, 8))
>>> end_marks(torch.tensor([[7, 3, 8, 8]]), 8)
tensor([2])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError, raise_unknown
from sfumato.networks.config import NetworkConfig
from sfumato.networks.outline import made_on

_NOTES = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, of the same shape: the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_python": F.gelu, "gelu_new": _tanh_gelu, "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu, "gelu_python_tanh": _tanh_gelu, "gelu_accurate": _tanh_gelu, "relu": F.relu,
    "relu6": F.relu6, "silu": F.silu, "swish": F.silu, "mish": F.mish, "hardswish": F.hardswish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip
"""What stands between the layers of a perceptron, by transformers' names."""


@dataclass(frozen=True)
class CLIPTextConfig(NetworkConfig):
    """transformers' fields of `CLIPTextConfig`, with its meanings and defaults.

    `attention_dropout` acts in training. `dropout` and the two of `initializer` change nothing; files have them.

    Raises:
        UserError: for sizes that do not fit one another, and an unknown activation.
    """

    called: ClassVar[str] = "text encoder"
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    model_type: str = "clip_text_model"

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers must be 1 or more, got {self.num_hidden_layers}")
        if self.hidden_act not in list(ACTIVATIONS):
            raise_unknown("hidden_act", str(self.hidden_act), list(ACTIVATIONS))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON, less what transformers notes there of other things; an unknown key is refused."""
        return super().from_dict({key: value for key, value in values.items() if key not in _NOTES})

    def tensors(self) -> dict[str, Tensor]:
        """Names and shapes of the tower's weights, `text_model.…`, as tensors on "meta"."""
        return dict(_state_on_meta(self))


@lru_cache(maxsize=8)
def _state_on_meta(config: CLIPTextConfig) -> dict[str, Tensor]:
    with made_on("meta"):
        return dict(CLIPTextModel(config).state_dict())


class CLIPTextStates(NamedTuple):
    """What the tower makes of a text.

    Attributes:
        hidden_states: (B, L, C) of the embeddings and after every layer, all before the last norm.
        pooled: (B, C) at the end mark after the last norm, or (B, P) where it is projected.
    """

    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


def end_marks(ids: Tensor, eos: int) -> Tensor:
    """Places (B,) of the end mark in ids (B, L): its first, or the highest id's where `eos` is 2 (old configs)."""
    return ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)


def visible(keep: Tensor) -> Tensor:
    """What may be attended to, bool (B, 1, L, L): where `keep` (B, L) is not 0, and nothing that comes later."""
    length = keep.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril()
    return causal & keep.bool()[:, None, None, :]


class CLIPTextEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, C)."""
        return cast(Tensor, self.token_embedding(ids)) + self.position_embedding.weight[: ids.shape[-1]]


class CLIPAttention(nn.Module):
    """Self-attention; without a mask a token sees those before it and itself."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C); `mask` as `visible` makes it."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        rate = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class CLIPMLP(nn.Module):
    """Two linear layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return cast(Tensor, self.fc2(self.activation(self.fc1(x))))


class CLIPEncoderLayer(nn.Module):
    """Attention and perceptron, each after a norm and added to what came."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return cast(Tensor, x + self.mlp(self.layer_norm2(x)))


class CLIPEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """(B, L, C) -> what it began with, and what every layer made of it."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


class CLIPTextTransformer(nn.Module):
    """The tower without a projection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos = config.eos_token_id

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> CLIPTextStates:
        """As `CLIPTextModel`, the pooled output as it is."""
        states = self.encoder(self.embeddings(ids), None if keep is None else visible(keep))
        rows = torch.arange(len(ids), device=ids.device)
        return CLIPTextStates(states, self.final_layer_norm(states[-1][rows, end_marks(ids, self.eos)]))


class CLIPTextModel(nn.Module):
    """transformers' `CLIPTextModel`, or with a projection its `CLIPTextModelWithProjection`.

    New weights have the spread that Radford 2021 (the published code) begins with, from torch's global generator.

    Args:
        config: of the tower.
        projection: whether the pooled output is projected to `projection_dim` numbers.

    Attributes:
        config: as given.
    """

    def __init__(self, config: CLIPTextConfig, *, projection: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None
        )
        for name, weight in self.named_parameters():
            if (spread := _spread(name, config)) is not None:
                nn.init.normal_(weight, std=spread)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> CLIPTextStates:
        """Read texts.

        Args:
            ids: (B, L) int64, L at most `max_position_embeddings`.
            keep: (B, L), 0 at tokens that no other attends to; None where all are seen.
        """
        found = cast(CLIPTextStates, self.text_model(ids, keep))
        return found if self.text_projection is None else found._replace(pooled=self.text_projection(found.pooled))


def _spread(name: str, config: CLIPTextConfig) -> float | None:
    """The deviation of a new tensor, None for what torch begins well: norms and biases."""
    width = config.hidden_size
    depth = (2 * config.num_hidden_layers) ** -0.5
    spreads = {
        "token_embedding.weight": 0.02, "position_embedding.weight": 0.01, "out_proj.weight": width**-0.5 * depth,
        "q_proj.weight": width**-0.5, "k_proj.weight": width**-0.5, "v_proj.weight": width**-0.5,
        "fc1.weight": (2 * width) ** -0.5, "fc2.weight": width**-0.5 * depth, "text_projection.weight": width**-0.5,
    }  # fmt: skip
    return next((spread for ending, spread in spreads.items() if name.endswith(ending)), None)
