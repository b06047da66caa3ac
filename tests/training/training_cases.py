"""Tiny runs: noisy pictures in two classes, a network of a few thousand weights, a trainer in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.systems.config import parse
from sfumato.training import state
from sfumato.training.data import check_all, open_data
from sfumato.training.recipes.ddpm import DDPMRecipe, DDPMTask
from sfumato.training.trainer import Trainer

CPU = torch.device("cpu")

NETWORK: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}


def write_pictures(folder: Path, count: int = 10, size: int = 8) -> Path:
    """`count` pictures in the class folders `bird` and `fish`."""
    for i in range(count):
        target = folder / ("bird", "fish")[i % 2] / f"{i:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(values).save(target)
    return folder


def settings(data: Path, **train: Any) -> dict[str, Any]:
    """A recipe as plain values; keyword arguments go into `train`."""
    few = {"steps": 8, "batch": 4, "validate_every": 0, "sample_every": 0, "log_every": 1, "save_every": 1000}
    return {
        "recipe": "ddpm",
        "data": {"path": str(data), "size": 8, "label": "folder"},
        "model": {
            "network": NETWORK,
            "schedule": {"name": "cosine"},
            "prediction": {"parameterization": "v"},
            "sampling": {"steps": 2},
        },
        "train": {**few, "optimizer": {"lr": 1e-3, "warmup": 2}, **train},
    }


def recipe_from(values: dict[str, Any]) -> DDPMRecipe:
    return parse(DDPMRecipe, values, "recipe")


def trainer_for(recipe: DDPMRecipe, run: Path) -> Trainer:
    """A trainer as a new process would make it."""
    data, validation = open_data(recipe.data)
    for pictures in (data, validation):
        if pictures is not None:
            check_all(pictures)
    return Trainer(DDPMTask(recipe, data, validation), recipe.train, run, CPU)


def resumed(recipe: DDPMRecipe, run: Path) -> Trainer:
    """A trainer as a new process would make it to go on with a run."""
    trainer = trainer_for(recipe, run)
    newest = state.newest(run)
    assert newest is not None
    trainer.resume(newest)
    return trainer


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes: weights, averages, optimizer state, counters."""
    tensors = {f"weights {n}": t.clone() for n, t in trainer.task.network.state_dict().items()}
    tensors |= {f"average {n}": t.clone() for n, t in trainer.ema.averages.items()}
    tensors |= {f"optimizer {n}": t.clone() for n, t in state.optimizer_tensors(trainer.optimizer).items()}
    if trainer.history is not None:
        tensors |= {f"history {n}": t for n, t in trainer.history.tensors().items()}
    return tensors | {"counters": torch.tensor([trainer.step, trainer.ema.updates])}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    unequal = [name for name in left if not torch.equal(left[name], right[name])]
    assert not unequal, f"{len(unequal)} of {len(left)} differ, first {unequal[0]}"


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }
