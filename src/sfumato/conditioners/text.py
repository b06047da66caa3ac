"""Prompts to `context`: what a text encoder is, and the conditioner around it.

An encoder gives each text its states without padding; the conditioner pads them to the longest of the batch and says
in `context_mask` which are real. The null is what the encoder makes of the empty text, so that a model learns one
meaning of "no prompt" (and a negative prompt takes its place in guidance).

>>> class Letters:  # an encoder in four lines
...     width, max_tokens, network = 2, 9, None
...     def states(self, texts): return [torch.ones(len(text) + 1, 2) for text in texts]
...     def describe(self): return {"kind": "letters"}
>>> condition = TextConditioner(Letters()).encode(["ab", None])
>>> condition.context.shape, condition.context_mask.tolist()
(torch.Size([2, 3, 2]), [[True, True, True], [True, False, False]])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch
from sfumato.errors import UserError


class TextEncoder(Protocol):
    """Texts -> states.

    Attributes:
        width: C, the size of a state.
        max_tokens: the longest text that it reads, its own start and end marks included.
        network: what is trained with the model, or None for a frozen encoder.
    """

    @property
    def width(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def network(self) -> nn.Module | None: ...

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """The states of each text, unpadded: (L_i, C) float32, L_i >= 1, also of the empty text.

        Raises:
            UserError: for a text that it cannot read, naming the words, or that is too long.
        """

    def describe(self) -> dict[str, Any]:
        """Plain JSON from which the same encoder can be built."""


class TextConditioner:
    """Prompts -> `context` (B, L, C) and `context_mask` (B, L)."""

    slots = frozenset({"context", "context_mask"})
    reads = "text"

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._null: Tensor | None = None

    @property
    def network(self) -> nn.Module | None:
        """The encoder's network where it is trained with the model, else None."""
        return self.encoder.network

    @property
    def width(self) -> int:
        """C, the width of `context`."""
        return self.encoder.width

    def encode(self, inputs: Sequence[str | None]) -> Condition:
        """One text per picture, None for the null.

        Raises:
            UserError: for a text that the encoder cannot read, naming the words, or that is too long.
        """
        check_batch(inputs, "prompt")
        return self.from_states(self.encoder.states(["" if text is None else text for text in inputs]))

    def null_states(self) -> Tensor:
        """(L, C), the states of the empty text; reckoned once for a frozen encoder."""
        if self.network is not None:
            return self.encoder.states([""])[0]
        if self._null is None:
            self._null = self.encoder.states([""])[0]
        return self._null

    def null(self, count: int) -> Condition:
        """`count` times the empty text."""
        if count < 1:
            raise UserError(f"a batch has at least one picture, got {count}")
        return self.from_states([self.null_states()] * count)

    def from_states(self, states: Sequence[Tensor]) -> Condition:
        """The condition of states made earlier (a training set's), (L_i, C) each.

        Raises:
            UserError: when one is empty or of another width.
        """
        check_batch(states, "text")
        for one in states:
            if one.ndim != 2 or one.shape[1] != self.encoder.width or not len(one):
                raise UserError(
                    f"states of a text must be (tokens, {self.encoder.width}), got {tuple(one.shape)}: "
                    "were they made by another encoder?"
                )
        context = pad_sequence(list(states), batch_first=True)
        lengths = torch.tensor([len(one) for one in states], device=context.device)
        mask = torch.arange(context.shape[1], device=context.device) < lengths[:, None]
        return Condition(context=context, context_mask=mask)

    def describe(self) -> dict[str, Any]:
        """The encoder's."""
        return self.encoder.describe()


def by_length(
    ids: Sequence[Sequence[int]], run: Callable[[Tensor], Tensor], most: int = 64
) -> list[Tensor]:
    """Run a network over token sequences in batches of equal length, so that none needs padding; doubles run once.

    Args:
        ids: token ids of each text.
        run: (B, L) int64 -> (B, L, C).
        most: texts in a batch at most.

    Returns:
        (L_i, C) per text, in the given order.
    """
    lengths: dict[int, dict[tuple[int, ...], None]] = {}
    for one in ids:
        lengths.setdefault(len(one), {})[tuple(one)] = None
    found: dict[tuple[int, ...], Tensor] = {}
    for _, same in sorted(lengths.items()):
        rows = list(same)
        for start in range(0, len(rows), most):
            batch = rows[start : start + most]
            found.update(zip(batch, run(torch.tensor(batch)).unbind(), strict=True))
    return [found[tuple(one)] for one in ids]
