"""Boxes and maps go with their picture: through every fit, crop and mirror they mark the same pixels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.conditioners.layout import Box
from sfumato.errors import DataError, UserError
from sfumato.training.data import Batches, DataConfig, View, check_all, open_data
from sfumato.training.pictures import decode_map, fit_map, fitted
from sfumato.training.placed import UNKNOWN, boxes_seen, map_seen, stored_map

WAYS: list[dict[str, Any]] = [
    {"fit": "crop"}, {"fit": "pad"}, {"fit": "stretch"}, {"fit": "crop", "flip": True},
    {"fit": "crop", "flip": True, "random_crop": True}, {"fit": "pad", "flip": True},
]  # fmt: skip


def write(folder: Path, count: int = 6, size: tuple[int, int] = (60, 40)) -> Path:
    """Black pictures with one red rectangle each, its box and its map."""
    (folder / "maps").mkdir(parents=True)
    rows = []
    for number in range(count):
        chance = np.random.default_rng(number)
        x, y = int(chance.integers(8, 30)), int(chance.integers(2, 18))
        width, height = int(chance.integers(14, 24)), int(chance.integers(12, 20))
        values = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        values[y : y + height, x : x + width, 0] = 255
        Image.fromarray(values).save(folder / f"{number}.png")
        Image.fromarray((values[..., 0] > 0).astype(np.uint8)).save(folder / f"maps/{number}.png")
        box = [x / size[0], y / size[1], width / size[0], height / size[1]]
        names = {"file_name": f"{number}.png", "map": f"maps/{number}.png"}
        rows.append(names | {"boxes": [{"label": "red", "box": box}]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_they_mark_the_same_pixels(tmp_path: Path, way: dict[str, Any]) -> None:
    config = DataConfig(path=str(write(tmp_path / "d")), size=20, **way)
    pictures, _ = open_data(config)
    assert len(pictures) == 6  # the maps are no pictures
    check_all(pictures)
    for step in range(4):
        batch = Batches(pictures, 6, seed=1).batch(step)
        assert batch.views is not None
        for image, i, view in zip(batch.images, batch.indices.tolist(), batch.views, strict=True):
            columns = pictures.records[i].columns
            red = (image[0].int() - image[1].int()).numpy() > 127
            (box,) = boxes_seen([Box("red", *columns["boxes"][0]["box"])], pictures.size_of(i), config, view)
            rows, found = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
            drawn = (found[0], rows[0], found[-1] + 1, rows[-1] + 1)
            assert max(abs(20 * a - b) for a, b in zip(box.corners, drawn, strict=True)) <= 0.75
            values = stored_map(decode_map(columns["map"].read_bytes()), pictures.size_of(i), config)
            seen = map_seen(values, config, view).numpy()
            assert ((seen == 1) == red).mean() > 0.93
            assert (seen == UNKNOWN).any() == (way["fit"] == "pad")


def test_mirrored_pictures_are_there(tmp_path: Path) -> None:
    pictures, _ = open_data(DataConfig(path=str(write(tmp_path / "d")), size=20, flip=True))
    views = Batches(pictures, 6, seed=1).batch(0).views
    assert views is not None and {view.mirrored for view in views} == {True, False}


def test_what_is_not_seen_is_left_out() -> None:
    config = DataConfig(path=".", size=10)
    left = Box("left", 0, 0, 0.2, 1)
    assert boxes_seen([left], (20, 10), config, View()) == ()  # the middle square is seen
    (half,) = boxes_seen([Box("a", 0, 0.5, 0.5, 0.5)], (20, 10), config, View())
    assert half == Box("a", 0, 0.5, 0.5, 0.5)


def test_maps_are_not_smoothed() -> None:
    values = np.random.default_rng(0).integers(0, 5, (40, 60)).astype(np.int16)
    assert np.array_equal(fit_map(values, 40, "crop", UNKNOWN), values[:, 10:50])
    assert np.array_equal(fit_map(values, 20, "crop", UNKNOWN), values[1::2, 11:50:2])
    padded = fit_map(values, 60, "pad", UNKNOWN)
    assert np.array_equal(padded[10:50], values) and (padded[:10] == UNKNOWN).all() and (padded[50:] == UNKNOWN).all()
    assert set(np.unique(fit_map(values, 16, "stretch", UNKNOWN))) <= set(range(5))
    place = fitted((60, 40), 30, "pad")
    assert place.scale == (0.5, 0.5) and place.shift == (0, 5)


def test_maps_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the map has 60x40 pixels, its picture 40x40"):
        stored_map(np.zeros((40, 60)), (40, 40), DataConfig(path=".", size=20))
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    with pytest.raises(UserError, match="of mode RGB"):
        decode_map(data.getvalue())
    with pytest.raises(DataError, match="must be a whole PNG"):
        decode_map(data.getvalue()[:40])


def test_sizes_of_pictures_that_are_not_kept(tmp_path: Path) -> None:
    pictures, _ = open_data(DataConfig(path=str(write(tmp_path / "d")), size=20, cache_bytes=0))
    assert pictures.size_of(3) == (60, 40) and not pictures.cached
    assert torch.equal(pictures.load(3), pictures.gather([3]).images[0])
