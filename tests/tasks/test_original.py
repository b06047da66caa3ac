"""What an edit is given: read, told in settings by path and hash, and found again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.tasks.edit import composited
from sfumato.tasks.original import Original


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
