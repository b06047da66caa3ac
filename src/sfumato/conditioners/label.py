"""Class labels: names to ids, and the null class after them.

`LabelConditioner` fills the slot `labels` (the network holds the table); `EmbeddedLabel` is latent diffusion's class
embedder, one token of `context` (Rombach 2022, appendix E.2).

>>> LabelConditioner(("cat", "dog")).encode(["Dog", 0, None]).labels.tolist()
[1, 0, 2]
>>> EmbeddedLabel(("cat", "dog"), width=8).encode(["cat"]).context.shape
torch.Size([1, 1, 8])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys
from sfumato.errors import UserError, raise_unknown


class LabelConditioner:
    """Names of classes -> `labels`; the id after the last is the null class.

    Raises `UserError` where two names differ by case only, or there are none.
    """

    kind = "label"
    reads = "label"
    slots = frozenset({"labels"})
    network: nn.Module | None = None

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ids = {name.casefold(): i for i, name in enumerate(self.names)}
        if not self.names:
            raise UserError("a class-conditional model needs at least one label")
        for i, name in enumerate(self.names):
            if self._ids[name.casefold()] != i:
                raise UserError(f"the labels hold {name!r} twice (case does not count)")

    def label_id(self, label: str | int | None) -> int:
        """The id of a name (case does not count) or id; None is the null class.

        Raises:
            UserError: for an unknown name (the nearest is named) or an id out of range.
        """
        count = len(self.names)
        if label is None:
            return count
        if isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label <= count:
                raise UserError(f"label {label} is outside 0 … {count}")
            return label
        if not isinstance(label, str):
            raise UserError(f"a label is a name, an id or None, got {label!r}")
        if label.casefold() not in self._ids:
            raise_unknown("label", label, self.names)
        return self._ids[label.casefold()]

    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        """One name, id or None per picture -> `labels` (B,) int64."""
        check_batch(inputs, "label")
        return Condition(labels=torch.tensor([self.label_id(label) for label in inputs], dtype=torch.int64))

    def null(self, count: int) -> Condition:
        """`count` times the null class."""
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """The names."""
        return {"kind": self.kind, "names": list(self.names)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LabelConditioner:
        """From `describe`."""
        check_keys(config, ("kind", "names"), "the label conditioner's config")
        return cls(config["names"])


class EmbeddedLabel:
    """Names of classes -> one trained token of `context`; the last row of the table is the null class.

    The table's name is latent diffusion's, `embedding.weight` (classes + 1, width).
    """

    kind = "embedded-label"
    reads = "label"
    slots = frozenset({"context", "context_mask"})

    def __init__(self, names: Sequence[str], width: int = 512) -> None:
        self.labels, self.width = LabelConditioner(names), width
        self.network = nn.ModuleDict({"embedding": nn.Embedding(len(names) + 1, width)})

    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        """One name, id or None per picture -> `context` (B, 1, width), `context_mask` (B, 1)."""
        ids = self.labels.encode(inputs).labels
        table = self.network["embedding"]
        assert ids is not None and isinstance(table, nn.Embedding)
        context = table(ids.to(table.weight.device))[:, None]
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        return Condition(context=context, context_mask=mask)

    def null(self, count: int) -> Condition:
        """`count` times the null class."""
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """Names and width."""
        return {"kind": self.kind, "names": list(self.labels.names), "width": self.width}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EmbeddedLabel:
        """From `describe`."""
        check_keys(config, ("kind", "names", "width"), "the label conditioner's config")
        return cls(config["names"], config["width"])
