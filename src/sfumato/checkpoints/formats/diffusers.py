"""Folders in diffusers' layout: one sub-folder per component, each with `config.json` and safetensors weights.

A folder is written under another name beside its own and renamed when it is whole.

>>> import tempfile, torch
>>> place = Path(tempfile.mkdtemp())
>>> with new_folder(place / "model") as folder:
...     write_component(folder / "vae", "VQModel", {"latent_channels": 2}, {"weight": torch.ones(2)})
>>> found = read_component(place / "model" / "vae")
>>> found.config, found.tensors["weight"].tolist(), is_pipeline(place / "model")
({'_class_name': 'VQModel', 'latent_channels': 2}, [1.0, 1.0], False)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints import hashes
from sfumato.checkpoints.io import explain_os_error, read_model
from sfumato.errors import ModelFileError, UserError

INDEX = "model_index.json"
CONFIG = "config.json"
CLASS = "_class_name"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors")
_MAX_JSON = 2**20

# names of the first releases for the parts of an attention over pictures
_EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EARLIER_NAME = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_EARLIER)})\.(weight|bias)")


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


def class_of(folder: str | Path) -> str | None:
    """The class of the single component that a folder holds, None where it holds none."""
    path = Path(folder) / CONFIG
    name = read_json(path).get(CLASS) if path.is_file() else None
    return name if isinstance(name, str) else None


def read_component(folder: Path) -> Component:
    """A component's config and weights (safetensors only), under the names of today."""
    file = read_model(_weights(folder))
    return Component(read_json(folder / CONFIG), _renamed(file.tensors), file.sha256)


def component_sha256(folder: Path) -> str:
    """One SHA-256, hexadecimal, for a component's weights and what its config says of them."""
    return hashes.together(hashes.sha256(_weights(folder)), hashes.sha256(folder / CONFIG))


def _weights(folder: Path) -> Path:
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        pickles = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
        raise ModelFileError(f"{folder} holds no safetensors weights ({_WEIGHTS[0]}){hint}")
    return weights


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def now(name: str) -> str:
        found = _EARLIER_NAME.fullmatch(name)
        return f"{found[1]}.{_EARLIER[found[2]]}.{found[3]}" if found else name

    return {now(name): tensor for name, tensor in tensors.items()}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which takes the place of `path` at the end; on failure nothing is left.

    Raises:
        UserError: when `path` exists and is not an empty folder, or cannot be written.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty folder, so nothing is written there")
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"could not write {path}: {explain_os_error(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_component(folder: Path, class_name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a component's config and weights into a folder, which is made. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {CLASS: class_name, **config})
    write_tensors(folder / _WEIGHTS[0], tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write plain safetensors, marked as torch's, as others expect. Raises `OSError`."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    _write(path, save(contiguous, metadata={"format": "pt"}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, its folder included. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
