"""The one place where model files are read and written.

A file is judged by its content, never by its name: only safetensors are opened; pickles (`.ckpt`, `.pt`, `.bin`) can
run code when they are opened and are refused. Our own files carry their whole config as JSON in the header's metadata
under the key `sfumato`, so the file alone is enough to sample. Every write goes to a temporary file that is renamed at
the end: a crash or a full disk leaves the old file or none, never half of one.

>>> import tempfile, torch
>>> folder = tempfile.mkdtemp()
>>> sha256 = write_model(f"{folder}/m.safetensors", {"network.weight": torch.ones(2)}, {"system": "toy"})
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints import hashes
from sfumato.errors import ModelFileError, UserError, nearest

CONFIG_KEY = "sfumato"
_MAX_HEADER = 16 * 2**20
_MAX_TENSORS = 50_000
_MAX_NAME = 1024
_NAMED_PROBLEMS = 10


class Halves:
    """In the place of a type: numbers of 16 bits keep theirs, other floating ones are float32."""


HALVES = Halves()
Wanted = torch.dtype | Halves | None
"""The type that stored weights are asked for in; None for each one's own, mapped from the disk."""


def type_of(stored: Tensor, wanted: torch.dtype | Halves) -> torch.dtype:
    """The type that a stored tensor gets; whole numbers and truth values keep theirs.

    >>> [type_of(torch.zeros(1, dtype=kind), HALVES) for kind in (torch.float16, torch.float64, torch.int64)]
    [torch.float16, torch.float32, torch.int64]
    """
    if not stored.is_floating_point():
        return stored.dtype
    if isinstance(wanted, Halves):
        return stored.dtype if stored.element_size() == 2 else torch.float32
    return wanted


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        header = read_header(path)
        tensors = load_file(path)
        sha256 = hashes.sha256(path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {explain_os_error(error)}") from None
    except (SafetensorError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
        raise ModelFileError(f"{path} is damaged: its tensors cannot be read ({_first_line(error)})") from None
    return ModelFile(path, stored_config(path, header), tensors, sha256)


def check_is_file(path: Path) -> None:
    """Refuse a path that is missing (naming the nearest neighbour), a folder, or a device or pipe."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder, not a model file")
    if path.is_file():
        return
    if path.exists():
        raise ModelFileError(f"{path} is not an ordinary file")
    siblings: list[str] = []
    with suppress(OSError):
        siblings = [p.name for p in path.parent.iterdir()]
    raise ModelFileError(f"no model at {path}{nearest(path.name, siblings)}")


def read_header(path: Path) -> dict[str, Any]:
    """The safetensors header as JSON, with its size, names and count bounded before anything is allocated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        fits = 2 <= length <= min(_MAX_HEADER, size - 8)
        # the length of a sound header may begin with a pickle's first bytes, so a pickle is what does not fit
        if not (fits and start[8:] == b"{") and _looks_like_pickle(start):
            raise ModelFileError(
                f"{path} is a pickle checkpoint, which can run code when it is opened; convert it to safetensors first"
            )
        if start[8:] != b"{":
            raise ModelFileError(f"{path} is not a safetensors file (it does not begin with a header)")
        if not fits:
            raise ModelFileError(
                f"{path} is damaged: its header claims {length} bytes of the file's {size} "
                f"(at most {_MAX_HEADER} are allowed)"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length), object_pairs_hook=_once_each)
        except (UnicodeDecodeError, ValueError, RecursionError):
            raise ModelFileError(f"{path} is damaged: its header is not readable") from None
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ModelFileError(f"{path} is damaged: its header is not a table of at most {_MAX_TENSORS} tensors")
    if any(len(name) > _MAX_NAME for name in header):
        raise ModelFileError(f"{path} is damaged: a tensor's name is longer than {_MAX_NAME} characters")
    return header


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys comes twice, so that no two readers see different files."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key comes twice")
    return values


def _looks_like_pickle(start: bytes) -> bool:
    """A zip archive, as `torch.save` writes, or a bare pickle of protocol 2 to 5."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def stored_config(path: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that travels in a header, None if there is none."""
    metadata = header.get("__metadata__") or {}
    text = metadata.get(CONFIG_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} carries a config that is not readable")
    return config


def write_model(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Write a model file with its config, atomically. Returns the SHA-256 of what was written, hexadecimal.

    Raises:
        UserError: when the disk is full or read-only; an older file of that name stays as it was.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    # one metadata key only: safetensors writes several in no fixed order, and equal weights should make equal files
    data = save(contiguous, metadata={CONFIG_KEY: json.dumps(config, sort_keys=True)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


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
        with suppress(OSError):  # the path may lead through a file, or the disk have become read-only
            temporary.unlink()


def explain_os_error(error: OSError) -> str:
    """Plain words for the file-system errors that users meet."""
    known = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "permission denied",
        errno.EROFS: "the disk is read-only",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
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
    """Load weights into a module; every name and shape must fit, see `check_fit`.

    The weights are taken over in the module's own type.
    """
    check_fit(module, tensors, what=what)
    module.load_state_dict(dict(tensors))


def take_over(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], *, what: str, dtype: Wanted = None
) -> None:
    """Make stored tensors the weights of a module on "meta", without a second copy of any that needs no change.

    Args:
        tensors: every name and shape must fit, see `check_fit`.
        dtype: of the weights (see `type_of`), filters of convolutions channels-last then, however they were stored;
            None for the type and the layout that each is stored in.
    """
    check_fit(module, tensors, what=what)
    typed = {n: _as_computed(t, dtype) if dtype is not None else t for n, t in tensors.items()}
    # torch's own memory begins at multiples of 64; what is mapped from a file may not, and kernels may round otherwise
    aligned = {n: t if t.data_ptr() % 64 == 0 or dtype is None else t.clone() for n, t in typed.items()}
    module.load_state_dict(aligned, assign=True)


def _as_computed(tensor: Tensor, dtype: torch.dtype | Halves) -> Tensor:
    """In a type (whole numbers keep theirs), filters channels-last: kernels round otherwise in another layout."""
    return tensor.to(type_of(tensor, dtype), memory_format=layout_of(tensor))


def layout_of(weight: Tensor) -> torch.memory_format:
    """The layout that networks compute with: channels-last for filters of convolutions."""
    return torch.channels_last if weight.ndim == 4 else torch.contiguous_format


def check_fit(module: torch.nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Compare names and shapes with those of a module, which may be on "meta" and hold no memory yet.

    Raises:
        ModelFileError: with the first ten names, shapes or types that do not fit.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    foreign = [name for name in tensors if name not in own]
    misshapen = [name for name, t in tensors.items() if name in own and own[name].shape != t.shape]
    fractions = {name: t.is_floating_point() for name, t in own.items()}
    mistyped = [n for n, t in tensors.items() if fractions.get(n, t.is_floating_point()) != t.is_floating_point()]

    def problem(name: str) -> str:
        if name not in tensors:
            return f"{name} is missing{nearest(name, foreign)}"
        if name not in own:
            return f"{name} is not part of the model{nearest(name, missing)}"
        if tensors[name].shape == own[name].shape:
            return f"{name} holds numbers of type {str(tensors[name].dtype).removeprefix('torch.')}"
        return f"{name} has shape {tuple(tensors[name].shape)}, the config says {tuple(own[name].shape)}"

    problems = missing + foreign + list(dict.fromkeys(misshapen + mistyped))
    if problems:
        more = f" and {len(problems) - _NAMED_PROBLEMS} more" if len(problems) > _NAMED_PROBLEMS else ""
        named = "; ".join(problem(name) for name in problems[:_NAMED_PROBLEMS])
        raise ModelFileError(f"the weights of {what} do not fit its config: {named}{more}")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
