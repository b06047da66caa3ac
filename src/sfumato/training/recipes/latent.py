"""Train latent diffusion (Rombach 2022, eq. 2-3): a UNet over the latents of a codec, told captions or classes.

>>> recipe = LatentRecipe(data={"path": "pictures", "size": 64}, codec="pixels")
>>> recipe.conditions["text"].kind, recipe.objective
('minilm', {})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato import models
from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats.diffusers import component_sha256
from sfumato.codecs import Moments
from sfumato.condition import Condition
from sfumato.conditioners.base import Combined, dropped
from sfumato.conditioners.clip import CLIPText
from sfumato.conditioners.joint import JointText, TextTransformerConfig
from sfumato.conditioners.minilm import MiniLM
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import WordVocabulary, spelling
from sfumato.diffusion.objective import Loss
from sfumato.errors import DataError, UserError
from sfumato.images import sheet, to_pil
from sfumato.networks.unet_2d import init_zero_outputs
from sfumato.systems import open_codec
from sfumato.systems.asked import Asked
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import PredictionConfig, SamplingConfig, ScheduleConfig, Strict, parse
from sfumato.systems.ddpm import objective_from
from sfumato.systems.exchange import holds_first_stage
from sfumato.systems.latent import LABEL, TEXT, Latent, LatentConfig
from sfumato.tasks.draw import draw
from sfumato.training import state
from sfumato.training.cache import LatentCache, TextCache, full_precision
from sfumato.training.captions import Captions
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet

PIXELS = "pixels"
_MEASURED = 256  # pictures that the scale of latents is measured on where they are not all encoded


class ConditionRecipe(Strict):
    """What the network is told, and from which column of the data.

    Attributes:
        kind: minilm (frozen, from its package), clip (frozen, from a folder in transformers' or diffusers' layout),
            joint (a transformer trained with the rest), label or embedded-label.
        column: of the data, for labels; None for `data.label`.
        captions: for text: templates over columns, of which one is drawn each time a picture is shown.
        dropout: share of pictures shown the null instead, for classifier-free guidance.
        folder: of clip.
        network: fields of `TextTransformerConfig`, for joint, less `vocab_size`.
        width: of embedded labels.
    """

    kind: Literal["minilm", "clip", "joint", "label", "embedded-label"]
    column: str | None = None
    captions: tuple[str, ...] = ("{text}",)
    dropout: float = Field(default=0.1, ge=0, le=1)
    folder: str | None = None
    network: dict[str, Any] = Field(default_factory=dict)
    width: int = Field(default=512, ge=1)

    @property
    def is_text(self) -> bool:
        """Whether it reads captions."""
        return self.kind in ("minilm", "clip", "joint")

    def outline(self) -> dict[str, Any]:
        """What a conditioner of this kind is built from, with one class or no word where the data decide."""
        if self.kind == "minilm":
            return MiniLM().describe()
        if self.kind == "clip":
            return CLIPText(Path(str(self.folder)), hasher=hashes.sha256).describe()
        if self.kind == "joint":
            return self.joint(WordVocabulary(())).describe()
        extra = {"width": self.width} if self.kind == "embedded-label" else {}
        return {"kind": self.kind, "names": ["any"]} | extra

    def joint(self, words: WordVocabulary) -> JointText:
        """The text transformer for these words, without weights. Raises `UserError` for unknown keys."""
        if "vocab_size" in self.network:
            raise UserError("vocab_size follows from the captions; leave it out")
        with torch.device("meta"):
            return JointText(words, TextTransformerConfig.from_dict({**self.network, "vocab_size": words.size}))


class LatentModelConfig(Strict):
    """The part of a model's config that a recipe chooses; size, codec and conditions come from elsewhere."""

    network: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleConfig = ScheduleConfig(name="scaled_linear")
    prediction: PredictionConfig = PredictionConfig()
    sampling: SamplingConfig = SamplingConfig(threshold="none")
    title: str = ""
    licence: str = ""
    source: str = ""


class LatentRecipe(Strict):
    """A whole run.

    Attributes:
        data: the pictures; taken from the codec's run where nothing else is said.
        codec: a first stage's run or model file, a name from the box, or "pixels" for none.
        conditions: by name; "text" is what prompts are for, "label" what labels are for.
        model: network, schedule, prediction, sampling defaults.
        objective: fields of `Objective`.
        train: how long, how large, how often.
    """

    recipe: Literal["latent"] = "latent"
    description: str = ""
    data: DataConfig
    codec: str
    conditions: dict[str, ConditionRecipe] = Field(default_factory=lambda: {TEXT: ConditionRecipe(kind="minilm")})
    model: LatentModelConfig = LatentModelConfig()
    objective: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()

    def task(self, data: PictureSet, validation: PictureSet | None) -> LatentTask:
        """What the trainer is given."""
        return LatentTask(self, data, validation)

    def check(self) -> None:
        """Refuse a codec that cannot be opened, a model or an objective that cannot be built. Raises `UserError`."""
        objective = objective_from(self.objective)
        for name, condition in self.conditions.items():
            if name == TEXT and not condition.is_text:
                raise UserError(f"conditions.text reads prompts, so it cannot be of kind {condition.kind!r}")
            if name == LABEL and condition.is_text:
                raise UserError(f"conditions.label is for classes, so it cannot be of kind {condition.kind!r}")
            if name not in (TEXT, LABEL):
                raise UserError(f"conditions.{name} is not known; there are: {TEXT}, {LABEL}")
            if (condition.kind == "clip") != (condition.folder is not None):
                raise UserError(f"conditions.{name}: clip and a folder belong together")
        stage = self.stage()
        if stage.config.channels != self.data.channels:
            raise UserError(f"the codec takes {stage.config.channels} channels, data.channels is {self.data.channels}")
        outlines = {name: condition.outline() for name, condition in self.conditions.items()}
        objective.check(Latent.create(self.model_for(stage, outlines), "meta").denoiser)

    def model_for(self, stage: CodecSystem, conditions: Mapping[str, Mapping[str, Any]]) -> LatentConfig:
        """The config of the model that this recipe trains; `conditions` is what its conditioners are built from."""
        values = self.model.model_dump() | {
            "size": self.data.size,
            "codec": stage.config.model_dump(),
            "conditions": dict(conditions),
            "objective": self.objective,
        }
        return parse(LatentConfig, values, "model")

    def stage(self) -> CodecSystem:
        """The codec, opened."""
        if self.codec == PIXELS:
            return CodecSystem.create(CodecConfig(kind="pixels", size=self.data.size, channels=self.data.channels))
        return open_codec(codec_file(self.codec))[0]


def codec_file(path: str) -> Path:
    """What a codec's name means: a model of the box, a run's finished model, else that file or diffusers folder itself.

    Raises:
        UserError: when the run is not finished, since the latents' scale is measured at the end.
    """
    if path in models.names():
        return models.weights(path)
    if not Path(path).is_dir() or holds_first_stage(path):
        return Path(path)
    if (Path(path) / state.AVERAGE).is_file():
        raise UserError(f"{path} is a checkpoint, whose latents are not measured yet; give the finished run")
    finished = Path(path) / state.MODEL
    if not finished.is_file():
        raise UserError(f"the codec's run {path} is not finished: it has no {state.MODEL}")
    return finished


class Together(nn.Module):
    """All that is trained, as one module whose call runs a function: what a data parallel wrapper needs to see."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class CachedText:
    """A text conditioner that looks the states of known captions up."""

    def __init__(self, conditioner: TextConditioner, cache: TextCache) -> None:
        self.conditioner, self.cache = conditioner, cache
        self.slots, self.network = conditioner.slots, None

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


class LatentTask:
    """The trainer's view of a latent diffusion run (see `sfumato.training.trainer.Task`)."""

    def __init__(self, recipe: LatentRecipe, data: PictureSet, validation: PictureSet | None) -> None:
        self.recipe, self.data, self.validation = recipe, data, validation
        self.objective = objective_from(recipe.objective)
        self.captions = {id(s): c for s in (data, validation) if s is not None and (c := self._captions(s))}
        self._leave_out_unreadable()
        stage = recipe.stage()
        torch.manual_seed(recipe.train.seed)
        conditions = {name: self._described(name, c) for name, c in recipe.conditions.items()}
        self.model = Latent.create(recipe.model_for(stage, conditions))
        self.model.codec = stage.codec
        self.objective.check(self.model.denoiser)
        self.history = self.objective.history(self.model.denoiser.schedule)
        unet = self.model.denoiser.network
        init_zero_outputs(unet)
        if recipe.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()  # type: ignore[operator]
        trained = {name: part for name, part in self.model.networks().items() if name != "codec"}
        self.network: nn.Module = Together(trained)
        self.through: nn.Module = self.network
        if stage.codec.network is not None:
            stage.codec.network.eval().requires_grad_(False)

    def _described(self, name: str, condition: ConditionRecipe) -> dict[str, Any]:
        """What a conditioner is built from, with what the data decide."""
        if condition.kind in ("minilm", "clip"):
            return condition.outline()
        if condition.kind == "joint":
            return self._joint(condition).describe()
        sets = [s for s in (self.data, self.validation) if s is not None]
        names = sorted({str(self._column(pictures, name, i)) for pictures in sets for i in range(len(pictures))})
        extra = {"width": condition.width} if condition.kind == "embedded-label" else {}
        return {"kind": condition.kind, "names": names} | extra

    def _column(self, pictures: PictureSet, name: str, index: int) -> Any:
        column = self.recipe.conditions[name].column or self.recipe.data.label
        if column is None:
            raise DataError(f"conditions.{name} has no column; give it one, or data.label")
        value = pictures.records[index].columns.get(column)
        if value is None:
            raise DataError(f"{pictures.records[index].key} in {self.recipe.data.path!r} has no {column!r}")
        return value

    def _captions(self, pictures: PictureSet) -> Captions | None:
        texts = [c for c in self.recipe.conditions.values() if c.is_text]
        return Captions(pictures, texts[0].captions) if texts else None

    def _leave_out_unreadable(self) -> None:
        """Captions that the frozen encoder cannot read are not trained on, and named."""
        if not any(c.kind == "minilm" for c in self.recipe.conditions.values()):
            return
        pieces = MiniLM().pieces
        _tell(text for captions in self.captions.values() for text in captions.leave_out(pieces.unreadable))

    def _vocabulary(self) -> WordVocabulary:
        """Words of the training captions; held-out captions with others are left out, and named."""
        words = WordVocabulary.from_texts(sorted(self.captions[id(self.data)].texts()))
        if self.validation is not None:
            held_out = self.captions[id(self.validation)]
            _tell(held_out.leave_out(lambda text: list(spelling(text, words.words)), pictures_too=True))
        return words

    def _joint(self, condition: ConditionRecipe) -> JointText:
        words = self._vocabulary()
        encoder = condition.joint(words)
        for text in sorted(set().union(*(captions.texts() for captions in self.captions.values()))):
            if (count := len(words.ids(text))) > encoder.max_tokens:
                raise UserError(
                    f"the caption {text!r} has {count} tokens; the text encoder reads at most {encoder.max_tokens} "
                    f"(conditions.{TEXT}.network.max_position_embeddings)"
                )
        return encoder

    def begin(self, step: int) -> None:
        """Nothing here depends on the step."""

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self.through = prepare(self.network)

    @cached_property
    def _latents(self) -> dict[int, LatentCache]:
        """Of both sets; empty where augmentation changes the pictures each time."""
        config, codec = self.data.config, self.model.codec
        if codec.network is None:
            return {}
        device = next(self.network.parameters()).device
        codec.network.to(device)
        found: dict[int, LatentCache] = {}
        if config.flip or config.random_crop:
            some = self._encoded(self.data.gather(range(min(_MEASURED, len(self.data)))), device)
            deviation = LatentCache(some.mean, some.std).deviation()
        else:
            path = codec_file(self.recipe.codec)
            weights = component_sha256(path) if path.is_dir() else hashes.sha256(path)
            sets = [s for s in (self.data, self.validation) if s is not None]
            found = {id(s): LatentCache.of(s, codec, weights, device, print) for s in sets}
            deviation = found[id(self.data)].deviation()
        CodecSystem(self.model.config.codec, codec).check_scale(deviation, f"the codec {self.recipe.codec}")
        return found

    @cached_property
    def _conditioner(self) -> Combined | None:
        """The model's own, with the states of all captions at hand where the encoder is frozen."""
        own = self.model.conditioner
        if own is None:
            return None
        parts = dict(own.parts)
        text = parts.get(TEXT)
        if isinstance(text, TextConditioner) and text.network is None:
            texts = set().union(*(captions.texts() for captions in self.captions.values()))
            parts[TEXT] = CachedText(text, TextCache.of(sorted(texts), text, print))
        return Combined(parts)

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        training = self.network.training
        pictures = self.data if training else self.validation
        assert pictures is not None
        x0 = self._moments(pictures, batch, device).sample(generator).to(device)
        entries = self._entries(pictures, batch.indices.tolist(), generator, training)
        gone = {name: self._dropped(name, len(x0), generator, training) for name in self.recipe.conditions}
        history = self.history if training else None  # validation's levels never move

        def measure() -> Loss:
            condition = self._condition(entries, gone, device)
            return self.objective(self.model.denoiser, x0, condition, generator=generator, history=history)

        loss: Loss = (self.through if training else self.network)(measure)
        return loss

    def _moments(self, pictures: PictureSet, batch: Batch, device: torch.device) -> Moments:
        if (cache := self._latents.get(id(pictures))) is not None:
            return cache.rows(batch.indices)
        return self._encoded(batch, device)

    @torch.no_grad()
    def _encoded(self, batch: Batch, device: torch.device) -> Moments:
        with full_precision():
            return self.model.codec.encode(batch.to_float().to(device))

    def _entries(
        self, pictures: PictureSet, indices: Sequence[int], generator: torch.Generator, training: bool
    ) -> list[dict[str, Any]]:
        """What each picture of a batch is told."""
        entries: list[dict[str, Any]] = [{} for _ in indices]
        for name, condition in self.recipe.conditions.items():
            if condition.is_text:
                captions = self.captions[id(pictures)]
                said = captions.drawn(indices, generator) if training else [captions.first(i) for i in indices]
            else:
                said = [str(self._column(pictures, name, i)) for i in indices]
            for entry, value in zip(entries, said, strict=True):
                entry[name] = value
        return entries

    def _dropped(self, name: str, count: int, generator: torch.Generator, training: bool) -> Tensor:
        if not training:
            return torch.zeros(count, dtype=torch.bool)
        return torch.rand(count, generator=generator) < self.recipe.conditions[name].dropout

    def _condition(
        self, entries: Sequence[Mapping[str, Any]], gone: Mapping[str, Tensor], device: torch.device
    ) -> Condition:
        """The condition of a batch, with the null of each conditioner where its share falls out."""
        if self._conditioner is None:
            return Condition()
        slots: dict[str, Any] = {}
        for name, part in self._conditioner.parts.items():
            own = part.encode([entry[name] for entry in entries])
            if bool(gone[name].any()):
                own = dropped(own, part.null(len(entries)), gone[name])
            slots |= {slot: getattr(own, slot) for slot in part.slots}
        return Condition(**slots).to(device, torch.float32)

    def draw(self, count: int, steps: int) -> Image.Image:
        """Held-out captions or classes in turn, fixed seeds."""
        pictures = self.validation or self.data
        stride = max(1, len(pictures) // count)
        chosen = [(i * stride) % len(pictures) for i in range(count)]
        told = self._entries(pictures, chosen, torch.Generator(), training=False)
        asked = [Asked(prompt=one.get(TEXT), label=one.get(LABEL)) for one in told]
        drawn = draw(self.model, seeds=range(count), asked=asked, steps=steps)
        words = [one.prompt or str(one.label or "") for one in asked]
        return sheet(to_pil(drawn.cpu()), labels=words, scale=max(1, 96 // self.recipe.data.size))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        network = self.model.codec.network
        codec = {f"codec.{n}": t for n, t in network.state_dict().items()} if network is not None else {}
        return weights | codec

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("codec.")}

    def model_config(self) -> dict[str, Any]:
        return self.model.config.model_dump(mode="json")

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(dict(weights)), self.model_config()
