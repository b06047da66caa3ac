"""What latents will roughly look like, without the decoder: one linear map from their channels to colours.

The map is measured on the codec itself, once per process: smooth random latents of unit variance are decoded, and
least squares explain the pictures, averaged over the pixels of each latent, by the latents. It costs nothing beside a
sampling step, so a picture can be watched while it is drawn.

>>> from sfumato.codecs import PixelCodec
>>> pixels = LatentPreview.measured(PixelCodec(3), torch.Generator())
>>> pixels(torch.full((1, 3, 2, 2), 0.5)).unique().tolist()
[0.75]
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato.codecs.base import Codec
from sfumato.errors import UserError
from sfumato.images import PictureError, sheet, to_pil

_PICTURES, _TOGETHER, _SIDE = 16, 4, 8  # decoded for the fit, how many at once, and their side in latent pixels

_known: weakref.WeakKeyDictionary[nn.Module, LatentPreview] = weakref.WeakKeyDictionary()

Show = Callable[[int, Image.Image], None]
"""`(step, picture)`; several pictures come as one sheet."""


class Estimate(Protocol):
    """What a sampling step predicts, as far as a preview reads it."""

    @property
    def x0(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """`colour = weight z + bias` for every latent pixel `z`.

    Attributes:
        weight: (3, C), float32.
        bias: (3,), float32.
        r2: share of the variance of averaged pictures that the map explains, where it was measured.
    """

    weight: Tensor
    bias: Tensor
    r2: float

    @classmethod
    def measured(
        cls, codec: Codec, generator: torch.Generator, device: torch.device | None = None
    ) -> LatentPreview:
        """The map of a codec; a codec without a network has its latents for pictures already.

        The fit is kept for as long as the codec's network is, so that `generator` matters only the first time.

        Args:
            generator: CPU generator of the random latents.
            device: where the codec computes; None for where its weights are.

        Raises:
            PictureError: the decoder gave values that are not finite.
        """
        if codec.network is None:
            weight = torch.eye(3) if codec.channels == 3 else torch.ones(3, 1)
            return cls(weight, torch.zeros(3), 1.0)
        if codec.network not in _known:
            _known[codec.network] = cls.fitted(*_examples(codec, codec.network, generator, device))
        return _known[codec.network]

    @classmethod
    def fitted(cls, latents: Tensor, pictures: Tensor) -> LatentPreview:
        """The map that explains pictures (B, 3 or 1, H, W) by their latents (B, C, h, w) with the least squared error.

        H and W are multiples of h and w; each latent pixel is held against the average of its pixels.
        """
        small = F.adaptive_avg_pool2d(pictures.double(), (latents.shape[-2], latents.shape[-1]))
        z, colours = (v.double().transpose(0, 1).flatten(1).T for v in (latents, small))
        ones = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        found = torch.linalg.lstsq(ones, colours).solution
        unexplained = (colours - ones @ found).square().sum()
        r2 = 1 - unexplained / (colours - colours.mean(0)).square().sum()
        weight = found.T.float().expand(3, -1)
        return cls(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), float(r2))

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in [0, 1] from latents (B, C, h, w), float32 on the latents' device."""
        z = latents.detach().float()
        colours = torch.einsum("rc,bchw->brhw", self.weight.to(z), z) + self.bias.to(z)[:, None, None]
        return ((colours + 1) / 2).clamp(0, 1)

    def picture(self, latents: Tensor) -> Image.Image:
        """One picture of h x w pixels, or a sheet of several."""
        shown = to_pil(self(latents) * 2 - 1)
        return shown[0] if len(shown) == 1 else sheet(shown)

    def hook(self, every: int, show: Show) -> Callable[[Tensor, object, Estimate | None, object], Tensor]:
        """A hook of the sampling loop that shows the estimate of the clean latents at each `every`th step.

        Args:
            every: 1 shows all of them; steps are counted from 1.
            show: called with the step and the picture. What it raises ends the drawing.

        Raises:
            UserError: for `every` below 1.
        """
        if every < 1:
            raise UserError(f"previews come every 1 or more steps, got {every}")
        step = 0

        def watch(x: Tensor, level: object, prediction: Estimate | None, noise: object) -> Tensor:
            nonlocal step
            if prediction is not None:
                step += 1
                if step % every == 0:
                    show(step, self.picture(prediction.x0))
            return x

        return watch


def smooth_latents(count: int, channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Random latents (count, channels, side, side) of mean 0 and unit variance in which all scales are alike.

    The sum of unit normals on grids of 1, 2, 4 … `side` points, each stretched to `side`.
    """
    total, points = torch.zeros(count, channels, side, side), 1
    while points <= side:
        coarse = torch.randn((count, channels, points, points), generator=generator)
        wide = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        total += wide / wide.std()
        points *= 2
    return (total - total.mean()) / total.std()


@torch.no_grad()
def _examples(
    codec: Codec, network: nn.Module, generator: torch.Generator, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Random latents and what the codec makes of them."""
    latents = smooth_latents(_PICTURES, codec.channels, _SIDE, generator)
    parameter = next(network.parameters())
    parts = torch.split(latents.to(device or parameter.device, parameter.dtype), _TOGETHER)
    pictures = torch.cat([codec.decode(some).float().cpu() for some in parts])
    if not bool(pictures.isfinite().all()):
        raise PictureError(f"the codec's decoder gave values that are not finite in {_name(parameter.dtype)}")
    return latents, pictures.clamp(-1, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
