"""The one struct that crosses the border between conditioners and networks.

A conditioner fills *named* slots; a network takes the slots it knows as keyword arguments of the same names, so
`networks/` never imports this module. A slot is declared by whoever fills it, never guessed from a tensor's rank.

>>> import torch
>>> c = Condition(labels=torch.tensor([3, 7]))
>>> c.stacked_on(Condition(labels=torch.tensor([10, 10]))).labels.tolist()
[10, 10, 3, 7]
>>> sorted(c.for_network())
['labels']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

NETWORK_SLOTS = ("labels", "vector", "guidance", "context", "context_mask", "residuals", "adapters")


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told besides `x_t` and the noise level. Every slot is optional; B is the batch.

    Attributes:
        labels: (B,) int64, embedding-table rows inside the network (class ids).
        vector: (B, D), added to the time embedding (pooled text, unCLIP image embedding, sizes).
        guidance: (B,), the guidance weight that distilled models are told.
        context: (B, L, C), attended to (text tokens, layout tokens).
        context_mask: (B, L) bool, True where `context` is real.
        concat: (B, C', *S), concatenated to `x_t` on channels by the denoiser (low-resolution image, mask …); planes of
            1 x 1 are constant and take the size of what they are joined with.
        residuals: tensors added to the network's skip features (ControlNet, T2I-Adapter).
        adapters: tensors forwarded to the attention processors by keyword (IP-Adapter tokens).
    """

    labels: Tensor | None = None
    vector: Tensor | None = None
    guidance: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    concat: Tensor | None = None
    residuals: tuple[Tensor, ...] | None = None
    adapters: Mapping[str, Tensor] = field(default_factory=dict)

    def for_network(self) -> dict[str, Any]:
        """The filled slots that a network takes as keyword arguments (`concat` is the denoiser's to use)."""
        slots = {name: getattr(self, name) for name in NETWORK_SLOTS}
        return {name: value for name, value in slots.items() if value is not None and value != {}}

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """Move every slot to `device`; floating-point slots are cast to `dtype`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, dtype) if value.is_floating_point() else value.to(device)
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            return {name: move(item) for name, item in value.items()}

        return replace(
            self, **{f.name: move(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        )

    def rows(self, start: int, stop: int) -> Condition:
        """The pictures from `start` up to `stop` of the batch."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[start:stop]
            if isinstance(value, tuple):
                return tuple(pick(item) for item in value)
            return {name: pick(item) for name, item in value.items()}

        return replace(
            self, **{f.name: pick(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        )

    def stacked_on(self, first: Condition) -> Condition:
        """One condition of both batches, `first`'s pictures before this one's (guidance in a single call).

        Both must fill the same slots: a slot that only one of them fills raises `ValueError` naming it. Contexts of
        unequal length are padded to the longer (zeros, masked out), which needs the mask.
        """
        joined: dict[str, Any] = {}
        length = max((len(c.context[0]) for c in (self, first) if c.context is not None), default=0)
        one, other = self._lengthened(length), first._lengthened(length)
        for f in fields(self):
            mine, theirs = getattr(one, f.name), getattr(other, f.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"the condition and its null must fill the same slots; only one fills '{f.name}'")
            if mine is not None:
                joined[f.name] = _join(theirs, mine, f.name)
        return Condition(**joined)

    def _lengthened(self, length: int) -> Condition:
        """With `context` padded to `length` tokens."""
        if self.context is None or self.context.shape[1] == length:
            return self
        if self.context_mask is None:
            raise ValueError(
                f"contexts of {self.context.shape[1]} and {length} tokens can only be joined with a 'context_mask'"
            )
        more = length - self.context.shape[1]
        return replace(
            self,
            context=torch.nn.functional.pad(self.context, (0, 0, 0, more)),
            context_mask=torch.nn.functional.pad(self.context_mask, (0, more)),
        )


def _join(first: Any, second: Any, name: str) -> Any:
    if isinstance(first, Tensor):
        if name == "concat":
            first, second = _alike(first, second), _alike(second, first)
        return torch.cat([first, second])
    if isinstance(first, tuple):
        return tuple(torch.cat([a, b]) for a, b in zip(first, second, strict=True))
    if set(first) != set(second):
        raise ValueError(f"the condition and its null must carry the same entries in '{name}'")
    return {key: torch.cat([first[key], second[key]]) for key in first}


def _alike(plane: Tensor, other: Tensor) -> Tensor:
    """A constant plane (B, C, 1, 1) at the size of another one; every other plane as it is."""
    constant = all(side == 1 for side in plane.shape[2:])
    return plane.expand(*plane.shape[:2], *other.shape[2:]) if constant else plane
