"""What is to be seen on an emoji, in words: names, tags and groups by code points.

Code points are written as in ``1f469-200d-1f680``: lower case, without leading zeros and without the variation
selector fe0f, which only asks for a picture. The words are those of Unicode CLDR, as packaged by emojibase (English,
Chinese, tags, groups) or, where only pip is at hand, by the PyPI package `emoji` (names alone).

>>> code_points("00A9-FE0F")
'a9'
>>> readable("man: red hair"), readable("person: bald"), readable("woman running: facing right")
('man with red hair', 'bald person', 'woman running facing right')
>>> slug("woman’s hat")
'womans-hat'
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import DataError
from sfumato.training.emoji.packages import Package

EMOJIBASE = Package("npm", "emojibase-data", "17.0.0")
NAMES = Package("pypi", "emoji", "2.16.0")


@dataclass(frozen=True)
class Caption:
    """The words for one emoji; what the package does not tell is empty. `slug` names it in icon sets."""

    text: str
    text_zh: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    emoji: str
    slug: str


def code_points(hexcode: str) -> str:
    """The one spelling of a sequence of code points, which all packages write differently."""
    return "-".join(part.lstrip("0") or "0" for part in hexcode.lower().split("-") if part != "fe0f")


def readable(label: str) -> str:
    """A label as one would say it: without its colon, and with a plain apostrophe."""
    plain = label.replace("’", "'").replace(": ", " ")
    described = re.fullmatch(r"(man|woman|person) (bald|beard|\w+ hair)", plain)
    if described is None:
        return plain
    who, what = described.groups()
    return f"bald {who}" if what == "bald" else f"{who} with {what}"


def slug(label: str) -> str:
    """The name of an icon: lower-case words joined by hyphens, without apostrophes."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("'", "")).strip("-")


def read_captions(packages: dict[Package, Path]) -> dict[str, Caption]:
    """Captions by code points, from emojibase if it is among `packages`, else from `emoji`.

    Raises:
        DataError: neither is there, or a file of theirs is missing or damaged.
    """
    if EMOJIBASE in packages:
        return _from_emojibase(packages[EMOJIBASE])
    if NAMES in packages:
        return _from_names(packages[NAMES])
    raise DataError(
        f"captions are missing: they come from {EMOJIBASE.name} {EMOJIBASE.version} of npm or, as names only, "
        f"from pip install {NAMES.name}=={NAMES.version}"
    )


def read_json(file: Path) -> Any:
    """The content of a package's JSON file, or one sentence on why not."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _from_emojibase(root: Path) -> dict[str, Caption]:
    meta = read_json(root / "meta" / "groups.json")
    chinese = {entry["hexcode"]: entry["label"] for entry in read_json(root / "zh" / "data.json")}
    captions = {}
    for entry in read_json(root / "en" / "data.json"):
        captions[code_points(entry["hexcode"])] = Caption(
            text=readable(entry["label"]),
            text_zh=chinese.get(entry["hexcode"], ""),
            tags=tuple(entry.get("tags", ())),
            group=meta["groups"].get(str(entry.get("group")), ""),
            subgroup=meta["subgroups"].get(str(entry.get("subgroup")), ""),
            emoji=entry["emoji"],
            slug=slug(entry["label"]),
        )
    return captions


def _from_names(root: Path) -> dict[str, Caption]:
    chinese = read_json(root / "unicode_codes" / "emoji_zh.json")
    captions: dict[str, Caption] = {}
    for emoji, entry in read_json(root / "unicode_codes" / "emoji.json").items():
        label = entry["en"].strip(":").replace("_", " ")
        caption = Caption(readable(label), chinese.get(emoji, "").strip(":"), (), "", "", emoji, slug(label))
        captions.setdefault(code_points("-".join(f"{ord(sign):x}" for sign in emoji)), caption)
    return captions
