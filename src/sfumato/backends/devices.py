"""Which device computes, in which type it does so itself, and how much of the CPU's memory is free.

>>> choose_device("cpu")
device(type='cpu')
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from sfumato.errors import UserError


def default_device() -> torch.device:
    """A GPU or other accelerator if torch has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes with bfloat16 itself; where it is emulated float32 is faster, on a CPU up to a hundred
    times. Of a kind that torch tells nothing about, yes."""
    if device.type != "cpu":
        tells = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
        return tells is None or bool(tells(including_emulation=False))
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call,unused-ignore]
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # where oneDNN says yes to what it emulates, too
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def free_host_bytes() -> int | None:
    """The CPU's memory that this process may still take without swapping, in bytes; None where it is not known.

    What Linux calls available, or what is left within the limit of a container (control groups, version 2).
    """
    group = Path("/sys/fs/cgroup")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(min(free, limit - used + int(counted["inactive_file"])), 0)
    except (OSError, ValueError, KeyError):  # no limit, or none that can be read
        return free
