"""How a network's convolutions are computed: with fewer products where that gains, within a budget, where nobody looks
inside."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato.backends import convolutions, registry, winograd
from sfumato.backends.convolutions import Convolving, Learning, engage_in_training, holding
from sfumato.errors import UserError
from sfumato.images import read_settings, save_picture
from sfumato.networks.resnet import Upsample2D
from sfumato.replay import replay

from .. import tiny

CPU = torch.device("cpu")


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


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
    convolutions.engage(network)
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
    convolutions.release(network)
    assert torch.equal(network(x), own)


@pytest.mark.parametrize("roomy", [True, False])
def test_tiles_of_six_in_float32_where_they_have_room_or_gain_most(
    roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = _small()
    network, x = network.float(), x.float()
    own, alone, narrow = network(x), network(x[:1]), network(x[..., :14])
    members = _engaged(network)
    members[0].store.roomy = roomy
    monkeypatch.setattr(convolutions, "LEAST_PIXELS_OF_SIX", 1024)
    assert _error(network(x), own.double()) < 5e-6
    by_module = {one.module: one.outputs for one in members}
    assert by_module[network.first] == (4 if roomy else 2) and by_module[network.last] == 4  # which sees 32 x 32
    assert torch.allclose(network(x[:1]), alone, atol=1e-5)
    assert {one.module: one.outputs for one in members} == by_module
    assert _error(network(x[..., :14]), narrow.double()) < 5e-6
    convolutions.release(network)
    assert torch.equal(network(x), own)


def test_small_pictures_are_unfolded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _small()
    network, x = network.float(), x.float()[..., :8, :8]
    own, seen = network.first(x), list[tuple[int, ...]]()
    members, by_product = _engaged(network), winograd.convolve_unfolded
    monkeypatch.setattr(winograd, "convolve_unfolded", lambda x, *rest: seen.append(x.shape) or by_product(x, *rest))
    assert _error(network.first(x), own.double()) < 1e-6 and seen == [x.shape]
    network.first(x[..., :6])
    assert len(seen) == 2 and not _made(members)
    network.first(torch.cat([x, x], dim=-1))  # 128 pixels, 192 kernels
    assert len(seen) == 2


def test_changed_weights_are_seen() -> None:
    network, x = _small()
    _engaged(network)
    before = network(x)
    network.first.weight.mul_(2)
    network.first.bias.mul_(2)
    after = network(x)
    convolutions.release(network)
    assert _error(after, network(x).double()) < 0.02 and not torch.equal(after, before)
    _engaged(network)
    network.load_state_dict(_small()[0].state_dict())
    assert torch.equal(network(x), before)
    network.load_state_dict(_small()[0].state_dict(), assign=True)
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("why", ["gradients", "weights' gradients", "autocast", "odd", "few pixels", "other size"])
def test_what_is_left_to_the_definition(why: str) -> None:
    network, x = _small()
    size = (30, 30) if why == "other size" else None
    if why == "gradients":
        x.requires_grad_()
    elif why == "weights' gradients":
        network.requires_grad_()
    elif why == "autocast":
        network, x = network.float(), x.float()
    elif why == "odd":
        x = x[..., :15]
    elif why == "few pixels":
        x = x[..., :8, :8]
    members = _engaged(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got = network(x, size)
    made = _made(members)
    convolutions.release(network)
    if why == "autocast":
        assert not made
    elif why in ("odd", "few pixels"):  # of the first layer alone
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
    sizes = sorted(one.bytes(2) for one in members)
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
        assert len(_made(members)) == 3 and winograd.work._kept
    assert not _made(members) and not winograd.work._kept and all(one.wanted for one in members)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_choice_is_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convolutions.chosen(torch.float64, CPU) == convolutions.chosen(dtype, torch.device("meta")) == "direct"
    for gain, expected in ((1.1, "winograd"), (0.9, "direct")):
        convolutions.chosen.cache_clear()
        monkeypatch.setattr(convolutions, "times_as_fast", lambda one, other, gain=gain: gain)
        assert convolutions.chosen(dtype, CPU) == expected
    convolutions.chosen.cache_clear()


def test_other_backends_convolve_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _small()
    registry.engage("torch", {"network": network}, CPU, torch.bfloat16, "winograd")
    assert isinstance(vars(network.first).get("forward"), Convolving)
    registry.engage("torch", {"network": network}, CPU, torch.bfloat16)
    assert "forward" not in vars(network.first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_picture_tells_and_is_replayed_with_it(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "LEAST_CHANNELS", {torch.bfloat16: 8, torch.float32: 8})
    monkeypatch.setattr(convolutions, "LEAST_PIXELS", 4)
    file = tiny.write_tiny_model(tmp_path / "m.safetensors")
    calls: list[int] = []
    own = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append(1) or own(*given))
    model = sfumato.load(file, dtype=dtype, convolution="winograd")
    save_picture(model.generate(seed=1, label="cat")[0], tmp_path / "a.png")
    settings, drawn = read_settings(tmp_path / "a.png"), len(calls)
    assert settings["made_with"]["convolution"] == "winograd" and drawn > 0
    again = replay(tmp_path / "a.png", model=file)
    assert not again.differences and len(calls) == 2 * drawn
    save_picture(again.picture, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    direct = sfumato.load(file, dtype=dtype, convolution="direct").generate(seed=1, label="cat")[0]
    assert "convolution" not in direct.info["sfumato"]["made_with"]


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown way of convolving 'winnograd' .did you mean 'winograd'"):
        sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), convolution="winnograd")
    refused = tiny.run("bench", "--convolution", "fft")
    assert refused.code == 2 and "unknown way of convolving 'fft'" in refused.err


def test_two_threads_with_pictures_of_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _small()
    conv, large = network.last.float(), x.float().repeat(1, 1, 2, 2)
    monkeypatch.setattr(convolutions, "LEAST_PIXELS_OF_SIX", 1024)
    (member,) = _engaged(nn.Sequential(conv))
    member.store.roomy = False
    given = {"six": large, "four": large[..., :30].contiguous(), "other": large[..., :24, :].contiguous()}
    alone = {name: conv(one) for name, one in given.items()}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = [(name, pool.submit(conv, given[name])) for _ in range(20) for name in given]
            assert all(torch.equal(one.result(), alone[name]) for name, one in found)
    finally:
        sys.setswitchinterval(before)


def test_what_was_computed_without_gradients_does_not_stand_in_the_way() -> None:
    network, x = _small()
    network, x = network.float(), x.float()
    _engaged(network)
    with torch.inference_mode():
        first = network(x)
    assert torch.equal(network(x), first)
    winograd.work.clear()
    learner, y = _learner()
    engage_in_training(learner)
    with torch.inference_mode():
        learner(y.repeat(8, 1, 1, 1))
    learner(y.repeat(8, 1, 1, 1)).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch itself calls for `jvp`
@pytest.mark.parametrize("learns", [True, False])
def test_transforms_of_torch_func_and_forward_differentiation(learns: bool) -> None:
    network, x = _small()
    conv, x = network.last.float(), torch.cat([x.float()] * 2, dim=1)[:, :192]
    exact = conv(x)
    (engage_in_training if learns else convolutions.engage)(nn.Sequential(conv))
    mapped = torch.func.vmap(conv)(x[:, None])
    assert torch.allclose(mapped[:, 0], exact, atol=1e-4)
    value, slope = torch.func.jvp(conv, (x,), (x,))
    assert torch.allclose(value, exact, atol=1e-4)
    assert torch.allclose(slope + conv.bias[:, None, None], exact, atol=1e-4)


@pytest.mark.parametrize("learns", [True, False])
def test_pictures_without_a_batch_and_none_at_all(learns: bool) -> None:
    network, x = _small()
    conv, x = network.last.float(), x.float()
    exact = conv(x)
    (engage_in_training if learns else convolutions.engage)(nn.Sequential(conv))
    assert torch.allclose(conv(x[0]), exact[0], atol=1e-4)
    assert conv(x[:0]).shape == (0, 256, 16, 16) and conv(x[:0, :, :4, :4]).shape == (0, 256, 4, 4)


def test_a_network_is_written_and_read_whole(tmp_path: Path) -> None:
    network, x = _small()
    _engaged(network)
    own = network(x)
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    assert torch.equal(again(x), own) and torch.isfinite(again(x[..., :8, :8])).all()
    assert (tmp_path / "network.pt").stat().st_size < 1.2 * sum(one.nbytes for one in network.parameters()) + 2**16


# --- in training -----------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """A wide convolution between narrow ones."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner, self.out = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 64), (64, 72), (72, 3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.inner(self.into(x))))
        return out


def _learner() -> tuple[Learner, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Learner()
    return network, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _slopes(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    network(x).square().mean().backward()
    return {name: one.grad for name, one in network.named_parameters() if one.grad is not None}


@pytest.fixture
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LEAST_WORK", 32 * 64 * 72 * 64 * 9)  # of the learner's inner layer, 64 tiles


@pytest.mark.usefixtures("little_work")
def test_what_learns_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _learner()
    exact, names, told = _slopes(network, x), list(network.state_dict()), repr(network)
    engage_in_training(network)
    assert [m for m in network.modules() if isinstance(m, Learning)] == [network.inner] and repr(network) == told
    calls: list[int] = []
    own = winograd.transformed
    monkeypatch.setattr(winograd, "transformed", lambda *given: calls.append(1) or own(*given))
    slopes = _slopes(network, x)
    assert len(calls) == 2 and names == list(network.state_dict())  # kernels forwards, and turned ones backwards
    assert all(_error(slopes[name], exact[name].double()) < 1e-5 for name in exact)
    assert all(torch.equal(slopes[name], again) for name, again in _slopes(network, x).items())
    convolutions.release(network)
    assert type(network.inner) is nn.Conv2d
    assert all(torch.equal(exact[name], again) for name, again in _slopes(network, x).items())


@pytest.mark.usefixtures("little_work")
@pytest.mark.parametrize("why", ["few tiles", "little work", "no multiple of 4", "autocast", "float64", "an override"])
def test_what_of_learning_is_left_to_the_definition(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _learner()
    if why == "few tiles":
        monkeypatch.setattr(convolutions, "LEAST_WORK", 0)
        x = x[:3]
    elif why == "little work":
        monkeypatch.setattr(convolutions, "LEAST_WORK", convolutions.LEAST_WORK + 1)
    elif why == "no multiple of 4":
        x = x[..., :14].repeat(2, 1, 1, 1)
    elif why == "float64":
        network, x = network.double(), x.double()
    elif why == "an override":
        vars(network.inner)["forward"] = lambda x: nn.functional.conv2d(x, network.inner.weight, None, padding=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        exact = _slopes(network, x)
        engage_in_training(network)
        monkeypatch.setattr(winograd, "transformed", None)
        assert all(torch.equal(exact[name], again) for name, again in _slopes(network, x).items())


def test_what_comes_out_may_be_changed_in_place(little_work: None) -> None:
    network, x = _learner()
    whole = nn.Sequential(network.into, network.inner, nn.ReLU(inplace=True), network.out)
    exact = _slopes(whole, x)
    engage_in_training(whole)
    assert all(_error(slope, exact[name].double()) < 1e-5 for name, slope in _slopes(whole, x).items())


def test_gradients_under_autocast_and_many_at_once(little_work: None) -> None:
    network, x = _learner()
    exact = _slopes(network, x)
    engage_in_training(network)
    network.zero_grad()
    loss = network(x).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert all(_error(one.grad, exact[name].double()) < 1e-5 for name, one in network.named_parameters())
    inner = network.inner(network.into(x))
    many = torch.stack([torch.ones_like(inner), inner.detach()])
    (batched,) = torch.autograd.grad(inner, network.inner.weight, many, is_grads_batched=True, retain_graph=True)
    (last,) = torch.autograd.grad(inner, network.inner.weight, inner.detach())
    assert _error(batched[1], last.double()) < 1e-5


def test_a_replica_has_weights_of_its_own(little_work: None) -> None:
    network, x = _learner()
    engage_in_training(network)
    twin = network.inner._replicate_for_data_parallel()
    twin.weight, twin.bias = torch.zeros_like(network.inner.weight), torch.zeros(72)
    assert not twin(network.into(x)).any() and network.inner(network.into(x)).any()
