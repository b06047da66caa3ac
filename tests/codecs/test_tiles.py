"""Tiles: where they lie, their weights, that norms share statistics, and how near to untiled they come."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from sfumato import models
from sfumato.codecs import Codec, KLCodec, PixelCodec, VQCodec
from sfumato.codecs.tiles import (
    Difference,
    Tiling,
    _twin,
    decode_bytes,
    decode_tiled,
    difference,
    encode_tiled,
    feathers,
    layer_bytes,
    needs_tiles,
    pieces,
)
from sfumato.errors import UserError
from sfumato.images import from_pil
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from sfumato.systems import open_codec

DATA = Path(__file__).parents[1] / "data" / "tiny64_32px.parquet"
NETWORK: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}
SPATIAL: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 8,
    "norm_type": "spatial",
}


def kl(**changes: Any) -> KLCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KLCodec(AutoencoderKL(AutoencoderConfig(**NETWORK | changes)).eval())


def vq(**changes: Any) -> VQCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQCodec(VQModel(VQConfig(**NETWORK | {"num_vq_embeddings": 16} | changes)).eval())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int) -> Tensor:
    """Latents whose mean and spread change across the picture: what statistics of a single tile get wrong."""
    x = noise(*shape)
    slope = torch.linspace(0.2, 2, shape[-1])
    return x * slope + slope


def plainly_feathered(codec: Codec, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """What tiles are elsewhere: decoded each by itself and laid over each other with linear ramps."""
    rows, columns = (pieces(length, tile, overlap) for length in latents.shape[-2:])
    down, across = (feathers(along, overlap, 0, codec.factor) for along in (rows, columns))
    f = codec.factor
    out = torch.zeros(len(latents), 3, latents.shape[-2] * f, latents.shape[-1] * f)
    for row, y in zip(rows, down, strict=True):
        for column, x in zip(columns, across, strict=True):
            part = codec.decode(latents[..., row.start : row.stop, column.start : column.stop])
            out[..., row.start * f : row.stop * f, column.start * f : column.stop * f] += part * (y[:, None] * x)
    return out


# --- where tiles lie ----------------------------------------------------------------------------------------------


@st.composite
def sides(draw: st.DrawFn) -> tuple[int, int, int]:
    tile = draw(st.integers(8, 96))
    return draw(st.integers(1, 700)), tile, draw(st.integers(0, tile // 3))


@given(sides())
def test_pieces_cover_a_side(side: tuple[int, int, int]) -> None:
    length, tile, overlap = side
    found = pieces(length, tile, overlap)
    assert found[0].start == 0 and found[-1].stop == length
    assert all(0 < piece.stop - piece.start <= tile for piece in found)
    assert all(one.stop - other.start == overlap for one, other in zip(found, found[1:], strict=False))
    assert all(one.stop <= third.start for one, third in zip(found, found[2:], strict=False))
    assert [piece.first for piece in found] == [0, *(piece.last for piece in found[:-1])]
    assert found[-1].last == length and all(p.start <= p.first < p.last <= p.stop for p in found)


@given(sides(), st.integers(1, 8), st.floats(0, 1))
def test_weights_are_one_at_every_pixel(side: tuple[int, int, int], scale: int, share: float) -> None:
    """Exactly, also as products over both sides, in float32 and whatever the order."""
    length, tile, overlap = side
    found = pieces(length, tile, overlap)
    weights = feathers(found, overlap, int(share * 3 * overlap // 8), scale)
    total, both = torch.zeros(length * scale), torch.zeros(length * scale)
    other = torch.tensor([0.25, 0.75 - 1 / 2048, 1 / 2048])
    for piece, weight in zip(found, weights, strict=True):
        total[piece.start * scale : piece.stop * scale] += weight
        for factor in other:
            both[piece.start * scale : piece.stop * scale] += weight * factor
    assert bool((total == 1).all()) and bool((both == 1).all())


def test_a_margin_has_no_weight() -> None:
    left, right = feathers(pieces(20, 12, 4), 4, 1, 2)
    assert left[-2:].tolist() == [0, 0] and right[:2].tolist() == [0, 0]
    assert right[2:6].tolist() == [0.125, 0.375, 0.625, 0.875] and right[6:].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [((7, 0), "at least 8"), ((24, 9), "0 to 8"), ((24, -1), "0 to 8")],
)
def test_impossible_numbers_are_refused(values: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tiling(*values)


# --- the plain way ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_fits_a_tile_is_decoded_plainly() -> None:
    codec = kl()
    for shape in ((2, 2, 24, 24), (1, 2, 5, 7), (1, 2, 12, 48)):
        latents = noise(*shape)
        assert torch.equal(decode_tiled(codec, latents, tile=24, overlap=8), codec.decode(latents))
    pictures = noise(1, 3, 96, 96)
    ours, plain = encode_tiled(codec, pictures, tile=24, overlap=8), codec.encode(pictures)
    assert torch.equal(ours.mean, plain.mean) and torch.equal(ours.std, plain.std)  # type: ignore[arg-type]


def test_pixels_stay_pixels() -> None:
    x = noise(1, 3, 100, 100)
    assert decode_tiled(PixelCodec(3), x, tile=24, overlap=8) is x
    assert encode_tiled(PixelCodec(3), x, tile=24, overlap=8).mean is x
    assert decode_bytes(PixelCodec(3), 100, 100) == 0


def test_a_codec_of_another_kind_is_refused() -> None:
    class Other(PixelCodec):
        pass

    with pytest.raises(UserError, match="type Other cannot be cut into tiles; only KL and VQ codecs can"):
        decode_tiled(Other(3, network=nn.Identity()), noise(1, 3, 64, 64), tile=24, overlap=8)


# --- nearly as if there were no tiles -----------------------------------------------------------------------------


KINDS = pytest.mark.parametrize(
    "codec", [kl(), kl(mid_block_add_attention=False), vq(), vq(**SPATIAL)], ids=["kl", "kl-plain", "vq", "vq-spatial"]
)


@KINDS
@torch.no_grad()
def test_layer_by_layer_is_untiled(codec: KLCodec | VQCodec) -> None:
    """But for rounding, whatever the size."""
    for size in ((25, 60), (40, 31)):
        latents = uneven(1, codec.channels, *size)
        tiled = decode_tiled(codec, latents, tile=24)
        torch.testing.assert_close(tiled, codec.decode(latents), rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", [kl(), vq(**SPATIAL)], ids=["kl", "vq-spatial"])
@torch.no_grad()
def test_encoding_layer_by_layer_is_untiled(codec: KLCodec | VQCodec) -> None:
    pictures = uneven(2, 3, 33 * codec.factor, 41 * codec.factor)
    whole, tiled = codec.encode(pictures), encode_tiled(codec, pictures, tile=24)
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=0, atol=1e-4)
    if whole.std is not None:
        torch.testing.assert_close(tiled.std, whole.std, rtol=1e-4, atol=1e-4)


@KINDS
@torch.no_grad()
def test_shared_statistics_come_nearer_than_feathering_alone(codec: KLCodec | VQCodec) -> None:
    latents = uneven(1, codec.channels, 46, 53)
    whole = codec.decode(latents)
    plain = Difference.between(plainly_feathered(codec, latents, 24, 8), whole)
    shared = difference(codec, latents, 24, 8)
    assert shared == Difference.between(decode_tiled(codec, latents, tile=24, overlap=8), whole)
    assert shared.mean < plain.mean / 1.5 and shared.largest < plain.largest / 1.5, (shared, plain)
    assert difference(codec, latents, 24).largest < 0.02


@torch.no_grad()
def test_each_picture_of_a_batch_by_itself() -> None:
    codec, latents = kl(), torch.cat([noise(1, 2, 30, 40), 3 + 2 * noise(1, 2, 30, 40, seed=1)])
    both = decode_tiled(codec, latents, tile=24, overlap=6)
    for i in range(2):
        assert torch.equal(both[i : i + 1], decode_tiled(codec, latents[i : i + 1], tile=24, overlap=6))
    torch.testing.assert_close(decode_tiled(codec, latents, tile=24), codec.decode(latents), rtol=0, atol=1e-4)


@torch.no_grad()
def test_all_sizes_keep_their_size() -> None:
    codec = kl()
    for h, w in ((25, 25), (26, 47), (13, 90), (71, 33)):
        assert decode_tiled(codec, noise(1, 2, h, w), tile=24, overlap=7).shape == (1, 3, 4 * h, 4 * w)
        assert encode_tiled(codec, noise(1, 3, 4 * h, 4 * w), tile=24, overlap=7).mean.shape == (1, 2, h, w)
        assert decode_tiled(codec, noise(1, 2, h, w), tile=24).shape == (1, 3, 4 * h, 4 * w)
    with pytest.raises(UserError, match="multiples of 4"):
        encode_tiled(codec, noise(1, 3, 130, 130), tile=24, overlap=7)


@torch.no_grad()
def test_half_types_stay_half_types() -> None:
    codec, latents = kl(), uneven(1, 2, 40, 31)
    whole = decode_tiled(codec, latents, tile=24, overlap=8)
    codec.network.bfloat16()
    plain = Difference.between(codec.decode(latents.bfloat16()), kl().decode(latents))
    tiled, layers = (decode_tiled(codec, latents.bfloat16(), tile=24, overlap=overlap) for overlap in (8, None))
    assert tiled.dtype == layers.dtype == torch.bfloat16
    assert Difference.between(tiled, whole).mean < 2 * plain.mean
    assert Difference.between(layers, kl().decode(latents)).mean < 1.5 * plain.mean


# --- nothing is left behind ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_is_left_as_it_was() -> None:
    codec, latents = kl(), noise(1, 2, 20, 40)
    network = codec.network

    def state() -> list[Any]:
        return [(name, type(m), id(m), "forward" in vars(m)) for name, m in network.named_modules()]

    before, whole = state(), codec.decode(latents)
    for overlap in (8, None):
        decode_tiled(codec, latents, tile=24, overlap=overlap)
    with pytest.raises(UserError, match=r"z must be \(B, 2, h, w\)"):
        decode_tiled(codec, noise(1, 3, 40, 40), tile=24, overlap=8)
    assert state() == before and torch.equal(codec.decode(latents), whole)
    own, twin = _twin(codec)
    assert own is codec and twin is not network
    weights = zip(network.named_parameters(), twin.named_parameters(), strict=True)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in weights)


def test_no_gradient_is_kept() -> None:
    latents = noise(1, 2, 40, 31).requires_grad_()
    assert not decode_tiled(kl(), latents, tile=24, overlap=8).requires_grad


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_grows_with_pixels_and_width_of_type() -> None:
    codec = kl()
    one = decode_bytes(codec, 16, 16)
    assert one > 16 * 16 * 16 * 8 * 4  # the outermost level's values alone
    assert decode_bytes(codec, 32, 16) == 2 * one and decode_bytes(codec, 32, 32) == 4 * one
    assert decode_bytes(KLCodec(kl().network.half()), 16, 16) * 2 == one
    assert needs_tiles(codec, 32, 32, 5 * one - 1) and not needs_tiles(codec, 32, 32, 5 * one)
    assert needs_tiles(codec, 16, 16, one, count=2)
    assert layer_bytes(codec, 256, 256, tile=8) < decode_bytes(codec, 256, 256) / 2


def test_a_difference_in_words() -> None:
    found = Difference.between(torch.tensor([0.0, 2.0]), torch.tensor([1 / 127.5, 1.5]))
    assert found.largest == pytest.approx(1) and found.mean == pytest.approx(0.5)
    assert str(found) == "at most 1.00 of 255 levels apart from untiled, 0.500 in the mean"


# --- a trained codec ----------------------------------------------------------------------------------------------


def mosaic(columns: int, rows: int) -> Tensor:
    """Emoji side by side, (1, 3, 32 rows, 32 columns)."""
    cells = parquet.read_table(DATA).column("image").to_pylist()
    small = from_pil([Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in cells])
    picked = small[torch.arange(rows * columns) % len(small)].reshape(rows, columns, 3, 32, 32)
    return picked.permute(2, 0, 3, 1, 4).reshape(1, 3, 32 * rows, 32 * columns)


@pytest.mark.skipif("emoji" not in models.names(), reason="the box holds no model in this installation")
@torch.no_grad()
def test_a_trained_codec() -> None:
    """A big picture whose left half is full and whose right half is empty."""
    codec = open_codec(models.weights("emoji"))[0].codec
    pictures = torch.cat([mosaic(5, 7), torch.ones(1, 3, 224, 96)], dim=-1)
    latents = codec.encode(pictures).mean
    whole = codec.decode(latents)
    plain = Difference.between(plainly_feathered(codec, latents, 24, 8), whole)
    shared, exact = (
        Difference.between(decode_tiled(codec, latents, tile=24, overlap=o), whole) for o in (8, None)
    )
    assert shared.mean < plain.mean / 2 and shared.largest < plain.largest / 2, (plain, shared)
    assert exact.largest < 0.1, exact
    encoded = encode_tiled(codec, pictures, tile=24, overlap=8)
    assert float((encoded.mean - latents).abs().mean()) < 0.1
