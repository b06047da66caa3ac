"""What a model's networks are, at a glance: told again later, it shows whether someone has altered them.

A picture names the file of the weights that drew it. Weights are open to everyone in Python: an optimizer, `add_`, a
module in the place of another, other attention processors. So the networks are looked at when a model is opened and
when settings are recorded: the classes of all modules, and of every parameter and buffer its name, its shape and 16
values evenly spread over it. That takes milliseconds and touches hardly any of the memory. Types, layouts and devices
do not count, and whatever keeps the values: a wider type is the same network.

>>> layer = nn.Linear(64, 64)
>>> before = of({"network": layer})
>>> layer = layer.double()
>>> altered(before, of({"network": layer}))
()
>>> _ = layer.weight.data.mul_(1.5)
>>> altered(before, of({"network": layer}))
('network',)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from sfumato.networks.attention import Attention, AttnProcessor

PROCESSORS = "attention processors"
_VALUES = 16
_PLAIN = (Tensor, nn.Parameter)
_PLACE = ".processor"  # a foreign processor's weights are told as that, not as the network's


def of(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """A digest of each network by its name, and, where there are foreign ones, of `PROCESSORS`."""
    foreign: set[str] = set()
    found = {name: _digest(network, foreign) for name, network in networks.items()}
    return found | ({PROCESSORS: ", ".join(sorted(foreign))} if foreign else {})


def altered(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """The names of what is another one now."""
    return tuple(name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name))


@torch.no_grad()
def _digest(network: nn.Module, foreign: set[str]) -> str:
    """Of classes, names, shapes and a few values; the classes of foreign attention processors are added to a set."""
    digest, values = hashlib.blake2b(digest_size=16), []
    for name, module in network.named_modules():
        if _PLACE in name:
            continue
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
        if isinstance(module, Attention) and type(module.processor) is not AttnProcessor:
            foreign.add(getattr(module.processor, "__qualname__", type(module.processor).__qualname__))
        for own, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                kind = "" if type(tensor) in _PLAIN else type(tensor).__qualname__
                digest.update(f"{own} {tuple(tensor.shape)} {kind}\n".encode())
                values.append(_sampled(tensor))
    if len({one.device for one in values}) > 1:
        values = [one.cpu() for one in values if not one.is_meta]
    if values and not values[0].is_meta:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> Tensor:
    """A few values of a tensor as float32, at the same places whatever its layout in memory; none of one without plain
    memory (sparse, packed, of a class of its own) or without any."""
    odd = type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_quantized
    if odd or not tensor.numel():
        return torch.zeros(0, device=tensor.device)
    places = _places(tuple(tensor.shape), tensor.stride(), tensor.device)
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).index_select(0, places).float()


@lru_cache(maxsize=1024)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets in memory of values that are evenly spread over a tensor of this layout, the last one among them."""
    count = 1
    for size in shape:
        count *= size
    chosen = [i * (count - 1) // (_VALUES - 1) for i in range(_VALUES)] if count > _VALUES else list(range(count))
    offsets = []
    for index in chosen:
        offset = 0
        for size, step in zip(reversed(shape), reversed(strides), strict=True):
            index, rest = divmod(index, size)
            offset += rest * step
        offsets.append(offset)
    return torch.tensor(offsets, dtype=torch.int64, device=device)
