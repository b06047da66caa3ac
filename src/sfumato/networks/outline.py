"""Networks made on a device, or only outlined on "meta": names and shapes without memory.

What is drawn for new weights means nothing there, and for normal numbers torch would import its compiler first, which
takes longer than everything else of opening a small model.

>>> with made_on("meta"):
...     network = nn.Embedding(3, 2)
>>> network.weight.is_meta, network.weight.shape
(True, torch.Size([3, 2]))
>>> with made_on("cpu"):
...     bool(nn.Linear(3, 2).weight.any())
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAW = (Tensor.normal_, Tensor.uniform_)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where they were to be initialised."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DRAW or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Modules and tensors made here lie on a device; on "meta" nothing is initialised."""
    with torch.device(device), _Undrawn() if device == "meta" else nullcontext():
        yield
