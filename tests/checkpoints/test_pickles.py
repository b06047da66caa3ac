"""Pickles: refused unless allowed; when allowed, tensors come out and nothing that they ask for is run."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.checkpoints.formats import pickles
from sfumato.checkpoints.formats.pickles import check_storages, convert, is_pickle, load, open_tensors, tensors_of
from sfumato.checkpoints.formats.single_file import SingleFile, write
from sfumato.checkpoints.tensors import TensorFile, write_tensors
from sfumato.errors import ModelFileError

from .compvis_names import random_parts, tiny_family

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, on protocols and TorchScript


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class State:
    """Pickled as an object whose state is set by code."""

    def __setstate__(self, state: str) -> None:
        Path(state).touch()

    def __reduce__(self) -> Any:
        return State, (), self.__dict__["canary"]


def zipped(data: bytes, more: dict[str, bytes] | None = None) -> bytes:
    """A zip archive as `torch.save` makes it, around any pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        records = {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **(more or {})}
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def called(module: str, name: str, *arguments: Any) -> Callable[[str], bytes]:
    """A pickle that calls a function by its name; "%" stands for the path of the canary."""

    def make(canary: str) -> bytes:
        given = tuple(a.replace("%", canary) if isinstance(a, str) else a for a in arguments)
        tail = pickle.dumps(given, protocol=2)[2:-1]
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + tail + b"R."

    return make


TOUCH = "open('%', 'w').close()"
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "os.system": called("os", "system", "touch %"),
    "posix.system": called("posix", "system", "touch %"),
    "subprocess": called("subprocess", "call", "touch %", 0),
    "popen": called("subprocess", "Popen", "touch %"),
    "eval": called("builtins", "eval", TOUCH),
    "exec": called("builtins", "exec", TOUCH),
    "old eval": called("__builtin__", "eval", TOUCH),
    "open": called("builtins", "open", "%", "w"),
    "io.open": called("io", "open", "%", "w"),
    "touch": called("os", "mkdir", "%"),
    "import": called("builtins", "__import__", "antigravity"),
    "getattr": called("builtins", "getattr", "os", "system"),
    "importlib": called("importlib", "import_module", "os"),
    "pkgutil": called("pkgutil", "resolve_name", "os:system"),
    "runpy": called("runpy", "_run_code", TOUCH, 0),
    "codeop": called("code", "interact"),
    "timeit": called("timeit", "timeit", TOUCH),
    "partial": called("functools", "partial", "os.system"),
    "attrgetter": called("operator", "attrgetter", "system"),
    "webbrowser": called("webbrowser", "open", "http://localhost"),
    "socket": called("socket", "create_connection", ("localhost", 9)),
    "pickle": called("pickle", "loads", "x"),
    "marshal": called("marshal", "loads", "x"),
    "torch.load": called("torch", "load", "%"),
    "torch.hub": called("torch.hub", "load", "%", "x"),
    "load_from_bytes": called("torch.storage", "_load_from_bytes", "x"),
    "numpy": called("numpy.testing._private.utils", "runstring", TOUCH, {}),
    "numpy load": called("numpy", "load", "%"),
    "nothing": called("sfumato.checkpoints.formats.pickles", "child", "a", "b"),
    "rebuild": called("torch._utils", "_rebuild_tensor_v2", "a", 0, (1,), (1,), False, None),
    "stack global": lambda canary: pickle.dumps(Call(os.mkdir, canary), protocol=4),
    "protocol 5": lambda canary: pickle.dumps({"a": [Call(eval, TOUCH.replace("%", canary))]}, protocol=5),
    "in a dict": lambda canary: pickle.dumps(OrderedDict(a=Call(os.system, f"touch {canary}")), protocol=2),
    "inst": lambda canary: b"\x80\x02(S'touch " + canary.encode() + b"'\nios\nsystem\n.",
    "obj": lambda canary: b"\x80\x02(cos\nsystem\nS'touch " + canary.encode() + b"'\no.",
    "newobj": lambda canary: b"\x80\x02csubprocess\nPopen\nS'touch " + canary.encode() + b"'\n\x85\x81.",
    "newobj_ex": lambda canary: b"\x80\x04csubprocess\nPopen\nS'x'\n\x85}\x92.",
    "extension": lambda canary: b"\x80\x02\x82\x01.",
    "persistent": lambda canary: b"\x80\x02Pos.system\n.",
    "state": lambda canary: pickle.dumps(_state(canary), protocol=2),
    "dotted": lambda canary: b"\x80\x04\x8c\x02os\x8c\x0bpath.os.mkdir\x93\x8c" + _short(canary) + b"\x85R.",
}


def _short(text: str) -> bytes:
    return struct.pack("<B", len(text.encode())) + text.encode()


def _state(canary: str) -> State:
    one = State()
    one.__dict__["canary"] = canary
    return one


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file or folder that only a payload makes."""
    return tmp_path / "c"


def test_the_payloads_would_work(canary: Path) -> None:
    """Python's own unpickler runs them: the tests below test something."""
    for name in ("os.system", "posix.system", "eval", "stack global", "inst", "state"):
        pickle.loads(PAYLOADS[name](str(canary)))
        assert canary.exists(), name
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_there_are_enough_of_them() -> None:
    assert len(PAYLOADS) >= 30
    for name in ("os", "subprocess", "runpy", "torch.hub", "numpy.testing._private.utils"):
        importlib.import_module(name)


@pytest.mark.parametrize("form", ["bare", "zip"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_are_refused(name: str, form: str, tmp_path: Path, canary: Path) -> None:
    """By the reader that the child process uses, here in this one, where a payload would be seen too."""
    data = PAYLOADS[name](str(canary))
    path = tmp_path / "m.ckpt"
    path.write_bytes(data if form == "bare" else zipped(data))
    with pytest.raises(ModelFileError) as error:
        tensors_of(load(str(path)), size=path.stat().st_size)
    assert not canary.exists() and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("m.ckpt", False),
        ("m.safetensors", False),
        ("m.safetensors", True),
        pytest.param("m.SAFETENSORS", True, marks=pytest.mark.slow),
        pytest.param("m.ckpt", True, marks=pytest.mark.slow),
    ],
)
def test_entry_points_run_nothing(name: str, allow: bool, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / name
    path.write_bytes(zipped(PAYLOADS["os.system"](str(canary))))
    says = "asks for os.system, which no weights need" if allow else "can run code when it is opened; allow it with"
    with pytest.raises(ModelFileError, match=says):
        SingleFile.open(path, allow_pickle=allow)
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_in_the_process_of_their_own(name: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(zipped(PAYLOADS[name](str(canary))))
    with pytest.raises(ModelFileError):
        SingleFile.open(path, allow_pickle=True)
    assert not canary.exists()


# --- what is a pickle


def test_content_decides(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    assert is_pickle(path)
    path.write_bytes(pickle.dumps({}, protocol=4))
    assert is_pickle(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    assert is_pickle(path)
    write_tensors(tmp_path / "m.ckpt", {"a": torch.ones(1)}, {})
    assert not is_pickle(tmp_path / "m.ckpt") and open_tensors(tmp_path / "m.ckpt")[1] == ()
    path.write_bytes(b"")
    assert not is_pickle(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_tensors(path, {"a": torch.zeros(1)}, {"pad": "x" * (0x380 - 0x50)})
    length = path.read_bytes()[:2]
    padding = next(n for n in range(1, 2000) if _length_with(n) == 0x380)
    write_tensors(path, {"a": torch.zeros(1)}, {"pad": "x" * padding})
    assert path.read_bytes()[:2] == b"\x80\x03" and length is not None
    assert not is_pickle(path) and TensorFile.open(path).metadata["pad"] == "x" * padding


def _length_with(padding: int) -> int:
    from sfumato.checkpoints.tensors import _header

    return len(_header(["a"], {"a": torch.zeros(1)}, {"pad": "x" * padding})) - 8


# --- what is converted


def test_an_allowed_pickle_is_the_file_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    family = tiny_family()
    parts = random_parts(family)
    write(tmp_path / "m.safetensors", family, parts)
    weights = load_file(tmp_path / "m.safetensors")
    torch.save({"state_dict": weights, "global_step": 7, "epoch": 3, "optimizer_states": []}, tmp_path / "m.ckpt")
    file = SingleFile.open(tmp_path / "m.ckpt", family=family, allow_pickle=True)
    (note,) = file.notes
    assert note.endswith("has been converted; left aside, for they are no weights: epoch, optimizer_states")
    for part, own in parts.items():
        read = file.read(part, torch.float64)
        assert read.keys() == own.keys() and all(torch.equal(read[name], own[name].double()) for name in own)
    assert list((tmp_path / "temporary").iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
def test_a_pickle_of_the_old_kind(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(3), "a.c": torch.arange(2)}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    file, _ = open_tensors(tmp_path / "m.bin", allow_pickle=True)
    assert file.read("a.b").tolist() == [1, 1, 1] and file.read("a.c").tolist() == [0, 1]


class ModelCheckpoint:
    """Stands for the class of the same name in a training program."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def test_what_training_programs_leave_is_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    numpy = pytest.importorskip("numpy")
    home = types.ModuleType(ModelCheckpoint.__module__)
    home.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, ModelCheckpoint.__module__, home)
    content = {
        "callbacks": {ModelCheckpoint: {"best_model_score": numpy.float64(0.5), "kept": ModelCheckpoint()}},
        "state_dict": {"w": torch.ones(2), "mark": "text"},
        "global_step": 11,
    }
    torch.save(content, tmp_path / "m.ckpt")
    tensors, numbers, left = tensors_of(load(str(tmp_path / "m.ckpt")), size=10**4)
    assert tensors["w"].tolist() == [1, 1] and numbers == {"global_step": "11"} and left == ["callbacks", "mark"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: {"a": torch.zeros(2, 2).to_sparse_csr()}, "a is not a plain dense tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is not a plain dense tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is of type torch.complex64"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "claim 4000000000000 bytes"),
        ([torch.zeros(1)], "holds a list and no table"),
        ({"a": 1}, "no tensors under names"),
        ({}, "no tensors under names"),
        ({3: torch.zeros(1)}, "no tensors under names"),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}}, "holds a textual inversion"),
    ],
)
def test_odd_content_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content() if callable(content) else content, tmp_path / "m.ckpt")
    with pytest.raises(ModelFileError, match=says):
        tensors_of(load(str(tmp_path / "m.ckpt")), size=(tmp_path / "m.ckpt").stat().st_size)


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    with pytest.raises(ModelFileError) as error:
        load(str(tmp_path / "m.pt"))
    assert "refused" in str(error.value) or "damaged" in str(error.value)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """The archive's own record of a storage is shorter than what the pickle claims."""
    torch.save({"a": torch.ones(64)}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "short.ckpt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data[:16] if name.endswith("data/0") else data)
    with pytest.raises(ModelFileError, match="claims a tensor of 256 bytes|damaged"):
        check_storages(str(tmp_path / "short.ckpt"), tensors_of(load(str(tmp_path / "short.ckpt")), size=10**6)[0])


def test_storages_that_are_shared_or_empty_are_sound(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    content = {"a": whole[:4], "b": whole[4:], "c": torch.zeros(0), "d": torch.ones(12), "e": torch.ones(3, 2).T}
    for zip_format in (True, False):
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zip_format)
        tensors, _, _ = tensors_of(load(str(tmp_path / "m.ckpt")), size=10**4)
        check_storages(str(tmp_path / "m.ckpt"), tensors)
        assert all(torch.equal(tensors[name], content[name]) for name in content)


def test_a_compressed_archive_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(64.0)}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    tensors = tensors_of(load(str(tmp_path / "z.ckpt")), size=10**4)[0]
    check_storages(str(tmp_path / "z.ckpt"), tensors)
    assert tensors["a"].tolist() == list(range(64))


def test_control_characters_do_not_reach_the_terminal() -> None:
    with pytest.raises(ModelFileError, match=r"a\?\[31m is of type"):
        tensors_of({"a\x1b[31m": torch.zeros(1, dtype=torch.complex64)}, size=100)
    assert tensors_of({"a": torch.zeros(1), "b\nc": 3}, size=100)[2] == ["b?c"]


@pytest.mark.parametrize("keep", [3, 100, 400])
def test_a_truncated_archive(tmp_path: Path, keep: int) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").write_bytes((tmp_path / "m.ckpt").read_bytes()[:keep])
    with pytest.raises(ModelFileError) as error:
        load(str(tmp_path / "m.ckpt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"damaged", bytes(64), b"<html>", bytes(range(1, 200))])
@pytest.mark.parametrize(("name", "allow"), [("m.ckpt", False), ("m.ckpt", True), ("m.safetensors", True)])
def test_what_is_neither_is_told_as_such(content: bytes, name: str, allow: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{name} is neither a safetensors file nor a checkpoint of torch"):
        open_tensors(tmp_path / name, allow_pickle=allow)


def test_a_file_that_says_it_is_safetensors_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelFileError, match=r"m\.safetensors is not a safetensors file"):
        open_tensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [{"a": 1}, [1.5, "x"], {"a": {1, 2}}, {"a": torch.ones(1)}], ids=str)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_is_refused_in_our_words(content: Any, protocol: int, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ModelFileError) as error:
        load(str(tmp_path / "m.ckpt"))
    said = str(error.value)
    assert said.startswith(("is refused: ", "is refused by the restricted unpickler (", "is damaged, or no checkpoint"))
    for foreign in ("file an issue", "Weights only", "weights_only", "torch.load", "\n"):
        assert foreign not in said
    if protocol >= 4:
        assert "it is a pickle with an instruction (149) that torch writes into no checkpoint" in said


# --- the process


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    monkeypatch.setattr(pickles.sys, "executable", "/bin/false")
    with pytest.raises(ModelFileError, match=r"m\.ckpt could not be read: the process that tried ended with code 1"):
        convert(tmp_path / "m.ckpt", tmp_path / "out")


def test_a_process_that_takes_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    monkeypatch.setattr(pickles, "_SECONDS", 0.0)
    with pytest.raises(ModelFileError, match="could not be read within 0"):
        convert(tmp_path / "m.ckpt", tmp_path / "out")


def test_what_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    monkeypatch.setattr(pickles, "_bound", lambda size: None)  # the bounds would stay on this process
    pickles.child(str(tmp_path / "m.ckpt"), str(tmp_path / "m.ckpt" / "out"))
    assert "cannot be converted: could not write" in pickles._answer(capsys.readouterr().out)  # type: ignore[operator]
    pickles.child(str(tmp_path / "m.ckpt"), str(tmp_path / "out"))
    assert pickles._answer(capsys.readouterr().out) == "" and load_file(tmp_path / "out")["a"] == 1


def test_old_torch_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ModelFileError, match="torch 2.10 or newer"):
        open_tensors(tmp_path / "m.ckpt", allow_pickle=True)


def test_tensors_lie_within_their_storage() -> None:
    fine: Tensor = torch.arange(12.0).reshape(3, 4).T[1:]
    assert tensors_of({"a": fine}, size=100)[0]["a"].shape == (3, 3)
