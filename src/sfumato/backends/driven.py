"""A network whose own `forward` another engine computes, while everything else of it stays as it is.

`drive` puts a `Driven` in the place of a module's `forward`. The module keeps its class, config, weights and names, so
whoever calls it, saves it or widens its weights need not know. What an engine cannot be given goes to the module's own
`forward`, with one warning for each reason: attention processors that are not the library's, hooks and other changes
inside, gradients, training.

>>> layer = nn.Linear(2, 2).eval()
>>> drive(layer, lambda module, unit: lambda x: x + unit)
>>> with torch.no_grad():
...     layer(torch.zeros(1, 2)).tolist()
[[1.0, 1.0]]
>>> release(layer)
>>> "forward" in vars(layer)
False
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.networks.attention import Attention, AttnProcessor

LOG = logging.getLogger("sfumato")

Forward = Callable[..., Any]
Engine = Callable[[nn.Module, int], Forward]
"""`(module, unit) -> forward`: what computes a module's call, of which height and width are multiples of `unit`."""


@runtime_checkable
class Choosy(Protocol):
    """What an engine makes of a module where it cannot take every call."""

    def __call__(self, *args: Any, **slots: Any) -> Any: ...

    def why_not(self, slots: Mapping[str, Any]) -> str | None:
        """Why a call with these slots is to be left to torch; None where it is not."""
        ...


class Driven:
    """Stands in the place of one module's `forward`.

    Args:
        module: whose call it is.
        engine: makes what computes it.
        unit: height and width of its inputs are multiples of it.
        name: of the backend, for the warnings.
    """

    def __init__(self, module: nn.Module, engine: Engine, unit: int, name: str) -> None:
        self.module, self.engine, self.unit, self.name = module, engine, unit, name
        self.run = engine(module, unit)
        self._told: set[str] = set()

    def __call__(self, *args: Any, **slots: Any) -> Any:
        why = why_not(self.module, (*args, *slots.values()))
        if why is None and isinstance(self.run, Choosy):
            why = self.run.why_not(slots)
        if why is None:
            return self.run(*args, **slots)
        if why not in self._told:
            self._told.add(why)
            LOG.warning("backend %s leaves %s to torch: %s", self.name, type(self.module).__name__, why)
        return own_forward(self.module)(*args, **slots)

    def __deepcopy__(self, memo: dict[int, Any]) -> Driven:
        return Driven(copy.deepcopy(self.module, memo), self.engine, self.unit, self.name)


def drive(module: nn.Module, engine: Engine, *, unit: int = 1, name: str = "custom") -> None:
    """Let an engine compute the module's `forward` from now on."""
    vars(module)["forward"] = Driven(module, engine, unit, name)


def release(module: nn.Module) -> None:
    """Let the module compute its `forward` itself again."""
    if isinstance(vars(module).get("forward"), Driven):
        del vars(module)["forward"]


def own_forward(module: nn.Module) -> Forward:
    """The `forward` of the module's class, bound to it."""
    bound: Forward = type(module).forward.__get__(module)
    return bound


def why_not(module: nn.Module, given: tuple[Any, ...]) -> str | None:
    """Why a call cannot be given to another engine, in words; None where it can.

    Args:
        given: all arguments of the call.
    """
    if module.training:
        return "it is being trained"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(given)):
        return "gradients are asked for"
    for inner in module.modules():
        if isinstance(inner, Attention) and type(inner.processor) is not AttnProcessor:
            return f"the attention processor {type(inner.processor).__name__} is not the library's own"
        if inner is not module and ("forward" in vars(inner) or inner._forward_hooks or inner._forward_pre_hooks):
            return f"something changes what its {type(inner).__name__} computes"
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in the arguments or the result of a call, however they are put together."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_in(inner)
