"""From a folder of captioned pictures to a picture from words: a first stage, latent diffusion on it, drawing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from sfumato.conditioners.words import minilm_installed
from sfumato.images import read_settings

from .. import tiny
from ..training.codec_cases import CODEC, CROSS, JOINT

FEW = {
    "steps": 2, "batch": 4, "log_every": 1, "validate_every": 2, "sample_every": 2, "save_every": 1, "samples": 2,
    "sample_steps": 2,
}  # fmt: skip


def copied(name: str, file: Path, changes: dict[str, Any]) -> None:
    """A recipe of the package as a user copies it (`sfumato recipes show NAME > FILE`), made small in the file."""
    values = yaml.safe_load(tiny.succeed("recipes", "show", name).out)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = inner[last] | value if last == "train" else value
    file.write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures, two recipes, and the run of the first stage."""
    folder = tmp_path_factory.mktemp("two-stages")
    tiny.write_captioned(folder / "pictures", count=12)
    small = {"data.size": 16, "loss.perceptual": 0.0, "model.network": CODEC, "train": FEW}
    small |= {"discriminator.layers": 1, "data.validation_fraction": 0.3}
    copied("autoencoder-kl", folder / "codec.yaml", small)
    copied("latent", folder / "mine.yaml", {"conditions.text": JOINT, "model.network": CROSS, "train": FEW})
    with chdir(folder):
        tiny.succeed("train", "codec.yaml", "--data", "pictures", "--out", "A", "--device", "cpu")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_three_commands(here: Path, succeed: Callable[..., tiny.Result], run: Callable[..., tiny.Result]) -> None:
    trained = succeed("train", "mine.yaml", "--codec", "A", "--out", "B", "--device", "cpu")
    assert "finished: B" in trained.out and "held out" in trained.out  # as in the codec's run
    assert {p.name for p in (here / "B").iterdir()} >= {"config.yaml", "model.safetensors", "samples", "metrics.jsonl"}
    assert yaml.safe_load((here / "B" / "config.yaml").read_text())["data"]["path"] == "pictures"
    succeed("generate", "red heart", "--model", "B", "--seed", 1, "--steps", 3, "--out", "a.png")
    with Image.open("a.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"
    assert read_settings("a.png")["prompt"] == "red heart"
    described = succeed("info", "B/model.safetensors", "--json").json
    assert described["system"] == "latent"
    succeed("info", "A/model.safetensors")
    refused = run("generate", "green elephant", "--model", "B")
    assert refused.code == 2 and "'elephant'" in refused.err
    refused = run("generate", "--model", "A")
    assert refused.code == 2 and "holds a codec model, which draws nothing by itself" in refused.err
    again = succeed("train", "mine.yaml", "--codec", "A", "--out", "B", "--device", "cpu")
    assert "going on from" in again.out


@pytest.mark.parametrize(
    "arguments", [("codec.yaml", "--data", "pictures"), ("mine.yaml", "--codec", "A")], ids=["codec", "latent"]
)
def test_check_leaves_no_files(here: Path, succeed: Callable[..., tiny.Result], arguments: tuple[str, ...]) -> None:
    before = tiny.tree(here)
    done = succeed("check", *arguments, "--device", "cpu")
    assert "checked: pictures, a step, validation, samples, saving, resuming" in done.out
    assert "for 2 steps" in done.out
    assert tiny.tree(here) == before


@pytest.mark.skipif(not minilm_installed(), reason="all-MiniLM-L6-v2's package is missing")
@pytest.mark.slow
def test_the_recipes_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perceptual loss, discriminator and MiniLM as shipped; only the number of steps is the user's."""
    monkeypatch.chdir(tmp_path)
    tiny.write_captioned(tmp_path / "pictures", count=8, size=64)
    for name in ("autoencoder-kl", "autoencoder-vq"):
        tiny.succeed("check", name, "--data", "pictures", "train.batch=2", "--device", "cpu")
    tiny.succeed("train", "autoencoder-kl", "train.steps=2", "train.batch=2", "--data", "pictures", "--out", "A")
    tiny.succeed("train", "latent", "train.steps=2", "train.batch=2", "--codec", "A", "--out", "B")
    tiny.succeed("generate", "a red heart", "--model", "B", "--steps", 2, "--out", "a.png")
    with Image.open("a.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "latent", "--data", "pictures", "--out", "new"), "latent names no codec; give --codec RUN"),
        (("train", "mine.yaml", "data.size=16", "--data", "pictures", "--codec", "pictures", "--out", "new"),
         "the codec's run pictures is not finished"),
        (("train", "mine.yaml", "--codec", "away", "--out", "new"), "there is no codec at away"),
        (("train", "codec.yaml", "--data", "pictures", "--codec", "A", "--out", "new"),
         "model and codec each say what is trained"),
        (("train", "mine.yaml", "conditions.text.captions=['{txet}']", "--codec", "A", "--out", "new"),
         "did you mean 'text'"),
        (("check", "mine.yaml", "--codec", "A", "conditions.text.captions=['{text:x}']"), "may name columns only"),
    ],
)  # fmt: skip
def test_refused(here: Path, run: Callable[..., tiny.Result], arguments: tuple[str, ...], said: str) -> None:
    before = tiny.tree(here)
    done = run(*arguments)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done
    assert len(done.err.strip().splitlines()) == 1
    assert tiny.tree(here) == before
