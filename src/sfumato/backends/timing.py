"""Short measurements, by which one way of computing is chosen over another.

>>> least_seconds(lambda: sum(range(1000)), repeat=2) > 0
True
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def least_seconds(call: Callable[[], Any], device: torch.device | None = None, repeat: int = 3) -> float:
    """Seconds of a call without gradients, the least of some after one that does not count.

    Args:
        device: what it computes on and is waited for; None for the CPU.
    """
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
