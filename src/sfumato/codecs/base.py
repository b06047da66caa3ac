"""What every codec offers, and the one that changes nothing.

>>> import torch
>>> Moments(torch.zeros(2, 4, 8, 8), None).sample(torch.Generator()).shape
torch.Size([2, 4, 8, 8])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """What a codec makes of pictures: latents (B, C, h, w), scaled, with their spread where they have one.

    Attributes:
        mean: the most likely latents.
        std: their standard deviation; None for a codec that is sure.
    """

    mean: Tensor
    std: Tensor | None

    def sample(self, generator: torch.Generator) -> Tensor:
        """Latents drawn with a CPU generator, as training wants them; the mean where there is no spread."""
        if self.std is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + self.std * noise


class Codec(Protocol):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, channels, H / factor, W / factor) and back.

    Attributes:
        factor: pixels of a latent's side.
        channels: of the latents.
        network: what does it; None for pixels.
    """

    @property
    def factor(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def network(self) -> nn.Module | None: ...

    def encode(self, pictures: Tensor) -> Moments:
        """Scaled latents; height and width must be multiples of `factor`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1], not clamped."""
        ...


@dataclass(frozen=True)
class PixelCodec:
    """The identity: latents are the pictures."""

    channels: int = 3
    factor: int = 1
    network: nn.Module | None = None

    def encode(self, pictures: Tensor) -> Moments:
        return Moments(pictures, None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents
