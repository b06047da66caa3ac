"""What the settings that a picture carries must look like, so that it can be drawn again.

A picture's metadata may have been edited by anyone. They are checked against these types once, before anything is
opened; what is not in the table (the words of the picture itself, notes of later versions) is not looked at.

>>> place = {"sha256": "0"}
>>> settings = {"model": "m", "model_hash": "0", "steps": 2, "sampler": "ddim", "schedule": "leading", "guidance": 1.0,
...             "width": 8, "height": 8, "dtype": "float32", "made_with": {"device": "cpu"},
...             "batch": {"seed": 0, "index": 0, "asked": [{"label": "cat"}]}}
>>> check(settings, "a.png")
>>> check(settings | {"width": "8"}, "a.png")
Traceback (most recent call last):
    ...
sfumato.errors.UserError: the settings of a.png are incomplete or damaged, so the picture cannot be drawn again (width: input should be a valid integer, got '8')
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from sfumato.errors import UserError
from sfumato.systems.config import sentence


def _text_or_number(value: Any) -> Any:
    if value is not None and type(value) not in (str, int):
        raise ValueError("a class is a text or a whole number")
    return value


Side = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Ratios = Annotated[list[float], Field(min_length=2, max_length=2)]
Label = Annotated[Any, AfterValidator(_text_or_number)]


class _Typed(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """Takes numbers as numbers and texts as texts, and no other keys; what is left open is left out, never null."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_null(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in cls.model_fields:
                if name in values and values[name] is None:
                    raise ValueError(f"{name} is null")
        return values


class _Place(_Typed):
    """Where a file was, and its hash."""

    sha256: str
    path: str | None = None


class _Picture(_Place):
    """The original of an edit; the second hash is of its pixels with their transparency, where that was kept."""

    sha256_rgba: str | None = None


class _Opening(_Typed):
    prediction: Literal["eps", "v"] = "eps"
    averaged: bool = False
    vae: _Place | None = None


class _First(_Typed):
    """The first pass of two."""

    width: Side
    height: Side
    strength: float = Field(gt=0, le=1)


class _Edit(_Typed):
    picture: _Picture
    mask: _Place | None = None
    depth: _Place | None = None
    box: Annotated[list[int], Field(min_length=4, max_length=4)] | None = None
    outpaint: Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(min_length=4, max_length=4)] | None = None
    strength: float = Field(gt=0, le=1)
    noise_level: int | None = Field(default=None, ge=0)
    upscale: float | None = None


class _Fast(_Typed):
    level: int = 0
    interval: Ratios | None = None
    guidance_every: int = 1
    cache_every: int = 1
    cache_depth: int = 1
    merge: float = 0.0


class _Asked(_Typed):
    """One picture's words."""

    prompt: str | None = None
    negative: str | None = None
    label: Label = None
    dialect: str | None = None
    clip_skip: int | None = Field(default=None, ge=0)
    towards: str | None = None
    share: float | None = None
    variation: int | None = Field(default=None, ge=0, lt=2**64)
    strength: float | None = None
    layout: list[dict[str, Any]] | None = None
    map: _Place | None = None


class _Batch(_Typed):
    seed: Seed
    index: int = Field(ge=0)
    same_seed: bool = False
    asked: list[_Asked] | None = None
    labels: list[Label] | None = None

    @model_validator(mode="after")
    def _says_what(self) -> _Batch:
        if not (self.asked or self.labels):
            raise ValueError("it says of no picture what was asked")
        return self


class _MadeWith(_Typed, extra="ignore"):
    device: str
    kernel: str | None = None
    convolution: str = "direct"


class _Settings(_Typed, extra="ignore"):
    model: str
    model_hash: str
    steps: int = Field(ge=1, le=10**6)
    sampler: str
    schedule: str
    guidance: Annotated[float, Field(ge=-1e9, le=1e9)]
    width: Side
    height: Side
    dtype: str
    made_with: _MadeWith
    batch: _Batch
    guidance_rescale: float = Field(default=0.0, ge=-1e9, le=1e9)
    guidance_interval: Ratios | None = None
    perp_neg: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    edit: _Edit | None = None
    hires: _First | None = None
    opening: _Opening = _Opening()
    tiled: bool = False
    fast: _Fast | None = None
    backend: str = "torch"
    map: _Place | None = None


def check(settings: Mapping[str, Any], what: str) -> None:
    """Refuse settings of which something is missing, of another type, or out of any range.

    Args:
        settings: as a picture's file holds them.
        what: is named in the message: the file.

    Raises:
        UserError: naming the first entry that is wrong.
    """
    try:
        _Settings.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(
            f"the settings of {what} are incomplete or damaged, so the picture cannot be drawn again "
            f"({sentence(_Settings, error)})"
        ) from None
