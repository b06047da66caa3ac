"""Numbers on the command line, and what is said when one is wrong.

>>> whole(1)("12"), number(0)("1.5")
(12, 1.5)
>>> seed_number("3")
3
>>> whole(1)("banana")  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
    ...
typer.BadParameter: 'banana' is not a whole number
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import typer

Number = TypeVar("Number", int, float)


def whole(least: int) -> Callable[[str | int], int]:
    """A parser of whole numbers of at least `least`; anything else is a `typer.BadParameter`."""

    def parse(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r:.60} is not a whole number") from None
        return _at_least(value, least)

    return parse


def seed_number(text: str | int) -> int:
    """A parser of seeds: whole numbers from 0, below 2^63; anything else is a `typer.BadParameter`."""
    value = whole(0)(text)
    if value >= 2**63:
        raise typer.BadParameter(f"a seed must be at least 0 and below 2^63, got {value}")
    return value


def first_seed_number(text: str | int) -> int:
    """As `seed_number`, for the seed that is drawn where none is given: other programs write -1 for that."""
    if str(text).strip() == "-1":
        raise typer.BadParameter("must be at least 0, got -1; leave --seed out for a random one")
    return seed_number(text)


def number(least: float) -> Callable[[str | float], float]:
    """A parser of finite numbers of at least `least`; anything else is a `typer.BadParameter`."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise typer.BadParameter(f"must be finite, got {text}")
        return _at_least(value, least)

    return parse


def _at_least(value: Number, least: float) -> Number:
    if value < least:
        raise typer.BadParameter(f"must be at least {least}, got {value}")
    return value
