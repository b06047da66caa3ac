"""CLIP: words and tokens, and towers that agree with transformers' own way of asking them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from sfumato.checkpoints.io import write_model
from sfumato.errors import ModelFileError, UserError
from sfumato.systems import open_system
from sfumato.systems.clip import CLIP, END, PAD, START, UNKNOWN, CLIPConfig, TowerConfig, vocabulary, words

TOWER = TowerConfig(width=16, layers=2, heads=2, mlp=24)
CONFIG = CLIPConfig(
    size=16, patch=4, vision=TOWER, text=TOWER, embed=12, tokens=8, vocabulary=("blue", "heart", "red"), title="tiny"
)


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP.create(CONFIG)


def pictures(count: int, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_words() -> None:
    assert words("Woman’s hat -- O'Neil's café, 3D_style!") == ["woman's", "hat", "o'neil's", "cafe", "3d", "style"]
    assert words("红心") == ["红心"] and words(" ,. ") == []


def test_tokens() -> None:
    found = CONFIG.encode(["red heart", "a RED, red thing that is far too long for it", ""])
    assert found[0].tolist() == [START, END + 3, END + 2, END, PAD, PAD, PAD, PAD]
    assert found[1].tolist() == [START, UNKNOWN, END + 3, END + 3, UNKNOWN, UNKNOWN, UNKNOWN, END]
    assert found[2].tolist() == [START, END] + [PAD] * 6
    assert CONFIG.unknown_words(["red hat hat", "hat heart"]) == {"hat": 2}


def test_the_most_frequent_words_are_kept() -> None:
    captions = ["red red hat", "red heart", "hat stand"]
    assert vocabulary(captions, 2) == ("hat", "red") and vocabulary(captions, 3) == ("hat", "heart", "red")


def test_towers_are_asked_as_transformers_does(model: CLIP) -> None:
    x = pictures(3)
    tokens = CONFIG.encode(["red heart", "blue", "nothing known here"])
    clip = model.towers.clip.eval()
    with torch.no_grad():
        theirs = clip(input_ids=tokens, pixel_values=x / 127.5 - 1)
    assert torch.allclose(model.pictures(x, batch=2), theirs.image_embeds, atol=1e-6)
    captions = model.captions(["red heart", "blue", "nothing known here"])
    assert torch.allclose(captions, theirs.text_embeds, atol=1e-6)
    scale = model.towers(x / 127.5 - 1, tokens)[2]
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_all_patches_kept_is_the_whole_picture(model: CLIP) -> None:
    x = pictures(2) / 127.5 - 1
    every = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    with torch.no_grad():
        assert torch.allclose(model.towers.see(x, every), model.towers.see(x), atol=1e-6)
        assert not torch.allclose(model.towers.see(x, every[:, :8]), model.towers.see(x), atol=1e-3)


def test_a_file_is_enough(model: CLIP, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in model.tensors().items()}
    write_model(tmp_path / "clip.safetensors", half, CONFIG.model_dump(mode="json"))
    before = torch.random.get_rng_state()
    opened = open_system(tmp_path / "clip.safetensors").system
    assert torch.equal(before, torch.random.get_rng_state())
    assert isinstance(opened, CLIP) and opened.config == CONFIG
    x = pictures(2, 20)  # another size is resized
    assert torch.allclose(opened.pictures(x), model.pictures(x), atol=1e-2)
    del half["network.logit_scale"]
    write_model(tmp_path / "less.safetensors", half, CONFIG.model_dump(mode="json"))
    with pytest.raises(ModelFileError, match="logit_scale is missing"):
        open_system(tmp_path / "less.safetensors")


def test_refusals(model: CLIP) -> None:
    with pytest.raises(UserError, match="uint8 pictures"):
        model.pictures(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="not a multiple of patch 5"):
        CLIPConfig(size=16, patch=5)
    with pytest.raises(ValueError, match="not a multiple of its 3 heads"):
        TowerConfig(width=16, layers=1, heads=3, mlp=16)
