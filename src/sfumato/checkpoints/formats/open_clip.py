"""CLIP's text tower in single files: under transformers' own names (Stable Diffusion 1), or under OpenCLIP's (2).

OpenCLIP keeps the rows of q, k and v in one tensor, and the projection of the pooled text transposed. Stable Diffusion
2 uses the states before the last of 24 layers, so that our network has 23 and the last layer's tensors are left aside.

>>> import torch
>>> config = CLIPTextConfig(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
>>> ours, unmatched = open_clip_map(config).to_ours({"transformer.resblocks.0.attn.in_proj_bias": torch.arange(12)})
>>> ours["text_model.encoder.layers.0.self_attn.k_proj.bias"].tolist(), unmatched
([4, 5, 6, 7], [])
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.keymap import THIRDS, TRANSPOSED, Ignored, KeyMap, Rule
from sfumato.networks.clip_text import CLIPTextConfig

CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12, bos_token_id=0, eos_token_id=2
)
"""The text tower of Stable Diffusion 1 (OpenAI's CLIP ViT-L/14)."""
OPEN_CLIP_H = replace(
    CLIP_L,
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
