"""Winograd's convolutions: the same sums, where they gain, within a budget, and only where nobody looks inside."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfumato
from sfumato.backends import registry, winograd
from sfumato.backends.winograd import Convolving, convolve, convolve_doubled, holding, transformed, transformed_doubled
from sfumato.errors import UserError
from sfumato.images import read_settings, save_picture
from sfumato.networks.resnet import Upsample2D
from sfumato.replay import replay

from .. import tiny

CPU = torch.device("cpu")
SHAPES = [(1, 8, 8), (2, 16, 12), (3, 4, 4), (1, 2, 2), (1, 6, 40)]


def _given(batch: int, height: int, width: int, *, channels: int = 12, out: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch * height * width)
    x = torch.randn(batch, channels, height, width, generator=g)
    weight = torch.randn(out, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    return x, weight, torch.randn(out, generator=g)


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tiles", [1, 7, 32, 512])  # bands of rows, several pictures together, all at once
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    x, weight, bias = _given(*shape)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for memory in (torch.contiguous_format, torch.channels_last):
        got = convolve(x.to(memory_format=memory), transformed(weight), bias)
        assert _error(got, exact) < 1e-6 and got.is_contiguous(memory_format=torch.channels_last)
    plain = convolve(x, transformed(weight), None)
    assert _error(plain, F.conv2d(x.double(), weight.double(), padding=1)) < 1e-6


@pytest.mark.parametrize("tiles", [1, 7, 32, 512])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3), (1, 1, 1)])
def test_it_is_a_doubling_and_the_convolution(
    shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    x, weight, bias = _given(*shape)
    doubled = F.interpolate(x.double(), scale_factor=2.0)
    exact = F.conv2d(doubled, weight.double(), bias.double(), padding=1)
    assert _error(convolve_doubled(x, transformed_doubled(weight), bias), exact) < 1e-6


def test_its_rounding_in_half_precision() -> None:
    x, weight, bias = (one.bfloat16() for one in _given(2, 16, 16, channels=192, out=192))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = _error(F.conv2d(x, weight, bias, padding=1), exact)
    assert direct < _error(convolve(x, transformed(weight), bias), exact) < 4 * direct
    large = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), bias.double(), padding=1)
    assert _error(convolve_doubled(x, transformed_doubled(weight), bias), large) < 3 * direct


class Small(nn.Module):
    """A doubling between two convolutions, wide enough to gain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(192, 192, 3, padding=1), Upsample2D(192)
        self.last = nn.Conv2d(192, 256, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        out: Tensor = self.last(self.up(self.first(x), size))
        return out


def _small() -> tuple[Small, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small().eval().bfloat16().requires_grad_(False)
    return network, torch.randn(2, 192, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


def _engaged(network: nn.Module) -> list[Convolving]:
    winograd.engage(network)
    return [vars(m)["forward"] for m in network.modules() if isinstance(vars(m).get("forward"), Convolving)]


def _made(members: list[Convolving]) -> list[nn.Module]:
    return [one.module for one in members if one in one.store._kept]


def test_a_network_computes_the_same_and_its_weights_stay() -> None:
    network, x = _small()
    own, weights = network(x), {name: value.clone() for name, value in network.state_dict().items()}
    members = _engaged(network)
    got = network(x)
    assert 0 < _error(got, own.double()) < 0.02 and not torch.equal(got, own)
    assert {type(one) for one in _made(members)} == {nn.Conv2d, Upsample2D} and len(_made(members)) == 3
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(x, (32, 32)), got)  # told the size that it has anyway
    winograd.release(network)
    assert torch.equal(network(x), own)


def test_changed_weights_are_seen() -> None:
    network, x = _small()
    _engaged(network)
    before = network(x)
    network.first.weight.mul_(2)
    network.first.bias.mul_(2)
    after = network(x)
    winograd.release(network)
    assert _error(after, network(x).double()) < 0.02 and not torch.equal(after, before)
    _engaged(network)
    network.load_state_dict(_small()[0].state_dict())
    assert torch.equal(network(x), before)
    network.load_state_dict(_small()[0].state_dict(), assign=True)
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("why", ["gradients", "weights' gradients", "float32", "odd", "few pixels", "other size"])
def test_what_is_left_to_the_definition(why: str) -> None:
    network, x = _small()
    size = (30, 30) if why == "other size" else None
    if why == "gradients":
        x.requires_grad_()
    elif why == "weights' gradients":
        network.requires_grad_()
    elif why == "float32":
        network, x = network.float(), x.float()
    elif why == "odd":
        x = x[..., :15]
    elif why == "few pixels":
        x = x[..., :8, :8]
    members = _engaged(network)
    got = network(x, size)
    made = _made(members)
    winograd.release(network)
    if why in ("odd", "few pixels"):  # of the first layer alone
        assert network.first not in made and got.shape == network(x).shape
    elif why == "other size":
        assert network.up not in made
    else:
        assert not made and torch.equal(got, network(x, size))
    if "gradients" in why:
        got.sum().backward()


def test_hooks_and_adapters_on_the_inner_convolution_are_called() -> None:
    network, x = _small()
    _engaged(network)
    seen: list[int] = []
    handle = network.up.conv.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[-1]))
    network(x)
    assert seen == [32]
    handle.remove()

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            seen.append(-1)
            return self.base(x) * 0

    network.up.conv = Adapted(network.up.conv)  # type: ignore[assignment]
    network.last = Adapted(network.last)  # type: ignore[assignment]
    assert not network(x).any() and seen == [32, -1, -1]


def test_an_adapter_put_inside_before_is_left_alone() -> None:
    network, x = _small()
    network.up.conv = nn.Sequential(network.up.conv)  # type: ignore[assignment]
    own = network(x)
    assert network.up not in [one.module for one in _engaged(network)]
    assert _error(network(x), own.double()) < 0.02


def test_small_kernels_have_precedence_in_the_budget() -> None:
    network, x = _small()
    members = _engaged(network)
    store = members[0].store
    sizes = sorted(one.bytes for one in members)
    store.budget = sum(sizes[:2])
    network(x)
    assert network.last not in _made(members) and len(_made(members)) == 2
    store.clear()
    store.budget = sizes[0] + sizes[2]  # without the one in the middle there would be room for the largest
    network(x[..., :8, :8])
    assert network.first not in _made(members) and network.last in _made(members)


def test_what_is_made_in_a_block_is_forgotten_after_it() -> None:
    network, x = _small()
    members = _engaged(network)
    with holding(network):
        network(x)
        assert len(_made(members)) == 3 and winograd._work._kept
    assert not _made(members) and not winograd._work._kept and all(one.wanted for one in members)
    with holding(None):
        pass


def test_a_copy_has_kernels_of_its_own() -> None:
    network, x = _small()
    _engaged(network)
    before = network(x)
    twin = copy.deepcopy(network)
    twin.first.weight.zero_()
    assert torch.equal(network(x), before) and not torch.equal(twin(x), before)
    assert torch.equal(twin.first(x), twin.first.bias[:, None, None].expand(2, -1, 16, 16))


def test_the_choice_is_measured_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert winograd.chosen(torch.float32, CPU) == winograd.chosen(torch.bfloat16, torch.device("meta")) == "direct"
    for gain, expected in ((1.1, "winograd"), (0.9, "direct")):
        winograd.chosen.cache_clear()
        monkeypatch.setattr(winograd, "times_as_fast", lambda one, other, gain=gain: gain)
        assert winograd.chosen(torch.bfloat16, CPU) == expected
    winograd.chosen.cache_clear()


def test_other_backends_convolve_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _small()
    registry.engage("torch", {"network": network}, CPU, torch.bfloat16, "winograd")
    assert isinstance(vars(network.first).get("forward"), Convolving)
    registry.engage("torch", {"network": network}, CPU, torch.bfloat16)
    assert "forward" not in vars(network.first)


def test_a_picture_tells_and_is_replayed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 4)
    file = tiny.write_tiny_model(tmp_path / "m.safetensors")
    calls: list[int] = []
    own = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append(1) or own(*given))
    model = sfumato.load(file, dtype="bfloat16", convolution="winograd")
    save_picture(model.generate(seed=1, label="cat")[0], tmp_path / "a.png")
    settings, drawn = read_settings(tmp_path / "a.png"), len(calls)
    assert settings["made_with"]["convolution"] == "winograd" and drawn > 0
    again = replay(tmp_path / "a.png", model=file)
    assert not again.differences and len(calls) == 2 * drawn
    save_picture(again.picture, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    direct = sfumato.load(file, dtype="bfloat16", convolution="direct").generate(seed=1, label="cat")[0]
    assert "convolution" not in direct.info["sfumato"]["made_with"]


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown way of convolving 'winnograd' .did you mean 'winograd'"):
        sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), convolution="winnograd")
    refused = tiny.run("bench", "--convolution", "fft")
    assert refused.code == 2 and "unknown way of convolving 'fft'" in refused.err
