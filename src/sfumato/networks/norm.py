"""Group normalisation, with a backward pass of our own where torch's is slow.

On a CPU, in bfloat16 and channels-last memory, torch's backward pass takes a slow road unless the channels of a group
come in sixteens: some five times as long as the sums and products below, which are written for exactly that case.
Everywhere else this is `torch.nn.GroupNorm`, and its names and results are the same.

>>> GroupNorm(4, 8)(torch.zeros(1, 8, 2, 2)).shape
torch.Size([1, 8, 2, 2])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LANES = 16  # torch's fast road needs groups of a multiple of so many channels


class GroupNorm(nn.GroupNorm):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over groups of channels (Wu 2018): (B, C, …) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._slow_in_torch(x):
            return super().forward(x)
        out: Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return out

    def _slow_in_torch(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == torch.bfloat16
            and x.ndim == 4
            and self.affine
            and torch.is_grad_enabled()
            and (self.num_channels // self.num_groups) % _LANES != 0
            and x.is_contiguous(memory_format=torch.channels_last)
        )


class _GroupNorm(torch.autograd.Function):
    """torch's forward pass; a backward pass of two reductions over positions and two passes over the input.

    With `x̂ = (x - mean) r`, `r = 1 / sqrt(var + eps)` and `g = weight · dy`, means taken over a group:
    `dx = r (g - mean(g) - x̂ mean(g x̂))`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        grouped = (batch, ctx.groups, channels // ctx.groups)
        mean, r = (v.float().view(batch, ctx.groups, 1) for v in (mean, rstd))
        w = weight.float().view(1, *grouped[1:])
        sum_dy = dy.sum((2, 3), dtype=torch.float32).view(grouped)
        sum_dy_x = (dy * x).sum((2, 3), dtype=torch.float32).view(grouped)
        n = grouped[2] * height * width
        mean_g = (w * sum_dy).sum(2, keepdim=True) / n
        mean_g_xhat = ((w * sum_dy_x).sum(2, keepdim=True) / n - mean * mean_g) * r

        def each(value: Tensor) -> Tensor:
            return value.expand(grouped).reshape(batch, channels, 1, 1).to(x.dtype)

        dx = torch.addcmul(each(r * (mean * r * mean_g_xhat - mean_g)), x, each(-r * r * mean_g_xhat))
        dx.addcmul_(dy, each(r * w))
        d_weight = ((sum_dy_x - mean * sum_dy) * r).sum(0).flatten()
        d_bias = sum_dy.sum(0).flatten()
        return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None
