"""Tiny first stages and latent runs: captioned noise of 16 pixels, networks of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.systems.config import parse
from sfumato.training import state
from sfumato.training.data import check_all, open_data
from sfumato.training.recipes.autoencoder import AutoencoderRecipe, AutoencoderTask
from sfumato.training.recipes.latent import LatentRecipe, LatentTask
from sfumato.training.trainer import Trainer

from .training_cases import CPU
from .training_cases import everything as first_network

CODEC: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}

PLAIN: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

CROSS: dict[str, Any] = PLAIN | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
}

JOINT: dict[str, Any] = {
    "kind": "joint",
    "captions": ["{text}"],
    "network": {
        "max_position_embeddings": 8,
        "encoder_layers": 1,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "head_dim": 4,
        "d_model": 8,
        "dropout": 0.0,
    },
}

FEW: dict[str, Any] = {
    "steps": 6, "batch": 4, "validate_every": 0, "sample_every": 0, "log_every": 1, "save_every": 1000,
    "optimizer": {"lr": 1e-3, "warmup": 2},
}  # fmt: skip


def codec_settings(pictures: Path, kind: str = "kl", **sections: dict[str, Any]) -> dict[str, Any]:
    """An autoencoder recipe as plain values, without perceptual loss and discriminator unless asked for."""
    network = CODEC | ({"num_vq_embeddings": 16} if kind == "vq" else {})
    values: dict[str, Any] = {
        "recipe": "autoencoder",
        "data": {"path": str(pictures), "size": 16},
        "model": {"kind": kind, "network": network},
        "loss": {"perceptual": 0.0},
        "discriminator": {"weight": 0.0},
        "train": FEW,
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return values


GAN: dict[str, Any] = {"weight": 0.5, "start": 2, "lead": 1, "ramp": 2, "layers": 1, "width": 8}


def autoencoder_recipe(values: dict[str, Any]) -> AutoencoderRecipe:
    recipe = parse(AutoencoderRecipe, values, "recipe")
    recipe.check()
    return recipe


def latent_settings(
    pictures: Path, stage: str | Path, *, train: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """A latent recipe as plain values; without conditions unless asked for."""
    return {
        "recipe": "latent",
        "data": {"path": str(pictures), "size": 16},
        "codec": str(stage),
        "conditions": {},
        "model": {
            "network": CROSS if "text" in own.get("conditions", {}) else PLAIN,
            "schedule": {"name": "cosine"},
            "prediction": {"parameterization": "v"},
            "sampling": {"sampler": "ddim", "steps": 2, "guidance": 2.0, "threshold": "none"},
        },
        "train": FEW | (train or {}),
    } | own  # fmt: skip


def latent_recipe(values: dict[str, Any]) -> LatentRecipe:
    recipe = parse(LatentRecipe, values, "recipe")
    recipe.check()
    return recipe


def task_for(recipe: AutoencoderRecipe | LatentRecipe) -> Any:
    """The task on the recipe's own data, every picture opened."""
    data, validation = open_data(recipe.data)
    for pictures in (data, validation):
        if pictures is not None:
            check_all(pictures)
    task: AutoencoderTask | LatentTask = recipe.task(data, validation)
    return task


def trainer_for(recipe: AutoencoderRecipe | LatentRecipe, run: Path) -> Trainer:
    """A trainer as a new process would make it."""
    return Trainer(task_for(recipe), recipe.train, run, CPU)


def resumed(recipe: AutoencoderRecipe | LatentRecipe, run: Path) -> Trainer:
    """A trainer as a new process would make it to go on with a run."""
    trainer = trainer_for(recipe, run)
    newest = state.newest(run)
    assert newest is not None
    trainer.resume(newest)
    return trainer


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes, memory and opponent included."""
    tensors = first_network(trainer) | {f"memory {n}": t.clone() for n, t in trainer.memory.items()}
    if trainer.opponent is not None:
        for what, own in zip(("opponent", "its optimizer"), trainer.opponent.tensors(), strict=True):
            tensors |= {f"{what} {n}": t.clone() for n, t in own.items()}
    return tensors


def smooth(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Pictures (count, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 2 - 1
