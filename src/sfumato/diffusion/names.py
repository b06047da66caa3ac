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


def _place(made: object) -> tuple[str, str] | None:
    """Where a class or function was defined; None for what has no name of its own."""
    name = getattr(made, "__qualname__", None)
    return None if name is None else (str(getattr(made, "__module__", "")), str(name))


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
        """Make `name` known under itself and `others`, and no longer under what it was before.

        Raises:
            ValueError: for one that is taken; nothing has changed then.
        """
        wanted = dict.fromkeys((self._fold(other) for other in (name, *others)), name)
        kept = {folded: known for folded, known in self._canonical.items() if known != name}
        if taken := sorted(wanted.keys() & kept.keys()):
            raise ValueError(f"{self.what} name {taken[0]!r} belongs to {kept[taken[0]]!r} already")
        self._canonical = kept | wanted

    def check_free(self, name: str, known: object, new: object) -> None:
        """Refuse to give `name`, which `known` has, to anything but the same class or function defined anew.

        Raises:
            ValueError: where its module and name are others.
        """
        if known is not new and (_place(known) is None or _place(known) != _place(new)):
            raise ValueError(f"{self.what} name {name!r} belongs to {getattr(known, '__name__', known)} already")

    def find(self, *folded: str) -> str | None:
        """The canonical name of the first of these folded names that is known, None where none is."""
        return next((self._canonical[name] for name in folded if name in self._canonical), None)

    def longest_first(self) -> list[tuple[str, str]]:
        """Every folded name with its canonical name, longest first: what a longer name may end in."""
        return sorted(self._canonical.items(), key=lambda pair: -len(pair[0]))
