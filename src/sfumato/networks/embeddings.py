"""Embeddings of the noise level: sinusoids, Fourier features and the little network behind them.

>>> [round(v, 4) for v in sinusoidal(torch.tensor([10.0]), 8)[0, :4].tolist()]
[-0.8391, 0.5403, 0.995, 0.9999]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.resnet import activation


def sinusoidal(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of times (Vaswani 2017, section 3.5).

    Args:
        t: (B,) times, any range.
        dim: width of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: [cos, sin] (ADM, Stable Diffusion) rather than [sin, cos] (DDPM).
        freq_shift: frequencies are `10000^(-i / (dim // 2 - freq_shift))`, i < dim // 2.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    exponent = (
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    )
    angles = t.float()[:, None] * torch.exp(exponent)[None, :]
    waves = (
        [torch.cos(angles), torch.sin(angles)] if flip_sin_to_cos else [torch.sin(angles), torch.cos(angles)]
    )
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class Timesteps(nn.Module):
    """`sinusoidal` as a module without parameters."""

    def __init__(self, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> None:
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal(t, self.dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of log time (Song 2021, NCSN++): (B,) -> (B, 2 dim), [sin, cos] as stored
    networks expect."""

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim).normal_() * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.log(t.float())[:, None] * self.weight[None, :].float() * (2 * math.pi)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, activation, Linear: (B, dim_in) -> (B, dim).

    Args:
        condition_dim: width of a second input that a bias-free linear layer adds to the first; None for none.
    """

    def __init__(self, dim_in: int, dim: int, *, act: str = "silu", condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.cond_proj = nn.Linear(condition_dim, dim_in, bias=False) if condition_dim is not None else None
        self.act = activation(act)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            if self.cond_proj is None:
                raise UserError("this embedding has no layer for a second input")
            x = x + self.cond_proj(condition)
        out: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return out
