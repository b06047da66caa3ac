"""The patch discriminator and its losses: a judge that says for each patch of a picture whether it is real.

The network is pix2pix' (Isola 2017, section 3.2) as the first stages of latent diffusion use it; the generator's
share of its loss is balanced by `adaptive_weight` (Esser 2021, eq. 7).

>>> judge = PatchDiscriminator(width=8, n_layers=2)
>>> judge(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 1, 6, 6])
>>> float(hinge_d(real=torch.ones(4), fake=-torch.ones(4)))
0.0
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError, raise_unknown
from sfumato.networks.resnet import widen

Norm = Literal["batch", "group"]


class PatchDiscriminator(nn.Module):
    """Convolutions of width 4: `n_layers` with stride 2, then two with stride 1, the last to a single channel.

    Widths double from `width` to at most `8 width`; the receptive field is 70 pixels for 3 layers. Parameter names
    are those of the published `NLayerDiscriminator`: `main.0`, `main.2`, `main.3` …

    Args:
        channels: of a picture.
        norm: "batch" as published, or "group", which does not mix the pictures of a batch and needs no running means.
        init: weights of convolutions from N(0, 0.02), of norms from N(1, 0.02), as published.
    """

    def __init__(self, channels: int = 3, *, width: int = 64, n_layers: int = 3, norm: Norm = "batch") -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise_unknown("norm of the discriminator", str(norm), ("batch", "group"))
        if min(channels, width, n_layers) < 1:
            raise UserError(
                "channels, width and n_layers of the discriminator must be 1 or more, "
                f"got {channels}, {width} and {n_layers}"
            )
        self.channels, self.n_layers = channels, n_layers
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**n, 8) for n in range(n_layers + 1)]
        for n in range(1, n_layers + 1):
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[n]) if norm == "batch" else nn.GroupNorm(math.gcd(32, widths[n]), widths[n]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @property
    def least_size(self) -> int:
        """The smallest height and width of a picture that leaves one patch."""
        return int(3 * 2**self.n_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, channels, H, W) in [-1, 1] -> logits of patches (B, 1, H', W'), large where they look real.

        `H' = H // 2^n_layers - 2`.

        Raises:
            UserError: for other channels, or pictures smaller than `least_size`.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UserError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[-2:]) < self.least_size:
            raise UserError(
                f"a discriminator of {self.n_layers} layers needs pictures of at least {self.least_size} pixels, "
                f"got {x.shape[-2]} x {x.shape[-1]}"
            )
        out: Tensor = self.main(x)
        return out


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss `1/2 [mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))]` (Lim 2017), a scalar.

    `real` and `fake` are logits of any shape.
    """
    return 0.5 * (F.relu(1 - widen(real)).mean() + F.relu(1 + widen(fake)).mean())


def hinge_g(fake: Tensor) -> Tensor:
    """The generator's loss `-mean D(x_hat)` (Lim 2017), a scalar, from logits of any shape."""
    return -widen(fake).mean()


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss `1/2 [mean softplus(-D(x)) + mean softplus(D(x_hat))]`, a scalar.

    Half the negative log-likelihood of the right answers (Goodfellow 2014, eq. 1), from logits of any shape.
    """
    return 0.5 * (F.softplus(-widen(real)).mean() + F.softplus(widen(fake)).mean())


def vanilla_g(fake: Tensor) -> Tensor:
    """The generator's non-saturating loss `mean softplus(-D(x_hat))` (Goodfellow 2014, section 3), a scalar."""
    return F.softplus(-widen(fake)).mean()


def adaptive_weight(
    nll: Tensor, g: Tensor, last_layer: Tensor, *, delta: float = 1e-4, max_weight: float = 1e4
) -> Tensor:
    """`lambda = |grad nll| / (|grad g| + delta)` with both gradients at the last layer (Esser 2021, eq. 7).

    Args:
        nll: (), the reconstruction loss.
        g: (), the generator's adversarial loss.
        last_layer: weight of the decoder's last convolution, through which both were computed.
        delta: keeps the quotient finite.
        max_weight: lambda is clamped to [0, max_weight].

    Returns:
        (), in float32 or wider, without gradient. The graphs of `nll` and `g` are kept for the backward pass.
    """
    (of_nll,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (of_g,) = torch.autograd.grad(g, last_layer, retain_graph=True)
    norms = [torch.linalg.vector_norm(widen(gradient)) for gradient in (of_nll, of_g)]
    weight: Tensor = norms[0] / (norms[1] + delta)
    return weight.clamp(0.0, max_weight)
