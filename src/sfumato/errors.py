"""The one kind of error that is the user's to mend.

A `UserError` carries a single sentence: what was wrong, where, what was expected and the nearest right name.
The command line prints that sentence and exits with code 2; in Python it is a `ValueError`.

>>> raise_unknown("sampler", "ddmi", ["ddim", "ddpm", "euler"])
Traceback (most recent call last):
    ...
sfumato.errors.UserError: unknown sampler 'ddmi' (did you mean 'ddim'?); known: ddim, ddpm, euler
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """Something the caller asked for cannot be done; the message says what, where and what would work."""


class ModelFileError(UserError):
    """A model file is missing, damaged, foreign or does not fit its own config."""


class DataError(UserError):
    """A data set is missing, empty, or holds a picture that cannot be used."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``choices``, or ``""`` when none is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    folded = name.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=5, cutoff=0.6)
    swapped = [choice for choice in close if sorted(choice) == sorted(folded)]  # the commonest slip of the fingers
    best = next(iter(swapped or close), None)
    return f" (did you mean {by_folded[best]!r}?)" if best is not None else ""


def raise_unknown(kind: str, name: str, choices: Iterable[str]) -> NoReturn:
    """Raise the standard sentence for an unknown ``name`` of some ``kind`` (a sampler, a recipe, a label …)."""
    known = list(choices)
    raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
