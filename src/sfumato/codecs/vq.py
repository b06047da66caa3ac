"""The vector-quantised codec: diffusion runs on latents before quantisation, decoding quantises them.

That is LDM's `VQModelInterface`: what a sampler leaves between two codes falls on the nearer one.

>>> from sfumato.networks.autoencoder import VQConfig, VQModel
>>> import torch
>>> tiny = VQConfig(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
...                 up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2,
...                 num_vq_embeddings=16)
>>> codec = VQCodec(VQModel(tiny))
>>> codec.decode(codec.encode(torch.zeros(1, 3, 8, 8)).mean).shape
torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfumato.codecs.base import Moments
from sfumato.networks.autoencoder import VQModel


@dataclass(frozen=True)
class VQCodec:
    """`z = scale * encoder(x)`, before quantisation; it has no spread."""

    network: VQModel

    @property
    def factor(self) -> int:
        return self.network.factor

    @property
    def channels(self) -> int:
        return self.network.config.vq_embed_dim or self.network.config.latent_channels

    @property
    def scale(self) -> float:
        return self.network.config.scaling_factor

    def encode(self, pictures: Tensor) -> Moments:
        return Moments(self.network.encode(pictures) * self.scale, None)

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents / self.scale)
