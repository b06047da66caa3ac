"""Previews: the fit, what they show of real pictures, and when the sampling hook shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato import models
from sfumato.codecs import KLCodec, PixelCodec
from sfumato.codecs.preview import LatentPreview, smooth_latents
from sfumato.diffusion.analytic import GaussianData
from sfumato.diffusion.grid import trailing
from sfumato.diffusion.hooks import Hook, chain
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar
from sfumato.diffusion.solvers import Euler
from sfumato.errors import UserError
from sfumato.images import PictureError, from_pil
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.random import NoiseSource
from sfumato.systems import open_codec

DATA = Path(__file__).parents[1] / "data" / "tiny64_32px.parquet"


def kl(**changes: Any) -> KLCodec:
    values: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KLCodec(AutoencoderKL(AutoencoderConfig(**values | changes)).eval())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Linear:
    """A codec whose decoder is a linear map, each latent a square of four pixels."""

    weight: Tensor
    bias: Tensor
    network: Any
    channels: int = 4
    factor: int = 2

    def encode(self, pictures: Tensor) -> Any:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("rc,bchw->brhw", self.weight, latents) + self.bias[:, None, None]
        return F.interpolate(colours, scale_factor=2.0)


@pytest.mark.parametrize("colours", [3, 1])
def test_a_linear_decoder_is_found_exactly(colours: int) -> None:
    weight, bias = torch.randn(colours, 4, generator=generator(1)) / 20, torch.linspace(-0.2, 0.2, colours)
    found = LatentPreview.measured(Linear(weight, bias, torch.nn.Linear(1, 1)), generator())
    torch.testing.assert_close(found.weight, weight.expand(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, bias.expand(3), atol=1e-5, rtol=0)
    assert found.r2 == pytest.approx(1)
    z = torch.randn(2, 4, 3, 5, generator=generator(2))
    expected = (torch.einsum("rc,bchw->brhw", weight, z) + bias[:, None, None] + 1) / 2
    torch.testing.assert_close(found(z), expected.expand(2, 3, 3, 5), atol=1e-5, rtol=0)


def test_smooth_latents_are_standard_and_smooth() -> None:
    z = smooth_latents(64, 4, 8, generator())
    assert z.shape == (64, 4, 8, 8)
    assert float(z.mean()) == pytest.approx(0, abs=1e-5) and float(z.std()) == pytest.approx(1, abs=1e-5)
    neighbours = (z[..., 1:] * z[..., :-1]).mean()
    far = (z[..., 7:] * z[..., :1]).mean()
    assert neighbours > 0.5 > far > 0.1


def test_values_are_pictures() -> None:
    preview = LatentPreview.measured(kl(), generator())
    shown = preview(100 * torch.randn(2, 4, 6, 5, generator=generator(1)))
    assert shown.shape == (2, 3, 6, 5) and shown.dtype == torch.float32
    assert float(shown.min()) >= 0 and float(shown.max()) <= 1
    assert preview(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_pixels_are_shown_as_they_are() -> None:
    x = torch.rand(2, 3, 4, 5, generator=generator()) * 2 - 1
    torch.testing.assert_close(LatentPreview.measured(PixelCodec(3), generator())(x), (x + 1) / 2)
    grey = LatentPreview.measured(PixelCodec(1), generator())(x[:, :1])
    torch.testing.assert_close(grey, ((x[:, :1] + 1) / 2).expand(2, 3, 4, 5))


def test_the_fit_is_kept_for_each_codec() -> None:
    codec, other = kl(), kl(latent_channels=3)
    first = LatentPreview.measured(codec, generator())
    unused = generator(5)
    assert LatentPreview.measured(KLCodec(codec.network), unused) is first
    assert torch.equal(unused.get_state(), generator(5).get_state())
    assert LatentPreview.measured(other, generator()).weight.shape == (3, 3)


def test_the_global_generator_is_not_used() -> None:
    before = torch.random.get_rng_state()
    codec = kl()
    LatentPreview.measured(codec, generator())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.grad is not None for p in codec.network.parameters())


def test_a_broken_decoder_is_told() -> None:
    codec = kl()
    with torch.no_grad():
        codec.network.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(PictureError, match="not finite in float32"):
        LatentPreview.measured(codec, generator())


# --- the hook -----------------------------------------------------------------------------------------------------


def drawn(hook: Hook, pictures: int = 2, steps: int = 7) -> Tensor:
    schedule = TableSchedule(cosine_alpha_bar())
    noise = NoiseSource(range(pictures), (3, 4, 5))
    data = GaussianData(torch.full((3, 4, 5), 0.5), 0.01)
    return sample(data, Euler(), noise.draw(), trailing(schedule, steps), schedule, noise=noise, on_step=chain(hook))


def test_the_hook_watches_and_changes_nothing() -> None:
    seen: list[tuple[int, Image.Image]] = []
    preview = LatentPreview.measured(PixelCodec(3), generator())
    watched = drawn(preview.hook(3, lambda step, picture: seen.append((step, picture))), pictures=1)
    unwatched = drawn(preview.hook(100, lambda step, picture: seen.append((step, picture))), pictures=1)
    assert torch.equal(watched, unwatched)
    assert [step for step, _ in seen] == [3, 6]
    assert all(picture.size == (5, 4) for _, picture in seen)
    last = from_pil(seen[-1][1])
    assert float((last - 0.5).abs().max()) < 0.3


def test_several_pictures_come_as_a_sheet() -> None:
    seen: list[Image.Image] = []
    drawn(LatentPreview.measured(PixelCodec(3), generator()).hook(7, lambda step, picture: seen.append(picture)))
    assert len(seen) == 1 and seen[0].width > 2 * 5 and seen[0].height < 2 * 4 + 8


def test_previews_every_zero_steps_are_refused() -> None:
    with pytest.raises(UserError, match="every 1 or more steps, got 0"):
        LatentPreview.measured(PixelCodec(3), generator()).hook(0, lambda step, picture: None)


# --- a trained codec ----------------------------------------------------------------------------------------------


@pytest.mark.skipif("emoji" not in models.names(), reason="the box holds no model in this installation")
@torch.no_grad()
def test_previews_of_real_pictures() -> None:
    """Every colour of real pictures, averaged over the pixels of a latent, goes with the preview of their latents."""
    codec = open_codec(models.weights("emoji"))[0].codec
    cells = parquet.read_table(DATA).column("image").to_pylist()
    small = from_pil([Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in cells])
    pictures = F.interpolate(small, size=(64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    latents = codec.encode(pictures).mean
    preview = LatentPreview.measured(codec, generator())
    seen, truth = preview(latents), (F.avg_pool2d(pictures, codec.factor) + 1) / 2
    pairs = (torch.stack([seen[:, c].flatten(), truth[:, c].flatten()]) for c in range(3))
    together = [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]
    best = LatentPreview.fitted(latents, pictures)
    assert min(together) > 0.8, (together, preview.r2, best.r2)
