"""Tokens of a prompt to windows: where a text encoder of 77 positions begins anew, as four programs do it.

A window holds up to 75 tokens between its two marks. `plain` fills every window; the others try not to cut what
belongs together:

- a1111: a window that is full moves the tokens behind its last comma to the next one, if they are few (20); `BREAK`
  begins a new window (AUTOMATIC1111's web UI, "comma padding").
- comfy: a fragment of fewer than 8 tokens is never cut (ComfyUI).
- compel: a window ends behind its last full stop, or else its last `,` `;` `:`, or else its last whole word (compel's
  `SENTENCES`; that program cuts long prompts off unless told not to, here nothing is cut off).

>>> commas = [Token(i, piece=",</w>" if i == 9 else "a</w>") for i in (1, 2, 9, 3, 4)]
>>> [[t.id for t in window] for window in split("a1111", [commas], size=4, backtrack=2)]
[[1, 2, 9], [3, 4]]
>>> [[t.id for t in window] for window in split("plain", [commas], size=4)]
[[1, 2, 9, 3], [4]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

Group = Sequence["Token"]


class Token(NamedTuple):
    """One token of a prompt.

    Attributes:
        id: in the vocabulary.
        weight: of its fragment.
        fragment: the number of its fragment in the prompt.
        piece: the vocabulary's spelling; `</w>` ends a word.
        span: where it stands in its fragment, from and to (tokens that share a letter have the same).
    """

    id: int
    weight: float = 1.0
    fragment: int = 0
    piece: str = ""
    span: tuple[int, int] = (0, 0)


def split(dialect: str, groups: Sequence[Group | None], *, size: int = 75, backtrack: int = 0) -> list[list[Token]]:
    """Windows of at most `size` tokens, at least one; together they are all tokens in order.

    Args:
        dialect: "a1111", "comfy", "compel" or "plain".
        groups: the tokens of every fragment; None where a new window begins (a1111).
        size: of a window, without its marks.
        backtrack: a1111: how many tokens behind a comma may move; 0 for none.
    """
    if dialect == "a1111":
        return _a1111(groups, size, backtrack)
    whole = [list(group) for group in groups if group is not None]
    if dialect == "comfy":
        return _comfy(whole, size)
    tokens = [token for group in whole for token in group]
    return _at_ends(tokens, size) if dialect == "compel" else _full(tokens, size)


def _full(tokens: list[Token], size: int) -> list[list[Token]]:
    return [tokens[i : i + size] for i in range(0, max(len(tokens), 1), size)]


def _a1111(groups: Sequence[Group | None], size: int, backtrack: int) -> list[list[Token]]:
    done: list[list[Token]] = []
    window: list[Token] = []
    comma: int | None = None  # the place of this window's last comma
    for group in groups:
        if group is None:
            done.append(window)
            window, comma = [], None
            continue
        for token in group:
            if token.piece == ",</w>":
                comma = len(window)
            elif len(window) == size and comma is not None and size - comma <= backtrack:
                done.append(window[: comma + 1])
                window, comma = window[comma + 1 :], None
            if len(window) == size:
                done.append(window)
                window, comma = [], None
            window.append(token)
    return [*done, window] if window or not done else done


def _comfy(groups: list[list[Token]], size: int, whole: int = 8) -> list[list[Token]]:
    windows: list[list[Token]] = [[]]
    for group in groups:
        may_cut, rest = len(group) >= whole or len(group) > size, group
        while rest:
            room = size - len(windows[-1])
            if len(rest) <= room:
                windows[-1] += rest
                break
            if may_cut:
                windows[-1] += rest[:room]
                rest = rest[room:]
            windows.append([])
    return windows


def _at_ends(tokens: list[Token], size: int) -> list[list[Token]]:
    ends: tuple[Callable[[str], bool], ...] = (
        lambda piece: piece == ".</w>",
        lambda piece: piece in (".</w>", ",</w>", ";</w>", ":</w>"),
        lambda piece: piece.endswith("</w>"),
    )
    windows: list[list[Token]] = []
    while len(tokens) > size:
        places = [[i for i in range(size) if ends_here(tokens[i].piece)] for ends_here in ends]
        cut = next((found[-1] + 1 for found in places if found), size)
        windows.append(tokens[:cut])
        tokens = tokens[cut:]
    return [*windows, tokens] if tokens or not windows else windows
