"""What a conditioner is, and several of them as one.

A conditioner turns raw input, one entry per picture, into slots of `sfumato.condition.Condition`; `None` stands for
the null, what a network is shown when the condition is dropped (classifier-free guidance, Ho & Salimans 2022).
Conditioners that fill different slots combine in any order.

>>> from sfumato.conditioners.label import LabelConditioner
>>> both = Combined({"label": LabelConditioner(("cat", "dog"))})
>>> both.encode([{"label": "dog"}, {}]).labels.tolist()
[1, 2]
>>> dropped(both.encode([{"label": "dog"}] * 2), both.null(2), torch.tensor([False, True])).labels.tolist()
[1, 2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.errors import UserError, raise_unknown


class Conditioner(Protocol):
    """Raw user input -> condition slots, and their null.

    Attributes:
        slots: the slots of `Condition` that it fills, always all of them.
        network: what is trained (and stored) with the model, or None when nothing is.
    """

    @property
    def slots(self) -> frozenset[str]: ...

    @property
    def network(self) -> nn.Module | None: ...

    def encode(self, inputs: Sequence[Any]) -> Condition:
        """The condition of a batch: one entry per picture, None for the null."""

    def null(self, count: int) -> Condition:
        """What `count` pictures are shown when the condition is dropped."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON from which `conditioners.registry.from_config` builds the same conditioner."""


class Combined:
    """Several conditioners as one: each entry of its input is a mapping from their names to their inputs.

    A name that an entry leaves out is the null of that conditioner.

    Raises:
        UserError: when two conditioners fill the same slot, or an entry has an unknown name.
    """

    def __init__(self, parts: Mapping[str, Conditioner]) -> None:
        self.parts = dict(sorted(parts.items()))
        if not self.parts:
            raise UserError("a combination needs at least one conditioner")
        filled: dict[str, str] = {}
        for name, part in self.parts.items():
            for slot in sorted(part.slots):
                if slot in filled:
                    raise UserError(f"the conditioners {filled[slot]!r} and {name!r} both fill the slot {slot!r}")
                filled[slot] = name
        self.slots = frozenset(filled)
        networks = {name: part.network for name, part in self.parts.items() if part.network is not None}
        self.network: nn.Module | None = nn.ModuleDict(networks) if networks else None

    def encode(self, inputs: Sequence[Mapping[str, Any] | None]) -> Condition:
        """The slots of all parts; one mapping per picture, None for all nulls."""
        entries: list[Mapping[str, Any]] = [{} if entry is None else entry for entry in inputs]
        for entry in entries:
            for name in entry:
                if name not in self.parts:
                    raise_unknown("condition", name, self.parts)
        return self._merged({n: p.encode([e.get(n) for e in entries]) for n, p in self.parts.items()})

    def null(self, count: int) -> Condition:
        """The nulls of all parts."""
        return self._merged({name: part.null(count) for name, part in self.parts.items()})

    def describe(self) -> dict[str, Any]:
        """The parts, by name."""
        return {"kind": "combined", "parts": {name: part.describe() for name, part in self.parts.items()}}

    def _merged(self, conditions: Mapping[str, Condition]) -> Condition:
        slots = {s: getattr(conditions[name], s) for name, part in self.parts.items() for s in part.slots}
        return Condition(**slots)


def dropped(condition: Condition, null: Condition, rows: Tensor) -> Condition:
    """`condition` with the pictures marked in `rows` shown the null instead.

    Args:
        condition, null: of the same batch B, filling the same slots; contexts may differ in length.
        rows: (B,) bool, True where the condition is dropped.
    """
    both, count = null.stacked_on(condition), len(rows)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            index = torch.arange(count, device=value.device) + count * rows.to(value.device)
            return value[index]
        if isinstance(value, tuple):
            return tuple(pick(item) for item in value)
        return {name: pick(item) for name, item in value.items()}

    return replace(both, **{f.name: pick(v) for f in fields(both) if (v := getattr(both, f.name)) is not None})


def check_batch(inputs: Sequence[Any], what: str) -> None:
    """Refuse an empty batch, and one text where a list is meant (its letters would be taken one by one)."""
    if isinstance(inputs, str):
        raise UserError(f"expected a list with one {what} per picture, got the text {inputs!r}")
    if not len(inputs):
        raise UserError(f"expected a list with one {what} per picture, got an empty one")


def check_keys(config: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Every key of a stored config must be known, and every known one there; else `UserError`."""
    for key in config:
        if key not in known:
            raise_unknown(f"key of {what}", key, known)
    for key in known:
        if key not in config:
            raise UserError(f"{what} lacks the key {key!r}")
