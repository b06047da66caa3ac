"""`sfumato train` and `sfumato recipes`: a run from start to finish, its resumption, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sfumato.images import read_settings
from sfumato.systems import open_system

from .. import tiny

RUN = "step-00000004", "step-00000006"


def _steps(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def test_run_leaves_what_it_says(place: Path) -> None:
    run = place / "run"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == list(RUN)
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    with Image.open(run / "samples/step-00000006.png") as sheet:
        assert sheet.width > 2 * 8
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert _steps(run) == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "validation_loss" in r] == [2, 4, 6]
    losses = [r for r in records if "loss" in r]
    assert all(len(r["loss_by_level"]) == 8 and r["grad_norm"] > 0 for r in losses)
    opened = open_system(run / "model.safetensors")
    assert opened.system.config.labels == ("cat", "dog") and opened.system.config.size == 8
    assert not list(run.rglob("*.tmp*"))


def test_same_command_goes_on(place: Path, succeed: Callable) -> None:
    shutil.copytree("run", "mine")
    done = succeed("train", "tiny.yaml", "--out", "mine", "train.steps=9")
    assert "going on from mine/checkpoints/step-00000006 at step 6" in done.out
    assert _steps(place / "mine") == list(range(1, 10))
    names = sorted(p.name for p in (place / "mine/checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000009"]
    assert yaml.safe_load((place / "mine/config.yaml").read_text())["train"]["steps"] == 9


def test_finished_run_is_left_as_it_is(place: Path, succeed: Callable) -> None:
    shutil.copytree("run", "mine")
    before = tiny.tree(place / "mine")
    done = succeed("train", "tiny.yaml", "--out", "mine")
    assert tiny.tree(place / "mine") == before
    assert "finished" in done.out


def test_interrupted_run_is_bit_for_bit_the_uninterrupted_one(place: Path, succeed: Callable) -> None:
    shutil.copytree("run", "mine")
    shutil.rmtree("mine/checkpoints/step-00000006")
    (place / "mine/model.safetensors").unlink()
    succeed("train", "tiny.yaml", "--out", "mine")
    for file in ("model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (place / "mine" / file).read_bytes() == (place / "run" / file).read_bytes()


def test_start_from_another_runs_checkpoint(place: Path, succeed: Callable) -> None:
    done = succeed("train", "tiny.yaml", "--out", "other", "--resume", "run/checkpoints/step-00000004")
    assert "at step 4" in done.out and _steps(place / "other") == [5, 6]
    assert (place / "other/model.safetensors").read_bytes() == (place / "run/model.safetensors").read_bytes()


def test_resume_never_wants_an_unused_folder(place: Path, run: Callable, succeed: Callable) -> None:
    refused = run("train", "tiny.yaml", "--out", "run", "--resume", "never")
    assert refused.code == 2 and "run already holds a run" in refused.err
    succeed("train", "tiny.yaml", "--out", "fresh", "--resume", "never", "train.steps=1")
    assert _steps(place / "fresh") == [1]


def test_printed_config_is_a_recipe(place: Path, succeed: Callable) -> None:
    printed = succeed("train", "tiny.yaml", "train.steps=7", "--print-config").out
    assert yaml.safe_load(printed)["train"]["steps"] == 7
    assert yaml.safe_load(printed)["train"]["ema"]["warmup"] is True  # a default, written out
    (place / "printed.yaml").write_text(printed)
    assert succeed("train", "printed.yaml", "--print-config").out == printed
    assert "printed.yaml is a valid recipe" in succeed("recipes", "validate", "printed.yaml").out
    assert sorted(p.name for p in place.iterdir() if p.is_dir()) == ["pictures", "run"]


def test_dry_run_writes_nothing(place: Path, succeed: Callable) -> None:
    before = tiny.tree(place)
    done = succeed("train", "tiny.yaml", "--out", "dry", "--dry-run")
    assert tiny.tree(place) == before
    assert "2 classes" in done.out and "M parameters" in done.out
    assert "for 6 steps" in done.out and "GiB of memory" in done.out


@pytest.mark.parametrize("override", ["train.sample_steps=25", "model.sampling.steps=25"])
def test_what_cannot_be_sampled_is_refused_alike_and_leaves_nothing(place: Path, run: Callable, override: str) -> None:
    before = sorted(place.rglob("*"))
    settings = ("tiny.yaml", "model.schedule.steps=10", override)
    found = [run("train", *settings, "--out", "new"), run("train", *settings, "--out", "new", "--dry-run")]
    found += [run("check", *settings), run("recipes", "validate", *settings)]
    assert {(result.code, result.err) for result in found} == {
        (2, f"sfumato: tiny.yaml: {override} does not go with model.schedule: steps must be at most the schedule's 10, "
            "got 25\n")
    }  # fmt: skip
    assert sorted(place.rglob("*")) == before


def test_another_run_is_not_overwritten(place: Path, run: Callable, succeed: Callable) -> None:
    succeed("train", "tiny.yaml", "--out", "second", "train.steps=1")
    before = (place / "second/metrics.jsonl").read_bytes()
    refused = run("train", "tiny.yaml", "--out", "second", "--resume", "run")
    assert refused.code == 2 and "second already holds a run, which --resume run would overwrite" in refused.err
    assert (place / "second/metrics.jsonl").read_bytes() == before


def test_skip_bad_lists_what_was_left_out(place: Path, succeed: Callable) -> None:
    shutil.copytree("pictures", "some")
    whole = (place / "some/cat/00.png").read_bytes()
    (place / "some/dog/cut.png").write_bytes(whole[: len(whole) // 2])
    tiny.picture(99, size=4).save("some/cat/small.png")
    done = succeed("train", "tiny.yaml", "--data", "some", "--out", "mine", "--skip-bad", "train.steps=1")
    assert "2 pictures are bad and left out" in done.out
    lines = (place / "mine/quarantine.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["cat/small.png", "dog/cut.png"]


def test_check_leaves_bad_pictures_out_where_that_is_asked_for(place: Path, run: Callable, succeed: Callable) -> None:
    shutil.copytree("pictures", "some")
    tiny.picture(99, size=4).save("some/cat/small.png")
    refused = run("check", "tiny.yaml", "--data", "some")
    assert refused.code == 2 and "--skip-bad" in refused.err and "data.upscale=true" in refused.err
    done = succeed("check", "tiny.yaml", "--data", "some", "--skip-bad")
    assert "1 picture is bad and left out: cat/small.png: " in done.out and "quarantine" not in done.out
    done = succeed("train", "tiny.yaml", "--data", "some", "--out", "mine", "--skip-bad", "--dry-run")
    assert "left out: cat/small.png: " in done.out and not (place / "mine").exists()


def test_parquet_trains_too(place: Path, succeed: Callable) -> None:
    succeed("train", "tiny.yaml", "--data", tiny.PARQUET, "--out", "mine", "data.label=group", "train.steps=1")
    assert len(open_system(place / "mine/model.safetensors").system.config.labels) == 8


def test_generate_from_the_run(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", "run", "--label", "dog", "--seed", 2, "--out", "a.png")
    settings = read_settings("a.png")
    assert (settings["model"], settings["label"], settings["steps"], settings["guidance"]) == ("run", "dog", 3, 1.5)


def test_recipes_ls_show_and_validate(place: Path, succeed: Callable) -> None:
    listed = [line.split()[0] for line in succeed("recipes", "ls").out.splitlines()]
    assert "ddpm-emoji32" in listed
    for name in listed:
        assert yaml.safe_load(succeed("recipes", "show", name).out)["method"]
        assert f"{name} is a valid recipe" in succeed("recipes", "validate", name).out
    assert succeed("recipes", "show", "tiny.yaml").out == (place / "tiny.yaml").read_text()
    succeed("recipes", "validate", "tiny.yaml", "train.batch=2")


@pytest.mark.parametrize("export", ["float16", "bfloat16"])
def test_export_type(place: Path, succeed: Callable, export: str) -> None:
    shutil.copytree("run", "mine")
    succeed("train", "tiny.yaml", "--out", "mine", f"train.export={export}")
    assert (place / "mine/model.safetensors").stat().st_size < (place / "run/model.safetensors").stat().st_size
    succeed("generate", "--model", "mine", "--steps", 1, "--seed", 0)


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    files = {tiny.write_tiny_model(tmp_path / f"{i}.safetensors").read_bytes() for i in range(12)}
    assert len(files) == 1
