"""The first stage as a system: standard latents, refusals of a wrong scale, configs and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.checkpoints.io import write_model
from sfumato.codecs import KLCodec, VQCodec
from sfumato.errors import ModelFileError, UserError
from sfumato.systems import open_as, open_system
from sfumato.systems.codec import CodecConfig, CodecSystem, standardised
from sfumato.systems.config import parse
from sfumato.systems.ddpm import DDPM

NETWORK: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
}


def stage(kind: str = "kl", **changes: Any) -> CodecSystem:
    """A codec with random weights whose latents are far from standard."""
    torch.manual_seed(0)
    extra = {"num_vq_embeddings": 8} if kind == "vq" else {}
    made = CodecSystem.create(CodecConfig(kind=kind, size=16, network=NETWORK | extra | changes))  # type: ignore[arg-type]
    network: Any = made.codec.network
    with torch.no_grad():
        last = network.quant_conv or network.encoder.conv_out
        last.weight.mul_(torch.linspace(3, 9, len(last.weight))[:, None, None, None])
        last.bias.copy_(torch.linspace(-4, 4, len(last.bias)))
    network.eval()
    return made


def pictures() -> torch.Tensor:
    return torch.rand((8, 3, 16, 16), generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(made: CodecSystem) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (C,) of the latents, their own spread included."""
    with torch.no_grad():
        moments = made.codec.encode(pictures())
    mean = moments.mean.double().mean((0, 2, 3))
    variance = moments.mean.double().var((0, 2, 3), correction=0)
    if moments.std is not None:
        variance = variance + moments.std.double().square().mean((0, 2, 3))
    return mean, variance.sqrt()


@torch.no_grad()
def there_and_back(made: CodecSystem) -> torch.Tensor:
    return made.codec.decode(made.codec.encode(pictures()).mean)


def test_kl_latents_are_made_standard_channel_by_channel() -> None:
    """Folded into the two 1x1 convolutions: the file needs no field for it, and pictures come back as before."""
    before = stage()
    expected = there_and_back(before)
    mean, std = latents(before)
    assert float(mean.abs().max()) > 1 and float(std.max()) > 5
    after = standardised(before, mean.float(), std.float())
    mean, std = latents(after)
    assert float(mean.abs().max()) < 1e-4
    assert float((std - 1).abs().max()) < 1e-4
    assert isinstance(after.codec, KLCodec) and after.codec.network.config.scaling_factor == 1.0
    assert after.codec.network.config.shift_factor is None and after.codec.network.config.latents_mean is None
    error = (there_and_back(after) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4


def test_kl_without_the_convolutions_gets_one_scale() -> None:
    before = stage(use_quant_conv=False, use_post_quant_conv=False)
    expected = there_and_back(before)
    mean, std = latents(before)
    after = standardised(before, mean.float(), std.float())
    with torch.no_grad():
        moments = after.codec.encode(pictures())
    assert moments.std is not None
    whole = (moments.mean.double().var(correction=0) + moments.std.double().square().mean()).sqrt()
    assert float(whole) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(there_and_back(after), expected, rtol=1e-4, atol=1e-4)


def test_vq_latents_get_one_scale_and_keep_their_codes() -> None:
    before = stage("vq")
    expected = there_and_back(before)
    mean, std = latents(before)
    after = standardised(before, mean.float(), std.float())
    assert isinstance(before.codec, VQCodec) and isinstance(after.codec, VQCodec)
    with torch.no_grad():
        z = after.codec.encode(pictures()).mean
        assert float(z.double().std(correction=0)) == pytest.approx(1, abs=1e-3)
        codes = [
            s.codec.network.quantize(s.codec.network.encode(pictures())).codes  # type: ignore[union-attr]
            for s in (before, after)
        ]
    assert torch.equal(codes[0], codes[1]) and len(codes[0].unique()) > 1
    whole = float((std.square().mean() + mean.var(correction=0)).sqrt())
    assert after.codec.scale == pytest.approx(1 / whole, rel=1e-4)
    torch.testing.assert_close(there_and_back(after), expected)


@pytest.mark.parametrize("std", [0.49, 2.1, 12.0])
def test_a_wrong_scale_is_refused_with_the_right_one(std: float) -> None:
    made = stage(scaling_factor=0.25)
    with pytest.raises(UserError, match=r"the latents of mine have a standard deviation of") as caught:
        made.check_scale(std, "mine")
    right = float(str(caught.value).rsplit(" ", 1)[1])
    assert right == pytest.approx(0.25 / std, rel=1e-3)
    assert "scaling_factor of 0.25" in str(caught.value)
    made.check_scale(1.0, "mine")
    made.check_scale(0.6, "mine")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "kl", "size": 16, "netwrok": {}}, r"unknown key 'netwrok' \(did you mean 'network'\?\)"),
        ({"kind": "lk", "size": 16}, "kind: .*'lk'"),
        ({"kind": "kl", "size": 16, "network": {"in_channels": 3}}, "network.in_channels follows from size and"),
        ({"kind": "kl", "size": 16, "network": {"latent_chanels": 3}}, "did you mean 'latent_channels'"),
        ({"kind": "vq", "size": 16, "network": {"shift_factor": 3}}, "unknown autoencoder key 'shift_factor'"),
        ({"kind": "kl", "size": 16, "network": {"norm_num_groups": 0}}, "norm_num_groups"),
        ({"kind": "kl", "size": 16, "network": {"block_out_channels": 8}}, "wrong type"),
        ({"kind": "kl", "size": 4}, "size: .*got 4"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        CodecSystem.create(parse(CodecConfig, values, "file"), "meta")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_file_and_back(tmp_path: Path, kind: str) -> None:
    before = stage(kind)
    write_model(tmp_path / "codec.safetensors", before.tensors(), before.config.model_dump(mode="json"))
    after = open_as(CodecSystem, tmp_path / "codec.safetensors")
    assert after.config == before.config
    assert after.codec.network is not None and not after.codec.network.training
    assert torch.equal(there_and_back(after), there_and_back(before))
    assert all(torch.equal(after.tensors()[name], tensor) for name, tensor in before.tensors().items())
    assert open_system(tmp_path / "codec.safetensors").system.kind == "codec"
    with pytest.raises(ModelFileError, match="holds a codec model, where a ddpm model is needed"):
        open_as(DDPM, tmp_path / "codec.safetensors")


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    before = stage()
    tensors = before.tensors()
    tensors.pop("codec.quant_conv.weight")
    write_model(tmp_path / "codec.safetensors", tensors, before.config.model_dump(mode="json"))
    with pytest.raises(ModelFileError, match="quant_conv.weight"):
        open_system(tmp_path / "codec.safetensors")


def test_pixels_need_no_weights() -> None:
    made = CodecSystem.create(CodecConfig(kind="pixels", size=8))
    assert made.tensors() == {} and made.codec.network is None
    loaded = CodecSystem.load(made.config, {}, what="file")
    assert loaded.codec.channels == 3
    with pytest.raises(UserError, match="a codec of pixels has no network"):
        made.config.autoencoder()
