"""A first stage as a system of its own: config, network, codec, and how its latents are made standard.

>>> config = CodecConfig(kind="kl", size=8, network={"block_out_channels": [8, 8], "norm_num_groups": 4,
...     "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2})
>>> CodecSystem.create(config).codec.factor
2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sfumato.checkpoints.io import check_fit, component, load_strictly
from sfumato.codecs import Codec, KLCodec, PixelCodec, VQCodec
from sfumato.errors import UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from sfumato.networks.outline import made_on
from sfumato.systems.config import Strict, without_derived

_DERIVED = ("in_channels", "out_channels", "sample_size")
_STANDARD = (0.5, 2.0)  # what the standard deviation of scaled latents may be


class CodecConfig(Strict):
    """Everything that a first stage needs to be built.

    Attributes:
        kind: kl, vq, or pixels, which is none.
        size: of the pictures that it learnt from; others go too.
        network: fields of `AutoencoderConfig` or `VQConfig`, less those that follow from the rest.
        title, licence, source: what a person should know of a shipped one; may be empty.
    """

    system: Literal["codec"] = "codec"
    kind: Literal["kl", "vq", "pixels"]
    size: int = Field(ge=8, le=4096)
    channels: Literal[1, 3] = 3
    network: dict[str, Any] = Field(default_factory=dict)
    title: str = ""
    licence: str = ""
    source: str = ""

    @field_validator("network")
    @classmethod
    def _nothing_that_follows(cls, network: dict[str, Any]) -> dict[str, Any]:
        return without_derived(network, _DERIVED, "size and channels")

    def autoencoder(self) -> AutoencoderConfig | VQConfig:
        """The network's own config. Raises `UserError` for unknown keys and impossible values, and for pixels."""
        if self.kind == "pixels":
            raise UserError("a codec of pixels has no network")
        values = {
            **self.network, "in_channels": self.channels, "out_channels": self.channels, "sample_size": self.size,
        }  # fmt: skip
        try:
            return AutoencoderConfig.from_dict(values) if self.kind == "kl" else VQConfig.from_dict(values)
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"codec.network: a value is of the wrong type or zero ({error})") from None

    def with_network(self, **values: Any) -> CodecConfig:
        """The same with other values in `network`."""
        return self.model_copy(update={"network": self.network | values})


class CodecSystem:
    """A codec with the config that it is stored with."""

    kind = "codec"

    def __init__(self, config: CodecConfig, codec: Codec) -> None:
        self.config, self.codec = config, codec

    @classmethod
    def create(cls, config: CodecConfig, device: str = "cpu") -> CodecSystem:
        """A new one with fresh weights (from torch's global generator), or none on "meta"."""
        if config.kind == "pixels":
            return cls(config, PixelCodec(config.channels))
        own = config.autoencoder()
        with made_on(device):
            if isinstance(own, AutoencoderConfig):
                return cls(config, KLCodec(AutoencoderKL(own)))
            return cls(config, VQCodec(VQModel(own)))

    @classmethod
    def load(cls, config: CodecConfig, tensors: Mapping[str, Tensor], *, what: str) -> CodecSystem:
        """With stored weights (names `codec.…`), in float32; a misfit raises `ModelFileError`."""
        stage, own = cls.create(config, "meta"), component(tensors, "codec")
        if (network := stage.codec.network) is not None:
            check_fit(network, own, what=what)
            network.to_empty(device="cpu")
            load_strictly(network, own, what=what)
            network.eval()
        return stage

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names they are stored by."""
        network = self.codec.network
        return {f"codec.{name}": t for name, t in network.state_dict().items()} if network is not None else {}

    def check_scale(self, std: float, what: str) -> None:
        """Refuse latents that are not about standard, which a diffusion model could not learn.

        Args:
            std: their standard deviation as the codec scales them.

        Raises:
            UserError: outside [0.5, 2], with the scaling factor that would be right.
        """
        low, high = _STANDARD
        if low <= std <= high:
            return
        own = getattr(self.codec, "scale", 1.0)
        raise UserError(
            f"the latents of {what} have a standard deviation of {std:.3g} where about 1 is expected: "
            f"its scaling_factor of {own:.4g} should be about {own / std:.4g}"
        )


def standardised(stage: CodecSystem, mean: Tensor, std: Tensor) -> CodecSystem:
    """The same codec with latents of mean 0 and standard deviation 1, channel by channel where it can be had.

    The two 1x1 convolutions around the latents take the shift and the scale of each channel in, so that the file needs
    no more than diffusers' fields: `mean' = (mean - m) / s`, `logvar' = logvar - 2 ln s` before, `s z' + m` after. A
    vector-quantised codec, whose distances a channel's own scale would change, and one without these convolutions get
    one `scaling_factor` for all channels.

    Args:
        mean, std: (C,) of the latents without scale or shift, over the training pictures.
    """
    codec, config = stage.codec, stage.config
    if isinstance(codec, KLCodec) and codec.network.config.use_quant_conv and codec.network.config.use_post_quant_conv:
        _fold(codec.network, mean, std)
        return CodecSystem.load(config.with_network(scaling_factor=1.0), stage.tensors(), what="the codec")
    whole = float((std.square().mean() + mean.var(correction=0)).sqrt())
    return CodecSystem.load(config.with_network(scaling_factor=1 / whole), stage.tensors(), what="the codec")


@torch.no_grad()
def _fold(network: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    before, after = network.quant_conv, network.post_quant_conv
    assert before is not None and after is not None and before.bias is not None and after.bias is not None
    twice = torch.cat([std, torch.ones_like(std)]).to(before.weight)
    shift = torch.cat([mean, 2 * std.log()]).to(before.weight)
    before.weight.div_(twice[:, None, None, None])
    before.bias.copy_((before.bias - shift) / twice)
    after.bias.add_(after.weight[:, :, 0, 0] @ mean.to(after.weight))
    after.weight.mul_(std.to(after.weight)[None, :, None, None])
