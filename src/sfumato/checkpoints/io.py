"""The one place where model files are read and written.

A file is judged by its content, never by its name: only safetensors are opened; pickles (`.ckpt`, `.pt`, `.bin`) can
run code when they are opened and are refused. Our own files carry their whole config as JSON in the header's metadata
under the key `sfumato`, so the file alone is enough to sample. Every write goes to a temporary file that is renamed at
the end: a crash or a full disk leaves the old file or none, never half of one.

>>> import tempfile, torch
>>> folder = tempfile.mkdtemp()
>>> write_model(f"{folder}/m.safetensors", {"network.weight": torch.ones(2)}, {"system": "toy"})
>>> read_model(f"{folder}/m.safetensors").config
{'system': 'toy'}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import ModelFileError, UserError, nearest

CONFIG_KEY = "sfumato"
_MAX_HEADER = 16 * 2**20
_MAX_TENSORS = 50_000


@dataclass(frozen=True)
class ModelFile:
    """An opened model file.

    Attributes:
        path: where it is.
        config: the stored config, or None for a foreign safetensors file.
        tensors: name to tensor, memory-mapped by safetensors.
        sha256: of the whole file, hexadecimal.
    """

    path: Path
    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    sha256: str


def read_model(path: str | Path) -> ModelFile:
    """Open a safetensors file. Raises `ModelFileError` with one sentence for anything that is not a sound one."""
    path = Path(path)
    check_is_file(path)
    header = read_header(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelFileError(f"{path} is damaged: its tensors cannot be read ({_first_line(error)})") from None
    return ModelFile(path, stored_config(path, header), tensors, file_sha256(path))


def check_is_file(path: Path) -> None:
    """Refuse a path that is missing (naming the nearest neighbour) or a folder."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder, not a model file")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelFileError(f"no model at {path}{nearest(path.name, siblings)}")


def read_header(path: Path) -> dict[str, Any]:
    """The safetensors header as JSON, with its size, names and count bounded before anything is allocated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            raise ModelFileError(
                f"{path} is a pickle checkpoint, which can run code when it is opened; convert it to safetensors first"
            )
        if len(start) < 9 or start[8:9] != b"{":
            raise ModelFileError(f"{path} is not a safetensors file (it does not begin with a header)")
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(_MAX_HEADER, size - 8):
            raise ModelFileError(f"{path} is damaged: its header claims {length} bytes, the file has {size}")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, ValueError, RecursionError):
            raise ModelFileError(f"{path} is damaged: its header is not readable") from None
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ModelFileError(f"{path} is damaged: its header is not a table of at most {_MAX_TENSORS} tensors")
    return header


def stored_config(path: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that travels in a header, None if there is none."""
    metadata = header.get("__metadata__") or {}
    text = metadata.get(CONFIG_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return None
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} carries a config that is not readable")
    return config


def write_model(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a model file with its config, atomically. Raises `UserError` when the disk is full or read-only."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, metadata={CONFIG_KEY: json.dumps(config, sort_keys=True), "format": "pt"})
    write_bytes(path, data)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file by temporary name, fsync and rename; nothing is left behind when it fails."""
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed.

    Errors of the file system become one sentence.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {explain_os_error(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def explain_os_error(error: OSError) -> str:
    """Plain words for the file-system errors that users meet."""
    known = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "permission denied",
        errno.EROFS: "the disk is read-only",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EISDIR: "it is a folder",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def component(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Load weights into a module; every name and shape must fit, or `ModelFileError` lists the first that do not.

    The weights are taken over in the module's own type.
    """
    own = module.state_dict()
    problems = [f"{n} is missing{nearest(n, tensors)}" for n in own if n not in tensors]
    problems += [f"{n} is not part of the model{nearest(n, own)}" for n in tensors if n not in own]
    problems += [
        f"{n} has shape {tuple(t.shape)}, the config says {tuple(own[n].shape)}"
        for n, t in tensors.items()
        if n in own and own[n].shape != t.shape
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ModelFileError(f"the weights of {what} do not fit its config: {'; '.join(problems[:10])}{more}")
    module.load_state_dict(dict(tensors))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
