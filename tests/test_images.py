"""Tests of the border between tensors, pictures and files."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sfumato import images
from sfumato.errors import UserError
from sfumato.images import (
    PictureError,
    encode_picture,
    from_pil,
    read_settings,
    save_picture,
    sheet,
    to_pil,
    with_settings,
)
from sfumato.infotext import infotext

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]
FULL: dict[str, Any] = {
    "prompt": "a fox, oil on canvas",
    "negative": "blurry: very",
    "steps": 20,
    "sampler": "ddim",
    "schedule": "karras",
    "guidance": 7.0,
    "seed": 2**40,
    "width": 64,
    "height": 32,
    "model_hash": "abcdef1234",
    "model": "fox, the second",
    "strength": 0.7,
}


def picture(size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    return to_pil(torch.rand(channels, size[1], size[0], generator=generator) * 2 - 1)[0]


# --- tensors ----------------------------------------------------------------------------------------------


def test_levels_round_half_to_even_and_clamp() -> None:
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0])
    halves = (torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5], dtype=torch.float64) / 127.5 - 1).float()
    exact = [0, 2, 2, 4, 4]
    assert list(to_pil(levels.view(1, 1, 5))[0].get_flattened_data()) == [0, 0, 128, 255, 255]
    kept = ((halves + 1) * 127.5).double()
    drawn = list(to_pil(halves.view(1, 1, 5))[0].get_flattened_data())
    assert [d for d, k in zip(drawn, kept, strict=True) if k % 1 == 0.5] == [
        e for e, k in zip(exact, kept, strict=True) if k % 1 == 0.5
    ]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_every_level_survives_the_round_trip(mode: str, channels: int) -> None:
    levels = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(2, channels, 16, 16)
    pictures = to_pil(levels / 127.5 - 1)
    assert [p.mode for p in pictures] == [mode, mode]
    back = from_pil(pictures, mode)
    assert back.shape == (2, channels, 16, 16) and back.dtype == torch.float32
    assert torch.equal(((back + 1) * 127.5).round(), levels)
    assert back.min() == -1 and back.max() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    x[1, 0, 0, 0] = bad
    with pytest.raises(PictureError, match="picture 1 of 2 has 1 values that are NaN or infinite out of 48"):
        to_pil(x)


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 4), torch.zeros(2, 5, 4, 4), torch.zeros(3, 4, 4).to(torch.uint8)]
)
def test_tensors_that_are_not_pictures(x: torch.Tensor) -> None:
    with pytest.raises(UserError, match="expected floating values of shape"):
        to_pil(x)


def test_from_pil_lays_transparency_on_white_and_checks_sizes() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert torch.equal(from_pil(clear), torch.ones(1, 3, 2, 2))
    assert from_pil(clear, "RGBA")[0, :, 0, 0].tolist() == [1, -1, -1, -1]
    with pytest.raises(UserError, match="all of one size; found 2x2, 3x2"):
        from_pil([clear, Image.new("RGB", (3, 2))])
    with pytest.raises(UserError, match="found none"):
        from_pil([])
    with pytest.raises(UserError, match=r"32-bit pixels \(mode F\) have no known range"):
        from_pil(Image.new("F", (2, 2)))
    with pytest.raises(UserError, match="did you mean 'RGB'"):
        from_pil(clear, "rgb")


# --- contact sheets ---------------------------------------------------------------------------------------


def test_sheet_layout() -> None:
    colours = ["red", "lime", "blue", "black", "yellow"]
    page = sheet([Image.new("RGB", (4, 3), colour) for colour in colours], gap=2, scale=2)
    assert page.size == (3 * (8 + 2) + 2, 2 * (6 + 2) + 2)
    assert page.getpixel((2, 2)) == page.getpixel((9, 7)) == (255, 0, 0)
    assert page.getpixel((12, 2)) == (0, 255, 0) and page.getpixel((12, 10)) == (255, 255, 0)
    assert page.getpixel((1, 2)) == page.getpixel((10, 2)) == page.getpixel((22, 10)) == (255, 255, 255)
    assert sheet([Image.new("L", (4, 3))] * 2, columns=9, gap=0).size == (8, 3)


def test_sheet_labels() -> None:
    pictures = [picture((64, 64))] * 2
    plain, labelled = sheet(pictures), sheet(pictures, labels=["fox", ""])
    assert labelled.width == plain.width and labelled.height > plain.height
    below = labelled.crop((2, 66, 66, labelled.height))
    assert bool((from_pil(below) < 0).any())
    beside = labelled.crop((68, 66, labelled.width, labelled.height))
    assert beside.convert("L").getextrema() == (255, 255)
    long = sheet(pictures, labels=["a very long label that goes on and on " * 5, "supercalifragilistic" * 9])
    assert long.width == plain.width and long.height < 2 * plain.height
    assert sheet([picture((1, 1))], labels=["fox"]).width == 5


def test_sheet_refuses() -> None:
    with pytest.raises(UserError, match="at least one picture"):
        sheet([])
    with pytest.raises(UserError, match="got 1 for 2"):
        sheet([picture(), picture()], labels=["one"])
    for wrong in ({"columns": 0}, {"gap": -1}, {"scale": 0}):
        with pytest.raises(UserError, match=f"contact sheet's {next(iter(wrong))} must be at least"):
            sheet([picture()], **wrong)  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(prompt=st.text() | st.text(st.characters()), extra=st.dictionaries(st.text(), JSON, max_size=3))
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_settings_survive_any_prompt(tmp_path: Path, suffix: str, prompt: str, extra: dict[str, Any]) -> None:
    settings = {"extra": extra, "prompt": prompt, "seed": 3}
    path = tmp_path / f"a{suffix}"
    save_picture(picture(), path, settings, overwrite=True)
    assert read_settings(path) == settings
    with Image.open(path) as again:
        save_picture(again, path, overwrite=True)
    assert read_settings(path) == settings


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_programs_read_the_text(tmp_path: Path, suffix: str) -> None:
    settings = FULL | {"prompt": "ein Füchslein 狐\nzwei"}
    path = tmp_path / f"a{suffix.upper()}"
    save_picture(picture(), path, settings)
    with Image.open(path) as image:
        if suffix == ".png":
            text = image.info["parameters"]
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            text = comment[8:].decode("utf-16-be")
    assert text == infotext(settings)
    with open(path, "rb") as file:
        assert read_settings(file) == settings


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_foreign_comments_in_either_byte_order(tmp_path: Path, order: str) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + infotext(FULL).encode(order)}
    picture().save(tmp_path / "a.jpg", exif=exif)
    back = read_settings(tmp_path / "a.jpg")
    assert back is not None and back["prompt"] == FULL["prompt"] and back["seed"] == FULL["seed"]


def test_foreign_png_text_even_behind_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", infotext(FULL), zip=True)
    picture().save(path, pnginfo=chunks)
    data = path.read_bytes()
    start = data.index(b"zTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert (read_settings(path) or {})["seed"] == FULL["seed"]


def test_a_damaged_json_falls_back_to_the_text_or_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("sfumato", '{"seed":')
    picture().save(path, pnginfo=chunks)
    with pytest.raises(UserError, match="are damaged"):
        read_settings(path)
    with Image.open(path) as image, pytest.raises(UserError, match="are damaged; save it with settings"):
        save_picture(image, tmp_path / "b.png")
    chunks.add_text("parameters", "fox\nSteps: 2, Seed: 4, Size: 8x8")
    picture().save(path, pnginfo=chunks)
    assert read_settings(path) == {"prompt": "fox", "steps": 2, "seed": 4, "width": 8, "height": 8}


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_damaged_exif_is_an_error(tmp_path: Path, suffix: str) -> None:
    data = encode_picture(picture(), suffix, FULL).replace(b"MM\0*", b"MM\0?")
    with pytest.raises(UserError, match="cannot read the picture"):
        read_settings(io.BytesIO(data))
    with Image.open(io.BytesIO(data)) as image:
        with pytest.raises(UserError, match="EXIF data are damaged"):
            save_picture(image, tmp_path / "b.png")
        save_picture(image, tmp_path / "b.png", {})
    assert read_settings(tmp_path / "b.png") is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pixels(tmp_path: Path, suffix: str, mode: str) -> None:
    original = picture((16, 16), mode)
    path = tmp_path / f"a{suffix}"
    save_picture(original, path)
    assert read_settings(path) is None
    with Image.open(path) as back:
        if suffix in (".png", ".webp"):
            kept = mode if suffix == ".png" or mode != "L" else "RGB"
            assert torch.equal(from_pil(back, kept), from_pil(original, kept))
        else:
            assert (from_pil(back) - from_pil(original)).abs().mean() < 0.1


def test_carried_settings_are_the_default(tmp_path: Path) -> None:
    plain = picture()
    carrying = with_settings(plain, FULL)
    assert "sfumato" not in plain.info and carrying.info["sfumato"] == FULL
    save_picture(carrying, tmp_path / "a.png")
    save_picture(carrying, tmp_path / "b.png", {"seed": 1})
    save_picture(carrying, tmp_path / "c.png", {})
    assert [read_settings(tmp_path / f"{name}.png") for name in "abc"] == [FULL, {"seed": 1}, None]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_picture_that_carries_settings_saves_them_itself(tmp_path: Path, name: str) -> None:
    with_settings(picture(), FULL).save(tmp_path / name)
    assert read_settings(tmp_path / name) == FULL
    buffer = io.BytesIO()
    with_settings(picture(), FULL).save(buffer, "png", optimize=True)
    assert read_settings(io.BytesIO(buffer.getvalue())) == FULL
    with_settings(picture(), FULL).save(tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.size == picture().size


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_carrying_changes_no_pixel(mode: str) -> None:
    plain = picture().convert(mode)
    carrying = with_settings(plain, FULL)
    assert carrying.mode == mode and carrying.convert("RGBA").tobytes() == plain.convert("RGBA").tobytes()


def test_the_same_picture_is_the_same_bytes() -> None:
    shuffled = dict(reversed(FULL.items()))
    for suffix in SUFFIXES:
        assert encode_picture(picture(), suffix, FULL) == encode_picture(picture(), suffix, shuffled)
    with Image.open(io.BytesIO(encode_picture(picture(), ".png", FULL))) as image:
        assert image.info["sfumato"] == json.dumps(FULL, sort_keys=True, separators=(",", ":"))


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match=r"suffix '.pnk' \(did you mean '.png'\?\); known: .png, .jpg"):
        save_picture(picture(), tmp_path / "a.pnk")
    with pytest.raises(UserError, match="there is no folder"):
        save_picture(picture(), tmp_path / "nowhere" / "a.png")
    save_picture(picture(), path)
    with pytest.raises(UserError, match="already exists"):
        save_picture(picture(), path)
    for wrong in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(UserError, match="cannot be written as JSON"):
            save_picture(picture(), path, wrong, overwrite=True)
    with pytest.raises(UserError, match="save it as .png"):
        save_picture(picture(), tmp_path / "a.jpg", {"prompt": "x" * 70_000})
    with pytest.raises(UserError, match="cannot write a 17000x1 picture of mode 'RGB' as WEBP"):
        save_picture(Image.new("RGB", (17_000, 1)), tmp_path / "a.webp")
    assert os.listdir(tmp_path) == ["a.png"]


def test_reading_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture"):
        read_settings(tmp_path / "none.png")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="is not a PNG, JPEG or WebP picture"):
        read_settings(tmp_path / "a.png")
    whole = encode_picture(picture((64, 64)), ".png")
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        read_settings(tmp_path / "a.png")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.png"
    save_picture(picture(), path, {"seed": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":

        def half(beside: Path, data: bytes) -> None:
            beside.write_bytes(data[: len(data) // 2])
            full()

        monkeypatch.setattr(images, "_write_and_sync", half)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match="cannot write .*a.png.*No space left on device"):
        save_picture(picture(), path, {"seed": 2}, overwrite=True)
    assert os.listdir(tmp_path) == ["a.png"]
    assert read_settings(path) == {"seed": 1}


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
def test_the_file_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_picture(picture(), tmp_path / "a.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o644


# --- other programs' settings, and 16 bits ------------------------------------------------------------------------


def with_texts(path: Path, **texts: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    picture().save(path, pnginfo=chunks)
    return path


def test_comfyuis_graph_is_read_and_others_are_named(tmp_path: Path) -> None:
    from .test_infotext import GRAPH, READ, changed

    path = tmp_path / "a.png"
    assert read_settings(with_texts(path, prompt=json.dumps(GRAPH), workflow='{"nodes": []}')) == READ
    odd = json.dumps(changed("6", text=["10", 0]))
    for texts, sentence in (
        ({"prompt": odd}, "carries the graph of ComfyUI, of which one KSampler"),
        ({"workflow": '{"nodes": []}'}, "carries the graph of ComfyUI"),
        ({"sd-metadata": "{}"}, "carries the settings of InvokeAI, which are not read"),
        ({"Software": "NovelAI"}, "carries the settings of NovelAI, which are not read"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_settings(with_texts(path, **texts))
    assert read_settings(with_texts(path, parameters="fox\nSteps: 2, Seed: 4, Size: 8x8", prompt=odd))["seed"] == 4
    assert read_settings(with_texts(path, Comment="Created with GIMP")) is None


def test_16_bits_become_8(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 65535]], dtype=np.uint16)
    deep = Image.fromarray(values)
    assert deep.mode == "I;16"
    assert np.array(images.eight_bits(deep)).tolist() == [[0, 0, 1, 1, 255]]
    assert np.array(images.as_mode(deep, "RGB"))[0, :, 2].tolist() == [0, 0, 1, 1, 255]
    deep.info["transparency"] = 128
    assert np.array(images.as_mode(deep, "L")).tolist() == [[0, 255, 1, 1, 255]]
    assert images.eight_bits(picture()).tobytes() == picture().tobytes()
    for mode in ("I", "F"):
        with pytest.raises(UserError, match=rf"32-bit pixels \(mode {mode}\)"):
            images.eight_bits(Image.new(mode, (2, 2)))
