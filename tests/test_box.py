"""The models in the box draw what they drew when they were put there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato import images, models
from sfumato.conditioners.words import minilm_installed

SHEET = Path(__file__).parent / "data" / "emoji.png"
"""Drawn by `sfumato.load("emoji")` with the prompts and seeds below, 20 steps, float32, on an AMD Zen 5."""
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


def test_all_weights_together_are_small() -> None:
    assert sum(models.weights(name).stat().st_size for name in models.names()) < 40e6
    for name in models.names():
        assert models.card(name).startswith(f"# {name}\n") and "licence" in models.card(name)
