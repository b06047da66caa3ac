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
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the caption template {template!r} is malformed ({error})") from None
    fields = [(name, spec or conversion) for _, name, spec, conversion in parts if name is not None]
    if any(extra or not name.isidentifier() for name, extra in fields):
        raise UserError(f"the caption template {template!r} may name columns only, such as {{text}}")
    return [name for name, _ in fields]


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
    """Every caption of every picture of a set; with ``skip_bad`` pictures without one are removed from it.

    Raises:
        DataError: when a template names a column that no picture has, or pictures (without ``skip_bad``), or all of
            them, have no caption.
    """

    def __init__(self, pictures: PictureSet, templates: Sequence[str]) -> None:
        self._check(pictures, templates)
        self._pictures = pictures
        self.rows = [spoken(record.columns, templates) for record in pictures.records]
        self.dropped: list[str] = []
        self._drop([i for i, row in enumerate(self.rows) if not row], "have no caption by any template", {})

    def _drop(
        self, gone: list[int], why: str, said: Mapping[int, str], *, allowed: bool = False, hint: str = ""
    ) -> None:
        """Remove pictures from the set and remember their names in `dropped`.

        Raises:
            DataError: where that is not allowed, by `allowed` or by ``skip_bad``, or none would be left; the first five
                are named with what is `said` of each.
        """
        if not gone:
            return
        pictures, count, all_of_them = self._pictures, len(self.rows), len(gone) == len(self.rows)
        if all_of_them or not (allowed or pictures.config.skip_bad):
            named = "; ".join(f"{pictures.records[i].key}{said.get(i, '')}" for i in gone[:5])
            more = f"; and {len(gone) - 5} more" if len(gone) > 5 else ""
            remedies = [] if all_of_them else ["--skip-bad, or data.skip_bad=true, leaves them out"]
            ways = "; ".join([*remedies, hint] if hint else remedies)
            where = f"{len(gone)} of {count} pictures in {pictures.config.path!r}"
            raise DataError(f"{where} {why}{f' ({ways})' if ways else ''}: {named}{more}")
        self.dropped += [pictures.records[i].key for i in gone]
        pictures.leave_out(gone)
        removed = set(gone)
        self.rows = [row for i, row in enumerate(self.rows) if i not in removed]

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

    def leave_out(
        self, unreadable: Callable[[str], Sequence[str]], *, pictures_too: bool = False, hint: str = ""
    ) -> list[str]:
        """Remove captions in which something cannot be read; returns them.

        Args:
            unreadable: the words of a text that cannot be read.
            pictures_too: also remove pictures that are left without a caption from their set, as with ``skip_bad``.
            hint: what else would help, for the error.

        Raises:
            DataError: when pictures that must stay, or all, are left without a caption; five are named with the words.
        """
        bad = {text: words for text in sorted(self.texts()) if (words := list(unreadable(text)))}
        kept = [[good for group in row if (good := [t for t in group if t not in bad])] for row in self.rows]
        gone = [i for i, row in enumerate(kept) if not row]
        first = {i: self.rows[i][0][0] for i in gone}
        said = {i: f" ({', '.join(repr(word) for word in bad[text])} of {text!r})" for i, text in first.items()}
        self._drop(gone, "have no caption that the text encoder can read", said, allowed=pictures_too, hint=hint)
        self.rows = [row for row in kept if row]
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
