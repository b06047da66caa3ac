"""Conditions that are shown, not said: what lies beside the latents on further channels of the network's input.

| kind | for | channels | shown |
|---|---|---|---|
| `masked` | inpainting | 1 + those of the latents | the mask (1 is redrawn), then the latents of what is kept |
| `depth` | depth to picture | 1 | inverse depth at the latents' size, -1 far to 1 near |
| `low-resolution` | upscaling | 3 | the small picture with some noise, whose step is a class |

Their input is a tensor of the latents' size: the codec has had its turn. Nothing shown has a null, for guidance leads
away from words, not from what is shown.

>>> Masked(latents=4).encode([torch.zeros(5, 8, 8)]).concat.shape
torch.Size([1, 5, 8, 8])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys
from sfumato.errors import UserError


class Shown:
    """A condition beside the latents.

    Attributes:
        kind: its name in a config.
        channels: that it adds to the network's input.
        needs: what to give where it is missing, for people.
    """

    kind = ""
    slots = frozenset({"concat"})
    network = None
    channels = 1
    needs = "a picture"

    def encode(self, inputs: Sequence[Tensor | None]) -> Condition:
        """One tensor (channels, h, w) per picture.

        Raises:
            UserError: when one is missing or has other channels.
        """
        check_batch(inputs, "picture")
        for one in inputs:
            if one is None:
                raise UserError(f"this model needs {self.needs}: `sfumato edit` takes one")
            if one.ndim != 3 or len(one) != self.channels:
                raise UserError(f"what this model is shown has {self.channels} channels, got {tuple(one.shape)}")
        return Condition(concat=torch.stack([one for one in inputs if one is not None]))

    def null(self, count: int) -> Condition:
        raise UserError(f"this model needs {self.needs} for every picture")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}


@dataclass(frozen=True)
class Masked(Shown):
    """Mask and masked picture (Rombach 2022, section 4.5), `latents` the channels of the codec."""

    kind = "masked"
    needs = "a picture and a mask"
    latents: int = 4

    @property
    def channels(self) -> int:  # type: ignore[override]
        return 1 + self.latents

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "latents": self.latents}


@dataclass(frozen=True)
class Depth(Shown):
    """Inverse depth, one channel in [-1, 1]."""

    kind = "depth"
    needs = "a picture and its map of depths"


@dataclass(frozen=True)
class LowResolution(Shown):
    """A small picture, three channels in about [-1, 1], with noise of the step that `level` names.

    Its input is `(picture, step)`: the step of the noise schedule that was applied to it, which the network is told as
    a class.
    """

    kind = "low-resolution"
    slots = frozenset({"concat", "labels"})
    channels = 3
    needs = "a picture to enlarge"
    levels: int = 1000

    def encode(self, inputs: Sequence[Any]) -> Condition:
        check_batch(inputs, "picture")
        pictures = super().encode([None if one is None else one[0] for one in inputs]).concat
        steps = [one[1] for one in inputs]
        if any(not 0 <= step < self.levels for step in steps):
            raise UserError(f"the noise of the small picture must be a step from 0 to {self.levels - 1}, got {steps}")
        return Condition(concat=pictures, labels=torch.tensor(steps))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "levels": self.levels}


def from_config(config: Mapping[str, Any]) -> Shown:
    """From `describe`."""
    if config["kind"] == Masked.kind:
        check_keys(config, ("kind", "latents"), "the mask's config")
        return Masked(config["latents"])
    if config["kind"] == LowResolution.kind:
        check_keys(config, ("kind", "levels"), "the small picture's config")
        return LowResolution(config["levels"])
    check_keys(config, ("kind",), "the depth's config")
    return Depth()
