"""Enlarging in numbers: what the figures are, and the command that prints them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.errors import UserError
from sfumato.evaluation.upscaling import enlarged_by, interpolated, nearness
from sfumato.training import run

from .. import tiny
from ..training.codec_cases import latent_recipe, latent_settings, task_for
from ..training.training_cases import CPU
from .judge_cases import thumbnail


def some(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_nearness_is_that_of_the_definitions() -> None:
    true = some()
    other = true.clone()
    other[0, 0] = torch.where(other[0, 0] < 255, other[0, 0] + 1, other[0, 0])
    found = nearness(true, other)
    changed = float((other[0, 0] != true[0, 0]).double().mean())
    assert found["mean colour error"].value == pytest.approx(changed / 3 / 4)
    assert found["mean absolute error"].value == pytest.approx(changed / 3 / 4)
    mirrored = true.flip(3)
    found = nearness(true, mirrored)
    assert found["mean colour error"].value == pytest.approx(0, abs=1e-9) and found["mean absolute error"].value > 20


def test_bicubic_of_a_flat_picture_is_the_picture() -> None:
    flat = torch.full((2, 3, 12, 12), 77, dtype=torch.uint8)
    assert torch.equal(interpolated(flat, 2), flat)
    with pytest.raises(UserError, match="cannot be made 5 times smaller"):
        interpolated(flat, 5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        tiny.picture(number, size=16).save(folder / f"{number}.png")
    return folder


def test_a_batch_of_any_size_gives_the_same(pictures: Path) -> None:
    small = {"kind": "low-resolution", "form": "upsampled", "residual": 0.1, "dropout": 0.0}
    model = task_for(latent_recipe(latent_settings(pictures, "pixels", conditions={"small": small}))).model
    true, seen = some(5), []
    found = enlarged_by(model, true, seed=3, batch=2, steps=1, on_batch=lambda done, total: seen.append((done, total)))
    assert found.shape == true.shape and found.dtype == torch.uint8 and seen == [(2, 5), (4, 5), (5, 5)]
    whole = enlarged_by(model, true, seed=3, batch=5, steps=1)
    assert int((whole.int() - found.int()).abs().max()) <= 1
    plain = task_for(latent_recipe(latent_settings(pictures, "pixels"))).model
    with pytest.raises(UserError, match="does not enlarge"):
        enlarged_by(plain, true)


def test_the_command(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.evaluation.judge.judge", thumbnail)
    small = {"kind": "low-resolution", "form": "upsampled", "residual": 0.1, "dropout": 0.0}
    values = latent_settings(pictures, "pixels", conditions={"small": small})
    run.train(latent_recipe(values), tmp_path / "run", device=CPU, say=lambda _: None)
    told = ("--data", pictures, "--validation-fraction", 0.4, "--json")
    found = tiny.succeed("evaluate", "upscale", tmp_path / "run", *told).json
    assert set(found["figures"]) == {"enlarged", "bicubic", "real"}
    assert {"PSNR", "mean colour error", "mean absolute error"} <= set(found["figures"]["enlarged"])
    plain = tmp_path / "plain"
    run.train(latent_recipe(latent_settings(pictures, "pixels")), plain, device=CPU, say=lambda _: None)
    assert "does not enlarge pictures" in tiny.run("evaluate", "upscale", plain, *told).err
