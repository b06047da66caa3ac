"""The KL-regularised codec: an `AutoencoderKL` whose latents are shifted and scaled to about unit variance.

>>> from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
>>> import torch
>>> tiny = AutoencoderConfig(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
...                          up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2)
>>> codec = KLCodec(AutoencoderKL(tiny))
>>> codec.encode(torch.zeros(1, 3, 8, 8)).mean.shape, codec.factor
(torch.Size([1, 2, 4, 4]), 2)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfumato.codecs.base import Moments
from sfumato.networks.autoencoder import AutoencoderKL


@dataclass(frozen=True)
class KLCodec:
    """`z = (sample - shift) scale` (Rombach 2022, section G), with diffusers' `scaling_factor` and `shift_factor`, or
    its `latents_mean` and `latents_std`, one per channel: `z = (sample - mean) scale / std`."""

    network: AutoencoderKL

    @property
    def factor(self) -> int:
        return self.network.factor

    @property
    def channels(self) -> int:
        return self.network.config.latent_channels

    @property
    def scale(self) -> float:
        return self.network.config.scaling_factor

    @property
    def shift(self) -> float:
        return self.network.config.shift_factor or 0.0

    def _standard(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of the latents, one number or one per channel (1, C, 1, 1)."""
        config = self.network.config
        if config.latents_mean is None or config.latents_std is None:
            return like.new_tensor(self.shift), like.new_tensor(self.scale)
        mean, std = (like.new_tensor(v)[None, :, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, self.scale / std

    def encode(self, pictures: Tensor) -> Moments:
        posterior = self.network.encode(pictures)
        shift, scale = self._standard(posterior.mean)
        return Moments((posterior.mean - shift) * scale, posterior.std * scale)

    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._standard(latents)
        return self.network.decode(latents / scale + shift)
