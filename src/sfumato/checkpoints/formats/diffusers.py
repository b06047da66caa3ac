"""Folders in diffusers' layout: one sub-folder per component, each with `config.json` and safetensors weights.

>>> is_pipeline("/nowhere")
False
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints.io import read_model
from sfumato.errors import ModelFileError

INDEX = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors")
_MAX_JSON = 2**20


@dataclass(frozen=True)
class Component:
    """A network of a pipeline: its JSON config, its tensors and the SHA-256 of their file."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder looks like a diffusers pipeline."""
    return (Path(folder) / INDEX).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises `ModelFileError` when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path} is larger than a config can be")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing") from None
    except (OSError, ValueError):
        raise ModelFileError(f"{path} is not readable JSON") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return values


def read_component(folder: Path) -> Component:
    """A component's config and weights (safetensors only)."""
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        pickles = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
        raise ModelFileError(f"{folder} holds no safetensors weights ({_WEIGHTS[0]}){hint}")
    file = read_model(weights)
    return Component(read_json(folder / "config.json"), file.tensors, file.sha256)
