"""What `sfumato data check` and `sfumato data stats` find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sfumato.errors import DataError
from sfumato.training import statistics
from sfumato.training.statistics import contact_sheet, describe, find_bad, open_all, report

from .. import tiny


def _smooth(number: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A picture of large patches in muted colours: noise would have neither."""
    patches = tiny.picture(number, 5).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(patches, Image.new("RGB", size, "grey"), 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures in two classes, of which 4 is a copy of 0 and 5 the same in JPEG; some captions."""
    place = tmp_path / "pictures"
    for number in range(4):
        target = place / ("cat", "dog")[number % 2] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        _smooth(number, (24 + 2 * number, 24)).save(target)
    _smooth(0).resize((20, 20)).save(place / "dog/4.png")
    _smooth(0).save(place / "dog/5.jpg", quality=95)
    (place / "cat/0.txt").write_text("a small cat")
    (place / "cat/2.txt").write_text("a cat")
    return place


def test_figures(folder: Path) -> None:
    found = describe(open_all(str(folder), caption=None))
    assert (found.total, found.bad, found.compared) == (6, [], 6)
    assert sorted(found.sizes) == [(20, 20), (24, 24), (24, 24), (26, 24), (28, 24), (30, 24)]
    assert found.modes == {"RGB": 6} and found.values["folder"] == {"cat": 2, "dog": 4}
    assert found.captions == ["a small cat", "a cat"]
    assert set(found.near_duplicates) == {
        ("cat/0.png", "dog/4.png"),
        ("cat/0.png", "dog/5.jpg"),
        ("dog/4.png", "dog/5.jpg"),
    }
    assert found.near_duplicate_count == 3 and found.across_splits == 0
    lines = report(found)
    assert "width: 20 to 30, median 25" in lines and "folder (2 values): dog 4, cat 2" in lines
    assert "captions: 2, 2 different; 2 to 3 words, median 2.5" in lines


def test_bad_pictures_are_all_listed(folder: Path) -> None:
    for number in range(7):
        (folder / f"bad{number}.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "cat/0.png").read_bytes()[:100])
    pictures = open_all(str(folder), caption=None)
    bad = find_bad(pictures)
    assert [one.key for one in bad] == [f"bad{number}.png" for number in range(7)] + ["cut.png"]
    assert bad[0].reason.startswith("not a picture") and bad[-1].reason.startswith("damaged picture")
    found = describe(pictures)
    assert found.bad == bad and len(found.sizes) == 6
    assert report(found)[0] == "pictures: 14, of which 8 cannot be used"


def test_a_set_of_bad_pictures_only(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = open_all(str(tmp_path))
    assert len(find_bad(pictures)) == 1
    assert report(describe(pictures))[0] == "pictures: 1, of which 1 cannot be used"
    with pytest.raises(DataError, match="no good picture"):
        contact_sheet(pictures)


def test_size_asked_for(folder: Path) -> None:
    bad = find_bad(open_all(str(folder), size=24, caption=None))
    assert [one.key for one in bad] == ["dog/4.png"] and "20x20, but size is 24" in bad[0].reason


def test_parquet_whatever_its_split() -> None:
    pytest.importorskip("pyarrow")
    pictures = open_all(str(tiny.PARQUET))
    assert len(pictures) == 64 and not find_bad(pictures)
    found = describe(pictures)
    assert found.values["split"] == {"train": 64} and len(found.captions) == 64
    assert "text" not in found.values and "tags" not in found.values and "style" in found.values


def test_pairs_across_splits_are_counted(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        _smooth(1).save(tmp_path / split / "one.png")
        _smooth(2 if split == "train" else 3).save(tmp_path / split / "other.png")
    found = describe(open_all(str(tmp_path)))
    assert found.near_duplicates == [("train/one.png", "validation/one.png")] and found.across_splits == 1


def test_colour_tells_apart_what_the_hash_does_not(tmp_path: Path) -> None:
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200)), ("red too", (204, 2, 2))):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    assert describe(open_all(str(tmp_path))).near_duplicates == [("red too.png", "red.png")]


def test_hash_follows_structure_not_brightness() -> None:
    image = _smooth(5, (64, 64))
    darker = ImageEnhance.Brightness(image).enhance(0.7)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first = statistics.difference_hash(image)
    assert first.shape == (64,) and first.dtype == bool
    assert (first != statistics.difference_hash(darker)).sum() <= 3
    assert (first != statistics.difference_hash(mirrored)).sum() > 16


def test_blocks_find_what_all_pairs_do() -> None:
    random = np.random.default_rng(0)
    hashes = random.random((1100, 64)) < 0.5
    thumbnails = random.integers(0, 256, (1100, 8, 8, 3), dtype=np.uint8)
    for a, b in ((3, 1099), (600, 601), (0, 512)):
        hashes[b], thumbnails[b] = hashes[a], thumbnails[a]
        hashes[b, :3] = ~hashes[a, :3]
    hashes[5], hashes[6] = hashes[7], hashes[8]  # alike in the hash alone
    found = [
        (int(a), int(b))
        for first, second in statistics._near(hashes, thumbnails)
        for a, b in zip(first, second, strict=True)
    ]
    assert sorted(found) == [(0, 512), (3, 1099), (600, 601)]


def test_only_so_many_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "COMPARED", 2)
    assert "near-duplicates among the first 2: 0 pairs, 0 across splits" in report(
        describe(open_all(str(folder), caption=None))
    )


def test_contact_sheet_is_taken_evenly(folder: Path) -> None:
    pictures = open_all(str(folder), caption=None)
    few, all_of_them = contact_sheet(pictures, count=2), contact_sheet(pictures)
    assert few.width < all_of_them.width
    assert contact_sheet(pictures, count=1, side=8).width <= 8 + 2 * 2
