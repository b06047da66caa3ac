"""The lists that the property tests run over: a new schedule or parameterization joins here and gets all of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sfumato.diffusion.parameterization import EPS, FLOW, X0, Parameterization, V, edm
from sfumato.diffusion.schedule import (
    FlowSchedule,
    Schedule,
    SineSchedule,
    TableSchedule,
    VESchedule,
    cosine_alpha_bar,
    linear_alpha_bar,
    rescale_zero_terminal_snr,
    scaled_linear_alpha_bar,
    sigmoid_alpha_bar,
)

TABLES: dict[str, torch.Tensor] = {
    "linear": linear_alpha_bar(),
    "scaled_linear": scaled_linear_alpha_bar(),
    "cosine": cosine_alpha_bar(),
    "sigmoid": sigmoid_alpha_bar(),
    "zero_linear": rescale_zero_terminal_snr(linear_alpha_bar()),
    "zero_scaled_linear": rescale_zero_terminal_snr(scaled_linear_alpha_bar()),
}

SCHEDULES: dict[str, Schedule] = {
    **{name: TableSchedule(table) for name, table in TABLES.items()},
    "linear, linear interpolation": TableSchedule(TABLES["linear"], interpolation="linear"),
    "zero_linear, linear interpolation": TableSchedule(TABLES["zero_linear"], interpolation="linear"),
    "ve": VESchedule(),
    "flow": FlowSchedule(),
    "sine": SineSchedule(),
    "flow, shift 3": FlowSchedule(shift=3.0),
}

PARAMETERIZATIONS: dict[str, Parameterization] = {"eps": EPS, "x0": X0, "v": V, "flow": FLOW, "edm": edm(0.5)}


def schedules() -> st.SearchStrategy[Schedule]:
    return st.sampled_from(sorted(SCHEDULES)).map(SCHEDULES.__getitem__)


def time(schedule: Schedule, fraction: float) -> float:
    """The time at a fraction of the trained range (spread evenly in log time on the exploding path)."""
    low, high = schedule.t_range
    if isinstance(schedule, VESchedule):
        return float(min(max(low * (high / low) ** fraction, low), high))
    return low + (high - low) * fraction


def normals(n: int = 2, seed: int = 0, size: int = 5) -> list[torch.Tensor]:
    """A few float64 normal tensors (size,)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(n)]
