"""The recipe `clip`: its loss on paper, what counts as a wrong answer, augmentation, and a run that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from sfumato.errors import DataError, UserError
from sfumato.systems import open_system
from sfumato.systems.clip import CLIP
from sfumato.training.data import PictureSet, open_data
from sfumato.training.recipes import load
from sfumato.training.recipes.clip import AugmentConfig, CLIPRecipe, CLIPTask, Said, augmented, contrast, true_of
from sfumato.training.run import train

TOWER = {"width": 16, "layers": 1, "heads": 2, "mlp": 16}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four colours in two styles, a square and a bar; of each style one colour is held out."""
    folder, rows = tmp_path / "data", []
    folder.mkdir()
    for name, colour in COLOURS.items():
        for style, box in (("square", (4, 4, 12, 12)), ("bar", (6, 0, 9, 16))):
            picture = Image.new("RGB", (16, 16), "white")
            picture.paste(colour, box)
            picture.save(folder / f"{name}-{style}.png")
            held_out = (name, style) in (("red", "bar"), ("blue", "square"))
            row = {"file_name": f"{name}-{style}.png", "text": f"{name} thing", "style": style, "tags": [name, "flat"]}
            rows.append(row | {"split": "validation" if held_out else "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(data: Path, *changes: str) -> CLIPRecipe:
    few = ["steps=4", "batch=6", "log_every=2", "validate_every=2", "sample_every=4", "samples=2", "precision=fp32"]
    small = [f"model.vision={TOWER}", f"model.text={TOWER}", "model.patch=4", "data.size=16"]
    found = load("clip", [*small, *(f"train.{one}" for one in few), "train.optimizer.warmup=2", *changes], str(data))
    assert isinstance(found, CLIPRecipe)
    return found


def task(recipe: CLIPRecipe) -> CLIPTask:
    train, validation = open_data(recipe.data)
    assert isinstance(train, PictureSet)
    return recipe.task(train, validation)


# --- the loss --------------------------------------------------------------------------------------------------------


def unit(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_the_loss_on_paper() -> None:
    """Two pairs at right angles, scale s: every row and column has the logits s and 0."""
    x, s = unit((1, 0), (0, 1)), torch.tensor(3.0)
    found = contrast(x, x, s, torch.eye(2, dtype=torch.bool))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-3))] * 2)


def test_equal_captions_are_no_wrong_answers() -> None:
    """Three pictures of which the first two are said to be the same: pulling these together costs nothing."""
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    x = unit((1, 0), (1, 0), (-1, 0)).requires_grad_()
    apart = unit((1, 0), (1, 0.5), (-1, 0))
    s = torch.tensor(20.0)
    assert contrast(x, x, s, same).sum() < contrast(apart, apart, s, same).sum()
    assert contrast(x, x, s, same)[0].item() == pytest.approx(math.log(2), abs=1e-6)
    assert contrast(x, x, s, torch.eye(3, dtype=torch.bool))[0].item() == pytest.approx(math.log(2), abs=1e-6)
    (gradient,) = torch.autograd.grad(contrast(x, x, s, same).sum(), x)
    assert torch.allclose(gradient[0], gradient[1], atol=1e-6)  # neither is pushed from the other


def test_further_captions_are_wrong_answers_of_pictures_alone() -> None:
    """One picture at the scale s between its caption and one at a right angle to it."""
    x, texts, s = unit((1, 0)), unit((1, 0), (0, 1)), torch.tensor(3.0)
    found = contrast(x, texts, s, torch.tensor([[True], [False]]))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-3)) / 2])
    both = contrast(x, texts, s, torch.tensor([[True], [True]]))  # nearly right may be right
    assert both.tolist() == pytest.approx([(math.log(1 + math.exp(-3)) + 1.5) / 2])


def test_what_is_true_of_what() -> None:
    said = [Said("heart, noto style", "heart", "noto"), Said("heart", "heart", None), Said("hat", "hat", None)]
    found = true_of(said, ["heart", "heart", "hat"], ["noto", "flat", None])
    assert found.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


# --- captions and pictures -------------------------------------------------------------------------------------------


def test_captions_are_drawn_from_all_columns(data: Path) -> None:
    made = task(recipe(data, "captions.tags_share=0.5", "captions.style_share=0.5"))
    generator = torch.Generator().manual_seed(0)
    said = {made._draw_caption(made.data, 0, generator) for _ in range(200)}
    row = made.data.records[0].columns
    name, style = row["text"], row["style"]
    assert {one.concept for one in said} == {name} and {one.style for one in said} == {None, style}
    spoken = {one.words for one in said}
    assert {name, f"{name}, {style} style", f"{style} style {name}", f"{name}, flat", "flat"} <= spoken
    for one in said:
        assert ("style" in one.words) == (one.style is not None)
    assert set(made.model.config.vocabulary) == {"thing", "flat", "square", "bar", "style", *COLOURS}


def test_distractors_are_nearly_right(data: Path) -> None:
    made = task(recipe(data, "captions.style_share=1"))
    generator = torch.Generator().manual_seed(0)
    concept, style = made.data.records[0].columns["text"], made.data.records[0].columns["style"]
    drawn = [made._draw_distractor(made.data, 0, generator) for _ in range(200)]
    assert all(one.concept == concept or one.style == style for one in drawn)
    assert 60 < sum(one.style != style for one in drawn) < 140
    assert {one.concept for one in drawn if one.style == style} == {f"{name} thing" for name in COLOURS}


def test_columns_may_be_absent_but_not_misspelt(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in row.items() if k not in ("style", "tags")} for row in rows]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, plain)))
    made = task(recipe(data))
    assert made._draw_caption(made.data, 0, torch.Generator()).style is None
    with pytest.raises(DataError, match="column 'stile' is not in .*columns: split, text"):
        task(recipe(data, "captions.style=stile"))


def test_nothing_changes_without_augmentation() -> None:
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    still = AugmentConfig(shift=0, scale=0, rotate=0, colour=0, blur=0, noise=0)
    assert torch.allclose(augmented(x, still, torch.Generator().manual_seed(0)), x, atol=1e-5)


def test_what_comes_in_from_outside_is_white_and_pictures_stay_in_range() -> None:
    white = torch.ones(4, 3, 16, 16)
    found = augmented(white, AugmentConfig(noise=0, colour=0), torch.Generator().manual_seed(0))
    assert torch.allclose(found, white, atol=1e-5)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    again = [augmented(x, AugmentConfig(), torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again) and not torch.allclose(again[0], x, atol=0.1) and again[0].abs().max() <= 1


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_and_its_model_opens(data: Path, tmp_path: Path) -> None:
    told = train(recipe(data), tmp_path / "run", device=torch.device("cpu"), say=lambda _: None)
    assert told == "finished" and list((tmp_path / "run" / "samples").iterdir())
    opened = open_system(tmp_path / "run" / "model.safetensors").system
    assert isinstance(opened, CLIP) and "red" in opened.config.vocabulary
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["accuracy"] <= 1 for line in lines if "accuracy" in line)
    assert any("validation_accuracy" in line for line in lines)


def test_it_learns_which_caption_belongs_to_which_picture(data: Path) -> None:
    plain = ("captions.tags_share=0", "captions.style_share=1", "augment={drop: 0, rotate: 0, blur: 0}")
    made = task(recipe(data, "train.steps=60", *plain))
    optimizer = torch.optim.AdamW(made.network.parameters(), 5e-3)
    for step in range(60):
        made.begin(step)
        made.network.train()
        loss = made.loss(made.data.gather(range(6)), torch.Generator().manual_seed(step), torch.device("cpu"))
        optimizer.zero_grad()
        torch.autograd.backward(loss.value)
        optimizer.step()
    made.network.eval()
    right = [f"{r.columns['text']}, {r.columns['style']} style" for r in made.data.records]
    cosines = made.model.pictures(made.data.gather(range(6)).images) @ made.model.captions(right).T
    assert cosines.argmax(1).tolist() == list(range(6))


REFUSED: dict[str, tuple[str, str]] = {
    "no caption": ("data.caption=null", "data.caption is null"),
    "grey": ("data.channels=1", "leave data.channels at 3"),
    "one picture": ("train.batch=1", "must be at least 2"),
    "patch": ("model.patch=5", "size 16 is not a multiple of patch 5"),
    "heads": ("model.vision.heads=3", "not a multiple of its 3 heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(data: Path, name: str) -> None:
    change, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        recipe(data, change)


def test_pictures_without_captions_are_refused(data: Path) -> None:
    (data / "metadata.jsonl").unlink()
    changed: Any = recipe(data)
    with pytest.raises(DataError, match="has no captions"):
        task(changed)
