"""`sfumato data prepare|check|stats`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


def test_check_of_a_sound_set(place: Path, succeed: Callable) -> None:
    assert succeed("data", "check", "pictures").out == "all 24 pictures are sound\n"


def test_check_lists_bad_pictures(place: Path, run: Callable) -> None:
    for number in range(6):
        (place / f"pictures/cat/bad{number}.png").write_bytes(b"no picture")
    result = run("data", "check", "pictures")
    assert result.code == 1 and not result.err
    *listed, last = result.out.splitlines()
    assert len(listed) == 6 and listed[5].startswith("cat/bad5.png: not a picture")
    assert last == "6 of 30 pictures cannot be used"


def test_check_of_sizes(place: Path, run: Callable) -> None:
    result = run("data", "check", "pictures", "--size", 17)
    assert result.code == 1 and "24 of 24 pictures cannot be used" in result.out
    assert run("data", "check", "pictures", "--size", 16).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "nowhere"), "data path 'nowhere' does not exist"),
        (("check", "tiny.yaml"), "neither a folder of pictures nor a parquet file"),
        (("check", "pictures", "--size", "0"), "--size: must be at least 1, got 0"),
        (("stats", "nowhere"), "data path 'nowhere' does not exist"),
        (("stats", "pictures", "--out", "sheet.gif"), "a contact sheet is written as .png"),
        (("stats", "pictures", "--out", "nowhere/sheet.png"), "there is no folder nowhere"),
        (("prepare", "emojy", "out"), "unknown data set 'emojy' (did you mean 'emoji'?)"),
        (("prepare", "emoji", "tiny.yaml"), "must be a folder"),
        (("stat", "pictures"), "unknown command 'stat' (did you mean 'stats'?)"),
    ],
)
def test_refusals(place: Path, run: Callable, arguments: tuple[str, ...], said: str) -> None:
    result = run("data", *arguments)
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1


def test_statistics(place: Path, succeed: Callable) -> None:
    done = succeed("data", "stats", "pictures")
    assert "pictures: 24" in done.out and "folder (2 values): cat 12, dog 12" in done.out
    assert "captions: none" in done.out and "near-duplicates: 0 pairs" in done.out


def test_contact_sheet_is_written_but_never_over_a_file(place: Path, succeed: Callable, run: Callable) -> None:
    assert succeed("data", "stats", "pictures", "--out", "sheet.png").out.endswith("sheet.png\n")
    with Image.open(place / "sheet.png") as sheet:
        assert sheet.width > 4 * 16
    before = (place / "sheet.png").read_bytes()
    result = run("data", "stats", "pictures", "--out", "sheet.png")
    assert result.code == 2 and "sheet.png exists already" in result.err and not result.out
    assert (place / "sheet.png").read_bytes() == before


def test_prepare_without_packages(place: Path, run: Callable) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("resvg_py")
    result = run("data", "prepare", "emoji", "out", "--from", "pictures")
    assert result.code == 2 and "no package with emoji is in 'pictures'" in result.err
    assert not (place / "out").exists()
