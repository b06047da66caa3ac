"""The first stages against diffusers' AutoencoderKL and VQModel: same names in the same order, same numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.networks.attention import Attention
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel

diffusers = pytest.importorskip("diffusers")
attention_processor = pytest.importorskip("diffusers.models.attention_processor")

DOWN, ATTENDING_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, ATTENDING_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


def layout(widths: list[int], attending: int = 0, **more: Any) -> dict[str, Any]:
    """Levels of `widths`, the innermost `attending` of them with attention."""
    plain = len(widths) - attending
    return {
        "block_out_channels": widths,
        "down_block_types": [DOWN] * plain + [ATTENDING_DOWN] * attending,
        "up_block_types": [ATTENDING_UP] * attending + [UP] * plain,
        **more,
    }


TINY = layout([16, 32], norm_num_groups=8)
KL: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "one_level": layout([32]),
    "stable_diffusion_narrow": layout([16, 32, 64, 64], layers_per_block=2, norm_num_groups=16, sample_size=64),
    "kl_f16_narrow": layout([16, 16, 32, 32, 64], 1, layers_per_block=2, norm_num_groups=16, latent_channels=16),
    "kl_f32_narrow": layout([16, 16, 16, 32, 32, 64], 2, norm_num_groups=8, latent_channels=64),
    "no_mid_attention": {**TINY, "mid_block_add_attention": False},
    "no_quant_convs": {**TINY, "use_quant_conv": False, "use_post_quant_conv": False},
    "other_settings": {
        **TINY,
        "in_channels": 4,
        "out_channels": 2,
        "act_fn": "gelu",
        "latent_channels": 5,
        "sample_size": [32, 48],
        "scaling_factor": 0.13025,
        "shift_factor": 0.1,
        "latents_mean": [0.0, 1.0, 2.0, 3.0, 4.0],
        "latents_std": [1.0, 1.0, 2.0, 2.0, 3.0],
        "force_upcast": False,
    },
}
VQ: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "num_vq_embeddings": 16},
    "vq_f4_narrow": layout([16, 32, 64], layers_per_block=2, norm_num_groups=16, num_vq_embeddings=256),
    "vq_f8_narrow": layout(
        [16, 32, 32, 64], 1, layers_per_block=2, norm_num_groups=16, latent_channels=4, num_vq_embeddings=64
    ),
    "no_attention": {**TINY, "mid_block_add_attention": False},
    "other_code_width": {**TINY, "latent_channels": 6, "vq_embed_dim": 4},
    "spatial": layout([32, 64], norm_type="spatial", latent_channels=4, act_fn="gelu"),
    "spatial_attending": layout([32, 64], 1, norm_type="spatial", norm_num_groups=16),
    "looked_up": {**TINY, "lookup_from_codebook": True, "force_upcast": True},
}
SD_VAE = layout([128, 256, 512, 512], layers_per_block=2, sample_size=512)


def shaken(kind: str, values: dict[str, Any]) -> Any:
    """Their network with all weights random, normalisations and biases included."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        theirs = getattr(diffusers, kind)(**values).eval()
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return theirs


def build_kl(values: dict[str, Any]) -> tuple[AutoencoderKL, Any]:
    theirs = shaken("AutoencoderKL", values)
    ours = AutoencoderKL(AutoencoderConfig.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def build_vq(values: dict[str, Any]) -> tuple[VQModel, Any]:
    """Both networks, with codes that lie where latents do."""
    theirs = shaken("VQModel", values)
    ours = VQModel(VQConfig.from_dict(values)).eval()
    with torch.no_grad():
        latents = theirs.encode(pictures(ours.config)).latents.movedim(1, -1).flatten(0, 2)
        table = theirs.quantize.embedding.weight
        table.copy_(latents.mean(dim=0) + latents.std(dim=0) * noise(*table.shape))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(config: AutoencoderConfig | VQConfig, sides: tuple[int, int] = (4, 6)) -> Tensor:
    return noise(2, config.in_channels, *(side * config.factor for side in sides))


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def agree_kl(ours: AutoencoderKL, theirs: Any, x: Tensor) -> None:
    with torch.no_grad():
        posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
        assert relative(posterior.mean, reference.mean) <= 1e-5
        assert relative(posterior.logvar, reference.logvar) <= 1e-5
        assert relative(posterior.std, reference.std) <= 1e-5
        assert relative(posterior.kl(), reference.kl()) <= 1e-5
        generator = torch.Generator().manual_seed(3)
        drawn = reference.sample(generator)
        assert relative(posterior.sample(noise(*drawn.shape, seed=3)), drawn) <= 1e-5
        z = reference.mode()
        assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("name", KL)
def test_kl_has_the_same_names_in_the_same_order_and_the_same_numbers(name: str) -> None:
    ours, theirs = build_kl(KL[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    agree_kl(ours, theirs, pictures(ours.config))


@pytest.mark.slow
def test_the_full_autoencoder_of_stable_diffusion_has_the_same_numbers() -> None:
    ours, theirs = build_kl(SD_VAE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    agree_kl(ours, theirs, noise(1, 3, 128, 128))


@pytest.mark.parametrize("name", VQ)
def test_vq_has_the_same_names_in_the_same_order_and_the_same_numbers(name: str) -> None:
    ours, theirs = build_vq(VQ[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = pictures(ours.config)
    with torch.no_grad():
        h, reference = ours.encode(x), theirs.encode(x).latents
        assert relative(h, reference) <= 1e-5
        z_q, _, (_, _, codes) = theirs.quantize(reference)
        quantized = ours.quantize(reference)
        assert torch.equal(quantized.codes.flatten(), codes)
        assert len(codes.unique()) > 8
        assert relative(quantized.z_q, z_q) <= 1e-5
        assert relative(ours.decode(reference), theirs.decode(reference).sample) <= 1e-5


@pytest.mark.parametrize("name", ["tiny", "vq_f8_narrow", "spatial"])
def test_vq_decodes_what_is_quantised_already_the_same(name: str) -> None:
    ours, theirs = build_vq(VQ[name])
    h = noise(2, ours.config.embed_dim, 4, 6)
    with torch.no_grad():
        reference = theirs.decode(h, force_not_quantize=True).sample
        assert relative(ours.decode(h, quantized=True), reference) <= 1e-5


def test_vq_decodes_codes_the_same() -> None:
    ours, theirs = build_vq(VQ["looked_up"])
    codes = torch.randint(256, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = theirs.decode(codes, force_not_quantize=True, shape=(2, 4, 6, 3)).sample
        assert relative(ours.decode(codes), reference) <= 1e-5


@pytest.mark.parametrize("legacy", [True, False])
def test_vq_has_the_same_loss_and_gradients_under_both_conventions_of_beta(legacy: bool) -> None:
    ours, theirs = build_vq(VQ["vq_f4_narrow"])
    theirs.quantize.legacy = legacy
    x = pictures(ours.config)
    decoded = theirs(x)
    reference = decoded.commit_loss + (decoded.sample - x).abs().mean()
    reference.backward()
    quantized = ours.quantize(ours.encode(x))
    reconstruction = (ours.decode(quantized.z_q, quantized=True) - x).abs().mean()
    loss = quantized.loss(0.25, legacy=legacy) + reconstruction
    loss.backward()
    assert relative(quantized.loss(legacy=legacy), decoded.commit_loss) <= 1e-5
    assert relative(loss, reference) <= 1e-5
    wanted = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in wanted.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - wanted[key].grad).abs().max()) <= 1e-5 * largest, key


def test_kl_has_the_same_gradients() -> None:
    ours, theirs = build_kl(KL["stable_diffusion_narrow"])
    x = pictures(ours.config)
    posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
    (ours.decode(posterior.mode).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    (theirs.decode(reference.mode()).sample.square().mean() + 1e-3 * reference.kl().mean()).backward()
    wanted = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in wanted.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - wanted[key].grad).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize(
    ("ours", "theirs"), [(AutoencoderConfig, "AutoencoderKL"), (VQConfig, "VQModel")], ids=["kl", "vq"]
)
def test_config_fields_and_defaults_are_theirs(ours: Any, theirs: str) -> None:
    config = getattr(diffusers, theirs)().config
    reference = {k: v for k, v in config.items() if not k.startswith("_")}
    assert ours().to_dict() == {k: list(v) if isinstance(v, tuple) else v for k, v in reference.items()}
    assert {field.name for field in dataclasses.fields(ours)} == set(reference)


CLASSES = {"AutoencoderKL": (AutoencoderKL, AutoencoderConfig, KL), "VQModel": (VQModel, VQConfig, VQ)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("AutoencoderKL", "tiny"), ("AutoencoderKL", "other_settings"), ("VQModel", "tiny"), ("VQModel", "spatial")],
)
def test_files_go_there_and_back(kind: str, name: str, tmp_path: Path) -> None:
    model, config, known = CLASSES[kind]
    ours: Any = model(config.from_dict(known[name])).eval()
    save_file(ours.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **ours.config.to_dict()}))
    theirs, report = getattr(diffusers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "back")
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    back: Any = model(config.from_dict(stored)).eval()
    assert back.config == ours.config
    back.load_state_dict(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), strict=True)
    x = pictures(ours.config)
    with torch.no_grad():
        z = theirs.encode(x).latents if kind == "VQModel" else theirs.encode(x).latent_dist.mode()
        reference = theirs.decode(z).sample
        for one in (ours, back):
            latent = one.encode(x) if kind == "VQModel" else one.encode(x).mode
            assert relative(latent, z) <= 1e-5
            assert relative(one.decode(z), reference) <= 1e-5


@pytest.mark.parametrize("name", ["kl_f16_narrow", "kl_f32_narrow"])
def test_attention_processor_names_follow_their_modules(name: str) -> None:
    ours, theirs = build_kl(KL[name])
    expected = [
        f"{key}.processor"
        for key, module in theirs.named_modules()
        if isinstance(module, attention_processor.Attention)
    ]
    assert list(ours.attn_processors) == expected
    assert all(a.heads == 1 for a in ours.modules() if isinstance(a, Attention))


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("name", ["vq_f8_narrow", "spatial_attending"])
def test_their_processors_run_unchanged_in_the_network(name: str, processor: str) -> None:
    ours, _ = build_vq(VQ[name])
    x = pictures(ours.config)
    with torch.no_grad():
        h = ours.encode(x)
        picture = ours.decode(h)
        ours.set_attn_processor(getattr(attention_processor, processor)())
        assert relative(ours.encode(x), h) <= 2e-5
        assert relative(ours.decode(h), picture) <= 2e-5
