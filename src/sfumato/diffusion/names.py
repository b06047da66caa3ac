"""What things are called: one table of the names that other programs have for ours, compared folded.

>>> names = Names("sampler")
>>> names.add("dpmpp_2m", "DPM++ 2M", "k_dpmpp_2m")
>>> names.find(fold("dpm++ 2M")), names.find("heun")
('dpmpp_2m', None)
"""

from __future__ import annotations

import re
from collections.abc import Callable


def fold(name: str) -> str:
    """How names are compared: lower case, `++` as pp, without spaces and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.casefold().replace("++", "pp"))


class Names:
    """A table of folded names.

    Args:
        what: is named, for messages: "sampler".
        folding: how a name is folded.
    """

    def __init__(self, what: str, folding: Callable[[str], str] = fold) -> None:
        self.what, self._fold = what, folding
        self._canonical: dict[str, str] = {}

    def add(self, name: str, *others: str) -> None:
        """Make `name` known under itself and `others`. One that is taken raises `ValueError`."""
        for folded in {self._fold(other) for other in (name, *others)}:
            if self._canonical.setdefault(folded, name) != name:
                raise ValueError(f"{self.what} name {folded!r} belongs to {self._canonical[folded]!r} already")

    def find(self, *folded: str) -> str | None:
        """The canonical name of the first of these folded names that is known, None where none is."""
        return next((self._canonical[name] for name in folded if name in self._canonical), None)

    def longest_first(self) -> list[tuple[str, str]]:
        """Every folded name with its canonical name, longest first: what a longer name may end in."""
        return sorted(self._canonical.items(), key=lambda pair: -len(pair[0]))
