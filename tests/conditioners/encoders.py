"""Small encoders for the tests of conditioners."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sfumato.conditioners import words
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.conditioners.joint import JointText
from sfumato.conditioners.minilm import MiniLM
from sfumato.conditioners.words import Tokenizer
from sfumato.networks.text import TextTransformerConfig

MERGES = ("c a", "ca t</w>", "r e", "re d</w>", "h e", "he a", "hea r", "hear t</w>")


@functools.cache
def minilm() -> MiniLM:
    """The packaged encoder, loaded once."""
    return MiniLM()


def minilm_folder() -> Path:
    """Where it lies."""
    return words.minilm_folder()


def joint(tokenizer: Tokenizer, padding: Any = "longest") -> JointText:
    """A random joint encoder without dropout."""
    config = TextTransformerConfig(
        vocab_size=tokenizer.size,
        max_position_embeddings=12,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=24,
        dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return JointText(tokenizer, config, padding)


def clip_vocabulary() -> dict[str, int]:
    """CLIP's order: letters, letters at a word's end, merges, start, end."""
    letters = "abcdefghijklmnopqrstuvwxyz,!"
    merged = [merge.replace(" ", "") for merge in MERGES]
    entries = [*letters, *(f"{c}</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(entries)}


def clip_config(**changes: Any) -> dict[str, Any]:
    """A tiny text tower's config.json."""
    vocabulary = clip_vocabulary()
    end = vocabulary["<|endoftext|>"]
    return {
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "hidden_act": "quick_gelu",
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "float32",
        **changes,
    }


def clip_tower(**changes: Any) -> Any:
    """transformers' tower of that config with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    values = {k: v for k, v in clip_config(**changes).items() if k not in ("torch_dtype", "model_type")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModel(CLIPTextConfig(**values)).eval()


def write_clip(folder: Path, *, pad: str = "<|endoftext|>", dtype: torch.dtype = torch.float32) -> Path:
    """A folder in diffusers' layout with the names that published files have (`text_model.…`, `position_ids`)."""
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    encoder.mkdir(), tokenizer.mkdir()
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": t.to(dtype).contiguous()
        for name, t in clip_tower().state_dict().items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    (encoder / "config.json").write_text(json.dumps(clip_config()))
    (tokenizer / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {**marks, "pad_token": pad, "tokenizer_class": "CLIPTokenizer", "model_max_length": 10}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def clip_prompt() -> ClipPrompt:
    """A text tower of Stable Diffusion 1's kind, with random weights."""
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return ClipPrompt(tower, pad=49407)
