"""Which device computes.

>>> choose_device("cpu")
device(type='cpu')
"""

from __future__ import annotations

import torch

from sfumato.errors import UserError


def default_device() -> torch.device:
    """A GPU or other accelerator if torch has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU if torch has one. Raises `UserError` when it is not there."""
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # torch's list of every device it has heard of
            reason = "there is no such kind of device; auto, cpu or the GPU's name in torch are expected"
        raise UserError(f"device {name!r} cannot be used here ({reason})") from None
    return device
