"""Checkpoints of a training run: whole or not at all, newest sound one first.

A checkpoint is a folder `checkpoints/step-00001000/` with `model.safetensors` and `ema.safetensors` (each a complete
model file), `optimizer.safetensors`, `state.json` and, written last, `manifest.json` with the size and SHA-256 of every
file. It is written under a temporary name, read back and compared, and renamed; only then are older ones removed. A
checkpoint of the same step steps aside as `step-00001000.old` meanwhile. Nothing in it is a pickle.

>>> import tempfile
>>> newest(tempfile.mkdtemp()) is None
True
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
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
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_TEMPORARY = re.compile(r"step-\d{8,}\.(tmp-\d+|gone)")
_COUNTS = ("step", "ema_updates", "pictures")  # what `state.json` must hold, as whole numbers


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        tensors: weights as stored in a model file.
        average: the averaged weights, likewise.
        optimizer: the optimizer's tensors, "<parameter index>.<name>"; and importance sampling's losses, "history.…".
        state: numbers: step, EMA updates, number of pictures, gradient scale.
        config: the model's config, which travels inside both model files.
    """

    tensors: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: Mapping[str, Any]


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint for its step under `run` and prune to `keep`: this one and the newest. Returns its folder.

    Raises:
        UserError: when it cannot be written (a full disk); older checkpoints stay, nothing half-written is left.
    """
    final = run / FOLDER / f"step-{checkpoint.state['step']:08d}"
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        _clear_left_over(final.parent)
        temporary.mkdir(parents=True)
        _write_files(temporary, checkpoint)
        if (problem := damage(temporary)) is not None:
            raise UserError(f"could not save {final}: the disk did not keep what was written ({problem})")
        _put_in_place(temporary, final)
    except OSError as error:
        raise UserError(f"could not save {final}: {explain_os_error(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    others = [folder for _, _, folder in _found(run) if folder != final]
    for old in others[keep - 1 :]:
        _remove(old)
    return final


def _clear_left_over(folder: Path) -> None:
    """Remove what processes that were killed while saving have left half-written."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    state = json.dumps(dict(checkpoint.state), indent=1, sort_keys=True).encode()
    sums = {
        MODEL: write_model(folder / MODEL, checkpoint.tensors, checkpoint.config),
        AVERAGE: write_model(folder / AVERAGE, checkpoint.average, checkpoint.config),
        OPTIMIZER: write_model(folder / OPTIMIZER, checkpoint.optimizer, {}),
        STATE: hashlib.sha256(state).hexdigest(),
    }
    write_bytes(folder / STATE, state)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in sums.items()}
    write_bytes(folder / MANIFEST, json.dumps(files, indent=1).encode())
    _sync_folder(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step is removed only after the new one has its name."""
    replaced = final.with_name(f"{final.name}.old")
    if final.exists():
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    _remove(replaced)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; its name goes first, so that none is ever found half removed."""
    if folder.exists():
        nameless = folder.with_name(f"{folder.name.removesuffix('.old')}.gone")
        with suppress(OSError):  # what cannot be removed now is tried again after the next save
            shutil.rmtree(nameless, ignore_errors=True)
            os.rename(folder, nameless)
        shutil.rmtree(nameless, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _found(run: Path) -> list[tuple[int, bool, Path]]:
    """(step, not replaced, folder) of all finished checkpoints, newest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    steps = [(int(m[1]), m[2] is None, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(steps, reverse=True)


def newest(run: str | Path, passed_over: Callable[[str], object] = str) -> Path | None:
    """The newest sound checkpoint of a run, or None if it has none.

    Args:
        passed_over: told what is wrong with each newer one that is not sound.

    Raises:
        ModelFileError: if there are checkpoints but not one of them is sound.
    """
    problems: list[str] = []
    for _, _, folder in _found(Path(run)):
        problem = damage(folder)
        if problem is None:
            for text in problems:
                passed_over(text)
            return folder
        problems.append(problem)
    if problems:
        raise ModelFileError(f"none of the {len(problems)} checkpoints in {run} is sound: {problems[0]}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is compared with the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.keys() != {MODEL, AVERAGE, OPTIMIZER, STATE}:
            return f"{folder / MANIFEST} does not name the files of a checkpoint"
        for name, entry in manifest.items():
            file = folder / name
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                return f"{file} does not match its manifest"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
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
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for name in _COUNTS:
        if not isinstance(state, dict) or not isinstance(state.get(name), int) or state[name] < 0:
            raise ModelFileError(f"{folder / STATE} must hold {name!r} as a whole number")
    return Checkpoint(model.tensors, average.tensors, optimizer.tensors, state, model.config or {})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "<index of the parameter>.<entry>"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entries in state.items() for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put stored tensors back into an optimizer over the same parameters.

    Files hold tensors in row-major order. Fused optimizers walk a parameter and its moments through memory side by
    side, so each moment gets the memory layout of its parameter (channels last, say) before it is handed over.

    Raises:
        ModelFileError: when the tensors belong to other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        if parameter is None or tensor.shape not in (parameter.shape, ()):
            raise ModelFileError(f"the optimizer's tensor {key} of shape {tuple(tensor.shape)} has no such parameter")
        in_layout = tensor.clone()
        if tensor.shape == parameter.shape:
            in_layout = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        state.setdefault(int(index), {})[name] = in_layout
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
