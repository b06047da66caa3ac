"""What a user gives to an edit: a picture, where it is to change, and how it is told again from a finished picture.

A finished picture stores where its original was and the SHA-256 of its pixels, never the original itself: what was
painted over shall not travel with the result.

Pictures come as files, as Pillow's, or as values: see `Values`. What is transparent is drawn from on white; outside of
what is redrawn the result has the transparency of its original, and the colours beneath it.

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
from sfumato.images import as_mode, eight_bits, from_pil
from sfumato.tasks.draw import LOG
from sfumato.tasks.edit import STRENGTH, Source, extended

Given = str | os.PathLike[str] | Image.Image
"""A picture: its file, or itself."""

Values = np.ndarray[Any, Any] | Tensor
"""A picture's values, and those of a plane.

- A picture: arrays of numpy, (H, W), (H, W, 3) or (H, W, 4), uint8 or floating in [0, 1]; tensors, (1, H, W), (3, H, W)
  or (4, H, W), uint8 or floating in [-1, 1]. Four channels are red, green, blue and opacity.
- A mask: (H, W), of bool, of uint8 to 255, or floating in [0, 1].
- A map of depths: (H, W), of any finite numbers.

A first dimension of 1 more is allowed.
"""


@dataclass(frozen=True)
class Original:
    """What an edit was given.

    Attributes:
        picture: RGB, upright, with the room of outpainting around it.
        mask: L, white where it is redrawn; None for all of it.
        depth: near is bright; None where there is no map of depths. L, or F where it was given as numbers of any range.
        clear: RGBA, the picture with its transparency, where that stays outside the mask; None where there is none.
        strength: how far the picture is forgotten, in (0, 1].
        noise_level: of a small picture that is enlarged; None for the model's own.
    """

    picture: Image.Image
    mask: Image.Image | None = None
    depth: Image.Image | None = None
    strength: float = STRENGTH
    noise_level: int | None = None
    clear: Image.Image | None = None
    _said: dict[str, Any] = field(default_factory=dict, repr=False)
    _transparent: bool = field(default=False, repr=False)

    @classmethod
    def of(
        cls,
        picture: Given | Values,
        *,
        mask: Given | Values | None = None,
        box: Sequence[int] | None = None,
        outpaint: Sequence[int] | None = None,
        depth: Given | Values | None = None,
        strength: float | None = None,
        noise_level: int | None = None,
        upscale: float | None = None,
    ) -> Original:
        """From files, pictures or values.

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
        whole = _read(picture, "picture")
        opened, clear = _as(whole, "RGB"), _clear(whole)
        said: dict[str, Any] = {"picture": _told(picture, opened)}
        if sum(given is not None for given in (mask, box, outpaint)) > 1:
            raise UserError("a mask, a box and outpainting each say what is redrawn; give one of them")
        if upscale is not None:
            if mask is not None or box is not None or outpaint is not None:
                raise UserError("enlarging changes the whole picture; leave mask, box and outpainting out")
            opened, said["upscale"] = _enlarged(opened, upscale), upscale
        plane = _as(_read(mask, "mask"), "L") if mask is not None else None
        if mask is not None and plane is not None:
            said["mask"] = _told(mask, plane)
        if box is not None:
            plane, said["box"] = _boxed(opened.size, box), list(box)
        if clear is not None and (plane is not None or outpaint is not None):
            said["picture"]["sha256_rgba"] = _pixels_sha256(clear)
        if outpaint is not None:
            opened, plane, said["outpaint"] = *_outpainted(opened, outpaint), list(outpaint)
            clear = _outpainted(clear, outpaint)[0] if clear is not None else None
        if plane is not None and plane.size != opened.size:
            sizes = [f"{one.width} x {one.height}" for one in (plane, opened)]
            raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}")
        found = _as(_read(depth, "depth"), "L") if depth is not None else None
        if depth is not None and found is not None:
            said["depth"] = _told(depth, found)
        strength = strength if strength is not None else (STRENGTH if plane is None else 1.0)
        said["strength"] = strength
        if noise_level is not None:
            said["noise_level"] = noise_level
        kept = clear if plane is not None else None
        return cls(opened, plane, found, strength, noise_level, kept, said, clear is not None)

    def stored(self) -> dict[str, Any]:
        """As JSON: what was given, pictures by path and hash."""
        return dict(self._said)

    @classmethod
    def restored(cls, values: Mapping[str, Any], pictures: Mapping[str, Given | Values] | None = None) -> Original:
        """From `stored`; `pictures` says where the picture ("picture", "mask", "depth") is now.

        Raises:
            UserError: for a picture that is missing or another one.
        """
        places = pictures or {}
        given: dict[str, Any] = {n: _found(n, values[n], places.get(n)) for n in _PICTURES if n in values}
        kept = "sha256_rgba" in values.get("picture", {})
        options = {name: values[name] for name in _NUMBERS if name in values}
        again = cls.of(**given, **options)
        clear = again.clear if kept else None  # older pictures were opaque all over
        return replace(again, clear=clear, _said={**again._said, **{n: values[n] for n in given}})

    def remarks(self) -> list[str]:
        """What a user should know of the result, each in one sentence."""
        if self.mask is None and self._transparent:
            return ["all of the picture is redrawn, so its transparency is lost; outside of a mask or a box it stays"]
        return []

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
    """(H, W) in [0, 1], numbers of any range as they are."""
    if image.mode == "F":
        return torch.from_numpy(np.array(image))
    return torch.from_numpy(np.array(image, dtype=np.uint8)).to(torch.float32) / 255


def _read(given: Given | Values, what: str) -> Image.Image:
    """The picture, mask or depth, upright, in 8 bits (depths of any range in mode F)."""
    if isinstance(given, Image.Image):
        return given.convert("F") if what == "depth" and given.mode in ("I", "F") else eight_bits(given)
    if isinstance(given, np.ndarray | Tensor):
        return _of_values(given, what)
    if isinstance(given, list | tuple):
        raise UserError(f"the {what} is one picture, got a {type(given).__name__} of {len(given)}; call it for each")
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"the {what} is a file, a Pillow picture, an array or a tensor, got {type(given).__name__}")
    path = Path(given)
    if not path.is_file():
        raise UserError(f"there is no picture at {path}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError):
        raise UserError(f"{path} cannot be read as a picture") from None
    try:
        return _read(image, what)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _as(image: Image.Image, mode: str) -> Image.Image:
    """In "RGB", transparency on white, or "L", transparency not read; depths of any range as they are."""
    if image.mode in (mode, "F"):
        return image.copy()
    return image.convert("L") if mode == "L" else as_mode(image, mode)


def _clear(image: Image.Image) -> Image.Image | None:
    """RGBA of a picture of which anything is transparent."""
    if not image.has_transparency_data:
        return None
    clear = image.convert("RGBA")
    return clear if clear.getchannel("A").getextrema()[0] != 255 else None


def _of_values(given: Values, what: str) -> Image.Image:
    """A picture of values, as `Values` says them."""
    array = given if isinstance(given, np.ndarray) else given.detach().cpu().numpy(force=True)
    if what == "picture":
        return _picture_of(array, isinstance(given, Tensor))
    plane = array[0] if array.ndim == 3 and len(array) == 1 else array
    if plane.ndim != 2 or plane.dtype.kind not in "biuf":
        raise UserError(f"the {what} is (height, width), got {_shown(given)}")
    if not np.isfinite(plane).all():
        raise UserError(f"the {what} has values that are NaN or infinite")
    if what == "depth" and plane.dtype != np.uint8:
        return Image.fromarray(plane.astype(np.float32))
    if plane.dtype == np.bool_:
        plane = plane.astype(np.uint8) * 255
    elif what == "mask" and plane.dtype == np.uint8 and plane.max(initial=0) == 1:
        raise UserError("a mask of uint8 goes to 255, this one to 1; give it as bool or floating, or times 255")
    return Image.fromarray(plane if plane.dtype == np.uint8 else _levels(plane, what, 0))


def _picture_of(array: np.ndarray[Any, Any], ours: bool) -> Image.Image:
    """A picture of numpy's layout (H, W, C), or of `ours`, (C, H, W)."""
    said = f"{array.dtype} of shape {array.shape}"
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if ours and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    elif ours or (array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        layout = "(1, 3 or 4, height, width)" if ours else "(height, width) or (height, width, 1, 3 or 4)"
        raise UserError(f"{'a tensor' if ours else 'an array'} of one picture is {layout}, got {said}")
    if array.size == 0:
        raise UserError(f"the picture is empty: {said}")
    if array.dtype != np.uint8:
        array = _levels(array, "picture", -1 if ours else 0)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _levels(array: np.ndarray[Any, Any], what: str, low: int) -> np.ndarray[Any, Any]:
    """Floating values in [low, 1] as uint8. Raises `UserError` for other types and values."""
    span = f"[{low}, 1]"
    if array.dtype.kind != "f":
        raise UserError(f"values of a {what} are uint8, or floating in {span}, got {array.dtype}")
    if not np.isfinite(array).all():
        raise UserError(f"the {what} has values that are NaN or infinite")
    least, most = float(array.min()), float(array.max())
    if least < low - 1e-3 or most > 1 + 1e-3:
        kinds = ("a tensor", "an array in [0, 1]") if low else ("an array", "a tensor in [-1, 1]")
        ours = f"{kinds[0]} of a picture lies in {span} ({kinds[1]})"
        which = ours if what == "picture" else f"a {what} lies in {span}"
        raise UserError(f"{which}, or is uint8; got {least:.3g} to {most:.3g}")
    if low and least >= 0:
        LOG.warning("the picture's tensor has no value below 0; tensors are read as [-1, 1], where 0 is grey")
    share = (array.astype(np.float64) - low) / (1 - low)
    return (share * 255).round().clip(0, 255).astype(np.uint8)


def _shown(given: Values) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}"


def _told(given: Given | Values, image: Image.Image) -> dict[str, Any]:
    """Where a picture is, and the hash of its pixels."""
    path = str(Path(given).resolve()) if isinstance(given, str | os.PathLike) else None
    return ({"path": path} if path is not None else {}) | {"sha256": _pixels_sha256(image)}


def _pixels_sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _found(name: str, told: Any, given: Given | Values | None) -> Given | Values:
    """The picture that was told of."""
    try:
        wanted, path = {"sha256": told["sha256"]}, told.get("path")
    except (TypeError, KeyError, AttributeError):
        raise UserError("the settings are incomplete, so the picture cannot be drawn again") from None
    wanted |= {"sha256_rgba": told["sha256_rgba"]} if "sha256_rgba" in told else {}
    option, flag = ("the original", "--original") if name == "picture" else (f"the {name}", f"--{name}")
    if given is None:
        if path is None or not Path(path).is_file():
            where = f", {path}," if path else ""
            raise UserError(f"{option}{where} is not here; name it with {flag} PATH")
        given = str(path)
    image = _read(given, name)
    clear = _clear(image) if "sha256_rgba" in wanted else None
    hashes = {"sha256": _pixels_sha256(_as(image, _PICTURES[name]))}
    hashes |= {"sha256_rgba": _pixels_sha256(clear)} if clear is not None else {}
    if hashes != wanted:
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
