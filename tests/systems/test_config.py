"""The configs that every system shares: what a schedule takes."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato import models
from sfumato.checkpoints.io import read_header, stored_config
from sfumato.errors import UserError
from sfumato.systems.config import ScheduleConfig, parse

NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "betas", "flow", "sine", "ve")
OTHER: dict[str, Any] = {
    "steps": 10,
    "start": 0.001,
    "end": 0.03,
    "zero_terminal_snr": True,
    "interpolation": "linear",
    "shift": 3.0,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
}
"""Every key but name and betas with a value other than its default."""


def values(name: str, **keys: Any) -> dict[str, Any]:
    steps = keys.get("steps", 1000)
    return {"name": name, **({"betas": [0.01] * steps} if name == "betas" else {}), **keys}


@pytest.mark.parametrize("name", NAMES)
def test_a_key_changes_the_schedule_or_is_refused(name: str) -> None:
    plain = parse(ScheduleConfig, values(name), "here").build()
    levels = [plain.level(t) for t in (plain.t_range[0], plain.t_range[1] / 2, plain.t_range[1])]
    for key, value in OTHER.items():
        try:
            found = parse(ScheduleConfig, values(name, **{key: value}), "here").build()
        except UserError as error:
            assert f"schedule.{key}={value} does nothing with the schedule {name!r}; it is for " in str(error)
            assert name not in str(error).partition("it is for ")[2].split(", ")
            continue
        if found.steps != plain.steps or found.t_range != plain.t_range:
            continue
        times = (found.t_range[0], found.t_range[1] / 2, found.t_range[1])
        assert any(
            float(a.sigma) != float(b.sigma) or float(a.alpha) != float(b.alpha)
            for a, b in zip(levels, map(found.level, times), strict=True)
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_config_with_its_defaults_is_taken(name: str) -> None:
    config = parse(ScheduleConfig, values(name), "here")
    assert parse(ScheduleConfig, config.model_dump(mode="json"), "here") == config


@pytest.mark.parametrize("name", models.names())
def test_the_schedules_of_the_box_open(name: str) -> None:
    file = models.weights(name)
    stored = stored_config(file, read_header(file)) or {}
    if "schedule" in stored:
        assert parse(ScheduleConfig, stored["schedule"], name).name == stored["schedule"]["name"]
    else:
        assert stored["system"] == "clip"
