"""Offload: weights rest in the CPU's memory, come when they are needed, and change nothing.

"meta" stands for a GPU: what mixes its tensors with the CPU's is an error there too. Where values count the CPU is its
own device, and every coming is still a copy.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato import explain
from sfumato.api import Model
from sfumato.backends import compiled, convolutions, offload, registry
from sfumato.backends.driven import Forward, own_forward
from sfumato.backends.fast import FastSettings
from sfumato.backends.offload import (
    ROOM,
    SHARE,
    Fetching,
    Group,
    Mover,
    Shuttle,
    Streamed,
    bring,
    check,
    chosen,
    device_of,
    engage,
    fitting,
    release,
    resting,
    tensors_of,
)
from sfumato.backends.registry import BACKENDS, Backend
from sfumato.backends.twins import Once
from sfumato.codecs.preview import LatentPreview
from sfumato.codecs.tiles import decode_tiled, encode_tiled
from sfumato.condition import Condition
from sfumato.errors import UserError
from sfumato.evaluation.bpd import measure_bound, measure_flow
from sfumato.images import PictureError
from sfumato.networks.unet_article import Unet
from sfumato.systems import Opened
from sfumato.systems.asked import Asked
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent
from sfumato.tasks.draw import draw, draw_latents
from sfumato.tasks.edit import Source, edit

from .. import stable, tiny
from ..systems.test_exchange import LABELS, ddpm, latent, words

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))
WORDS = [Asked("a (red:1.2) hat", negative="blue"), Asked("a hat")]
HOW: dict[str, Any] = {"seeds": [1, 2], "asked": WORDS, "steps": 2, "guidance": 2.0}


@cache
def _sd(name: str) -> Latent:
    return stable.model(name)


def sd(name: str = "sd1") -> Latent:
    """A small Stable Diffusion of one's own."""
    return copy.deepcopy(_sd(name))


def swapped(tensor: Tensor, values: Tensor) -> None:
    """As `offload.point`, between devices that `.data` cannot lead across."""
    other = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
    torch.utils.swap_tensors(tensor, other)


class Recording(Mover):
    """Copies and says whose; looks whether all else is at rest."""

    def __init__(self, networks: dict[str, nn.Module], ahead: bool = False) -> None:
        super().__init__(CPU)
        self.ahead = ahead
        self.names = {one.data_ptr(): f"{n}.{name}" for n, network in networks.items()
                      for name, one in [*network.named_parameters(), *network.named_buffers()]}  # fmt: skip
        self.tensors = [one for network in networks.values() for one in tensors_of(network)]
        self.came = list[str]()

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self.ahead:
            assert all(one.data_ptr() in self.names for one in self.tensors)
        self.came.append(self.names[tensors[0].data_ptr()])
        return super().copies(tensors)

    def order(self, depth: int = 1) -> list[str]:
        """The first words of the names of what came, one after the other."""
        return [".".join(name.split(".")[:depth]) for name in self.came]


def fingerprint(networks: dict[str, nn.Module]) -> dict[str, Any]:
    """What a model at rest must have again, bit for bit: objects, memory, strides and values."""
    return {f"{n}.{name}": (id(one), one.data_ptr(), one.stride(), one.dtype, one.device, one.detach().clone())
            for n, network in networks.items()
            for name, one in [*network.named_parameters(), *network.named_buffers()]}  # fmt: skip


def same(networks: dict[str, nn.Module], before: dict[str, Any]) -> bool:
    now = fingerprint(networks)
    return list(now) == list(before) and all(
        now[name][:-1] == one[:-1] and torch.equal(now[name][-1], one[-1]) for name, one in before.items()
    )


def recorded(model: Any, way: str, **how: Any) -> Recording:
    """A model on the CPU that is offloaded to the CPU."""
    mover = Recording(model.networks(), **how)
    engage(model.networks(), CPU, way, mover=mover)
    return mover


# --- which way -------------------------------------------------------------------------------------------------------

GIB = 2**30
SD = {"network": 7 * GIB // 4, "codec": GIB // 6, "conditioner": GIB // 4}


@pytest.mark.parametrize(
    ("free", "sizes", "way"),
    [
        (None, SD, "never"),
        (sum(SD.values()) + ROOM, SD, "never"),
        (sum(SD.values()) + ROOM - 1, SD, "networks"),
        (SD["network"] + ROOM, SD, "networks"),
        (SD["network"] + ROOM - 1, SD, "blocks"),
        (0, SD, "blocks"),
        (100 * (1 + SHARE), {"network": 100}, "never"),  # little weights need little room
        (100 * (1 + SHARE) - 1, {"network": 100}, "blocks"),
        (0, {}, "never"),
    ],
)
def test_the_rule(free: int | None, sizes: dict[str, int], way: str) -> None:
    assert fitting(free, sizes) == way
    assert fitting(free, sizes, blocks=False) == way.replace("blocks", "networks")


def test_more_memory_never_leaves_less_on_the_device() -> None:
    ways = [offload.WAYS.index(fitting(free, SD)) for free in range(0, 6 * GIB, GIB // 64)]
    assert ways == sorted(ways, reverse=True) and set(ways) == {0, 1, 2}


def test_auto_goes_by_the_bytes_in_the_type_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = sd().networks()
    weights = sum(one.numel() for network in networks.values() for one in tensors_of(network))
    monkeypatch.setattr(offload, "free_bytes", lambda device: weights * 2 * (1 + SHARE))
    assert chosen("auto", networks, CUDA, torch.float16) == "never"
    assert chosen("auto", networks, CUDA, torch.float32) != "never"
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    assert chosen("auto", networks, CUDA, torch.float16) == "blocks"
    assert chosen("auto", networks, CUDA, torch.float16, "compile") == "networks"
    assert chosen("networks", networks, CUDA, torch.float16, "compile") == "networks"


def test_auto_on_the_cpu_is_never() -> None:
    assert chosen("auto", sd().networks(), CPU, torch.float32) == "never"
    assert offload.free_bytes(CPU) is None


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_what_cannot_be_had_is_refused(tmp_path: Path, way: str) -> None:
    path = tiny.write_tiny_model(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="^offload by (networks|blocks) is for a GPU; on a CPU there is half"):
        sfumato.load(path, device="cpu", offload=way)
    with pytest.raises(UserError, match="^offload by (networks|blocks) is for a GPU; on a CPU there is half"):
        Model(Opened(ddpm(), Path(), ""), "m", device="cpu", offload=way)
    tiny.picture(1, size=8).save(tmp_path / "a.png")
    for command in (["generate"], ["edit", tmp_path / "a.png"], ["bench", "--dtype", "float32"]):
        result = tiny.run(*command, "--model", path, "--device", "cpu", "--offload", way)
        assert result.code == 2 and f"offload by {way} is for a GPU" in result.err and len(result.err.splitlines()) == 1


def test_blocks_need_torch() -> None:
    with pytest.raises(UserError, match="^offload by blocks needs backend torch: compile computes a network as a"):
        check("blocks", CUDA, "compile")
    check("networks", CUDA, "compile")
    check("blocks", CUDA, "torch")


def test_unknown_ways_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown way of offload 'block' .did you mean 'blocks'"):
        sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), offload="block")
    result = tiny.run("generate", "--offload", "all", "--out", tmp_path / "a.png")
    assert result.code == 2 and "known: auto, never, networks, blocks, half" in result.err


# --- every tensor in its place ---------------------------------------------------------------------------------------


def _eval(model: Any) -> Any:
    for network in model.networks().values():
        network.eval()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: sd(name) for name in ("sd1", "sd2-inpainting")},
    "ddpm": lambda: _eval(ddpm()),
    "ddpm with labels": lambda: _eval(ddpm(guidance=2.0)),
    "unconditional": latent,
    "vq": lambda: latent("vq"),
    "labels": lambda: latent(conditions={"label": LABELS}),
    "words": lambda: latent(conditions={"text": words()}),
    "pixels": lambda: latent("pixels"),
    "class tokens": lambda: latent(conditions={"text": {"kind": "embedded-label", "names": ["a", "b"], "width": 8}}),
}


def asked_of(model: Any) -> list[Asked]:
    """Something that it can read."""
    if "text" in model.reads:
        return [Asked("a red heart", negative="a fish"), Asked("a fish")]
    return [Asked(label=model.config.labels[0]), Asked()] if "label" in model.reads else [Asked(), Asked()]


@pytest.mark.parametrize("way", ["networks", "blocks"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_tensor_is_where_it_is_needed(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that drawing calls runs on "meta" with weights that rest in the CPU's memory, none of them on "meta"."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which "meta" does not know
    model = MODELS[name]()
    networks, before = model.networks(), fingerprint(model.networks())
    engage(networks, META, way, point=swapped)
    with resting(networks):
        assert device_of(model.denoiser.network) == META
        shown = {n: [torch.zeros(5, *model.shape[1:])] * 2 for n in getattr(model, "shown", {})}
        condition, null = model.conditions(asked_of(model), shown)
        both = null.stacked_on(condition) if condition != Condition() else condition
        x = torch.zeros(len(asked_of(model)) * (2 if both is not condition else 1), *model.shape, device=META)
        for t in (999, 500):
            assert model.denoiser(x, model.denoiser.schedule.level(t), both).out.device == META
        pictures = model.pictures(x)
        assert pictures.device == META and model.encode(pictures).mean.shape == x.shape
    assert same(networks, before)


@pytest.mark.parametrize("way", ["networks", "blocks"])
@pytest.mark.parametrize("name", ["sd1", "words", "class tokens"])
def test_words_are_checked_where_the_weights_are(name: str, way: str) -> None:
    model = MODELS[name]()
    networks, before = model.networks(), fingerprint(model.networks())
    tables = [m for m in networks["conditioner"].modules() if isinstance(m, nn.Embedding)]
    seen: list[tuple[torch.device, torch.device]] = []
    for table in tables:
        table.register_forward_pre_hook(lambda table, given: seen.append((given[0].device, table.weight.device)))
    engage(networks, META, way, point=swapped)
    model.check_words(asked_of(model))
    assert all(ids == table for ids, table in seen) and bool(seen) == bool(tables)
    assert same(networks, before)


def test_tiles_go_by_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sd()
    engage(model.networks(), META, "networks", point=swapped)
    asked = list[torch.device]()
    for free in (2**50, 0):
        monkeypatch.setattr(offload, "free_bytes", lambda device, free=free: (asked.append(device), free)[1])
        assert model.needs_tiles(64, 64) == (free == 0)
    assert asked == [META, META]
    monkeypatch.setattr(offload, "free_bytes", lambda device: None)  # no memory of its own: the CPU's
    for host, tiles in ((2**50, False), (0, True)):
        monkeypatch.setattr("sfumato.systems.latent.free_host_bytes", lambda host=host: host)
        assert model.needs_tiles(64, 64) == tiles
    assert not latent("pixels").needs_tiles(64, 64)


@torch.no_grad()
def test_the_article_s_network_goes_by_blocks_too() -> None:
    network = Unet(dim=8, dim_mults=(1, 2)).eval()
    before = fingerprint({"network": network})
    engage({"network": network}, META, "blocks", point=swapped)
    with resting({"network": network}):
        assert network(torch.zeros(1, 3, 8, 8, device=META), torch.zeros(1, device=META)).shape == (1, 3, 8, 8)
    assert same({"network": network}, before)


@torch.no_grad()
@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_tiles_and_previews_find_the_weights(way: str) -> None:
    model = latent("kl")
    engage(model.networks(), META, way, point=swapped)
    z = torch.zeros(1, 4, 24, 24, device=META)
    with resting(model.networks()):
        assert model.codec.decode(z).device == META
    mine = latent("kl")
    pictures = mine.codec.decode(z := torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0)))
    tiled = decode_tiled(mine.codec, z, tile=12), encode_tiled(mine.codec, pictures, tile=12).mean
    preview = LatentPreview.measured(latent("kl").codec, torch.Generator().manual_seed(0))
    mover, before = recorded(mine, way), fingerprint(mine.networks())
    with resting(mine.networks()):
        assert torch.equal(decode_tiled(mine.codec, z, tile=12), tiled[0])
        assert torch.equal(encode_tiled(mine.codec, pictures, tile=12).mean, tiled[1])
        found = LatentPreview.measured(mine.codec, torch.Generator().manual_seed(0), CPU)
    assert torch.equal(found.weight, preview.weight) and set(mover.order()) == {"codec"}
    assert same(mine.networks(), before)


# --- the same pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["networks", "blocks"])
@pytest.mark.parametrize("name", ["sd1", "sd2-inpainting", "ddpm with labels", "vq", "words", "pixels"])
def test_pictures_are_the_same_bit_for_bit(name: str, way: str) -> None:
    model = MODELS[name]()
    guidance = {"guidance": 2.0} if model.reads else {}
    how: dict[str, Any] = {"seeds": [1, 2], "asked": asked_of(model), "steps": 2, **guidance}
    picture = Source(torch.rand(3, model.config.size, model.config.size) * 2 - 1, strength=0.6)
    expected = draw(model, **how), edit(model, picture, **how)
    before = fingerprint(model.networks())
    mover = recorded(model, way)
    assert torch.equal(draw(model, **how), expected[0]) and same(model.networks(), before)
    assert torch.equal(edit(model, picture, **how), expected[1]) and same(model.networks(), before)
    assert set(mover.order()) == set(model.networks())
    for network in model.networks().values():
        release(network)
        assert not any("forward" in vars(module) for module in network.modules())
    assert torch.equal(draw(model, **how), expected[0])


def test_networks_come_once_for_all_steps_and_one_at_a_time() -> None:
    model = sd()
    mover = recorded(model, "networks")
    draw(model, **(HOW | {"steps": 5}))
    assert mover.order() == ["conditioner", "network", "codec"]
    mover.came.clear()
    edit(model, Source(torch.zeros(3, 64, 64)), **HOW)
    assert mover.order() == ["codec", "conditioner", "network", "codec"]


def test_blocks_come_in_the_order_of_the_network() -> None:
    model = sd()
    mover = recorded(model, "blocks")
    draw_latents(model, **HOW)
    once = [
        "time_embedding.linear_1", "conv_in.weight", *(f"down_blocks.{i}" for i in range(4)), "mid_block.attentions",
        *(f"up_blocks.{i}" for i in range(4)), "conv_norm_out.weight", "conv_out.weight",
    ]  # fmt: skip
    calls = mover.order(3).count("network.conv_out.weight")
    assert calls >= HOW["steps"] and mover.order(3)[1:] == [f"network.{name}" for name in once] * calls
    assert mover.order()[0] == "conditioner"


def test_what_follows_is_copied_ahead_and_used() -> None:
    """Each block is copied once for each time it is needed, the next one while the one before it is there."""
    model = sd()
    plain, ahead = recorded(model, "blocks"), None
    expected = draw(model, **(HOW | {"steps": 4}))
    for network in model.networks().values():
        release(network)
    ahead = recorded(model, "blocks", ahead=True)
    before = fingerprint(model.networks())
    assert torch.equal(draw(model, **(HOW | {"steps": 4})), expected) and same(model.networks(), before)
    needless = len(ahead.came) - len(plain.came)  # after the last step the first block again, and so in the codec
    assert 0 <= needless <= 2


def test_copies_made_ahead_are_not_used_when_weights_have_changed_since() -> None:
    one, two = (Group([nn.Parameter(torch.zeros(2))]) for _ in range(2))
    mover = Mover(CPU)
    mover.ahead = True
    shuttle = Shuttle(mover)
    for group in (one, two, one):
        shuttle.need(group)
    with torch.no_grad():
        two.tensors[0].add_(1)
    shuttle.need(two)
    assert two.tensors[0].tolist() == [1, 1]
    shuttle.rest()
    assert two.tensors[0].tolist() == [1, 1] and shuttle.present is None


class Counting(Mover):
    """Copies ahead and says how often it copied."""

    ahead = True

    def __init__(self) -> None:
        super().__init__(CPU)
        self.count = 0

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.count += 1
        return super().copies(tensors)


def test_copies_made_ahead_are_used_where_blocks_share_tensors() -> None:
    """… and are of what rests; but for a tensor that was changed on the device meanwhile."""
    shared, mover = nn.Parameter(torch.zeros(2)), Counting()
    rests = shared.data_ptr()
    one, two = (Group([nn.Parameter(torch.zeros(2)), shared]) for _ in range(2))
    shuttle = Shuttle(mover)
    for group in (one, two, one, two, one):
        shuttle.need(group)
    assert mover.count == 5 + 1  # each once for each time it came, and what may follow the last
    with torch.no_grad():
        shared.add_(1)
    shuttle.need(two)
    assert shared.tolist() == [1, 1] and mover.count == 6 + 2
    shuttle.rest()
    assert shared.tolist() == [1, 1] and shared.data_ptr() != rests


@torch.no_grad()
def test_weights_of_the_network_itself_are_copied_ahead_too() -> None:
    network, mover = Scaled(), Counting()
    before = fingerprint({"network": network})
    engage({"network": network}, CPU, "blocks", mover=mover)
    with resting({"network": network}):
        for _ in range(4):
            network(torch.zeros(1, 2))
    assert mover.count == 8 + 1 and same({"network": network}, before)


def test_copies_on_a_stream_of_their_own() -> None:
    """On the CPU, whose streams are none: that the calls are there and the copies right. Their order needs a GPU."""
    model = sd()
    expected, before = draw(model, **HOW), fingerprint(model.networks())
    engage(model.networks(), CPU, "blocks", mover=Streamed(CPU))
    assert torch.equal(draw(model, **HOW), expected) and same(model.networks(), before)


def test_no_room_for_what_follows_is_no_error() -> None:
    class Narrow(Mover):
        ahead = True

        def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            if shuttle.present is not None:
                raise torch.OutOfMemoryError("there is room for one")
            return super().copies(tensors)

    one, two = (Group([nn.Parameter(torch.full((2,), float(i)))]) for i in range(2))
    shuttle = Shuttle(Narrow(CPU))
    for group in (one, two, one, two):
        shuttle.need(group)
        assert shuttle.present is group


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["networks", "blocks"])
@pytest.mark.parametrize("at", ["conditioner", "network", "codec"])
def test_weights_rest_after_an_error(at: str, way: str) -> None:
    model = sd()
    before = fingerprint(model.networks())
    recorded(model, way)
    layer = [m for m in model.networks()[at].modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    handle = layer.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model, **HOW)
    handle.remove()
    assert same(model.networks(), before)
    assert draw(model, **HOW).isfinite().all()


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_weights_rest_when_a_hook_ends_the_drawing(way: str) -> None:
    model = sd()
    before = fingerprint(model.networks())
    recorded(model, way)

    def stop(x: Tensor, *rest: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, **HOW, on_step=stop)
    assert same(model.networks(), before)


def test_no_memory_for_a_network_leaves_all_at_rest() -> None:
    class Full(Recording):
        def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            if self.came:
                raise torch.OutOfMemoryError("there is no more")
            return super().copies(tensors)

    model = sd()
    before = fingerprint(model.networks())
    engage(model.networks(), CPU, "networks", mover=Full(model.networks()))
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, **HOW)
    assert same(model.networks(), before)


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_saving_in_the_middle_loses_nothing(way: str) -> None:
    model = sd()
    expected = {name: one.clone() for name, one in model.tensors().items()}
    recorded(model, way)

    def look(x: Tensor, *rest: Any) -> Tensor:
        found = model.tensors()
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
        return x

    draw(model, **HOW, on_step=look)


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_weights_that_are_widened_on_the_device_stay_wide(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """What overflows in half precision is repeated in float32, once, and the next picture begins so."""
    model = sd()
    for network in model.networks().values():
        network.half()
    with torch.no_grad():
        network = model.denoiser.network
        network.conv_in.weight.fill_(6e4)
    engage(model.networks(), CPU, way)
    with caplog.at_level(logging.WARNING, "sfumato"):
        first = draw(model, **HOW)
        assert {one.dtype for one in model.denoiser.network.parameters()} == {torch.float32}
        assert torch.equal(draw(model, **HOW), first)
    assert len([one for one in caplog.messages if "the network gave values that are not finite" in one]) == 1
    assert network.conv_in.weight.unique().item() == 6e4  # type: ignore[union-attr]


def test_damaged_weights_are_still_named() -> None:
    model = sd()
    with torch.no_grad():
        model.codec.network.decoder.conv_out.weight.fill_(torch.nan)  # type: ignore[union-attr]
    recorded(model, "networks")
    with pytest.raises(PictureError, match=r"decoder\.conv_out\.weight"):
        draw(model, **HOW)


def test_changes_in_place_on_the_device_come_back() -> None:
    layer = nn.Linear(2, 2)
    engage({"network": layer}, CPU, "networks")
    bring(layer)
    resting_at = layer.bias.data_ptr()
    with torch.no_grad():
        layer.weight.fill_(7)
    with resting({"network": layer}):
        pass
    assert layer.weight.unique().item() == 7 and layer.bias.data_ptr() != resting_at


def test_weights_that_two_blocks_share_stay_one() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    before = network(torch.ones(1, 2)).detach()
    for way in ("networks", "blocks"):
        engage({"network": network}, CPU, way)
        with torch.no_grad(), resting({"network": network}):
            assert torch.equal(network(torch.ones(1, 2)), before)
        release(network)
    assert network[1].weight is network[0].weight


class Scaled(nn.Module):
    """A block beside which the network has a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 2.0))
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.scale * self.first(x) * self.scale) * self.scale
        return out


@torch.no_grad()
def test_weights_of_the_network_itself_come_with_each_block() -> None:
    network = Scaled()
    engage({"network": network}, META, "blocks", point=swapped)
    with resting({"network": network}):
        assert network(torch.zeros(1, 2, device=META)).device == META
    assert network.scale.tolist() == [2, 2]


def test_blocks_refuse_gradients() -> None:
    """They would have gone before a gradient came back; a network as a whole stays."""
    network, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False), torch.ones(1, 2)
    expected = network(x)
    engage({"network": network}, CPU, "blocks")
    with resting({"network": network}):
        assert torch.equal(network(x), expected)  # nothing asks for one
        with pytest.raises(UserError, match="^offload by blocks computes no gradients; open the model with offload"):
            network(x.clone().requires_grad_())
        network[1].weight.requires_grad_()
        with pytest.raises(UserError, match="^offload by blocks computes no gradients"):
            network(x)
        with torch.no_grad():
            assert torch.equal(network(x), expected)
    release(network)
    engage({"network": network}, CPU, "networks")
    with resting({"network": network}):
        network(wanted := x.clone().requires_grad_()).sum().backward()
    assert wanted.grad is not None and wanted.grad.any()


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_bits_per_dimension_leave_all_at_rest(way: str) -> None:
    model = _eval(ddpm())
    pictures = torch.randint(0, 256, (2, *model.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    of_flow = partial(measure_flow, model, pictures, steps=2)
    expected = measure_bound(model, pictures, steps="3").total, of_flow().total
    before = fingerprint(model.networks())
    recorded(model, way)
    assert measure_bound(model, pictures, steps="3").total == expected[0] and same(model.networks(), before)
    if way == "networks":
        assert of_flow().total == expected[1]
    else:
        with pytest.raises(UserError, match="^offload by blocks computes no gradients"):
            of_flow()
    assert same(model.networks(), before)


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_figures_leave_all_at_rest(way: str) -> None:
    pytest.importorskip("matplotlib")
    model = Model(Opened(sd(), Path(), ""), "small", device="cpu")
    before = fingerprint(model.system.networks())
    mover = recorded(model.system, way)
    explain.reverse(model, prompt="a hat", steps=2)
    assert mover.order()[-1] == "codec" and same(model.system.networks(), before)
    mover.came.clear()
    explain.solvers(model, budgets=[2, 3], names=["euler"], pictures=1)
    assert mover.order()[-1] == "network" and same(model.system.networks(), before)


def test_under_inference_mode_too() -> None:
    model = sd()
    expected, before = draw(model, **HOW), fingerprint(model.networks())
    recorded(model, "blocks")
    with torch.inference_mode():
        assert torch.equal(draw(model, **HOW), expected)
    assert same(model.networks(), before) and torch.equal(draw(model, **HOW), expected)


# --- beside everything else ------------------------------------------------------------------------------------------


def test_a_copy_with_weights_of_its_own_is_not_offloaded() -> None:
    model = latent("kl")
    recorded(model, "blocks")
    network = model.codec.network
    assert network is not None
    other = copy.deepcopy(network)
    assert not any(isinstance(vars(module).get("forward"), Fetching) for module in other.modules())
    z = torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        for one in other.parameters():
            one.zero_()
        assert not other.decode(z).any() and network.decode(z).any()  # type: ignore[operator]


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_lossy_savings_are_the_same(way: str) -> None:
    model = sd()
    fast = FastSettings(cache_every=2, merge=0.5)
    how = HOW | {"steps": 4, "fast": fast}
    expected, before = draw(model, **how), fingerprint(model.networks())
    recorded(model, way)
    assert torch.equal(draw(model, **how), expected) and same(model.networks(), before)


def test_another_engine_computes_its_networks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine was given has its weights when it is called; within, nothing stands that it would stumble over."""
    calls: list[str] = []

    def engine(module: nn.Module, unit: int) -> Forward:
        def forward(*args: Any, **slots: Any) -> Any:
            calls.append(type(module).__name__)
            return own_forward(module)(*args, **slots)

        return forward

    monkeypatch.setitem(BACKENDS, "counted", Backend("counted", lambda device, dtype: engine))
    model = sd()
    expected, before = draw(model, **HOW), fingerprint(model.networks())
    registry.engage("counted", model.networks(), CPU, torch.float32, way="networks")
    assert torch.equal(draw(model, **HOW), expected) and same(model.networks(), before)
    drawn = len(calls)
    assert set(calls[:-1]) == {"UNet2DConditionModel"} and calls[-1] == "Decoder"
    registry.engage("torch", model.networks(), CPU, torch.float32)
    assert not any(isinstance(vars(m).get("forward"), Fetching) for n in model.networks().values() for m in n.modules())
    assert torch.equal(draw(model, **HOW), expected) and len(calls) == drawn


def test_what_stood_there_before_stands_there_again() -> None:
    model = sd()
    registry.engage("torch", model.networks(), CPU, torch.float32, "winograd")
    layers = [m for m in model.denoiser.network.modules() if "forward" in vars(m)]
    stood = [vars(m)["forward"] for m in layers]
    engage(model.networks(), CPU, "blocks")
    release(model.denoiser.network)
    assert [vars(m)["forward"] for m in layers] == stood
    assert all(not isinstance(one, Fetching) for one in stood)
    assert {type(one) for one in stood} >= {Once}


@pytest.mark.slow
def test_coming_and_going_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler, but for the code that it writes, which needs a C++ compiler."""
    compiled.refused.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = _eval(ddpm())
    x, level = torch.zeros(1, *model.shape), model.denoiser.schedule.level(500)
    with torch.no_grad():
        expected, before = model.denoiser(x, level).out, fingerprint(model.networks())
        registry.engage("compile", model.networks(), CPU, torch.float32, way="networks")
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            with resting(model.networks()):
                assert torch.allclose(model.denoiser(x, level).out, expected, atol=1e-4)
            assert same(model.networks(), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled.refused.cache_clear()
    torch._dynamo.reset()


# --- weights that rest in 16 bits ------------------------------------------------------------------------------------


def halved(model: Any, kind: torch.dtype = torch.float16) -> Any:
    """With weights of 16 bits; `rounded` has the same values in float32."""
    for network in model.networks().values():
        network.to(kind)
    return model


def rounded(model: Any, kind: torch.dtype = torch.float16) -> Any:
    halved(model, kind)
    for network in model.networks().values():
        network.float()
    return model


@pytest.fixture
def everything_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small: else these models would be wide as a whole, and in one piece."""
    monkeypatch.setattr(offload, "SMALL", 512)
    monkeypatch.setattr(offload, "PIECE", 4096)


@pytest.mark.usefixtures("everything_rests")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd1", "sd2-inpainting", "ddpm with labels", "vq", "words", "pixels"])
def test_pictures_of_resting_halves_are_those_of_float32(name: str, kind: torch.dtype) -> None:
    plain, model = rounded(MODELS[name](), kind), halved(MODELS[name](), kind)
    networks = model.networks()
    guidance = {"guidance": 2.0} if model.reads else {}
    how: dict[str, Any] = {"seeds": [1, 2], "asked": asked_of(model), "steps": 2, **guidance}
    picture = Source(torch.rand(3, model.config.size, model.config.size) * 2 - 1, strength=0.6)
    engage(networks, CPU, "half")
    before = fingerprint(networks)
    kinds = [one.dtype for network in networks.values() for one in network.parameters() if one.numel() >= offload.SMALL]
    assert kinds.count(kind) >= len(kinds) - 2 > 0 and all(map(offload.widens, networks.values()))
    assert all(next(networks[name].parameters()).dtype == torch.float32 for name in networks if name != "conditioner")
    assert torch.equal(draw(model, **how), draw(plain, **how)) and same(networks, before)
    assert torch.equal(edit(model, picture, **how), edit(plain, picture, **how)) and same(networks, before)
    for network in networks.values():
        release(network)
    assert {one.dtype for network in networks.values() for one in network.parameters()} == {torch.float32}
    assert torch.equal(draw(model, **how), draw(plain, **how))


@pytest.mark.usefixtures("everything_rests")
def test_savings_tiles_and_previews_with_resting_halves() -> None:
    plain, model = rounded(sd()), halved(sd())
    engage(model.networks(), CPU, "half")
    before = fingerprint(model.networks())
    how = HOW | {"steps": 4, "fast": FastSettings(cache_every=2, merge=0.5)}
    assert torch.equal(draw(model, **how), draw(plain, **how)) and same(model.networks(), before)
    z = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    preview = LatentPreview.measured(plain.codec, torch.Generator().manual_seed(0))
    with resting(model.networks()):
        assert torch.equal(decode_tiled(model.codec, z, tile=12), decode_tiled(plain.codec, z, tile=12))
        found = LatentPreview.measured(model.codec, torch.Generator().manual_seed(0), CPU)
    assert torch.equal(found.weight, preview.weight) and same(model.networks(), before)


@pytest.mark.usefixtures("everything_rests")
@pytest.mark.parametrize("way", ["half", "networks", "blocks"])
def test_threads_that_share_a_model_take_turns(way: str) -> None:
    model, plain = (halved(sd()), rounded(sd())) if way == "half" else (sd(), sd())
    engage(model.networks(), CPU, way)
    before, hows = fingerprint(model.networks()), [HOW | {"seeds": [seed]} | {"asked": WORDS[:1]} for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda how: draw(model, **how), hows))
    assert all(torch.equal(one, draw(plain, **how)) for one, how in zip(found, hows, strict=True))
    assert same(model.networks(), before)


@pytest.mark.usefixtures("everything_rests")
def test_a_copy_of_resting_halves_is_wide() -> None:
    model, plain = halved(sd()), rounded(sd())
    engage(model.networks(), CPU, "half")
    other, before = copy.deepcopy(model), fingerprint(model.networks())
    kinds = {one.dtype for network in other.networks().values() for one in network.parameters()}
    assert kinds == {torch.float32} and not any(map(offload.widens, other.networks().values()))
    assert torch.equal(draw(other, **HOW), draw(plain, **HOW)) and same(model.networks(), before)


@pytest.mark.usefixtures("everything_rests")
def test_resting_halves_are_saved_as_they_compute(tmp_path: Path) -> None:
    path, files = stable.write(tmp_path / "sd.safetensors", dtype=torch.float16), []
    for way in ("half", "never"):
        files.append(tmp_path / f"{way}.safetensors")
        sfumato.load(path, device="cpu", dtype="float32", offload=way).save(files[-1], to="single-file")
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("everything_rests")
def test_halves_compute_no_gradients() -> None:
    model = halved(sd())
    engage(model.networks(), CPU, "half")
    x = torch.zeros(1, *model.shape, requires_grad=True)
    condition, _ = model.conditions([Asked("a hat")])
    with pytest.raises(UserError, match="^offload half computes no gradients; open the model with offload never$"):
        model.denoiser(x, model.denoiser.schedule.level(torch.tensor(500)), condition)


@pytest.mark.usefixtures("everything_rests")
def test_a_part_is_wide_while_it_computes_and_no_other() -> None:
    model, seen = halved(sd()), list[set[str]]()
    network = model.denoiser.network

    def look(*_: Any) -> None:
        named = dict(network.named_parameters())
        wide = {name for name, one in named.items() if one.numel() >= offload.SMALL and one.dtype == torch.float32}
        seen.append(wide - {"conv_in.weight"})  # which tells the network's type

    engage(model.networks(), CPU, "half")
    for part in (network.down_blocks[0].resnets[0].conv1, network.up_blocks[-1].resnets[0].conv1):
        part.register_forward_hook(look)
    draw(model, **HOW)
    first, last = seen[0], seen[1]
    assert "down_blocks.0.resnets.0.conv1.weight" in first and not first & last
    assert sum(dict(network.named_parameters())[name].numel() for name in first) <= offload.PIECE * 4


@pytest.mark.usefixtures("everything_rests")
@pytest.mark.parametrize("doubled", [False, True])
def test_fewer_products_are_the_same_with_resting_halves(monkeypatch: pytest.MonkeyPatch, doubled: bool) -> None:
    """Kernels are transformed once from the wide weights, kept while a picture is drawn, and forgotten."""
    monkeypatch.setattr(convolutions, "LEAST_CHANNELS", {torch.float32: 1})
    monkeypatch.setattr(convolutions, "LEAST_PIXELS", 1)
    made = list[int]()
    real = convolutions.winograd.transformed_doubled if doubled else convolutions.winograd.transformed
    name = "transformed_doubled" if doubled else "transformed"
    monkeypatch.setattr(convolutions.winograd, name, lambda *given: (made.append(1), real(*given))[1])
    pictures, counts = [], []
    for model, way in ((rounded(sd()), "never"), (halved(sd()), "half")):
        networks = model.networks()
        registry.engage("torch", networks, CPU, torch.float32, "winograd", way)
        made.clear()
        pictures.append(draw(model, **HOW))
        counts.append(len(made))
        kept = [offload.standing(one) for network in networks.values() for one in network.modules()]
        stores = {id(one.store): one.store for one in kept if isinstance(one, convolutions.Convolving)}
        assert stores and not any(store._kept for store in stores.values())
    assert torch.equal(*pictures) and counts[0] == counts[1] > 0


@pytest.mark.usefixtures("everything_rests")
def test_what_is_not_finite_is_not_blamed_on_resting_halves(caplog: pytest.LogCaptureFixture) -> None:
    model = halved(sd())
    with torch.no_grad():
        model.denoiser.network.down_blocks[0].resnets[0].conv1.weight[0] = torch.nan
    engage(model.networks(), CPU, "half")
    with caplog.at_level(logging.WARNING, "sfumato"), pytest.raises(PictureError, match=r"conv1\.weight.*damaged"):
        draw(model, **HOW)
    assert not any("goes on in float32" in one for one in caplog.messages)


def test_wide_numbers_lie_where_they_lay_and_at_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 1)
    filters = torch.randn(3, 5, 3, 3).half().to(memory_format=torch.channels_last)
    given = [filters, torch.arange(7), torch.randn(11).bfloat16(), torch.randn(4), torch.randn(6, 4).half().t()]
    mover = offload.Widening(CPU)
    copies = mover.copies(given)
    assert [one.dtype for one in copies[:4:2]] == [torch.float32] * 2
    assert all(torch.equal(copy, one.to(copy.dtype)) for copy, one in zip(copies, given, strict=True))
    assert all(copies[i] is given[i] for i in (1, 3, 4))  # whole numbers, wide ones, and what does not fill its memory
    assert copies[0].stride() == filters.stride() and (copies[2].data_ptr() - copies[0].data_ptr()) % 64 == 0
    assert mover.copies(given)[0].data_ptr() == copies[0].data_ptr()
    with torch.inference_mode():
        grown = offload.Widening(CPU).copies(given)[0]
    assert not grown.is_inference()


def test_halves_rest_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(sd())
    networks = model.networks()
    stored = sum(one.nbytes for network in networks.values() for one in tensors_of(network))
    monkeypatch.setattr(offload, "SMALL", 1)
    wide = sum(one.numel() * (4 if one.is_floating_point() else one.element_size())
               for network in networks.values() for one in tensors_of(network))  # fmt: skip
    needed = wide - stored + min(ROOM, SHARE * wide)
    for free, way in ((needed, "never"), (needed - 1, "half"), (0, "half")):
        monkeypatch.setattr(offload, "free_host_bytes", lambda free=free: free)
        assert chosen("auto", networks, CPU, torch.float32) == way
    monkeypatch.setattr(offload, "free_host_bytes", lambda: 0)
    assert chosen("auto", networks, CPU, torch.float16) == chosen("auto", networks, CPU, torch.bfloat16) == "never"
    assert chosen("auto", networks, CPU, torch.float32, "openvino") == "never"
    assert chosen("auto", sd().networks(), CPU, torch.float32) == "never"


def test_half_is_refused_where_it_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^offload half is for a CPU that computes in float32; leave it out"):
        check("half", CUDA)
    with pytest.raises(UserError, match="^offload half is for a CPU that computes in float32"):
        check("half", CPU, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="^offload half needs backend torch: openvino computes"):
        check("half", CPU, "openvino")
    path = stable.write(tmp_path / "wide.safetensors", dtype=torch.float32)
    result = tiny.run("generate", "a hat", "--model", path, "--offload", "half", "--out", tmp_path / "a.png")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "offload half has nothing to do: this model holds no large weights of 16 bits" in result.err
    assert not (tmp_path / "a.png").exists()


def _file(place: Path, kind: torch.dtype) -> Path:
    return stable.write(place / "sd.safetensors", dtype=kind)


def _folder(place: Path, kind: torch.dtype) -> Path:
    save_folder(halved(sd(), kind), place / "sd")
    return place / "sd"


@pytest.mark.usefixtures("everything_rests")
@pytest.mark.parametrize("asked", ["half", "auto"])
@pytest.mark.parametrize(("write", "kind"), [(_file, torch.float16), (_file, torch.bfloat16), (_folder, torch.float16)])
def test_halves_by_the_front_door(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, write: Callable[..., Path], kind: torch.dtype
) -> None:
    """Weights are never wide all at once, and the picture and what it tells are the same."""
    path = write(tmp_path, kind)
    how: dict[str, Any] = {"prompt": "a (red:1.2) hat", "steps": 2, "seed": 1, "guidance": 3.0}
    plain = sfumato.load(path, device="cpu", dtype="float32", convolution="direct")
    (expected,) = plain.generate(**how, hires=2.0)
    assert plain.offload == "never"
    monkeypatch.setattr(nn.Module, "to", partialmethod(_in_place_only, nn.Module.to))
    for module in ("sfumato.backends.offload", "sfumato.api"):
        monkeypatch.setattr(f"{module}.free_host_bytes", lambda: 0)
    model = sfumato.load(path, device="cpu", dtype="float32", offload=asked)
    assert model.offload == "half" and model.convolution == "direct" and model.dtype == "float32"
    slow = "the memory that is free is short, so convolutions are direct, which is slower"
    short = "the memory that is free on cpu is short, so offload half is on"
    assert set(model.notes) - set(plain.notes) == ({slow, short} if asked == "auto" else {slow})
    networks = model.system.networks()
    before = fingerprint(networks)
    (found,) = model.generate(**how, hires=2.0)
    assert found.tobytes() == expected.tobytes() and same(networks, before)
    assert found.info["sfumato"] == expected.info["sfumato"]
    (edited,) = model.edit(expected, box=(0, 0, 32, 32), **how)
    assert edited.tobytes() == plain.edit(expected, box=(0, 0, 32, 32), **how)[0].tobytes() and same(networks, before)


def _in_place_only(self: nn.Module, own: Any, *args: Any, **how: Any) -> nn.Module:
    """Layouts may change, types and places not."""
    assert not args, "weights were widened"
    return own(self, **how)  # type: ignore[no-any-return]


# --- the front door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["networks", "blocks"])
def test_the_front_door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    """As on a GPU that is too small, but for where the copies lie."""
    path = stable.write(tmp_path / "sd.safetensors")
    how: dict[str, Any] = {"prompt": "a (red:1.2) hat", "steps": 2, "seed": 1, "guidance": 3.0}
    plain = sfumato.load(path, device="cpu")
    assert plain.offload == "never"
    (expected,) = plain.generate(**how, hires=2.0)
    with monkeypatch.context() as small:
        small.setattr(offload, "free_bytes", lambda device: 0 if way == "blocks" else 2**18)
        small.setattr(offload, "fitting", lambda free, sizes, blocks: way)
        model = sfumato.load(path, device="cpu")
    networks = model.system.networks()
    before = fingerprint(networks)
    note = f"the memory that is free on cpu is short, so offload by {way} is on"
    assert model.notes == (*plain.notes, note)
    assert model.offload == way and device_of(networks["network"]) == CPU
    shown: list[Any] = []
    hook = model.preview_hook(lambda step, picture: shown.append(picture))
    assert same(networks, before)
    (found,) = model.generate(**how, hires=2.0, on_step=hook)
    assert found.tobytes() == expected.tobytes() and shown and same(networks, before)
    assert found.info["sfumato"] == expected.info["sfumato"]  # it changes nothing, so no picture tells of it
    (edited,) = model.edit(expected, box=(0, 0, 32, 32), **how)
    assert edited.tobytes() == plain.edit(expected, box=(0, 0, 32, 32), **how)[0].tobytes() and same(networks, before)


def test_never_leaves_networks_as_they_are() -> None:
    model: Latent = sd()
    engage(model.networks(), CPU, "never")
    bring(model.denoiser.network)
    bring(None)
    assert not any("forward" in vars(m) for n in model.networks().values() for m in n.modules())
    assert device_of(model.denoiser.network) == CPU
