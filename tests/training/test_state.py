"""Checkpoints: bit-equal round trips, and an older sound one whatever happens while a new one is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.io import write_model
from sfumato.errors import ModelFileError, UserError
from sfumato.training import state
from sfumato.training.state import Checkpoint, damage, load, newest, optimizer_tensors, restore_optimizer, save


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)

    def some() -> dict[str, Tensor]:
        return {"network.a": torch.randn(3, 2, generator=generator), "network.b": torch.randn((), generator=generator)}

    moments = {"0.step": torch.tensor(float(step)), "0.exp_avg": torch.randn(3, 2, generator=generator)}
    counts = {"step": step, "ema_updates": step, "pictures": 5}
    return Checkpoint(some(), some(), moments, counts, {"system": "toy", "size": 8})


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    for name in ("tensors", "average", "optimizer"):
        left, right = getattr(found, name), getattr(expected, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left)
    assert found.state == expected.state
    assert found.config == expected.config


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / state.FOLDER).iterdir())


# --- round trips


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    written = checkpoint(7)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    written = Checkpoint(
        {**written.tensors, "network.half": torch.randn(4).bfloat16(), "network.count": torch.tensor(2**40)},
        written.average,
        {**written.optimizer, "1.exp_avg": special},
        written.state,
        written.config,
    )
    folder = save(tmp_path, written, 2)
    assert folder == tmp_path / "checkpoints" / "step-00000007" == newest(tmp_path)
    found = load(folder)
    assert found.optimizer["1.exp_avg"].view(torch.int32).tolist() == special.view(torch.int32).tolist()
    kept = {n: t for n, t in found.optimizer.items() if n != "1.exp_avg"}
    expected = Checkpoint(
        written.tensors, written.average, checkpoint(7).optimizer, written.state, written.config
    )
    assert_same(Checkpoint(found.tensors, found.average, kept, found.state, found.config), expected)
    assert names(tmp_path) == ["step-00000007"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    for file in save(tmp_path, checkpoint(1), 2).iterdir():
        data = file.read_bytes()
        if file.suffix == ".json":
            assert json.loads(data)
        else:
            length = int.from_bytes(data[:8], "little")
            assert json.loads(data[8 : 8 + length])


def trained(layout: torch.memory_format, steps: int, kept: dict[int, dict[str, Tensor]] | None = None) -> Any:
    """A small network after `steps` steps of fused AdamW; `kept` collects or replaces the state at step 3."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 3))
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1, fused=True)
    for step in range(steps):
        if step == 3 and kept is not None:
            tensors = {n: t.contiguous().clone() for n, t in optimizer_tensors(optimizer).items()}
            optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1, fused=True)
            restore_optimizer(optimizer, tensors)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        network(x.to(memory_format=layout)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_adamw_goes_on_bit_equal_in_any_memory_layout(layout: torch.memory_format) -> None:
    straight, restored = trained(layout, 6), trained(layout, 6, {})
    for left, right in zip(straight[0].parameters(), restored[0].parameters(), strict=True):
        assert torch.equal(left, right)
    left_state, right_state = optimizer_tensors(straight[1]), optimizer_tensors(restored[1])
    assert left_state.keys() == right_state.keys()
    assert all(torch.equal(left_state[n], right_state[n]) for n in left_state)
    assert float(right_state["0.step"]) == 6


def test_restoring_copies(tmp_path: Path) -> None:
    network, optimizer = trained(torch.contiguous_format, 2)
    tensors = {n: t.clone() for n, t in optimizer_tensors(optimizer).items()}
    before = {n: t.clone() for n, t in tensors.items()}
    restore_optimizer(optimizer, tensors)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    optimizer.step()
    assert all(torch.equal(tensors[n], before[n]) for n in tensors)


def test_optimizer_state_of_other_parameters_is_refused() -> None:
    _, optimizer = trained(torch.contiguous_format, 1)
    good = optimizer_tensors(optimizer)
    for name, tensor in [("99.exp_avg", torch.zeros(1)), ("0.exp_avg", torch.zeros(5)), ("x", torch.zeros(1))]:
        with pytest.raises(ModelFileError, match="no such parameter"):
            restore_optimizer(optimizer, {**good, name: tensor})


def test_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=True)
    whole = checkpoint(0)
    folder = save(tmp_path, Checkpoint(whole.tensors, whole.average, {}, whole.state, whole.config), 2)
    restore_optimizer(optimizer, load(folder).optimizer)
    assert optimizer_tensors(optimizer) == {}


# --- which one is found


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 12):
        save(tmp_path, checkpoint(step), 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000012"]
    save(tmp_path, checkpoint(100_000_000), 2)
    assert names(tmp_path) == ["step-00000012", "step-100000000"]
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-100000000"


def test_one_just_saved_is_kept_even_if_later_ones_exist(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, checkpoint(step), 2)
    save(tmp_path, checkpoint(15), 2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]


def test_the_same_step_again(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(4), 2)
    other = checkpoint(4)
    other = Checkpoint(other.average, other.tensors, other.optimizer, other.state, other.config)
    folder = save(tmp_path, other, 2)
    assert names(tmp_path) == ["step-00000004"]
    assert_same(load(folder), other)


def test_left_overs_of_killed_processes_are_removed(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1), 2)
    for name in ("step-00000002.tmp-99", "step-00000001.gone"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    save(tmp_path, checkpoint(3), 2)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000003"]


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None
    with pytest.raises(ModelFileError, match="no checkpoint at"):
        load(tmp_path / "missing")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, checkpoint(3), 2)
    flips = 0
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        places = range(len(data)) if file.name == state.MANIFEST else range(0, len(data), 7)
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(changed)
            assert damage(folder) is not None, (file.name, place)
            flips += 1
        file.write_bytes(data)
        assert damage(folder) is None
    assert flips > 500


def break_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def remove_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_manifest(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / state.MANIFEST).write_text(text)

    return change


FILES = (state.MODEL, state.AVERAGE, state.OPTIMIZER, state.STATE, state.MANIFEST)


@pytest.mark.parametrize(
    "harm",
    [
        *(pytest.param(break_file(name), id=f"cut {name}") for name in FILES),
        *(pytest.param(remove_file(name), id=f"no {name}") for name in FILES),
        *(
            pytest.param(replace_manifest(text), id=f"manifest {text[:9]}")
            for text in ("", "{}", "[]", "null", '{"state.json": 3}', "[" * 100_000)
        ),
    ],
)
def test_a_damaged_one_is_passed_over(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    older, newer = save(tmp_path, checkpoint(1), 2), save(tmp_path, checkpoint(2), 2)
    harm(newer)
    assert newest(tmp_path) == older
    with pytest.raises(ModelFileError):
        load(newer)
    harm(older)
    with pytest.raises(ModelFileError, match="none of the 2 checkpoints in .* is sound"):
        newest(tmp_path)


@pytest.mark.parametrize("lost", ["step", "ema_updates", "pictures"])
def test_a_state_without_its_numbers_is_refused(tmp_path: Path, lost: str) -> None:
    whole = checkpoint(5)
    folder = save(tmp_path, Checkpoint({}, {}, {}, {**whole.state, "other": 1}, {}), 2)
    for value in (None, -1, "5"):
        changed = {**whole.state, lost: value}
        if value is None:
            del changed[lost]
        data = json.dumps(changed).encode()
        (folder / state.STATE).write_bytes(data)
        manifest = json.loads((folder / state.MANIFEST).read_text())
        manifest[state.STATE] = {"bytes": len(data), "sha256": state.file_sha256(folder / state.STATE)}
        (folder / state.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ModelFileError, match=f"must hold '{lost}'"):
            load(folder)


# --- a disk that stops, or is full


class Crash(BaseException):
    """The process is gone: nothing is cleaned up after it."""


class Disk:
    """Counts every change of the disk; from number `at` on it is dead, or full.

    Args:
        at: the operation that fails; None for none.
        full: fail with ENOSPC, in everything that takes room; else die in everything.
    """

    def __init__(self, at: int | None, full: bool = False) -> None:
        self.at, self.full, self.count = at, full, 0

    def _tick(self, takes_room: bool = True) -> bool:
        """Whether this operation fails."""
        if self.full and not takes_room:
            return False
        self.count += 1
        return self.at is not None and self.count > self.at

    def _fail(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise Crash

    def guard(self, real: Callable[..., Any], takes_room: bool = True) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._tick(takes_room):
                self._fail()
            return real(*args, **kwargs)

        return guarded

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`Path.open` whose writes are torn in the middle when they fail."""

        def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)
            if self._tick():
                self._fail()
            file = real(path, mode, *args, **kwargs)
            disk, write = self, file.write

            class Torn:
                def __enter__(self) -> Torn:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, data: bytes) -> int:
                    if disk._tick():
                        write(data[: len(data) // 2])
                        file.flush()
                        disk._fail()
                    return int(write(data))

            return Torn()

        return open_

    def torn_rmtree(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def rmtree(path: Path, ignore_errors: bool = False) -> None:
            if Path(path).exists() and self._tick(False):
                if self.count == (self.at or 0) + 1:
                    next(iter(sorted(Path(path).iterdir()))).unlink()
                self._fail()
            real(path, ignore_errors=ignore_errors)

        return rmtree

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with (
            mock.patch("os.fsync", self.guard(os.fsync)),
            mock.patch("os.replace", self.guard(os.replace)),
            mock.patch("os.rename", self.guard(os.rename)),
            mock.patch.object(Path, "mkdir", self.guard(Path.mkdir)),
            mock.patch.object(Path, "unlink", self.guard(Path.unlink, takes_room=False)),
            mock.patch.object(Path, "open", self.opened(Path.open)),
            mock.patch("shutil.rmtree", self.torn_rmtree(shutil.rmtree)),
        ):
            yield


def operations(run: Path, prepare: Callable[[Path], None], new: Checkpoint, full: bool = False) -> int:
    """How many operations a save takes that goes well."""
    prepare(run)
    disk = Disk(None, full)
    with disk.in_use():
        save(run, new, 2)
    return disk.count


def none_before(run: Path) -> None:
    run.mkdir()


def one_before(run: Path) -> None:
    save(run, checkpoint(1), 2)


def two_before(run: Path) -> None:
    for step in (1, 2):
        save(run, checkpoint(step), 2)


def same_before(run: Path) -> None:
    """The only checkpoint is of the same step, with other contents."""
    whole = checkpoint(9)
    save(run, Checkpoint(whole.average, whole.tensors, whole.optimizer, whole.state, whole.config), 2)


@pytest.mark.parametrize("prepare", [none_before, one_before, two_before, same_before])
def test_killed_at_any_moment_of_a_save(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    new = checkpoint(9)
    total = operations(tmp_path / "whole", prepare, new)
    assert total > 25
    for at in range(total):
        run = tmp_path / f"{at}"
        prepare(run)
        before = newest(run)
        old = load(before) if before else None
        with pytest.raises(Crash), Disk(at).in_use():
            save(run, new, 2)
        for folder in (run / state.FOLDER).glob("step-*"):
            assert damage(folder) is None or state._TEMPORARY.fullmatch(folder.name), folder
        found = newest(run)
        if found is None:
            assert old is None
        elif torch.equal(load(found).tensors["network.a"], new.tensors["network.a"]):
            assert_same(load(found), new)
        else:
            assert old is not None
            assert_same(load(found), old)
        save(run, new, 2)
        assert_same(load(newest(run) or run), new)
        expected = {none_before: 1, one_before: 2, two_before: 2, same_before: 1}[prepare]
        assert len(names(run)) == expected, names(run)
        shutil.rmtree(run)


@pytest.mark.parametrize("prepare", [none_before, one_before, two_before, same_before])
def test_a_full_disk_at_any_moment_of_a_save(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    new = checkpoint(9)
    total = operations(tmp_path / "whole", prepare, new, full=True)
    failed = 0
    for at in range(total):
        run = tmp_path / f"{at}"
        prepare(run)
        before = newest(run)
        old = load(before) if before else None
        try:
            with Disk(at, full=True).in_use():
                save(run, new, 2)
        except UserError as error:
            failed += 1
            assert "the disk is full" in str(error) and str(run) in str(error)
            assert "\n" not in str(error)
        if (run / state.FOLDER).is_dir():
            assert not [n for n in names(run) if state._TEMPORARY.fullmatch(n)]
            assert all(damage(run / state.FOLDER / n) is None for n in names(run))
        found = newest(run)
        assert found is not None or old is None
        if found is not None and old is not None:
            assert any(
                torch.equal(load(found).tensors["network.a"], c.tensors["network.a"]) for c in (old, new)
            )
        shutil.rmtree(run)
    assert failed > 20


def test_a_disk_that_does_not_keep_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(tmp_path, checkpoint(1), 2)

    def lossy(path: Path, tensors: Any, config: Any) -> str:
        sha256 = write_model(path, tensors, config)
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        return sha256

    monkeypatch.setattr(state, "write_model", lossy)
    with pytest.raises(UserError, match="did not keep what was written"):
        save(tmp_path, checkpoint(2), 2)
    assert names(tmp_path) == [older.name]


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="could not save .*step-00000001: a part of the path is a file"):
        save(tmp_path / "file", checkpoint(1), 2)
