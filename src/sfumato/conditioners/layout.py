"""Layouts: labelled boxes, attended to as tokens (Rombach 2022, section 4.3.1 and appendix E.2).

A box lies in fractions of the picture: `[x, y, width, height]`, x to the right, y down, all in [0, 1].

| kind | tokens of a picture | for |
|---|---|---|
| `layout` | one for each object: its class plus a small network of its place | data of any size |
| `layout-tokens` | 92 numbers of a vocabulary of 8192, read by a transformer | latent diffusion's published model |

>>> part = Layout(("circle", "square"), width=8)
>>> said = layout_of([{"label": "circle", "box": [0, 0, 0.5, 0.5]}, {"label": "square", "box": [0.5, 0.25, 0.5, 0.5]}])
>>> part.encode([said, None]).context_mask.tolist()
[[True, True, True], [True, False, False]]
>>> Coordinates(frequencies=1).planes(1, 2)[:2].tolist()
[[[0.25, 0.75]], [[0.5, 0.5]]]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys
from sfumato.conditioners.label import LabelConditioner
from sfumato.conditioners.shown import Shown
from sfumato.errors import UserError, raise_unknown
from sfumato.networks.text import TextTransformer, TextTransformerConfig

CONVENTION = "a box is [x, y, width, height] in fractions of the picture's width and height, from 0 to 1"
_SLACK = 1e-4  # by which rounding may carry a box beyond the picture


class Box(NamedTuple):
    """A labelled box in fractions of the picture: its left upper corner, its width and height."""

    label: str
    x: float
    y: float
    width: float
    height: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1)."""
        return self.x, self.y, self.x + self.width, self.y + self.height


def box_of(value: Any) -> Box:
    """A box from `{"label": …, "box": [x, y, width, height]}`, or as it is. Raises `UserError` for anything else."""
    if isinstance(value, Box):
        label, place = value.label, value[1:]
    elif isinstance(value, Mapping) and set(value) == {"label", "box"} and isinstance(value["label"], str):
        label, place = value["label"], value["box"]
    else:
        raise UserError(f'an object of a layout is {{"label": …, "box": [x, y, width, height]}}, got {value!r:.80}')
    numbers = isinstance(place, Sequence) and all(isinstance(n, int | float) for n in place)
    if isinstance(place, str) or not numbers or len(place) != 4:
        raise UserError(f"{CONVENTION}, got {place!r:.80}")
    x, y, width, height = (float(n) for n in place)
    inside = min(x, y) >= -_SLACK and max(x + width, y + height) <= 1 + _SLACK
    if not inside or not min(width, height) > 0:
        raise UserError(f"{CONVENTION}; the {label!r} at {[x, y, width, height]} is not")
    x, y = max(x, 0.0), max(y, 0.0)
    return Box(label, x, y, min(width, 1 - x), min(height, 1 - y))


def layout_of(values: Any) -> tuple[Box, ...]:
    """A layout from a list of boxes. Raises `UserError` for anything else."""
    if not isinstance(values, list | tuple) or isinstance(values, Box):
        raise UserError(f"a layout is a list of labelled boxes, got {values!r:.80}")
    return tuple(box_of(value) for value in values)


def layout_told(layout: Sequence[Box]) -> list[dict[str, Any]]:
    """A layout as JSON, what `layout_of` takes."""
    return [{"label": box.label, "box": list(box[1:])} for box in layout]


def fourier(coordinates: Tensor, frequencies: int) -> Tensor:
    """(…, n) in [0, 1] -> (…, n (2 frequencies + 1)): each itself, and sin and cos of `2^k pi x` (Mildenhall 2020)."""
    angles = coordinates[..., None] * math.pi * 2.0 ** torch.arange(frequencies, device=coordinates.device)
    return torch.cat([coordinates[..., None], angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Layout:
    """Layouts -> `context` (B, L, C) with one token for each object, `context_mask` (B, L).

    A token is `LayerNorm(class + MLP(fourier(x0, y0, x1, y1)))`. It has no position of its own, so that the order of
    the objects means nothing. One token more, a row of its own in the table of classes, stands for the ground, so that
    what lies in no box has something to attend to. The null is one token too, the last row.

    Args:
        names: of the classes.
        width: C.
        hidden: of the network of places.
        frequencies: of its features.
    """

    kind = "layout"
    reads = "layout"
    slots = frozenset({"context", "context_mask"})

    def __init__(self, names: Sequence[str], width: int, hidden: int = 128, frequencies: int = 6) -> None:
        self.labels, self.width, self.hidden, self.frequencies = LabelConditioner(names), width, hidden, frequencies
        table = nn.Embedding(len(names) + 2, width)
        nn.init.normal_(table.weight, std=0.3)  # about as large as places are
        place = nn.Sequential(
            nn.Linear(4 * (2 * frequencies + 1), hidden), nn.SiLU(), nn.Linear(hidden, width)
        )
        self.network = nn.ModuleDict({"classes": table, "place": place, "norm": nn.LayerNorm(width)})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.labels.names

    def encode(self, inputs: Sequence[Sequence[Box] | None]) -> Condition:
        """One layout per picture, None for the null.

        Raises:
            UserError: for a class that is unknown (the nearest is named).
        """
        check_batch(inputs, "layout")
        table, norm = cast(nn.Embedding, self.network["classes"]), cast(nn.LayerNorm, self.network["norm"])
        device, ground, null = table.weight.device, len(self.names), len(self.names) + 1
        rows = [[null] if one is None else [ground, *(self._id(box.label) for box in one)] for one in inputs]
        places = [list(box.corners) for one in inputs for box in one or ()]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = table(torch.tensor([i for row in rows for i in row], device=device))
        placed = torch.tensor([i < ground for row in rows for i in row], device=device)
        if places:
            corners = torch.tensor(places, device=device, dtype=table.weight.dtype)
            tokens = tokens.index_add(0, placed.nonzero()[:, 0], self._placed(corners).to(tokens.dtype))
        context = pad_sequence(list(norm(tokens).split(lengths.tolist())), batch_first=True)
        return Condition(context=context, context_mask=torch.arange(context.shape[1], device=device) < lengths[:, None])

    def _placed(self, corners: Tensor) -> Tensor:
        return cast(Tensor, self.network["place"](fourier(corners, self.frequencies)))

    def _id(self, label: str) -> int:
        return class_id(label, self.labels)

    def null(self, count: int) -> Condition:
        """`count` times the null."""
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """Classes and sizes."""
        sizes = {"width": self.width, "hidden": self.hidden, "frequencies": self.frequencies}
        return {"kind": self.kind, "names": list(self.names)} | sizes

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """From `describe`."""
        check_keys(config, ("kind", "names", "width", "hidden", "frequencies"), "the layout's config")
        return cls(config["names"], config["width"], config["hidden"], config["frequencies"])


def class_id(label: str, labels: LabelConditioner) -> int:
    """The id of a class of objects by name (case does not count); the null has none. Raises `UserError`."""
    if label.casefold() not in {name.casefold() for name in labels.names}:
        raise_unknown("class of objects", label, labels.names)
    return labels.label_id(label)


@dataclass(frozen=True)
class Coordinates(Shown):
    """Where each latent lies: x, then y, in [0, 1], and sin and cos of both, as channels beside the latents (Liu 2018).

    A network of convolutions knows places only from its borders. Shown them, it learns in a fraction of the time to
    find what tokens say of places. Nobody has to give them.
    """

    kind = "coordinates"
    needs = "the places of its latents"
    frequencies: int = 3
    droppable: bool = False

    @property
    def channels(self) -> int:  # type: ignore[override]
        return 2 * (2 * self.frequencies + 1)

    def planes(self, height: int, width: int) -> Tensor:
        """(channels, height, width)."""
        y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
        places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        features = fourier(places, self.frequencies).reshape(height, width, 2, -1)
        return features.permute(3, 2, 0, 1).reshape(self.channels, height, width)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"frequencies": self.frequencies}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Coordinates:
        """From `describe`."""
        values = {key: value for key, value in config.items() if key != "droppable"}
        check_keys(values, ("kind", "frequencies"), "the coordinates' config")
        return cls(values["frequencies"], bool(config.get("droppable", False)))


class LayoutTokens:
    """Layouts -> `context` (B, L, C) by latent diffusion's numbers and transformer (systems of Rombach 2022).

    Of a vocabulary of V, the number of a point (x, y) is `round(y (s - 1)) s + round(x (s - 1))` with `s` the whole
    root of V. An object is three numbers, its class and two corners; pictures have `objects` of them, filled up with
    V - 1, and two more numbers for the corners of the part of the picture that is drawn (all of it, here). The
    transformer reads its padding, as it did in training.

    Args:
        names: of the classes; the id of a class is its number.
        network: fields of `TextTransformerConfig`; V is its `vocab_size`.
        objects: at most; more are left out, the last ones first.
        crop: whether the corners of the part that is drawn follow.

    Raises:
        UserError: where classes and V, or the length and the transformer's positions, do not fit.
    """

    kind = "layout-tokens"
    reads = "layout"
    slots = frozenset({"context"})

    def __init__(
        self, names: Sequence[str], network: Mapping[str, Any], objects: int = 30, crop: bool = True
    ) -> None:
        self.labels, self.objects, self.crop = LabelConditioner(names), objects, crop
        self.network = TextTransformer(TextTransformerConfig.from_dict(network))
        self.length = 3 * objects + 2 * crop
        if len(self.names) >= self.vocabulary:
            raise UserError(f"{len(self.names)} classes do not fit a vocabulary of {self.vocabulary}")
        if self.length > self.network.config.max_position_embeddings:
            raise UserError(
                f"a layout has {self.length} tokens, but the transformer reads "
                f"{self.network.config.max_position_embeddings}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.labels.names

    @property
    def width(self) -> int:
        """C."""
        return self.network.config.d_model

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.network.config.vocab_size

    @property
    def sections(self) -> int:
        """How many places a side is divided into."""
        return math.isqrt(self.vocabulary)

    def point(self, x: float, y: float) -> int:
        """The number of a point in [0, 1] x [0, 1]."""
        last = self.sections - 1
        return round(y * last) * self.sections + round(x * last)

    def place(self, number: int) -> tuple[float, float]:
        """(x, y) of a number, to `1 / (2 (sections - 1))`."""
        row, column = divmod(number, self.sections)
        return column / (self.sections - 1), row / (self.sections - 1)

    def ids(self, layout: Sequence[Box] | None) -> list[int]:
        """The numbers of a layout; None is the null: no object."""
        numbers: list[int] = []
        for box in (layout or ())[: self.objects]:
            x0, y0, x1, y1 = box.corners
            numbers += [class_id(box.label, self.labels), self.point(x0, y0), self.point(x1, y1)]
        numbers += [self.vocabulary - 1] * (3 * self.objects - len(numbers))
        return numbers + ([self.point(0, 0), self.point(1, 1)] if self.crop else [])

    def encode(self, inputs: Sequence[Sequence[Box] | None]) -> Condition:
        """One layout per picture, None for the null, which is the same as an empty one.

        Raises:
            UserError: for a class that is unknown (the nearest is named).
        """
        check_batch(inputs, "layout")
        device = self.network.model.embed_tokens.weight.device
        ids = torch.tensor([self.ids(one) for one in inputs], device=device)
        return Condition(context=self.network(ids).float())

    def null(self, count: int) -> Condition:
        """`count` times no object."""
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """Classes, transformer and form."""
        network = self.network.config.to_dict()
        return {
            "kind": self.kind, "names": list(self.names), "network": network, "objects": self.objects,
            "crop": self.crop,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LayoutTokens:
        """From `describe`."""
        check_keys(config, ("kind", "names", "network", "objects", "crop"), "the layout's config")
        return cls(config["names"], config["network"], config["objects"], config["crop"])
