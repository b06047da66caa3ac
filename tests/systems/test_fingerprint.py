"""What a glance at networks tells apart, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sfumato.backends import offload, registry
from sfumato.networks.attention import Attention, AttnProcessor
from sfumato.systems import fingerprint
from sfumato.systems.fingerprint import PROCESSORS, altered

from .. import stable


def networks() -> dict[str, nn.Module]:
    return stable.model().networks()


SAME: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda network: None,
    "a wider type": lambda network: network.double(),
    "one wider part": lambda network: next(network.children()).double(),
    "another layout": lambda network: network.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "other memory": lambda network: network.load_state_dict({n: t.clone() for n, t in network.state_dict().items()}),
    "training": lambda network: network.train(),
    "no gradients": lambda network: network.requires_grad_(False),
    "a forward of its own": lambda network: vars(network).update(forward=type(network).forward.__get__(network)),
}


@pytest.mark.parametrize("what", SAME)
def test_what_keeps_the_weights_is_not_told(what: str) -> None:
    parts = networks()
    before = fingerprint.of(parts)
    for network in parts.values():
        SAME[what](network)
    assert altered(before, fingerprint.of(parts)) == ()


@pytest.mark.parametrize("way", ["never", "networks", "blocks"])
def test_who_computes_and_where_weights_rest_is_not_told(way: str) -> None:
    parts, device = networks(), torch.device("cpu")
    before = fingerprint.of(parts)
    registry.engage("torch", parts, device, torch.float32, "winograd", way)
    assert altered(before, fingerprint.of(parts)) == ()
    with torch.no_grad(), offload.resting(parts):
        parts["codec"].decoder(torch.zeros(1, 4, 8, 8))  # type: ignore[operator, union-attr]
    assert altered(before, fingerprint.of(parts)) == ()


def _step(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _swap(network: nn.Module) -> None:
    name, child = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear))
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Sequential(child))


CHANGED: dict[str, Callable[[nn.Module], object]] = {
    "a little everywhere": lambda network: [p.data.add_(1e-4) for p in network.parameters()],
    "one parameter": lambda network: next(network.parameters()).data.mul_(1.001),
    "a step of training": _step,
    "a narrower type": lambda network: network.to(torch.bfloat16),
    "a module around another": _swap,
    "one buffer more": lambda network: network.register_buffer("more", torch.zeros(3)),
    "weights that are freed": lambda network: network.to("meta"),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("name", ["network", "codec", "conditioner"])
def test_what_changes_the_weights_is_told(what: str, name: str) -> None:
    parts = networks()
    before = fingerprint.of(parts)
    CHANGED[what](parts[name])
    assert altered(before, fingerprint.of(parts)) == (name,)


def test_another_network_and_one_less_are_told() -> None:
    parts = networks()
    before = fingerprint.of(parts)
    assert altered(before, fingerprint.of(parts | {"codec": nn.Sequential(parts["codec"])})) == ("codec",)
    assert altered(before, fingerprint.of({name: parts[name] for name in ("network", "codec")})) == ("conditioner",)


class Own(AttnProcessor):
    """A processor of a user, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


def plain(attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def test_foreign_processors_are_told_as_such() -> None:
    parts = networks()
    before, network = fingerprint.of(parts), parts["network"]
    for processor, name in ((Own(), "Own"), (plain, "plain")):
        network.set_attn_processor(processor)  # type: ignore[operator]
        now = fingerprint.of(parts)
        assert altered(before, now) == (PROCESSORS,) and now[PROCESSORS] == name
    network.set_default_attn_processor()  # type: ignore[operator]
    assert altered(before, fingerprint.of(parts)) == ()


def test_values_are_taken_from_all_over() -> None:
    layer = nn.Linear(16, 15, bias=False)  # of 16 places, 17 apart but for rounding
    before = fingerprint.of({"a": layer})
    for place in (0, -1):
        kept = layer.weight.detach().clone()
        layer.weight.data.view(-1)[place] += 1
        assert altered(before, fingerprint.of({"a": layer})) == ("a",)
        layer.weight.data.copy_(kept)
    assert altered(before, fingerprint.of({"a": layer})) == ()


def test_weights_without_plain_memory_are_looked_at_by_shape() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("none", torch.zeros(0, 4))
    before = fingerprint.of({"a": module})
    assert altered(before, fingerprint.of({"a": module})) == ()
    module.register_buffer("sparse", torch.eye(4).to_sparse())
    assert altered(before, fingerprint.of({"a": module})) == ("a",)
