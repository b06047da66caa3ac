"""`sfumato evaluate floor|pictures|codec|text`: tables with settings, counts and hashes; refusals in one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sfumato import api
from sfumato.checkpoints.io import write_model
from sfumato.images import to_pil
from sfumato.systems.codec import CodecConfig

from ..evaluation.judge_cases import SIZE, STYLES, picture, thumbnail
from ..tiny import Result

DATA = ("--data", "things")


@pytest.fixture
def things(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Beside the usual place: 24 things in two styles, some held out, a codec, and a judge that is quick."""
    monkeypatch.setattr("sfumato.evaluation.judge.judge", thumbnail)
    folder, rows = place / "things", []
    folder.mkdir()
    for number in range(24):
        for style in STYLES:
            name = f"{number}-{style}.png"
            to_pil(picture(number, style).unsqueeze(0) / 127.5 - 1)[0].save(folder / name)
            by = "concept" if number >= 20 else "pair" if number < 5 and style == "ringed" else ""
            row = {"file_name": name, "text": f"thing {number}", "style": style, "tags": ["thing"], "held_out_by": by}
            rows.append(row | {"split": "validation" if by else "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CodecConfig(kind="pixels", size=SIZE)
    write_model(place / "pixels.safetensors", {"none": torch.zeros(1)}, config.model_dump(mode="json"))
    return place


class Painter:
    """A text model that draws what it is asked for, if its number is even."""

    name, sha256 = "painter", "a" * 64
    system = SimpleNamespace(config=SimpleNamespace(size=SIZE))

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, dict[str, Any]]] = []

    def generate(self, prompt: Sequence[str], *, count: int, seed: int, **options: Any) -> list[Image.Image]:
        found = []
        for i, text in enumerate(prompt):
            self.asked.append((text, seed + i, options))
            number, style = int(text.split(",")[0].removeprefix("thing ")), text.split(", ")[1].removesuffix(" style")
            found.append(picture(number - number % 2, style))
        assert count == 1
        return to_pil(torch.stack(found) / 127.5 - 1)


def test_floor(things: Path, succeed: Any) -> None:
    out = succeed("evaluate", "floor", *DATA).out.splitlines()
    titles = [line.split(":")[0] for line in out]
    parts = ["", ", held-out pairs", ", held-out concepts"]
    assert titles[:6] == [f"{of}{part}" for of in ("real", "nearest caption") for part in parts]
    assert titles[6:12] == ["blur 0.5 px", "blur 0.7 px", "blur 1 px", "JPEG 75", "half size", "noise 3/255"]
    assert "KID-Thumbnail x1000" in out[0] and "near copies" in out[0] and "PSNR dB" in out[6]
    assert "judge Thumbnail" in out[12] and "size 16" in out[12]
    assert out[13] == "  pictures: train 35, all 13, held-out pairs 5, held-out concepts 8"


def test_json_has_settings_counts_and_hashes(things: Path, succeed: Any) -> None:
    found = succeed("evaluate", "floor", *DATA, "--seed", 3, "--json").json
    figure = found["figures"]["real"]["KID-Thumbnail x1000"]
    assert set(figure) == {"value", "deviation"} and figure["deviation"] > 0
    settings = found["settings"]
    expected = {"data": "things", "seed": 3, "judge": "Thumbnail", "judge_sha256": "f" * 64, "clip": None, "size": 16}
    assert expected.items() <= settings.items()
    assert len(settings["train_sha256"]) == len(settings["held_out_sha256"]) == 64
    assert settings["counts"] == {"train": 35, "all": 13, "held-out pairs": 5, "held-out concepts": 8}


def test_data_are_read_as_a_training_reads_them(things: Path, run: Any, succeed: Any) -> None:
    names = sorted(path.name for path in (things / "things").glob("3-*.png"))
    (things / "things" / names[0]).write_bytes(b"no picture")
    assert run("evaluate", "floor", *DATA).code == 2
    found = succeed("evaluate", "floor", *DATA, "--skip-bad", "--fit", "pad", "--json")
    assert "left out as bad: 1, first" in found.err
    assert found.json["settings"]["counts"]["train"] + found.json["settings"]["counts"]["all"] == 47
    assert {"fit": "pad", "upscale": False, "skip_bad": True}.items() <= found.json["settings"].items()
    refused = run("evaluate", "floor", *DATA, "--fit", "padd", "--skip-bad")
    assert refused.code == 2 and "did you mean 'pad'" in refused.err


def test_pictures_of_a_folder(things: Path, succeed: Any) -> None:
    found = succeed("evaluate", "pictures", "things", *DATA, "--json").json
    assert found["settings"]["counts"]["new"] == 48 and found["settings"]["pictures"] == "things"
    assert found["figures"]["new"]["near copies"]["value"] > found["figures"]["real"]["near copies"]["value"]
    assert set(found["figures"]["new"]) == {"KID-Thumbnail x1000", "FD-Thumbnail", "precision", "recall", "near copies"}


def test_pictures_of_a_model_with_classes(things: Path, succeed: Any) -> None:
    found = succeed(
        "evaluate", "pictures", "--model", "cat-dog.safetensors", "--data", "pictures", "--validation-fraction", "0.3",
        "--label", "folder", "--count", 6, "--steps", 1, "--json",
    ).json  # fmt: skip
    assert found["settings"]["counts"]["new"] == 6 and found["settings"]["model"] == "cat-dog"
    assert found["settings"]["size"] == 8 and len(found["settings"]["model_sha256"]) == 64


def test_codec(things: Path, succeed: Any) -> None:
    write_model(things / "pixels.safetensors", {}, CodecConfig(kind="pixels", size=SIZE).model_dump(mode="json"))
    found = succeed("evaluate", "codec", "pixels.safetensors", *DATA, "--json").json
    row, real = found["figures"]["codec"], found["figures"]["real"]
    assert row["PSNR dB"]["value"] is None and row["SSIM"]["value"] == 1  # pixels are kept: infinitely good
    assert row["background error /255"]["value"] == row["feature distance"]["value"] == 0
    assert all(row[name] == figure for name, figure in real.items())


def test_text(things: Path, succeed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter()
    monkeypatch.setattr(api, "load", lambda *_, **__: painter)
    options = ("--seeds", 2, "--guidance", 3, "--batch", 4)
    found = succeed("evaluate", "text", "painter", *DATA, *options, "--json").json
    asked = painter.asked[1:]  # the first one was a rehearsal
    assert len(asked) == 26 and [seed for _, seed, _ in asked] == list(range(26))
    assert asked[0][0] == asked[1][0] == "thing 0, ringed style" and asked[0][2] == {"guidance": 3.0}
    assert list(found["figures"])[:3] == ["drawn", "drawn, held-out pairs", "drawn, held-out concepts"]
    assert "nearest caption, held-out pairs" in found["figures"] and found["settings"]["seeds"] == 2


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no data": (("evaluate", "floor"), "--data"),
    "no such data": (("evaluate", "floor", "--data", "away"), "away"),
    "nothing held out": (("evaluate", "floor", "--data", "pictures"), "'pictures' holds no pictures out"),
    "fraction": (("evaluate", "floor", *DATA, "--validation-fraction", 1), "--validation-fraction: must be below 1"),
    "caption": (("evaluate", "floor", *DATA, "--caption", "txt"), "'txt' is not in 'things' (did you mean 'text'?)"),
    "style": (("evaluate", "floor", *DATA, "--style", "stile"), "--style: column 'stile' is not in 'things'"),
    "too large": (("evaluate", "floor", *DATA, "--size", 99), "smaller than asked"),
    "no clip": (("evaluate", "floor", *DATA, "--clip", "away.safetensors"), "no model at away.safetensors"),
    "not a clip": (("evaluate", "floor", *DATA, "--clip", "cat-dog.safetensors"), "is a ddpm model, not a CLIP"),
    "neither": (("evaluate", "pictures", *DATA), "give either PICTURES or --model"),
    "both": (("evaluate", "pictures", "things", "--model", "run", *DATA), "give either PICTURES or --model"),
    "count": (("evaluate", "pictures", "things", "--count", 9, *DATA), "--count belongs to --model"),
    "label": (("evaluate", "pictures", "--model", "free.safetensors", "--label", "x", *DATA), "leave --label out"),
    "no label": (("evaluate", "pictures", "--model", "run", *DATA), "name the column of --data"),
    "size": (
        ("evaluate", "pictures", "--model", "free.safetensors", "--size", 9, *DATA), "draws 8 pixels; leave --size out",
    ),
    "not a codec": (("evaluate", "codec", "run", *DATA), "holds a ddpm model, which has no first stage"),
    "no codec": (("evaluate", "codec", "away.safetensors", *DATA), "no model at away.safetensors"),
    "no text": (("evaluate", "text", "cat-dog.safetensors", "--data", "pictures"), "holds no pictures out"),
    "device": (("evaluate", "floor", *DATA, "--device", "gpu"), "device 'gpu' cannot be used here"),
    "seeds": (("evaluate", "text", "run", *DATA, "--seeds", 0), "--seeds: must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence(things: Path, run: Any, name: str) -> None:
    arguments, words = REFUSED[name]
    result: Result = run(*arguments)
    assert result.code == 2 and result.out == ""
    assert words in result.err and "Traceback" not in result.err, result.err


def test_a_foreign_file_of_features_is_refused(things: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the true judge again
    result: Result = run("evaluate", "floor", *DATA, "--features", "cat-dog.safetensors")
    assert result.code == 2 and "do not fit" in result.err
