"""Stable Diffusion small enough for tests: published layouts, networks of some hundred kilobytes, CLIP's vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sfumato.checkpoints.formats.families import Family
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import config_of, write_single_file

from .checkpoints.compvis_names import tiny_family


def family(name: str = "sd1") -> Family:
    """A published layout whose text tower reads CLIP's vocabulary, for pictures of 64 (upscalers: 32) pixels."""
    tiny = tiny_family(name)
    text = replace(tiny.text, vocab_size=49408, hidden_size=16, intermediate_size=24, max_position_embeddings=77)
    unet = replace(tiny.unet, num_class_embeds=1000 if tiny.unet.num_class_embeds else None)
    size = 8 * 2 ** (len(tiny.vae.block_out_channels) - 1)
    return replace(tiny, unet=unet, text=text, size=size)


def model(name: str = "sd1", seed: int = 0) -> Latent:
    """A model of that layout with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Latent.create(config_of(family(name)))
        for network in made.networks().values():
            for tensor in network.parameters():
                if tensor.ndim == 1:  # norms and biases of a new network are all alike, those of a trained one are not
                    tensor.data += 0.1 * torch.randn(tensor.shape)
    for network in made.networks().values():
        network.eval()
    return made


def write(path: Path, name: str = "sd1", seed: int = 0, dtype: torch.dtype | None = None) -> Path:
    """Such a model as a single file."""
    write_single_file(model(name, seed), path, dtype)
    return path
