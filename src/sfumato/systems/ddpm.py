"""DDPM and its heirs in pixel space: one UNet, unconditional or with class labels.

The typed config says everything that a checkpoint must remember: size, labels, network, schedule, what is predicted,
the objective it was trained with, and how to sample it by default.

>>> config = DDPMConfig(size=8, network={"block_out_channels": [32], "down_block_types": ["DownBlock2D"],
...                                      "up_block_types": ["UpBlock2D"], "layers_per_block": 1})
>>> DDPM.create(config).shape
(3, 8, 8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from torch import Tensor, nn

from sfumato.checkpoints.io import check_fit, component, load_strictly
from sfumato.codecs import Codec, Moments, PixelCodec
from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.errors import UserError, raise_unknown
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.systems.asked import Asked
from sfumato.systems.config import (
    PredictionConfig,
    SamplingConfig,
    ScheduleConfig,
    Strict,
    build_denoiser,
    parse,
    sentence,
    without_derived,
)
from sfumato.systems.scheduler_config import from_diffusers

_DERIVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")


class DDPMConfig(Strict):
    """Everything a pixel-space diffusion model needs to be built and sampled.

    Attributes:
        size: width and height of the pictures in pixels.
        channels: 3 for RGB, 1 for grey.
        labels: names of the classes, in the order of their ids; empty for an unconditional model. One more id, the
            last, is the null class of classifier-free guidance.
        network: fields of `UNet2DConfig`, less those that follow from the rest.
        schedule, prediction, sampling: see there.
        objective: what it was trained with (fields of `Objective`).
        title, licence, source: what a person should know of a shipped model; may be empty.
    """

    system: Literal["ddpm"] = "ddpm"
    size: int = Field(ge=4, le=4096)
    channels: Literal[1, 3] = 3
    labels: tuple[str, ...] = ()
    network: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: PredictionConfig = PredictionConfig()
    sampling: SamplingConfig = SamplingConfig()
    objective: dict[str, Any] = Field(default_factory=dict)
    title: str = ""
    licence: str = ""
    source: str = ""

    @field_validator("network")
    @classmethod
    def _known_network_fields(cls, network: dict[str, Any]) -> dict[str, Any]:
        without_derived(network, _DERIVED, "size, channels, labels and prediction")
        try:
            UNet2DConfig.from_dict(network)
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"a value is of the wrong type or zero ({error})") from None
        return network

    def unet(self) -> UNet2DConfig:
        """The network's own config with what follows from the rest filled in."""
        return UNet2DConfig.from_dict(
            {
                **self.network,
                "sample_size": self.size,
                "in_channels": self.channels * (2 if self.prediction.self_condition else 1),
                "out_channels": self.channels * (2 if self.prediction.learned_variance else 1),
                "num_class_embeds": len(self.labels) + 1 if self.labels else None,
            }
        )


class DDPM:
    """A pixel-space diffusion model: config and denoiser.

    Attributes:
        config: as stored in its checkpoint.
        denoiser: the network with schedule and prediction.
    """

    kind = "ddpm"

    def __init__(self, config: DDPMConfig, denoiser: Denoiser) -> None:
        self.config, self.denoiser = config, denoiser

    @classmethod
    def create(cls, config: DDPMConfig, device: str = "cpu") -> DDPM:
        """A new model with freshly initialised weights (from torch's global generator), or none on "meta"."""
        unet = lambda: UNet2DModel(config.unet())  # noqa: E731
        return cls(config, build_denoiser(unet, config.schedule, config.prediction, device))

    @classmethod
    def load(cls, config: DDPMConfig, tensors: Mapping[str, Tensor], *, what: str) -> DDPM:
        """A model with stored weights (names `network.…`), in float32; a misfit raises `ModelFileError`."""
        model, own = cls.create(config, "meta"), component(tensors, "network")
        check_fit(model.denoiser.network, own, what=what)
        model.denoiser.network.to_empty(device="cpu")
        load_strictly(model.denoiser.network, own, what=what)
        model.denoiser.network.eval()
        return model

    def networks(self) -> dict[str, nn.Module]:
        """Everything that has weights of its own, under the names of a file."""
        return {"network": self.denoiser.network}

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names they are stored by."""
        return {f"network.{name}": t for name, t in self.denoiser.network.state_dict().items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture."""
        return (self.config.channels, self.config.size, self.config.size)

    @property
    def null_label(self) -> int:
        """The id of the null class."""
        return len(self.config.labels)

    @property
    def codec(self) -> Codec:
        """Pictures are their own latents."""
        return PixelCodec(self.config.channels)

    def pictures(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        """What was drawn is the pictures themselves."""
        return x

    def needs_tiles(self, width: int, height: int) -> bool:
        """There is nothing to decode."""
        return False

    def shape_of(self, width: int, height: int) -> tuple[int, int, int]:
        """Its own shape, whatever is asked: this network draws one size."""
        return self.shape

    @property
    def reads(self) -> frozenset[str]:
        """What a user may say to it: "label", or nothing."""
        return frozenset({"label"} if self.config.labels else ())

    def encode(self, pictures: Tensor, *, tiled: bool = False) -> Moments:
        """Pictures are their own latents."""
        return Moments(pictures, None)

    def check_words(self, asked: Sequence[Asked]) -> None:
        """Refuse labels that it does not know."""
        self.conditions(asked)

    def conditions(
        self, asked: Sequence[Asked], shown: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[Condition, Condition]:
        """What the pictures are to be, and the null. Raises `UserError` for labels that it does not know, and for
        anything shown."""
        if shown:
            raise UserError("this model is shown nothing beside its picture")
        return self.condition([one.label for one in asked]), self.condition([None] * len(asked))

    def condition(self, labels: Sequence[str | int | None]) -> Condition:
        """The condition for one label per picture: a name, an id, or None for the null class.

        Raises:
            UserError: for labels on an unconditional model, or an unknown one (the labels are listed).
        """
        if not self.config.labels:
            if any(label is not None for label in labels):
                raise UserError("this model has no class labels; leave --label out")
            return Condition()
        return Condition(labels=torch.tensor([self._label_id(label) for label in labels], dtype=torch.int64))

    def _label_id(self, label: str | int | None) -> int:
        names = self.config.labels
        if label is None:
            return self.null_label
        if isinstance(label, int):
            if not 0 <= label <= self.null_label:
                raise UserError(f"label {label} is outside 0 … {self.null_label}")
            return label
        folded = [name.casefold() for name in names]
        if label.casefold() not in folded:
            raise_unknown("label", label, names)
        return folded.index(label.casefold())

    def objective(self) -> Objective:
        """The objective that the config names."""
        return objective_from(self.config.objective)


def objective_from(values: Mapping[str, Any]) -> Objective:
    """An `Objective` from config values; an unknown key is refused with the nearest, a wrong value by name."""
    known = asdict(Objective())
    for key in values:
        if key not in known:
            raise_unknown("objective key", key, known)
    try:
        return TypeAdapter(Objective).validate_python(dict(values))
    except ValidationError as error:
        raise UserError(f"objective: {sentence(Objective, error)}") from None


def config_from_diffusers(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> DDPMConfig:
    """What a `DDPMPipeline` or `DDIMPipeline` folder means: the configs of its UNet and its scheduler.

    Raises:
        UserError: for a scheduler setting that has no counterpart here.
    """
    try:
        network = UNet2DConfig.from_dict(unet)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"a value of the UNet's config is of the wrong type or zero ({error})") from None
    size = network.sample_size
    if not isinstance(size, int) or network.in_channels not in (1, 3):
        raise UserError("only square pixel-space models with 1 or 3 channels can be opened as DDPM")
    meaning = from_diffusers(scheduler)
    values = {
        "size": size,
        "channels": network.in_channels,
        "labels": tuple(str(i) for i in range((network.num_class_embeds or 0) - 1)),
        "network": {k: v for k, v in network.to_dict().items() if k not in _DERIVED},
        "schedule": meaning.schedule,
        "prediction": meaning.prediction.model_copy(
            update={"learned_variance": network.out_channels == 2 * network.in_channels}
        ),
        "sampling": meaning.sampling,
    }
    return parse(DDPMConfig, values, "the UNet's and the scheduler's config")
