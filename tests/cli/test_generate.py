"""`sfumato generate` and `sfumato info`: what is written, what it says of itself, and that pictures do not depend on
their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import models
from sfumato.checkpoints.io import file_sha256
from sfumato.images import read_settings

MODEL = "cat-dog.safetensors"
SETTINGS = {
    "model", "model_hash", "seed", "steps", "sampler", "schedule", "guidance", "width", "height", "dtype",
}  # fmt: skip

needs_box = pytest.mark.skipif(not models.names(), reason="the box holds no model in this installation")


def test_folder_takes_one_file_per_seed(place: Path, succeed: Callable) -> None:
    done = succeed("generate", "--model", MODEL, "--seed", 5, "--count", 3, "--steps", 2, "--out", "new/folder")
    files = sorted((place / "new/folder").iterdir())
    assert [f.name for f in files] == ["5.png", "6.png", "7.png"]
    assert done.out.split() == ["new/folder/5.png", "new/folder/6.png", "new/folder/7.png"]
    assert [read_settings(f)["seed"] for f in files] == [5, 6, 7]
    with Image.open(files[0]) as picture:
        assert picture.size == (8, 8) and picture.mode == "RGB"


def test_default_folder_is_the_current_one(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 5, "--steps", 1)
    assert (place / "5.png").is_file()


@needs_box
def test_a_model_of_the_box_is_told_by_its_name(succeed: Callable) -> None:
    told = succeed("info", models.BEST, "--json").json
    assert told["sha256"] == file_sha256(models.weights(models.BEST)) and told["size"] == 64


@pytest.mark.parametrize("native", [True, False])
def test_a_type_that_is_only_emulated_is_told(
    native: bool, place: Path, succeed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.backends.devices.native_bfloat16", lambda device: native)
    options = ("generate", "--model", MODEL, "--seed", 1, "--steps", 1, "--out", "a.png", "--overwrite")
    told = "note: this device only emulates bfloat16, which is slow; --dtype auto takes what suits it"
    assert (told in succeed(*options, "--dtype", "bfloat16").err) == (not native)
    assert "bfloat16" not in succeed(*options).err


def test_every_setting_is_in_the_picture(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 9, "--steps", 4, "--sampler", "HEUN", "--schedule", "karras",
            "--guidance", 2.5, "--label", "Dog", "--dtype", "bfloat16", "--out", "a.png")  # fmt: skip
    told = succeed("info", "a.png", "--json").json
    hash_of_file = succeed("info", MODEL, "--json").json["sha256"]
    asked = {
        "model": "cat-dog", "model_hash": hash_of_file, "label": "Dog", "seed": 9, "steps": 4, "sampler": "heun",
        "schedule": "karras", "guidance": 2.5, "width": 8, "height": 8, "dtype": "bfloat16",
    }  # fmt: skip
    assert {key: told[key] for key in asked} == asked
    assert told.keys() >= SETTINGS
    assert "seed: 9" in succeed("info", "a.png").out.splitlines()


def test_settings_in_a_picture_make_it_again(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 9, "--label", "cat", "--out", "a.png")
    made = read_settings(place / "a.png")
    again = [f"--{key}={made[key]}" for key in ("seed", "steps", "sampler", "schedule", "guidance", "label", "dtype")]
    succeed("generate", "--model", MODEL, *again, "--out", "b.png")
    assert (place / "a.png").read_bytes() == (place / "b.png").read_bytes()


def test_defaults_are_the_models_own(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 1, "--label", "cat", "--out", "a.png")
    succeed("generate", "--model", MODEL, "--seed", 1, "--out", "b.png")
    with_label, without = read_settings(place / "a.png"), read_settings(place / "b.png")
    assert (with_label["steps"], with_label["sampler"], with_label["guidance"]) == (3, "ddim", 1.5)
    assert "label" not in without and without["guidance"] == 1.0


def test_labels_take_turns(place: Path, succeed: Callable) -> None:
    done = succeed("generate", "--model", MODEL, "--seed", 0, "--count", 3, "--steps", 1, "--label", "all", "--json")
    assert [one["label"] for one in done.json["pictures"]] == ["cat", "dog", "cat"]


def test_json_says_what_was_made(place: Path, succeed: Callable) -> None:
    done = succeed("generate", "--model", MODEL, "--count", 2, "--steps", 1, "--out", "out", "--json")
    assert done.json.keys() == {"files", "pictures"}
    for file, settings in zip(done.json["files"], done.json["pictures"], strict=True):
        assert read_settings(file) == settings and settings.keys() >= SETTINGS


def test_drawn_seed_is_printed_and_stored(place: Path, succeed: Callable) -> None:
    first, second = (succeed("generate", "--model", MODEL, "--steps", 1, "--out", "out").out.split() for _ in range(2))
    for word, seed, file in (first, second):
        assert word == "seed" and file == f"out/{seed}.png"
        assert read_settings(file)["seed"] == int(seed)
    assert first[1] != second[1]


def test_sheet_is_one_file(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 0, "--count", 4, "--steps", 1, "--sheet", "--out", "all.png")
    with Image.open("all.png") as sheet:
        assert sheet.width == sheet.height > 4 * 8
    assert read_settings("all.png")["sheet"] == [0, 1, 2, 3]
    done = succeed("generate", "--model", MODEL, "--seed", 3, "--count", 2, "--steps", 1, "--sheet", "--out", "out")
    assert done.out.split() == ["out/sheet-3.png"] and (place / "out/sheet-3.png").is_file()


def test_overwrite_replaces(place: Path, succeed: Callable) -> None:
    succeed("generate", "--model", MODEL, "--seed", 0, "--steps", 1, "--out", "a.png")
    before = (place / "a.png").read_bytes()
    succeed("generate", "--model", MODEL, "--seed", 1, "--steps", 1, "--out", "a.png", "--overwrite")
    assert (place / "a.png").read_bytes() != before and read_settings("a.png")["seed"] == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG")]
)
def test_formats(place: Path, succeed: Callable, name: str, kind: str) -> None:
    succeed("generate", "--model", MODEL, "--seed", 4, "--steps", 1, "--out", name)
    with Image.open(name) as picture:
        assert picture.format == kind
    assert succeed("info", name, "--json").json["seed"] == 4


def test_webp_is_the_same_picture_as_png(place: Path, succeed: Callable) -> None:
    for name in ("a.webp", "a.png"):
        succeed("generate", "--model", MODEL, "--seed", 4, "--steps", 1, "--out", name)
    with Image.open("a.webp") as webp, Image.open("a.png") as png:
        assert np.array_equal(np.asarray(webp.convert("RGB")), np.asarray(png))


def test_model_may_be_a_run_or_a_checkpoint(place: Path, succeed: Callable) -> None:
    checkpoint = "run/checkpoints/step-00000004"
    sources = ("run", checkpoint, f"{checkpoint}/model.safetensors")
    hashes = set()
    for number, source in enumerate(sources):
        succeed("generate", "--model", source, "--seed", 1, "--steps", 2, "--label", "dog", "--out", f"{number}.png")
        told = succeed("info", source, "--json").json
        assert told["labels"] == ["cat", "dog"] and told["parameters"] > 1000
        assert read_settings(f"{number}.png")["model_hash"] == told["sha256"]
        hashes.add(told["sha256"])
    assert len(hashes) == 3
    assert succeed("info", "run", "--json").json["last metrics"]["step"] == 6


def test_progress_goes_to_stderr(place: Path, succeed: Callable) -> None:
    done = succeed("generate", "--model", MODEL, "--seed", 1, "--steps", 5, "--out", "a.png")
    assert done.out == "a.png\n" and done.err.splitlines()[-1] == "step 5/5"


@needs_box
def test_without_model_the_best_in_the_box_draws(place: Path, succeed: Callable) -> None:
    succeed("generate", "--seed", 1, "--steps", 1, "--out", "a.png")
    assert read_settings("a.png")["model"] == models.BEST
    assert "used when no model is named" in succeed("models", "ls").out
    assert succeed("models", "show", models.BEST).out.strip()


def _batch_and_alone(model: sfumato.Model, steps: int | None) -> None:
    """A picture of a batch of 8 and the same seed alone: equal noise, and equal bytes but for rounding."""
    starts: dict[str, list[torch.Tensor]] = {"batch": [], "alone": []}

    def watch(which: str) -> Callable:
        def hook(x: torch.Tensor, level: object, prediction: object, noise: object) -> torch.Tensor:
            if prediction is None:
                starts[which].append(x.clone())
            return x

        return hook

    for sampler in ("ddim", "ddpm"):
        options = {"steps": steps, "sampler": sampler}
        batch = model.generate(count=8, seed=20, on_step=watch("batch"), **options)
        for i in range(8):
            (alone,) = model.generate(seed=20 + i, on_step=watch("alone"), **options)
            a, b = (np.asarray(p).astype(int) for p in (batch[i], alone))
            assert (a == b).mean() >= 0.999, (sampler, i)
            assert np.abs(a - b).max() <= 1, (sampler, i)
            assert _but_neighbours(batch[i].info["sfumato"]) == _but_neighbours(alone.info["sfumato"])
    for number, together in enumerate(starts["batch"]):
        assert torch.equal(together, torch.cat(starts["alone"][8 * number : 8 * number + 8]))


def _but_neighbours(settings: dict[str, object]) -> dict[str, object]:
    """Settings without those that say with which others a picture was drawn."""
    return {key: value for key, value in settings.items() if key != "batch"}


def test_picture_of_a_batch_is_the_picture_alone(place: Path) -> None:
    _batch_and_alone(sfumato.load(MODEL, device="cpu"), steps=6)


@pytest.mark.slow
@needs_box
@pytest.mark.parametrize("name", models.drawing() or [models.BEST])
def test_picture_of_a_batch_is_the_picture_alone_with_shipped_models(name: str) -> None:
    _batch_and_alone(sfumato.load(name, device="cpu"), steps=None)


def test_more_pictures_than_one_batch(place: Path, succeed: Callable) -> None:
    done = succeed("generate", "--model", MODEL, "--seed", 0, "--count", 18, "--steps", 1, "--out", "many", "--json")
    assert len(done.json["files"]) == 18
    succeed("generate", "--model", MODEL, "--seed", 17, "--steps", 1, "--out", "17.png")
    assert _but_neighbours(read_settings("17.png")) == _but_neighbours(read_settings("many/17.png"))
