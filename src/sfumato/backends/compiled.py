"""torch's own compiler as a backend: `torch.compile`, which on a CPU needs a C++ compiler.

>>> engine.__name__
'engine'
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from sfumato.backends.driven import Engine, Forward, own_forward
from sfumato.errors import UserError


def engine(device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for networks there. Raises `UserError` where nothing can be compiled."""
    _check(device, "backend compile")
    return _forward


_LENGTHS = 32
"""Texts of a network that learns are made a multiple of so many tokens long."""


@cache
def refused(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, tried once on a sum; None where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: none is found, it fails, the platform is not supported
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None


def _check(device: torch.device, what: str) -> None:
    """Refuse, with a `UserError`, what needs a compiler where there is none."""
    if (reason := refused(device)) is not None:
        raise UserError(f"{what} cannot be used here: torch.compile found no working compiler ({reason})")


def engage_in_training(module: nn.Module) -> None:
    """Let the compiler compute a module's calls while it is trained.

    Calls without gradients stay with torch: they are few, and would be compiled for themselves. Every shape is compiled
    by itself: what a step computes must not depend on the shapes of those before it, or a resumed run would not be the
    same. So that they are few, texts with a mask get masked tokens at their end.

    Raises:
        UserError: where nothing can be compiled.
    """
    _check(next(module.parameters()).device, "train.compile")
    own = own_forward(module)
    compiled: Any = torch.compile(own, dynamic=False)

    def forward(*args: Any, **slots: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return own(*args, **slots)
        return compiled(*args, **_lengthened(slots))

    vars(module)["forward"] = forward


def _lengthened(slots: dict[str, Any]) -> dict[str, Any]:
    """The slots of a network with a text (B, L, D) and its mask (B, L) of a length that many have."""
    context, mask = slots.get("context"), slots.get("context_mask")
    if context is None or mask is None:
        return slots
    more = -context.shape[1] % _LENGTHS
    return slots | {"context": pad(context, (0, 0, 0, more)), "context_mask": pad(mask, (0, more))}


def _forward(module: nn.Module, unit: int) -> Forward:
    compiled: Any = torch.compile(own_forward(module))
    forward: Forward = compiled
    return forward
