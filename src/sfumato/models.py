"""The models in the box: small, trained here, each with its card and the curve of its training.

>>> all(weights(name).is_file() for name in names())
True
"""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import raise_unknown

_FOLDER = Path(__file__).parent / "box"

BEST = "emoji"
"""What is used when no model is named."""

ENLARGES, BY = "emoji-upscale", 2
"""What is used instead where a picture is only to be made larger by so much."""


def names() -> list[str]:
    """Names of the models that come with the package; none in an installation without weights."""
    if not _FOLDER.is_dir():
        return []
    return sorted(p.name for p in _FOLDER.iterdir() if (p / "model.safetensors").is_file())


def drawing() -> list[str]:
    """Names of those that draw new pictures: no judges, and none that enlarges."""
    return [name for name in names() if name not in ("clip-emoji", ENLARGES)]


def weights(name: str) -> Path:
    """The model file of that name. Unknown names raise `UserError` with the nearest."""
    if name not in names():
        raise_unknown("model", name, names())
    return _FOLDER / name / "model.safetensors"


def card(name: str) -> str:
    """What is to be known of a model: data, licence, the command that made it, its figures (Markdown)."""
    return (weights(name).parent / "card.md").read_text(encoding="utf-8")
