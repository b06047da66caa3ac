"""The captioned emoji set: 64x64 pictures on white, drawn from published packages.

Five styles of the same concepts come from npm. Which picture is for training and which for validation is fixed by
`emoji_split.csv`, a list of (code points, style): a held-out `pair` is a concept that training sees in other styles
only, a held-out `concept` is seen in none. What is not on the list is not in the set, neither for training nor for
validation; skin tones, flags, keycaps, letters, families and pixel duplicates are not on it.

With pip alone there are two other styles, OpenMoji and Twemoji, whose pairs the list cannot know. There a concept goes
to validation if it is held out in any style, to training if any style trains on it, and nowhere otherwise.

>>> fates = Fates({("fox", "noto"): Fate("train", ""), ("bat", "noto"): Fate("validation", "concept")})
>>> fates.of_style("twemoji")
{'fox': Fate(split='train', held_out_by=''), 'bat': Fate(split='validation', held_out_by='concept')}
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sfumato.checkpoints.io import replacing
from sfumato.errors import DataError, UserError
from sfumato.training.emoji import drawings
from sfumato.training.emoji.captions import EMOJIBASE, NAMES, Caption, read_captions
from sfumato.training.emoji.drawings import PIP_STYLES, STYLES, Drawing, Style
from sfumato.training.emoji.packages import Package, find, has_npm, installed, npm_pack

FILE = "emoji64.parquet"

Progress = Callable[[int, int], None]


class Fate(NamedTuple):
    """What a picture is for: its `split`, and for validation whether the `pair` or the `concept` is held out."""

    split: str
    held_out_by: str


class Fates:
    """The list of all pictures of the set: what those of (code points, style) are for."""

    def __init__(self, listed: Mapping[tuple[str, str], Fate]) -> None:
        self.styles: dict[str, dict[str, Fate]] = {}
        self.concepts: dict[str, list[Fate]] = {}
        for (code, style), fate in listed.items():
            self.styles.setdefault(style, {})[code] = fate
            self.concepts.setdefault(code, []).append(fate)

    def of_style(self, style: str) -> dict[str, Fate]:
        """What a style's pictures are for, by code points; for a style off the list as its concepts are used in the
        others, training first. What is not in it is not to be used."""
        if style in self.styles:
            return self.styles[style]
        held_out = {code: Fate("validation", "concept") for code, fates in self.concepts.items() if _concept(fates)}
        trained = {code for code, fates in self.concepts.items() if any(fate.split == "train" for fate in fates)}
        train = {code: Fate("train", "") for code in self.concepts if code in trained - held_out.keys()}
        return train | held_out


def _concept(fates: list[Fate]) -> bool:
    return any(fate.held_out_by == "concept" for fate in fates)


@dataclass
class Built:
    """What `prepare` made. `rows` counts pictures by (style, split); `missing` holds the (code points, style) that
    the list asks for and the packages lack; `duplicates` are those left out as pixel by pixel equal to another of
    their style; `absent` are the styles of the same registry of which no package was found."""

    path: Path
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    absent: list[Style] = field(default_factory=list)


def read_fates() -> Fates:
    """The list that comes with Sfumato."""
    text = importlib.resources.files(__name__).joinpath("emoji_split.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text))
    return Fates({(row["codepoints"], row["style"]): Fate(row["split"], row["held_out_by"]) for row in rows})


def prepare(out: Path, source: Path | None = None, on_progress: Progress | None = None) -> Built:
    """Build the set and write it as ``emoji64.parquet`` into the folder `out`.

    Args:
        out: made if it is not there.
        source: a folder with the packages, unpacked or as downloaded; None fetches them with npm or, where there is
            no npm, takes those that pip has installed.
        on_progress: called with (pictures done, pictures in all).

    Raises:
        UserError: the file is there already, a tool or package is missing, damaged or of another version.
    """
    target = out / FILE
    if out.suffix == ".parquet" or (out.exists() and not out.is_dir()):
        raise UserError(f"{str(out)!r} must be a folder; the set is written into it as {FILE}")
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder")
    _need_pyarrow()
    drawings.need_renderer()
    built = Built(target)
    with tempfile.TemporaryDirectory(prefix="sfumato-") as workspace:
        packages = _gather(source, Path(workspace))
        rows = list(_rows(packages, built, on_progress))
    if not rows:
        raise DataError("the packages hold no picture of the set")
    _write(rows, target)
    return built


def _gather(source: Path | None, workspace: Path) -> dict[Package, Path]:
    """The packages to build from, each with its root folder."""
    from_npm, from_pip = [*(s.package for s in STYLES), EMOJIBASE], [*(s.package for s in PIP_STYLES), NAMES]
    if source is not None:
        found = find([*from_npm, *from_pip], source, workspace)
        where = f"in {str(source)!r}"
    elif has_npm():
        fetched = workspace / "fetched"
        fetched.mkdir()
        npm_pack(from_npm, fetched)
        found, where = find(from_npm, fetched, workspace), "among what npm brought"
    else:
        found, where = installed(from_pip), "installed, nor is npm"
    if not any(style.package in found for style in (*STYLES, *PIP_STYLES)):
        names = " ".join(f"{package.name}=={package.version}" for package in from_pip)
        raise DataError(
            f"no package with emoji is {where}; install npm, name a folder of packages with --from, "
            f"or: pip install {names}"
        )
    if EMOJIBASE not in found and NAMES not in found:
        found |= installed([NAMES])
    return found


def _rows(packages: dict[Package, Path], built: Built, on_progress: Progress | None) -> Iterator[dict[str, Any]]:
    """The rows of the set, style by style, each picture drawn once; fills in `built`."""
    captions = read_captions(packages)
    wanted = list(_wanted(packages, captions, built))
    seen: set[bytes] = set()
    for done, (style, code, use, drawing) in enumerate(wanted, start=1):
        try:
            image = drawings.picture(drawing)
        except DataError as error:
            raise DataError(f"{style.package.name} {style.package.version}, {code}: {error}") from error
        if on_progress is not None:
            on_progress(done, len(wanted))
        pixels = hashlib.sha256(style.name.encode() + image.tobytes()).digest()
        if pixels in seen:
            built.duplicates.append((code, style.name))
            continue
        seen.add(pixels)
        built.rows[style.name, use.split] += 1
        yield _row(style, code, use, image, captions[code])


def _wanted(
    packages: dict[Package, Path], captions: Mapping[str, Caption], built: Built
) -> Iterator[tuple[Style, str, Fate, Drawing]]:
    """What to draw, in the order of the list; of two equal pictures the one for training comes first."""
    fates = read_fates()
    chosen = [style for style in (*STYLES, *PIP_STYLES) if style.package in packages]
    family = STYLES if set(STYLES) & set(chosen) else PIP_STYLES
    built.absent = [style for style in family if style not in chosen]
    for style in chosen:
        there = style.read(packages[style.package], captions)
        for code, use in fates.of_style(style.name).items():
            if code in there and code in captions:
                yield style, code, use, there[code]
            else:
                built.missing.append((code, style.name))


def _row(style: Style, code: str, use: Fate, image: Image.Image, caption: Caption) -> dict[str, Any]:
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return {
        "image": {"bytes": png.getvalue(), "path": f"{style.name.replace(' ', '_')}/{code}.png"},
        "text": caption.text,
        "tags": list(caption.tags),
        "text_zh": caption.text_zh,
        "style": style.name,
        "group": caption.group,
        "subgroup": caption.subgroup,
        "codepoints": code,
        "emoji": caption.emoji,
        "licence": style.licence,
        "attribution": style.attribution,
        "source": style.package.source,
        "split": use.split,
        "held_out_by": use.held_out_by,
    }


# ----------------------------------------------------------------------------------------------------------------
# writing


def _need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError("writing parquet needs pyarrow: pip install sfumato[data]") from error


def _write(rows: list[dict[str, Any]], target: Path) -> None:
    """Write the rows as parquet, whole or not at all, with the types that Hugging Face's `datasets` reads."""
    import pyarrow
    import pyarrow.parquet as parquet

    text = pyarrow.string()
    types = {name: text for name in rows[0]} | {
        "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]),
        "tags": pyarrow.list_(text),
    }
    value = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = {name: value for name in rows[0]} | {
        "image": {"_type": "Image"},
        "tags": {"feature": value, "_type": "List"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(types.items()), metadata=metadata))
    with replacing(target) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
