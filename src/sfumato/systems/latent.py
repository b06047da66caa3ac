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

from sfumato.backends import offload
from sfumato.backends.devices import free_host_bytes
from sfumato.checkpoints import hashes
from sfumato.checkpoints.io import Wanted, component, take_over
from sfumato.codecs import Codec, Moments
from sfumato.codecs.tiles import decode_tiled, encode_tiled, needs_tiles
from sfumato.condition import Condition
from sfumato.conditioners.base import Combined, Conditioner
from sfumato.conditioners.clip_prompt import ClipPrompt, Prompt
from sfumato.conditioners.label import EmbeddedLabel, LabelConditioner
from sfumato.conditioners.registry import from_config
from sfumato.conditioners.shown import LowResolution, Shown
from sfumato.diffusion.denoiser import Denoiser
from sfumato.errors import UserError
from sfumato.networks.outline import made_on
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
ALONE = 2**16  # pixels from which pictures are decoded one by one
TEXT, LABEL = "text", "label"  # what a prompt and a label are read by


class LatentConfig(Strict):
    """Everything a latent diffusion model needs to be built and sampled.

    Attributes:
        size: width and height of the pictures that it learnt, in pixels.
        codec: of the first stage, whose weights are in the same file.
        conditions: by name, what its conditioners are built from; the kind says what of a user's words each reads.
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
        kinds = (LabelConditioner.kind, EmbeddedLabel.kind)
        return next((tuple(c["names"]) for c in self.conditions.values() if c.get("kind") in kinds), ())

    def unet(self, codec: Codec, conditioner: Combined | None) -> UNet2DConfig | UNet2DConditionConfig:
        """The network's own config with what follows from the rest filled in."""
        prediction, slots = self.prediction, conditioner.slots if conditioner is not None else frozenset()
        values = {
            **self.network,
            "sample_size": self.size // codec.factor,
            "in_channels": codec.channels * (2 if prediction.self_condition else 1)
            + (conditioner.channels if conditioner is not None else 0),
            "out_channels": codec.channels * (2 if prediction.learned_variance else 1),
        }
        if "labels" in slots:
            values["num_class_embeds"] = classes(conditioner) or len(self.labels) + 1
        if conditioner is None or conditioner.width is None:
            return UNet2DConfig.from_dict(values)
        return UNet2DConditionConfig.from_dict({**values, "cross_attention_dim": conditioner.width})


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
        with made_on(device):
            conditioner = combined(config.conditions)

        def network() -> nn.Module:
            own = config.unet(codec, conditioner)
            return UNet2DModel(own) if isinstance(own, UNet2DConfig) else UNet2DConditionModel(own)

        denoiser = build_denoiser(network, config.schedule, config.prediction, device)
        return cls(config, denoiser, codec, conditioner)

    @classmethod
    def load(
        cls,
        config: LatentConfig,
        tensors: Mapping[str, Tensor],
        *,
        what: str,
        dtype: Wanted = torch.float32,
    ) -> Latent:
        """A model with stored weights (names `network.…`, `codec.…`, `conditioner.…`), taken over one by one.

        Args:
            dtype: of the weights; None leaves each in the type it is stored in, and mapped from the disk.

        Raises:
            ModelFileError: when they do not fit the config.
        """
        model = cls.create(config, "meta")
        for name, network in model.networks().items():
            take_over(network, component(tensors, name), what=what, dtype=dtype)
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
        """The config of the network over latents, as the model's own config has it, whatever computes now."""
        return self.config.unet(self.codec, self.conditioner)

    @torch.no_grad()
    def encode(self, pictures: Tensor, *, tiled: bool = False) -> Moments:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of the codec's factor, to latents, float32."""
        x = pictures.to(self._codec_dtype(pictures))
        found = encode_tiled(self.codec, x) if tiled else self.codec.encode(x)
        return Moments(found.mean.float(), None if found.std is None else found.std.float())

    @torch.no_grad()
    def pictures(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Latents (B, C, h, w) to pictures in about [-1, 1], float32; large ones one by one.

        Args:
            tiled: decode layer by layer in tiles: less memory, the same picture but for rounding.
        """
        x = latents.to(self._codec_dtype(latents))
        if tiled:
            return decode_tiled(self.codec, x).float()
        alone = x.shape[-2:].numel() * self.codec.factor**2 >= ALONE
        return torch.cat([self.codec.decode(part).float() for part in torch.split(x, 1 if alone else len(x))])

    def needs_tiles(self, width: int, height: int) -> bool:
        """Whether the memory that is free now, where the codec computes, is too short to decode a picture of this size
        whole."""
        if self.codec.network is None:
            return False
        free = offload.free_bytes(offload.device_of(self.codec.network))
        _, h, w = self.shape_of(width, height)
        return needs_tiles(self.codec, h, w, free_host_bytes() if free is None else free)

    def _codec_dtype(self, like: Tensor) -> torch.dtype:
        network = self.codec.network
        return like.dtype if network is None else next(network.parameters()).dtype

    @property
    def reads(self) -> frozenset[str]:
        """What a user may say to it, such as "text" or "label"."""
        return frozenset(part.reads for part in self._parts.values()) - {""}

    @property
    def _parts(self) -> Mapping[str, Conditioner]:
        return self.conditioner.parts if self.conditioner is not None else {}

    @property
    def shown(self) -> dict[str, Shown]:
        """The conditions that are shown beside the latents, by name."""
        return {name: part for name, part in self._parts.items() if isinstance(part, Shown)}

    @torch.no_grad()
    def conditions(
        self, asked: Sequence[Asked], shown: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[Condition, Condition]:
        """What the pictures are to be, and what guidance leads away from: the null, or what they are not to be.

        Args:
            asked: per picture.
            shown: what the conditions of `self.shown` get, per picture; on both sides. None is the null, for those that
                have one.

        Raises:
            UserError: for what the model cannot read.
        """
        if self.conditioner is None:
            return Condition(), Condition()
        wanted: list[dict[str, Any]] = []
        unwanted: list[dict[str, Any]] = []
        for i, one in enumerate(asked):
            seen = {name: values[i] for name, values in (shown or {}).items()}
            wanted.append(seen | self._said(one.said() | {TEXT: self._words(one, one.prompt, whole=True)}))
            unwanted.append(seen | self._said({TEXT: self._words(one, one.negative)}))
        offload.bring(self.conditioner.network)  # conditioners make what they give it where its weights are
        both = self.conditioner.encode([*wanted, *unwanted])
        return both.rows(0, len(asked)), both.rows(len(asked), 2 * len(asked))

    def _said(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What is said, handed to the conditions that read it. Raises `UserError` for what none reads."""
        for what, value in said.items():
            if value is not None and what not in self.reads:
                raise UserError(f"this model takes no {what}; leave it out")
        return {n: said[part.reads] for n, part in self._parts.items() if said.get(part.reads) is not None}

    def check_words(self, asked: Sequence[Asked]) -> None:
        """Refuse, with a `UserError`, what the model cannot read; nothing is drawn and nothing shown."""
        parts = {name: part for name, part in self._parts.items() if part.reads}
        if self.conditioner is None or not parts:
            return
        with offload.resting(self.networks()):
            offload.bring(self.conditioner.network)  # that of the parts alone brings nothing
            Latent(self.config, self.denoiser, self.codec, Combined(parts)).conditions(asked)

    def _words(self, asked: Asked, text: str | None, *, whole: bool = False) -> str | Prompt | None:
        """What the reader of texts is given: with how it is to be read, where that can be said to it."""
        reader = next((part for part in self._parts.values() if part.reads == TEXT), None)
        if isinstance(reader, ClipPrompt):
            if text is None and asked.clip_skip is None:
                return None
            mixed = {"towards": asked.towards, "share": asked.share} if whole and asked.towards is not None else {}
            return Prompt(text or "", asked.dialect or "a1111", asked.clip_skip, **mixed)  # type: ignore[arg-type]
        for what, value in (("prompt dialect", asked.dialect), ("clip skip", asked.clip_skip)):
            if value is not None:
                raise UserError(f"this model's text encoder knows no {what}; leave it out")
        if asked.towards is not None:
            raise UserError("this model's text encoder cannot mix two prompts")
        return text


def combined(conditions: Mapping[str, Mapping[str, Any]]) -> Combined | None:
    """The conditioners of a config as one, None if there are none."""
    if not conditions:
        return None
    parts: dict[str, Conditioner] = {}
    for name, values in sorted(conditions.items()):  # so that the order of a config changes no weight
        try:
            parts[name] = from_config(values, find=hashes.find, hasher=hashes.sha256)
        except UserError as error:
            raise type(error)(f"conditions.{name}: {error}") from None
    for what in sorted({part.reads for part in parts.values()} - {""}):
        readers = [name for name, part in parts.items() if part.reads == what]
        if len(readers) > 1:
            raise UserError(f"conditions.{readers[0]} and conditions.{readers[1]} both read the user's {what}")
    return Combined(parts)


def classes(conditioner: Combined | None) -> int | None:
    """The size of the table of classes where what is shown has one."""
    parts = conditioner.parts.values() if conditioner is not None else ()
    return next((part.classes for part in parts if isinstance(part, LowResolution)), None)
