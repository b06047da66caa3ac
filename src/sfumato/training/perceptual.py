"""Perceptual losses: distances between pictures in the features of a fixed network, to be differentiated.

EfficientNet-Lite0 comes from its package; VGG LPIPS from a file that a user has. The judge of pictures is another
network (EfficientNet-Lite2), so that no model is judged by what trained it.

>>> perceptual_loss("vgg.safetensors")
Traceback (most recent call last):
    ...
sfumato.errors.ModelFileError: no model at vgg.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.io import read_model
from sfumato.evaluation.features import efficientnet_lite0
from sfumato.networks.lpips import LPIPS, normalised

_BLOCKS = (0, 2, 4)


class EffLite0Distance(nn.Module):
    """LPIPS's distance (Zhang 2018, eq. 1, unit weights) on EfficientNet-Lite0's stem and its blocks 0, 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet_lite0().network
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Normalised features of pictures (B, 3, H, W) in [-1, 1]; heights and widths at multiples of 8."""
        network: Any = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))
        found = [x]
        for index, block in enumerate(network._blocks[: _BLOCKS[-1] + 1]):
            x = block(x)
            if index in _BLOCKS:
                found.append(x)
        return [normalised(f.float()) for f in found]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,), differentiable in `x`."""
        with torch.no_grad():
            theirs = self.features(y)
        pairs = zip(self.features(x), theirs, strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)


def perceptual_loss(name: str) -> nn.Module:
    """The distance called "lite0", or VGG LPIPS from a safetensors file that holds trunk and weights.

    Raises:
        UserError: the package is not installed, or the file does not fit.
    """
    if name == "lite0":
        return EffLite0Distance()
    return LPIPS.from_tensors(read_model(Path(name)).tensors, name)
