"""Captions of a picture, as many as its columns allow: templates such as "{text}, {style} style".

>>> row = {"text": "red heart", "style": "noto", "tags": ["love", "emotion"]}
>>> spoken(row, ["{text}, {style} style", "{tags}", "a {colour} {text}"])
[['red heart, noto style'], ['love', 'emotion']]
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sfumato.errors import DataError, UserError, nearest
from sfumato.training.data import PictureSet


def columns_of(template: str) -> list[str]:
    """The columns that a template names. Raises `UserError` for one that is malformed."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"the caption template {template!r} is malformed ({error})") from None
    if not all(name.isidentifier() for name in names):
        raise UserError(f"the caption template {template!r} may name columns only, such as {{text}}")
    return names


def spoken(row: Mapping[str, Any], templates: Sequence[str]) -> list[list[str]]:
    """For each template that a row can fill, its captions: one for each entry of a column that is a list.

    A template whose column is missing or empty in this row is left out.
    """
    found = []
    for template in templates:
        names = dict.fromkeys(columns_of(template))
        values = {name: _entries(row.get(name)) for name in names}
        if all(values.values()):
            found.append(_filled(template, values))
    return found


def _entries(value: Any) -> list[str]:
    entries = value if isinstance(value, list | tuple) else [value]
    return [str(entry).strip() for entry in entries if entry is not None and str(entry).strip()]


def _filled(template: str, values: Mapping[str, list[str]]) -> list[str]:
    """All fillings with one list running; others, if there are several, stay at their first entry."""
    longest = max(values, key=lambda name: len(values[name]), default=None)
    first = {name: entries[0] for name, entries in values.items()}
    if longest is None:
        return [template]
    return [template.format_map(first | {longest: entry}) for entry in values[longest]]


class Captions:
    """Every caption of every picture of a set.

    Raises:
        DataError: when a template names a column that no picture has, or a picture is left without a caption.
    """

    def __init__(self, pictures: PictureSet, templates: Sequence[str]) -> None:
        self._check(pictures, templates)
        self._pictures = pictures
        self.rows = [spoken(record.columns, templates) for record in pictures.records]
        for record, row in zip(pictures.records, self.rows, strict=True):
            if not row:
                raise DataError(f"{record.key} in {pictures.config.path!r} has no caption by any template")

    @staticmethod
    def _check(pictures: PictureSet, templates: Sequence[str]) -> None:
        known = sorted({column for record in pictures.records for column in record.columns})
        for template in templates:
            for name in columns_of(template):
                if name not in known:
                    raise DataError(
                        f"the caption template {template!r} names the column {name!r}, which is not in "
                        f"{pictures.config.path!r}{nearest(name, known)}; columns: {', '.join(known) or 'none'}"
                    )

    def leave_out(self, unreadable: Callable[[str], Sequence[str]]) -> list[str]:
        """Remove captions in which something cannot be read; returns them.

        Args:
            unreadable: the words of a text that cannot be read.

        Raises:
            DataError: when a picture is left without a caption, naming the words.
        """
        bad = {text: words for text in sorted(self.texts()) if (words := list(unreadable(text)))}
        for record, row in zip(self._pictures.records, self.rows, strict=True):
            row[:] = [good for group in row if (good := [text for text in group if text not in bad])]
            if not row:
                first, words = next(iter(bad.items()))
                raise DataError(
                    f"{record.key} in {self._pictures.config.path!r} has no caption that the text encoder can read; "
                    f"of {first!r}, for one, not: {', '.join(words)}"
                )
        return list(bad)

    def texts(self) -> set[str]:
        """All of them."""
        return {text for row in self.rows for group in row for text in group}

    def first(self, index: int) -> str:
        """The caption by the first template that fits: what validation and samples take."""
        return self.rows[index][0][0]

    def drawn(self, indices: Sequence[int], generator: torch.Generator) -> list[str]:
        """One caption for each picture: a template at random, then one of its fillings."""
        numbers = torch.rand((len(indices), 2), generator=generator).tolist()
        texts = []
        for index, (u, v) in zip(indices, numbers, strict=True):
            row = self.rows[index]
            group = row[int(u * len(row))]
            texts.append(group[int(v * len(group))])
        return texts
