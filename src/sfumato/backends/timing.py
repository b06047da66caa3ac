"""Short measurements, by which one way of computing is chosen over another, and the memory that a process has held.

>>> least_seconds(lambda: sum(range(1000)), repeat=2) > 0
True
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def least_seconds(call: Callable[[], Any], device: torch.device | None = None, repeat: int = 3) -> float:
    """Seconds of a call without gradients, the least of some after one that does not count.

    Args:
        device: what it computes on and is waited for; None for the CPU.
    """
    return min([_seconds(call, device) for _ in range(repeat + 1)][1:])


def times_as_fast(one: Callable[[], Any], other: Callable[[], Any], repeat: int = 3) -> float:
    """How many times as fast a call on the CPU is as another: by the least of each, after one that does not count. They
    take turns, so that what else the machine does falls on both."""
    turns = [(_seconds(one), _seconds(other)) for _ in range(repeat + 1)][1:]
    return min(seconds for _, seconds in turns) / min(seconds for seconds, _ in turns)


@torch.no_grad()
def _seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    began = time.perf_counter()
    call()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of the memory that the device computes in; None where the system does
    not tell."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
