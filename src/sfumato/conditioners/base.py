"""What a conditioner is, and several of them as one.

A conditioner turns raw input, one entry per picture, into slots of `sfumato.condition.Condition`; `None` stands for
the null, what a network is shown when the condition is dropped (classifier-free guidance, Ho & Salimans 2022).
Several combine: their tokens follow one another in `context`, their channels in `concat`, in the order of their names,
so that the order in which a user lists them changes nothing.

>>> from sfumato.conditioners.label import LabelConditioner
>>> both = Combined({"label": LabelConditioner(("cat", "dog"))})
>>> both.encode([{"label": "dog"}, {}]).labels.tolist()
[1, 2]
>>> dropped(both.encode([{"label": "dog"}] * 2), both.null(2), torch.tensor([False, True])).labels.tolist()
[1, 2]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.errors import UserError, raise_unknown

CONTEXT = frozenset({"context", "context_mask"})
SHARED = CONTEXT | {"concat"}
"""Slots that several conditioners may fill together."""


class Conditioner(Protocol):
    """Raw user input -> condition slots, and their null.

    A conditioner that fills `context` has a `width`, one that fills `concat` has `channels`.

    Attributes:
        slots: the slots of `Condition` that it fills, always all of them.
        network: what is trained (and stored) with the model, or None when nothing is.
        reads: what it takes of all that a user says ("text", "label", "layout", "map"); empty for what is shown.
    """

    @property
    def reads(self) -> str: ...

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

    A name that an entry leaves out is the null of that conditioner. Tokens of several are attended to together, and
    channels of several lie beside each other, both in the order of the names; other slots belong to one alone.

    Raises:
        UserError: when two conditioners fill a slot that is not shared or make tokens of different widths, or an entry
            has an unknown name.
    """

    def __init__(self, parts: Mapping[str, Conditioner]) -> None:
        self.parts = dict(sorted(parts.items()))
        if not self.parts:
            raise UserError("a combination needs at least one conditioner")
        filled: dict[str, str] = {}
        for name, part in self.parts.items():
            for slot in sorted(part.slots - SHARED):
                if slot in filled:
                    raise UserError(f"the conditioners {filled[slot]!r} and {name!r} both fill the slot {slot!r}")
                filled[slot] = name
        self.speaking = [name for name, part in self.parts.items() if "context" in part.slots]
        self._check_widths()
        together = frozenset().union(*(part.slots for part in self.parts.values()))
        self.slots = together | (CONTEXT if len(self.speaking) > 1 else frozenset())
        networks = {name: part.network for name, part in self.parts.items() if part.network is not None}
        self.network: nn.Module | None = nn.ModuleDict(networks) if networks else None

    @property
    def reads(self) -> str:
        """Nothing by itself: its parts do."""
        return ""

    @property
    def width(self) -> int | None:
        """Of the tokens that are attended to; None where there are none."""
        return width_of(self.parts[self.speaking[0]]) if self.speaking else None

    @property
    def channels(self) -> int:
        """How many lie beside the latents."""
        return sum(channels_of(part) for part in self.parts.values() if "concat" in part.slots)

    def _check_widths(self) -> None:
        widths = {name: width_of(self.parts[name]) for name in self.speaking}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name!r} {width}" for name, width in widths.items())
            raise UserError(f"conditions that are attended to together must have one width, got {listed}")

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
        own = {s: getattr(conditions[n], s) for n, part in self.parts.items() for s in part.slots - SHARED}
        planes = [conditions[n].concat for n, part in self.parts.items() if "concat" in part.slots]
        if planes:
            own["concat"] = beside_each_other([plane for plane in planes if plane is not None])
        if len(self.speaking) == 1:
            one = conditions[self.speaking[0]]
            own |= {"context": one.context, "context_mask": one.context_mask}
        elif self.speaking:
            own["context"], own["context_mask"] = one_after_another(conditions[name] for name in self.speaking)
        return Condition(**own)


def width_of(part: Conditioner) -> int:
    """The width of the tokens that a conditioner makes."""
    return int(part.width)  # type: ignore[attr-defined]


def channels_of(part: Conditioner) -> int:
    """How many channels a conditioner lays beside the latents."""
    return int(part.channels)  # type: ignore[attr-defined]


def one_after_another(conditions: Iterable[Condition]) -> tuple[Tensor, Tensor]:
    """`context` (B, L, C) and `context_mask` (B, L) of several; where one has no mask, all its tokens are real."""
    contexts, masks = [], []
    for one in conditions:
        assert one.context is not None
        everything = torch.ones(one.context.shape[:2], dtype=torch.bool, device=one.context.device)
        contexts.append(one.context)
        masks.append(everything if one.context_mask is None else one.context_mask)
    device = _device_of(contexts)
    return torch.cat([c.to(device) for c in contexts], dim=1), torch.cat([m.to(device) for m in masks], dim=1)


def beside_each_other(planes: Sequence[Tensor]) -> Tensor:
    """Channels of several, each (B, C, h, w); those of 1 x 1 are constant and take the size of the others.

    Raises:
        UserError: when two have different sizes.
    """
    device, size = _device_of(planes), common_size(planes)
    return torch.cat([plane.to(device).expand(*plane.shape[:2], *size) for plane in planes], dim=1)


def common_size(planes: Iterable[Tensor]) -> tuple[int, ...]:
    """(h, w) of planes (…, h, w), where constant ones are 1 x 1. Raises `UserError` when there are two."""
    sizes = {tuple(plane.shape[-2:]) for plane in planes}
    real = sorted(sizes - {(1, 1)})
    if len(real) > 1:
        first, second = (f"{w} x {h}" for h, w in real[:2])
        raise UserError(f"what is shown beside the latents must have one size, got {first} and {second}")
    return real[0] if real else (1, 1)


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    """The accelerator's, if one of them is there: a frozen encoder's states may still be in main memory."""
    return next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)


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
