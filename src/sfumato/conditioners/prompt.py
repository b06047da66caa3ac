r"""The grammar of prompts: a text to fragments with weights, as three programs read it, or as it stands.

| dialect | louder | quieter | number | signs themselves | new window |
|---|---|---|---|---|---|
| `a1111` | `(x)` 1.1, `((x))` 1.21 | `[x]` 1/1.1 | `(x:1.3)`, multiplies | `\(` `\)` `\[` `\]` `\\` | `BREAK` |
| `comfy` | `(x)` 1.1, `((x))` 1.21 | | `(x:1.3)`, replaces | `\(` `\)` | |
| `compel` | `x+` `(x y)++`, 1.1 each | `x-` `(x y)--`, 0.9 each | `(x y)1.3`, multiplies | `\(` `\)` `\"` | |
| `plain` | | | | all | |

They are those of AUTOMATIC1111's web UI, ComfyUI and compel (InvokeAI). What a weight does to the text encoder's states
stands in `weighting.py`, where windows begin in `chunks.py`. What the programs do with `<lora:…>`, `AND`, `[a:b:0.5]`,
`[a|b]`, `embedding:…`, `<my-style>`, `{a|b}`, `__colour__`, `.blend()`, `.and()` and `.swap()` is refused and never
read as words; `plain` has no grammar.

>>> parse("a (red:1.3) hat", "a1111")
[Fragment(text='a ', weight=1.0), Fragment(text='red', weight=1.3), Fragment(text=' hat', weight=1.0)]
>>> parse("a red++ (old hat)0.5", "compel")
[Fragment(text='a', weight=1.0), Fragment(text='red', weight=1.2100000000000002), Fragment(text='old hat', weight=0.5)]
>>> parse("a <lora:hat:1>", "a1111")
Traceback (most recent call last):
    ...
sfumato.errors.UserError: the prompt asks for '<lora:hat:1>', and LoRA is not supported: take it out
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from sfumato.errors import UserError, raise_unknown

DIALECTS = ("a1111", "comfy", "compel", "plain")
UP, DOWN = 1.1, 1 / 1.1  # of one bracket in A1111 and ComfyUI
PLUS, MINUS = 1.1, 0.9  # of one sign in compel
DEEPEST = 64  # brackets in brackets


class Fragment(NamedTuple):
    """A piece of a prompt and its weight, a finite number (1 leaves it as it is)."""

    text: str
    weight: float = 1.0


BREAK = Fragment("BREAK", math.inf)
"""Stands between two fragments where a new window begins; nobody can write its weight."""


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Attributes:
        dialect: one of `DIALECTS`.
        comma_backtrack: in the dialect a1111, how many tokens after a comma move to the next window where a window
            ends between them (0 to 75); None for that program's own default, 20.
        max_windows: the longest prompt, in windows; None for no limit. Longer ones are refused, nothing is cut off.
    """

    dialect: str = "a1111"
    comma_backtrack: int | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise_unknown("prompt dialect", self.dialect, DIALECTS)
        back, most = self.comma_backtrack, self.max_windows
        if back is not None and self.dialect != "a1111":
            raise UserError(f"comma_backtrack belongs to the prompt dialect a1111, not to {self.dialect}")
        if back is not None and (isinstance(back, bool) or not isinstance(back, int) or not 0 <= back <= 75):
            raise UserError(f"comma_backtrack must be a whole number from 0 to 75, got {back!r}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise UserError(f"max_windows must be a whole number of 1 or more, got {most!r}")

    @property
    def backtrack(self) -> int:
        """`comma_backtrack` with its default."""
        return self.comma_backtrack if self.comma_backtrack is not None else 20 * (self.dialect == "a1111")


def parse(text: str, dialect: str = "a1111") -> list[Fragment]:
    r"""Fragments with weights, in order; `BREAK` between windows (a1111 only). The empty text gives no fragment.

    Brackets that do not match are no error in any of the programs, and are read as each of them does:

    - a1111: a bracket still open at the end closes there (`(a` is `(a)`); one that closes nothing is a sign (`a)`).
      A backslash before another letter than `()[]\` vanishes.
    - comfy: both are signs, and after a `)` too many the next `(` is a sign as well.
    - compel: the word with the bracket is read as it stands, up to the next space (`(a b` is `(a`, `b`).

    Raises:
        UserError: for an unknown dialect, for what is refused, for weights that are not finite numbers, and for more
            than 64 brackets in brackets.
    """
    if dialect not in DIALECTS:
        raise_unknown("prompt dialect", dialect, DIALECTS)
    if dialect != "plain":
        _refuse(text, dialect)
    fragments = _PARSERS[dialect](text)
    for fragment in fragments:
        if not math.isfinite(fragment.weight) and fragment is not BREAK:
            raise UserError(f"the weight of {_short(fragment.text)} in the prompt is not a finite number")
    return [fragment for fragment in fragments if fragment.text]


def write(fragments: Sequence[Fragment], dialect: str = "a1111") -> str:
    """A prompt that `parse` reads as exactly these fragments.

    Raises:
        UserError: where the dialect has no way to write them (neighbours of one weight, a "+" in compel, …).
    """
    if dialect not in DIALECTS:
        raise_unknown("prompt dialect", dialect, DIALECTS)
    parts = [_WRITERS[dialect](fragment) for fragment in fragments]
    text = (" " if dialect == "compel" else "").join(parts)
    try:
        same = parse(text, dialect) == list(fragments)
    except UserError:
        same = False
    if not same:
        raise UserError(f"these fragments cannot be written in the prompt dialect {dialect}")
    return text


def _number(weight: float) -> str:
    """All digits, without an exponent."""
    return format(Decimal(repr(float(weight))), "f")


def _write_a1111(fragment: Fragment) -> str:
    if fragment == BREAK:
        return " BREAK "
    text = re.sub(r"([()\[\]\\])", r"\\\1", fragment.text)
    return text if fragment.weight == 1 else f"({text}:{_number(fragment.weight)})"


def _write_comfy(fragment: Fragment) -> str:
    text = re.sub(r"([()])", r"\\\1", fragment.text)
    return text if fragment.weight == 1 else f"({text}:{_number(fragment.weight)})"


def _write_compel(fragment: Fragment) -> str:
    text = re.sub(r'([()"])', r"\\\1", fragment.text)
    return text if fragment.weight == 1 else f"({text}){_number(fragment.weight)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


# --- what is refused ----------------------------------------------------------------------------------------------

_NETWORK = re.compile(r"<(\w+):[^>]+>")
_AND = re.compile(r"\bAND\b")
_WHEN = re.compile(r":\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*$")
_INNER = re.compile(r"\([^()\[\]]*\)|\[[^()\[\]]*\]")
_EMBEDDING = re.compile(r"(?:^|[ \n(,])embedding:[^\s,)]+")
_LEARNED = re.compile(r"<[A-Za-z][\w-]*>")
_CHOICE = re.compile(r"\{[^{}|]*\|[^{}]*\}|(?<!\w)__[A-Za-z0-9*][\w/.*-]*?__(?!\w)")
_OPERATOR = re.compile(r"\.swap\s*\(|\)\s*\.(?:blend|and|add)\s*\(|(?:useLora|withLora)\s*\(")


def _refuse(text: str, dialect: str) -> None:
    """`UserError` for grammar that is not supported, in one sentence each."""
    signs = r"\[ and \]" if dialect == "a1111" else "the dialect plain"
    if found := _NETWORK.search(text):
        what = "LoRA" if found[1].lower() in ("lora", "lyco") else "such a network"
        raise UserError(f"the prompt asks for {_short(found[0])}, and {what} is not supported: take it out")
    if _AND.search(text):
        raise UserError(
            "the prompt joins several prompts with AND, which is not supported: write one prompt, or the word 'and' in "
            "small letters"
        )
    for content in _square_brackets(text):
        if "|" in content[1]:
            raise UserError(
                f"the prompt swaps words at every step ({_short(content[0])}), which is not supported: write one of "
                f"them, or use {signs} for the signs themselves"
            )
        if _WHEN.search(content[1]):
            raise UserError(
                f"the prompt changes words while drawing ({_short(content[0])}), which is not supported: write one of "
                f"them, or use {signs} for the signs themselves"
            )
    if found := _CHOICE.search(text):
        raise UserError(
            f"the prompt leaves words to chance ({_short(found[0])}), which is not supported: write one of them, or "
            "read the signs themselves with --dialect plain"
        )
    if (dialect != "compel" and (found := _EMBEDDING.search(text))) or (found := _LEARNED.search(text)):
        name = _short(found[0].strip(" (,\n"))
        raise UserError(
            f"the prompt asks for {name}, and textual inversion is not supported: take it out, or read the signs "
            "themselves with --dialect plain"
        )
    if dialect == "compel" and (found := _OPERATOR.search(text)):
        name = found[0].strip(" ()").strip()
        raise UserError(f"the prompt uses compel's {name}(), which is not supported: write one prompt")


def _square_brackets(text: str) -> Iterator[tuple[str, str]]:
    """Every `[…]`: as written, and its content without escaped signs and without the brackets inside it."""
    opened: list[int] = []
    bare = re.sub(r"\\[()\[\]\\|:]", "  ", text)
    for i, letter in enumerate(bare):
        if letter == "[":
            opened.append(i)
        elif letter == "]" and opened:
            start = opened.pop()
            content, count = bare[start + 1 : i], 1
            while count:
                content, count = _INNER.subn("", content)
            yield text[start : i + 1], content


def _check_depth(text: str) -> None:
    """`UserError` for brackets nested too deep to be meant."""
    depth = 0
    for letter in text:
        depth = max(depth + (letter == "(") - (letter == ")"), 0)
        if depth > DEEPEST:
            raise UserError(f"the prompt nests more than {DEEPEST} brackets")


# --- AUTOMATIC1111's web UI ---------------------------------------------------------------------------------------

_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_A1111_WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*\)")
_A1111_TEXT = re.compile(r"[^\\()\[\]:]+")


def _parse_a1111(text: str) -> list[Fragment]:
    """One pass; a bracket multiplies all fragments since it opened when it closes (`parse_prompt_attention`)."""
    found: list[list[str | float]] = []
    opened: dict[str, list[int]] = {")": [], "]": []}
    breaks: set[int] = set()

    def close(start: int, factor: float) -> None:
        for entry in found[start:]:
            entry[1] = float(entry[1]) * factor

    i = 0
    while i < len(text):
        letter = text[i]
        weight = _A1111_WEIGHT.match(text, i)
        run = _A1111_TEXT.match(text, i)
        taken = run[0] if run else weight[0] if weight else letter
        if letter == "\\":
            taken = text[i : i + 2] if text[i + 1 : i + 2] in tuple("()[]\\") else letter
            found.append([taken[1:], 1.0])
        elif letter in "([":
            opened[")" if letter == "(" else "]"].append(len(found))
        elif weight and opened[")"]:
            close(opened[")"].pop(), _a1111_number(weight[1], text))
        elif letter in ")]" and opened[letter]:
            close(opened[letter].pop(), UP if letter == ")" else DOWN)
        else:
            for n, piece in enumerate(_BREAK.split(taken)):
                if n:
                    breaks.add(len(found))
                    found.append(["", 1.0])
                found.append([piece, 1.0])
        i += len(taken)
    for letter, factor in ((")", UP), ("]", DOWN)):
        for start in opened[letter]:
            close(start, factor)
    return _merged(found, breaks)


def _a1111_number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise UserError(f"{digits!r} in the prompt {_short(text)} is not a weight") from None


def _merged(found: list[list[str | float]], breaks: set[int]) -> list[Fragment]:
    """Neighbours of the same weight in one, so that they are turned into tokens together."""
    merged: list[Fragment] = []
    for i, (piece, weight) in enumerate(found):
        if i in breaks:
            merged.append(BREAK)
        elif merged and merged[-1] is not BREAK and merged[-1].weight == weight:
            merged[-1] = Fragment(merged[-1].text + str(piece), merged[-1].weight)
        else:
            merged.append(Fragment(str(piece), float(weight)))
    return merged


# --- ComfyUI ------------------------------------------------------------------------------------------------------


def _parse_comfy(text: str) -> list[Fragment]:
    """A number replaces the weight of the brackets around it; fragments are never joined (`token_weights`)."""
    _check_depth(text)
    return [Fragment(piece.replace(r"\)", ")").replace(r"\(", "("), weight) for piece, weight in _comfy(text, 1.0)]


def _comfy(text: str, outer: float) -> Iterator[tuple[str, float]]:
    for part in _comfy_parts(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")" or part[-2] == "\\":
            yield part, outer
            continue
        inner, weight = part[1:-1], outer * UP
        colon = inner.rfind(":")
        if colon > 0:
            try:
                inner, weight = inner[:colon], float(inner[colon + 1 :])
            except ValueError:
                pass  # a colon in the words
        yield from _comfy(inner, weight)


def _comfy_parts(text: str) -> list[str]:
    """Cut before a `(` at count 0 and behind the `)` that brings the count back to 0; it may be negative."""
    parts: list[str] = []
    start = depth = 0
    for i, letter in enumerate(text):
        if i and text[i - 1] == "\\":
            continue
        if letter == "(":
            if depth == 0:
                parts.append(text[start:i])
                start = i
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : i + 1])
                start = i + 1
    return [part for part in (*parts, text[start:]) if part]


# --- compel -------------------------------------------------------------------------------------------------------

_SYNTAX = '()",.+-='
_SPACE = " \t\n\r\x0b\x0c"
_QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
_SIGNS = re.compile(r"(\++)|(-+)|([+-]?(?:\d+\.\d*|\.\d+)|-?\d+)")
_ATTEND = re.compile(rf"\s*\.attend\s*\(\s*(?:{_SIGNS.pattern})\s*\)")

Leaf = tuple[str, tuple[float, ...]]  # words, and the factors around them, outermost first
Found = tuple[list[Leaf], int] | None  # what a rule read and where it ended


def _parse_compel(text: str) -> list[Fragment]:
    """Words of one weight are joined by a space, in whatever brackets they stood; a comma ends a word."""
    _check_depth(text)
    fragments: list[Fragment] = []
    for words, factors in _Compel(re.sub(r",(\S)", r", \1", text)).prompt():
        weight = math.prod(factors, start=1.0)
        words = re.sub(r'\\+([()"])', r"\1", words)
        if fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(f"{fragments[-1].text} {words}", weight)
        else:
            fragments.append(Fragment(words, weight))
    return fragments


class _Compel:
    """compel 2's grammar of weights: ordered choice, each rule tried at most once at each place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.known: dict[tuple[str, int], Found] = {}

    def prompt(self) -> Iterator[Leaf]:
        """The whole text: what has weights or brackets by the rules, the rest word by word as it stands."""
        i = self._skip(0)
        while i < len(self.text):
            found = self._first(("attention", "quoted", "group"), i)
            if found is None:
                end = next((n for n in range(i, len(self.text)) if self.text[n] in _SPACE), len(self.text))
                found = [(self.text[i:end], ())], end
            yield from found[0]
            i = self._skip(found[1])

    def fragments(self, i: int) -> tuple[list[Leaf], int]:
        """What may stand in brackets or quotes: no `+`, `-`, `=` or quote that is not grammar."""
        leaves: list[Leaf] = []
        while True:
            i = self._skip(i)
            found = self._first(("attention", "group", "quoted", "word"), i)
            if found is None and self.text[i : i + 1] in (",", "."):
                found = [(self.text[i], ())], i + 1
            if found is None:
                return leaves, i
            leaves += found[0]
            i = found[1]

    def _skip(self, i: int) -> int:
        while i < len(self.text) and self.text[i] in _SPACE:
            i += 1
        return i

    def _first(self, rules: Sequence[str], i: int) -> Found:
        return next((found for found in (self._rule(rule, i) for rule in rules) if found is not None), None)

    def _rule(self, rule: str, i: int) -> Found:
        if (rule, i) not in self.known:
            read: Callable[[int], Found] = getattr(self, f"_{rule}")
            self.known[rule, i] = read(i)
        return self.known[rule, i]

    def _word(self, i: int) -> Found:
        start, text = i, self.text
        while i < len(text):
            letter, after = text[i], text[i + 1 : i + 2]
            if letter == "\\" and after and after in _SYNTAX:
                i += 2
            elif letter in "+-" and after and after not in _SYNTAX + _SPACE:
                i += 1
            elif letter in _SYNTAX + _SPACE:
                break
            else:
                i += 1
        return ([(text[start:i], ())], i) if i > start else None

    def _quoted(self, i: int) -> Found:
        quoted = _QUOTED.match(self.text, i)
        if quoted is None:
            return None
        content = re.sub(r"\\[tnfr]", " ", quoted[1])
        if not content.strip():
            return [("", ())], quoted.end()
        inner = _Compel(content)
        leaves, end = inner.fragments(0)
        return (leaves, quoted.end()) if end == len(content) else None

    def _group(self, i: int) -> Found:
        if self.text[i : i + 1] != "(":
            return None
        leaves, i = self.fragments(i + 1)
        return (leaves, i + 1) if self.text[i : i + 1] == ")" else None

    def _attention(self, i: int) -> Found:
        bracketed, word = self._first(("quoted", "group"), i), self._rule("word", i)
        target = bracketed or word
        if target is not None and (explicit := _ATTEND.match(self.text, target[1])):
            return _weighted(target[0], explicit), explicit.end()
        if bracketed is not None and (signs := _SIGNS.match(self.text, bracketed[1])):
            return _weighted(bracketed[0], signs), signs.end()
        if word is not None and (signs := _SIGNS.match(self.text, word[1])) and not signs[3]:
            return _weighted(word[0], signs), signs.end()
        return None


def _weighted(leaves: list[Leaf], signs: re.Match[str]) -> list[Leaf]:
    plus, minus, number = signs.groups()
    weight = PLUS ** len(plus) if plus else MINUS ** len(minus) if minus else float(number)
    return [(words, (weight, *factors)) for words, factors in leaves]


_PARSERS: dict[str, Callable[[str], list[Fragment]]] = {
    "a1111": _parse_a1111,
    "comfy": _parse_comfy,
    "compel": _parse_compel,
    "plain": lambda text: [Fragment(text)],
}
_WRITERS: dict[str, Callable[[Fragment], str]] = {
    "a1111": _write_a1111,
    "comfy": _write_comfy,
    "compel": _write_compel,
    "plain": lambda fragment: fragment.text,
}
