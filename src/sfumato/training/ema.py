"""The exponential moving average of a module's weights.

>>> import torch
>>> module = torch.nn.Linear(1, 1, bias=False)
>>> _ = torch.nn.init.zeros_(module.weight)
>>> ema = EMA(module, decay=0.5, warmup=False)
>>> _ = torch.nn.init.ones_(module.weight)
>>> ema.update()
>>> ema.averages["weight"].item(), module.weight.item()
(0.5, 1.0)
>>> with ema.in_place():
...     module.weight.item()
0.5
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of all floating-point entries of a module's state dict, in float32.

    Args:
        module: whose weights are followed; its entries are read in place at every update.
        decay: in [0, 1); 0 makes the average equal to the weights.
        warmup: use `min(decay, (1 + n) / (10 + n))` at update n.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._live = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
        self.averages = {n: t.detach().float().clone() for n, t in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in: `average += (1 - decay_n) (weight - average)`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        averages = list(self.averages.values())
        live = [t.to(a.dtype) for t, a in zip(self._live.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, live, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within the block the module holds the averages; its own weights come back after it, whatever happens."""
        kept = {n: t.detach().clone() for n, t in self._live.items()}
        try:
            for name, tensor in self._live.items():
                tensor.copy_(self.averages[name])
            yield
        finally:
            for name, tensor in self._live.items():
                tensor.copy_(kept[name])

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Take over stored averages."""
        for name, tensor in self.averages.items():
            tensor.copy_(averages[name])
        self.updates = updates
