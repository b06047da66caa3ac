"""torch's own compiler as a backend: `torch.compile`, which on a CPU needs a C++ compiler.

>>> engine.__name__
'engine'
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from sfumato.backends.driven import Engine, Forward, own_forward
from sfumato.errors import UserError


def engine(device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for networks there. Raises `UserError` where nothing can be compiled."""
    reason = refused(device)
    if reason is not None:
        raise UserError(f"backend compile cannot be used here: torch.compile found no working compiler ({reason})")
    return _forward


@cache
def refused(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, tried once on a sum; None where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: none is found, it fails, the platform is not supported
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None


def _forward(module: nn.Module, unit: int) -> Forward:
    compiled: Any = torch.compile(own_forward(module))
    forward: Forward = compiled
    return forward
