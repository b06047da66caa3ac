"""Train latent diffusion (Rombach 2022, eq. 2-3): a UNet over the latents of a codec, told captions or classes.

>>> recipe = LatentRecipe(data={"path": "pictures", "size": 64}, codec="pixels")
>>> recipe.conditions["text"].kind, recipe.objective
('minilm', {})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats.diffusers import component_sha256
from sfumato.codecs import Moments
from sfumato.condition import Condition
from sfumato.conditioners.base import Combined
from sfumato.conditioners.shown import LowResolution
from sfumato.diffusion.objective import Loss
from sfumato.errors import UserError
from sfumato.images import sheet, to_pil
from sfumato.networks.unet_2d import init_zero_outputs
from sfumato.systems import open_codec
from sfumato.systems.asked import Asked
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import PredictionConfig, SamplingConfig, ScheduleConfig, Strict, parse
from sfumato.systems.ddpm import objective_from
from sfumato.systems.latent import LABEL, TEXT, Latent, LatentConfig
from sfumato.tasks.draw import draw
from sfumato.training.cache import LatentCache, full_precision
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet
from sfumato.training.first_stage import codec_file
from sfumato.training.recipes.checks import refuse_idle, refuse_steps
from sfumato.training.recipes.conditions import ConditionRecipe, Frame, Seen, described, kinds_of

PIXELS = "pixels"
_MEASURED = 256  # pictures that the scale of latents is measured on where they are not all encoded


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
        conditions: by name, each of a kind (`training.recipes.conditions`), in any combination and order.
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
        kinds = kinds_of(self.conditions)
        if self.data.label is not None and not any(kind.reads == LABEL for kind in kinds.values()):
            raise UserError(
                f"no condition reads the classes of data.label={self.data.label}; say conditions.label.kind=label, "
                "or data.label=null"
            )
        stage = self.stage()
        if stage.config.channels != self.data.channels:
            raise UserError(f"the codec takes {stage.config.channels} channels, data.channels is {self.data.channels}")
        outlines = described(kinds, self.frame(stage), None)
        model = Latent.create(self.model_for(stage, outlines), "meta")
        objective.check(model.denoiser)
        refuse_idle(self.objective, self.model.prediction, self.model.schedule)
        refuse_steps(model, self.train)

    def model_for(self, stage: CodecSystem, conditions: Mapping[str, Mapping[str, Any]]) -> LatentConfig:
        """The config of the model that this recipe trains; `conditions` is what its conditioners are built from."""
        values = self.model.model_dump() | {
            "size": self.data.size,
            "codec": stage.config.model_dump(),
            "conditions": dict(conditions),
            "objective": self.objective,
        }
        return parse(LatentConfig, values, "model")

    def frame(self, stage: CodecSystem) -> Frame:
        """What conditioners follow from."""
        return Frame(stage.codec.factor, stage.codec.channels, self.data.size)

    def stage(self) -> CodecSystem:
        """The codec, opened."""
        if self.codec == PIXELS:
            return CodecSystem.create(CodecConfig(kind="pixels", size=self.data.size, channels=self.data.channels))
        return open_codec(codec_file(self.codec))[0]


class Together(nn.Module):
    """All that is trained, as one module whose call runs a function: what a data parallel wrapper needs to see."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class LatentTask:
    """The trainer's view of a latent diffusion run (see `sfumato.training.trainer.Task`)."""

    def __init__(self, recipe: LatentRecipe, data: PictureSet, validation: PictureSet | None) -> None:
        self.recipe, self.data, self.validation = recipe, data, validation
        self.objective = objective_from(recipe.objective)
        self.sets = [pictures for pictures in (data, validation) if pictures is not None]
        self.kinds = kinds_of(recipe.conditions)
        for kind in self.kinds.values():
            kind.prepare(self.sets)
        stage = recipe.stage()
        torch.manual_seed(recipe.train.seed)
        conditions = described(self.kinds, recipe.frame(stage), self.sets)
        self.model = Latent.create(recipe.model_for(stage, conditions))
        self.model.codec = stage.codec
        self.objective.check(self.model.denoiser)
        self.history = self.objective.history(self.model.denoiser.schedule)
        unet = self.denoises = self.model.denoiser.network
        init_zero_outputs(unet)
        if recipe.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()  # type: ignore[operator]
        trained = {name: part for name, part in self.model.networks().items() if name != "codec"}
        self.network: nn.Module = Together(trained)
        self.through: nn.Module = self.network
        if stage.codec.network is not None:
            stage.codec.network.eval().requires_grad_(False)

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
            found = {id(s): LatentCache.of(s, codec, weights, device, print) for s in self.sets}
            deviation = found[id(self.data)].deviation()
        CodecSystem(self.model.config.codec, codec).check_scale(deviation, f"the codec {self.recipe.codec}")
        return found

    @cached_property
    def _conditioner(self) -> Combined | None:
        """The model's own, with what frozen encoders make of the data at hand."""
        own = self.model.conditioner
        if own is None:
            return None
        return Combined({name: self.kinds[name].cached(part) for name, part in own.parts.items()})

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        training = self.network.training
        pictures = self.data if training else self.validation
        assert pictures is not None
        x0 = self._moments(pictures, batch, device).sample(generator).to(device)
        told = self._entries(pictures, batch, generator, training, device)
        entries = self._kept(told, generator, training)
        x0 = self._lacking(x0, told)
        history = self.history if training else None  # validation's levels never move

        def measure() -> Loss:
            condition = self._condition(entries, device)
            return self.objective(self.model.denoiser, x0, condition, generator=generator, history=history)

        loss: Loss = (self.through if training else self.network)(measure)
        return loss

    def _lacking(self, x0: Tensor, entries: Sequence[Mapping[str, Any]]) -> Tensor:
        """What is learnt of latents: all of them, or what a small picture lacks of them."""
        for name, part in self.model.shown.items():
            if isinstance(part, LowResolution):
                x0 = part.lacking(x0, torch.stack([entry[name][0] for entry in entries]).to(x0))
        return x0

    def _moments(self, pictures: PictureSet, batch: Batch, device: torch.device) -> Moments:
        if (cache := self._latents.get(id(pictures))) is not None:
            return cache.rows(batch.indices)
        return self._encoded(batch, device)

    @torch.no_grad()
    def _encoded(self, batch: Batch, device: torch.device) -> Moments:
        with full_precision():
            return self.model.codec.encode(batch.to_float().to(device))

    def _entries(
        self, pictures: PictureSet, batch: Batch, generator: torch.Generator, training: bool, device: torch.device
    ) -> list[dict[str, Any]]:
        """What each picture of a batch is told."""

        def latents(images: Tensor) -> Tensor:
            with full_precision(), torch.no_grad():
                return self.model.codec.encode(images.to(device)).mean

        seen = Seen(pictures, batch, generator, training, device, latents, self.model.denoiser.schedule)
        told = {name: kind.inputs(seen) for name, kind in self.kinds.items()}
        return [{name: values[i] for name, values in told.items()} for i in range(len(batch.indices))]

    def _kept(
        self, entries: Sequence[dict[str, Any]], generator: torch.Generator, training: bool
    ) -> list[dict[str, Any]]:
        """The entries without what is dropped, each condition for itself; validation drops nothing."""
        if not training:
            return list(entries)
        kept: list[dict[str, Any]] = [{} for _ in entries]
        for name, kind in self.kinds.items():
            for i, u in enumerate(torch.rand(len(entries), generator=generator).tolist()):
                if u >= kind.recipe.dropout:
                    kept[i][name] = entries[i][name]
        return kept

    def _condition(self, entries: Sequence[Mapping[str, Any]], device: torch.device) -> Condition:
        """The condition of a batch, with the null of each conditioner where its share fell out."""
        if self._conditioner is None:
            return Condition()
        return self._conditioner.encode(entries).to(device, torch.float32)

    def draw(self, count: int, steps: int) -> Image.Image:
        """Held-out captions or classes in turn, fixed seeds."""
        pictures = self.validation or self.data
        stride = max(1, len(pictures) // count)
        chosen = [(i * stride) % len(pictures) for i in range(count)]
        device = next(self.network.parameters()).device
        told = self._entries(pictures, pictures.gather(chosen), torch.Generator().manual_seed(0), False, device)
        asked = [Asked.of({k.reads: one[n] for n, k in self.kinds.items() if k.reads}) for one in told]
        shown = {name: [one[name] for one in told] for name, kind in self.kinds.items() if not kind.reads}
        drawn = draw(self.model, seeds=range(count), asked=asked, steps=steps, shown=shown)
        words = [one.prompt or str(one.label or "") for one in asked]
        return sheet(to_pil(drawn.cpu()), labels=words, scale=max(1, 96 // self.recipe.data.size))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        network = self.model.codec.network
        codec = {f"codec.{n}": t for n, t in network.state_dict().items()} if network is not None else {}
        return weights | codec

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, own in self.tensors({}).items():
            if name not in tensors or not torch.equal(tensors[name].to(own), own):
                raise UserError(f"the checkpoint is of another codec than {self.recipe.codec}; choose another folder")
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("codec.")}

    def model_config(self) -> dict[str, Any]:
        return self.model.config.model_dump(mode="json")

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(dict(weights)), self.model_config()
