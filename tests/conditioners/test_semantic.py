"""Semantic maps: one-hot, made small in two ways, mixed, and what is no map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sfumato.conditioners.registry import from_config
from sfumato.conditioners.semantic import ClassMap, Semantic
from sfumato.errors import UserError

NAMES = ("sky", "sea", "sand", "tree", "house")


def random_map(height: int = 8, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, len(NAMES), (height, width), generator=torch.Generator().manual_seed(seed))


def planes(part: Semantic, *maps: Any) -> torch.Tensor:
    found = part.encode(list(maps)).concat
    assert found is not None
    return found


def test_shares_of_an_area() -> None:
    one = random_map()
    found = planes(Semantic(NAMES, factor=4), one)[0]
    assert found.shape == (5, 2, 3)
    torch.testing.assert_close(found.sum(0), torch.ones(2, 3))
    assert float(found[2, 1, 2]) == float((one[4:, 8:] == 2).float().mean())


def test_halving_is_latent_diffusions() -> None:
    """Bilinear interpolation by 0.5, twice, then a 1x1 convolution from 5 channels to 3."""
    one, part = random_map(), Semantic(NAMES, factor=4, method="bilinear", mixed=3)
    hot = F.one_hot(one, 5).permute(2, 0, 1)[None].float()
    for _ in range(2):
        hot = F.interpolate(hot, scale_factor=0.5, mode="bilinear", align_corners=False)
    mapper = part.network["channel_mapper"]  # type: ignore[index]
    assert isinstance(mapper, nn.Conv2d) and mapper.bias is None
    torch.testing.assert_close(planes(part, one), mapper(hot))
    assert part.channels == 3


def test_at_the_pixels_it_is_one_hot() -> None:
    one = random_map()
    assert torch.equal(planes(Semantic(NAMES), one)[0].argmax(0), one)


@pytest.mark.parametrize("mixed", [None, 3])
def test_unknown_is_zero_and_so_is_the_null(mixed: int | None) -> None:
    part = Semantic(NAMES, factor=2, mixed=mixed)
    one = random_map()
    found = planes(part, one, None, torch.full_like(one, -1))
    assert found.shape[-2:] == (4, 6) and not bool(found[1:].any())
    null = part.null(2).concat
    assert null is not None and null.shape == (2, part.channels, 1, 1) and not bool(null.any())


@pytest.mark.parametrize("part", [Semantic(NAMES, 4), Semantic(NAMES, 4, "bilinear", 3)], ids=["area", "mixed"])
def test_described_and_built_again(part: Semantic) -> None:
    tensors = part.network.state_dict() if part.network is not None else None
    again: Any = from_config(json.loads(json.dumps(part.describe())), tensors)
    assert again.describe() == part.describe()
    torch.testing.assert_close(planes(again, random_map()), planes(part, random_map()))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.full((8, 8), 5), "the map has the class 5; this model knows 0 to 4"),
        (torch.full((8, 8), -2), "the map has the class -2"),
        (torch.zeros(8, 8), "of whole numbers"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "of whole numbers"),
        (torch.zeros(8, 10, dtype=torch.int64), "multiples of 4, got 10 x 8"),
    ],
)
def test_what_is_no_map(given: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Semantic(NAMES, 4).encode([given])


def test_maps_of_two_sizes_and_odd_options_are_refused() -> None:
    with pytest.raises(UserError, match="one size, got 2 x 2 and 3 x 2"):
        Semantic(NAMES, 4).encode([random_map(8, 8), random_map(8, 12)])
    with pytest.raises(UserError, match="factor must be a power of two, got 6"):
        Semantic(NAMES, 6, "bilinear")
    with pytest.raises(UserError, match="at least one class"):
        Semantic(())
    with pytest.raises(UserError, match="did you mean 'area'"):
        Semantic(NAMES, 2, "arae")


def test_maps_from_files(tmp_path: Path) -> None:
    values = random_map().numpy().astype("uint8")
    grey, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette([9, 9, 9] * 256)
    grey.save(tmp_path / "grey.png")
    palette.save(tmp_path / "palette.png")
    found = [ClassMap.of(tmp_path / name) for name in ("grey.png", "palette.png")] + [ClassMap.of(grey)]
    assert found[0] == found[1] == found[2] and len(set(found)) == 1
    assert torch.equal(found[0].values, random_map()) and found[0].size == (12, 8)
    assert found[0].stored() == {"path": str(tmp_path / "grey.png"), "sha256": found[0].sha256}
    assert "path" not in found[2].stored()
    assert ClassMap.of(Image.fromarray(values.T)) != found[0]


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    Image.new("L", (4, 4)).save(tmp_path / "grey.jpg")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(UserError, match=r"colour.png: a map of classes is a PNG .* of mode RGB"):
        ClassMap.of(tmp_path / "colour.png")
    for name in ("grey.jpg", "text.png"):
        with pytest.raises(UserError, match="cannot be read as a PNG"):
            ClassMap.of(tmp_path / name)
    with pytest.raises(UserError, match="there is no map at"):
        ClassMap.of(tmp_path / "away.png")
