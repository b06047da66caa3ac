"""Conditions that are shown: their channels, what they refuse, and that they come back from their descriptions."""

from __future__ import annotations

import json

import pytest
import torch

from sfumato.conditioners.base import Combined
from sfumato.conditioners.label import LabelConditioner
from sfumato.conditioners.registry import from_config
from sfumato.conditioners.shown import Depth, LowResolution, Masked, Shown
from sfumato.errors import UserError

PARTS: list[Shown] = [Masked(latents=4), Masked(latents=8), Depth(), LowResolution(levels=350)]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_descriptions_come_back(part: Shown) -> None:
    assert from_config(json.loads(json.dumps(part.describe()))) == part


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_what_is_shown_becomes_channels(part: Shown) -> None:
    g = torch.Generator().manual_seed(0)
    planes = [torch.randn(part.channels, 6, 4, generator=g) for _ in range(2)]
    given = [(plane, 7) for plane in planes] if isinstance(part, LowResolution) else planes
    condition = part.encode(given)
    assert condition.concat is not None and torch.equal(condition.concat, torch.stack(planes))
    assert (condition.labels is None) == ("labels" not in part.slots)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_there_is_no_null(part: Shown) -> None:
    with pytest.raises(UserError, match="this model needs"):
        part.encode([None])
    with pytest.raises(UserError, match="for every picture"):
        part.null(2)


def test_other_channels_and_steps_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 5 channels, got \(4, 8, 8\)"):
        Masked(4).encode([torch.zeros(4, 8, 8)])
    with pytest.raises(UserError, match="a step from 0 to 349"):
        LowResolution(350).encode([(torch.zeros(3, 8, 8), 350)])


def test_together_with_what_is_said() -> None:
    both = Combined({"label": LabelConditioner(("cat", "dog")), "depth": Depth()})
    condition = both.encode([{"label": "dog", "depth": torch.ones(1, 2, 2)}, {"depth": torch.zeros(1, 2, 2)}])
    assert condition.labels is not None and condition.labels.tolist() == [1, 2]
    second = condition.rows(1, 2)
    assert second.labels is not None and second.labels.tolist() == [2]
    assert second.concat is not None and float(second.concat.sum()) == 0
    with pytest.raises(UserError, match="both fill the slot 'labels'"):
        Combined({"label": LabelConditioner(("cat",)), "small": LowResolution()})
