"""Checkpoints of a training run: whole or not at all, newest sound one first.

A checkpoint is a folder `checkpoints/step-00001000/` with `model.safetensors` and `ema.safetensors` (each a complete
model file), `optimizer.safetensors`, `state.json` and, written last, `manifest.json` with every file's size and SHA-256.
It is written under a temporary name and renamed; only then are older ones removed. Nothing in it is a pickle.

>>> import tempfile
>>> newest(tempfile.mkdtemp()) is None
True
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.io import explain_os_error, file_sha256, read_model, write_bytes, write_model
from sfumato.errors import ModelFileError, UserError

FOLDER = "checkpoints"
MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        tensors: weights as stored in a model file.
        average: the averaged weights, likewise.
        optimizer: the optimizer's tensors, "<parameter index>.<name>".
        state: numbers: step, EMA updates, gradient scale.
        config: the model's config, which travels inside both model files.
    """

    tensors: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: Mapping[str, Any]


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint for its step under `run` and prune to the newest `keep`. Returns its folder.

    Raises:
        UserError: when it cannot be written (a full disk); older checkpoints stay, nothing half-written is left.
    """
    final = run / FOLDER / f"step-{checkpoint.state['step']:08d}"
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"could not save {final}: {explain_os_error(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for _, old in _found(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    write_model(folder / MODEL, checkpoint.tensors, checkpoint.config)
    write_model(folder / AVERAGE, checkpoint.average, checkpoint.config)
    write_model(folder / OPTIMIZER, checkpoint.optimizer, {})
    write_bytes(folder / STATE, json.dumps(dict(checkpoint.state), indent=1, sort_keys=True).encode())
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(folder.iterdir())
    }
    write_bytes(folder / MANIFEST, json.dumps(files, indent=1).encode())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _found(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all finished checkpoints, newest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    steps = [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAME.match(p.name))]
    return sorted(steps, reverse=True)


def newest(run: str | Path) -> Path | None:
    """The newest sound checkpoint of a run, or None if it has none.

    Raises:
        ModelFileError: if there are checkpoints but not one of them is sound.
    """
    found = _found(Path(run))
    for _, folder in found:
        if damage(folder) is None:
            return folder
    if found:
        raise ModelFileError(f"none of the {len(found)} checkpoints in {run} is sound: {damage(found[0][1])}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is compared with the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest.items():
            file = folder / name
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                return f"{file} does not match its manifest"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{folder} has no readable manifest or misses a file"
    return None


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint back. Raises `ModelFileError` when it is not one, or is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFileError(f"no checkpoint at {folder}")
    if (problem := damage(folder)) is not None:
        raise ModelFileError(problem)
    model, average = read_model(folder / MODEL), read_model(folder / AVERAGE)
    optimizer = read_model(folder / OPTIMIZER)
    state = json.loads((folder / STATE).read_text())
    return Checkpoint(model.tensors, average.tensors, optimizer.tensors, state, model.config or {})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "<index of the parameter>.<entry>"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entries in state.items() for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put stored tensors back into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
