"""Deep features of a UNet, kept from one evaluation for the next ones (Ma 2023, "DeepCache").

From step to step the deep features of a UNet change slowly, the outer ones fast. So the whole network is evaluated in
the first two calls, since no step changes as much as the first one, and then in every `every`-th; what enters the last
layers on the way up is kept, and between only these layers and those whose skip features they take are evaluated. The
count of calls decides, not the time that they are asked at, so every solver will do; it begins anew where the size or
the type of the input changes.

Guidance asks about twice the pictures (three times with a negative that is a branch of its own), the conditional branch
last. Where a call about that alone follows, it takes its part of what is kept.

>>> from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
>>> network = UNet2DModel(UNet2DConfig.from_dict({"block_out_channels": [32, 32], "layers_per_block": 1,
...     "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}))
>>> x = torch.zeros(1, 3, 8, 8)
>>> with torch.no_grad(), cached(network, every=2, depth=1) as cache:
...     _, whole, shallow = (network(x, 9) for _ in range(3))
>>> bool(torch.equal(whole, shallow)), cache.whole_calls, cache.shallow_calls
(True, 2, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.networks.resnet import ResnetBlock2D
from sfumato.networks.unet_2d import UNet2DModel
from sfumato.networks.unet_blocks import NOTHING, DownBlock, UpBlock
from sfumato.networks.unet_condition import UNet2DConditionModel

UNet = UNet2DModel | UNet2DConditionModel

FIRST = 2
"""So many calls are evaluated whole before anything is kept from one for the next."""


class Cache:
    """What is kept between the calls of one network, and the walks through its blocks that use it.

    Args:
        every: after the `FIRST` calls the whole network is evaluated in every so-many-th.
        depth: how many of the outermost skip connections are evaluated in all of them.

    Attributes:
        whole_calls, shallow_calls: how many calls were evaluated whole, and how many not.
    """

    def __init__(self, every: int, depth: int) -> None:
        self.every, self.depth = every, depth
        self.whole_calls = self.shallow_calls = 0
        self._kept: Tensor | None = None
        self._asked: tuple[Any, ...] = ()
        self._since, self._shallow, self._rows = 0, False, 0

    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of the network: decide whether it is evaluated whole."""
        if kwargs.get("residuals") is not None:
            raise UserError("kept features cannot be combined with residuals added to the skips; leave the cache out")
        x: Tensor = args[0]
        asked, self._rows = (x.shape[1:], x.dtype, x.device), len(x)
        kept = 0 if self._kept is None else len(self._kept)
        fits = asked == self._asked and kept in (self._rows, 2 * self._rows, 3 * self._rows)
        self._shallow = fits and self.whole_calls >= FIRST and self._since + 1 < self.every
        self._since = self._since + 1 if self._shallow else 0
        self._asked = asked
        self.shallow_calls += self._shallow
        self.whole_calls += not self._shallow

    def _through(self, x: Tensor) -> Tensor:
        """The features at the border of the deep part: kept in a whole call, taken from there in another."""
        if not self._shallow:
            self._kept = x
            return x
        assert self._kept is not None
        return self._kept[-self._rows :]

    def down(self, block: DownBlock, first: int, whole: Callable[..., Any]) -> Callable[..., Any]:
        """A way through a block on the way down whose first skip has number `first`, counted from the outermost."""

        def forward(x: Tensor, emb: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
            if not self._shallow:
                return cast(tuple[Tensor, list[Tensor]], whole(x, emb, *rest))
            skips: list[Tensor] = []
            for index in range(len(block.resnets)):
                if first + index >= self.depth:
                    return x, skips
                x = block.layer(index, x, emb, *(rest or (NOTHING,)))
                skips.append(x)
            if block.downsamplers is not None and first + len(skips) < self.depth:
                x = _resampled(block.downsamplers[0], x, emb)
                skips.append(x)
            return x, skips

        return forward

    def middle(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        """A way past the block in the middle."""

        def forward(x: Tensor, *rest: Any) -> Tensor:
            return x if self._shallow else cast(Tensor, whole(x, *rest))

        return forward

    def up(self, block: UpBlock, first: int, whole: Callable[..., Any]) -> Callable[..., Any]:
        """A way through a block on the way up whose first layer takes the skip of number `first`."""
        last = first - len(block.resnets) + 1

        def forward(x: Tensor, skips: list[Tensor], emb: Tensor, *rest: Any) -> Tensor:
            if not self._shallow and not last <= self.depth - 1 <= first:  # the border is not here
                return cast(Tensor, whole(x, skips, emb, *rest))
            for index in range(len(block.resnets)):
                number = first - index
                if self._shallow and number >= self.depth:
                    continue
                if number == self.depth - 1:
                    x = self._through(x)
                x = block.layer(index, torch.cat([x, skips.pop()], dim=1), emb, *(rest or (NOTHING,)))
            if block.upsamplers is not None and not (self._shallow and last >= self.depth):
                x = _resampled(block.upsamplers[0], x, emb)
            return x

        return forward


def _resampled(sampler: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    return cast(Tensor, sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x))


@contextmanager
def cached(network: nn.Module, every: int, depth: int) -> Iterator[Cache]:
    """Make a network keep its deep features for a while; afterwards it is as it was.

    Args:
        every, depth: as of `Cache`.

    Raises:
        UserError: for a network that is no UNet of ours, or a depth that it does not have.
    """
    unet, cache = check_depth(network, depth), Cache(every, depth)
    ways: dict[nn.Module, Callable[..., Any]] = {}
    number = 1  # the skip of number 0 is that of `conv_in`
    for down in cast(list[DownBlock], list(unet.down_blocks)):
        ways[down] = cache.down(down, number, down.forward)
        number += _skips(down)
    if unet.mid_block is not None:
        ways[unet.mid_block] = cache.middle(unet.mid_block.forward)
    for up in cast(list[UpBlock], list(unet.up_blocks)):
        ways[up] = cache.up(up, number - 1, up.forward)
        number -= len(up.resnets)
    before = {block: block.__dict__.get("forward") for block in ways}
    for block, way in ways.items():
        block.__dict__["forward"] = way
    handle = unet.register_forward_pre_hook(cache.begin, with_kwargs=True)
    try:
        yield cache
    finally:
        handle.remove()
        for block, forward in before.items():
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def check_depth(network: nn.Module, depth: int) -> UNet:
    """The network as a UNet of that depth. Raises `UserError` where it is not one."""
    if not isinstance(network, UNet):
        raise UserError(
            f"deep features can be kept in a UNet that torch runs as it stands; this network is a "
            f"{type(network).__name__}"
        )
    most = sum(_skips(cast(DownBlock, block)) for block in network.down_blocks)
    if not 1 <= depth <= most:
        raise UserError(f"cache_depth must be 1 to {most} for this network, got {depth}")
    return network


def _skips(block: DownBlock) -> int:
    return len(block.resnets) + (block.downsamplers is not None)
