"""Recipe `ddpm`: train a pixel-space diffusion model on a set of pictures, with or without class labels.

>>> DDPMRecipe.model_validate({"recipe": "ddpm", "data": {"path": ".", "size": 8}}).train.batch
64
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato.diffusion.objective import Loss
from sfumato.errors import UserError
from sfumato.images import sheet, to_pil
from sfumato.networks.unet_2d import UNet2DModel, init_zero_outputs
from sfumato.systems.asked import Asked
from sfumato.systems.config import PredictionConfig, SamplingConfig, ScheduleConfig, Strict, parse
from sfumato.systems.ddpm import DDPM, DDPMConfig, objective_from
from sfumato.tasks.draw import draw
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet
from sfumato.training.recipes.checks import refuse_idle, refuse_steps

_DROPOUT = 0.1


class DDPMModelConfig(Strict):
    """The part of a model's config that a recipe chooses; size, channels and labels come from the data."""

    network: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: PredictionConfig = PredictionConfig()
    sampling: SamplingConfig = SamplingConfig()
    title: str = ""
    licence: str = ""
    source: str = ""


class DDPMRecipe(Strict):
    """A whole run.

    Attributes:
        data: the pictures; with `data.label` the model learns that column's classes.
        model: network, schedule, prediction, sampling defaults.
        objective: fields of `Objective`.
        label_dropout: share of pictures shown with the null class instead of their own, for classifier-free guidance.
        train: how long, how large, how often.
    """

    recipe: Literal["ddpm"] = "ddpm"
    description: str = ""
    data: DataConfig
    model: DDPMModelConfig = DDPMModelConfig()
    objective: dict[str, Any] = Field(default_factory=dict)
    label_dropout: float = Field(default=_DROPOUT, ge=0, le=1)
    train: TrainConfig = TrainConfig()

    def task(self, data: PictureSet, validation: PictureSet | None) -> DDPMTask:
        """What the trainer is given."""
        return DDPMTask(self, data, validation)

    def check(self) -> None:
        """Refuse a model or an objective that cannot be built; no weights are made. Raises `UserError`."""
        if self.data.label is None:
            self._refuse_what_needs_classes()
        model = DDPM.create(self.model_for(()), "meta")
        objective_from(self.objective).check(model.denoiser)
        refuse_idle(self.objective, self.model.prediction, self.model.schedule)
        refuse_steps(model, self.train)

    def _refuse_what_needs_classes(self) -> None:
        """Raise `UserError` for settings that would do nothing without classes."""
        guidance = self.model.sampling.guidance
        for name, idle in (
            ("label_dropout", self.label_dropout == _DROPOUT),
            ("model.sampling.guidance", guidance == SamplingConfig().guidance),
        ):
            if not idle:
                raise UserError(f"{name} is for classes, but there are none; name their column in data.label")

    def model_for(self, labels: Sequence[str]) -> DDPMConfig:
        """The config of the model that this recipe trains on data with these classes."""
        own = {
            "size": self.data.size,
            "channels": self.data.channels,
            "labels": tuple(labels),
            "objective": self.objective,
        }
        return parse(DDPMConfig, own | self.model.model_dump(), "model")


class DDPMTask:
    """The trainer's view of a DDPM run (see `sfumato.training.trainer.Task`)."""

    def __init__(self, recipe: DDPMRecipe, data: PictureSet, validation: PictureSet | None) -> None:
        self.recipe, self.data, self.validation = recipe, data, validation
        self.objective = objective_from(recipe.objective)
        torch.manual_seed(recipe.train.seed)
        self.model = DDPM.create(recipe.model_for(data.labels))
        self.objective.check(self.model.denoiser)
        self.history = self.objective.history(self.model.denoiser.schedule)
        self.network: nn.Module = self.model.denoiser.network
        self.denoises = self.network
        init_zero_outputs(self.model.denoiser.network)
        if recipe.train.gradient_checkpointing:
            cast(UNet2DModel, self.network).enable_gradient_checkpointing()

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self.model.denoiser.network = prepare(self.network)

    def begin(self, step: int) -> None:
        """Nothing here depends on the step."""

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        x0 = batch.to_float().to(device)
        labels: list[int | None] = [None] * len(x0)
        if batch.labels is not None:
            dropped = torch.rand(len(x0), generator=generator) < self.recipe.label_dropout
            labels = [None if d else int(i) for i, d in zip(batch.labels, dropped, strict=True)]
        condition = self.model.condition(labels).to(device, torch.float32)
        history = self.history if self.network.training else None  # validation's levels never move
        return self.objective(self.model.denoiser, x0, condition, generator=generator, history=history)

    def draw(self, count: int, steps: int) -> Image.Image:
        names = self.model.config.labels
        labels = [names[i % len(names)] for i in range(count)] if names else None
        asked = [Asked(label=label) for label in labels] if labels else None
        pictures = draw(self.model, seeds=range(count), asked=asked, steps=steps)
        return sheet(to_pil(pictures.cpu()), labels=labels, scale=max(1, 96 // self.recipe.data.size))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"network.{name}": tensor for name, tensor in weights.items()}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("network."): tensor for name, tensor in tensors.items()}

    def model_config(self) -> dict[str, Any]:
        return self.model.config.model_dump(mode="json")

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(dict(weights)), self.model_config()
