"""Model files: what is refused and how, whatever its name; writing is whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from sfumato.checkpoints import io as checkpoint_io
from sfumato.checkpoints.io import (
    component,
    explain_os_error,
    load_strictly,
    read_header,
    read_model,
    replacing,
    write_bytes,
    write_model,
)
from sfumato.errors import ModelFileError, UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from a header and the bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = file_of({"a": entry(0, 8, [2]), "b": entry(8, 12, [1])}, bytes(12))


def write(tmp_path: Path, data: bytes, name: str = "m.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


# --- reading


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4).to(memory_format=torch.contiguous_format),
        "a.transposed": torch.randn(3, 4).T,
        "b.images": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "b.half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    config = {"system": "toy", "title": "ä \N{SPARKLES} \"quoted\"", "list": [1, 2.5, None]}
    sha256 = write_model(tmp_path / "deep" / "m.bin", tensors, config)
    file = read_model(tmp_path / "deep" / "m.bin")
    assert file.config == config
    assert file.sha256 == sha256
    assert file.tensors.keys() == tensors.keys()
    assert all(torch.equal(file.tensors[n], t) and file.tensors[n].dtype == t.dtype for n, t in tensors.items())
    assert component(file.tensors, "a").keys() == {"weight", "transposed"}


def test_a_file_without_our_config_has_none(tmp_path: Path) -> None:
    assert read_model(write(tmp_path, GOOD)).config is None


def test_numbers_that_are_not_finite_are_only_numbers(tmp_path: Path) -> None:
    data = file_of({"a": entry(0, 12, [3])}, struct.pack("<3f", float("nan"), float("inf"), -0.0))
    assert torch.isnan(read_model(write(tmp_path, data)).tensors["a"]).tolist() == [True, False, False]


def test_every_length_of_header_is_read(tmp_path: Path) -> None:
    """The header's length comes first in the file; 0x80, as in a pickle, and "PK", as in a zip, are lengths too."""
    for size in range(8, 400, 8):
        path = tmp_path / "m.safetensors"
        write_model(path, {"w": torch.ones(1)}, {"title": "x" * size})
        assert read_model(path).tensors["w"].tolist() == [1.0]
    assert {read_first_byte(tmp_path, n) for n in range(8, 400, 8)} >= {0x80}
    text = b'{"a":' + json.dumps(entry(0, 4, [1])).encode() + b"}"
    for length in (0x0280, 0x4B50):
        padded = file_of(text + b" " * (length - len(text)), bytes(4))
        assert read_model(write(tmp_path, padded)).tensors["a"].tolist() == [0.0]


def read_first_byte(tmp_path: Path, size: int) -> int:
    write_model(tmp_path / "m.safetensors", {"w": torch.ones(1)}, {"title": "x" * size})
    return (tmp_path / "m.safetensors").read_bytes()[0]


REFUSED = {
    "empty": (b"", "not a safetensors file"),
    "a few bytes": (b"\0\0\0", "not a safetensors file"),
    "text": (b"this is a read-me, not a model", "not a safetensors file"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a safetensors file"),
    "a page": (b"<!DOCTYPE html><html>404</html>", "not a safetensors file"),
    "a header longer than the file": (file_of({}, length=10**6), "claims 1000000 bytes of the file's 10"),
    "a header of 2^64 - 1": (file_of({}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
    "a header of 2^63": (file_of({}, length=2**63), "claims 9223372036854775808 bytes"),
    "a header of nothing": (file_of(b"{", length=0), "claims 0 bytes"),
    "not JSON": (file_of(b'{"a": nonsense}'), "header is not readable"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "header is not readable"),
    "nested without end": (file_of(b'{"a":' * 50_000), "header is not readable"),
    "a list": (file_of(b'{"a"' + b" " * 10), "header is not readable"),
    "a hole": (file_of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "is damaged"),
    "an overlap": (file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "is damaged"),
    "a hidden tail": (GOOD + b"tail", "is damaged"),
    "truncated": (GOOD[:-1], "is damaged"),
    "offsets beyond the end": (file_of({"a": entry(0, 2**40, [2**38])}, bytes(8)), "is damaged"),
    "offsets backwards": (file_of({"a": entry(8, 0, [2])}, bytes(8)), "is damaged"),
    "negative offsets": (file_of({"a": entry(-8, 0, [2])}, bytes(8)), "is damaged"),
    "a shape that overflows": (file_of({"a": entry(0, 8, [2**33, 2**33])}, bytes(8)), "is damaged"),
    "a shape that does not fit": (file_of({"a": entry(0, 8, [3])}, bytes(8)), "is damaged"),
    "a negative shape": (file_of({"a": entry(0, 8, [-2])}, bytes(8)), "is damaged"),
    "an unknown type": (file_of({"a": entry(0, 8, [2], "F128")}, bytes(8)), "is damaged"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "is damaged"),
    "a number for a tensor": (file_of({"a": 3}), "is damaged"),
    "twice the same name": (
        file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2), bytes(4)),
        "header is not readable",
    ),
    "a long name": (file_of({"n" * 2000: entry(0, 4, [1])}, bytes(4)), "name is longer than 1024"),
    "too many tensors": (
        file_of(b"{" + b",".join(b'"%d":{}' % i for i in range(50_001)) + b"}"),
        "not a table of at most 50000 tensors",
    ),
    "metadata that is no table": (file_of({"__metadata__": "x", "a": entry(0, 4, [1])}, bytes(4)), "is damaged"),
    "a config that is no text": (
        file_of({"__metadata__": {"sfumato": 3}, "a": entry(0, 4, [1])}, bytes(4)),
        "is damaged",
    ),
    "a config that is no JSON": (
        file_of({"__metadata__": {"sfumato": "{"}, "a": entry(0, 4, [1])}, bytes(4)),
        "carries a config that is not readable",
    ),
    "a config that is a list": (
        file_of({"__metadata__": {"sfumato": "[]"}, "a": entry(0, 4, [1])}, bytes(4)),
        "carries a config that is not readable",
    ),
    "a config nested without end": (
        file_of({"__metadata__": {"sfumato": '{"a":' * 50_000}, "a": entry(0, 4, [1])}, bytes(4)),
        "carries a config that is not readable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_model_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    data, expected = REFUSED[name]
    path = write(tmp_path, data)
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_header_may_not_be_larger_than_16_mib(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**24 + 8) + b"{")
        file.truncate(2**25)
    began = time.perf_counter()
    with pytest.raises(ModelFileError, match=r"claims 16777224 bytes .* \(at most 16777216 are allowed\)"):
        read_header(path)
    assert time.perf_counter() - began < 0.5


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["m.safetensors", "m.SAFETENSORS", "m.ckpt", "m.pt", "m.bin", "m"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "zip", "legacy torch", "torch"])
def test_a_pickle_never_runs_whatever_its_name(tmp_path: Path, name: str, protocol: Any) -> None:
    canary, buffer = tmp_path / "canary", io.BytesIO()
    if isinstance(protocol, int):
        pickle.dump(Canary(canary), buffer, protocol)
    elif protocol == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    else:
        torch.save({"x": Canary(canary)}, buffer, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(ModelFileError, match="pickle checkpoint, which can run code|not a safetensors file") as caught:
        read_model(write(tmp_path, buffer.getvalue(), name))
    if protocol not in (0, 1):
        assert "convert it to safetensors first" in str(caught.value)
    assert not canary.exists()


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "emoji.safetensors")
    with pytest.raises(ModelFileError, match=r"no model at .*emojy.safetensors \(did you mean 'emoji.safetensors'\?\)"):
        read_model(tmp_path / "emojy.safetensors")
    with pytest.raises(ModelFileError, match="no model at"):
        read_model(tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(ModelFileError, match="is a folder"):
        read_model(tmp_path)
    with pytest.raises(ModelFileError, match="no model at"):
        read_model("bad\0name")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ModelFileError, match="is not an ordinary file"):
            read_model(tmp_path / "pipe")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with mock.patch.object(Path, "open", side_effect=PermissionError(errno.EACCES, "no")):
        with pytest.raises(ModelFileError, match="cannot be read: permission denied"):
            read_model(path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of many kinds of harm, at a random place."""
    changed = bytearray(data)
    header = struct.unpack("<Q", data[:8])[0]
    kind = rng.randrange(9)
    if kind == 0:  # flipped bits anywhere
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # flipped bits in the header
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 3:
        changed += rng.randbytes(rng.randint(1, 40))
    elif kind == 4:
        lengths = [0, 1, 2, header - 1, header + 1, 2**31, 2**63, rng.getrandbits(64)]
        changed[:8] = struct.pack("<Q", rng.choice(lengths))
    elif kind == 5:  # other digits
        places = [i for i in range(8, 8 + header) if chr(changed[i]).isdigit()]
        for place in rng.sample(places, min(3, len(places))):
            changed[place] = ord(str(rng.randrange(10)))
    elif kind == 6:  # a piece taken out
        start = rng.randrange(len(changed))
        del changed[start : start + rng.randint(1, 30)]
    elif kind == 7:  # a piece repeated
        start = rng.randrange(len(changed))
        piece = changed[start : start + rng.randint(1, 60)]
        changed[start:start] = piece
    else:  # other JSON of the right length
        text = data[8 : 8 + header]
        swaps = [(b"F32", b"F64"), (b"F32", b"I8"), (b"[", b"{"), (b'"', b"'"), (b":", b","), (b"0", b"-1")]
        text = text.replace(*rng.choice(swaps), rng.randint(1, 3))
        changed = bytearray(struct.pack("<Q", len(text)) + text + data[8 + header :])
    return bytes(changed)


def test_no_mutation_of_a_file_does_more_than_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "n": torch.tensor(3)}
    write_model(path, tensors, {"system": "toy"})
    sound, rng = path.read_bytes(), random.Random(20)
    refused = 0
    for number in range(400):
        data = mutate(sound, rng)
        path.write_bytes(data)
        began = time.perf_counter()
        try:
            read_model(path)
        except ModelFileError as error:
            refused += 1
            assert "\n" not in str(error)
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}; {data[:200]!r}") from error
        assert time.perf_counter() - began < 2, number
    assert refused > 200


# --- writing


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, {"w": torch.zeros(2)}, {"system": "old"})
    old = path.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for broken in ("os.fsync", "os.replace"):
        with mock.patch(broken, side_effect=full), pytest.raises(UserError, match=f"{path}: the disk is full"):
            write_model(path, {"w": torch.ones(2)}, {"system": "new"})
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with mock.patch.object(Path, "open", side_effect=full), pytest.raises(UserError, match="the disk is full"):
        write_model(tmp_path / "new.safetensors", {"w": torch.ones(2)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_on_disk_before_it_takes_the_name(tmp_path: Path) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    with (
        mock.patch("os.fsync", side_effect=lambda fd: (order.append("fsync"), fsync(fd))),
        mock.patch("os.replace", side_effect=lambda a, b: (order.append("replace"), replace(a, b))),
    ):
        write_bytes(tmp_path / "file", b"data")
    assert order == ["fsync", "replace"]


def test_a_path_through_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "m.safetensors", tmp_path / "file" / "deep" / "m.safetensors"):
        with pytest.raises(UserError, match="could not write .*m.safetensors: a part of the path is a file"):
            write_model(path, {"w": torch.ones(1)}, {})
    with pytest.raises(UserError, match="it is a folder"):
        write_bytes(tmp_path, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_words_for_errors_of_the_disk() -> None:
    assert explain_os_error(OSError(errno.EROFS, "x")) == "the disk is read-only"
    assert explain_os_error(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert explain_os_error(OSError("something else")) == "something else"


# --- loading into a module


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_weights_that_fit_are_loaded() -> None:
    source, target = network(), network()
    load_strictly(target, source.state_dict(), what="m")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    load_strictly(target, {n: t.to(torch.float16) for n, t in source.state_dict().items()}, what="m")
    assert {p.dtype for p in target.parameters()} == {torch.float32}


def test_weights_that_do_not_fit_are_listed_with_the_nearest_name() -> None:
    target = network()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    tensors = dict(network().state_dict())
    tensors["0.wieght"] = tensors.pop("0.weight")
    tensors["1.bias"] = torch.zeros(9)
    with pytest.raises(ModelFileError) as caught:
        load_strictly(target, tensors, what="m.safetensors")
    assert str(caught.value) == (
        "the weights of m.safetensors do not fit its config: "
        "0.weight is missing (did you mean '0.wieght'?); "
        "0.wieght is not part of the model (did you mean '0.weight'?); "
        "1.bias has shape (9,), the config says (1,)"
    )
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())


def test_the_list_is_short_and_quick() -> None:
    target = nn.ModuleList([nn.Linear(1, 1) for _ in range(300)])
    foreign = {f"blocks.{i}.attention.to_out.0.weight": torch.zeros(1) for i in range(3000)}
    began = time.perf_counter()
    with pytest.raises(ModelFileError, match="; .* and 3590 more$"):
        load_strictly(target, foreign, what="m")
    assert time.perf_counter() - began < 3


def test_the_loader_never_unpickles() -> None:
    source = Path(checkpoint_io.__file__).read_text(encoding="utf-8")
    assert "torch.load" not in source and "import pickle" not in source
