"""OpenVINO computes what torch computes."""

from __future__ import annotations

import logging
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato.backends import openvino
from sfumato.backends.devices import native_bfloat16
from sfumato.backends.openvino import Programs, shrunk, state
from sfumato.backends.registry import check, engage
from sfumato.codecs.kl import KLCodec
from sfumato.errors import UserError
from sfumato.images import save_picture
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
from sfumato.replay import replay

from .. import tiny

pytest.importorskip("openvino", reason="OpenVINO is not installed")

CPU = torch.device("cpu")
half = pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the spread of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def programs(network: nn.Module) -> Programs:
    """What OpenVINO has made of a driven network."""
    run = vars(network)["forward"].run
    assert isinstance(run, Programs)
    return run


def unet(**changes: Any) -> UNet2DConditionModel:
    """A little network that is told a text, with random weights, always the same."""
    values: dict[str, Any] = {
        "block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 12, "attention_head_dim": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(UNet2DConditionConfig.from_dict(values | changes)).eval().requires_grad_(False)


@torch.no_grad()
def test_a_pixel_model_of_any_size_and_batch() -> None:
    network = tiny.tiny_model().denoiser.network.eval()
    calls = [(noise(size, rows, 3, size, size), torch.arange(rows) * 400.0, torch.arange(rows) % 3)
             for rows, size in ((1, 8), (3, 16))]  # fmt: skip
    own = [network(*call) for call in calls]
    engage("openvino", {"network": network}, CPU, torch.float32)
    for call, wanted in zip(calls, own, strict=True):
        assert error(network(*call), wanted) < 1e-5
    assert len(programs(network)._kept) == 2
    network(*calls[0])
    assert len(programs(network)._kept) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"use_linear_projection": True, "class_embed_type": "timestep", "num_class_embeds": None},
        {"resnet_time_scale_shift": "scale_shift", "class_embed_type": "projection",
         "projection_class_embeddings_input_dim": 5},
    ],
)  # fmt: skip
def test_all_that_a_network_is_told(changes: dict[str, Any]) -> None:
    network = unet(**changes)
    x, slots = noise(0, 2, 4, 8, 12), {"context": noise(1, 2, 7, 12)}
    slots["context_mask"] = torch.arange(7)[None] < torch.tensor([[7], [3]])
    slots |= {"labels": torch.tensor([3.0, 970.0])} if changes["class_embed_type"] == "timestep" else {
        "vector": noise(2, 2, 5)}  # fmt: skip
    places = [(16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6), (32, 4, 6)]
    residuals = tuple(noise(3 + i, 2, *place) for i, place in enumerate(places))
    wanted = [network(x, 999, **slots), network(x, 999, **slots, residuals=residuals)]
    engage("openvino", {"network": network}, CPU, torch.float32)
    assert error(network(x, 999, **slots), wanted[0]) < 1e-5
    assert error(network(x, 999, **slots, residuals=residuals), wanted[1]) < 1e-5


@half
@torch.no_grad()
def test_bfloat16_is_as_exact_as_torch_s_at_every_time() -> None:
    network, x, context = unet(), noise(0, 2, 4, 16, 16), noise(1, 2, 7, 12)
    exact = {t: network(x, t, context=context) for t in (3, 500, 999)}
    network.to(torch.bfloat16)
    x, context = x.bfloat16(), context.bfloat16()
    plain = {t: network(x, t, context=context) for t in exact}
    engage("openvino", {"network": network}, CPU, torch.bfloat16)
    for t, wanted in exact.items():
        found = network(x, t, context=context)
        assert found.dtype == torch.bfloat16
        assert error(found, wanted) < 1.5 * error(plain[t], wanted)


@half
@torch.no_grad()
def test_widened_weights_go_on_in_float32() -> None:
    network, x, context = unet(), noise(0, 1, 4, 8, 8), noise(1, 1, 3, 12)
    network.to(torch.bfloat16)
    engage("openvino", {"network": network}, CPU, torch.bfloat16)
    network(x.bfloat16(), 9, context=context.bfloat16())
    network.float()
    found = network(x, 9, context=context)
    assert found.dtype == torch.float32 and len(programs(network)._kept) == 1
    engage("torch", {"network": network}, CPU, torch.float32)
    assert error(found, network(x, 9, context=context)) < 1e-5


@torch.no_grad()
def test_new_weights_are_seen() -> None:
    network, x, context = unet(), noise(0, 1, 4, 8, 8), noise(1, 1, 3, 12)
    engage("openvino", {"network": network}, CPU, torch.float32)
    before = network(x, 9, context=context)
    known = state(network)
    network.conv_out.weight.mul_(2)
    network.conv_out.bias.mul_(2)
    assert state(network) != known
    assert error(network(x, 9, context=context), 2 * before) < 1e-5


@torch.no_grad()
def test_a_codec_both_ways() -> None:
    config = AutoencoderConfig(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = KLCodec(AutoencoderKL(config).eval())
    picture, z = noise(0, 1, 3, 24, 32).clamp(-1, 1), noise(1, 2, 2, 12, 16)
    mean, decoded = codec.encode(picture).mean, codec.decode(z)
    engage("openvino", {"codec": codec.network}, CPU, torch.float32)
    assert error(codec.encode(picture).mean, mean) < 1e-5 and error(codec.decode(z), decoded) < 1e-5


@torch.no_grad()
def test_what_openvino_would_compute_wrongly_stays_with_torch(caplog: pytest.LogCaptureFixture) -> None:
    network, x, context = unet(time_cond_proj_dim=6), noise(0, 1, 4, 8, 8), noise(1, 1, 3, 12)
    wanted = network(x, 9, context=context, guidance=torch.tensor([7.0]))
    engage("openvino", {"network": network}, CPU, torch.float32)
    with caplog.at_level(logging.WARNING, "sfumato"):
        assert torch.equal(network(x, 9, context=context, guidance=torch.tensor([7.0])), wanted)
    assert "whose sinusoids need float32" in caplog.text
    pixels = tiny.tiny_model().denoiser.network.eval()
    engage("openvino", {"network": pixels}, CPU, torch.float32)
    with pytest.raises(UserError, match="labels must lie in 0 to 2"):
        pixels(noise(0, 1, 3, 8, 8), 5, torch.tensor([7]))


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="computes on the CPU, not on meta"):
        check("openvino", torch.device("meta"), torch.float32)
    monkeypatch.setitem(openvino.CAPABILITIES, torch.float16, "NOT THERE")
    with pytest.raises(UserError, match="does not compute in float16 on this CPU, only in float32"):
        check("openvino", CPU, torch.float16)


def test_traces_are_small_and_fit_every_size() -> None:
    assert shrunk({"x": torch.zeros(1, 4, 64, 96)}, 8)["x"].shape == (1, 4, 16, 16)
    assert shrunk({"x": torch.zeros(1, 4, 12, 8)}, 8)["x"].shape == (1, 4, 12, 8)
    kept = {"x": torch.zeros(1, 4, 64, 64), "residuals.0": torch.zeros(1, 4, 64, 64)}
    assert shrunk(kept, 8)["x"].shape == (1, 4, 64, 64)


def test_pictures_are_replayed_byte_for_byte_and_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was sent")

    monkeypatch.setattr(socket.socket, "connect", refused)
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), backend="openvino")
    picture = model.generate(seed=4, label="dog")[0]
    save_picture(picture, tmp_path / "a.png")
    assert picture.info["sfumato"]["made_with"]["backend"] == f"openvino {openvino.version()}"
    again = replay(tmp_path / "a.png")
    save_picture(again.picture, tmp_path / "b.png")
    assert not again.differences and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    own = sfumato.load(tmp_path / "m.safetensors").generate(seed=4, label="dog")[0]
    assert psnr(picture, own) > 45


def psnr(a: Any, b: Any) -> float:
    """Of two pictures in decibels."""
    mean = float(np.square(np.asarray(a, float) - np.asarray(b, float)).mean())
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("float32", 55), pytest.param("bfloat16", 35, marks=half)])
def test_emoji_after_twenty_steps(dtype: str, least: float) -> None:
    said = ["a red heart", "a blue fish"]
    wanted = sfumato.load("emoji").generate(said, seed=0, steps=20)
    found = sfumato.load("emoji", backend="openvino", dtype=dtype).generate(said, seed=0, steps=20)
    assert min(psnr(a, b) for a, b in zip(found, wanted, strict=True)) > least
