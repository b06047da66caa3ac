"""Layouts: what a box is, tokens that do not know of order, and latent diffusion's numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sfumato.conditioners.layout import Box, Coordinates, Layout, LayoutTokens, fourier, layout_of, layout_told
from sfumato.conditioners.registry import from_config
from sfumato.errors import UserError

SCENE = (Box("cat", 0.1, 0.2, 0.3, 0.4), Box("dog", 0.5, 0.5, 0.5, 0.25))
TINY: dict[str, Any] = {
    "vocab_size": 8192, "max_position_embeddings": 92, "encoder_layers": 1, "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "head_dim": 4, "d_model": 8, "dropout": 0.0,
}  # fmt: skip


def layout() -> Layout:
    torch.manual_seed(0)
    return Layout(("cat", "dog"), width=8, hidden=16)


def test_layouts_come_back_from_json() -> None:
    assert layout_of(json.loads(json.dumps(layout_told(SCENE)))) == SCENE
    assert layout_of(list(SCENE)) == SCENE and layout_of([]) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cat", "a layout is a list of labelled boxes"),
        ({"label": "cat"}, "a layout is a list of labelled boxes"),
        ([{"label": "cat"}], "an object of a layout is"),
        ([{"label": 3, "box": [0, 0, 1, 1]}], "an object of a layout is"),
        ([{"label": "cat", "box": [0, 0, 1]}], "a box is .x, y, width, height. in fractions"),
        ([{"label": "cat", "box": "0011"}], "a box is .x, y, width, height. in fractions"),
        ([{"label": "cat", "box": [4, 8, 16, 16]}], "from 0 to 1; the 'cat' at"),
        ([{"label": "cat", "box": [0.5, 0, 0.6, 1]}], "from 0 to 1; the 'cat' at"),
        ([{"label": "cat", "box": [0.5, 0, 0, 1]}], "from 0 to 1; the 'cat' at"),
        ([{"label": "cat", "box": [float("nan"), 0, 0.1, 1]}], "from 0 to 1; the 'cat' at"),
    ],
)
def test_what_is_no_layout(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        layout_of(given)
    assert "\n" not in str(caught.value)


def test_fourier_features() -> None:
    found = fourier(torch.tensor([[0.0, 0.5]]), 2)
    expected = [0, 0, 0, 1, 1, 0.5, 1, 0, 0, -1]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32), atol=1e-6, rtol=0)


def test_the_order_of_objects_means_nothing() -> None:
    part = layout()
    one, other = part.encode([SCENE]).context, part.encode([SCENE[::-1]]).context
    assert one is not None and other is not None and one.shape == (1, 3, 8)
    torch.testing.assert_close(one, other[:, [0, 2, 1]])  # the ground's comes first


def test_place_and_class_both_count() -> None:
    part = layout()
    others = [(Box("dog", *SCENE[0][1:]),), (SCENE[0]._replace(x=0.11),), ()]
    context = part.encode([SCENE[:1], *others, None]).context
    assert context is not None
    ground, null = context[-2, 0], context[-1, 0]
    tokens = [*context[:3, 1], ground, null]
    assert all(not torch.allclose(a, b) for i, a in enumerate(tokens) for b in tokens[:i])
    assert torch.equal(context[0, 0], ground)


def test_padding_is_masked_and_changes_nothing() -> None:
    part = layout()
    alone, among = part.encode([SCENE[:1]]), part.encode([SCENE[:1], SCENE])
    assert alone.context is not None and among.context is not None and among.context_mask is not None
    assert among.context_mask.tolist() == [[True, True, False], [True, True, True]]
    torch.testing.assert_close(among.context[0, :2], alone.context[0])


def test_gradients_reach_classes_and_places() -> None:
    part = layout()
    context = part.encode([SCENE, None]).context
    assert context is not None
    context.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in part.network.parameters())


@pytest.mark.parametrize("part", [layout(), LayoutTokens(("cat", "dog"), TINY)], ids=lambda part: part.kind)
def test_described_and_built_again(part: Any) -> None:
    again = from_config(json.loads(json.dumps(part.describe())), part.network.state_dict())
    assert again.describe() == part.describe()
    torch.testing.assert_close(again.encode([SCENE, None]).context, part.encode([SCENE, None]).context)
    with pytest.raises(UserError, match=r"unknown class of objects 'dgo' \(did you mean 'dog'\?\)"):
        part.encode([(Box("dgo", 0, 0, 1, 1),)])


def test_numbers_of_latent_diffusion() -> None:
    """Three numbers for each object, 90 places a side, filled with 8191, and the corners of the crop: 92."""
    part = LayoutTokens(("cat", "dog"), TINY)
    assert part.sections == 90
    ids = part.ids(SCENE)
    assert len(ids) == 92 and ids[:4] == [0, 18 * 90 + 9, 53 * 90 + 36, 1]
    assert ids[6:90] == [8191] * 84 and ids[90:] == [0, 8099]
    assert part.ids(None) == [8191] * 90 + [0, 8099]
    many = [SCENE[0]] * 40
    assert len(part.ids(many)) == 92 and 8191 not in part.ids(many)


def test_points_come_back_to_half_a_section() -> None:
    part = LayoutTokens(("cat",), TINY)
    for x, y in torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).tolist():
        found = part.place(part.point(x, y))
        assert max(abs(found[0] - x), abs(found[1] - y)) <= 0.5 / 89 + 1e-9


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="a layout has 92 tokens, but the transformer reads 50"):
        LayoutTokens(("cat",), TINY | {"max_position_embeddings": 50})
    with pytest.raises(UserError, match="4 classes do not fit a vocabulary of 4"):
        LayoutTokens("abcd", TINY | {"vocab_size": 4})


def test_coordinates_tell_each_latent_its_place() -> None:
    part = Coordinates(frequencies=3)
    planes = part.planes(4, 6)
    assert planes.shape == (part.channels, 4, 6) == (14, 4, 6)
    for row, column in ((0, 0), (3, 5), (2, 1)):
        x, y = (column + 0.5) / 6, (row + 0.5) / 4
        expected = fourier(torch.tensor([x, y]), 3).reshape(2, 7).T.flatten()
        torch.testing.assert_close(planes[:, row, column], expected)
    again = from_config(json.loads(json.dumps(part.describe())))
    assert again == part
    with pytest.raises(UserError, match="needs the places of its latents"):
        part.null(1)
