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


def names() -> list[str]:
    """Names of the models that come with the package; none in an installation without weights."""
    if not _FOLDER.is_dir():
        return []
    return sorted(p.name for p in _FOLDER.iterdir() if (p / "model.safetensors").is_file())


def drawing() -> list[str]:
    """Names of those that draw pictures: no judges."""
    return [name for name in names() if name != "clip-emoji"]


def weights(name: str) -> Path:
    """The model file of that name. Unknown names raise `UserError` with the nearest."""
    if name not in names():
        raise_unknown("model", name, names())
    return _FOLDER / name / "model.safetensors"


def card(name: str) -> str:
    """What is to be known of a model: data, licence, the command that made it, its figures (Markdown)."""
    return (weights(name).parent / "card.md").read_text(encoding="utf-8")
