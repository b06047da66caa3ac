"""The Inception network of FID, for whoever has its weights: the TensorFlow network of 2015 in PyTorch's layout.

That network (`inception-2015-12-05`, Szegedy 2015, arXiv:1512.00567) is what published FID and KID figures stand on.
Its weights are not part of any package; the file that pytorch-fid and torch-fidelity download,
`pt_inception-2015-12-05-6726825d.pth`, or the same tensors as safetensors, gives the layout that is read here. It
differs from the usual Inception v3 in three places: averages leave the border out, the very last block takes a maximum
instead of an average, and there are 1,008 classes.

>>> with torch.device("meta"):
...     sum(p.numel() for p in Inception().parameters())
23850960
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.io import check_is_file, load_strictly, read_model
from sfumato.errors import ModelFileError, UserError

SHA256_START = "6726825d"
"""What the SHA-256 of the published file begins with; its name says so too."""

INPUT_SIZE = 299

Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5 and twice 3x3 side by side."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        parts = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))]
        return torch.cat(parts, 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17: 7x7 as 1x7 and 7x1, once and twice."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        flat, tall = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2 = Conv(width, width, flat[0], padding=flat[1])
        self.branch7x7_3 = Conv(width, 192, tall[0], padding=tall[1])
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, tall[0], padding=tall[1])
        self.branch7x7dbl_3 = Conv(width, width, flat[0], padding=flat[1])
        self.branch7x7dbl_4 = Conv(width, width, tall[0], padding=tall[1])
        self.branch7x7dbl_5 = Conv(width, 192, flat[0], padding=flat[1])
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, 2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8 x 8: 3x3 as 1x3 beside 3x1."""

    def __init__(self, channels: int, pool: Literal["average", "maximum"]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average(x) if self.pool == "average" else F.max_pool2d(x, 3, 1, 1)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """The network up to its 2,048 pooled features; `fc` is there so that names fit the published file's."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, "average")
        self.Mixed_7c = BlockE(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of pictures (B, 3, 299, 299) in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


class InceptionFeatures(nn.Module):
    """Pictures, uint8 (B, 3, H, W), to features, float32 (B, 2048), prepared as by pytorch-fid.

    That is: scaled to [0, 1], resized to 299 x 299 by bilinear interpolation without antialiasing, then to [-1, 1].
    Figures of other programs, which resize in other ways, differ in the last digits.

    Attributes:
        name: for figures. sha256: of the weights' file.
    """

    name = "Inception"

    def __init__(self, network: Inception, sha256: str) -> None:
        super().__init__()
        self.network, self.sha256 = network, sha256
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"{self.name} takes uint8 pictures (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
        x = images.to(self.network.fc.weight) / 255
        x = F.interpolate(x, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        features: Tensor = self.network(2 * x - 1)
        return features.float()


def inception(path: str | Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """The network with the weights of a file: safetensors, or the published `.pth`, known by its SHA-256.

    Raises:
        ModelFileError: a missing or foreign file, another pickle than the published one, weights that do not fit.
    """
    path = Path(path)
    check_is_file(path)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256.startswith(SHA256_START):
        try:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelFileError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    else:
        tensors = read_model(path).tensors
    network = Inception()
    own = network.state_dict()
    # counters of batches, which mean nothing here, need not be in the file
    counters = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")}
    load_strictly(network, counters | dict(tensors), what=str(path))
    return InceptionFeatures(network, sha256).to(device)
