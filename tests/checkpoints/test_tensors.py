"""Tensor files: what is written is read again, in any type, without holding more than is asked for."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.checkpoints import tensors as module
from sfumato.checkpoints.tensors import TYPES, Lazily, TensorFile, write_tensors
from sfumato.errors import ModelFileError, UserError


def examples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd.half": torch.randn(3, generator=generator).half(),
        "weight": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "wide": torch.randn(2, generator=generator).double(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(7),
        "flag": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
    }


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.bin"
    sha256 = write_tensors(path, examples(), {"b": "2", "a": "ä \N{SPARKLES}"})
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    file, theirs = TensorFile.open(path), load_file(path)
    assert file.metadata == {"b": "2", "a": "ä \N{SPARKLES}"}
    assert file.seen.keys() == theirs.keys() == examples().keys()
    for name, tensor in examples().items():
        assert file.seen[name].is_meta and file.seen[name].shape == tensor.shape
        for read in (file.read(name), theirs[name]):
            assert read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor)


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in examples().items()}
    save_file(tensors, tmp_path / "m", metadata={"x": "y"})
    file = TensorFile.open(tmp_path / "m")
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reading_casts_what_is_floating(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(tmp_path / "m", examples(), {})
    file = TensorFile.open(tmp_path / "m")
    for name, tensor in examples().items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert file.read(name, dtype).dtype == expected.dtype and torch.equal(file.read(name, dtype), expected)


@pytest.mark.parametrize("shape", [(70, 60, 3, 3), (3, 1, 1, 1), (1, 5000), (300, 7, 3), (9,), ()])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_in_pieces_is_casting(
    tmp_path: Path, shape: tuple[int, ...], stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 2000)
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3).to(stored)
    write_tensors(tmp_path / "a.safetensors", {"w": value}, {})
    got = TensorFile.open(tmp_path / "a.safetensors").read("w", dtype)
    expected = value.to(dtype, memory_format=torch.channels_last if value.ndim == 4 else torch.preserve_format)
    assert torch.equal(got, expected) and got.stride() == expected.stride() and got.dtype == dtype


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    forwards = examples()
    backwards = dict(reversed(forwards.items()))
    write_tensors(tmp_path / "a", forwards, {"k": "v", "l": "w"})
    write_tensors(tmp_path / "b", backwards, {"k": "v", "l": "w"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_changing_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {"a": torch.ones(4)}, {})
    before = (tmp_path / "m").read_bytes()
    tensor = TensorFile.open(tmp_path / "m").read("a")
    tensor.add_(1)
    assert (tmp_path / "m").read_bytes() == before and torch.equal(tensor, torch.full((4,), 2.0))


def test_a_file_may_go_while_it_is_open(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {"a": torch.ones(4), "b": torch.ones(3)}, {})
    file = TensorFile.open(tmp_path / "m")
    (tmp_path / "m").unlink()
    assert file.read("a").sum() == 4 and file.read("b", torch.float64).sum() == 3


def test_lazily(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {"a": torch.ones(2).half()}, {})
    lazily = Lazily({"x": (TensorFile.open(tmp_path / "m"), "a")}, torch.float32)
    assert list(lazily) == ["x"] and len(lazily) == 1 and lazily["x"].dtype == torch.float32
    with pytest.raises(KeyError):
        lazily["a"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_read_ahead_is_what_is_asked_for(tmp_path: Path, dtype: torch.dtype | None) -> None:
    numbered = {f"t{i}": torch.full((i % 3, 2), float(i)) for i in range(40)}
    write_tensors(tmp_path / "m", numbered, {})
    file = TensorFile.open(tmp_path / "m")
    lazily = Lazily({name[1:]: (file, name) for name in reversed(numbered)}, dtype)
    found = list(lazily.items())
    assert [name for name, _ in found] == [name[1:] for name in reversed(numbered)] and len(lazily.items()) == 40
    assert all(torch.equal(tensor, numbered[f"t{name}"].to(tensor)) for name, tensor in found)
    assert all(tensor.dtype == (dtype or torch.float32) for _, tensor in found)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {name: torch.ones(1000) for name in "abcdefghijkl"}, {})
    lazily = Lazily({name: (TensorFile.open(tmp_path / "m"), name) for name in "abcdefghijkl"}, torch.half)
    with (tmp_path / "m").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ModelFileError, match="ends before the tensor e"):
        dict(lazily.items())


def test_a_number(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {"n": torch.tensor(3), "x": torch.tensor([0.5]), "many": torch.ones(2)}, {})
    file = TensorFile.open(tmp_path / "m")
    assert [file.number(name) for name in ("n", "x", "many", "absent")] == [3.0, 0.5, None, None]


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    outline = {name: torch.empty(2, device="meta") for name in ("a", "b")}
    write_tensors(tmp_path / "m", outline, {}, lambda name: torch.full((2,), float(ord(name))))
    assert load_file(tmp_path / "m")["b"].tolist() == [98.0, 98.0]
    with pytest.raises(UserError, match="a was to be torch.float32"):
        write_tensors(tmp_path / "n", outline, {}, lambda name: torch.zeros(3))
    assert not (tmp_path / "n").exists()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="complex64, which a safetensors file cannot hold"):
        write_tensors(tmp_path / "m", {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    with mock.patch.object(module.os, "fsync", side_effect=OSError(errno.ENOSPC, "")):
        with pytest.raises(UserError, match="the disk is full"):
            write_tensors(tmp_path / "m", {"a": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)), "damaged"),
        (file_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (file_of({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (file_of({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)), "damaged|not supported"),
        (file_of({"a": 3}), "damaged|not supported"),
        (file_of({"a\n\x1b[2J": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)), "cannot be printed"),
        (file_of(b"{nonsense"), "damaged"),
        (b"", "not a safetensors file"),
        (b"GIF89a and so on", "not a safetensors file"),
    ],
)
def test_damage_is_told_in_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=says) as error:
        TensorFile.open(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_every_type_of_a_header_can_be_written(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2).to(dtype) for name, dtype in TYPES.items()}
    write_tensors(tmp_path / "m", tensors, {})
    assert {name: t.dtype for name, t in TensorFile.open(tmp_path / "m").seen.items()} == TYPES


MEASURE = """
import resource, sys, torch
from sfumato.checkpoints.tensors import TensorFile, write_tensors
count, size = 24, 2**20
write_tensors(sys.argv[1], {f"t{i}": torch.empty(size, dtype=torch.half, device="meta") for i in range(count)}, {},
    lambda name: torch.zeros(size, dtype=torch.half))
file = TensorFile.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [file.read(name, torch.float32) for name in file.seen]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (count * size * 4))
"""


@pytest.mark.slow
def test_memory_is_the_weights_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15
