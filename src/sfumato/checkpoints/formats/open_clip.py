"""CLIP's text tower in single files: under transformers' own names (Stable Diffusion 1), or under OpenCLIP's (2).

OpenCLIP keeps the rows of q, k and v in one tensor, and the projection of the pooled text transposed. Stable Diffusion
2 uses the states before the last of 24 layers, so that our network has 23 and the last layer's tensors are left aside.

>>> config = CLIPTextConfig(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
>>> ours, unmatched = open_clip_map(config).to_ours({"transformer.resblocks.0.attn.in_proj_bias": torch.arange(12)})
>>> ours["text_model.encoder.layers.0.self_attn.k_proj.bias"].tolist(), unmatched
([4, 5, 6, 7], [])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.keymap import THIRDS, TRANSPOSED, Ignored, KeyMap, Rule
from sfumato.errors import UserError, raise_unknown

_NOTES = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class CLIPTextConfig:
    """transformers' fields of `CLIPTextConfig`, with its meanings; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    model_type: str = "clip_text_model"

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers must be 1 or more, got {self.num_hidden_layers}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """From JSON; an unknown key is refused with the nearest name."""
        known = [f.name for f in fields(cls)]
        given = {key: value for key, value in values.items() if key not in _NOTES}
        for key in given:
            if key not in known:
                raise_unknown("text encoder key", key, known)
        try:
            return cls(**given)
        except TypeError as error:
            raise UserError(f"the text encoder's config has a value of the wrong type ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the content of `text_encoder/config.json`."""
        return asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Names and shapes of the tower's weights, as tensors on "meta"."""
        width, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.token_embedding.weight": (self.vocab_size, width),
            "embeddings.position_embedding.weight": (self.max_position_embeddings, width),
        }
        for n in range(self.num_hidden_layers):
            layer = f"encoder.layers.{n}"
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes |= _affine(f"{layer}.self_attn.{part}", (width, width))
            shapes |= _affine(f"{layer}.layer_norm1", (width,))
            shapes |= _affine(f"{layer}.mlp.fc1", (inner, width))
            shapes |= _affine(f"{layer}.mlp.fc2", (width, inner))
            shapes |= _affine(f"{layer}.layer_norm2", (width,))
        shapes |= _affine("final_layer_norm", (width,))
        return {f"text_model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


CLIP_L = CLIPTextConfig()
"""The text tower of Stable Diffusion 1 (OpenAI's CLIP ViT-L/14)."""
OPEN_CLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=512,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
"""The text tower of Stable Diffusion 2 (OpenCLIP's ViT-H/14), without its last layer."""


def clip_map(*, flat: bool = False) -> KeyMap:
    """Stable Diffusion 1's tower, which has transformers' names already.

    Args:
        flat: for files whose names lack `text_model.`.
    """
    if not flat:
        return KeyMap([Rule("text_model.{rest}", "text_model.{rest}")])
    parts = ("embeddings", "encoder", "final_layer_norm")
    return KeyMap(Rule(part + ".{rest}", f"text_model.{part}.{{rest}}") for part in parts)


def open_clip_map(config: CLIPTextConfig, *, projection: bool = False) -> KeyMap:
    """OpenCLIP's names of a tower; with the projection of the pooled text where it is asked for."""
    rules = [
        Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule("token_embedding.{p}", "text_model.embeddings.token_embedding.{p}"),
        Rule("ln_final.{p}", "text_model.final_layer_norm.{p}"),
    ]
    for n in range(config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
        thirds = tuple(f"{ours}.self_attn.{part}_proj.{{p}}" for part in "qkv")
        rules += [
            Rule(f"{theirs}.ln_1.{{p}}", f"{ours}.layer_norm1.{{p}}"),
            Rule(f"{theirs}.attn.in_proj_{{p}}", thirds, THIRDS),
            Rule(f"{theirs}.attn.out_proj.{{p}}", f"{ours}.self_attn.out_proj.{{p}}"),
            Rule(f"{theirs}.ln_2.{{p}}", f"{ours}.layer_norm2.{{p}}"),
            Rule(f"{theirs}.mlp.c_fc.{{p}}", f"{ours}.mlp.fc1.{{p}}"),
            Rule(f"{theirs}.mlp.c_proj.{{p}}", f"{ours}.mlp.fc2.{{p}}"),
        ]
    if projection:
        rules.append(Rule("text_projection", "text_projection.weight", TRANSPOSED))
    return KeyMap(rules)


def ignored_of_open_clip(config: CLIPTextConfig) -> tuple[Ignored, ...]:
    """What OpenCLIP's towers hold besides: the layer after the kept ones, the projection, and CLIP's temperature."""
    last = rf"transformer\.resblocks\.{config.num_hidden_layers}\..+"
    return (
        Ignored(last, "the text encoder's last layer, whose output the network was not trained with"),
        Ignored("text_projection|logit_scale", "CLIP's comparison of texts with pictures"),
        Ignored("attn_mask", "a table that follows from the config"),
    )
