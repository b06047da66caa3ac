"""Both branches of guidance up to the first cross-attention: computed once, and the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sfumato.backends import registry, twins
from sfumato.backends.twins import Once, common
from sfumato.networks.attention import Attention, AttnProcessor
from sfumato.networks.resnet import Downsample2D, ResnetBlock2D
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel

CPU = torch.device("cpu")
TEXTS_LATER = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
TEXTS_FIRST = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def _unet(blocks: tuple[tuple[str, str], tuple[str, str]] = TEXTS_FIRST) -> UNet2DConditionModel:
    down, up = blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DConditionModel(UNet2DConditionConfig(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
            attention_head_dim=4, norm_num_groups=8, down_block_types=down, up_block_types=up,
        ))  # fmt: skip
    return network.eval().requires_grad_(False)


def _given(batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 8, 8, generator=g)
    context = torch.randn(2 * batch, 5, 16, generator=g)
    return {"x": torch.cat([x, x]), "t": torch.full((2 * batch,), 500.0), "context": context}


def _sizes(network: nn.Module, given: dict[str, Tensor], out: list[Tensor] | None = None) -> dict[nn.Module, int]:
    """How many pictures the inside of every wrapped part saw."""
    seen: dict[nn.Module, int] = {}
    handles = []
    for part in common(network):
        child = next(child for child in part.modules() if isinstance(child, nn.Conv2d | nn.Linear))
        hook = lambda module, args, part=part: seen.update({part: len(args[0])})  # noqa: E731
        handles.append(child.register_forward_pre_hook(hook))
    result = network(**given)
    if out is not None:
        out.append(result)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Once.__init__, "__defaults__", (1,))


@pytest.mark.parametrize("blocks", [TEXTS_FIRST, TEXTS_LATER])
def test_equal_halves_are_computed_once_and_give_the_same(blocks: tuple[tuple[str, str], tuple[str, str]]) -> None:
    network, given = _unet(blocks), _given()
    own = network(**given)
    registry.engage("torch", {"network": network}, CPU, torch.float32)
    out: list[Tensor] = []
    assert set(_sizes(network, given, out).values()) == {2}
    assert torch.allclose(out[0], own, atol=1e-5) and not torch.equal(out[0][:2], out[0][2:])
    twins.release(network)
    assert torch.equal(network(**given), own)


def test_equal_thirds_are_computed_once_too() -> None:
    """Where a negative prompt is a branch of its own."""
    network, x = _unet(), _given(3)["x"][:3]
    given = {"x": torch.cat([x] * 3), "t": torch.full((9,), 500.0), "context": torch.randn(9, 5, 16)}
    own = network(**given)
    twins.engage(network)
    out: list[Tensor] = []
    assert set(_sizes(network, given, out).values()) == {3}
    assert torch.allclose(out[0], own, atol=1e-5)


def test_what_is_common() -> None:
    first, later = ([type(part) for part in common(_unet(blocks))] for blocks in (TEXTS_FIRST, TEXTS_LATER))
    assert first == [ResnetBlock2D, Attention]
    assert later == [ResnetBlock2D, Downsample2D, ResnetBlock2D, Attention]


@pytest.mark.parametrize("why", ["other pictures", "other times", "gradients", "odd", "few numbers"])
def test_all_is_computed_where_halves_differ_or_may_not_be_taken(why: str) -> None:
    network, given = _unet(), _given()
    if why == "other pictures":
        given["x"][3, 0, 0, 0] += 1
    elif why == "other times":
        given["t"][3] = 499.0
    elif why == "gradients":
        given["x"].requires_grad_()
    elif why == "odd":
        given = {name: value[:3] for name, value in given.items()}
    own = network(**given)
    twins.engage(network)
    if why == "few numbers":
        for part in common(network):
            vars(part)["forward"].least = 2**20
    out: list[Tensor] = []
    assert set(_sizes(network, given, out).values()) == {len(given["x"])}
    assert torch.equal(out[0], own)


def test_a_foreign_processor_sees_the_whole_batch() -> None:
    network, given, seen = _unet(), _given(), []

    class Foreign(AttnProcessor):
        def forward(self, attn: Attention, hidden_states: Tensor, *args: Tensor, **slots: Tensor) -> Tensor:
            seen.append(len(hidden_states))
            return super().forward(attn, hidden_states, *args, **slots)

    twins.engage(network)
    network.set_attn_processor(Foreign())
    network(**given)
    assert set(seen) == {4}


def test_a_copy_is_its_own() -> None:
    network, given = _unet(), _given()
    twins.engage(network)
    before, other = network(**given), copy.deepcopy(network)
    for weight in other.parameters():
        weight.zero_()
    assert torch.equal(network(**given), before) and not other(**given).any()
