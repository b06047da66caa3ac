"""Frozen networks of others: files found and checked, loaded strictly, never trained.

Weights come from safetensors files only, must have exactly the names and shapes of the network, and run in float32
without gradients. Loading leaves the random state alone.

>>> need("json", "anything").dumps([1])
'[1]'
>>> need("no_such_package", "text")
Traceback (most recent call last):
    ...
sfumato.errors.UserError: the package no_such_package is missing: pip install 'sfumato[text]'
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.errors import ModelFileError, UserError
from sfumato.networks.outline import made_on

Network = TypeVar("Network", bound=nn.Module)
Hasher = Callable[[Path], str]


def need(module: str, extra: str) -> Any:
    """Import an optional module; a missing one is refused, naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"the package {error.name} is missing: pip install 'sfumato[{extra}]'") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ModelFileError` where it is missing or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"cannot read {path} ({error.strerror})") from None
    except ValueError:
        raise ModelFileError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32; `ModelFileError` where it is damaged or missing."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"cannot read {path} ({str(error).splitlines()[0]})") from None
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def frozen(
    build: Callable[[], Network], tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *, what: str
) -> Network:
    """A network with the given weights, in eval mode, without gradients.

    Args:
        build: makes the network (on the meta device here, so it costs neither time nor random numbers).
        tensors: exactly its state dict.
        buffers: the last part of a name -> value, for buffers that are reckoned and not stored.
        what: names the file in the sentence.

    Raises:
        ModelFileError: when names or shapes differ.
    """
    with made_on("meta"):
        network = build()
    try:
        network.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise ModelFileError(f"{what} does not fit its config ({reason[:300]})") from None
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                value = buffers[name]
                assert value.shape == buffer.shape
                module.register_buffer(name, value.to(buffer.dtype), persistent=False)
    return network.eval().requires_grad_(False)
