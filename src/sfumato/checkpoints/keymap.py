"""Names of another program's weights as one table that is read in both directions.

Each `Rule` pairs a name of theirs with one of ours, or with several where they keep in one tensor what we keep in
three. A name may hold fields, which stand for the same text on both sides: `{n}` a whole number, `{p}` a part without
dots, `{rest}` anything. Loading reads the table from left to right, saving from right to left, so that what was loaded
is saved as it was.

>>> table = KeyMap([Rule("out.0.{p}", "norm.{p}"), Rule("in_proj_{p}", ("q.{p}", "k.{p}", "v.{p}"), THIRDS)])
>>> ours, unmatched = table.to_ours({"out.0.bias": torch.ones(2), "in_proj_bias": torch.arange(6), "x": torch.ones(1)})
>>> list(ours), ours["k.bias"].tolist(), unmatched
(['norm.bias', 'q.bias', 'k.bias', 'v.bias'], [2, 3], ['x'])
>>> theirs, unmatched = table.to_theirs(ours)
>>> list(theirs), theirs["in_proj_bias"].tolist(), unmatched
(['out.0.bias', 'in_proj_bias'], [0, 1, 2, 3, 4, 5], [])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from string import Formatter

import torch
from torch import Tensor

from sfumato.errors import ModelFileError, nearest

FIELDS = {"n": r"\d+", "p": r"[^.]+", "rest": r".+"}
"""What each field of a name stands for, as a regular expression."""
NAMED = 10
"""How many names a refusal lists."""


# --- rules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Via:
    """How the values of a rule are carried over, exactly and in both directions.

    Attributes:
        to_ours: their tensor -> ours, as many as the rule has names of ours.
        to_theirs: ours in the order of the rule -> their tensor.
    """

    to_ours: Callable[[Tensor], tuple[Tensor, ...]]
    to_theirs: Callable[[tuple[Tensor, ...]], Tensor]


def _unconvolved(weight: Tensor) -> tuple[Tensor, ...]:
    """(C, D, 1, 1) or (C, D, 1) -> (C, D); what is a linear layer's already stays as it is."""
    return (weight.flatten(1) if weight.ndim > 2 and weight.shape[2:].numel() == 1 else weight,)


def _thirds(weight: Tensor) -> tuple[Tensor, ...]:
    if weight.shape[:1].numel() % 3:
        raise ModelFileError(f"a tensor that holds q, k and v has {weight.shape[0]} rows, which is no multiple of 3")
    return weight.chunk(3)


SAME = Via(lambda t: (t,), lambda ours: ours[0])
TRANSPOSED = Via(lambda t: (t.T.contiguous(),), lambda ours: ours[0].T.contiguous())
"""(C, D) <-> (D, C)."""
CONVOLVED = Via(_unconvolved, lambda ours: ours[0][..., None, None])
"""The weight of a 1x1 convolution, (C, D, 1, 1) <-> a linear layer's, (C, D)."""
FLATTENED = Via(_unconvolved, lambda ours: ours[0])
"""The same where they keep a linear layer's weight by now: it is written as (C, D)."""
THIRDS = Via(_thirds, lambda ours: torch.cat(ours))
"""One tensor with the rows of q, k and v <-> the three."""


@dataclass(frozen=True)
class Rule:
    """One line of the table: a name of theirs, the names of ours, and how the values go over.

    Attributes:
        theirs: a name, with fields.
        ours: a name or several, each with the same fields.
        via: `SAME`, `TRANSPOSED`, `CONVOLVED`, `THIRDS`, or another.
    """

    theirs: str
    ours: tuple[str, ...]
    via: Via = SAME
    _theirs: _Pattern = field(init=False, repr=False, compare=False)
    _ours: tuple[_Pattern, ...] = field(init=False, repr=False, compare=False)

    def __init__(self, theirs: str, ours: str | tuple[str, ...], via: Via = SAME) -> None:
        names = (ours,) if isinstance(ours, str) else ours
        patterns = tuple(_Pattern.read(name) for name in (theirs, *names))
        if len({frozenset(pattern.fields) for pattern in patterns}) != 1:
            raise ValueError(f"the names of a rule must have the same fields, got {theirs!r} and {', '.join(names)}")
        values = {"theirs": theirs, "ours": names, "via": via, "_theirs": patterns[0], "_ours": patterns[1:]}
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class _Pattern:
    """A name with fields, ready to be compared and filled in: `literals` with `fields` between them."""

    text: str
    literals: tuple[str, ...]
    fields: tuple[str, ...]

    @classmethod
    @cache
    def read(cls, text: str) -> _Pattern:
        parts = list(Formatter().parse(text))
        fields = tuple(name for _, name, _, _ in parts if name is not None)
        if unknown := [name for name in fields if name not in FIELDS]:
            raise ValueError(f"a name has the unknown field {{{unknown[0]}}}; known: {', '.join(FIELDS)}")
        literals = tuple(literal for literal, _, _, _ in parts)
        return cls(text, literals if len(literals) > len(fields) else (*literals, ""), fields)

    @property
    def start(self) -> str:
        """What every name begins with."""
        return self.literals[0]

    def fit(self, name: str) -> dict[str, str] | None:
        """What the fields stand for in a name; None where it does not fit."""
        if not self.fields:
            return {} if name == self.text else None
        if len(self.fields) == 1:  # as nearly all are; compiling an expression for each would be slow
            (start, end), (field,) = self.literals, self.fields
            inner = name[len(start) : len(name) - len(end)]
            fits = name.startswith(start) and name.endswith(end) and _FIELDS[field].fullmatch(inner)
            return {field: inner} if fits else None
        found = _expression(self.literals, self.fields).fullmatch(name)
        return None if found is None else found.groupdict()

    def filled(self, values: Mapping[str, str]) -> str:
        """The name, with the fields' values."""
        return self.text.format_map(values)


_FIELDS = {name: re.compile(expression) for name, expression in FIELDS.items()}


@cache
def _expression(literals: tuple[str, ...], fields: tuple[str, ...]) -> re.Pattern[str]:
    named = [f"(?P<{name}>{FIELDS[name]})" for name in fields]
    return re.compile("".join(re.escape(a) + b for a, b in zip(literals, [*named, ""], strict=True)))


class _Index:
    """Which rule and which of its names a name belongs to."""

    def __init__(self, entries: Iterable[tuple[_Pattern, tuple[int, int]]]) -> None:
        self._by_start: dict[str, list[tuple[_Pattern, tuple[int, int]]]] = {}
        for pattern, place in entries:
            self._by_start.setdefault(pattern.start, []).append((pattern, place))
        self._lengths = sorted({len(start) for start in self._by_start}, reverse=True)

    def find(self, name: str) -> tuple[int, int, dict[str, str]] | None:
        """(rule, which of its names, fields); the rule that spells out most of the name's beginning goes first."""
        for length in self._lengths:
            for pattern, (rule, part) in self._by_start.get(name[:length], ()) if length <= len(name) else ():
                if (found := pattern.fit(name)) is not None:
                    return rule, part, found
        return None


# --- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """How one of their tensors is made: of which of ours, and how."""

    ours: tuple[str, ...]
    via: Via

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, made of ours."""
        return self.via.to_theirs(tuple(tensors[name] for name in self.ours))


class KeyMap:
    """A table of rules, with its inverse.

    Tensors on "meta" go through as well, so a file's header is enough to see what would become of it.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._theirs = _Index((rule._theirs, (i, 0)) for i, rule in enumerate(self.rules))
        self._ours = _Index((one, (i, k)) for i, rule in enumerate(self.rules) for k, one in enumerate(rule._ours))

    def __add__(self, other: KeyMap) -> KeyMap:
        """Both tables."""
        return KeyMap(self.rules + other.rules)

    def under(self, theirs: str = "", ours: str = "") -> KeyMap:
        """The same table with a prefix before every name of theirs, and of ours."""
        return KeyMap(Rule(theirs + r.theirs, tuple(ours + name for name in r.ours), r.via) for r in self.rules)

    def knows(self, theirs: str) -> bool:
        """Whether a rule fits a name of theirs."""
        return self._theirs.find(theirs) is not None

    def to_ours(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Their tensors under our names, and the names that no rule knows. Each tensor is asked for once."""
        found: dict[str, Tensor] = {}
        unmatched = []
        for name, tensor in tensors.items():
            place = self._theirs.find(name)
            if place is None:
                unmatched.append(name)
                continue
            rule, values = self.rules[place[0]], place[2]
            for pattern, part in zip(rule._ours, rule.via.to_ours(tensor), strict=True):
                ours = pattern.filled(values)
                if ours in found:
                    raise ModelFileError(f"{name} and another tensor of the file would both be {ours}")
                found[ours] = part
        return found, unmatched

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Our tensors under their names, and the names that no rule knows or whose partners are missing."""
        plan, unmatched = self.plan_of_theirs(tensors)
        return {name: step.of(tensors) for name, step in plan.items()}, unmatched

    def plan_of_theirs(self, names: Iterable[str]) -> tuple[dict[str, Step], list[str]]:
        """How each of their tensors is made of ours, and the names that `to_theirs` could not place.

        A large file is written from it one tensor at a time.
        """
        waiting: dict[str, tuple[Rule, dict[int, str]]] = {}
        plan: dict[str, Step] = {}
        unmatched = []
        for name in names:
            place = self._ours.find(name)
            if place is None:
                unmatched.append(name)
                continue
            index, part, values = place
            rule = self.rules[index]
            theirs = rule._theirs.filled(values)
            partners = waiting.setdefault(theirs, (rule, {}))[1]
            partners[part] = name
            if len(partners) == len(rule.ours):
                plan[theirs] = Step(tuple(partners[k] for k in range(len(rule.ours))), rule.via)
                del waiting[theirs]
        return plan, unmatched + [name for _, partners in waiting.values() for name in partners.values()]

    def names_of_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, str]:
        """For each name of ours the name under which they keep it; names that no rule knows are left out."""
        places = {name: self._ours.find(name) for name in ours}
        return {name: self.rules[p[0]]._theirs.filled(p[2]) for name, p in places.items() if p is not None}


# --- what is left aside, and the account ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Ignored:
    """Names that a model does not use: a regular expression for the whole name, and the reason in plain words."""

    names: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """What became of the names of a file.

    Attributes:
        matched: names that the model uses.
        ignored: for each reason, the names that are left aside on purpose.
    """

    matched: tuple[str, ...]
    ignored: dict[str, tuple[str, ...]]

    @property
    def dropped(self) -> tuple[str, ...]:
        """All names that are left aside, sorted."""
        return tuple(sorted(name for names in self.ignored.values() for name in names))

    def describe(self) -> str:
        """One line: how many names are used, and how many are left aside for which reason."""
        aside = "; ".join(f"{len(names)} left aside: {reason}" for reason, names in self.ignored.items())
        return f"{len(self.matched)} tensors used" + (f"; {aside}" if aside else "")


def check_cover(
    table: KeyMap,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    ignored: Iterable[Ignored] = (),
    *,
    what: str,
) -> Coverage:
    """Compare the names and shapes of a file with what a model needs; no value is looked at.

    Args:
        tensors: of the file, under their names; "meta" is enough.
        wanted: of the model, under our names; "meta" is enough.
        ignored: what may be there besides.
        what: names the file in the sentence.

    Raises:
        ModelFileError: when a tensor is missing, has another shape, or is neither wanted nor ignored; it lists the
            first ten, in the file's own naming, with the nearest names.
    """
    mine, unmatched = table.to_ours(tensors)
    theirs = table.names_of_theirs(wanted)
    back = table.names_of_theirs(mine)
    foreign = unmatched + sorted({back[name] for name in mine if name not in wanted})
    missing = list(dict.fromkeys(theirs.get(name, name) for name in wanted if name not in mine))
    misshapen = [name for name in wanted if name in mine and mine[name].shape != wanted[name].shape]
    reasons = [(re.compile(one.names), one.reason) for one in ignored]
    aside: dict[str, list[str]] = {}
    unknown = []
    for name in foreign:
        reason = next((why for pattern, why in reasons if pattern.fullmatch(name)), None)
        unknown.append(name) if reason is None else aside.setdefault(reason, []).append(name)
    problems = [f"{name} is missing{nearest(name, unknown)}" for name in missing[:NAMED]]
    problems += [f"{name} is not known{nearest(name, missing)}" for name in unknown[:NAMED]]
    problems += [
        f"{theirs.get(name, name)} has shape {tuple(mine[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in misshapen[:NAMED]
    ]
    if problems:
        count = len(missing) + len(unknown) + len(misshapen)
        more = f" and {count - NAMED} more" if count > NAMED else ""
        raise ModelFileError(f"{what} does not fit: {'; '.join(problems[:NAMED])}{more}")
    left = {name for names in aside.values() for name in names}
    matched = tuple(name for name in tensors if name not in left)
    return Coverage(matched, {reason: tuple(sorted(names)) for reason, names in aside.items()})
