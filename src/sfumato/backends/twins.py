"""What the branches of guidance have in common is computed once.

Guidance calls a network with every picture twice, once with its text and once without (three times where a negative
prompt is a branch of its own). Until the text comes in, at the first cross-attention, both halves of the batch are the
same; in a UNet of Stable Diffusion the part before it holds one of five self-attentions over all pixels. `engage` lets
the parts before the first cross-attention look whether the halves (or thirds) of what they are given are equal, compute
one of them, and repeat the result. Where they are not equal, or looking costs as much as computing, the whole batch is
computed.

>>> seen = []
>>> part = nn.Sequential(nn.Identity()).eval()
>>> handle = part[0].register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
>>> vars(part)["forward"] = Once(part, least=1)
>>> x = torch.tensor([[1.0], [2.0]])
>>> with torch.no_grad():
...     part(torch.cat([x, x])).flatten().tolist(), part(torch.cat([x, 2 * x])).flatten().tolist(), seen
([1.0, 2.0, 1.0, 2.0], [1.0, 2.0, 2.0, 4.0], [2, 4])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.backends.driven import own_forward
from sfumato.networks.attention import Attention, AttnProcessor
from sfumato.networks.resnet import Downsample2D, ResnetBlock2D
from sfumato.networks.transformer import BasicTransformerBlock
from sfumato.networks.unet_condition import UNet2DConditionModel

LEAST = 2**20
"""Numbers that a part is given from which it looks: a UNet of Stable Diffusion has 2,621,440 there at 512 pixels."""


class Once:
    """Stands in the place of a module's `forward`, whose arguments and result have pictures in their first dimension.

    Args:
        module: whose call it is.
        least: numbers in its first argument from which it looks.
    """

    def __init__(self, module: nn.Module, least: int = LEAST) -> None:
        self.module, self.least, self.own = module, least, own_forward(module)

    def __call__(self, x: Tensor, *args: Any, **slots: Any) -> Tensor:
        if (times := self._repeats(x, *args, *slots.values())) > 1:

            def first(value: Any) -> Any:
                return value.chunk(times)[0] if isinstance(value, Tensor) else value

            one: Tensor = self.own(first(x), *map(first, args), **{name: first(one) for name, one in slots.items()})
            return torch.cat([one] * times)
        out: Tensor = self.own(x, *args, **slots)
        return out

    def _repeats(self, x: Tensor, *others: Any) -> int:
        """How many times (2, 3, or 1) all that is given repeats its first part, where it may be taken apart."""
        if x.numel() < self.least or (len(x) % 2 and len(x) % 3) or x.device.type != "cpu" or self.module.training:
            return 1
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined,no-untyped-call]
            return 1
        if isinstance(self.module, Attention) and type(self.module.processor) is not AttnProcessor:
            return 1
        if any(one is not None and not (isinstance(one, Tensor) and len(one) == len(x)) for one in others):
            return 1
        given = [x, *(one for one in others if one is not None)]
        if torch.is_grad_enabled() and any(one.requires_grad for one in (*given, *self.module.parameters())):
            return 1
        return next((times for times in (2, 3) if all(_same_parts(one, times) for one in given)), 1)


def _same_parts(value: Tensor, times: int) -> bool:
    if len(value) % times:
        return False
    first, *others = value.chunk(times)
    return all(torch.equal(first, other) for other in others)


def engage(network: nn.Module) -> None:
    """Let the parts of a network before its first cross-attention compute what repeats once. Networks without
    cross-attention stay as they are: there the branches differ from the start."""
    if isinstance(network, UNet2DConditionModel):
        for part in common(network):
            vars(part)["forward"] = Once(part)


def release(network: nn.Module) -> None:
    """Undo `engage`."""
    for module in network.modules():
        if isinstance(vars(module).get("forward"), Once):
            del vars(module)["forward"]


def common(network: UNet2DConditionModel) -> list[nn.Module]:
    """The residual blocks, downsamplings and the self-attention that come before a first cross-attention; none where
    there is no cross-attention on the way down."""
    found: list[nn.Module] = []
    for block in network.down_blocks:
        first = next((part for part in block.modules() if isinstance(part, BasicTransformerBlock)), None)
        if first is not None:
            found.append(next(part for part in block.modules() if isinstance(part, ResnetBlock2D)))
            return found if first.only_cross else [*found, first.attn1]
        found += [part for part in block.modules() if isinstance(part, ResnetBlock2D | Downsample2D)]
    return []
