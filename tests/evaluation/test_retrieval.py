"""Caption retrieval and style accuracy: chance is chance, the perfect is perfect, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluation.retrieval import Views, candidates, first_is_nearest, prompt, retrieved, style_told
from sfumato.random import derived_seed

TEXTS = [f"thing {i}" for i in range(150)]
KNOWN: dict[str | None, list[str]] = {"noto": TEXTS, "flat": TEXTS[:100]}


def direction(key: str) -> Tensor:
    """A direction that belongs to a text."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(derived_seed("test", key)))
    return x / x.norm()


class Perfect:
    """Puts a caption at its own direction; pictures come as directions already."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def pictures(self, pictures: Tensor) -> Tensor:
        return pictures

    def captions(self, captions: Sequence[str]) -> Tensor:
        self.read += captions
        return torch.stack([direction(caption) for caption in captions])


def test_perfect_pictures_are_always_told() -> None:
    texts, styles = TEXTS[:100], ["flat"] * 100
    pictures = torch.stack([direction(prompt(text, "flat")) for text in texts])
    matcher = Perfect()
    assert retrieved(matcher, pictures, texts, styles, KNOWN).all()
    assert len(matcher.read) == len(set(matcher.read)) == 100  # each caption is read once, all in the right style
    assert style_told(Perfect(), pictures, texts, styles, ["noto", "flat"]).all()


def test_chance_is_one_in_a_hundred() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.normalize(torch.randn(4000, 16, generator=generator), dim=1)
    captions = torch.nn.functional.normalize(torch.randn(4000, 100, 16, generator=generator), dim=2)
    rate = float(first_is_nearest(pictures, captions).double().mean())
    assert abs(rate - 0.01) < 4 * (0.01 * 0.99 / 4000) ** 0.5


def test_features_that_say_nothing_hit_nothing() -> None:
    assert not first_is_nearest(torch.ones(5, 3), torch.ones(5, 100, 3)).any()


def test_the_others_depend_on_caption_and_seed_alone() -> None:
    found = candidates("thing 3", "noto", KNOWN)
    assert found[0] == "thing 3" and len(set(found)) == 100 and set(found) <= set(TEXTS)
    turned: dict[str | None, list[str]] = {"noto": [*reversed(TEXTS), "thing 3"]}
    assert found == candidates("thing 3", "noto", turned)
    assert found != candidates("thing 3", "noto", KNOWN, seed=1)
    assert set(found[1:]) != set(candidates("thing 4", "noto", KNOWN)[1:])


def test_views_are_moved_by_a_sixteenth() -> None:
    """A matcher that tells where the one dark pixel is: the mean of nine places is the middle one."""
    seen: list[tuple[int, int]] = []

    class Place(Perfect):
        def pictures(self, pictures: Tensor) -> Tensor:
            at = (pictures[0, 0] == 0).nonzero()[0].tolist()
            seen.append((at[0], at[1]))
            return torch.tensor([[float(at[0]), float(at[1]), 0.0]])

    picture = torch.full((1, 3, 32, 48), 255, dtype=torch.uint8)
    picture[:, :, 12, 20] = 0
    found = Views(Place()).pictures(picture)
    assert sorted(seen) == [(y, x) for y in (10, 12, 14) for x in (17, 20, 23)]
    assert torch.allclose(found, torch.nn.functional.normalize(torch.tensor([[12.0, 20.0, 0.0]]), dim=1))


def test_views_read_a_caption_once() -> None:
    matcher = Perfect()
    views = Views(matcher)
    first, again = views.captions(["a", "b", "a"]), views.captions(["c", "b"])
    assert matcher.read == ["a", "b", "c"]
    assert torch.equal(first, matcher.captions(["a", "b", "a"])) and torch.equal(again, matcher.captions(["c", "b"]))


def test_too_few_are_refused() -> None:
    with pytest.raises(UserError, match="101 candidates were asked for, but style 'flat' has 100 captions"):
        candidates("thing 1", "flat", KNOWN, 101)
    with pytest.raises(UserError, match="style None has 1 captions"):
        candidates("thing 1", None, KNOWN)
    with pytest.raises(UserError, match="at least 2 that are known"):
        style_told(Perfect(), torch.ones(1, 64), ["a"], ["noto"], ["noto"])
