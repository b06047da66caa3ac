"""Runs and recipes: where a run starts, what it refuses, and errors that name their place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sfumato.checkpoints.io import file_sha256
from sfumato.errors import ModelFileError, UserError
from sfumato.systems.config import parse
from sfumato.training import recipes, run, state
from sfumato.training.config import RESUMABLE_CHANGES
from sfumato.training.recipes.ddpm import DDPMRecipe

from .training_cases import CPU, contents, lines, recipe_from, settings, write_pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def train(recipe: DDPMRecipe, folder: Path, **options: Any) -> tuple[str, list[str]]:
    """Train; (what became of it, what was said)."""
    said: list[str] = []
    result = run.train(recipe, folder, device=CPU, say=said.append, **options)
    return result, said


def recipe(data: Path, **train: Any) -> DDPMRecipe:
    return recipe_from(settings(data, **({"steps": 2, "save_every": 1} | train)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = state.newest(folder)
    assert newest is not None
    return {name: tensor.clone() for name, tensor in state.load(newest).tensors.items()}


# --- what differs


def test_differing_names_the_settings() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": 1e-8, "gone": "x"}
    now = {"a": {"b": 2, "c": [1, 2]}, "d": 1e-8, "new": {"deep": True}}
    assert run.differing(before, now) == ["a.b: 1 -> 2", "gone: 'x' -> None", "new.deep: None -> True"]
    assert run.differing(now, now) == []


def test_what_may_change_does_not_differ() -> None:
    values: dict[str, Any] = {}
    for name in RESUMABLE_CHANGES:
        *parents, last = name.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = "other"
    assert run.differing({}, values) == run.differing(values, {}) == []
    sampling = {"model": {"sampling": {"steps": 5, "grid": {"end": "clean"}}, "size": 8}}
    assert run.differing({"model": {"size": 8}}, sampling) == []
    assert run.differing({"model": {"samplings": 1}}, {}) == ["model.samplings: 1 -> None"]


def test_every_resumable_setting_exists(data: Path) -> None:
    flat = run._flat(recipe(data).model_dump(mode="json"))
    assert all(any(f"{key}.".startswith(f"{name}.") for key in flat) for name in RESUMABLE_CHANGES)


def test_a_dumped_recipe_is_the_same_recipe(tmp_path: Path, data: Path) -> None:
    original = recipe_from(settings(data, optimizer={"lr": 1e-5, "eps": 1e-12, "betas": [0.9, 0.95]}))
    (tmp_path / "dump.yaml").write_text(run.dump(original))
    again = recipes.read_values(str(tmp_path / "dump.yaml"))[1]
    assert run.differing(again, original.model_dump(mode="json")) == []
    assert recipe_from(again) == original


# --- where a run starts


def test_a_run_from_nothing_to_a_model(tmp_path: Path, data: Path) -> None:
    result, said = train(recipe(data), tmp_path / "deep" / "run")
    assert result == "finished"
    assert said[0].startswith("10 pictures, 2 classes; 0.0")
    assert said[1].startswith("about ")
    assert said[-1] == f"finished: {tmp_path / 'deep' / 'run' / 'model.safetensors'}"
    names = {p.name for p in (tmp_path / "deep" / "run").iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.jsonl", "model.safetensors"}


def test_a_dry_run_writes_nothing(tmp_path: Path, data: Path) -> None:
    result, said = train(recipe(data), tmp_path / "run", dry_run=True)
    assert result == "dry run"
    assert len(said) == 2
    assert not (tmp_path / "run").exists()


def test_auto_goes_on_and_may_be_given_more_steps(tmp_path: Path, data: Path) -> None:
    constant = {"optimizer": {"schedule": "constant", "warmup": 0}}
    train(recipe(data, steps=4, **constant), tmp_path / "straight")
    train(recipe(data, **constant), tmp_path / "run")
    result, said = train(recipe(data, steps=4, **constant), tmp_path / "run")
    assert result == "finished"
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'} at step 2" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    left, right = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert "steps: 4" in (tmp_path / "run" / "config.yaml").read_text()


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "run")
    whole = weights(tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    _, said = train(recipe(data), tmp_path / "run")
    assert f"passed over a damaged checkpoint: {broken} does not match its manifest" in said
    assert any("at step 1" in line for line in said)
    again = weights(tmp_path / "run")
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "run")
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        manifest.unlink()
    with pytest.raises(ModelFileError, match="none of the 2 checkpoints"):
        train(recipe(data), tmp_path / "run")


def test_auto_refuses_another_config(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run with another config .*train.seed: 0 -> 1.*choose another folder"):
        train(recipe(data, seed=1), tmp_path / "run")
    with pytest.raises(UserError, match=r"train.batch: 4 -> 2; .* and 2 more\)"):
        train(recipe(data, batch=2, seed=1, optimizer={"lr": 1.0, "eps": 1e-9, "warmup": 1}), tmp_path / "run")
    for options in ({"resume": str(tmp_path / "run")}, {"dry_run": True}):
        with pytest.raises(UserError, match="another config"):
            train(recipe(data, seed=1), tmp_path / "run", **options)
    assert contents(tmp_path / "run") == before


def test_never_wants_an_unused_folder(tmp_path: Path, data: Path) -> None:
    assert train(recipe(data), tmp_path / "run", resume="never")[0] == "finished"
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe(data), tmp_path / "run", resume="never")


def test_folders_that_hold_something_else(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for resume in ("auto", "never", str(tmp_path)):
        with pytest.raises(UserError, match="is not empty and is no training run"):
            train(recipe(data), tmp_path / "thesis", resume=resume)
        with pytest.raises(UserError, match="is a file; a run needs a folder"):
            train(recipe(data), tmp_path / "file", resume=resume)
    (tmp_path / "empty").mkdir()
    assert train(recipe(data), tmp_path / "empty")[0] == "finished"


def test_from_a_checkpoint_or_run_into_a_new_folder(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "first")
    older = tmp_path / "first" / "checkpoints" / "step-00000001"
    before = contents(tmp_path / "first")
    _, said = train(recipe(data), tmp_path / "second", resume=str(older))
    assert f"going on from {older} at step 1" in said
    left, right = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(left[n], right[n]) for n in left)
    _, said = train(recipe(data, steps=3), tmp_path / "third", resume=str(tmp_path / "first"))
    assert any("step-00000002 at step 2" in line for line in said)
    assert contents(tmp_path / "first") == before


def test_a_run_is_not_overwritten_from_elsewhere(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "first")
    train(recipe(data), tmp_path / "second")
    before = contents(tmp_path)
    for start in (tmp_path / "first", tmp_path / "first" / "checkpoints" / "step-00000001", tmp_path):
        for dry_run in (True, False):
            with pytest.raises(UserError, match="second already holds a run, which --resume .* would overwrite"):
                train(recipe(data, steps=3), tmp_path / "second", resume=str(start), dry_run=dry_run)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("box", [True, False])
def test_a_finished_model_is_no_run_to_resume(
    tmp_path: Path, data: Path, box: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(data), tmp_path / "run")
    start = "emoji" if box else str(tmp_path / "run" / "model.safetensors")
    monkeypatch.setattr("sfumato.models.names", lambda: ["emoji"])
    with pytest.raises(UserError, match=f"{start} is a finished model, which training cannot be resumed from .*; give"):
        train(recipe(data), tmp_path / "other", resume=start)
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_a_run_goes_on_from_an_older_checkpoint_of_its_own(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "run")
    whole = weights(tmp_path / "run")
    older = tmp_path / "run" / "checkpoints" / "step-00000001"
    _, said = train(recipe(data), tmp_path / "run", resume=str(older))
    assert f"going on from {older} at step 1" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    again = weights(tmp_path / "run")
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_another_learning_rate_than_that_of_a_run_from_the_start_is_told(
    tmp_path: Path, data: Path, schedule: str
) -> None:
    optimizer = {"schedule": schedule, "warmup": 0}
    train(recipe(data, optimizer=optimizer), tmp_path / "run")
    _, same = train(recipe(data, optimizer=optimizer), tmp_path / "run")
    _, more = train(recipe(data, steps=4, optimizer=optimizer), tmp_path / "run")
    _, again = train(recipe(data, steps=4, optimizer=optimizer), tmp_path / "run")
    told = [line for line in more if line.startswith("note: ")]
    assert not [line for line in same + again if line.startswith("note: ")]
    if schedule == "constant":
        assert told == []
        return
    (note,) = told
    assert note.startswith(f"note: the {schedule} of the learning rate ends at step 4 now, not 2: it goes on at ")
    assert "not 0.00e+00" in note


def test_more_steps_before_the_learning_rate_falls_are_as_from_the_start(tmp_path: Path, data: Path) -> None:
    warming = {"schedule": "cosine", "warmup": 2}
    train(recipe(data, optimizer=warming), tmp_path / "run")
    _, said = train(recipe(data, steps=4, optimizer=warming), tmp_path / "run")
    assert not [line for line in said if line.startswith("note: ")]
    train(recipe(data, steps=4, optimizer=warming), tmp_path / "straight")
    left, right = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"processes": 2},
            "2 processes trained it until here and 1 from here on: the noise is not what it would have been, so this "
            "run is not bit for bit one that never stopped",
        ),
        (
            {"precision": "bf16"},
            "it was trained in bf16 until here and is in fp32 from here on, which suits this device: this run is not "
            "bit for bit one that never stopped",
        ),
        (
            {"convolution": "winograd"},
            "its convolutions were computed by train.convolution=winograd until here and are by direct from here on: "
            "this run is not bit for bit one that never stopped",
        ),
    ],
)
def test_another_way_of_computing_is_told(changed: dict[str, Any], told: str, tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    kept = json.loads((folder / "state.json").read_text())
    assert (kept["processes"], kept["steps"], kept["precision"]) == (1, 2, "fp32")
    (folder / "state.json").write_text(json.dumps(kept | changed))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size,
        "sha256": file_sha256(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    _, said = train(recipe(data), tmp_path / "run")
    assert [line for line in said if line.startswith("note: ")] == [f"note: {told}"]


@pytest.mark.parametrize(("asked", "native", "taken"), [
    ("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16"), ("fp32", True, "fp32"),
])  # fmt: skip
def test_the_precision_that_suits_the_device(
    asked: str, native: bool, taken: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trainer", "run"):
        monkeypatch.setattr(f"sfumato.training.{module}.native_bfloat16", lambda device: native)
    _, said = train(recipe(data, precision=asked), tmp_path / "run")
    assert any(line.endswith(f"on cpu, {taken}") for line in said)
    assert any("only emulates bfloat16" in line for line in said) == (taken == "bf16" and not native)
    kept = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert kept["precision"] == taken
    _, again = train(recipe(data, precision=asked, steps=3), tmp_path / "run")
    assert not [line for line in again if "bit for bit" in line]
    other, now = ("fp32", "fp32") if asked == "auto" else ("auto", "bf16" if native else "fp32")
    _, again = train(recipe(data, precision=other, steps=4), tmp_path / "run")
    notes = [line for line in again if "bit for bit" in line]
    assert len(notes) == (now != taken) and all(f"in {taken} until here and is in {now} from" in one for one in notes)


def test_a_checkpoint_that_is_none(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ModelFileError, match="no checkpoint at"):
        train(recipe(data), tmp_path / "run", resume=str(tmp_path / "missing"))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint to start from"):
        train(recipe(data), tmp_path / "run", resume=str(tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model(tmp_path: Path, data: Path) -> None:
    train(recipe(data), tmp_path / "first")
    values = settings(data, steps=3)
    values["model"]["network"] = values["model"]["network"] | {"layers_per_block": 2}
    with pytest.raises(UserError, match="network.layers_per_block: 1 -> 2"):
        train(recipe_from(values), tmp_path / "second", resume=str(tmp_path / "first"))


def test_data_that_have_changed_are_refused(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    train(recipe(pictures), tmp_path / "run")
    (pictures / "bird" / "00.png").unlink()
    with pytest.raises(UserError, match="data have changed since .*: 10 pictures then, 9 now"):
        train(recipe(pictures, steps=4), tmp_path / "run")
    write_pictures(tmp_path / "pictures")
    (pictures / "bird" / "00.png").rename(pictures / "bird" / "zz.png")
    with pytest.raises(UserError, match="data have changed since .*: as many pictures, but other names"):
        train(recipe(pictures, steps=4), tmp_path / "run")


def test_the_data_may_have_moved(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    train(recipe(pictures), tmp_path / "run")
    pictures.rename(tmp_path / "elsewhere")
    assert train(recipe(tmp_path / "elsewhere", steps=3), tmp_path / "run")[0] == "finished"


def test_bad_pictures_are_listed(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "bird" / "bad.png").write_bytes(b"not a picture")
    values = settings(pictures, steps=1)
    with pytest.raises(UserError, match="bad.png"):
        train(recipe_from(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    values["data"]["skip_bad"] = True
    _, said = train(recipe_from(values), tmp_path / "run")
    quarantine = tmp_path / "run" / "quarantine.txt"
    assert f"1 picture is bad and left out; see {quarantine}" in said
    assert quarantine.read_text().startswith("bird/bad.png: ")


def test_where_no_list_is_written_bad_pictures_are_named(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    for i in range(7):
        (pictures / "bird" / f"bad{i}.png").write_bytes(b"not a picture")
    values = settings(pictures, steps=1)
    values["data"]["skip_bad"] = True
    _, said = train(recipe_from(values), tmp_path / "run", dry_run=True)
    assert said[0].startswith("7 pictures are bad and left out: bird/bad0.png: not a picture")
    assert said[0].endswith("; and 2 more") and "bad4.png" in said[0] and "bad5.png" not in said[0]
    rehearsed: list[str] = []
    run.rehearse(recipe_from(values), device=CPU, say=rehearsed.append)
    assert rehearsed[0] == said[0]


# --- one at a time, and where it can be written


def test_a_run_that_is_being_trained_is_refused(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("fcntl")
    seen: list[str] = []

    def try_again(_: str) -> None:
        if not seen:
            with pytest.raises(UserError) as refused:
                train(recipe(data), tmp_path / "run")
            seen.append(str(refused.value))
            assert train(recipe(data), tmp_path / "run", dry_run=True)[0] == "dry run"

    assert run.train(recipe(data), tmp_path / "run", device=CPU, say=try_again) == "finished"
    assert seen[0].startswith(f"{tmp_path / 'run'} is being trained by process {os.getpid()}; ")
    assert train(recipe(data), tmp_path / "run")[0] == "finished"
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_killed_process_holds_nothing(tmp_path: Path, data: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    code = (
        "import fcntl, os, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=file, flush=True)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being trained by process {other.pid}"):
            train(recipe(data), tmp_path / "run")
        other.kill()
    assert (tmp_path / "run" / ".lock").exists() and fcntl
    assert train(recipe(data), tmp_path / "run")[0] == "finished"


def test_without_locks_runs_are_trained_all_the_same(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "fcntl", None)
    assert train(recipe(data), tmp_path / "run")[0] == "finished"
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_its_holder_has_just_removed_is_taken_anew(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def removed_meanwhile(file: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / "run" / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    assert train(recipe(data), tmp_path / "run")[0] == "finished"
    assert len(calls) == 2


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_cannot_be_written_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    nothing = recipe(tmp_path / "no pictures here")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="deep/run cannot be made: .*file is a file"):
        train(nothing, tmp_path / "file" / "deep" / "run", dry_run=dry_run)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for folder in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(UserError, match=f"cannot be written: {tmp_path} is not writable"):
            train(nothing, folder, dry_run=dry_run)
    assert (tmp_path / "file").read_text() == "precious" and not (tmp_path / "new").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures here"):
        train(recipe(tmp_path / "no pictures here"), tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, data: Path) -> None:
    train(recipe(data, steps=3), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"step-00000003 is at step 3 already, more than train.steps=2;"):
        train(recipe(data, steps=2), tmp_path / "run")
    assert contents(tmp_path / "run") == before


# --- captions and options that a recipe does not read


def test_captions_that_nobody_reads_are_in_nobodys_way(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "bird" / "00.txt").write_text("a bird")
    assert train(recipe(pictures), tmp_path / "run", dry_run=True)[0] == "dry run"
    (pictures / "fish" / "01.txt").write_bytes(b"caf\xe9")
    assert train(recipe(pictures), tmp_path / "run", dry_run=True)[0] == "dry run"
    values = settings(pictures)
    values["data"]["label"] = "text"
    with pytest.raises(UserError, match="01.txt cannot be read as UTF-8 text"):
        train(recipe_from(values), tmp_path / "run", dry_run=True)


def test_what_needs_classes_is_refused_without(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    load(tmp_path, GOOD, "label_dropout=0.2", "model.sampling.guidance=2", "data.label=folder")
    for key in ("label_dropout", "model.sampling.guidance"):
        with pytest.raises(UserError, match=f"{key} is for classes, but there are none"):
            load(tmp_path, GOOD, f"{key}=0.5")


# --- recipes


def load(tmp_path: Path, text: str, *overrides: str, data: str | None = ".") -> DDPMRecipe:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return recipes.load(str(path), overrides, data)


GOOD = "recipe: ddpm\ndata: {size: 8}\ntrain:\n  steps: 3\n"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: ddpm\ndata: {size: 8\ntrain: 3\n", r"my.yaml: line 3: malformed YAML \("),
        ("recipe: ddpm\n\tdata: 3\n", r"my.yaml: line 2: malformed YAML \("),
        ("recipe: ddpm\nwhen: 2020-13-45\n", r"malformed YAML \(month must be in 1..12"),
        ("recipe: ddpm\nx: " + "1" * 5000 + "\n", "malformed YAML"),
        ("recipe: ddpm\nx: !!python/object/apply:os.system [ls]\n", r"line 2: malformed YAML \(.*constructor"),
        ("recipe: ddpm\n? [a]\n: 3\n", "line 2: malformed YAML"),
        ("recipe: ddpm\nx: " + "[" * 20_000, "line 2: YAML nested deeper than 30 levels"),
        ("\x00", "malformed YAML"),
        ("a: &a 1\nb: *a\n", "my.yaml: line 2: YAML aliases are not allowed"),
        (BOMB, "line 2: YAML aliases are not allowed"),
        ("train:\n  steps: 1\ntrain:\n  steps: 2\n", "line 3: the key 'train' comes twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: the key 'steps' comes twice"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("just text", "a recipe is a mapping of keys to values"),
        ("--- {a: 1}\n--- {b: 2}\n", "malformed YAML"),
        ("data: {size: 8}\n", "recipe must be one of autoencoder, autoencoder-decoder, .*, sr3, got None"),
        ("recipe: ddmp\n", r"got 'ddmp' \(did you mean 'ddpm'\?\)"),
        ("recipe: [ddpm]\n", r"got \['ddpm'\]"),
        (GOOD + "  stpes: 4\n", r"unknown key 'train.stpes' \(did you mean 'steps'\?\)"),
        (GOOD + "trian: {}\n", r"unknown key 'trian' \(did you mean 'train'\?\)"),
        (GOOD + "3: 4\n", "my.yaml: "),
        (GOOD + "  optimizer: {lr: fast}\n", "train.optimizer.lr: .*got 'fast'"),
        (GOOD + "  optimizer: {lr: .nan}\n", "train.optimizer.lr: .*finite"),
        (GOOD + "  optimizer: {lr: -1}\n", "train.optimizer.lr: .*greater than 0, got -1"),
        (GOOD + "  optimizer: 3\n", "train.optimizer: "),
        (GOOD + "  precision: fp8\n", "train.precision: .*'fp8'"),
        (GOOD + "  keep: 1\n", "train.keep: .*greater than or equal to 2"),
        (GOOD + "  batch: 2.5\n", "train.batch: .*got 2.5"),
        (GOOD + "objective: {los: l1}\n", r"unknown objective key 'los' \(did you mean 'loss'\?\)"),
        (GOOD + "objective: {loss: l3}\n", "l3"),
        (GOOD + "objective: {vlb_weight: many}\n", "vlb_weight"),
        (GOOD + "model: {network: {block_out_chanels: [8]}}\n", "block_out_channels"),
        (GOOD + "model: {network: {norm_num_groups: 0}}\n", "my.yaml: "),
        (GOOD + "model: {schedule: {name: cosin}}\n", "model.schedule.name: .*'cosin'"),
        (GOOD + "model: {sampling: {sampler: ddmi}}\n", r"'ddmi' \(did you mean 'ddim'\?\)"),
        ("recipe: ddpm\ndata: 3\n", "data"),
        ("recipe: ddpm\ndata: {size: 0}\n", "data.size: .*got 0"),
        ("method: ddpm\ndata: {}\n", "data.size: field required"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_overrides(tmp_path: Path) -> None:
    given = ("train.steps=7", "train.optimizer.lr=1e-3", "model.network={dropout: 0.1}", "data.flip=yes")
    found = load(tmp_path, GOOD, *given)
    assert found.train.steps == 7
    assert found.train.optimizer.lr == 1e-3
    assert found.model.network == {"dropout": 0.1}
    assert found.data.flip is True
    assert found.data.path == "."
    assert load(tmp_path, GOOD, "description=a=b").description == "a=b"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "'train.steps' is not understood; write key=value, e.g. train.steps=1000"),
        ("=3", "'=3' is not understood"),
        ("train.steps=[1", r"'train.steps=\[1': the value is not readable YAML"),
        ("train.steps=2020-13-45", "the value is not readable YAML"),
        ("train.steps=" + "[" * 20_000, "'train.steps': line 1: YAML nested deeper than 30 levels"),
        ("train.stpes=3", r"unknown key 'train.stpes' \(did you mean 'steps'\?\)"),
        ("train.steps.more=3", "train.steps.more: steps is a value, not a group of keys"),
        ("train.steps=many", "train.steps: .*got 'many'"),
        ("train..steps=3", "unknown key"),
        ("train.steps=", "train.steps: .*got None"),
    ],
)
def test_overrides_that_are_wrong(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, GOOD, override)


def test_whole_numbers_may_be_written_as_powers_of_ten(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD + "  batch: 1e1\n", "train.steps=1e4", "data.size=0.16e+2", "train.seed=0")
    assert (found.train.steps, found.train.batch, found.data.size) == (10_000, 10, 16)
    with pytest.raises(UserError, match="train.steps: .*"):
        load(tmp_path, GOOD, "train.steps=15e-1")


def test_a_file_inherits_from_the_recipe_that_it_names(tmp_path: Path) -> None:
    short = "recipe: ddpm\ndata: {size: 16}\n"
    assert load(tmp_path, short) == recipes.load("ddpm", ["data.size=16"], ".").model_copy(update={"description": ""})
    other = load(tmp_path, "recipe: ddpm-emoji32\nmodel: {network: {dropout: 0.1}}\ntrain: {optimizer: {lr: 1}}\n")
    by_name = recipes.load("ddpm-emoji32", ["model.network.dropout=0.1", "train.optimizer.lr=1"], ".")
    assert other == by_name.model_copy(update={"description": ""}) and other.recipe == "ddpm"
    alone = load(tmp_path, "method: ddpm\ndata: {size: 16}\n")
    assert alone.model.network == {} and alone.train == type(alone.train)()


def test_a_copy_of_a_recipe_and_a_run_s_config_inherit_nothing(tmp_path: Path, data: Path) -> None:
    for name in recipes.names():
        file = tmp_path / f"{name}.yaml"
        file.write_text(recipes.source(name)[1])
        assert recipes.read_values(str(file))[1] == recipes.read_values(name)[1]
    train(recipe(data), tmp_path / "run")
    kept = tmp_path / "run" / "config.yaml"
    again = recipes.load(str(kept))
    assert again == recipe(data) and train(again, tmp_path / "run")[0] == "finished"
    older = yaml.safe_load(kept.read_text())
    kept.write_text(yaml.safe_dump({"recipe": older.pop("method"), **older}))
    assert recipes.load(str(kept)) == recipe(data) and train(recipe(data), tmp_path / "run")[0] == "finished"


def test_conditions_and_other_schedules_replace_what_is_inherited(tmp_path: Path) -> None:
    text = "recipe: latent\ncodec: pixels\ndata: {size: 16}\nconditions: {words: {kind: minilm}}\n"
    found = load(tmp_path, text + "model: {schedule: {name: flow}}\n")
    assert list(found.conditions) == ["words"] and found.model.schedule.name == "flow"
    sr3 = {"name": "linear", "steps": 2000, "start": 1e-6, "end": 0.01}
    assert recipes.merged({"schedule": sr3}, {"schedule": {"name": "flow"}}) == {"schedule": {"name": "flow"}}
    assert recipes.merged({"schedule": sr3}, {"schedule": {"end": 0.02}}) == {"schedule": sr3 | {"end": 0.02}}


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        ("method: ddmp\n", "train.seed=1", r"method must be one of .* got 'ddmp' \(did you mean 'ddpm'\?\)"),
        ("method: [ddpm]\n", "train.seed=1", r"got \['ddpm'\]"),
        ("method: ddpm\nrecipe: ddpm\n", "train.seed=1", "recipe and method each say what is trained"),
        ("recipe: ddpm-emoji\n", "train.seed=1", "did you mean 'ddpm-emoji32'"),
        ("recipe: ddpm\n", "recipe=ddpm-emoji32", "recipe cannot be changed by an override"),
    ],
)
def test_what_a_file_can_name(tmp_path: Path, text: str, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, text, override)


# --- keys that do nothing, steps that there are not


SHORT = "recipe: ddpm\ndata: {size: 16}\nmodel: {schedule: {steps: 10}}\n"


def test_steps_that_nobody_asked_for_fit_a_short_schedule(tmp_path: Path) -> None:
    for found in (load(tmp_path, SHORT), recipes.load("ddpm", ["model.schedule.steps=10"], ".")):
        assert (found.model.sampling.steps, found.train.sample_steps) == (10, 10)
    longer = load(tmp_path, SHORT, "model.schedule.steps=30")
    assert (longer.model.sampling.steps, longer.train.sample_steps) == (30, 25)
    latent = recipes.load("latent-semantic", ["model.schedule.steps=10"], ".")
    assert (latent.model.sampling.steps, latent.train.sample_steps) == (10, 10)
    flow = recipes.load("ddpm", ["model.schedule.name=flow", "model.prediction.parameterization=flow"], ".")
    assert (flow.model.sampling.steps, flow.train.sample_steps) == (50, 25)
    spaced = load(tmp_path, SHORT, "model.sampling.schedule=ddim5")
    assert spaced.train.sample_steps == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.sample_steps=11", "does not go with model.schedule: steps must be at most the schedule's 10, got 11"),
        ("model.sampling.steps=50", "does not go with model.schedule: steps must be at most the schedule's 10, got 50"),
        ("model.sampling.schedule=ddim20", "does not go with model.schedule"),
    ],
)
def test_more_steps_than_the_schedule_has_are_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{override} {said}"):
        load(tmp_path, SHORT, override)
    with pytest.raises(UserError, match=said):
        recipes.load("latent-semantic", ["model.schedule.steps=10", override], ".")


def test_sample_steps_of_a_run_without_samples_are_not_looked_at(tmp_path: Path) -> None:
    assert load(tmp_path, SHORT, "train.sample_steps=11", "train.sample_every=0").train.sample_steps == 11


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.weighting=uniform", "objective.min_snr_gamma=3"], "without objective.weighting=min_snr; leave it"),
        (["objective.p2_k=2"], "objective.p2_k=2 does nothing without objective.weighting=p2"),
        (["objective.huber_delta=2"], "without objective.loss=huber"),
        (["objective.logit_std=2"], "without objective.density=logit_normal"),
        (["objective.importance_history=3"], "without objective.importance=second_moment"),
        (["objective.self_condition_rate=0.9"], "without model.prediction.self_condition=true"),
        (["objective.continuous_data=true"], "without objective.vlb_weight"),
        (["model.prediction.sigma_data=0.3"], "model.prediction.sigma_data=0.3 does nothing without .* edm"),
        (["model.schedule.shift=3"], "schedule.shift=3.0 does nothing with the schedule 'cosine'; it is for flow"),
        (["objective.weighting=p2", "objective.p2_gamma=-1"], "objective.p2_gamma must not be negative"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    text = "recipe: ddpm\ndata: {size: 16}\n"
    with pytest.raises(UserError, match=said):
        load(tmp_path, text, *overrides)


def test_keys_that_do_something_or_have_their_default_are_taken(tmp_path: Path) -> None:
    text = "recipe: ddpm\ndata: {size: 16}\n"
    load(tmp_path, text, "objective.min_snr_gamma=3")
    load(tmp_path, text, "objective.p2_k=1", "objective.self_condition_rate=0.5", "model.prediction.sigma_data=0.5")
    load(tmp_path, text, "objective.self_condition_rate=0.9", "model.prediction.self_condition=true")
    for edm in ("parameterization=edm", "preconditioning=edm"):
        load(tmp_path, text, "model.prediction.sigma_data=0.3", f"model.prediction.{edm}")
    load(tmp_path, text, "model.prediction.sigma_data=0.3", "model.schedule.name=ve")


def test_a_recipe_needs_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="my.yaml names no data; give --data FOLDER"):
        load(tmp_path, GOOD, data=None)


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'ddpm-emoji' \(did you mean 'ddpm-emoji32'\?\)"):
        recipes.load("ddpm-emoji")
    with pytest.raises(UserError, match="no recipe file at"):
        recipes.load(str(tmp_path / "none.yaml"))
    (tmp_path / "big.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(UserError, match="larger than a recipe can be"):
        recipes.load(str(tmp_path / "big.yaml"))
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        recipes.load(str(tmp_path / "binary.yml"))


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_comes_with_the_package_is_valid(tmp_path: Path, name: str) -> None:
    values = recipes.read_values(name)[1]
    latent = values["recipe"] == "latent"
    codec = "pixels" if latent and "codec" not in values else None
    if values["recipe"] == "autoencoder" and "model" not in values:
        codec = "emoji"
    found = recipes.load(name, ["data.size=64"] if latent else [], ".", codec)
    assert found.description
    (tmp_path / "dump.yaml").write_text(run.dump(found))
    assert parse(type(found), recipes.read_values(str(tmp_path / "dump.yaml"))[1], "dump") == found
