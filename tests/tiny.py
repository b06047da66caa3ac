"""Small things that many tests need: models, pictures and a recipe of a few kilobytes, and the command in-process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image

from sfumato.checkpoints.io import write_model
from sfumato.systems.ddpm import DDPM, DDPMConfig

PARQUET = Path(__file__).parent / "data" / "tiny64_32px.parquet"

NETWORK: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
}

RECIPE: dict[str, Any] = {
    "recipe": "ddpm",
    "data": {"path": "pictures", "size": 8, "label": "folder", "validation_fraction": 0.25},
    "model": {"network": NETWORK, "schedule": {"name": "cosine"}, "sampling": {"steps": 3, "guidance": 1.5}},
    "train": {
        "steps": 6,
        "batch": 4,
        "log_every": 1,
        "validate_every": 2,
        "sample_every": 3,
        "save_every": 2,
        "samples": 2,
        "sample_steps": 2,
        "optimizer": {"warmup": 2},
    },
}
"""Trains in about a second on the folder that `write_pictures` makes."""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Result:
    """Run `sfumato …` in this process, as its console script would."""
    from sfumato.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["sfumato", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments)
    assert result.code == 0, result
    return result


def model_config(labels: Sequence[str] = ("cat", "dog"), size: int = 8) -> DDPMConfig:
    return DDPMConfig(
        size=size,
        labels=tuple(labels),
        network=NETWORK,
        sampling={"steps": 3, "guidance": 1.5 if labels else 1.0},  # type: ignore[arg-type]
    )


def tiny_model(labels: Sequence[str] = ("cat", "dog"), size: int = 8) -> DDPM:
    """A model with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DDPM.create(model_config(labels, size))


def write_tiny_model(path: Path, labels: Sequence[str] = ("cat", "dog"), size: int = 8) -> Path:
    model = tiny_model(labels, size)
    write_model(path, model.tensors(), model.config.model_dump(mode="json"))
    return path


def picture(number: int, size: int = 16) -> Image.Image:
    """A noisy picture of its own."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write_pictures(folder: Path, count: int = 24, size: int = 16) -> Path:
    """`count` pictures in two class sub-folders."""
    for number in range(count):
        target = folder / ("cat", "dog")[number % 2] / f"{number:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).save(target)
    return folder


def write_captioned(folder: Path, count: int = 24, size: int = 16) -> Path:
    """`count` pictures with captions in `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        picture(number, size).save(folder / f"{number:02d}.png")
        text = f"{('red', 'blue', 'green')[number % 3]} {('heart', 'fish')[number % 2]}"
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
