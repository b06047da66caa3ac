"""Backends: a model's networks computed by something else, with everything else as it was."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato.backends import compiled, registry
from sfumato.backends.driven import Driven, Forward, drive, own_forward, release
from sfumato.backends.registry import BACKENDS, Backend, chosen, engage, made_with, parts
from sfumato.codecs.kl import KLCodec
from sfumato.codecs.tiles import decode_tiled
from sfumato.errors import UserError
from sfumato.images import read_settings, save_picture
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.replay import replay

from .. import tiny

CPU = torch.device("cpu")


class Counted:
    """An engine that runs the module's own `forward` and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, module: nn.Module, unit: int) -> Forward:
        def forward(*args: Any, **slots: Any) -> Any:
            self.calls.append(f"{type(module).__name__} {unit}")
            return own_forward(module)(*args, **slots)

        return forward


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """A backend of that name."""
    engine = Counted()
    monkeypatch.setitem(BACKENDS, "counted", Backend("counted", lambda device, dtype: engine, lambda: "7"))
    monkeypatch.setattr(registry, "NAMES", ("auto", *BACKENDS))
    yield engine


def _unet() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    network = tiny.tiny_model().denoiser.network.eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return network, x, torch.tensor([5.0, 900.0]), torch.tensor([0, 1])


def test_a_driven_network_is_still_itself(counted: Counted) -> None:
    network, x, t, labels = _unet()
    before, names = network(x, t, labels), list(network.state_dict())
    engage("counted", {"network": network}, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(network(x, t, labels=labels), before)
    assert counted.calls == ["UNet2DModel 2"] and list(network.state_dict()) == names
    engage("torch", {"network": network}, CPU, torch.float32)
    assert torch.equal(network(x, t, labels), before) and len(counted.calls) == 1


def test_a_codec_is_cut_at_its_encoder_and_decoder(counted: Counted) -> None:
    config = AutoencoderConfig(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2,
    )  # fmt: skip
    codec = KLCodec(AutoencoderKL(config).eval())
    z = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture = codec.decode(z)
        engage("counted", {"codec": codec.network}, CPU, torch.float32)
        assert torch.equal(codec.decode(z), picture)
        codec.encode(torch.zeros(1, 3, 16, 16))
        assert counted.calls == ["Decoder 1", "Encoder 2"]
        assert torch.allclose(decode_tiled(codec, z, tile=16), picture, atol=1e-4)  # by layers, which torch runs
    assert len(counted.calls) == 2


def test_text_encoders_stay_with_torch() -> None:
    model = sfumato.load("emoji")
    assert [type(part).__name__ for part, _ in parts(model.system.networks())] == [
        "UNet2DConditionModel", "Encoder", "Decoder",
    ]  # fmt: skip


def test_a_copy_is_driven_by_itself() -> None:
    layer = nn.Linear(2, 2).eval()
    drive(layer, Counted())
    other = copy.deepcopy(layer)
    driven = vars(other)["forward"]
    assert isinstance(driven, Driven) and driven.module is other
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    with torch.no_grad():
        assert other(torch.ones(1, 2)).abs().sum() == 0 and layer(torch.ones(1, 2)).abs().sum() > 0


class Other(nn.Module):
    """A processor that is not the library's."""

    def forward(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _processor(network: Any) -> None:
    network.set_attn_processor(Other())


def _hook(network: Any) -> None:
    network.mid_block.register_forward_hook(lambda *args: None)


def _inner_forward(network: Any) -> None:
    vars(network.mid_block)["forward"] = own_forward(network.mid_block)


def _training(network: Any) -> None:
    network.train()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_processor, "the attention processor Other is not the library's own"),
        (_hook, "something changes what its UNetMidBlock2D computes"),
        (_inner_forward, "something changes what its UNetMidBlock2D computes"),
        (_training, "it is being trained"),
    ],
)
def test_what_cannot_be_given_away_stays_with_torch_and_is_told_once(
    change: Any, why: str, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    network, x, t, labels = _unet()
    engage("counted", {"network": network}, CPU, torch.float32)
    change(network)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "sfumato"):
        network(x, t, labels)
        network(x, t, labels)
    assert not counted.calls
    assert [record.message for record in caplog.records] == [f"backend counted leaves UNet2DModel to torch: {why}"]


def test_gradients_stay_with_torch(counted: Counted) -> None:
    network, x, t, labels = _unet()
    engage("counted", {"network": network}, CPU, torch.float32)
    network(x.requires_grad_(), t, labels).sum().backward()
    assert not counted.calls and x.grad is not None


def test_unknown_backends_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown backend 'openvin' .did you mean 'openvino'"):
        chosen("openvin")
    with pytest.raises(UserError, match="unknown backend"):
        sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), backend="tensorrt")
    result = tiny.run("generate", "--backend", "tensorrt", "--out", tmp_path / "a.png")
    assert result.code == 2 and "known: auto, torch, compile, openvino" in result.err


def test_what_is_not_installed_gets_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sfumato.backends import openvino

    openvino._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"needs OpenVINO, which is not installed: pip install 'sfumato\[openvino\]'"):
        sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), backend="openvino")


def test_compile_is_refused_where_no_compiler_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand a long tale")

    compiled.refused.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"no working compiler \(No working C\+\+ compiler found\)$"):
        registry.check("compile", CPU, torch.float32)
    compiled.refused.cache_clear()


@pytest.mark.slow
def test_compiled_networks_compute_the_same() -> None:
    network, x, t, labels = _unet()
    try:
        registry.check("compile", CPU, torch.float32)
    except UserError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        own = network(x, t, labels)
        engage("compile", {"network": network}, CPU, torch.float32)
        assert torch.allclose(network(x, t, labels), own, atol=1e-5)


def test_a_picture_tells_its_backend_and_is_replayed_with_it(counted: Counted, tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), backend="counted")
    path = tmp_path / "a.png"
    save_picture(model.generate(seed=1, label="cat")[0], path)
    settings = read_settings(path)
    assert settings["backend"] == "counted" and settings["made_with"]["backend"] == "counted 7"
    drawn = len(counted.calls)
    again = replay(path)
    assert len(counted.calls) == 2 * drawn > 0 and not again.differences
    save_picture(again.picture, tmp_path / "b.png")
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_torch_leaves_no_trace_in_the_settings(tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), backend="torch")
    settings = model.generate(seed=1, label="cat")[0].info["sfumato"]
    assert model.backend == "torch" and made_with("torch") == {}
    assert "backend" not in settings and "backend" not in settings["made_with"]


def test_savings_within_the_network_need_torch(counted: Counted) -> None:
    model = sfumato.load("emoji", backend="counted")
    with pytest.raises(UserError, match="need backend torch, not counted"):
        model.generate("a heart", seed=0, steps=4, fast=2)


def test_release_leaves_foreign_forwards_alone() -> None:
    layer = nn.Linear(1, 1)
    vars(layer)["forward"] = own_forward(layer)
    release(layer)
    assert "forward" in vars(layer)


def test_bench_refuses_options_that_a_backend_has_no_use_for() -> None:
    profile = tiny.run("bench", "--backend", "compile", "--profile")
    assert profile.code == 2 and "sees nothing of backend compile" in profile.err
    kernel = tiny.run("bench", "--backend", "openvino", "--kernel", "sdpa")
    assert kernel.code == 2 and "leave --kernel out" in kernel.err
