"""Which device computes, in which type it does so itself, and how much of the CPU's memory is free.

>>> choose_device("cpu")
device(type='cpu')
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
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


# --- memory ----------------------------------------------------------------------------------------------------------

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {  # of a control group, version 2 and 1: its limit, what is used of it, and what of that could be had again
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_host_bytes() -> int:
    """The CPU's memory that this process may still take without swapping, in bytes.

    What the system calls available, or what is left within the limits of the control groups that the process is in, as
    a container has them.
    """
    import psutil

    return max(min([int(psutil.virtual_memory().available), *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    """What is left within each limit of the process's own control groups and those around them."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        for kind in set(kinds.split(",")) & set(_FILES):
            root = _GROUPS / kind
            own = root / path.lstrip("/")  # which a container may see at the root
            for group in (own, *own.parents):
                yield from _left(group, *_FILES[kind])
                if group == root:
                    break


def _left(group: Path, limit: str, used: str, idle: str) -> Iterator[int]:
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield most - now + int(counted[idle])
    except (OSError, ValueError, KeyError):  # no limit, or none that can be read
        return
