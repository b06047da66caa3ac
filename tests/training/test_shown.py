"""Masks and small pictures for training: what they are, that the generator decides alone, and runs that use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import api
from sfumato.conditioners.shown import LowResolution, Masked, shrunk
from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar
from sfumato.errors import UserError
from sfumato.systems import open_as
from sfumato.systems.latent import Latent
from sfumato.tasks.edit import Source, edit, scale_of
from sfumato.training import recipes, run
from sfumato.training.recipes.conditions import ConditionRecipe, Frame, Seen, kind_of
from sfumato.training.shown import blurred, random_masks

from .. import tiny
from .codec_cases import autoencoder_recipe, codec_settings, latent_recipe, latent_settings, task_for
from .training_cases import CPU

SMALL: dict[str, Any] = {"kind": "low-resolution", "dropout": 0.0}
FRAME = Frame(factor=4, channels=4, size=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 48), (9, 33)])
def test_masks_are_never_empty_and_of_all_kinds(height: int, width: int) -> None:
    masks = random_masks(200, height, width, generator(), full=0.2)
    assert masks.shape == (200, 1, height, width) and set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.mean((1, 2, 3))
    assert float(shares.min()) > 0
    assert 0.1 < float((shares == 1).float().mean()) < 0.35
    rows, columns = masks[:, 0].amax(2).mean(1), masks[:, 0].amax(1).mean(1)
    assert bool(((rows == 1) & (columns < 1)).any()) and bool(((columns == 1) & (rows < 1)).any())  # halves
    boxes = (rows < 1) & (columns < 1) & ((shares - rows * columns).abs() < 1e-6)
    assert bool(boxes.any()) and bool(((rows < 1) & (columns < 1) & ~boxes).any())  # single boxes, and other forms


def test_the_generator_decides_alone() -> None:
    masks = random_masks(8, 32, 32, generator(3))
    torch.manual_seed(99)
    assert torch.equal(masks, random_masks(8, 32, 32, generator(3)))
    assert not torch.equal(masks, random_masks(8, 32, 32, generator(4)))
    assert bool((random_masks(5, 8, 8, generator(), full=1.0) == 1).all())
    assert not bool((random_masks(300, 16, 16, generator(), full=0.0).mean((1, 2, 3)) == 1).all())


# --- blur ------------------------------------------------------------------------------------------------------------


def test_blur_is_a_gaussian_of_its_deviation() -> None:
    point = torch.zeros(2, 1, 33, 33)
    point[:, :, 16, 16] = 1
    found = blurred(point, torch.tensor([2.0, 0.0]))
    place = torch.arange(33.0) - 16
    assert float(found[0].sum()) == pytest.approx(1, abs=1e-4)
    assert float((found[0, 0].sum(0) * place**2).sum()) == pytest.approx(4, rel=0.03)
    assert torch.allclose(found[1], point[1])
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(blurred(flat, torch.tensor([3.0])), flat, atol=1e-6)


# --- what a network is shown -----------------------------------------------------------------------------------------


class Pixels:
    """A batch of pictures."""

    def __init__(self, count: int = 3, size: int = 16) -> None:
        self.pictures = 2 * torch.rand(count, 3, size, size, generator=generator(7)) - 1
        self.indices = torch.arange(count)

    def to_float(self) -> Tensor:
        return self.pictures


def seen(batch: Pixels, *, seed: int = 0, training: bool = True) -> Seen:
    def latents(x: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(x, 4)[:, :4]

    schedule = TableSchedule(cosine_alpha_bar())
    return Seen(None, batch, generator(seed), training, torch.device("cpu"), latents, schedule)  # type: ignore[arg-type]


def kind(frame: Frame = FRAME, **values: Any) -> Any:
    found = kind_of("small", ConditionRecipe(**{**SMALL, **values}))
    found.check()
    found.described(frame, [])
    return found


@pytest.mark.parametrize(
    ("frame", "values", "form", "channels"),
    [
        (replace(FRAME, factor=1, channels=3), {}, "upsampled", 3),
        (replace(FRAME, factor=2), {}, "beside", 3),
        (FRAME, {"scale": 4}, "beside", 3),
        (FRAME, {}, "unfolded", 12),
        (FRAME, {"form": "encoded", "residual": 0.2}, "encoded", 4),
    ],
)
def test_forms_follow_from_the_codec(frame: Frame, values: dict[str, Any], form: str, channels: int) -> None:
    found = kind(frame, **values)
    config = found.outline(frame)
    assert (config["form"], config["channels"], config["exact"]) == (form, channels, True)
    shown = found.inputs(seen(Pixels()))
    planes = {"upsampled": 16, "beside": 16 // found.recipe.scale}.get(form, 4)
    assert all(tuple(one.shape) == (channels, planes, planes) and step == -1 for one, step in shown)


def test_noise_is_told_or_not_and_left_out_in_validation() -> None:
    batch = Pixels()
    clean = shrunk(batch.pictures, 4)
    told = kind(scale=4, noise=100)
    assert told.part.levels == 100 and not told.part.exact
    pairs = told.inputs(seen(batch))
    assert len({step for _, step in pairs}) > 1 and all(0 <= step < 100 for _, step in pairs)
    quiet = told.inputs(seen(batch, training=False))
    assert all(step == 0 for _, step in quiet)
    assert torch.allclose(torch.stack([one for one, _ in quiet]), clean, atol=0.2)
    assert kind(scale=4, noise=100, told=False).part.levels == 0
    again = told.inputs(seen(batch))
    assert all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(pairs, again, strict=True))


def test_blur_happens_in_training_only() -> None:
    batch = Pixels()
    found = kind(scale=4, blur=4.0)
    assert not found.part.exact
    sharp = torch.stack([one for one, _ in found.inputs(seen(batch, training=False))])
    soft = torch.stack([one for one, _ in found.inputs(seen(batch))])
    assert torch.equal(sharp, shrunk(batch.pictures, 4))
    assert float(soft.std()) < float(sharp.std())


def test_a_masked_picture_is_hidden_under_its_mask() -> None:
    batch = Pixels()
    found = kind_of("hole", ConditionRecipe(kind="masked", dropout=0.0, full=0.0))
    assert found.described(FRAME, []) == Masked(4).describe()
    for one, picture in zip(found.inputs(seen(batch)), batch.pictures, strict=True):
        cells, latents = one[0], one[1:]
        own = torch.nn.functional.pixel_unshuffle(picture, 4)[:4]
        assert set(cells.unique().tolist()) <= {0.0, 1.0} and 0 < float(cells.mean())
        assert torch.equal(latents[:, cells == 0], own[:, cells == 0])
    whole = kind_of("hole", ConditionRecipe(kind="masked", full=1.0))
    assert whole.outline(FRAME)["droppable"]
    assert all(bool((one[0] == 1).all()) and bool((one[1:] == 0).all()) for one in whole.inputs(seen(batch)))


@pytest.mark.parametrize(
    ("frame", "values", "says"),
    [
        (FRAME, {"scale": 3}, "cannot be made 3 times smaller"),
        (FRAME, {"scale": 8}, "does not fit a codec of factor 4"),
        (FRAME, {"form": "upsampled"}, "does not fit a codec of factor 4"),
        (FRAME, {"residual": 0.1}, "an upsampled or encoded one"),
        (FRAME, {"told": False}, "without any there is nothing to tell"),
    ],
)
def test_small_pictures_that_cannot_be(frame: Frame, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        kind(frame, **values)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_captioned(tmp_path_factory.mktemp("pictures"), count=12, size=16) or Path()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        tiny.picture(number, size=16).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "run"
    values = codec_settings(pictures, train={"steps": 3, "save_every": 3})
    assert run.train(autoencoder_recipe(values), folder, device=CPU, say=lambda _: None) == "finished"
    return folder


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "pixels": (False, {"form": "upsampled", "residual": 0.1}),
    "pixels, noise told": (False, {"noise": 50, "dropout": 0.2}),
    "beside": (True, {}),
    "encoded": (True, {"form": "encoded", "residual": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_learns_to_enlarge(name: str, pictures: Path, codec: Path, tmp_path: Path) -> None:
    """It trains, its file opens, and an edit by it is twice as large; the same run is the same file."""
    latents, values = CASES[name]
    settings = latent_settings(pictures, codec if latents else "pixels", conditions={"small": SMALL | values})
    settings["train"] = settings["train"] | {"steps": 2, "sample_every": 2, "samples": 2, "sample_steps": 1}
    recipe = latent_recipe(settings)
    for folder in ("one", "two"):
        assert run.train(recipe, tmp_path / folder, device=CPU, say=lambda _: None) == "finished"
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert files[0] == files[1]
    model = open_as(Latent, tmp_path / "one/model.safetensors")
    assert scale_of(model) == 2
    small = 2 * torch.rand(3, 11, 9, generator=generator()) - 1
    found = edit(model, Source(small), seeds=[0, 1], steps=2)
    assert found.shape == (2, 3, 22, 18)
    if model.shown["small"].describe().get("exact"):
        apart = torch.nn.functional.avg_pool2d(found, 2) - small
        assert float(apart.abs().mean()) < 0.01
    front = api.load(tmp_path / "one/model.safetensors")
    (picture,) = front.edit(tiny.picture(1, size=10), seed=0, steps=1, upscale=2)
    assert picture.size == (20, 20)


def test_a_level_of_noise_belongs_to_models_that_know_one(pictures: Path) -> None:
    recipe = latent_recipe(latent_settings(pictures, "pixels", conditions={"small": SMALL}))
    model = task_for(recipe).model
    with pytest.raises(UserError, match="without noise"):
        edit(model, Source(torch.zeros(3, 8, 8), noise_level=3), seeds=[0], steps=1)
    noisy = latent_recipe(latent_settings(pictures, "pixels", conditions={"small": SMALL | {"noise": 9}}))
    model = task_for(noisy).model
    with pytest.raises(UserError, match="noise from 0 to 8, got noise level 9"):
        edit(model, Source(torch.zeros(3, 8, 8), noise_level=9), seeds=[0], steps=1)
    assert edit(model, Source(torch.zeros(3, 8, 8)), seeds=[0], steps=1).shape == (1, 3, 16, 16)


def test_a_run_that_learns_to_fill_in(pictures: Path, codec: Path, tmp_path: Path) -> None:
    condition = {"kind": "masked", "dropout": 0.0, "full": 0.2}
    settings = latent_settings(pictures, codec, conditions={"hole": condition})
    settings["train"] = settings["train"] | {"steps": 2, "sample_every": 2, "samples": 2, "sample_steps": 1}
    assert run.train(latent_recipe(settings), tmp_path / "run", device=CPU, say=lambda _: None) == "finished"
    model = open_as(Latent, tmp_path / "run/model.safetensors")
    assert isinstance(model.shown["hole"], Masked)
    picture, mask = 2 * torch.rand(3, 18, 14, generator=generator()) - 1, torch.zeros(18, 14)
    mask[3:9, 2:7] = 1
    assert edit(model, Source(picture, mask=mask, strength=1.0), seeds=[0], steps=2).shape == (1, 3, 18, 14)
    (found,) = api.load(tmp_path / "run/model.safetensors").edit(tiny.picture(1, size=16), box=(2, 2, 5, 5), steps=2)
    before, after = tiny.picture(1, size=16).convert("RGB"), found
    assert [after.getpixel(p) for p in ((0, 0), (15, 15))] == [before.getpixel(p) for p in ((0, 0), (15, 15))]


@pytest.mark.parametrize("name", ["sr3", "latent-superres", "latent-inpaint"])
def test_recipes_of_the_package(name: str, pictures: Path, codec: Path) -> None:
    stage = None if name == "sr3" else str(codec)
    options = ["data.size=16"]
    recipe = recipes.load(name, options, data=str(pictures), codec=stage)
    model = task_for(recipe).model  # type: ignore[arg-type]
    (part,) = model.shown.values()
    assert isinstance(part, Masked if name == "latent-inpaint" else LowResolution)
    assert model.config.size == 16
