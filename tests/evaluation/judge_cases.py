"""A judge of a few numbers, a CLIP that knows colours, and captioned pictures of one colour each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluation.captioned import Captioned
from sfumato.evaluation.judge import Judge

STYLES = {"plain": 0, "ringed": 1}
SIZE = 16


class Thumbnail:
    """Pictures shrunk to 2 x 2."""

    name, sha256 = "Thumbnail", "f" * 64

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """One layer: the pictures themselves."""
        return [images.float() + 1]


def thumbnail(*_: object) -> Judge:
    """A judge like EfficientNet's, with other columns for each distance."""
    return Judge(Thumbnail(), slice(8), slice(4, None))


def colour(number: int) -> list[int]:
    """Of concept `number`, below 64."""
    return [40 + 60 * (number % 4), 40 + 60 * (number // 4 % 4), 40 + 60 * (number // 16 % 4)]


def picture(number: int, style: str) -> Tensor:
    """A square of the concept's colour on white; one style has a black pixel above it."""
    x = torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8)
    x[:, 4:12, 4:12] = torch.tensor(colour(number), dtype=torch.uint8)[:, None, None]
    x[:, 2, 8] = 0 if style == "ringed" else 255
    return x


def captioned(
    numbers: Sequence[int], styles: Sequence[str], held_out_by: Sequence[str | None] | None = None
) -> Captioned:
    """Pictures of these concepts, called "thing 3"."""
    pictures = torch.stack([picture(n, s) for n, s in zip(numbers, styles, strict=True)])
    texts = [f"thing {n}" for n in numbers]
    return Captioned(pictures, texts, list(styles), held_out_by or [None] * len(texts), [""] * len(texts))


class Colours:
    """Reads colour and style off a picture, and off a caption "thing 3, plain style"."""

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors (N, 4)."""
        ringed = (pictures[:, 0, 2, 8] < 128).float()[:, None] * 2 - 1
        return F.normalize(torch.cat([pictures[:, :, 8, 8].float() / 127.5 - 1, ringed], 1), dim=1)

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (N, 4)."""
        found = []
        for caption in captions:
            number = int(caption.split(",")[0].removeprefix("thing "))
            found.append(picture(number, "ringed" if "ringed" in caption else "plain"))
        return self.pictures(torch.stack(found))
