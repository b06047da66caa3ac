"""Pictures at the border of the library: tensors in [-1, 1] become Pillow images, contact sheets and files.

A saved picture carries the settings that made it, twice. Once as the `parameters` text that Stable Diffusion
front ends read (`infotext.py`; a PNG text chunk of that name, EXIF UserComment in JPEG and WebP), and once as JSON
without loss: in PNG an iTXt chunk named `sfumato`, in JPEG and WebP the EXIF ImageDescription (0x010E) behind the
prefix `sfumato:`. The JSON is pure ASCII (other characters are escaped), which that EXIF field asks for and
which lets any prompt survive, whatever its script. A file is written beside its final place and then renamed,
so a reader finds the whole picture or none.

>>> import torch
>>> picture = with_settings(to_pil(torch.zeros(3, 8, 8))[0], {"prompt": "a fox", "steps": 20, "seed": 7})
>>> picture.size, picture.getpixel((0, 0))
((8, 8), (128, 128, 128))
>>> import tempfile, pathlib
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pathlib.Path(folder) / "fox.webp"
...     save_picture(picture, path)
...     read_settings(path)
{'prompt': 'a fox', 'seed': 7, 'steps': 20}
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from sfumato.errors import UserError, nearest
from sfumato.infotext import Settings, infotext, parse_comfy, parse_infotext, program_of

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

JSON_KEY = "sfumato"
TEXT_KEY = "parameters"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

_EXIF_PREFIX = "sfumato:"
_IMAGE_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class PictureError(RuntimeError):
    """A model's result cannot be shown as a picture; the message says what is wrong with it."""


# --- tensors and pictures ---------------------------------------------------------------------------------


def to_pil(x: Tensor) -> list[Image.Image]:
    """Turn values in [-1, 1] into 8-bit pictures: `round((x + 1)·127.5)`, half to even, clamped to [0, 255].

    Args:
        x: pictures, (B, C, H, W) or (C, H, W), floating, in [-1, 1]; C is 1 (grey), 3 (RGB) or 4 (RGBA).

    Returns:
        One Pillow image for each picture of the batch.

    Raises:
        UserError: the shape or the type is not that of pictures.
        PictureError: a value is NaN or infinite (it would otherwise be drawn as black).
    """
    if x.ndim not in (3, 4) or x.shape[-3] not in _MODES or not x.is_floating_point():
        raise UserError(
            f"cannot make pictures of a {x.dtype} tensor of shape {tuple(x.shape)}; "
            "expected floating values of shape (B, C, H, W) or (C, H, W) with C = 1, 3 or 4"
        )
    batch = x.detach().to("cpu", torch.float32).reshape(-1, *x.shape[-3:])
    for index, picture in enumerate(batch):
        bad = int((~picture.isfinite()).sum())
        if bad:
            raise PictureError(
                f"picture {index} of {len(batch)} has {bad} values that are NaN or infinite out of "
                f"{picture.numel()}: the model overflowed; try float32 instead of half precision, "
                "or less guidance"
            )
    levels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    arrays = levels.permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def from_pil(images: Sequence[Image.Image] | Image.Image, mode: str = "RGB") -> Tensor:
    """Turn pictures of one size into a float32 tensor (B, C, H, W) in [-1, 1], `v/127.5 - 1`.

    Args:
        images: one picture or several; transparent parts are laid on white unless `mode` is "RGBA".
        mode: "RGB" (C = 3), "L" (C = 1) or "RGBA" (C = 4).

    Raises:
        UserError: no picture, unequal sizes, an unknown `mode`, or a picture of 32-bit pixels.
    """
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if mode not in _MODES.values():
        raise UserError(f"unknown picture mode {mode!r}{nearest(mode, _MODES.values())}; known: L, RGB, RGBA")
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) != 1:
        found = ", ".join(f"{w}x{h}" for w, h in sizes[:4]) or "none"
        raise UserError(f"expected one or more pictures, all of one size; found {found}")
    arrays = [np.array(as_mode(picture, mode), dtype=np.uint8) for picture in pictures]
    stacked = torch.from_numpy(np.stack(arrays)).reshape(len(arrays), *arrays[0].shape[:2], -1)
    return stacked.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 127.5 - 1


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to "L", "RGB" or "RGBA", as `eight_bits`; what is transparent goes onto white unless `mode` keeps it."""
    if image.mode == mode:
        return image
    image = eight_bits(image)
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits, divided by 257 so that 65535 becomes 255; a picture of 8 bits as it is.

    Raises:
        UserError: 32-bit pixels, whose range nothing says.
    """
    if image.mode in ("I", "F"):
        raise UserError(f"32-bit pixels (mode {image.mode}) have no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    gap: int = 2,
    scale: int = 1,
) -> Image.Image:
    """Lay pictures out on one white page, row by row, each centred at the top of its cell.

    Args:
        images: one or more pictures, of any sizes and modes.
        columns: pictures in a row; by default `ceil(sqrt(n))`.
        labels: one text for each picture, written below it, on up to three lines and then cut with "...". The
            font is Pillow's own, which knows Latin letters only.
        gap: white pixels between pictures and around the page, at least 0.
        scale: integer enlargement without smoothing, at least 1.

    Returns:
        An RGB picture.

    Raises:
        UserError: no pictures, not as many labels as pictures, or a number out of its range.
    """
    pictures = list(images)
    if not pictures:
        raise UserError("a contact sheet needs at least one picture; got none")
    if labels is not None and len(labels) != len(pictures):
        raise UserError(f"a contact sheet needs one label per picture; got {len(labels)} for {len(pictures)}")
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    for name, value, least in (("columns", columns, 1), ("gap", gap, 0), ("scale", scale, 1)):
        if value < least:
            raise UserError(f"a contact sheet's {name} must be at least {least}; got {value}")
    pictures = [_enlarged(as_mode(picture, "RGB"), scale) for picture in pictures]
    columns = min(columns, len(pictures))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    font = ImageFont.load_default(min(16, max(10, width // 10)))
    captions = [] if labels is None else [_wrapped(label, font, width) for label in labels]
    line = math.ceil(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else 11
    tall = height + line * max((caption.count("\n") + 1 for caption in captions if caption), default=0)
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (tall + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    for index, picture in enumerate(pictures):
        left, top = gap + (index % columns) * (width + gap), gap + (index // columns) * (tall + gap)
        page.paste(picture, (left + (width - picture.width) // 2, top))
        for number, text in enumerate(captions[index].split("\n") if captions else []):
            pen.text((left, top + height + number * line), text, fill="black", font=font)
    return page


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _wrapped(label: str, font: Font, width: int, lines: int = 3) -> str:
    """Break a label into lines at most `width` pixels wide, and cut what `lines` lines cannot hold."""
    done: list[str] = []
    rest = " ".join(label.split())
    while rest and len(done) < lines:
        end = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 1, end + 1)
        end = space if end < len(rest) and space > 0 else end
        done.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = done[-1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        done[-1] = last.rstrip() + "..."
    return "\n".join(done)


# --- settings as JSON -------------------------------------------------------------------------------------


def _json(settings: Settings) -> str:
    """Settings as compact ASCII JSON with sorted keys: one text for one meaning."""
    try:
        return json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the picture's settings cannot be written as JSON: {error}") from error


def _settings_from_json(text: str) -> dict[str, Any] | None:
    """The settings in a JSON text, or None where it is damaged or not an object."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


# --- files ------------------------------------------------------------------------------------------------


class Picture(Image.Image):
    """A Pillow picture that carries the settings that made it in `info["sfumato"]`."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As Pillow saves, settings included where the file is a PNG, JPEG or WebP; `save_picture` writes whole or not
        at all besides, and replaces nothing unasked."""
        suffix = Path(fp).suffix.lower() if isinstance(fp, str | os.PathLike) else ""
        kind = format.upper() if format is not None else FORMATS.get(suffix, "")
        if kind in FORMATS.values() and (settings := _carried(self)):
            params = _options_of(kind, settings) | params
        super().save(fp, format, **params)


def with_settings(image: Image.Image, settings: Settings) -> Picture:
    """Return a copy of `image` with its settings in `info["sfumato"]`, where it and `save_picture` find them."""
    carrying = Picture()
    carrying.__setstate__(image.__getstate__())
    carrying.info = dict(image.info) | {JSON_KEY: dict(settings)}
    return carrying


def save_picture(
    image: Image.Image,
    path: str | os.PathLike[str],
    settings: Settings | None = None,
    overwrite: bool = False,
) -> None:
    """Write a picture and the settings that made it to a PNG, JPEG or WebP file, whole or not at all.

    Args:
        image: the picture. JPEG (quality 95, full colour resolution) has no transparency: that goes onto
            white. PNG and WebP are written without loss.
        path: the suffix says the format: .png, .jpg, .jpeg or .webp. The folder must exist.
        settings: a dict that JSON can hold; None takes `image.info["sfumato"]` where present, `{}` writes
            none.
        overwrite: replace a file that is there.

    Raises:
        UserError: unknown suffix, a file in the way, settings that do not fit, or a write that failed (disk
            full, no such folder, no permission). The earlier file, if any, is then still there, untouched.
    """
    target = Path(path)
    data = encode_picture(image, target.suffix, settings)
    if not overwrite and os.path.lexists(target):
        raise UserError(f"{str(target)!r} already exists; choose another name or allow overwriting")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
    beside = target.parent / f".sfumato-{secrets.token_hex(8)}.tmp"
    try:
        _write_and_sync(beside, data)
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _write_and_sync(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode_picture(image: Image.Image, suffix: str, settings: Settings | None = None) -> bytes:
    """The bytes that `save_picture` writes, for the format that `suffix` (".png", ".jpg", ...) names.

    Raises:
        UserError: an unknown suffix, or a picture or settings that the format cannot hold.
    """
    kind = FORMATS.get(suffix.lower())
    if kind is None:
        known = ", ".join(FORMATS)
        raise UserError(f"unknown picture suffix {suffix!r}{nearest(suffix, FORMATS)}; known: {known}")
    settings = _carried(image) if settings is None else settings
    options: dict[str, Any] = {
        "PNG": {},
        "JPEG": {"quality": 95, "subsampling": 0, "exif": b""},
        "WEBP": {"lossless": True, "exact": True, "exif": b""},
    }[kind]
    if settings:
        options |= _options_of(kind, settings)
    if kind != "PNG" and image.mode not in ("RGB", "L"):
        image = as_mode(image, "RGBA" if kind == "WEBP" and image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    try:
        Image.Image.save(image, buffer, kind, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write a {image.width}x{image.height} picture of mode {image.mode!r} as {kind}: {error}"
        ) from error
    return buffer.getvalue()


def _options_of(kind: str, settings: Settings) -> dict[str, Any]:
    """What Pillow is told so that the settings go into a file of this format."""
    described, text = _json(settings), _writable(infotext(settings))
    return {"pnginfo": _png_chunks(described, text)} if kind == "PNG" else {"exif": _exif(described, text)}


def _carried(image: Image.Image) -> dict[str, Any]:
    """The settings an image carries: a dict from `with_settings`, or the JSON text of an opened file."""
    carried = image.info.get(JSON_KEY)
    try:
        carried = _exif_texts(image)[0] if carried is None else carried
    except _UNREADABLE as error:
        raise UserError(
            f"the picture's EXIF data are damaged ({error}); save it with settings of its own"
        ) from error
    if isinstance(carried, str):
        carried = _settings_from_json(carried)
        if carried is None:
            raise UserError("the settings the picture carries are damaged; save it with settings of its own")
    return dict(carried) if isinstance(carried, Mapping) else {}


def _writable(text: str) -> str:
    """The text without what no picture file can hold: zero characters and halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _png_chunks(described: str, text: str) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(TEXT_KEY, text)  # tEXt where Latin-1 will do, else iTXt
    chunks.add_itxt(JSON_KEY, described)
    return chunks


def _exif(described: str, text: str) -> bytes:
    """An EXIF block (big-endian TIFF) with ImageDescription in IFD 0 and UserComment in the Exif IFD.

    Built by hand because the standard asks for type 7 in UserComment and the readers of the `parameters` text
    expect UTF-16 in big-endian order behind the "UNICODE" mark.
    """
    description = f"{_EXIF_PREFIX}{described}".encode("ascii") + b"\0"
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first_ifd, entry = 8, ">HHII"
    data_at = first_ifd + 2 + 2 * 12 + 4
    exif_ifd = data_at + len(description) + len(description) % 2
    block = b"MM\0*" + struct.pack(">IH", first_ifd, 2)
    block += struct.pack(entry, _IMAGE_DESCRIPTION, 2, len(description), data_at)
    block += struct.pack(entry, _EXIF_IFD, 4, 1, exif_ifd) + struct.pack(">I", 0)
    block += description + b"\0" * (len(description) % 2)
    block += struct.pack(">H", 1) + struct.pack(entry, _USER_COMMENT, 7, len(comment), exif_ifd + 18)
    block += struct.pack(">I", 0) + comment
    if len(block) > 65_000:
        raise UserError(
            f"the picture's settings take {len(block)} bytes, more than the 65000 that JPEG and WebP "
            "files have room for; save it as .png"
        )
    return b"Exif\0\0" + block


_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def read_settings(file: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any] | None:
    """The settings inside a PNG, JPEG or WebP file: our own JSON if it is there, else the `parameters` text, else those
    of a plain graph of ComfyUI.

    Args:
        file: a path, or a binary file open for reading.

    Returns:
        The settings, or None for a picture that carries none.

    Raises:
        UserError: no such file, not a picture of these formats, settings that are damaged, or those of a program that
            are not read.
    """
    name = repr(os.fspath(file)) if isinstance(file, (str, os.PathLike)) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
                described, text = _picture_texts(image)
                texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except FileNotFoundError as error:
        raise UserError(f"there is no picture {name}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a PNG, JPEG or WebP picture") from error
    except _UNREADABLE as error:
        raise UserError(f"cannot read {name}: {error}") from error
    settings = None if described is None else _settings_from_json(described)
    if settings is not None:
        return settings
    if text is not None and text.strip():
        return parse_infotext(text)
    if described is not None:
        raise UserError(f"the settings inside {name} are damaged: they are not a JSON object")
    return _foreign(texts, name)


def _foreign(texts: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """What another program than A1111 wrote into the picture called `name`."""
    program = program_of(texts)
    if program == "ComfyUI" and (settings := parse_comfy(texts.get("prompt", ""))) is not None:
        return settings
    if program == "ComfyUI":
        raise UserError(
            f"{name} carries the graph of ComfyUI, of which one KSampler behind a text is read; this one is another"
        )
    if program is not None:
        raise UserError(f"{name} carries the settings of {program}, which are not read")
    return None


def _picture_texts(image: Image.Image) -> tuple[str | None, str | None]:
    """(our JSON, the `parameters` text) of an opened picture, each None where absent."""
    if image.format != "PNG":
        return _exif_texts(image)
    if JSON_KEY not in image.info:
        image.load()  # text may also follow the pixels
    described, text = image.info.get(JSON_KEY), image.info.get(TEXT_KEY)
    return (str(described) if described is not None else None), (str(text) if text is not None else None)


def _exif_texts(image: Image.Image) -> tuple[str | None, str | None]:
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))  # image.getexif() would hide damage that Image.open met in a JPEG
    description = exif.get(_IMAGE_DESCRIPTION)
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    described = None
    if isinstance(description, str) and description.startswith(_EXIF_PREFIX):
        described = description.removeprefix(_EXIF_PREFIX)
    if isinstance(comment, bytes):
        comment = _comment_text(comment)
    return described, comment if isinstance(comment, str) else None


def _comment_text(comment: bytes) -> str:
    """Decode an EXIF UserComment; writers disagree on the byte order of UTF-16, so the zero bytes decide."""
    mark, body = comment[:8], comment[8:]
    if mark == b"UNICODE\0":
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    if mark == b"ASCII\0\0\0":
        return body.decode("utf-8", "replace")
    return (body if mark == b"\0" * 8 else comment).decode("utf-8", "replace")
