"""What one picture is asked to be: the words and labels of a user, before any model has seen them.

>>> Asked(prompt="a red heart").says_anything, Asked(negative="blue").says_anything
(True, False)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from sfumato.conditioners.layout import Box, layout_of, layout_told
from sfumato.conditioners.semantic import ClassMap
from sfumato.errors import UserError

READ_BY = {"text": "prompt", "label": "label", "layout": "layout", "map": "map"}
"""What conditioners read -> the attribute of `Asked` that says it."""


@dataclass(frozen=True)
class Asked:
    """Conditions of one picture.

    Attributes:
        prompt: what to draw.
        negative: what not to draw: guidance leads away from it instead of from nothing.
        label: a class, by name or id.
        layout: labelled boxes.
        map: a class for every pixel.
        dialect: how brackets and weights in the words are read; None for the model's own way.
        clip_skip: how many of the text encoder's last layers are left out; None for the model's own number.
        towards: a second prompt; what is drawn lies on the way from the first to it …
        share: … so far along, 0 to 1.
        variation: a second seed, towards whose noise the picture's own is turned …
        strength: … so far, 0 to 1 (of the angle between both).
    """

    prompt: str | None = None
    negative: str | None = None
    label: str | int | None = None
    dialect: str | None = None
    clip_skip: int | None = None
    towards: str | None = None
    share: float | None = None
    variation: int | None = None
    strength: float | None = None
    layout: tuple[Box, ...] | None = None
    map: ClassMap | None = None

    def __post_init__(self) -> None:
        for name, share in (("share", self.share), ("strength", self.strength)):
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"the {name} of a mixture must lie in [0, 1], got {share}")
        if self.variation is not None and not 0 <= self.variation < 2**64:
            raise UserError(f"a second seed must be at least 0 and below 2^64, got {self.variation}")
        if (self.towards is None) != (self.share is None):
            raise UserError("a second prompt and how far to go towards it belong together")
        if (self.variation is None) != (self.strength is None):
            raise UserError("a second seed and the strength of the variation belong together")
        if self.towards is not None and self.prompt is None:
            raise UserError("a second prompt needs a first one to begin with")

    @property
    def says_anything(self) -> bool:
        """Whether there is something that guidance could lead towards."""
        return bool(self.said())

    def said(self) -> dict[str, Any]:
        """What was said, by what conditioners read ("text", "label", "layout", "map"); without what was left open."""
        said = {what: getattr(self, name) for what, name in READ_BY.items()}
        return {what: value for what, value in said.items() if value is not None}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Asked:
        """From `said`."""
        return cls(**{READ_BY[what]: value for what, value in said.items()})

    def stored(self) -> dict[str, Any]:
        """As JSON: what was said; a map by its path and hash."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.layout is not None:
            said["layout"] = layout_told(self.layout)
        if self.map is not None:
            said["map"] = self.map.stored()
        return {name: value for name, value in said.items() if value is not None}

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Asked:
        """From `stored`, its map found again; a key that is unknown raises `TypeError`."""
        if "layout" in values:
            values = values | {"layout": layout_of(values["layout"])}
        known = {f.name for f in fields(cls)}
        if odd := set(values) - known:
            raise TypeError(f"unknown key {odd.pop()!r}")
        return cls(**values)


_WHOLE = {"count", "seed", "steps", "width", "height", "clip_skip", "variation", "towards_seed", "noise_level"}
_NUMBERS = {
    "guidance", "guidance_rescale", "perp_neg", "variation_strength", "hires", "hires_strength", "strength", "upscale",
}  # fmt: skip
_TEXTS = {"negative", "towards", "schedule", "dialect"}


def check_types(given: Mapping[str, Any]) -> None:
    """Refuse, with a `UserError`, arguments of a type that their names do not take; None is taken by all, and other
    names are left alone.

    >>> check_types({"count": 2, "guidance": 7.5, "schedule": "karras"})
    """
    for name, value in given.items():
        if name == "sampler" and isinstance(value, type):
            raise UserError(f"sampler is the class {value.__name__}; give a solver, {value.__name__}()")
        number = not isinstance(value, bool)
        for names, fits, wanted in (
            ({"sampler"}, isinstance(value, str) or hasattr(value, "step"), "a name or a solver"),
            (_TEXTS, isinstance(value, str), "a text"),
            (_WHOLE, number and isinstance(value, Integral), "a whole number"),
            (_NUMBERS, number and isinstance(value, Real), "a number"),
        ):
            if name in names and value is not None and not fits:
                raise UserError(f"{name} must be {wanted}, got {value!r}")
