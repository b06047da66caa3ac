"""Semantic maps: a class for every pixel, laid beside the latents (Rombach 2022, section 4.3.2 and appendix E.3).

A map is made one-hot, brought to the latents' size, and maybe mixed to a few channels by a 1x1 convolution without
bias. `method` "bilinear" halves it again and again, as latent diffusion's `SpatialRescaler` does; "area" takes the
share of each class within a latent's pixels. A pixel of class -1 is unknown: zeros; and so is the null, everywhere.

>>> part = Semantic(("sky", "sea"), factor=2)
>>> part.encode([torch.tensor([[0, 1], [1, 1]]), None]).concat.flatten(1).tolist()
[[0.25, 0.75], [0.0, 0.0]]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys, common_size
from sfumato.errors import UserError, raise_unknown

METHODS = ("area", "bilinear")
_MODES = ("P", "L", "1")


@dataclass(frozen=True)
class ClassMap:
    """A map of classes, (height, width) of whole numbers, by the hash of its values; maps of one hash are equal.

    Attributes:
        sha256: of size and values.
        path: the file it came from, if it came from one.
        values: int64.
    """

    sha256: str
    path: str | None = field(compare=False)
    values: Tensor = field(compare=False, repr=False)

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Image.Image) -> ClassMap:
        """From a PNG with a palette or of 8-bit grey. Raises `UserError` for what is none."""
        if isinstance(given, Image.Image):
            return cls._of(given, None)
        path = Path(given)
        if not path.is_file():
            raise UserError(f"there is no map at {path}")
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
                return cls._of(image, str(path.resolve()))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception:  # Pillow's readers raise nearly any type on damaged input
            raise UserError(f"{path} cannot be read as a PNG, which a map of classes must be") from None

    @classmethod
    def _of(cls, image: Image.Image, path: str | None) -> ClassMap:
        return cls.of_values(classes_of(image), path)

    @classmethod
    def of_values(cls, values: Tensor, path: str | None = None) -> ClassMap:
        """From the classes themselves, int64 (H, W)."""
        data = f"classes {tuple(values.shape)} ".encode() + values.numpy().astype("<i8").tobytes()
        return cls(hashlib.sha256(data).hexdigest(), path, values)

    def stored(self) -> dict[str, str]:
        """As JSON: where it was, and its hash."""
        return ({"path": self.path} if self.path is not None else {}) | {"sha256": self.sha256}

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.values.shape[1], self.values.shape[0]


def classes_of(image: Image.Image) -> Tensor:
    """The classes of a map, int64 (H, W): the palette's numbers or the grey values. Raises `UserError` for colours."""
    if image.mode not in _MODES:
        raise UserError(
            "a map of classes is a PNG with a palette or of 8-bit grey, whose values are the classes; this one is of "
            f"mode {image.mode}"
        )
    return torch.from_numpy(np.array(image).astype(np.int64))


class Semantic:
    """Maps (H, W) of class ids -> `concat` (B, channels, H / factor, W / factor).

    Args:
        names: of the classes, by id.
        factor: pixels of a latent's side; a power of two for "bilinear".
        method: how one-hot maps are made smaller.
        mixed: channels after the 1x1 convolution; None for none, and as many channels as classes.
    """

    kind = "semantic"
    reads = "map"
    slots = frozenset({"concat"})

    def __init__(
        self, names: Sequence[str], factor: int = 1, method: str = "area", mixed: int | None = None
    ) -> None:
        self.names, self.factor, self.method, self.mixed = tuple(names), factor, method, mixed
        if not self.names:
            raise UserError("a semantic map needs at least one class")
        if method not in METHODS:
            raise_unknown("way of resizing maps", method, METHODS)
        if method == "bilinear" and factor & (factor - 1):
            raise UserError(f"bilinear maps are halved, so the codec's factor must be a power of two, got {factor}")
        mapper = None if mixed is None else nn.Conv2d(len(self.names), mixed, 1, bias=False)
        self.network: nn.Module | None = None if mapper is None else nn.ModuleDict({"channel_mapper": mapper})

    @property
    def channels(self) -> int:
        """That it adds to the network's input."""
        return len(self.names) if self.mixed is None else self.mixed

    def encode(self, inputs: Sequence[Tensor | ClassMap | None]) -> Condition:
        """One map (H, W) of whole numbers per picture, -1 where nothing is known; None for the null.

        Raises:
            UserError: for a class that is not there, maps of different sizes, or sides that the factor does not divide.
        """
        check_batch(inputs, "map")
        maps = [one.values if isinstance(one, ClassMap) else one for one in inputs]
        found = [torch.zeros(len(self.names), 1, 1) if one is None else self._small(one) for one in maps]
        size = common_size(found)
        planes = torch.stack([one.expand(len(one), *size) for one in found])
        if self.network is not None:
            weight = next(self.network.parameters())
            planes = self.network["channel_mapper"](planes.to(weight))  # type: ignore[index]
        return Condition(concat=planes)

    def _small(self, one: Tensor) -> Tensor:
        """(classes, h, w), one-hot and as small as the latents."""
        if one.ndim != 2 or one.is_floating_point():
            raise UserError(f"a semantic map is (height, width) of whole numbers, got {tuple(one.shape)} {one.dtype}")
        if any(side % self.factor for side in one.shape):
            raise UserError(
                f"a semantic map must have sides that are multiples of {self.factor}, got "
                f"{one.shape[1]} x {one.shape[0]}"
            )
        low, high = int(one.min()), int(one.max())
        if low < -1 or high >= len(self.names):
            odd = low if low < -1 else high
            raise UserError(f"the map has the class {odd}; this model knows 0 to {len(self.names) - 1}")
        hot = F.one_hot(one.long() + 1, len(self.names) + 1)[..., 1:].permute(2, 0, 1).to(torch.float32)
        if self.method == "area":
            return F.avg_pool2d(hot, self.factor) if self.factor > 1 else hot
        for _ in range(self.factor.bit_length() - 1):
            hot = F.interpolate(hot[None], scale_factor=0.5, mode="bilinear")[0]
        return hot

    def null(self, count: int) -> Condition:
        """`count` times zeros."""
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """Classes and how they are resized."""
        how = {"factor": self.factor, "method": self.method, "mixed": self.mixed}
        return {"kind": self.kind, "names": list(self.names)} | how

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Semantic:
        """From `describe`."""
        check_keys(config, ("kind", "names", "factor", "method", "mixed"), "the semantic map's config")
        return cls(config["names"], config["factor"], config["method"], config["mixed"])
