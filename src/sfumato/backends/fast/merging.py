"""Tokens that say nearly the same are merged before self-attention and parted again after it (Bolya 2023, "Token
Merging for Fast Stable Diffusion").

In every window of 2 x 2 tokens one is a destination, the others are sources. Each source is matched with the
destination most like it (cosine similarity); the sources with the best matches join their destinations, whose mean goes
on, and afterwards each token gets what became of its own. The cost of self-attention falls with the square of the
tokens that are left. Which token of a window is the destination changes from call to call, in an order that is the same
for every picture, so that a picture does not depend on its neighbours or its seed.

>>> x = torch.arange(4.0).reshape(1, 4, 1) // 2 + 1
>>> match = matched(x, destinations(2, 2, 0), 2)
>>> match.merge(x).flatten().tolist(), bool(torch.equal(match.part(match.merge(x)), match.part(match.merge(x))))
([2.0, 1.3333333730697632], True)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.attention import Attention
from sfumato.networks.transformer import BasicTransformerBlock
from sfumato.networks.unet_condition import UNet2DConditionModel

MOST = 0.75
"""The share of tokens that are sources; no more can be merged."""


@dataclass(frozen=True)
class Match:
    """Who goes where, of each picture.

    Attributes:
        kept: (B, L - r), tokens that go on as they are or as destinations, the destinations last.
        joined: (B, r), tokens that join a destination …
        into: (B, r), … and the place of that one among the tokens that go on.
        back: (B, L), where each token's own is found among those.
    """

    kept: Tensor
    joined: Tensor
    into: Tensor
    back: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L - r, C); destinations become the mean of themselves and those that join."""
        channels = x.shape[-1]
        left, joined = x.gather(1, _wide(self.kept, channels)), x.gather(1, _wide(self.joined, channels))
        return left.scatter_reduce(1, _wide(self.into, channels), joined, "mean", include_self=True)

    def part(self, y: Tensor) -> Tensor:
        """(B, L - r, C) -> (B, L, C)."""
        return y.gather(1, _wide(self.back, y.shape[-1]))


def _wide(index: Tensor, channels: int) -> Tensor:
    return index[..., None].expand(-1, -1, channels)


def destinations(height: int, width: int, turn: int) -> Tensor:
    """(h w / 4,), one token of each whole window of 2 x 2, chosen evenly at random by the number `turn` alone.

    Raises:
        UserError: where there is no window.
    """
    rows, columns = height // 2, width // 2
    if not rows or not columns:
        raise UserError("this picture is too small for merging tokens: it has no window of 2 x 2; leave merge out")
    chosen = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(turn))
    y = 2 * torch.arange(rows)[:, None] + chosen // 2
    x = 2 * torch.arange(columns)[None] + chosen % 2
    return (y * width + x).flatten()


def matched(x: Tensor, to: Tensor, count: int) -> Match:
    """Match tokens (B, L, C) with the destinations `to` (n,), `count` of them to be merged, at most L - n."""
    batch, length = x.shape[:2]
    is_source = torch.ones(length, dtype=torch.bool)
    is_source[to] = False
    to = to.to(x.device)
    sources = is_source.nonzero().flatten().to(x.device)
    count = min(count, len(sources))
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    likeness, nearest = (unit[:, sources] @ unit[:, to].transpose(1, 2)).max(dim=-1)
    order = likeness.argsort(dim=-1, descending=True, stable=True)
    best, rest = order[:, :count], order[:, count:]
    joined, alone = sources[best], sources[rest]
    kept = torch.cat([alone, to.expand(batch, -1)], dim=1)
    into = nearest.gather(1, best) + alone.shape[1]
    places = torch.arange(kept.shape[1], device=x.device).expand(batch, -1)
    back = torch.empty(batch, length, dtype=torch.int64, device=x.device)
    return Match(kept, joined, into, back.scatter(1, kept, places).scatter(1, joined, into))


class Merger:
    """The hooks that merge before attentions and part after them.

    Args:
        share: of the tokens, in (0, 0.75).
        level: how often the latents are halved where the attentions are.
    """

    def __init__(self, share: float, level: int) -> None:
        self.share, self.level = share, level
        self._turn, self._to, self._length = 0, torch.empty(0), 0
        self._match: Match | None = None

    def begin(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a call of the network: choose the destinations."""
        height, width = (side >> self.level for side in args[0].shape[-2:])
        self._to, self._length = destinations(height, width, self._turn), height * width
        self._turn += 1

    def before(self, attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Merge what an attention is given."""
        x: Tensor = args[0]
        if x.ndim != 3 or x.shape[1] != self._length:
            raise RuntimeError(f"expected {self._length} tokens at this resolution, got {tuple(x.shape)}")
        self._match = matched(x, self._to, round(self.share * self._length))
        return (self._match.merge(x), *args[1:])

    def after(self, attention: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Part what it gives."""
        assert self._match is not None
        match, self._match = self._match, None
        return match.part(out)


@contextmanager
def merged(network: nn.Module, share: float) -> Iterator[None]:
    """Make a network merge tokens for a while; afterwards it is as it was. Raises `UserError` as `check_merging`."""
    level, attentions = check_merging(network)
    merger = Merger(share, level)
    handles = [network.register_forward_pre_hook(merger.begin)]
    for attention in attentions:
        handles += [attention.register_forward_pre_hook(merger.before), attention.register_forward_hook(merger.after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_merging(network: nn.Module) -> tuple[int, list[Attention]]:
    """The outermost level with self-attentions of transformers, and these. Raises `UserError` where there are none."""
    if isinstance(network, UNet2DConditionModel):
        last = len(network.down_blocks) - 1
        for level in range(last + 1):
            blocks = [network.down_blocks[level], network.up_blocks[last - level]]
            if level == last and network.mid_block is not None:
                blocks.append(network.mid_block)
            inner = [part for block in blocks for part in block.modules() if isinstance(part, BasicTransformerBlock)]
            if found := [part.attn1 for part in inner if not part.only_cross]:
                return level, found
    raise UserError(
        f"tokens can be merged in a UNet with transformers that torch runs as it stands; this "
        f"{type(network).__name__} has none"
    )
