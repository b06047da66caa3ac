"""Every kind of condition beside every other: dropping one is its null, and their order means nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.conditioners.base import Combined, Conditioner, dropped
from sfumato.conditioners.joint import JointText
from sfumato.conditioners.label import EmbeddedLabel, LabelConditioner
from sfumato.conditioners.layout import Box, Coordinates, Layout, LayoutTokens
from sfumato.conditioners.semantic import Semantic
from sfumato.conditioners.shown import Depth, LowResolution, Masked
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import WordVocabulary
from sfumato.errors import UserError
from sfumato.networks.text import TextTransformerConfig
from sfumato.systems.latent import Latent, LatentConfig

WIDTH, SIZE = 8, 8
TRANSFORMER: dict[str, Any] = {
    "max_position_embeddings": 14, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "head_dim": 4, "d_model": WIDTH, "dropout": 0.0,
}  # fmt: skip
NETWORK: dict[str, Any] = {
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
PLAIN = NETWORK | {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}


def text() -> Conditioner:
    words = WordVocabulary.from_texts(["a red cat", "a dog"])
    return TextConditioner(JointText(words, TextTransformerConfig.from_dict(TRANSFORMER | {"vocab_size": words.size})))


def numbers() -> Conditioner:
    return LayoutTokens(("cat", "dog"), TRANSFORMER | {"vocab_size": 200}, objects=4)


LAYOUTS = [(Box("cat", 0, 0, 0.5, 0.5),), (Box("dog", 0.5, 0, 0.5, 0.5), Box("cat", 0.1, 0.5, 0.25, 0.25)), ()]
MAPS = [torch.full((SIZE, SIZE), i) for i in range(3)]
PLANES = [torch.full((5, SIZE, SIZE), 0.1 * i) for i in range(3)]

KINDS: dict[str, tuple[Callable[[], Conditioner], list[Any]]] = {
    "coordinates": (lambda: Coordinates(1, droppable=True), [Coordinates(1).planes(SIZE, SIZE)] * 3),
    "depth": (lambda: Depth(droppable=True), [plane[:1] for plane in PLANES]),
    "label": (lambda: LabelConditioner(("cat", "dog")), ["cat", "dog", "dog"]),
    "layout": (lambda: Layout(("cat", "dog"), WIDTH, hidden=8), LAYOUTS),
    "layout-tokens": (numbers, LAYOUTS),
    "low-resolution": (
        lambda: LowResolution(levels=9, droppable=True), [(plane[:3], i) for i, plane in enumerate(PLANES)],
    ),
    "map": (lambda: Semantic(("a", "b", "c"), mixed=2), MAPS),
    "masked": (lambda: Masked(latents=4, droppable=True), PLANES),
    "text": (text, ["a red cat", "a dog", ""]),
    "token": (lambda: EmbeddedLabel(("cat", "dog"), WIDTH), ["cat", "dog", "cat"]),
}  # fmt: skip
TWICE = {frozenset({"label", "low-resolution"})}  # both are the one class that a network is told
READ_ALIKE = {frozenset({"label", "token"}), frozenset({"layout", "layout-tokens"})}
COMBINATIONS = [
    names
    for count in (1, 2, 3)
    for names in itertools.combinations(sorted(KINDS), count)
    if not any(pair <= set(names) for pair in TWICE | READ_ALIKE)
]
EVERYTHING = ("coordinates", "depth", "layout", "low-resolution", "map", "masked", "text", "token")


def parts(names: tuple[str, ...]) -> dict[str, Conditioner]:
    torch.manual_seed(0)
    return {name: KINDS[name][0]() for name in names}


def entries(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: KINDS[name][1][i] for name in names} for i in range(3)]


def model_of(made: dict[str, Conditioner]) -> Latent:
    torch.manual_seed(1)
    attended = any("context" in part.slots for part in made.values())
    config = LatentConfig(
        size=SIZE, codec={"kind": "pixels", "size": SIZE}, network=NETWORK if attended else PLAIN,
        conditions={name: part.describe() for name, part in made.items()},
    )  # fmt: skip
    return Latent.create(config)


def out(model: Latent, said: list[dict[str, Any]]) -> Tensor:
    assert model.conditioner is not None
    x = torch.randn(len(said), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model.denoiser(x, model.denoiser.schedule.level(500), model.conditioner.encode(said)).out
    return found


@pytest.mark.parametrize("names", [*COMBINATIONS, EVERYTHING], ids="+".join)
def test_dropping_one_is_its_null(names: tuple[str, ...]) -> None:
    """In a batch where others keep theirs, alone, and beside conditions that stay: the same slots to 1e-6."""
    both = Combined(parts(names))
    whole = entries(names)
    for name in names:
        without = [{n: v for n, v in one.items() if n != name or i == 1} for i, one in enumerate(whole)]
        kept = {n: [one[n] for one in whole] for n in names}
        conditions = {n: both.parts[n].encode(kept[n]) for n in names}
        null = both.parts[name].null(3)
        expected = dropped(conditions[name], null, torch.tensor([True, False, True]))
        merged = both._merged(conditions | {name: expected})
        found = both.encode(without)
        for slot in both.slots - {"context", "context_mask"}:
            torch.testing.assert_close(getattr(found, slot), getattr(merged, slot), atol=1e-6, rtol=0)
        if "context" in both.slots:
            for a, b in zip(real_tokens(found), real_tokens(merged), strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def real_tokens(condition: Any) -> list[Tensor]:
    """Of each picture, without padding."""
    if condition.context_mask is None:
        return list(condition.context)
    return [states[mask] for states, mask in zip(condition.context, condition.context_mask, strict=True)]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_network_that_is_told_nothing_sees_the_null(name: str) -> None:
    model = model_of(parts((name,)))
    assert model.conditioner is not None
    whole = entries((name,))
    told = out(model, whole)
    mixed = out(model, [whole[0], {}, whole[2]])
    torch.testing.assert_close(mixed[[0, 2]], told[[0, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[1], out(model, [{}, {}, {}])[1], atol=1e-6, rtol=0)
    assert float((mixed[1] - told[1]).abs().max()) > 1e-5 or name == "layout-tokens" and not whole[1][name]


@pytest.mark.parametrize("names", [EVERYTHING, ("depth", "masked"), ("label", "layout", "text")], ids="+".join)
def test_their_order_means_nothing(names: tuple[str, ...]) -> None:
    made = parts(names)
    whole = entries(names)
    one, other = model_of(made), model_of(dict(reversed(made.items())))
    for key, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[key])
    assert torch.equal(out(one, whole), out(other, [dict(reversed(entry.items())) for entry in whole]))


def test_what_cannot_be_together() -> None:
    with pytest.raises(UserError, match="'label' and 'low-resolution' both fill the slot 'labels'"):
        Combined(parts(("label", "low-resolution")))
    with pytest.raises(UserError, match="must have one width, got 'layout' 4, 'text' 8"):
        Combined(parts(("text",)) | {"layout": Layout(("cat",), 4)})
    with pytest.raises(UserError, match="must have one size, got 4 x 4 and 8 x 8"):
        Combined(parts(("depth", "map"))).encode([{"depth": torch.zeros(1, 4, 4), "map": MAPS[0]}])
    with pytest.raises(UserError, match="conditions.label and conditions.token both read the user's label"):
        model_of(parts(("label", "token")))
