"""Tensors of a safetensors file one at a time: seen without being read, read in a wanted type, written as they come.

A file's header gives names, shapes and types; tensors on "meta" stand for them. A tensor is read when it is asked for:
with no wanted type it stays on the disk and is mapped into memory, else it is read and cast, so that a model in memory
costs its weights once, plus one tensor. Equal tensors and metadata make equal files.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "m.safetensors"
>>> _ = write_tensors(path, {"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.half)}, {"title": "two"})
>>> file = TensorFile.open(path)
>>> file.seen["a"].shape, file.seen["b"].device.type, file.metadata
(torch.Size([2, 3]), 'meta', {'title': 'two'})
>>> file.read("b", torch.float32).dtype
torch.float32
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from threading import local
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.checkpoints.io import (
    Halves,
    Wanted,
    check_is_file,
    explain_os_error,
    layout_of,
    read_header,
    replacing,
    type_of,
)
from sfumato.errors import ModelFileError, UserError

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in a header."""
_NAMES = {dtype: name for name, dtype in TYPES.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which only the header has been read.

    Attributes:
        path: where it is.
        seen: names to tensors on "meta" of the stored shape and type.
        metadata: the header's own texts.
    """

    path: Path
    seen: dict[str, Tensor]
    metadata: dict[str, str]
    _offsets: dict[str, int] = field(repr=False)
    _mapped: Any = field(repr=False)
    _handle: FileIO = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Read the header; `ModelFileError` for what is not a sound safetensors file."""
        path = Path(path)
        check_is_file(path)
        from safetensors import SafetensorError, safe_open

        try:
            header = read_header(path)
            mapped = safe_open(str(path), framework="pt", device="cpu")  # checks that offsets and sizes fit the file
            seen = {name: _seen(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
            if not all(name.isprintable() for name in seen):
                raise ModelFileError(f"{path} is damaged: a tensor's name cannot be printed")
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {explain_os_error(error)}") from None
        except (SafetensorError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ModelFileError(f"{path} is damaged: its header does not fit its content ({reason})") from None
        handle = path.open("rb", buffering=0)  # stays open, so that the file may be removed from its folder meanwhile
        start = 8 + struct.unpack("<Q", handle.read(8))[0]
        offsets = {name: start + header[name]["data_offsets"][0] for name in seen}
        return cls(path, seen, dict(header.get("__metadata__") or {}), offsets, mapped, handle)

    def read(self, name: str, dtype: Wanted = None) -> Tensor:
        """One tensor, on the CPU.

        Args:
            name: as in `seen`.
            dtype: None for the stored type, mapped from the disk; else, see `type_of`, the tensor has memory of its
                own, filters of convolutions channels-last, as networks compute with them.
        """
        if dtype is None:
            mapped: Tensor = self._explained(lambda: self._mapped.get_tensor(name))
            return mapped
        return self.begin(name, dtype)()

    def begin(self, name: str, dtype: torch.dtype | Halves) -> Callable[[], Tensor]:
        """Begin to read a tensor as `read` gives it in a type; what is returned waits for it.

        What is cast is read some rows at a time and several at once: what was read is still in the cache when it is
        cast, and no memory is needed but the result's.
        """
        stored = self.seen[name]
        out = torch.empty(stored.shape, dtype=type_of(stored, dtype), memory_format=layout_of(stored))
        if not out.numel():
            return lambda: out
        table = out if out.ndim else out[None]
        width = out.numel() // len(table)
        rows = max(1, _PIECE // width)

        def fill(first: int) -> None:
            here = table[first : first + rows]
            raw = _OWN.numbers(stored.dtype, here.numel())
            self._read_into(raw, name, first * width * stored.element_size())
            _cast(raw.view(here.shape), here)

        begun = [_READERS.submit(fill, first) for first in range(0, len(table), rows)]

        def whole() -> Tensor:
            for piece in begun:
                self._explained(piece.result)
            return out

        return whole

    def _explained(self, read: Callable[[], T]) -> T:
        """What is read, or a `ModelFileError` that says why it cannot be."""
        try:
            return read()
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {explain_os_error(error)}") from None

    def _read_into(self, raw: Tensor, name: str, skipped: int) -> None:
        """Fill bytes with those of a tensor, from a place in it."""
        target, start, done = _bytes_of(raw), self._offsets[name] + skipped, 0
        while done < len(target):
            got = os.preadv(self._handle.fileno(), [target[done:]], start + done)  # by place: any thread may read
            if not got:
                raise ModelFileError(f"{self.path} ends before the tensor {name}")
            done += got

    def number(self, name: str) -> float | None:
        """The value of a tensor that holds one number; None if there is no such tensor."""
        if name not in self.seen or self.seen[name].numel() != 1:
            return None
        return float(self.read(name).item())


_PIECE = 2**20  # numbers that are read and cast at a time
_AHEAD = 8  # tensors that are being read while one is used
_READERS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="sfumato-read")


def _cast(stored: Tensor, out: Tensor) -> None:
    """Copy into another type and layout in two steps: from one half type to the other by way of float32, into the type
    before into the layout. torch's own way does either number by number, which takes two to four times as long."""
    if {stored.dtype, out.dtype} == {torch.float16, torch.bfloat16}:
        stored = _OWN.numbers(torch.float32, stored.numel()).view(stored.shape).copy_(stored)
    if out.ndim == 4 and stored.dtype != out.dtype:
        stored = _OWN.numbers(out.dtype, stored.numel()).view(stored.shape).copy_(stored)
    out.copy_(stored)


class _Numbers(local):
    """Memory of a thread for what it is casting, the same for every piece: fresh memory costs as much as reading."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def numbers(self, dtype: torch.dtype, count: int) -> Tensor:
        """So many numbers of a type, whose values are anything; good until the next are asked for."""
        held = self._held.get(dtype)
        if held is None or len(held) < count:
            held = self._held[dtype] = torch.empty(count, dtype=dtype)
        return held[:count]


_OWN = _Numbers()


class Lazily(Mapping[str, Tensor]):
    """Tensors of files under other names, each read when it is asked for; those of `items()` some ahead of their turn.

    Args:
        places: name -> file and the name in it.
        dtype: as in `TensorFile.read`.
    """

    def __init__(self, places: Mapping[str, tuple[TensorFile, str]], dtype: Wanted) -> None:
        self._places, self._dtype = places, dtype

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file.read(stored, self._dtype)

    def begin(self, name: str) -> Callable[[], Tensor]:
        """Begin to read one; what is returned waits for it."""
        file, stored = self._places[name]
        return partial(file.read, stored) if self._dtype is None else file.begin(stored, self._dtype)

    def items(self) -> ItemsView[str, Tensor]:
        return _Ahead(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Ahead(ItemsView[str, Tensor]):
    """Names and tensors in order, where the next few are being read while one is used."""

    def __init__(self, tensors: Lazily) -> None:
        super().__init__(tensors)
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        begun: deque[tuple[str, Callable[[], Tensor]]] = deque()
        for name in self._tensors:
            begun.append((name, self._tensors.begin(name)))
            if len(begun) > _AHEAD:
                first, whole = begun.popleft()
                yield first, whole()
        for name, whole in begun:
            yield name, whole()


def _seen(path: Path, name: str, entry: Any) -> Tensor:
    """A header's entry as a tensor on "meta"."""
    if not isinstance(entry, dict) or entry.get("dtype") not in TYPES:
        kind = entry.get("dtype") if isinstance(entry, dict) else entry
        raise ModelFileError(f"{path} holds {name} in the type {kind!r}, which is not supported")
    return torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]], device="meta")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


# --- writing -------------------------------------------------------------------------------------------------------


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    value: Callable[[str], Tensor] | None = None,
) -> str:
    """Write a safetensors file, one tensor at a time and whole or not at all.

    Args:
        path: of the file.
        tensors: what it will hold; with `value`, only their shapes and types matter and they may be on "meta".
        metadata: of the header; written in the order given.
        value: gives a tensor when it is its turn.

    Returns:
        The SHA-256 of the file, hexadecimal.

    Raises:
        UserError: when it cannot be written; an older file of that name stays as it was.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in _pieces(order, tensors, metadata, value):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(
    order: list[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    value: Callable[[str], Tensor] | None,
) -> Iterator[memoryview]:
    yield memoryview(_header(order, tensors, metadata))
    for name in order:
        tensor = (tensors[name] if value is None else value(name)).detach().to("cpu").contiguous()
        if tensor.dtype != tensors[name].dtype or tensor.shape != tensors[name].shape:
            raise UserError(f"{name} was to be {tensors[name].dtype} {tuple(tensors[name].shape)}, got another")
        yield _bytes_of(tensor) if tensor.numel() else memoryview(b"")


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name} is of type {tensor.dtype}, which a safetensors file cannot hold")
        end = place + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
