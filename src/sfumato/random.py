"""Randomness that belongs to the picture: one CPU generator per picture, whatever the batch, device or type.

Picture `i` of a call has seed `N + i`, so that its noise does not depend on who shares the batch with it.
Two kinds of noise: `draw`, fresh unit normals in order, and `between`, increments of one Brownian path per picture,
which a stochastic solver asks for by interval, so that the noise is the same for any number of steps.

>>> a = NoiseSource([5, 6], (1, 2, 2)).draw()
>>> b = NoiseSource([6], (1, 2, 2)).draw()
>>> bool((a[1] == b[0]).all())
True
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import UserError

_DEPTH = 22  # levels of bisection: the finest interval is 2 * _SPAN / 2**22, under 1e-5 in log nsr
_LEAVES = 1 << _DEPTH
_SPAN = 20.0  # the Brownian path lives on log nsr in [-20, 20], wider than any schedule


class NoiseSource:
    """Unit-normal noise for a batch of pictures, each from its own generator.

    Args:
        seeds: one non-negative seed per picture, below 2**63.
        shape: the shape of one picture, (C, H, W) or (C, F, H, W).
        dtype, device: of the tensors returned; numbers are always drawn, and the path of `between` added up, in float32
            on the CPU (float64 if asked).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seeds, self.shape = tuple(int(s) for s in seeds), tuple(shape)
        self.dtype, self.device = dtype, torch.device(device)
        self._drawn_as = torch.float64 if dtype == torch.float64 else torch.float32
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self._paths: OrderedDict[int, Tensor] = OrderedDict()
        self._rounds = 0

    def draw(self) -> Tensor:
        """N(0, I) of shape (B, *shape): the next numbers of each picture's own stream."""
        return self._stack(self._generators).to(self.device, self.dtype)

    def between(self, u: float, v: float) -> Tensor:
        """`(W(v) - W(u)) / sqrt(|v - u|)`, (B, *shape), of one Brownian path `W` per picture over log nsr.

        The path is fixed by the picture's seed: intervals that add up have increments that add up. Ends outside
        [-20, 20] (a clean or a fully noisy level) are moved to that border. `u == v` raises `ValueError`.
        """
        i, j = self._leaf(u), self._leaf(v)
        if i == j:
            raise ValueError(f"a Brownian increment needs two different ends, got [{u}, {v}]")
        unit = math.sqrt(2 * _SPAN / _LEAVES)
        increment = (self._path(j) - self._path(i)) * (1 / (unit * math.sqrt(abs(j - i))))
        return increment.to(self.device, self.dtype)

    def reshaped(self, shape: Sequence[int]) -> NoiseSource:
        """The same streams, from where they are now, cut to another shape. This source must not be drawn from again."""
        after = NoiseSource(self.seeds, shape, dtype=self.dtype, device=self.device)
        after._generators = self._generators
        return after

    def new_path(self) -> None:
        """From here on `between` follows another path: a grid that went up again crosses intervals a second time, and
        their noise must not be that of the first."""
        self._rounds += 1
        self._paths.clear()

    def _leaf(self, u: float) -> int:
        clamped = min(max(u, -_SPAN), _SPAN)
        return round((clamped + _SPAN) / (2 * _SPAN) * _LEAVES)

    def _path(self, leaf: int) -> Tensor:
        """W at a leaf, by Brownian bridges from the whole span down (Levy's construction)."""
        low, high = 0, _LEAVES
        w_low, w_high = torch.zeros(()), self._node(-1, math.sqrt(2 * _SPAN))
        if leaf in (low, high):
            return w_low if leaf == low else w_high
        while True:
            middle = (low + high) // 2
            bridge = math.sqrt((high - low) / _LEAVES * 2 * _SPAN) / 2
            w_middle = (w_low + w_high) / 2 + self._node(middle, bridge)
            if middle == leaf:
                return w_middle
            if leaf < middle:
                high, w_high = middle, w_middle
            else:
                low, w_low = middle, w_middle

    def _node(self, node: int, scale: float) -> Tensor:
        """The normal draw that belongs to a node of the tree, the same whenever it is asked for."""
        if node in self._paths:
            self._paths.move_to_end(node)
            return self._paths[node] * scale
        again = (self._rounds,) if self._rounds else ()
        seeds = (derived_seed("brownian", seed, node, *again) for seed in self.seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._paths[node] = self._stack(generators)
        if len(self._paths) > 4 * _DEPTH:
            self._paths.popitem(last=False)
        return self._paths[node] * scale

    def _stack(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g, dtype=self._drawn_as) for g in generators])


class NoNoise(NoiseSource):
    """Where there must be none: every question raises `UserError` with this sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__((), ())
        self._sentence = sentence

    def draw(self) -> Tensor:
        raise UserError(self._sentence)

    def between(self, u: float, v: float) -> Tensor:
        raise UserError(self._sentence)


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is a hash of its parts: independent streams from one seed, by name and number."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
