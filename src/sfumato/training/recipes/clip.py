"""Recipe `clip`: train two small towers on captioned pictures, so that each picture lies near its caption.

The loss is CLIP's (Radford 2021): in every batch, each picture is to be told by its caption among all captions, and
each caption by its picture. A caption is drawn anew each time: the text, or some of the tags, with or without the
style. Where what a caption says is true of several pictures of the batch, they share its target: none counts as wrong.
To every picture comes one more caption that is nearly right: its own with another style, or another one with its style.

>>> said = Said("red heart, noto style", "red heart", "noto")
>>> true_of([said, Said("red heart", "red heart", None)], ["red heart", "red heart"], ["noto", "fluent flat"]).tolist()
[[True, False], [True, True]]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato.diffusion.objective import Loss
from sfumato.errors import DataError, UserError, nearest
from sfumato.images import sheet, to_pil
from sfumato.systems.clip import CLIP, CLIPConfig, TowerConfig, vocabulary
from sfumato.systems.config import Strict, parse
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet

_TAGS, _STYLE = "tags", "style"
_MOST_TAGS = 3
_WHOLE = 0.15  # share of the steps, the last ones, in which pictures are seen whole


class CLIPModelConfig(Strict):
    """The part of a model's config that a recipe chooses; size and vocabulary come from the data.

    Attributes:
        patch, vision, text, embed, tokens: see `CLIPConfig`.
        words: of the vocabulary at most, the most frequent.
    """

    patch: int = 8
    vision: TowerConfig = TowerConfig(width=192, layers=6, heads=3, mlp=384)
    text: TowerConfig = TowerConfig(width=128, layers=4, heads=4, mlp=256)
    embed: int = 128
    tokens: int = 24
    words: int = Field(default=4096, ge=1, le=100_000)
    title: str = ""
    licence: str = ""
    source: str = ""


class CaptionConfig(Strict):
    """How captions are drawn from the columns of a picture. A default name may be absent; any other must exist.

    Attributes:
        tags: column of further words, a list or text with commas; null for none.
        style: column of the manner of drawing; null for none.
        tags_share: share of captions with one to three tags, half of them in place of the text.
        style_share: share of captions that say the style, "<text>, <style> style" or "<style> style <text>".
    """

    tags: str | None = _TAGS
    style: str | None = _STYLE
    tags_share: float = Field(default=0.2, ge=0, le=1)
    style_share: float = Field(default=0.6, ge=0, le=1)


class AugmentConfig(Strict):
    """Small changes that leave a picture what it is.

    Attributes:
        shift: share of the side. scale: factor less one. rotate: degrees. colour: of contrast, of brightness (of
            middle tones), and of saturation. Each is drawn evenly between its negative and itself.
        blur: share of pictures that are shown at a half to all of their resolution.
        noise: largest standard deviation of noise on pictures in [-1, 1].
        drop: share of a picture's patches that is not looked at, which saves as much time (Li 2022, FLIP); in the last
            15 % of the steps pictures are seen whole.
    """

    shift: float = Field(default=0.06, ge=0, lt=0.5)
    scale: float = Field(default=0.12, ge=0, lt=0.5)
    rotate: float = Field(default=8.0, ge=0, le=45)
    colour: float = Field(default=0.15, ge=0, lt=1)
    blur: float = Field(default=0.2, ge=0, le=1)
    noise: float = Field(default=0.05, ge=0, le=1)
    drop: float = Field(default=0.5, ge=0, lt=1)


class CLIPRecipe(Strict):
    """A whole run.

    Attributes:
        data: the pictures and their captions.
        model: the towers.
        captions, augment: what is drawn anew at every look.
        train: how long, how large, how often. A batch is compared within itself, process by process and micro-batch by
            micro-batch, so that larger ones are harder.
    """

    recipe: Literal["clip"] = "clip"
    description: str = ""
    data: DataConfig
    model: CLIPModelConfig = CLIPModelConfig()
    captions: CaptionConfig = CaptionConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()

    def task(self, data: PictureSet, validation: PictureSet | None) -> CLIPTask:
        """What the trainer is given."""
        return CLIPTask(self, data, validation)

    def check(self) -> None:
        """Refuse settings that cannot be trained; no weights are made. Raises `UserError`."""
        if self.data.caption is None:
            raise UserError("CLIP learns from captions, but data.caption is null; name the column that holds them")
        if self.data.channels != 3:
            raise UserError("CLIP sees colour pictures; leave data.channels at 3")
        if self.train.batch // self.train.accumulate < 2:
            raise UserError("CLIP compares pictures within a batch; train.batch / train.accumulate must be at least 2")
        CLIP.create(self.model_for(()), "meta")

    def model_for(self, known: Sequence[str]) -> CLIPConfig:
        """The config of the model that this recipe trains with these words."""
        own = self.model.model_dump(exclude={"words"}) | {"size": self.data.size, "vocabulary": tuple(known)}
        return parse(CLIPConfig, own, "model")


class Said(NamedTuple):
    """A caption as drawn: its words, whose caption it is, and the style that it names, if it does."""

    words: str
    concept: str
    style: str | None


def true_of(captions: Sequence[Said], concepts: Sequence[str], styles: Sequence[str | None]) -> Tensor:
    """Which captions are true of which pictures, bool (captions, pictures): the same concept, and no other style."""
    pictures = list(zip(concepts, styles, strict=True))
    rows = [[one.concept == concept and one.style in (None, style) for concept, style in pictures] for one in captions]
    return torch.tensor(rows)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """CLIP's loss of every picture (B,): the mean of the cross-entropies of picture to captions and back.

    Args:
        images: unit embeddings (B, E).
        texts: unit embeddings (C, E), the first B in pairs with the pictures; more are only there to be told apart.
        scale: of the cosines.
        matches: bool (C captions, B pictures), the diagonal true. A row's or column's target is even over its matches.
    """
    logits = scale * texts @ images.T
    target, count = matches.to(logits), len(images)
    own = target[:count]
    of_text = -(logits[:count].log_softmax(1) * own / own.sum(1, keepdim=True)).sum(1)
    of_image = -(logits.log_softmax(0) * target / target.sum(0, keepdim=True)).sum(0)
    return (of_text + of_image) / 2


class CLIPTask:
    """The trainer's view of a CLIP run (see `sfumato.training.trainer.Task`)."""

    def __init__(self, recipe: CLIPRecipe, data: PictureSet, validation: PictureSet | None) -> None:
        self.recipe, self.data, self.validation = recipe, data, validation
        if data.caption_of(0) is None:
            raise DataError(f"{recipe.data.path!r} has no captions (column {recipe.data.caption!r}); CLIP needs them")
        for name, default in ((recipe.captions.tags, _TAGS), (recipe.captions.style, _STYLE)):
            _check_column(data, name, default)
        self._styles = sorted({style for i in range(len(data)) if (style := self._style(data, i)) is not None})
        torch.manual_seed(recipe.train.seed)
        self.model = CLIP.create(recipe.model_for(vocabulary(self._all_words(), recipe.model.words)))
        self.network: nn.Module = self.model.towers
        self._called: nn.Module = self.network
        self._done = 0.0
        if recipe.train.gradient_checkpointing:
            self.model.towers.clip.gradient_checkpointing_enable()

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self._called = prepare(self.network)

    def begin(self, step: int) -> None:
        self._done = step / self.recipe.train.steps

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        training = self.network.training
        data = self.data if training else self.validation
        assert data is not None
        rows = batch.indices.tolist()
        concepts, styles = [str(data.caption_of(i)) for i in rows], [self._style(data, i) for i in rows]
        x = batch.to_float()
        if training:
            said = [self._draw_caption(data, i, generator) for i in rows]
            said += [self._draw_distractor(data, i, generator) for i in rows]
            x = augmented(x, self.recipe.augment, generator)
        else:
            said = [_told(concept, concept, style) for concept, style in zip(concepts, styles, strict=True)]
        tokens = self.model.config.encode([one.words for one in said]).to(device)
        keep = self._kept_patches(len(x), generator) if training else None
        images, texts, scale = self._called(x.to(device), tokens, None if keep is None else keep.to(device))
        matches = true_of(said, concepts, styles).to(device)
        each = contrast(images, texts, scale, matches)
        told = matches.T.gather(1, (images @ texts.T).argmax(1, keepdim=True)).float().mean()
        return Loss(each.mean(), each.detach(), None, each, figures={"accuracy": float(told)})

    def draw(self, count: int, steps: int) -> Image.Image:
        """Pictures, held-out ones where there are any, each under the caption that it lies nearest to."""
        data = self.validation or self.data
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count].tolist()
        pictures = torch.stack([data.load(i) for i in rows])
        known = sorted({str(data.caption_of(i)) for i in range(len(data))})
        cosines = self.model.pictures(pictures) @ self.model.captions(known).T
        labels = [known[int(best)] for best in cosines.argmax(1)]
        return sheet(to_pil(pictures.float() / 127.5 - 1), labels=labels, scale=max(1, 128 // self.recipe.data.size))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"network.{name.removeprefix('clip.')}": tensor for name, tensor in weights.items()}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"clip.{name.removeprefix('network.')}": tensor for name, tensor in tensors.items()}

    def model_config(self) -> dict[str, Any]:
        return self.model.config.model_dump(mode="json")

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(dict(weights)), self.model_config()

    def _all_words(self) -> list[str]:
        found = ["style"]
        for i in range(len(self.data)):
            found += [str(self.data.caption_of(i)), *self._tags(self.data, i), self._style(self.data, i) or ""]
        return found

    def _tags(self, data: PictureSet, i: int) -> list[str]:
        value = data.records[i].columns.get(self.recipe.captions.tags) if self.recipe.captions.tags else None
        parts = value.split(",") if isinstance(value, str) else value or []
        return [text for part in parts if (text := str(part).strip())]

    def _style(self, data: PictureSet, i: int) -> str | None:
        value = data.records[i].columns.get(self.recipe.captions.style) if self.recipe.captions.style else None
        return str(value) if value else None

    def _draw_caption(self, data: PictureSet, i: int, generator: torch.Generator) -> Said:
        """One way to describe a picture."""
        concept, style, tags = str(data.caption_of(i)), self._style(data, i), self._tags(data, i)
        u, text = torch.rand(5, generator=generator).tolist(), concept
        if tags and u[0] < self.recipe.captions.tags_share:
            some = torch.randperm(len(tags), generator=generator)[: 1 + int(u[1] * _MOST_TAGS)].tolist()
            told = ", ".join(tags[k] for k in some)
            text = told if u[2] < 0.5 else f"{concept}, {told}"
        return _told(text, concept, style if u[3] < self.recipe.captions.style_share else None, in_front=u[4] < 0.25)

    def _draw_distractor(self, data: PictureSet, i: int, generator: torch.Generator) -> Said:
        """A caption that is nearly right: the picture's own with another style, or another one with its style."""
        concept, style = str(data.caption_of(i)), self._style(data, i)
        u = torch.rand(4, generator=generator).tolist()
        if style is not None and len(self._styles) > 1 and u[0] < 0.5:
            others = [other for other in self._styles if other != style]
            style = others[int(u[1] * len(others))]
        else:
            concept = str(data.caption_of(int(u[1] * len(data))))
            style = style if u[2] < self.recipe.captions.style_share else None
        return _told(concept, concept, style, in_front=u[3] < 0.25)

    def _kept_patches(self, count: int, generator: torch.Generator) -> Tensor | None:
        """(B, K) patches to look at, drawn for each picture; None for all of them."""
        config = self.model.config
        patches = (config.size // config.patch) ** 2
        kept = patches - int(self.recipe.augment.drop * patches)
        if kept == patches or self._done >= 1 - _WHOLE:
            return None
        return torch.rand(count, patches, generator=generator).argsort(1)[:, :kept]


def augmented(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] a little moved, turned, coloured, blurred and noisy, on white."""
    count = len(x)

    def even(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    angle, zoom = even() * math.radians(config.rotate), 1 + config.scale * even()
    move = even(2, 1) * 2 * config.shift
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(count, 2, 2)
    theta = torch.cat([turn * zoom.reshape(count, 1, 1), move], 2)
    places = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, places, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
    contrast, brightness, saturation = (config.colour * even(1, 1, 1) for _ in range(3))
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + saturation)
    x = x * (1 + contrast) + brightness * (1 - x.abs())
    side = int(x.shape[-1] * float(0.5 + 0.5 * torch.rand(1, generator=generator)))
    coarse = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    coarse = F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
    blurred = torch.rand(count, 1, 1, 1, generator=generator) < config.blur
    x = torch.where(blurred, coarse, x)
    deviation = config.noise * torch.rand(count, 1, 1, 1, generator=generator)
    return (x + deviation * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def _told(text: str, concept: str, style: str | None, in_front: bool = False) -> Said:
    """A text with its style, if any, behind it or in front."""
    if style is None:
        return Said(text, concept, None)
    return Said(f"{style} style {text}" if in_front else f"{text}, {style} style", concept, style)


def _check_column(data: PictureSet, name: str | None, default: str) -> None:
    """Refuse a column that was asked for and is nowhere in the data."""
    if name is None or name == default or any(r.columns.get(name) is not None for r in data.records):
        return
    known = sorted({column for record in data.records for column in record.columns})
    raise DataError(
        f"column {name!r} is not in {data.config.path!r}{nearest(name, known)}; columns: {', '.join(known)}"
    )
