"""LPIPS: how different two pictures look to a network that was trained for something else (Zhang 2018).

Version 0.1 on VGG-16, under the published parameter names (`net.slice1.0.weight`, `lin0.model.1.weight` …), so that the
state dicts that first-stage trainings carry open as they are. The weights come from a file that a user has.

>>> network = LPIPS()
>>> x = torch.zeros(1, 3, 32, 32)
>>> float(network(x, x))
0.0
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.errors import ModelFileError

_SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
_WIDTHS = (64, 128, 256, 512, 512)
_PREFIXES = ("loss.perceptual_loss.", "perceptual_loss.", "")


def _vgg16() -> list[nn.Module]:
    """The thirty layers of VGG-16's convolutional part (Simonyan 2015, configuration D, without the last pool)."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in zip(_WIDTHS, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers[:30]


class _Scaling(nn.Module):
    """From [-1, 1] to what VGG was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Trunk(nn.Module):
    """VGG-16 in five slices, each ending in the activation that is compared."""

    def __init__(self) -> None:
        super().__init__()
        layers = _vgg16()
        for number, (first, end) in enumerate(_SLICES, start=1):
            part = nn.Sequential()
            for index in range(first, end):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.children():
            x = part(x)
            found.append(x)
        return found


class _Weights(nn.Module):
    """One non-negative weight per channel: a 1x1 convolution, behind dropout as in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class LPIPS(nn.Module):
    """`sum over layers of mean over positions of w · (f(x) - f(y))²`, features normalised over channels (eq. 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _Trunk()
        for index, width in enumerate(_WIDTHS):
            self.add_module(f"lin{index}", _Weights(width))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [-1, 1], H and W at least 16."""
        total = torch.zeros(len(x), device=x.device)
        pairs = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)), strict=True)
        for index, (a, b) in enumerate(pairs):
            weigh = self.get_submodule(f"lin{index}")
            total = total + weigh((normalised(a) - normalised(b)) ** 2).float().mean((1, 2, 3))
        return total

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], what: str) -> LPIPS:
        """From a state dict that holds trunk and weights, alone or inside a first stage's.

        Raises:
            ModelFileError: when names are missing or shapes differ; `what` names the file.
        """
        network = cls()
        expected = network.state_dict()
        for prefix in _PREFIXES:
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            found = {n: t for n, t in own.items() if n in expected}
            if not set(expected) - set(found) - {"scaling_layer.shift", "scaling_layer.scale"}:
                odd = [n for n, t in found.items() if t.shape != expected[n].shape]
                if odd:
                    raise ModelFileError(f"{what}: {odd[0]} has shape {tuple(found[odd[0]].shape)}, not LPIPS's")
                network.load_state_dict(expected | found)
                return network
        missing = sorted(set(expected) - set(tensors))
        raise ModelFileError(f"{what} holds no VGG LPIPS (trunk and weights): {missing[0]} is missing, for one")


def normalised(features: Tensor) -> Tensor:
    """Each position's features (B, C, H, W) scaled to unit length over channels."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
