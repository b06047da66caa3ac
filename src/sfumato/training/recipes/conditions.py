"""Conditions of a recipe: what the network is told of each picture, one kind and one column of the data for each.

A kind is a class of `KINDS`: it says what its conditioner is built from, and what the conditioner is given of a batch.
That may come from columns of the data, from the pictures themselves, or from their latents; whatever is random is drawn
from the generator of the step. Dropping a condition is not a kind's business: the conditioner's null is.

>>> recipe = ConditionRecipe(kind="label", column="colour", dropout=0.2)
>>> kind_of("colour", recipe).outline(Frame(factor=1, channels=3, size=32))
{'kind': 'label', 'names': ['any']}
>>> {"joint", "label", "layout", "semantic"} <= set(KINDS)
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sfumato.checkpoints import hashes
from sfumato.condition import Condition
from sfumato.conditioners.base import Conditioner
from sfumato.conditioners.clip import CLIPText
from sfumato.conditioners.joint import JointText, TextTransformerConfig
from sfumato.conditioners.layout import Box, Coordinates, Layout, LayoutTokens, layout_of
from sfumato.conditioners.minilm import MiniLM
from sfumato.conditioners.semantic import ClassMap, Semantic
from sfumato.conditioners.shown import LowResolution, Masked, shrunk
from sfumato.conditioners.shown import from_config as shown_from_config
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import WordVocabulary, spelling
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import DataError, UserError, raise_unknown
from sfumato.systems.config import Strict
from sfumato.systems.latent import LABEL, TEXT
from sfumato.training.cache import TextCache
from sfumato.training.captions import Captions
from sfumato.training.data import Batch, PictureSet, View
from sfumato.training.pictures import decode_map
from sfumato.training.placed import boxes_seen, map_seen, stored_map
from sfumato.training.shown import blurred, random_masks


class ConditionRecipe(Strict):
    """What the network is told, and from which column of the data.

    Attributes:
        kind: minilm (frozen, from its package), clip (frozen, from a folder in transformers' or diffusers' layout),
            joint (a transformer trained with the rest), label or embedded-label, layout or layout-tokens (boxes),
            semantic (a map of classes), masked (inpainting), low-resolution (enlarging).
        column: of the data; None for the kind's own: `data.label`, `boxes`, `map`.
        captions: for text: templates over columns, of which one is drawn each time a picture is shown.
        dropout: share of pictures shown the null instead, for classifier-free guidance.
        folder: of clip.
        network: fields of `TextTransformerConfig`, for joint, less `vocab_size`; a small one where none says its size
            (`JointlyTrainedText.small`), else its own defaults for what is not said.
        width: of tokens; beside a text they take the text's.
        scale: how much smaller than the picture the one is that a network enlarges.
        form: how that is shown (`conditioners.shown.LowResolution`); None for "upsampled" where there is no codec, else
            "beside" or "unfolded", as its size has it.
        blur: largest deviation of a random blur of the picture before it is made small, in its pixels; 0 for none.
        noise: how many steps of the schedule its random noise has, from the cleanest; 0 for no noise.
        told: whether the network is told which step it was.
        residual: 0, or the usual size of what an upsampled or encoded picture lacks, which is then learnt instead.
        full: share of the masks that cover everything.
        names: of the classes of a layout or a map, by number; empty for those that the data have.
        method: how a map is made as small as the latents ("area" or "bilinear").
        mixed: channels that a trained 1x1 convolution mixes a map's classes to; None for none.
    """

    kind: str
    column: str | None = None
    captions: tuple[str, ...] = ("{text}",)
    dropout: float = Field(default=0.1, ge=0, le=1)
    folder: str | None = None
    network: dict[str, Any] = Field(default_factory=dict)
    width: int = Field(default=512, ge=1)
    scale: int = Field(default=2, ge=2, le=8)
    form: Literal["beside", "unfolded", "upsampled", "encoded"] | None = None
    blur: float = Field(default=0.0, ge=0, le=16)
    noise: int = Field(default=0, ge=0, le=1000)
    told: bool = True
    residual: float = Field(default=0.0, ge=0, le=10)
    full: float = Field(default=0.1, ge=0, le=1)
    names: tuple[str, ...] = ()
    method: Literal["area", "bilinear"] = "area"
    mixed: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> ConditionRecipe:
        if self.kind not in KINDS:
            raise_unknown("kind of condition", self.kind, KINDS)
        for name, field in type(self).model_fields.items():
            known = {"kind", "dropout", *KINDS[self.kind].options}
            if name not in known and getattr(self, name) != field.get_default(call_default_factory=True):
                raise UserError(f"{name} does not belong to conditions of kind {self.kind!r}")
        return self

    @property
    def is_text(self) -> bool:
        """Whether it reads captions."""
        return KINDS[self.kind].reads == TEXT


@dataclass(frozen=True)
class Frame:
    """What of the model a conditioner's config may follow from.

    Attributes:
        factor, channels: of the codec: pixels of a latent's side, channels of the latents.
        size: of the pictures, in pixels.
        width: of the text's tokens, None where there is no text.
    """

    factor: int
    channels: int
    size: int
    width: int | None = None


@dataclass(frozen=True)
class Seen:
    """A batch, as kinds see it.

    Attributes:
        pictures: the set that it is of.
        batch: its pictures and indices, and how they were cut and mirrored.
        generator: what is random comes from here.
        training: False in validation and for samples, where nothing should be drawn that need not.
        device: where networks compute.
        latents: the codec's mean latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1].
        schedule: of the model's noise.
    """

    pictures: PictureSet
    batch: Batch
    generator: torch.Generator
    training: bool
    device: torch.device
    latents: Callable[[Tensor], Tensor]
    schedule: Schedule

    @property
    def views(self) -> list[View]:
        """What is seen of each stored picture."""
        return self.batch.views if self.batch.views is not None else [View()] * len(self.batch.indices)


class Kind:
    """One condition of a recipe.

    Attributes:
        reads: what of a user's words its conditioner reads; empty for what is shown (`conditioners.shown`).
        options: fields of `ConditionRecipe` that it takes, besides `kind` and `dropout`.
        width: of its tokens where they are text, which other conditions follow; else None.
    """

    reads: ClassVar[str] = ""
    options: ClassVar[frozenset[str]] = frozenset({"column"})
    width: int | None = None

    def __init__(self, name: str, recipe: ConditionRecipe) -> None:
        self.name, self.recipe = name, recipe

    def check(self) -> None:
        """Refuse, with a `UserError`, options that do not go together."""

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        """Read what is needed of the data, the training set first; pictures may be left out now and not later."""

    def outline(self, frame: Frame) -> dict[str, Any]:
        """What the conditioner is built from, with one class or no word where the data decide."""
        raise NotImplementedError

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        """The same with what the data decide, after `prepare`."""
        return self.outline(frame)

    def inputs(self, seen: Seen) -> list[Any]:
        """What the conditioner is given, one entry for each picture of the batch."""
        raise NotImplementedError

    def cached(self, conditioner: Conditioner) -> Conditioner:
        """The conditioner, with what it makes of the whole data at hand where that can be."""
        return conditioner

    def column(self, pictures: PictureSet, index: int, own: str | None = None) -> Any:
        """The value of a picture's column: the recipe's, else `own`. Raises `DataError` where there is none."""
        column = self.recipe.column or own
        if column is None:
            raise DataError(f"conditions.{self.name} has no column; give it one, or data.label")
        record = pictures.records[index]
        value = record.columns.get(column)
        if value is None:
            raise DataError(f"{record.key} in {pictures.config.path!r} has no {column!r}")
        return value


# --- text ------------------------------------------------------------------------------------------------------------


class CachedText:
    """A text conditioner that looks the states of known captions up."""

    reads = TEXT

    def __init__(self, conditioner: TextConditioner, cache: TextCache) -> None:
        self.conditioner, self.cache = conditioner, cache
        self.slots, self.network, self.width = conditioner.slots, None, conditioner.width

    def encode(self, inputs: Sequence[str | None]) -> Condition:
        return self.conditioner.from_states(self.cache.states([text or "" for text in inputs]))

    def null(self, count: int) -> Condition:
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        return self.conditioner.describe()


def _tell(left_out: Iterable[str]) -> None:
    """Say which captions are left out, if any are."""
    texts = sorted(set(left_out))
    if texts:
        names = ", ".join(repr(text) for text in texts[:3]) + (" …" if len(texts) > 3 else "")
        print(f"{len(texts)} captions that the text encoder cannot read are left out ({names})")


class Text(Kind):
    """Captions, drawn from templates. What differs between encoders is below."""

    reads = TEXT
    options = frozenset({"captions"})

    def check(self) -> None:
        if (self.recipe.kind == "clip") != (self.recipe.folder is not None):
            raise UserError("clip and a folder belong together")

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        self.captions = {id(pictures): Captions(pictures, self.recipe.captions) for pictures in sets}
        self._tell_of_pictures()

    def _tell_of_pictures(self) -> None:
        """Say which pictures have been left out, if any have."""
        keys = [key for captions in self.captions.values() for key in captions.dropped]
        for captions in self.captions.values():
            captions.dropped = []
        if keys:
            names = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            print(f"{len(keys)} pictures without a caption that can be read are left out: {names}")

    def texts(self) -> set[str]:
        """All captions of all sets."""
        return set().union(*(captions.texts() for captions in self.captions.values()))

    def inputs(self, seen: Seen) -> list[str]:
        captions, indices = self.captions[id(seen.pictures)], seen.batch.indices.tolist()
        return captions.drawn(indices, seen.generator) if seen.training else [captions.first(i) for i in indices]

    def cached(self, conditioner: Conditioner) -> Conditioner:
        if not isinstance(conditioner, TextConditioner) or conditioner.network is not None:
            return conditioner
        return CachedText(conditioner, TextCache.of(sorted(self.texts()), conditioner, print))


class MiniLMText(Text):
    """Sentences by MiniLM, frozen; captions that it cannot read are left out."""

    @property
    def width(self) -> int:  # type: ignore[override]
        return MiniLM().width

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        super().prepare(sets)
        pieces = MiniLM().pieces
        hint = f"conditions.{self.name}.kind=joint learns words of any language"
        _tell(text for captions in self.captions.values() for text in captions.leave_out(pieces.unreadable, hint=hint))
        self._tell_of_pictures()

    def outline(self, frame: Frame) -> dict[str, Any]:
        return MiniLM().describe()


class ClipFolderText(Text):
    """CLIP's text tower from a folder, frozen."""

    options = frozenset({"captions", "folder"})

    def _tower(self) -> CLIPText:
        return CLIPText(Path(str(self.recipe.folder)), hasher=hashes.sha256)

    @property
    def width(self) -> int:  # type: ignore[override]
        return self._tower().width

    def outline(self, frame: Frame) -> dict[str, Any]:
        return self._tower().describe()


class JointlyTrainedText(Text):
    """A transformer trained with the rest, whose words are those of the training captions."""

    options = frozenset({"captions", "network"})
    small: ClassVar[Mapping[str, int]] = {
        "d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "head_dim": 64, "encoder_ffn_dim": 1024,
    }  # fmt: skip
    """The network where the recipe says nothing of its size: 3 million weights beside those of the words."""

    @property
    def width(self) -> int:  # type: ignore[override]
        return self._encoder(WordVocabulary(())).width

    def _encoder(self, words: WordVocabulary) -> JointText:
        """The text transformer for these words, without weights. Raises `UserError` for unknown keys."""
        if "vocab_size" in self.recipe.network:
            raise UserError("vocab_size follows from the captions; leave it out")
        said = self.recipe.network
        size = {} if said.keys() & self.small.keys() else self.small
        with torch.device("meta"):
            return JointText(words, TextTransformerConfig.from_dict({**size, **said, "vocab_size": words.size}))

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        super().prepare(sets)
        first, *others = sets
        self.words = WordVocabulary.from_texts(sorted(self.captions[id(first)].texts()))
        for pictures in others:
            captions = self.captions[id(pictures)]
            _tell(captions.leave_out(lambda text: list(spelling(text, self.words.words)), pictures_too=True))
        self._tell_of_pictures()

    def outline(self, frame: Frame) -> dict[str, Any]:
        return self._encoder(WordVocabulary(())).describe()

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        encoder = self._encoder(self.words)
        for text in sorted(self.texts()):
            if (count := len(self.words.ids(text))) > encoder.max_tokens:
                raise UserError(
                    f"the caption {text!r} has {count} tokens; the text encoder reads at most {encoder.max_tokens} "
                    f"(conditions.{self.name}.network.max_position_embeddings)"
                )
        return encoder.describe()


# --- labels ----------------------------------------------------------------------------------------------------------


class Label(Kind):
    """Classes, by a table in the network."""

    reads = LABEL

    def inputs(self, seen: Seen) -> list[str]:
        return [self._name(seen.pictures, i) for i in seen.batch.indices.tolist()]

    def _name(self, pictures: PictureSet, index: int) -> str:
        return str(self.column(pictures, index, pictures.config.label))

    def outline(self, frame: Frame) -> dict[str, Any]:
        return self._config(frame, ["any"])

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        return self._config(frame, sorted({self._name(pictures, i) for pictures in sets for i in range(len(pictures))}))

    def _config(self, frame: Frame, names: list[str]) -> dict[str, Any]:
        return {"kind": self.recipe.kind, "names": names}


class LabelToken(Label):
    """Classes, each one trained token."""

    options = frozenset({"column", "width"})

    def _config(self, frame: Frame, names: list[str]) -> dict[str, Any]:
        return super()._config(frame, names) | {"width": frame.width or self.recipe.width}


# --- what is shown ---------------------------------------------------------------------------------------------------


class SmallPicture(Kind):
    """The picture itself, made small: what a network learns to enlarge."""

    options = frozenset({"scale", "form", "blur", "noise", "told", "residual"})

    def check(self) -> None:
        if not self.recipe.noise and not self.recipe.told:
            raise UserError("told belongs to noise: without any there is nothing to tell")

    def outline(self, frame: Frame) -> dict[str, Any]:
        recipe, form = self.recipe, self._form(frame)
        if frame.size % recipe.scale:
            raise UserError(f"pictures of {frame.size} pixels cannot be made {recipe.scale} times smaller")
        channels = {"unfolded": 3 * (frame.factor // recipe.scale) ** 2, "encoded": frame.channels}.get(form, 3)
        part = LowResolution(
            levels=recipe.noise if recipe.told else 0,
            droppable=recipe.dropout > 0,
            scale=recipe.scale,
            form=form,
            channels=channels,
            noise=recipe.noise - 1,
            residual=recipe.residual,
            exact=not recipe.noise and not recipe.blur,
        )
        side = frame.size // recipe.scale
        part.laid(torch.zeros(1, 3, side, side), frame.factor, lambda x: x)  # refuses a form that does not fit
        return part.describe()

    def _form(self, frame: Frame) -> str:
        if self.recipe.form is not None:
            return self.recipe.form
        if frame.factor == 1:
            return "upsampled"
        return "beside" if frame.factor == self.recipe.scale else "unfolded"

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        self.factor, config = frame.factor, self.outline(frame)
        part = shown_from_config(config)
        assert isinstance(part, LowResolution)
        self.part = part
        return config

    def inputs(self, seen: Seen) -> list[tuple[Tensor, int]]:
        pictures, count, recipe = seen.batch.to_float(), len(seen.batch.indices), self.recipe
        if recipe.blur and seen.training:
            pictures = blurred(pictures, recipe.blur * torch.rand(count, generator=seen.generator))
        small, steps = shrunk(pictures, recipe.scale), [-1] * count
        if recipe.noise:
            drawn = torch.zeros(count, dtype=torch.int64)
            if seen.training:
                drawn = torch.randint(recipe.noise, (count,), generator=seen.generator)
            level = seen.schedule.level(drawn.to(torch.float64))
            small, steps = level.noise(small, torch.randn(small.shape, generator=seen.generator)), drawn.tolist()
        return list(zip(self.part.laid(small.to(seen.device), self.factor, seen.latents), steps, strict=True))


class Hidden(Kind):
    """A random mask, and the picture with what it covers hidden: what a network learns to fill in."""

    options = frozenset({"full"})

    def outline(self, frame: Frame) -> dict[str, Any]:
        self.factor, self.part = frame.factor, Masked(frame.channels, self.recipe.dropout > 0)
        return self.part.describe()

    def inputs(self, seen: Seen) -> list[Tensor]:
        pictures = seen.batch.to_float()
        count, _, height, width = pictures.shape
        masks = random_masks(count, height, width, seen.generator, full=self.recipe.full)
        latents = seen.latents(self.part.hidden(pictures, masks > 0))
        return list(self.part.laid(F.max_pool2d(masks, self.factor).to(latents), latents))


# --- places ----------------------------------------------------------------------------------------------------------


class Boxes(Kind):
    """Labelled boxes, each one token; the column is `boxes`, a list of `{"label": …, "box": [x, y, width, height]}`."""

    reads = "layout"
    options = frozenset({"column", "names", "width"})

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        self._layouts: dict[str, tuple[Box, ...]] = {}

    def _layout(self, pictures: PictureSet, index: int) -> tuple[Box, ...]:
        """Of the whole picture."""
        key = pictures.records[index].key
        if key not in self._layouts:
            try:
                self._layouts[key] = layout_of(self.column(pictures, index, "boxes"))
            except UserError as error:
                raise DataError(f"{key} in {pictures.config.path!r}: {error}") from None
        return self._layouts[key]

    def _names(self, sets: Sequence[PictureSet]) -> list[str]:
        """Those of the recipe, else all that are found; every layout is looked at."""
        found = {box.label for pictures in sets for i in range(len(pictures)) for box in self._layout(pictures, i)}
        for name in sorted(found) if self.recipe.names else ():
            if name not in self.recipe.names:
                raise_unknown("class of objects", name, self.recipe.names)
        if not found:
            raise DataError(f"conditions.{self.name}: no picture has a box")
        return list(self.recipe.names) or sorted(found)

    def outline(self, frame: Frame) -> dict[str, Any]:
        return self._config(frame, list(self.recipe.names) or ["any"])

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        return self._config(frame, self._names(sets))

    def _config(self, frame: Frame, names: list[str]) -> dict[str, Any]:
        return Layout(names, frame.width or self.recipe.width).describe()

    def inputs(self, seen: Seen) -> list[tuple[Box, ...]]:
        found = []
        for i, view in zip(seen.batch.indices.tolist(), seen.views, strict=True):
            boxes, size = self._layout(seen.pictures, i), seen.pictures.size_of(i)
            found.append(boxes_seen(boxes, size, seen.pictures.config, view))
        return found


class Places(Kind):
    """Where each latent lies. No column: it follows from the picture's size."""

    options = frozenset()

    def outline(self, frame: Frame) -> dict[str, Any]:
        self.factor, self.part = frame.factor, Coordinates(droppable=self.recipe.dropout > 0)
        return self.part.describe()

    def inputs(self, seen: Seen) -> list[Tensor]:
        height, width = (side // self.factor for side in seen.batch.images.shape[-2:])
        return [self.part.planes(height, width)] * len(seen.batch.indices)


class BoxNumbers(Boxes):
    """The same as numbers for a transformer that is trained with the rest; objects come in a random order."""

    options = frozenset({"column", "names", "network"})

    def _config(self, frame: Frame, names: list[str]) -> dict[str, Any]:
        values = {"vocab_size": 8192, "max_position_embeddings": 92} | self.recipe.network
        if frame.width is not None and values.setdefault("d_model", frame.width) != frame.width:
            raise UserError(f"conditions.{self.name}.network.d_model must be the text's {frame.width}")
        network = TextTransformerConfig.from_dict(values)
        objects = (network.max_position_embeddings - 2) // 3
        with torch.device("meta"):
            return LayoutTokens(names, network.to_dict(), objects).describe()

    def inputs(self, seen: Seen) -> list[tuple[Box, ...]]:
        found = super().inputs(seen)
        if not seen.training:
            return found
        orders = [torch.randperm(len(boxes), generator=seen.generator).tolist() for boxes in found]
        return [tuple(boxes[i] for i in order) for boxes, order in zip(found, orders, strict=True)]


class Map(Kind):
    """A class for every pixel; the column is `map`, a PNG whose values are the classes."""

    reads = "map"
    options = frozenset({"column", "names", "method", "mixed"})

    def prepare(self, sets: Sequence[PictureSet]) -> None:
        self._maps: dict[str, Tensor] = {}

    def _map(self, pictures: PictureSet, index: int) -> Tensor:
        """As stored beside its picture."""
        key = pictures.records[index].key
        if key in self._maps:
            return self._maps[key]
        given = self.column(pictures, index, "map")
        try:
            data = given.read_bytes() if isinstance(given, Path) else given
            data = data.get("bytes") if isinstance(data, dict) else data  # Hugging Face's pictures in parquet
            if not isinstance(data, bytes):
                raise DataError(f"the map {str(given)!r:.80} is not the name of a file here")
            found = stored_map(decode_map(data), pictures.size_of(index), pictures.config)
        except (UserError, OSError) as error:
            raise DataError(f"{key} in {pictures.config.path!r}: {error}") from None
        if pictures.cached:
            self._maps[key] = found
        return found

    def outline(self, frame: Frame) -> dict[str, Any]:
        return self._config(frame, list(self.recipe.names) or ["0"])

    def described(self, frame: Frame, sets: Sequence[PictureSet]) -> dict[str, Any]:
        most = max(int(self._map(pictures, i).max()) for pictures in sets for i in range(len(pictures)))
        names = list(self.recipe.names) or [str(number) for number in range(most + 1)]
        if most >= len(names):
            raise DataError(f"conditions.{self.name} has names of {len(names)} classes, but there is a map with {most}")
        return self._config(frame, names)

    def _config(self, frame: Frame, names: list[str]) -> dict[str, Any]:
        return Semantic(names, frame.factor, self.recipe.method, self.recipe.mixed).describe()

    def inputs(self, seen: Seen) -> list[ClassMap]:
        pictures, indices = seen.pictures, seen.batch.indices.tolist()
        return [
            ClassMap.of_values(map_seen(self._map(pictures, i), pictures.config, view))
            for i, view in zip(indices, seen.views, strict=True)
        ]


KINDS: dict[str, type[Kind]] = {
    "clip": ClipFolderText,
    "coordinates": Places,
    "embedded-label": LabelToken,
    "joint": JointlyTrainedText,
    "label": Label,
    "layout": Boxes,
    "layout-tokens": BoxNumbers,
    "low-resolution": SmallPicture,
    "masked": Hidden,
    "minilm": MiniLMText,
    "semantic": Map,
}
"""What a condition can be, by name."""


def kind_of(name: str, recipe: ConditionRecipe) -> Kind:
    """The kind of one condition."""
    return KINDS[recipe.kind](name, recipe)


def kinds_of(conditions: Mapping[str, ConditionRecipe]) -> dict[str, Kind]:
    """All of a recipe, by name and in the order of the names.

    Raises:
        UserError: when one cannot be, or two read the same.
    """
    found = {name: kind_of(name, recipe) for name, recipe in sorted(conditions.items())}
    for name, kind in found.items():
        if name in (TEXT, LABEL) and kind.reads != name:
            what = "reads prompts" if name == TEXT else "is for classes"
            raise UserError(f"conditions.{name} {what}, so it cannot be of kind {kind.recipe.kind!r}")
        twin = next((n for n, other in found.items() if n < name and kind.reads and other.reads == kind.reads), None)
        if twin is not None:
            raise UserError(f"conditions.{twin} and conditions.{name} both read the user's {kind.reads}")
        try:
            kind.check()
        except UserError as error:
            raise UserError(f"conditions.{name}: {error}") from None
    return found


def described(kinds: Mapping[str, Kind], frame: Frame, sets: Sequence[PictureSet] | None) -> dict[str, dict[str, Any]]:
    """What all conditioners are built from; an outline where there are no data yet."""
    width = next((kind.width for kind in kinds.values() if kind.width is not None), None)
    whole = Frame(frame.factor, frame.channels, frame.size, width)
    return {n: k.outline(whole) if sets is None else k.described(whole, sets) for n, k in kinds.items()}
