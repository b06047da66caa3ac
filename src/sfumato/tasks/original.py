"""What a user gives to an edit: a picture, where it is to change, and how it is told again from a finished picture.

A finished picture stores where its original was and the SHA-256 of its pixels, never the original itself: what was
painted over shall not travel with the result.

>>> original = Original.of(Image.new("RGB", (8, 4), "red"), box=(0, 0, 4, 4))
>>> original.mask.getpixel((1, 1)), original.mask.getpixel((6, 1)), original.strength
(255, 0, 1.0)
>>> sorted(original.stored())
['box', 'picture', 'strength']
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sfumato.conditioners.layout import Box, layout_of
from sfumato.conditioners.semantic import ClassMap
from sfumato.errors import UserError
from sfumato.images import as_mode, from_pil
from sfumato.tasks.edit import STRENGTH, Source, extended

Given = str | os.PathLike[str] | Image.Image
"""A picture: its file, or itself."""


@dataclass(frozen=True)
class Original:
    """What an edit was given.

    Attributes:
        picture: RGB, upright, with the room of outpainting around it.
        mask: L, white where it is redrawn; None for all of it.
        depth: near is bright; None where there is no map of depths.
        strength: how far the picture is forgotten, in (0, 1].
        noise_level: of a small picture that is enlarged; None for the model's own.
    """

    picture: Image.Image
    mask: Image.Image | None = None
    depth: Image.Image | None = None
    strength: float = STRENGTH
    noise_level: int | None = None
    _said: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        picture: Given,
        *,
        mask: Given | None = None,
        box: Sequence[int] | None = None,
        outpaint: Sequence[int] | None = None,
        depth: Given | None = None,
        strength: float | None = None,
        noise_level: int | None = None,
        upscale: float | None = None,
    ) -> Original:
        """From files or pictures.

        Args:
            mask: as large as the picture; white is redrawn, black kept, grey mixed.
            box: (x, y, width, height) in pixels instead of a mask.
            outpaint: pixels to add (left, top, right, bottom).
            depth: inverse depth as a grey picture, near is bright.
            strength: None for 1 within a mask and 0.8 without.
            noise_level: step of the noise before enlarging, for models that enlarge; None for the model's own.
            upscale: enlarge the picture by interpolation first, for a pass at the larger size; no mask then.

        Raises:
            UserError: for what cannot be read or does not fit.
        """
        opened = _opened(picture, "RGB")
        said: dict[str, Any] = {"picture": _told(picture)}
        if sum(given is not None for given in (mask, box, outpaint)) > 1:
            raise UserError("a mask, a box and outpainting each say what is redrawn; give one of them")
        if upscale is not None:
            if mask is not None or box is not None or outpaint is not None:
                raise UserError("enlarging changes the whole picture; leave mask, box and outpainting out")
            opened, said["upscale"] = _enlarged(opened, upscale), upscale
        plane = _opened(mask, "L") if mask is not None else None
        if mask is not None:
            said["mask"] = _told(mask, "L")
        if box is not None:
            plane, said["box"] = _boxed(opened.size, box), list(box)
        if outpaint is not None:
            opened, plane, said["outpaint"] = *_outpainted(opened, outpaint), list(outpaint)
        if plane is not None and plane.size != opened.size:
            sizes = [f"{one.width} x {one.height}" for one in (plane, opened)]
            raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}")
        if depth is not None:
            said["depth"] = _told(depth, "L")
        strength = strength if strength is not None else (STRENGTH if plane is None else 1.0)
        said["strength"] = strength
        if noise_level is not None:
            said["noise_level"] = noise_level
        found = _opened(depth, "L") if depth is not None else None
        return cls(opened, plane, found, strength, noise_level, said)

    def stored(self) -> dict[str, Any]:
        """As JSON: what was given, pictures by path and hash."""
        return dict(self._said)

    @classmethod
    def restored(cls, values: Mapping[str, Any], pictures: Mapping[str, Given] | None = None) -> Original:
        """From `stored`; `pictures` says where the picture ("picture", "mask", "depth") is now.

        Raises:
            UserError: for a picture that is missing or another one.
        """
        places = pictures or {}
        given: dict[str, Any] = {n: _found(n, values[n], places.get(n)) for n in _PICTURES if n in values}
        options = {name: values[name] for name in _NUMBERS if name in values}
        again = cls.of(**given, **options)
        return replace(again, _said={**again._said, **{n: values[n] for n in given}})

    def source(self, channels: int = 3) -> Source:
        """For `tasks.edit`; `channels` of the model's pictures."""
        return Source(
            from_pil(self.picture, "RGB" if channels == 3 else "L")[0],
            _plane(self.mask) if self.mask is not None else None,
            _plane(self.depth) if self.depth is not None else None,
            self.strength,
            self.noise_level,
        )


def layout_given(given: str | os.PathLike[str] | Sequence[Any]) -> tuple[Box, ...]:
    """A layout from a JSON file with a list of `{"label": …, "box": [x, y, width, height]}`, or from that list.

    Raises:
        UserError: for what cannot be read or is no layout.
    """
    if not isinstance(given, str | os.PathLike):
        return layout_of(given)
    path = Path(given)
    if not path.is_file():
        raise UserError(f"there is no layout at {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} cannot be read as JSON, which a layout must be") from None
    try:
        return layout_of(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def map_restored(told: Any, given: Given | None = None) -> ClassMap:
    """The map that was told of, where it was or where it is now. Raises `UserError` for a missing or another one."""
    try:
        wanted, path = str(told["sha256"]), told.get("path")
    except (TypeError, KeyError, AttributeError):
        raise UserError("the settings are incomplete, so the picture cannot be drawn again") from None
    if given is None:
        if path is None or not Path(path).is_file():
            where = f", {path}," if path else ""
            raise UserError(f"the map{where} is not here; name it with --map PATH")
        given = str(path)
    found = ClassMap.of(given)
    if found.sha256 != wanted:
        raise UserError("the map is another one than the picture was drawn with (its classes differ)")
    return replace(found, path=path)


_PICTURES = {"picture": "RGB", "mask": "L", "depth": "L"}
_NUMBERS = ("box", "outpaint", "strength", "noise_level", "upscale")


def _plane(image: Image.Image) -> Tensor:
    """(H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).to(torch.float32) / 255


def _opened(given: Given, mode: str) -> Image.Image:
    """The picture, upright."""
    if isinstance(given, Image.Image):
        image = given
    else:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"there is no picture at {path}")
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError):
            raise UserError(f"{path} cannot be read as a picture") from None
    if image.mode == mode:
        return image.copy()
    return image.convert("L") if mode == "L" else as_mode(image, mode)


def _told(given: Given, mode: str = "RGB") -> dict[str, Any]:
    """Where a picture is, and the hash of its pixels."""
    path = None if isinstance(given, Image.Image) else str(Path(given).resolve())
    return ({"path": path} if path is not None else {}) | {"sha256": _pixels_sha256(_opened(given, mode))}


def _pixels_sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _found(name: str, told: Any, given: Given | None) -> Given:
    """The picture that was told of."""
    try:
        wanted, path = str(told["sha256"]), told.get("path")
    except (TypeError, KeyError, AttributeError):
        raise UserError("the settings are incomplete, so the picture cannot be drawn again") from None
    option, flag = ("the original", "--original") if name == "picture" else (f"the {name}", f"--{name}")
    if given is None:
        if path is None or not Path(path).is_file():
            where = f", {path}," if path else ""
            raise UserError(f"{option}{where} is not here; name it with {flag} PATH")
        given = str(path)
    if _pixels_sha256(_opened(given, _PICTURES[name])) != wanted:
        raise UserError(f"{option} is another picture than the one that was edited then (its pixels differ)")
    return given


def _enlarged(picture: Image.Image, scale: float) -> Image.Image:
    if not 1 < scale <= 8:
        raise UserError(f"a picture is enlarged by more than 1 and at most 8, got {scale}")
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _boxed(size: tuple[int, int], box: Sequence[int]) -> Image.Image:
    if len(box) != 4:
        raise UserError(f"a box is x, y, width, height, got {tuple(box)}")
    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[0] or y + height > size[1]:
        raise UserError(f"the box {x},{y},{width},{height} does not lie within the picture of {size[0]} x {size[1]}")
    mask = Image.new("L", size)
    mask.paste(255, (x, y, x + width, y + height))
    return mask


def _outpainted(picture: Image.Image, sides: Sequence[int]) -> tuple[Image.Image, Image.Image]:
    if len(sides) != 4:
        raise UserError(f"outpainting takes left, top, right, bottom, got {tuple(sides)}")
    larger, mask = extended(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float(), *sides)
    image = Image.fromarray(larger.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    return image, Image.fromarray((mask * 255).to(torch.uint8).numpy())
