"""The maker of shapes: pictures are what boxes, maps and captions say, twice the same; what is held out is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.conditioners.layout import layout_of
from sfumato.errors import UserError
from sfumato.training import shapes
from sfumato.training.data import DataConfig, check_all, open_data

from .. import tiny
from .shape_cases import box_of_colour, boxes_iou, colours_drawn, colours_of, maps_iou


@pytest.mark.parametrize("size", [32, 64])
def test_the_detector_finds_what_is_drawn(size: int) -> None:
    scenes = [shapes.scene_of(3, number, size) for number in range(40)]
    pictures = [shapes.drawn(scene)[0] for scene in scenes]
    assert min(boxes_iou(pictures, scenes)) > 0.55 and np.mean(boxes_iou(pictures, scenes)) > 0.85
    assert all(colours_drawn(p) == {shape.colour for shape in s.shapes} for p, s in zip(pictures, scenes, strict=True))
    assert set(maps_iou(pictures, pictures).values()) == {1.0}
    others = [shapes.scene_of(4, number, size) for number in range(40)]
    assert np.mean(boxes_iou(pictures, others)) < 0.2
    assert box_of_colour(colours_of(Image.new("RGB", (size, size), "white")), "red") is None


def test_maps_follow_the_picture() -> None:
    for number in range(20):
        scene = shapes.scene_of(0, number, 32)
        picture, classes = shapes.drawn(scene)
        values, colours = np.asarray(classes), colours_of(picture)
        for shape in scene.shapes:
            mine = values == shapes.CLASSES.index(shape.name)
            assert mine.sum() > 20
            assert (colours[mine] == list(shapes.COLOURS).index(shape.colour) + 1).mean() > 0.8
        assert (colours[values == 0] <= 0).mean() > 0.95


def test_a_set_can_be_trained_on(tmp_path: Path) -> None:
    assert shapes.prepare(tmp_path / "shapes", count=30) == (27, 3)
    train, validation = open_data(DataConfig(path=str(tmp_path / "shapes"), size=32))
    assert validation is not None and (len(train), len(validation)) == (27, 3)
    assert check_all(train) == [] and train.caption_of(0) is not None
    for record in train.records:
        row = record.columns
        assert isinstance(row["map"], Path) and row["map"].is_file() and "maps" not in record.key
        boxes, places = layout_of(row["boxes"]), layout_of(row["places"])
        assert [box[1:] for box in boxes] == [box[1:] for box in places]
        assert [box.label.split()[1] for box in boxes] == [box.label for box in places]
        assert all(box.label in row["text"] for box in boxes) and row["text"].count("a ") == len(boxes)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        shapes.prepare(tmp_path / name, count=12, seed=seed)
    one, again, other = (tiny.tree(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again and one != other


def test_what_is_held_out_is_not_trained_on() -> None:
    training, validation = shapes.scenes(400, 16, 0)  # small pictures have few layouts
    assert len(validation) == 40
    assert not {scene.layout for scene in training} & {scene.layout for scene in validation}


def test_shapes_lie_apart_and_inside() -> None:
    for number in range(100):
        scene = shapes.scene_of(1, number, 24)
        for i, a in enumerate(scene.shapes):
            assert min(a.left, a.top) >= 0 and max(a.left, a.top) + a.side <= 24
            assert all(a.apart_from(b) and b.apart_from(a) for b in scene.shapes[:i])
        assert len({s.kind for s in scene.shapes}) == len({s.colour for s in scene.shapes}) == len(scene.shapes)


def test_the_command(tmp_path: Path) -> None:
    done = tiny.succeed("data", "prepare", "shapes", tmp_path / "s", "--count", 20, "--size", 16, "--seed", 2)
    assert done.out == f"{tmp_path / 's'}: 18 for training, 2 for validation\n"
    rows = [json.loads(line) for line in (tmp_path / "s/metadata.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 18 + ["validation"] * 2
    assert "all 20 pictures are sound" in tiny.succeed("data", "check", tmp_path / "s").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("shpaes", "out"), "did you mean 'shapes'"),
        (("shapes", "out", "--from", "x"), "leave --from out"),
        (("emoji", "out", "--size", 32), "--size belongs to shapes"),
        (("shapes", "full"), "full exists already and is not an empty folder"),
        (("shapes", "out", "--size", 1000), "16 to 512 pixels, got 1000"),
    ],
)
def test_what_is_refused(
    arguments: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    result = tiny.run("data", "prepare", *arguments)
    assert result.code == 2 and said in result.err and not (tmp_path / "out").exists()


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2 pictures"):
        shapes.prepare(tmp_path / "s", count=1)
