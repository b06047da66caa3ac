"""The models in the box draw what they drew when they were put there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import images, models
from sfumato.conditioners.shown import shrunk
from sfumato.conditioners.words import minilm_installed
from sfumato.evaluation.upscaling import enlarged_by, interpolated, nearness
from sfumato.images import to_pil
from sfumato.systems.latent import Latent

from . import tiny

SHEET = Path(__file__).parent / "data" / "emoji.png"
"""Drawn by `sfumato.load("emoji")` with the prompts and seeds below, 20 steps, float32, on an AMD Zen 4."""
PROMPTS = ["smiling face", "red heart, fluent flat style", "a cat face", "man with beard"]


@pytest.mark.skipif("emoji" not in models.names(), reason="the box holds no model in this installation")
@pytest.mark.skipif(not minilm_installed(), reason="the text encoder is not installed")
def test_fixed_prompts_and_seeds() -> None:
    """Kernels round differently from machine to machine, which twenty steps carry on: near, not equal."""
    pictures = sfumato.load("emoji", device="cpu").generate(PROMPTS, seed=0)
    drawn = np.array(images.sheet(pictures), dtype=float)
    with Image.open(SHEET) as file:
        then = np.array(file, dtype=float)
    assert drawn.shape == then.shape
    assert np.abs(drawn - then).mean() < 2


@pytest.mark.skipif(models.ENLARGES not in models.names(), reason="the box holds no model in this installation")
def test_a_small_picture_becomes_a_larger_one(tmp_path: Path) -> None:
    """An emoji of the sheet made half as large: nearer to itself again than by bicubic interpolation; and the command
    takes this model where nothing but twice the size is asked."""
    with Image.open(SHEET) as file:
        sheet = file.convert("RGB").crop((0, 0, file.width - file.width % 2, file.height - file.height % 2))
    true = images.from_pil(sheet, "RGB").add(1).mul(127.5).round().to(torch.uint8)
    model = sfumato.load(models.ENLARGES, device="cpu")
    assert isinstance(model.system, Latent)
    found = nearness(true, enlarged_by(model.system, true))
    plain = nearness(true, interpolated(true, models.BY))
    assert found["PSNR"].value > plain["PSNR"].value + 1
    assert found["mean colour error"].value < plain["mean colour error"].value
    small = to_pil(shrunk(images.from_pil(sheet, "RGB"), models.BY))[0]
    small.save(tmp_path / "small.png")
    where = ("--out", tmp_path / "a.png", "--json")
    told = tiny.succeed("edit", tmp_path / "small.png", "--upscale", 2, "--seed", 1, *where)
    assert models.ENLARGES in told.out
    (same,) = model.edit(small, seed=1)
    with Image.open(tmp_path / "a.png") as file:
        assert file.size == sheet.size and file.tobytes() == same.tobytes()


def test_all_weights_together_are_small() -> None:
    assert sum(models.weights(name).stat().st_size for name in models.names()) < 40e6
    for name in models.names():
        assert models.card(name).startswith(f"# {name}\n") and "licence" in models.card(name)
