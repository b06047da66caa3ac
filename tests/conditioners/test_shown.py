"""Conditions that are shown: their channels, what they refuse, and that they come back from their descriptions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sfumato.conditioners.base import Combined
from sfumato.conditioners.label import LabelConditioner
from sfumato.conditioners.registry import from_config
from sfumato.conditioners.shown import Depth, LowResolution, Masked, Shown, agreeing, shrunk
from sfumato.errors import UserError

PARTS: list[Shown] = [
    Masked(latents=4),
    Masked(latents=8),
    Masked(latents=3, order="mask-last"),
    Depth(),
    LowResolution(levels=350),
    LowResolution(levels=0, noise=20, scale=2, form="upsampled"),
    LowResolution(levels=20, noise=7, scale=2, form="unfolded", channels=12),
    LowResolution(levels=0, noise=7, scale=2, form="encoded", channels=4, residual=0.2),
]


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


@pytest.mark.parametrize(
    ("part", "size"),
    [
        (LowResolution(scale=4), 8),
        (LowResolution(), 8),
        (LowResolution(scale=2, form="unfolded", channels=12), 16),
        (LowResolution(scale=2, form="encoded", channels=5), 16),
    ],
    ids=repr,
)
def test_small_pictures_are_laid_at_the_size_of_latents(part: LowResolution, size: int) -> None:
    small = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    laid = part.laid(small, 4, lambda x: torch.nn.functional.avg_pool2d(x, 4)[:, :1].expand(-1, 5, -1, -1))
    assert laid.shape == (2, part.channels, 8, 8)
    if part.form == "unfolded":
        assert torch.equal(torch.nn.functional.pixel_shuffle(laid, 2), small)


def test_a_small_picture_upsampled_for_pixels() -> None:
    part = LowResolution(levels=0, noise=-1, scale=2, form="upsampled")
    small = torch.full((1, 3, 4, 4), 0.5)
    assert torch.allclose(part.laid(small, 1, lambda x: x), torch.full((1, 3, 8, 8), 0.5))
    assert part.encode([(torch.zeros(3, 8, 8), -1)]).labels is None and part.classes == 0
    with pytest.raises(UserError, match="does not fit a codec of factor 4"):
        part.laid(small, 4, lambda x: x)
    with pytest.raises(UserError, match="must be a step of -1"):
        part.encode([(torch.zeros(3, 8, 8), 0)])


def test_noise_that_is_told_has_a_null_class() -> None:
    part = LowResolution(levels=20, droppable=True)
    condition = part.encode([(torch.ones(3, 2, 2), 7), None])
    assert condition.labels is not None and condition.labels.tolist() == [7, 20] and part.classes == 21
    assert condition.concat is not None and float(condition.concat[1].abs().sum()) == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"form": "upsmapled"}, "did you mean 'upsampled'"),
        ({"levels": 0}, "needs to say what noise it may have"),
        ({"levels": 5, "noise": 5}, "noise of step 5, but it has 5 classes"),
        ({"scale": 1}, "by 2 or more, got 1"),
        ({"residual": 0.1}, "an upsampled or encoded one"),
        ({"residual": 0.1, "form": "encoded", "droppable": True}, "never dropped"),
    ],
)
def test_small_pictures_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        LowResolution(**values)


def test_what_a_small_picture_lacks() -> None:
    part = LowResolution(levels=0, noise=-1, scale=2, form="upsampled", residual=0.25)
    z, planes = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    lacking = part.lacking(z, planes)
    assert torch.allclose(lacking, 4 * (z - planes)) and torch.allclose(part.completed(lacking, planes), z, atol=1e-6)
    plain = LowResolution(levels=0, noise=-1, scale=2, form="upsampled")
    assert plain.lacking(z, planes) is z and plain.completed(z, planes) is z


def test_pictures_agree_with_the_small_one() -> None:
    """The means of their squares are those of the small picture, also where the correction meets the range's end."""
    g = torch.Generator().manual_seed(0)
    true = (2 * torch.rand(3, 3, 8, 8, generator=g) - 1).clamp(-1, 1)
    other = (true + 0.3 * torch.randn(true.shape, generator=g)).clamp(-1, 1)
    small = torch.nn.functional.avg_pool2d(true, 2)
    found = agreeing(other, small, 2)
    assert float((torch.nn.functional.avg_pool2d(found, 2) - small).abs().max()) < 0.02
    assert float(found.abs().max()) <= 1
    assert float((found - true).square().mean()) < float((other - true).square().mean())
    assert torch.allclose(agreeing(true, small, 2), true, atol=1e-6)


def test_a_small_picture_has_eight_bits() -> None:
    small = shrunk(torch.tensor([[-1.0, -1.0], [-1.0, 0.123]]).expand(1, 3, 2, 2), 2)
    levels = (small + 1) * 127.5
    assert small.shape == (1, 3, 1, 1) and torch.allclose(levels, levels.round(), atol=1e-4)


@pytest.mark.parametrize("order", ["mask-first", "mask-last"])
def test_orders_of_mask_and_latents(order: str) -> None:
    part = Masked(2, order=order)
    cells, latents = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.full((1, 2, 1, 2), 5.0)
    laid = part.laid(cells, latents)[0, :, 0].tolist()
    assert laid == ([[1, 0], [5, 5], [5, 5]] if order == "mask-first" else [[5, 5], [5, 5], [1, -1]])
    hidden = part.hidden(torch.full((1, 3, 1, 2), 0.5), torch.tensor([True, False]).view(1, 1, 1, 2))
    assert hidden[0, 0, 0].tolist() == [0.0 if order == "mask-first" else -1.0, 0.5]
    null = Masked(2, droppable=True, order=order).null(1).concat
    assert null is not None and null.flatten().tolist() == ([1, 0, 0] if order == "mask-first" else [0, 0, 1])
    with pytest.raises(UserError, match="did you mean 'mask-last'"):
        Masked(2, order="mask-lats")


def test_together_with_what_is_said() -> None:
    both = Combined({"label": LabelConditioner(("cat", "dog")), "depth": Depth()})
    condition = both.encode([{"label": "dog", "depth": torch.ones(1, 2, 2)}, {"depth": torch.zeros(1, 2, 2)}])
    assert condition.labels is not None and condition.labels.tolist() == [1, 2]
    second = condition.rows(1, 2)
    assert second.labels is not None and second.labels.tolist() == [2]
    assert second.concat is not None and float(second.concat.sum()) == 0
    with pytest.raises(UserError, match="both fill the slot 'labels'"):
        Combined({"label": LabelConditioner(("cat",)), "small": LowResolution()})
