"""Pickle checkpoints (`.ckpt`, `.bin`, `.pt`): refused unless allowed, and then converted by a process of its own.

A pickle is a program. When one is allowed, a child process reads it with torch's restricted unpickler, which builds
tensors and plain values and calls nothing else; it has bounds on memory, time and file size, and writes a safetensors
file that is then opened like any other. What a training program left beside the weights (callbacks, counters) becomes
an inert stand-in. This is a containment and no proof: a file from a stranger is better had as safetensors.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
>>> torch.save({"a": torch.ones(2)}, path)
>>> is_pickle(path)
True
>>> tensors, numbers, left = tensors_of({"state_dict": {"a": torch.ones(2)}, "global_step": 3, "epoch": 1}, size=10**4)
>>> list(tensors), numbers, left
(['a'], {'global_step': '3'}, ['epoch'])
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.checkpoints.io import check_is_file, explain_os_error
from sfumato.checkpoints.tensors import TYPES, TensorFile, write_tensors
from sfumato.errors import ModelFileError, UserError

LEFT_ASIDE = "sfumato.left_aside"
"""The key under which a converted file names what was not a tensor."""
_SECONDS = 900
_SPARE_MEMORY = 4 * 2**30  # for the libraries themselves
_WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params")
_NUMBERS = ("global_step",)
_ENDINGS = (".ckpt", ".bin", ".pt", ".pth")


# --- what is a pickle ----------------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Whether a file's content is a pickle, a zip archive as `torch.save` writes it, or a tar archive of old."""
    with path.open("rb") as file:
        start = file.read(264)
    length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    if start[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return False  # a sound header, whose length may begin with a pickle's first bytes
    zipped, tarred = start[:4] == b"PK\x03\x04", start[257:262] == b"ustar"
    return zipped or tarred or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _has_header(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def open_tensors(path: str | Path, *, allow_pickle: bool = False) -> tuple[TensorFile, tuple[str, ...]]:
    """Open a safetensors file, or a pickle where that is allowed.

    Returns:
        The file and what a user should be told.

    Raises:
        ModelFileError: for a pickle that is not allowed, or that holds more than tensors and plain values.
    """
    path = Path(path)
    check_is_file(path)
    try:
        if not is_pickle(path):
            if (allow_pickle or path.suffix.lower() in _ENDINGS) and not _has_header(path):
                raise ModelFileError(f"{path} is neither a safetensors file nor a checkpoint of torch, or damaged")
            return TensorFile.open(path), ()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {explain_os_error(error)}") from None
    if not allow_pickle:
        raise ModelFileError(
            f"{path} is a pickle checkpoint, which can run code when it is opened; allow it with --allow-pickle "
            "(allow_pickle=True), and it is converted by a process that builds tensors and nothing else"
        )
    with tempfile.TemporaryDirectory(prefix="sfumato-", ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "converted.safetensors"
        convert(path, target)
        file = TensorFile.open(target)
    left = json.loads(file.metadata.pop(LEFT_ASIDE, "[]"))
    aside = f"; left aside, for they are no weights: {', '.join(left[:10])}" if left else ""
    return file, (f"{path} is a pickle and has been converted{aside}",)


# --- the parent ----------------------------------------------------------------------------------------------------


def convert(path: Path, target: Path) -> None:
    """Write a pickle's tensors into a safetensors file, by a process of its own.

    Raises:
        ModelFileError: when the pickle asks for anything but tensors and plain values, is damaged, or too large.
    """
    if torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        raise ModelFileError(f"{path} is a pickle, and reading those safely needs torch 2.10 or newer")
    task = json.dumps({"path": sys.path, "source": os.path.abspath(path), "target": os.path.abspath(target)})
    environment = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    code = (
        "import json, sys; task = json.loads(sys.stdin.read()); sys.path[:] = task['path']; "
        "from sfumato.checkpoints.formats.pickles import child; child(task['source'], task['target'])"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=task,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**environment, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path} could not be read within {_SECONDS // 60} minutes") from None
    answer = _answer(done.stdout)
    if answer is None:
        end = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        last = _shown((done.stderr.strip().splitlines()[-1:] or ["no message"])[0])
        raise ModelFileError(f"{path} could not be read: the process that tried ended with {end} ({last})")
    if answer:
        raise ModelFileError(f"{path} {answer}")


def _answer(text: str) -> str | None:
    """The child's sentence, empty for success, None if it did not get so far."""
    with suppress(ValueError, KeyError, TypeError, IndexError):
        return cast(str, json.loads(text.splitlines()[-1])["refused"])
    return None


# --- the child -----------------------------------------------------------------------------------------------------


def child(source: str, target: str) -> None:
    """What the process does: bound itself, read, check, write, and say in one line of JSON what it refused."""
    size = os.path.getsize(source)
    _bound(size)
    try:
        tensors, numbers, left = tensors_of(load(source), size=size)
        check_storages(source, tensors)
        write_tensors(target, tensors, {**numbers, LEFT_ASIDE: json.dumps(left)})
        refused = ""
    except ModelFileError as error:
        refused = _shown(str(error), 1000)
    except UserError as error:
        refused = f"cannot be converted: {error}"
    except MemoryError:
        refused = "needs more memory than a checkpoint of its size should"
    print(json.dumps({"refused": refused}))


def _bound(size: int) -> None:
    """Bounds on memory, time and file size, where the system has them."""
    try:
        import resource
    except ImportError:  # not on Windows; the restricted unpickler works the same
        return
    for what, most in (
        (resource.RLIMIT_AS, _mapped_now() + 4 * size + _SPARE_MEMORY),
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_FSIZE, 2 * size + 2**20),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _mapped_now() -> int:
    """Bytes of address space in use, where the system says so: the libraries' own."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Inert:
    """Stands for what a training program left in a checkpoint; takes anything and keeps nothing."""

    def __new__(cls, *arguments: object, **options: object) -> Inert:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return self is other


_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
"""What checkpoints of known training programs hold besides weights: read as `Inert`."""


def load(path: str) -> Any:
    """A pickle's content by torch's restricted unpickler.

    Raises:
        ModelFileError: naming what the pickle asked for.
    """
    stand_ins: list[Any] = [(Inert, name) for name in _INERT]
    try:
        with torch.serialization.safe_globals(stand_ins), open(path, "rb") as file:
            mapped = zipfile.is_zipfile(path) and all(one.compress_type == 0 for one in _records(path))
            # given a path, torch goes by its ending, which says nothing
            source: Any = path if mapped and not path.lower().endswith(".safetensors") else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=source is path)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelFileError(_why(str(error))) from None
    except Exception as error:  # a hostile or damaged file can make the reader fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelFileError(f"is damaged, or no checkpoint ({reason})") from None


def _records(path: str) -> list[zipfile.ZipInfo]:
    """The storages in an archive."""
    with zipfile.ZipFile(path) as archive:
        return [one for one in archive.infolist() if re.fullmatch(r"[^/]+/data/\d+", one.filename)]


def check_storages(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an archive whose pickle claims storages of other sizes than the archive's records have."""
    if not zipfile.is_zipfile(path):
        return
    records = Counter(one.file_size for one in _records(path))
    storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in tensors.values())}
    claimed = Counter(storage.nbytes() for storage in storages.values() if storage.nbytes())
    if claimed - records:
        size = max(claimed - records)
        raise ModelFileError(f"is refused: it claims a tensor of {size} bytes, and its archive has none of that size")


def _why(message: str) -> str:
    """What the unpickler objected to, in one sentence."""
    asked = re.search(r"(?:GLOBAL|function|instruct\w*) ([\w.]+\.[\w.]+|[\w]+)", message)
    if asked is not None and "GLOBAL" in message:
        return f"is refused: it asks for {asked[1]}, which no weights need"
    if "TorchScript" in message:
        return "is refused: it is a TorchScript program and no checkpoint"
    odd = re.search(r"Unsupported operand (\d+)", message)
    if odd is not None:
        return f"is refused: it is a pickle with an instruction ({odd[1]}) that torch writes into no checkpoint"
    said = message.rpartition("WeightsUnpickler error:")[2].strip() or "the unpickler stopped"
    return f"is refused by the restricted unpickler ({said.splitlines()[0][:200]})"


def tensors_of(content: Any, *, size: int) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The weights in what a pickle held.

    Args:
        content: as unpickled; a table of tensors, or a table with one under "state_dict" or the like.
        size: of the file in bytes: tensors that claim more than it holds are refused.

    Returns:
        (tensors, numbers that say something of the model, names of what was left aside).
    """
    if not isinstance(content, Mapping):
        raise ModelFileError(f"is refused: it holds a {type(content).__name__} and no table of tensors")
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    weights = content if wrapper is None else content[wrapper]
    numbers = {key: str(content[key]) for key in _NUMBERS if type(content.get(key)) is int}
    left = [] if wrapper is None else [_shown(str(key)) for key in content if key not in (wrapper, *numbers)]
    tensors, total = {}, 0
    for name, value in weights.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = _sound(name, value)
            total += value.numel() * value.element_size()
        elif not (wrapper is None and name in numbers):
            left.append(_shown(str(name)))
    if total > 2 * size:
        raise ModelFileError(f"is refused: its tensors claim {total} bytes, and the file has {size}")
    if not tensors and isinstance(content.get("string_to_param"), Mapping):
        raise ModelFileError("holds a textual inversion, which changes a model and is not a model to draw with")
    if not tensors:
        raise ModelFileError("holds no tensors under names")
    return tensors, numbers, sorted(left)


def _shown(text: str, most: int = 200) -> str:
    """A text from a file as it may be printed."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _sound(name: str, tensor: Tensor) -> Tensor:
    """A dense tensor in main memory that lies within its storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ModelFileError(f"is refused: {_shown(name)} is not a plain dense tensor")
    if tensor.dtype not in TYPES.values():
        raise ModelFileError(f"is refused: {_shown(name)} is of type {tensor.dtype}")
    if tensor.numel():
        reach = 1 + sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if (tensor.storage_offset() + reach) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelFileError(f"is refused: {_shown(name)} reaches beyond its storage")
    return tensor.detach()
