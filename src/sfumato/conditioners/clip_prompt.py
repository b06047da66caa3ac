"""Prompts for Stable Diffusion: a CLIP text tower whose weights are the model's own, and what a user may say to it.

Every prompt becomes windows of 77 states, padding included and nothing masked, as such models were trained; in a batch
of unequal lengths the shorter prompts are followed by windows of the empty text. The grammar, the weights of words and
the number of skipped layers belong to the prompt (`Prompt`), not to the model.

>>> Prompt("a red hat").towards is None, Prompt("a (red:1.2) hat", dialect="plain").reading.dialect
(True, 'plain')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys
from sfumato.conditioners.clip import PromptEncoder, check_skip
from sfumato.conditioners.clip_tokens import ClipTokenizer, clip_tokenizer
from sfumato.conditioners.prompt import Reading
from sfumato.conditioners.vocabulary import SIZE
from sfumato.errors import UserError
from sfumato.networks.clip_text import CLIPTextConfig, CLIPTextModel

KEYS = ("kind", "tower", "pad", "skip", "final_norm")


@dataclass(frozen=True)
class Prompt:
    """What is said to the text tower.

    Attributes:
        text: the words.
        dialect: how brackets and weights are read (`conditioners.prompt`).
        skip: of the tower's last layers; None for the model's own.
        towards: a second text; the states lie on the straight line between both …
        share: … this far along it, 0 to 1.
    """

    text: str
    dialect: str = "a1111"
    skip: int | None = None
    towards: str | None = None
    share: float = 0.0

    @property
    def reading(self) -> Reading:
        """The grammar; `UserError` for a dialect that is unknown."""
        return Reading(self.dialect)


class ClipPrompt:
    """Prompts -> `context` (B, 77 n, C).

    Args:
        tower: fields of `CLIPTextConfig`.
        pad: the id that fills windows; the end mark's (Stable Diffusion 1) or 0 (2).
        skip: how many of the last layers are left out.
        final_norm: whether the last layer norm follows, on skipped layers too.

    Raises:
        UserError: for a tower of another vocabulary, an unknown field, or an impossible number.
    """

    kind = "clip-prompt"
    slots = frozenset({"context"})
    reads = "text"

    def __init__(self, tower: Mapping[str, Any], *, pad: int, skip: int = 0, final_norm: bool = True) -> None:
        if tower.get("vocab_size", SIZE) != SIZE:
            raise UserError(
                f"the text encoder's vocabulary has {tower['vocab_size']} tokens; only CLIP's own {SIZE} can be read"
            )
        self.values, self.pad, self.skip, self.final_norm = dict(tower), pad, skip, final_norm
        self.network = CLIPTextModel(CLIPTextConfig.from_dict(tower)).eval().requires_grad_(False)
        check_skip(skip, self.layers)

    @property
    def layers(self) -> int:
        """How many the tower has."""
        return self.network.config.num_hidden_layers

    @property
    def width(self) -> int:
        """C, the width of `context`."""
        return self.network.config.hidden_size

    @cached_property
    def _tokenizer(self) -> ClipTokenizer:
        return clip_tokenizer()

    def encoder(self, skip: int | None = None) -> PromptEncoder:
        """The tower with another number of skipped layers; None for the model's own."""
        skip = self.skip if skip is None else skip
        return PromptEncoder(self._tokenizer, self.network, pad=self.pad, skip=skip, final_norm=self.final_norm)

    def encode(self, inputs: Sequence[str | Prompt | None]) -> Condition:
        """One prompt per picture, None for the empty text.

        Raises:
            UserError: as `PromptEncoder.tokens`, and for an impossible `skip`.
        """
        check_batch(inputs, "prompt")
        said = [one if isinstance(one, Prompt) else Prompt(one or "") for one in inputs]
        parts = dict.fromkeys([*said, *(_other(one) for one in said if one.towards is not None)])
        states: dict[Prompt, Tensor] = {}
        for skip in {one.skip for one in parts}:
            for dialect in {one.dialect for one in parts if one.skip == skip}:
                same = [one for one in parts if (one.skip, one.dialect) == (skip, dialect)]
                found = self.encoder(skip).encode([one.text for one in same], same[0].reading)
                states.update(zip(same, (one.states for one in found), strict=True))
        length = max(len(one) for one in states.values())
        empty: dict[int | None, Tensor] = {}
        for one, z in states.items():
            if len(z) < length:
                if one.skip not in empty:
                    empty[one.skip] = self.encoder(one.skip).encode([""])[0].states
                states[one] = torch.cat([z, *[empty[one.skip]] * ((length - len(z)) // len(empty[one.skip]))])
        return Condition(context=torch.stack([_between(one, states) for one in said]))

    def null(self, count: int) -> Condition:
        """`count` times the empty text."""
        if count < 1:
            raise UserError(f"a batch has at least one picture, got {count}")
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """The tower's config and how its states are taken."""
        return {
            "kind": self.kind, "tower": self.values, "pad": self.pad, "skip": self.skip, "final_norm": self.final_norm,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipPrompt:
        """From `describe`; its weights are the model's to load."""
        check_keys(config, KEYS, "the text encoder's config")
        return cls(config["tower"], pad=config["pad"], skip=config["skip"], final_norm=config["final_norm"])


def _other(prompt: Prompt) -> Prompt:
    """The far end of a prompt that lies between two."""
    return Prompt(prompt.towards or "", prompt.dialect, prompt.skip)


def _between(prompt: Prompt, states: Mapping[Prompt, Tensor]) -> Tensor:
    if prompt.towards is None:
        return states[prompt]
    return torch.lerp(states[prompt], states[_other(prompt)], prompt.share)
