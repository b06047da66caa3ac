"""Latent diffusion (Rombach 2022): a codec, a UNet over its latents, and conditioners for what a user says.

>>> tiny = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
...         "norm_num_groups": 4, "layers_per_block": 1}
>>> model = Latent.create(LatentConfig(size=8, codec={"kind": "pixels", "size": 8}, network=tiny))
>>> model.shape, model.pictures(torch.zeros(1, 3, 8, 8)).shape
((3, 8, 8), torch.Size([1, 3, 8, 8]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sfumato.checkpoints import hashes
from sfumato.checkpoints.io import check_fit, component, load_strictly
from sfumato.codecs import Codec
from sfumato.condition import Condition
from sfumato.conditioners.base import Combined, Conditioner
from sfumato.conditioners.label import LabelConditioner
from sfumato.conditioners.registry import from_config
from sfumato.diffusion.denoiser import Denoiser
from sfumato.errors import UserError
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
from sfumato.systems.asked import Asked
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import (
    PredictionConfig,
    SamplingConfig,
    ScheduleConfig,
    Strict,
    build_denoiser,
    without_derived,
)

_DERIVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim")
TEXT, LABEL = "text", "label"  # the conditions that a prompt and a label are for


class LatentConfig(Strict):
    """Everything a latent diffusion model needs to be built and sampled.

    Attributes:
        size: width and height of the pictures that it learnt, in pixels.
        codec: of the first stage, whose weights are in the same file.
        conditions: by name, what its conditioners are built from ("text" reads prompts, "label" labels).
        network: fields of `UNet2DConditionConfig` where a condition is attended to, else of `UNet2DConfig`; less those
            that follow from the rest.
        schedule, prediction, sampling: see there.
        objective: what it was trained with (fields of `Objective`).
        title, licence, source: what a person should know of a shipped model; may be empty.
    """

    system: Literal["latent"] = "latent"
    size: int = Field(ge=4, le=4096)
    codec: CodecConfig
    conditions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    network: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleConfig = ScheduleConfig(name="scaled_linear")
    prediction: PredictionConfig = PredictionConfig()
    sampling: SamplingConfig = SamplingConfig(threshold="none")
    objective: dict[str, Any] = Field(default_factory=dict)
    title: str = ""
    licence: str = ""
    source: str = ""

    @field_validator("network")
    @classmethod
    def _nothing_that_follows(cls, network: dict[str, Any]) -> dict[str, Any]:
        return without_derived(network, _DERIVED, "the codec, the conditions and prediction")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes it knows; empty if it has none."""
        return tuple(self.conditions.get(LABEL, {}).get("names", ()))

    def unet(self, codec: Codec, conditioner: Combined | None) -> UNet2DConfig | UNet2DConditionConfig:
        """The network's own config with what follows from the rest filled in."""
        prediction, slots = self.prediction, conditioner.slots if conditioner is not None else frozenset()
        values = {
            **self.network,
            "sample_size": self.size // codec.factor,
            "in_channels": codec.channels * (2 if prediction.self_condition else 1),
            "out_channels": codec.channels * (2 if prediction.learned_variance else 1),
        }
        if "labels" in slots:
            values["num_class_embeds"] = len(self.labels) + 1
        if conditioner is None or "context" not in slots:
            return UNet2DConfig.from_dict(values)
        return UNet2DConditionConfig.from_dict({**values, "cross_attention_dim": context_width(conditioner)})


class Latent:
    """A latent diffusion model.

    Attributes:
        config: as stored in its file.
        denoiser: the network with schedule and prediction, over latents.
        codec: pictures to latents and back.
        conditioner: all conditions as one; None for an unconditional model.
    """

    kind = "latent"

    def __init__(
        self, config: LatentConfig, denoiser: Denoiser, codec: Codec, conditioner: Combined | None
    ) -> None:
        self.config, self.denoiser, self.codec, self.conditioner = config, denoiser, codec, conditioner

    @classmethod
    def create(cls, config: LatentConfig, device: str = "cpu") -> Latent:
        """A new model with freshly initialised weights (from torch's global generator), or none on "meta"."""
        codec = CodecSystem.create(config.codec, device).codec
        if config.size % codec.factor:
            raise UserError(f"size {config.size} is not a multiple of the codec's factor {codec.factor}")
        with torch.device(device):
            conditioner = combined(config.conditions)

        def network() -> nn.Module:
            own = config.unet(codec, conditioner)
            return UNet2DModel(own) if isinstance(own, UNet2DConfig) else UNet2DConditionModel(own)

        denoiser = build_denoiser(network, config.schedule, config.prediction, device)
        return cls(config, denoiser, codec, conditioner)

    @classmethod
    def load(cls, config: LatentConfig, tensors: Mapping[str, Tensor], *, what: str) -> Latent:
        """A model with stored weights (names `network.…`, `codec.…`, `conditioner.…`), in float32.

        Raises:
            ModelFileError: when they do not fit the config.
        """
        model = cls.create(config, "meta")
        for name, network in model.networks().items():
            own = component(tensors, name)
            check_fit(network, own, what=what)
            network.to_empty(device="cpu")
            load_strictly(network, own, what=what)
            network.eval()
        return model

    def networks(self) -> dict[str, nn.Module]:
        """Everything that has weights of its own, under the names of a file."""
        conditioner = self.conditioner.network if self.conditioner is not None else None
        parts = {"network": self.denoiser.network, "codec": self.codec.network, "conditioner": conditioner}
        return {name: part for name, part in parts.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names they are stored by."""
        return {f"{part}.{n}": t for part, network in self.networks().items() for n, t in network.state_dict().items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture of its own size."""
        return self.shape_of(self.config.size, self.config.size)

    def shape_of(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents that hold a picture of this size: as many more as the network's halvings need."""
        unit = 2 ** (len(self.denoiser_config.block_out_channels) - 1)
        h, w = (-(-side // (self.codec.factor * unit)) * unit for side in (height, width))
        return self.codec.channels, h, w

    @property
    def denoiser_config(self) -> UNet2DConfig | UNet2DConditionConfig:
        """The config of the network over latents."""
        network = self.denoiser.network
        assert isinstance(network, UNet2DModel | UNet2DConditionModel)
        return network.config

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures in about [-1, 1], float32."""
        network = self.codec.network
        x = latents if network is None else latents.to(next(network.parameters()).dtype)
        return self.codec.decode(x).float()

    @property
    def reads(self) -> frozenset[str]:
        """What a user may say to it: "text", "label"."""
        return frozenset(self.config.conditions)

    def conditions(self, asked: Sequence[Asked]) -> tuple[Condition, Condition]:
        """What the pictures are to be, and what guidance leads away from: the null, or what they are not to be.

        Raises:
            UserError: for what the model cannot read.
        """
        if self.conditioner is None:
            return Condition(), Condition()
        wanted, unwanted = [], []
        for one in asked:
            said = {TEXT: one.prompt, LABEL: one.label}
            wanted.append({name: value for name, value in said.items() if value is not None})
            unwanted.append({TEXT: one.negative} if one.negative is not None else {})
        return self.conditioner.encode(wanted), self.conditioner.encode(unwanted)


def combined(conditions: Mapping[str, Mapping[str, Any]]) -> Combined | None:
    """The conditioners of a config as one, None if there are none."""
    if not conditions:
        return None
    parts: dict[str, Conditioner] = {}
    for name, values in conditions.items():
        try:
            parts[name] = from_config(values, find=hashes.find, hasher=hashes.sha256)
        except UserError as error:
            raise type(error)(f"conditions.{name}: {error}") from None
    if LABEL in parts and not isinstance(parts[LABEL], LabelConditioner) and "labels" in parts[LABEL].slots:
        raise UserError(f"conditions.{LABEL} must be of kind 'label'")
    return Combined(parts)


def context_width(conditioner: Combined) -> int:
    """Width of what the network attends to."""
    for part in conditioner.parts.values():
        if "context" in part.slots:
            return int(part.width)  # type: ignore[attr-defined]
    raise UserError("no condition is attended to, so there is no width")
