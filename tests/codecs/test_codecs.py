"""Codecs: shapes, the scale of the latents in both directions, and what is drawn of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.codecs import KLCodec, Moments, PixelCodec, VQCodec
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel

NETWORK: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}


def kl(**changes: Any) -> KLCodec:
    torch.manual_seed(0)
    return KLCodec(AutoencoderKL(AutoencoderConfig(**NETWORK | changes)).eval())


def vq(**changes: Any) -> VQCodec:
    torch.manual_seed(0)
    return VQCodec(VQModel(VQConfig(**NETWORK | {"num_vq_embeddings": 16} | changes)).eval())


def pictures() -> torch.Tensor:
    return torch.rand((3, 3, 16, 24), generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("codec", [kl(), vq()], ids=["kl", "vq"])
def test_shapes(codec: KLCodec | VQCodec) -> None:
    with torch.no_grad():
        moments = codec.encode(pictures())
        assert codec.factor == 4 and codec.channels == 2
        assert moments.mean.shape == (3, 2, 4, 6)
        assert (moments.std is None) == isinstance(codec, VQCodec)
        assert codec.decode(moments.mean).shape == (3, 3, 16, 24)


def test_the_width_of_codes_may_be_its_own() -> None:
    codec = vq(vq_embed_dim=3)
    with torch.no_grad():
        assert codec.channels == 3
        assert codec.encode(pictures()).mean.shape == (3, 3, 4, 6)


@torch.no_grad()
def test_scale_and_shift_of_kl() -> None:
    """`z = (sample - shift) scale`, and its inverse before decoding."""
    plain, scaled = kl(scaling_factor=1.0), kl(scaling_factor=0.5, shift_factor=0.25)
    bare, z = plain.encode(pictures()), scaled.encode(pictures())
    assert bare.std is not None and z.std is not None
    torch.testing.assert_close(z.mean, (bare.mean - 0.25) * 0.5)
    torch.testing.assert_close(z.std, bare.std * 0.5)
    torch.testing.assert_close(scaled.decode(z.mean), plain.decode(bare.mean))


@torch.no_grad()
def test_mean_and_std_of_each_channel() -> None:
    """`z = (sample - mean) scale / std`, channel by channel."""
    plain = kl(scaling_factor=1.0)
    scaled = kl(scaling_factor=0.5, latents_mean=(0.5, -1.0), latents_std=(2.0, 4.0))
    bare, z = plain.encode(pictures()), scaled.encode(pictures())
    assert bare.std is not None and z.std is not None
    for channel, (mean, std) in enumerate([(0.5, 2.0), (-1.0, 4.0)]):
        torch.testing.assert_close(z.mean[:, channel], (bare.mean[:, channel] - mean) * 0.5 / std)
        torch.testing.assert_close(z.std[:, channel], bare.std[:, channel] * 0.5 / std)
    torch.testing.assert_close(scaled.decode(z.mean), plain.decode(bare.mean))


@torch.no_grad()
def test_scale_of_vq() -> None:
    """Latents are those before quantisation; decoding quantises, so small errors vanish."""
    plain, scaled = vq(scaling_factor=1.0), vq(scaling_factor=8.0)
    bare, z = plain.encode(pictures()).mean, scaled.encode(pictures()).mean
    torch.testing.assert_close(z, bare * 8)
    decoded = scaled.decode(z)
    torch.testing.assert_close(decoded, plain.decode(bare))
    codes = plain.network.quantize.embedding.weight
    on_codes = codes[torch.arange(6) % 16].T.reshape(1, 2, 2, 3) * 8
    torch.testing.assert_close(scaled.decode(on_codes + 1e-4), scaled.decode(on_codes))


def test_a_sample_is_drawn_with_the_generator() -> None:
    mean, std = torch.full((2, 3, 2, 2), 5.0), torch.full((2, 3, 2, 2), 0.5)
    drawn = Moments(mean, std).sample(torch.Generator().manual_seed(3))
    noise = torch.randn((2, 3, 2, 2), generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, mean + std * noise)
    before = torch.random.get_rng_state()
    assert not torch.equal(Moments(mean, std).sample(torch.Generator().manual_seed(4)), drawn)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    assert Moments(mean, None).sample(generator) is mean
    assert generator.initial_seed() == 3 and torch.equal(torch.rand(1, generator=generator), torch.rand(
        1, generator=torch.Generator().manual_seed(3)
    ))


def test_pixels_are_their_own_latents() -> None:
    codec, x = PixelCodec(3), pictures()
    assert (codec.factor, codec.channels, codec.network) == (1, 3, None)
    moments = codec.encode(x)
    assert moments.mean is x and moments.std is None and codec.decode(x) is x
