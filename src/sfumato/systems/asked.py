"""What one picture is asked to be: the words and labels of a user, before any model has seen them.

>>> Asked(prompt="a red heart").says_anything, Asked(negative="blue").says_anything
(True, False)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Asked:
    """Conditions of one picture.

    Attributes:
        prompt: what to draw.
        negative: what not to draw: guidance leads away from it instead of from nothing.
        label: a class, by name or id.
    """

    prompt: str | None = None
    negative: str | None = None
    label: str | int | None = None

    @property
    def says_anything(self) -> bool:
        """Whether there is something that guidance could lead towards."""
        return self.prompt is not None or self.label is not None

    def stored(self) -> dict[str, Any]:
        """As JSON: what was said."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Asked:
        """From `stored`; a key that is unknown raises `TypeError`."""
        known = {f.name for f in fields(cls)}
        if odd := set(values) - known:
            raise TypeError(f"unknown key {odd.pop()!r}")
        return cls(**values)
