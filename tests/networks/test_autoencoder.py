"""Properties of the first stages that hold without any reference to compare with."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.networks.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    DiagonalGaussian,
    FirstStageConfig,
    StageBlock,
    VQConfig,
    VQModel,
)

LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 8,
}
KL = AutoencoderConfig(**LEVELS)
VQ = VQConfig(**LEVELS, num_vq_embeddings=16, vq_embed_dim=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config: FirstStageConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (AutoencoderKL(config) if isinstance(config, AutoencoderConfig) else VQModel(config)).eval()  # type: ignore[arg-type]


def released(kind: type, z: int, multipliers: tuple[int, ...], attending: tuple[int, ...] = (), **more: Any) -> Any:
    """A released first stage: 128 channels, two blocks a level, attention at some levels."""
    depth = range(len(multipliers))
    return kind(
        latent_channels=z,
        layers_per_block=2,
        block_out_channels=tuple(128 * m for m in multipliers),
        down_block_types=tuple("AttnDownEncoderBlock2D" if i in attending else "DownEncoderBlock2D" for i in depth),
        up_block_types=tuple(
            "AttnUpDecoderBlock2D" if i in attending else "UpDecoderBlock2D" for i in reversed(depth)
        ),
        **more,
    )


@pytest.mark.parametrize(
    ("config", "factor", "keys", "parameters"),
    [
        (released(AutoencoderConfig, 3, (1, 2, 4)), 4, 204, 55_312_063),
        (released(AutoencoderConfig, 4, (1, 2, 4, 4)), 8, 248, 83_653_863),
        (released(AutoencoderConfig, 16, (1, 1, 2, 2, 4), (4,)), 16, 342, 69_610_963),
        (released(AutoencoderConfig, 64, (1, 1, 2, 2, 4, 4), (4, 5)), 32, 436, 103_880_131),
        (released(VQConfig, 3, (1, 2, 4), num_vq_embeddings=8192), 4, 205, 55_322_782),
        (released(VQConfig, 256, (1, 1, 2, 2, 4), (4,), num_vq_embeddings=1024), 16, 343, 72_141_699),
    ],
    ids=["kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vqgan-f16"],
)
def test_released_first_stages_have_as_many_tensors_and_parameters(
    config: FirstStageConfig, factor: int, keys: int, parameters: int
) -> None:
    with torch.device("meta"):
        model = build(config)
    state = model.state_dict()
    assert (model.factor, len(state), sum(t.numel() for t in state.values())) == (factor, keys, parameters)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", [AutoencoderConfig, VQConfig])
def test_a_latent_is_smaller_by_the_factor_and_decodes_to_the_picture(kind: Any, levels: int) -> None:
    config = kind(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=5,
        out_channels=2,
    )
    model, factor = build(config), 2 ** (levels - 1)
    assert model.factor == config.factor == factor
    with torch.no_grad():
        encoded = model.encode(torch.zeros(2, 3, factor, 3 * factor))
        latent = encoded.mode if kind is AutoencoderConfig else encoded
        assert latent.shape == (2, 5, 1, 3)
        assert model.decode(latent).shape == (2, 2, factor, 3 * factor)


def test_the_divergence_is_that_of_monte_carlo() -> None:
    posterior = DiagonalGaussian(noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1))
    draws, logvar = 200_000, posterior.logvar.double()
    eps = noise(draws, 1, 2, 2, 2, seed=2).double().transpose(1, 2)
    z = posterior.mean.double() + (0.5 * logvar).exp() * eps
    log_ratio = 0.5 * (z.square() - eps.square() - logvar)
    estimates = log_ratio.sum(dim=(2, 3, 4))
    assert posterior.kl().shape == (2,)
    deviation = estimates.std(dim=0) / draws**0.5
    assert bool(((posterior.kl() - estimates.mean(dim=0)).abs() < 4 * deviation).all())
    assert bool((deviation < 0.02 * posterior.kl()).all())


def test_a_standard_normal_has_no_divergence() -> None:
    assert float(DiagonalGaussian(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).kl()) == 0


def test_half_types_do_not_spoil_the_divergence() -> None:
    exact = DiagonalGaussian(noise(1, 8, 64, 64).bfloat16().double(), noise(1, 8, 64, 64, seed=1).bfloat16().double())
    half = DiagonalGaussian(exact.mean.bfloat16(), exact.logvar.bfloat16())
    assert half.kl().dtype == torch.float32
    torch.testing.assert_close(half.kl().double(), exact.kl(), rtol=1e-5, atol=0)


def test_a_sample_is_the_mean_and_the_noise_times_the_deviation() -> None:
    posterior = DiagonalGaussian.from_moments(noise(2, 6, 3, 3))
    eps = noise(2, 3, 3, 3, seed=1)
    assert torch.equal(posterior.sample(torch.zeros_like(eps)), posterior.mode)
    torch.testing.assert_close((posterior.sample(eps) - posterior.mean) / posterior.std, eps)
    torch.testing.assert_close(posterior.std.square(), posterior.logvar.exp())
    with pytest.raises(UserError, match=r"noise must have the latent's shape \(2, 3, 3, 3\), got \(1, 3, 3, 3\)"):
        posterior.sample(eps[:1])


def test_log_variances_are_clamped() -> None:
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-99.0, 99.0]]]])], dim=1)
    assert DiagonalGaussian.from_moments(moments).logvar.flatten().tolist() == [-30, 20]


def test_kl_forward_reconstructs_from_the_mode_or_from_a_draw() -> None:
    model, x = build(KL), noise(1, 3, 8, 8)
    with torch.no_grad():
        posterior = model.encode(x)
        assert torch.equal(model(x)[0], model.decode(posterior.mean))
        eps = noise(*posterior.mean.shape, seed=1)
        drawn, again = model(x, eps)
        assert torch.equal(drawn, model.decode(posterior.sample(eps)))
        assert torch.equal(again.mean, posterior.mean)


def test_vq_decodes_latents_codes_and_quantised_latents_alike() -> None:
    model = build(VQ)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(noise(16, 4))
        h = noise(2, 4, 3, 5, seed=1)
        quantized, picture = model.quantize(h), model.decode(h)
        assert torch.equal(model.decode(quantized.z_q, quantized=True), picture)
        torch.testing.assert_close(model.decode(quantized.codes), picture)
        assert not torch.allclose(model.decode(h, quantized=True), picture)
        x = noise(1, 3, 8, 8)
        assert torch.equal(model(x), model.decode(model.encode(x)))


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_gradient_checkpointing_changes_no_gradient(config: FirstStageConfig) -> None:
    model, x = build(config), noise(1, 3, 8, 8)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        encoded = model.encode(x)
        latent = encoded.mode if config is KL else encoded
        model.decode(latent).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def switches() -> set[bool]:
        return {module.gradient_checkpointing for module in model.modules() if isinstance(module, StageBlock)}

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert switches() == {True}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model.decode(torch.zeros(1, 4, 4, 4))
    recomputed = sum(kept)
    for one, other in zip(gradients(), plain, strict=True):
        assert torch.equal(one, other)
    model.disable_gradient_checkpointing()
    assert switches() == {False}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model.decode(torch.zeros(1, 4, 4, 4))
    assert recomputed < sum(kept)


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_every_parameter_learns(config: FirstStageConfig) -> None:
    model, x = build(config), noise(1, 3, 8, 8)
    if isinstance(config, AutoencoderConfig):
        picture, posterior = model(x, noise(1, 4, 4, 4))
        loss = picture.square().mean() + posterior.kl().mean()
    else:
        quantized = model.quantize(model.encode(x))
        loss = model.decode(quantized.z_q, quantized=True).square().mean() + quantized.loss()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.last_layer is model.decoder.conv_out.weight


@pytest.mark.parametrize("config", [KL, dataclasses.replace(VQ, vq_embed_dim=None)], ids=["kl", "vq"])
def test_channels_last_stays_channels_last_and_means_the_same(config: FirstStageConfig) -> None:
    model, x = build(config), noise(2, 3, 8, 8)
    seen: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            seen[name] = out.is_contiguous(memory_format=torch.channels_last)

        return hook

    with torch.no_grad():
        expected = model(x)[0] if config is KL else model(x)
        model.to(memory_format=torch.channels_last)
        for name, module in model.named_modules():
            if name.rpartition(".")[2].startswith(("conv", "norm")) or "attentions" in name and name[-1] == "0":
                if not name.endswith("to_out.0"):
                    module.register_forward_hook(watch(name))
        last = x.contiguous(memory_format=torch.channels_last)
        got = model(last)[0] if config is KL else model(last)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) > 30
    assert [name for name, stays in seen.items() if not stays] == []


def test_under_autocast_codes_are_chosen_in_float32() -> None:
    model, h = build(VQ), noise(2, 4, 8, 8)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(noise(16, 4, seed=1) * 0.01 + h[0, :, 0, 0])
        expected = model.quantize(h).codes
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.quantize(h).codes, expected)
            assert model.decode(model.encode(noise(1, 3, 8, 8))).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": (16, 32, 32)}, "must have equally many levels, got 3, 2 and 2"),
        ({"block_out_channels": (16, 20)}, "block_out_channels 20 is not a multiple of norm_num_groups 8"),
        ({"act_fn": "sillu"}, "did you mean 'silu'"),
        ({"down_block_types": ("DownEncoderBlock2D", "DownBlock2D")}, "unknown entry in down_block_types"),
        ({"up_block_types": ("UpDecoderBlok2D", "UpDecoderBlock2D")}, "did you mean 'UpDecoderBlock2D'"),
        ({"layers_per_block": 0}, "layers_per_block must be 1 or more, got 0"),
        ({"latent_channels": 0}, "latent_channels must be 1 or more, got 0"),
        ({"scaling_factor": 0.0}, "scaling_factor must be a positive number, got 0.0"),
        ({"latents_mean": (0.0,)}, r"latents_mean must have one number per latent channel \(4\), got 1"),
        ({"latents_std": (1.0, 0.0, 1.0, 1.0)}, "latents_std must be positive, got 0.0"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(KL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_vq_embeddings": 1}, "num_vq_embeddings must be 2 or more, got 1"),
        ({"vq_embed_dim": 0}, "vq_embed_dim must be 1 or more, got 0"),
        ({"norm_type": "spacial"}, "did you mean 'spatial'"),
        ({"norm_type": "spatial"}, r"needs vq_embed_dim equal to latent_channels \(3\), got 4"),
        ({"norm_type": "spatial", "vq_embed_dim": 3}, "needs block_out_channels in multiples of 32, got 16"),
    ],
)
def test_what_cannot_be_quantised_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(VQ, **change)


@pytest.mark.parametrize("config", [KL, VQ, dataclasses.replace(KL, sample_size=(8, 16))], ids=["kl", "vq", "oblong"])
def test_a_config_survives_json(config: FirstStageConfig) -> None:
    stored = json.loads(json.dumps({"_class_name": "note", **config.to_dict()}))
    assert type(config).from_dict(stored) == config


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown autoencoder key 'latent_channel' .did you mean 'latent_channels'"):
        AutoencoderConfig.from_dict({"latent_channel": 4})
    with pytest.raises(UserError, match="unknown autoencoder key 'norm_type'"):
        AutoencoderConfig.from_dict({"norm_type": "group"})
    with pytest.raises(UserError, match="value of the wrong type"):
        AutoencoderConfig.from_dict({"block_out_channels": 64})


def test_pictures_and_latents_of_other_shapes_are_refused() -> None:
    kl, vq = build(KL), build(VQ)
    for model in (kl, vq):
        with pytest.raises(UserError, match=r"x must be \(B, 3, H, W\), got \(1, 4, 8, 8\)"):
            model.encode(torch.zeros(1, 4, 8, 8))
        with pytest.raises(UserError, match="height and width must be multiples of 2, got 8 x 7"):
            model.encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(UserError, match=r"z must be \(B, 4, h, w\), got \(1, 3, 4, 4\)"):
        kl.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match=r"h must be latents \(B, 4, h, w\) or integer codes"):
        vq.decode(torch.zeros(1, 3, 4, 4))
