"""Transformers over the pixels of a feature map, told a text: what stands between the residual blocks of latent
diffusion's UNet (Rombach 2022, section 3.3), under the ecosystem's names.

Pixels become tokens in (B, height x width, C) order, which is the memory order of a channels-last picture: there the
way in and out of the transformer copies nothing.

>>> block = Transformer2DModel(32, heads=4, context_dim=6)
>>> block(torch.zeros(1, 32, 4, 4), Attended(torch.zeros(1, 3, 6))).shape
torch.Size([1, 32, 4, 4])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import Attention
from sfumato.networks.norm import GroupNorm


@dataclass(frozen=True)
class Attended:
    """What the attentions of a network are given besides the features.

    Attributes:
        context: (B, L, C), the tokens of cross-attention.
        mask: (B, 1, L), added to the scores; None where every token is real.
        adapters: keyword arguments for the processors.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    adapters: Mapping[str, Tensor] = field(default_factory=dict)


class GEGLU(nn.Module):
    """`a * gelu(b)` with `[a, b] = W x` (Shazeer 2020): (..., dim) -> (..., inner)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


ROWS = 1024
"""Tokens that a feed-forward layer on a CPU takes at a time: what lies between its products stays in the cache."""


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        if self._plain(x):
            return self._by_rows(x)
        for layer in self.net:
            x = layer(x)
        return x

    def _plain(self, x: Tensor) -> bool:
        """Whether nothing but the products themselves is asked for, on a CPU."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or self.training:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined,no-untyped-call]
            return False
        gate, back = self.net[0], self.net[2]
        assert isinstance(gate, GEGLU)
        parts = (gate, gate.proj, back)
        own = type(gate) is GEGLU and type(gate.proj) is nn.Linear and type(back) is nn.Linear  # no adapter's layers
        return own and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)

    def _by_rows(self, x: Tensor) -> Tensor:
        """The same, some rows at a time, value and gate by products of their own."""
        gate, back = self.net[0], self.net[2]
        assert isinstance(gate, GEGLU) and isinstance(back, nn.Linear)
        (w_value, w_gate), (b_value, b_gate) = gate.proj.weight.chunk(2), gate.proj.bias.chunk(2)
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), back.out_features)
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            inner = F.linear(part, w_value, b_value).mul_(F.gelu(F.linear(part, w_gate, b_gate)))
            out[start : start + ROWS] = back(inner)
        return out.view(*x.shape[:-1], back.out_features)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and with a residual.

    Args:
        only_cross: the first attention too looks at the context instead of the tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(
            dim,
            heads=heads,
            head_dim=head_dim,
            context_dim=context_dim if only_cross else None,
            upcast_attention=upcast,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(
            dim, heads=heads, head_dim=head_dim, context_dim=context_dim, upcast_attention=upcast
        )
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, attended: Attended) -> Tensor:
        """(B, L, dim) -> the same shape."""
        context, mask = attended.context, attended.mask
        first = (context, mask) if self.only_cross else (None, None)
        x = self.attn1(self.norm1(x), *first, **attended.adapters) + x
        x = self.attn2(self.norm2(x), context, mask, **attended.adapters) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class Transformer2DModel(nn.Module):
    """GroupNorm, projection in, `depth` transformer blocks over the pixels, projection out, residual.

    Args:
        channels: of the feature map; `heads` must divide it.
        linear_projection: project the tokens by linear layers (Stable Diffusion 2, XL), not by 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        context_dim: int,
        depth: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise UserError(f"{channels} channels cannot be split into {heads} attention heads")
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in: nn.Module = _projection(channels, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels,
                heads=heads,
                head_dim=channels // heads,
                context_dim=context_dim,
                only_cross=only_cross,
                upcast=upcast,
            )
            for _ in range(depth)
        )
        self.proj_out: nn.Module = _projection(channels, linear_projection)

    def forward(self, x: Tensor, attended: Attended) -> Tensor:
        """(B, channels, H, W) -> the same shape and memory format."""
        height, width = x.shape[-2:]
        hidden = self.norm(x)
        if self.linear_projection:
            tokens = self.proj_in(_tokens(hidden))
        else:
            tokens = _tokens(self.proj_in(hidden))
        for block in self.transformer_blocks:
            tokens = block(tokens, attended)
        if self.linear_projection:
            tokens = self.proj_out(tokens)
        hidden = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if not x.is_contiguous(memory_format=torch.channels_last):
            hidden = hidden.contiguous()
        out: Tensor = x + (hidden if self.linear_projection else self.proj_out(hidden))
        return out


def _projection(channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)
