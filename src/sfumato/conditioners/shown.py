"""Conditions that are shown, not said: what lies beside the latents on further channels of the network's input.

| kind | for | channels | shown |
|---|---|---|---|
| `masked` | inpainting | 1 + those of the latents | the mask (1 is redrawn) and the latents of what is kept |
| `depth` | depth to picture | 1 | inverse depth at the latents' size, -1 far to 1 near |
| `low-resolution` | enlarging | 3 or more | the small picture with some noise, whose step may be a class |

Their input is a tensor of the latents' size: the codec has had its turn. Guidance leads away from words, not from what
is shown. A model that was trained to do without at times (`droppable`) has a null of each: constant planes of zeros, a
mask of ones, and of the small picture's steps a class of its own. Published models have none and must be shown all.

>>> Masked(latents=4).encode([torch.zeros(5, 8, 8)]).concat.shape
torch.Size([1, 5, 8, 8])
>>> Masked(latents=2, droppable=True).null(1).concat.flatten().tolist()
[1.0, 0.0, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.condition import Condition
from sfumato.conditioners.base import check_batch, check_keys, common_size
from sfumato.errors import UserError, raise_unknown


class Shown:
    """A condition beside the latents.

    Attributes:
        kind: its name in a config.
        channels: that it adds to the network's input.
        needs: what to give where it is missing, for people.
        droppable: whether the model was trained to do without it at times.
    """

    kind = ""
    reads = ""
    slots = frozenset({"concat"})
    network = None
    channels = 1
    needs = "a picture"
    droppable: bool = False

    def encode(self, inputs: Sequence[Tensor | None]) -> Condition:
        """One tensor (channels, h, w) per picture, None for the null.

        Raises:
            UserError: when one is missing that cannot be, or has other channels.
        """
        check_batch(inputs, "picture")
        for one in inputs:
            if one is None and not self.droppable:
                raise UserError(f"this model needs {self.needs}: `sfumato edit` takes one")
            if one is not None and (one.ndim != 3 or len(one) != self.channels):
                raise UserError(f"what this model is shown has {self.channels} channels, got {tuple(one.shape)}")
        planes = [self.null_planes() if one is None else one for one in inputs]
        size = common_size(planes)
        like = next((one for one in inputs if one is not None), planes[0])
        return Condition(concat=torch.stack([plane.to(like).expand(len(plane), *size) for plane in planes]))

    def null_planes(self) -> Tensor:
        """(channels, 1, 1), the constants that stand for nothing shown."""
        return torch.zeros(self.channels, 1, 1)

    def null(self, count: int) -> Condition:
        """Nothing shown to `count` pictures. Raises `UserError` where the model cannot do without."""
        if not self.droppable:
            raise UserError(f"this model needs {self.needs} for every picture")
        return self.encode([None] * count)

    def describe(self) -> dict[str, Any]:
        """Kind and options; `droppable` where it is."""
        return {"kind": self.kind} | ({"droppable": True} if self.droppable else {})


ORDERS = ("mask-first", "mask-last")


@dataclass(frozen=True)
class Masked(Shown):
    """Mask and masked picture (Rombach 2022, section 4.5), `latents` the channels of the codec.

    `order` "mask-first" is Stable Diffusion's: a mask of 0 and 1, then the latents of a picture that is grey where it
    is hidden. "mask-last" is latent diffusion's own: latents of a picture that is black there, then a mask of -1 and 1.
    The null is a picture of which all is hidden: a full mask, latents of zeros.
    """

    kind = "masked"
    needs = "a picture and a mask"
    latents: int = 4
    droppable: bool = False
    order: str = "mask-first"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise_unknown("order of mask and latents", str(self.order), ORDERS)

    @property
    def channels(self) -> int:  # type: ignore[override]
        return 1 + self.latents

    def hidden(self, pictures: Tensor, holes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] without what `holes` (B or 1, 1, H, W), bool, cover."""
        return torch.where(holes, 0.0 if self.order == "mask-first" else -1.0, pictures)

    def laid(self, cells: Tensor, latents: Tensor) -> Tensor:
        """Mask (B, 1, h, w), 1 where all is redrawn, and latents (B, latents, h, w), side by side as the network is
        shown them, (B, 1 + latents, h, w)."""
        return torch.cat([cells, latents] if self.order == "mask-first" else [latents, 2 * cells - 1], dim=1)

    def null_planes(self) -> Tensor:
        return self.laid(torch.ones(1, 1, 1, 1), torch.zeros(1, self.latents, 1, 1))[0]

    def describe(self) -> dict[str, Any]:
        order = {} if self.order == "mask-first" else {"order": self.order}
        return super().describe() | {"latents": self.latents} | order


@dataclass(frozen=True)
class Depth(Shown):
    """Inverse depth, one channel in [-1, 1]."""

    kind = "depth"
    needs = "a picture and its map of depths"
    droppable: bool = False


FORMS = ("beside", "unfolded", "upsampled", "encoded")


@dataclass(frozen=True)
class LowResolution(Shown):
    """A small picture in about [-1, 1], with noise of a step of the schedule.

    Its input is `(planes, step)`: what `laid` made of the small picture, and the step of the noise that it got.

    Attributes:
        levels: the network is told the step as one of so many classes; 0: it is not told. The null is zeros, with the
            class after the last step.
        scale: how much larger the result is; 0 for the codec's factor.
        form: how it is laid beside latents: "beside", as it is (it has their size); "unfolded", squares of its pixels
            as channels, where it is larger than they are; "upsampled", by bicubic interpolation to the result's size,
            for models of pixels (Saharia 2021, SR3); "encoded", the codec's latents of that.
        channels: how many these are.
        noise: the noisiest step that it was trained with; None for the last of `levels`, -1 for no noise at all.
        residual: 0 where latents are the result's; else they are what the planes lack of it, divided by this number,
            its usual size (Li 2021, SRDiff), which only an upsampled or encoded picture can be completed by.
        exact: the small picture is what the large one's squares of pixels have as their means, so that the result is
            made to agree with it (`agreeing`).
    """

    kind = "low-resolution"
    needs = "a picture to enlarge"
    levels: int = 1000
    droppable: bool = False
    scale: int = 0
    form: str = "beside"
    channels: int = 3
    noise: int | None = None
    residual: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.residual and (self.form not in FORMS[2:] or self.droppable or not 0 < self.residual < math.inf):
            raise UserError("what a picture lacks can be learnt of an upsampled or encoded one that is never dropped")
        if self.form not in FORMS:
            raise_unknown("form of the small picture", str(self.form), FORMS)
        if self.noise is None and not self.levels:
            raise UserError("a small picture whose noise the network is not told needs to say what noise it may have")
        if self.levels and self.most >= self.levels:
            raise UserError(f"the small picture may have noise of step {self.most}, but it has {self.levels} classes")
        if self.scale < 0 or self.scale == 1:
            raise UserError(f"the small picture must be enlarged by 2 or more, got {self.scale}")

    @property
    def slots(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"concat", "labels"} if self.levels else {"concat"})

    @property
    def classes(self) -> int:
        """How many classes the network must know; 0 for none."""
        return self.levels + self.droppable if self.levels else 0

    @property
    def most(self) -> int:
        """The noisiest step that the small picture may have; -1 for no noise at all."""
        return self.levels - 1 if self.noise is None else self.noise

    def laid(self, small: Tensor, factor: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Small pictures (B, 3, h, w) as planes of the latents' size.

        Args:
            factor: of the codec: pixels of a latent's side.
            encode: the codec's latents of pictures in [-1, 1].

        Raises:
            UserError: where the form does not fit the codec.
        """
        scale = self.scale or factor
        if self.form == "beside" and scale == factor:
            return small
        if self.form == "unfolded" and factor > scale and factor % scale == 0:
            return F.pixel_unshuffle(small, factor // scale)
        if self.form == "upsampled" and factor == 1:
            return upsampled(small, scale)
        if self.form == "encoded" and factor > 1:
            return encode(upsampled(small, scale).clamp(-1, 1))
        raise UserError(
            f"a small picture that is {self.form} and to be enlarged by {scale} does not fit a codec of factor {factor}"
        )

    def lacking(self, latents: Tensor, planes: Tensor) -> Tensor:
        """What is diffused of latents (B, C, h, w), given the planes that are shown beside them."""
        return (latents - planes) / self.residual if self.residual else latents

    def completed(self, latents: Tensor, planes: Tensor) -> Tensor:
        """The inverse of `lacking`."""
        return planes + self.residual * latents if self.residual else latents

    def encode(self, inputs: Sequence[Any]) -> Condition:
        check_batch(inputs, "picture")
        pictures = super().encode([None if one is None else one[0] for one in inputs]).concat
        steps = [self.levels if one is None else one[1] for one in inputs]
        if any(one is not None and not min(self.most, 0) <= one[1] <= self.most for one in inputs):
            steps = [one[1] for one in inputs if one is not None]
            raise UserError(f"the noise of the small picture must be a step {self._steps()}, got {steps}")
        return Condition(concat=pictures, labels=torch.tensor(steps) if self.levels else None)

    def _steps(self) -> str:
        return f"from 0 to {self.most}" if self.most >= 0 else "of -1, which is no noise"

    def describe(self) -> dict[str, Any]:
        values = super().describe() | {"levels": self.levels}
        more = {name: getattr(self, name) for name in _PUBLISHED}
        return values | (more if more != _PUBLISHED else {})


_PUBLISHED: dict[str, Any] = {
    "scale": 0, "form": "beside", "channels": 3, "noise": None, "residual": 0.0, "exact": False,
}  # fmt: skip


def shrunk(pictures: Tensor, scale: int) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], each square of scale x scale pixels as its mean, in 8 bits as files are."""
    small = F.avg_pool2d(pictures, scale)
    return ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def agreeing(pictures: Tensor, small: Tensor, scale: int, times: int = 3) -> Tensor:
    """Pictures (B, C, H, W), in [-1, 1] then, corrected until their squares have the means that `small` says.

    Each time `x + A⁺(y - A x)` with `A` the mean of a square and `A⁺` its repetition (Wang 2023, DDNM, eq. 9), and
    clamped; without the clamp once would be enough.
    """
    x = pictures.clamp(-1, 1)
    for _ in range(times):
        x = (x + F.interpolate(small - F.avg_pool2d(x, scale), scale_factor=float(scale))).clamp(-1, 1)
    return x


def upsampled(pictures: Tensor, scale: int) -> Tensor:
    """Pictures (B, C, h, w) enlarged by bicubic interpolation, not clamped."""
    return F.interpolate(pictures, scale_factor=float(scale), mode="bicubic", align_corners=False)


def from_config(config: Mapping[str, Any]) -> Shown:
    """From `describe`."""
    values = {key: value for key, value in config.items() if key != "droppable"}
    droppable = bool(config.get("droppable", False))
    if config["kind"] == Masked.kind:
        order = values.pop("order", "mask-first")
        check_keys(values, ("kind", "latents"), "the mask's config")
        return Masked(values["latents"], droppable, order)
    if config["kind"] == LowResolution.kind:
        values = _PUBLISHED | values if not values.keys() & _PUBLISHED.keys() else values
        check_keys(values, ("kind", "levels", *_PUBLISHED), "the small picture's config")
        return LowResolution(droppable=droppable, **{key: value for key, value in values.items() if key != "kind"})
    check_keys(values, ("kind",), "the depth's config")
    return Depth(droppable)
