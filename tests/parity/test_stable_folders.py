"""Stable Diffusion's folders with diffusers and transformers: they open ours, we open theirs, with the same tensors."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import END_MARK
from sfumato.systems import open_system
from sfumato.systems.exchange import OWN, save_folder
from sfumato.systems.latent import Latent

from .stable_cases import NAMES, case, latent

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT = "A photo of a horse! 3 hats, naïve"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        if not (place / name).exists():
            save_folder(latent(case(name).family, case(name).parts), place / name)
        return place / name

    return folder


def opened(folder: Path, **more: Any) -> Any:
    """A folder as diffusers opens it; an estimator of depths is never in ours."""
    index = json.loads((folder / "model_index.json").read_text())
    if "depth_estimator" in index:
        more |= {"depth_estimator": None, "feature_extractor": None}
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **more)


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(theirs[name], t) for name, t in ours.items())


def in_one_way(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's names without the prefix that some versions of transformers have."""
    return {name.removeprefix("text_model."): t for name, t in tensors.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_opens_our_folder_with_equal_tensors(folders: Callable[[str], Path], name: str) -> None:
    index = json.loads((folders(name) / "model_index.json").read_text())
    pipeline, parts = opened(folders(name)), case(name).parts
    assert type(pipeline).__name__ == index["_class_name"]
    assert same_tensors(parts["unet"], pipeline.unet.state_dict())
    assert same_tensors(parts["vae"], pipeline.vae.state_dict())
    assert same_tensors(in_one_way(parts["text"]), in_one_way(pipeline.text_encoder.state_dict()))
    family = case(name).family
    for field in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"):
        assert pipeline.scheduler.config[field] == family.scheduler[field]
    if family.low_res_scheduler is not None:
        low = pipeline.low_res_scheduler.config
        assert {key: low[key] for key in family.low_res_scheduler if key[0] != "_"} == {
            key: value for key, value in family.low_res_scheduler.items() if key[0] != "_"
        }


@pytest.mark.parametrize("name", ["sd1", "sd2-base"])
def test_their_tokenizer_reads_a_prompt_as_ours(folders: Callable[[str], Path], name: str) -> None:
    """All but "!", which theirs reads as its padding token where it is one."""
    pipeline, model = opened(folders(name)), open_system(folders(name)).system
    assert isinstance(model, Latent) and pipeline.tokenizer.model_max_length == 77
    plain = PROMPT.replace("!", ",")
    ids = pipeline.tokenizer([plain], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert int(ids[0, -1]) == {"sd1": END_MARK, "sd2-base": 0}[name]
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids)[0]
    from sfumato.systems.asked import Asked

    ours = model.conditions([Asked(plain)])[0].context
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_diffusers_saves_again_opens_as_the_same_model(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    opened(folders(name)).save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / OWN).exists()
    model, found = (open_system(place).system for place in (folders(name), tmp_path / "theirs"))
    assert isinstance(found, Latent) and isinstance(model, Latent)
    assert found.config == model.config and same_tensors(model.tensors(), found.tensors())


@pytest.mark.parametrize(
    "how",
    [
        {"variant": "fp16"},
        {"max_shard_size": "2MB"},
        {"max_shard_size": "2MB", "variant": "bf16"},
        pytest.param({"safe_serialization": False}, marks=pytest.mark.slow),
        pytest.param({"safe_serialization": False, "max_shard_size": "2MB"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_form_that_diffusers_writes(folders: Callable[[str], Path], tmp_path: Path, how: dict[str, Any]) -> None:
    pipeline = opened(folders("sd1"))
    pipeline.save_pretrained(tmp_path / "theirs", **how)
    files = {path.name for path in (tmp_path / "theirs").rglob("*")}
    assert ("max_shard_size" in how) == any(".index." in file for file in files)
    found = open_system(tmp_path / "theirs", allow_pickle="safe_serialization" in how).system
    model = latent(case("sd1").family, case("sd1").parts)
    assert isinstance(found, Latent) and found.config == model.config
    assert same_tensors(model.tensors(), found.tensors())


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_both_draw_the_same_after_the_folder_went_round(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """diffusers draws from our folder what it draws from the one that it wrote itself, by name of our weights."""
    shutil.copytree(folders(name), tmp_path / "ours")
    (tmp_path / "ours" / OWN).unlink()
    save_folder(open_system(tmp_path / "ours").system, tmp_path / "again")  # type: ignore[arg-type]
    drawn = []
    for place in (folders(name), tmp_path / "again"):
        pipeline = opened(place)
        pipeline.set_progress_bar_config(disable=True)
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn.append(pipeline(PROMPT, latents=z, num_inference_steps=2, output_type="latent").images)
    assert torch.equal(*drawn) and float(drawn[0].std()) > 0
