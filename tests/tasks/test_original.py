"""What an edit is given: read, told in settings by path and hash, and found again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.tasks.edit import composited
from sfumato.tasks.original import Original, Values


def picture(seed: int = 0, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Image.Image:
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def test_a_box_is_a_mask(tmp_path: Path) -> None:
    original = Original.of(picture(), box=(2, 1, 3, 4))
    assert original.mask is not None
    mask = np.array(original.mask)
    assert mask[1:5, 2:5].min() == 255 and mask.sum() == 255 * 12
    source = original.source()
    assert source.picture.shape == (3, 8, 12) and source.mask is not None and float(source.mask.sum()) == 12
    assert original.strength == 1 and Original.of(picture()).strength == 0.8


def test_outpainting_adds_room_and_keeps_the_picture() -> None:
    given = picture()
    original = Original.of(given, outpaint=(3, 0, 1, 2))
    assert original.picture.size == (16, 10) and original.mask is not None
    assert np.array_equal(np.array(original.picture)[:8, 3:15], np.array(given))
    assert np.array(original.mask)[:8, 3:15].max() == 0 and np.array(original.mask).sum() == 255 * (160 - 96)


def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture(1, mode="L").save(tmp_path / "mask.png")
    original = Original.of(tmp_path / "a.png", mask=tmp_path / "mask.png", strength=0.5)
    told = json.loads(json.dumps(original.stored()))
    again = Original.restored(told)
    assert again.stored() == told and again.strength == 0.5
    assert again.picture.tobytes() == original.picture.tobytes()
    assert again.mask is not None and original.mask is not None
    assert again.mask.tobytes() == original.mask.tobytes()

    (tmp_path / "a.png").rename(tmp_path / "b.png")
    with pytest.raises(UserError, match="the original, .*a.png, is not here; name it with --original PATH"):
        Original.restored(told)
    moved = Original.restored(told, {"picture": tmp_path / "b.png"})
    assert moved.stored() == told and moved.picture.tobytes() == original.picture.tobytes()
    picture(2).save(tmp_path / "c.png")
    with pytest.raises(UserError, match="another picture than the one that was edited"):
        Original.restored(told, {"picture": tmp_path / "c.png"})


def test_the_hash_is_of_pixels_not_of_the_file(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "a.bmp")
    stored = [Original.of(tmp_path / name).stored()["picture"]["sha256"] for name in ("a.png", "a.bmp")]
    assert stored[0] == stored[1] == Original.of(picture()).stored()["picture"]["sha256"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"box": (0, 0, 13, 1)}, "does not lie within the picture of 12 x 8"),
        ({"box": (0, 0, 0, 1)}, "does not lie within"),
        ({"box": (1, 2, 3)}, "a box is x, y, width, height"),
        ({"box": (0, 0, 2, 2), "outpaint": (1, 1, 1, 1)}, "give one of them"),
        ({"outpaint": (0, 0, 0, 0)}, "outpainting adds pixels"),
        ({"outpaint": (-1, 0, 0, 2)}, "outpainting adds pixels"),
        ({"mask": picture(1, (4, 4), "L")}, "the mask is 4 x 4 pixels, the picture 12 x 8"),
        ({"upscale": 2.0, "box": (0, 0, 2, 2)}, "enlarging changes the whole picture"),
        ({"upscale": 9.0}, "at most 8"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Original.of(picture(), **options)  # type: ignore[arg-type]


def test_unreadable_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture at"):
        Original.of(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        Original.of(tmp_path / "text.png")
    with pytest.raises(UserError, match="the mask is empty"):
        Original.of(picture(), mask=Image.new("L", (12, 8))).source()


def test_a_mixture_keeps_what_is_outside_bit_for_bit() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (2, 3, 16, 16), generator=g, dtype=torch.uint8)
    original = torch.randint(0, 256, (3, 16, 16), generator=g, dtype=torch.uint8)
    mask = torch.rand(16, 16, generator=g)
    mask[mask < 0.3], mask[mask > 0.7] = 0, 1
    mixed = composited(drawn, original, mask)
    assert torch.equal(mixed[..., mask == 0], original.expand_as(drawn)[..., mask == 0])
    assert torch.equal(mixed[..., mask == 1], drawn[..., mask == 1])
    between = (mask > 0) & (mask < 1)
    exact = mask[between] * drawn[..., between] + (1 - mask[between]) * original.expand_as(drawn)[..., between]
    assert float((mixed[..., between] - exact).abs().max()) <= 0.501


# --- transparency -------------------------------------------------------------------------------------------------


def test_transparency_is_kept_within_a_mask_only() -> None:
    clear = picture(mode="RGBA")
    boxed = Original.of(clear, box=(0, 0, 2, 2))
    assert boxed.clear is not None and boxed.clear.tobytes() == clear.tobytes() and boxed.remarks() == []
    assert boxed.picture.mode == "RGB" and boxed.stored()["picture"].keys() == {"sha256", "sha256_rgba"}
    whole = Original.of(clear)
    assert whole.clear is None and "its transparency is lost" in whole.remarks()[0]
    assert whole.stored()["picture"].keys() == {"sha256"}
    opaque = clear.copy()
    opaque.putalpha(255)
    assert Original.of(opaque, box=(0, 0, 2, 2)).clear is None and Original.of(opaque).remarks() == []
    wide = Original.of(clear, outpaint=(1, 2, 3, 0)).clear
    assert wide is not None and wide.crop((1, 2, 13, 10)).tobytes() == clear.tobytes()


def test_transparency_is_found_again(tmp_path: Path) -> None:
    picture(mode="RGBA").save(tmp_path / "a.png")
    told = json.loads(json.dumps(Original.of(tmp_path / "a.png", box=(0, 0, 2, 2)).stored()))
    again = Original.restored(told)
    assert again.stored() == told and again.clear is not None
    opaque = {key: value for key, value in told["picture"].items() if key != "sha256_rgba"}  # as it was stored once
    assert Original.restored(told | {"picture": opaque}).clear is None
    hidden = np.array(picture(mode="RGBA"))
    hidden[..., 3] = 0
    Image.fromarray(hidden).save(tmp_path / "a.png")
    told = Original.of(tmp_path / "a.png", box=(0, 0, 2, 2)).stored()
    Image.fromarray(hidden ^ np.array([1, 0, 0, 0], dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="another picture"):
        Original.restored(told)
    picture().save(tmp_path / "a.png")
    with pytest.raises(UserError, match="another picture"):
        Original.restored(told)


def test_a_mixture_over_transparency_mixes_what_is_seen() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (2, 3, 8, 8), generator=g, dtype=torch.uint8)
    original = torch.randint(0, 256, (4, 8, 8), generator=g, dtype=torch.uint8)
    original[3, :4] = 0
    mask = torch.zeros(8, 8)
    mask[:, 2:4], mask[:, 4:] = 0.5, 1
    mixed = composited(drawn, original, mask)
    assert mixed.shape == (2, 4, 8, 8) and mixed.dtype == torch.uint8
    assert torch.equal(mixed[..., :2], original[..., :2].expand(2, 4, 8, 2))
    assert torch.equal(mixed[:, :3, :, 4:], drawn[..., 4:]) and bool((mixed[:, 3, :, 4:] == 255).all())
    assert torch.equal(mixed[:, :3, :4, 2:4], drawn[:, :, :4, 2:4]), "nothing is seen of what is transparent"
    assert bool((mixed[:, 3, :4, 2:4] == 128).all())
    solid = torch.cat((original[:3], torch.full((1, 8, 8), 255, dtype=torch.uint8)))
    assert torch.equal(composited(drawn, solid, mask)[:, :3], composited(drawn, original[:3], mask))


# --- values -------------------------------------------------------------------------------------------------------


def test_values_are_the_picture_itself() -> None:
    given = picture()
    array = np.array(given)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = Original.of(given).stored()
    values: list[Values] = [
        array, array / 255, (array / 255).astype(np.float32), array[None], tensor, tensor[None],
        tensor / 127.5 - 1, (tensor / 127.5 - 1).double(),
    ]  # fmt: skip
    for one in values:
        assert Original.of(one).stored() == wanted
    grey = picture(mode="L")
    for plane in (np.array(grey), np.array(grey)[..., None], torch.from_numpy(np.array(grey))[None]):
        assert Original.of(plane).picture.tobytes() == grey.convert("RGB").tobytes()
    clear = np.array(picture(mode="RGBA"))
    found = Original.of(clear, box=(0, 0, 1, 1)).clear
    assert found is not None and np.array_equal(np.array(found), clear)


def test_planes_of_values() -> None:
    mask = np.zeros((8, 12), dtype=bool)
    mask[2:5] = True
    wanted = Original.of(picture(), mask=Image.fromarray(mask.astype(np.uint8) * 255)).stored()
    for one in (mask, mask.astype(np.uint8) * 255, mask * 1.0, mask[None], torch.from_numpy(mask)):
        assert Original.of(picture(), mask=one).stored() == wanted
    depth = np.random.default_rng(0).normal(5, 3, (8, 12))
    source = Original.of(picture(), depth=depth).source()
    assert source.depth is not None and torch.equal(source.depth, torch.from_numpy(depth).float())
    same = Original.of(picture(), depth=Image.fromarray(depth.astype(np.float32))).stored()
    assert same == Original.of(picture(), depth=torch.from_numpy(depth)).stored()


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ([picture()], {}, "the picture is one picture, got a list of 1; call it for each"),
        ((picture(), picture()), {}, "got a tuple of 2"),
        (3, {}, "the picture is a file, a Pillow picture, an array or a tensor, got int"),
        (None, {}, "an array or a tensor, got NoneType"),
        (torch.zeros(8, 12, 3), {}, r"a tensor of one picture is \(1, 3 or 4, height, width\), got float32 of shape"),
        (torch.zeros(2, 3, 8, 12), {}, "a tensor of one picture"),
        (np.zeros((3, 8, 12)), {}, "an array of one picture is"),
        (np.zeros((8, 0, 3)), {}, "the picture is empty"),
        (np.zeros((8, 12, 3), dtype=np.int64), {}, r"are uint8, or floating in \[0, 1\], got int64"),
        (np.full((8, 12, 3), 255.0), {}, r"an array of a picture lies in \[0, 1\] .*, or is uint8; got 255 to 255"),
        (np.full((8, 12, 3), -0.5), {}, r"\(a tensor in \[-1, 1\]\), or is uint8; got -0.5 to -0.5"),
        (torch.full((3, 8, 12), 2.0), {}, r"a tensor of a picture lies in \[-1, 1\] .*; got 2 to 2"),
        (torch.full((3, 8, 12), float("nan")), {}, "NaN or infinite"),
        (picture(), {"mask": [[0, 1]]}, "the mask is one picture, got a list of 1"),
        (picture(), {"mask": np.ones((8, 12), dtype=np.uint8)}, "goes to 255, this one to 1"),
        (picture(), {"mask": np.zeros((8, 12, 3))}, r"the mask is \(height, width\), got float64 of shape"),
        (picture(), {"mask": np.full((8, 12), 2.0)}, r"a mask lies in \[0, 1\], or is uint8; got 2 to 2"),
        (picture(), {"mask": np.zeros((4, 4))}, "the mask is 4 x 4 pixels, the picture 12 x 8"),
        (picture(), {"depth": torch.full((8, 12), float("inf"))}, "the depth has values that are NaN"),
    ],
)  # fmt: skip
def test_values_that_are_no_picture_are_refused(given: object, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Original.of(given, **options)  # type: ignore[arg-type]


def test_a_tensor_that_looks_like_0_to_1_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Original.of(torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0)))
    assert "tensors are read as [-1, 1]" in caplog.text


def test_16_bits_are_read(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129], [257, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    opened = Original.of(tmp_path / "a.png", mask=tmp_path / "a.png", depth=tmp_path / "a.png")
    wanted = [[0, 0, 1], [1, 156, 255]]
    assert opened.mask is not None and opened.depth is not None
    for one in (opened.picture.getchannel("G"), opened.mask, opened.depth):
        assert np.array(one).tolist() == wanted
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a.tiff: 32-bit pixels \(mode F\) have no known range"):
        Original.of(tmp_path / "a.tiff")
