"""`sfumato evaluate bpd`: numbers with their settings, and refusals in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ..tiny import PARQUET, Result

BPD = ("evaluate", "bpd", "cat-dog.safetensors", "--data", "pictures")


def test_the_bound_is_told_with_its_parts(place: Path, succeed: Any) -> None:
    out = succeed(*BPD, "--steps", 5, "--count", 3).out.splitlines()
    assert out[0].endswith(" bits/dim") and " ± " in out[0]
    assert out[1].startswith("  prior ") and "decoder " in out[1]
    for said in ("method bound", "steps 5", "variance small", "clip True", "seed 0", "pictures 3, of 24", "192 dim"):
        assert said in out[2], said
    assert len(out) == 3


def test_json_has_every_step_and_setting(place: Path, succeed: Any) -> None:
    found = succeed(*BPD, "--steps", "2,3", "--count", 2, "--label", "folder", "--no-clip", "--json").json
    steps = found["by_step"]
    assert len(steps["t"]) == 5 and steps["t"] == sorted(steps["t"], reverse=True)
    total = found["prior"] + sum(steps["bits_per_dim"])
    assert found["bits_per_dim"] == pytest.approx(total, rel=1e-6)
    assert found["decoder"] == pytest.approx(steps["bits_per_dim"][-1], rel=1e-6)
    assert found["settings"] == {
        "model": "cat-dog", "method": "bound", "steps": 5, "variance": "small", "clip": False, "data": "pictures",
        "split": None, "label": "folder", "seed": 0, "pictures": 2, "of": 24,
        "fit": "crop", "upscale": False, "skip_bad": False,
    }  # fmt: skip
    assert found["deviation"] > 0 and (found["dims"], found["evaluations"]) == (192, 5)


def test_bad_pictures_are_told_or_left_out(place: Path, succeed: Any, run: Any) -> None:
    options = ("evaluate", "bpd", "cat-dog.safetensors", "--data", "some", "--steps", 2, "--json")
    shutil.copytree("pictures", "some")
    whole = succeed(*options).json
    Path("some/empty.png").touch()
    refused = run(*options)
    assert refused.code == 2 and "--skip-bad" in refused.err and "empty.png" in refused.err
    assert succeed(*options, "--skip-bad").json["bits_per_dim"] == whole["bits_per_dim"]
    assert "fit" in run(*options, "--fit", "squeeze").err


def test_the_flow(place: Path, succeed: Any) -> None:
    options = (*BPD, "--method", "flow", "--steps", 2, "--count", 2, "--probes", 2)
    found = succeed(*options, "--json").json
    assert found["prior"] is None and "by_step" not in found and found["evaluations"] == 13
    assert found["settings"]["probes"] == 2 and found["settings"]["tolerance"] is None
    out = succeed(*options).out.splitlines()
    assert len(out) == 2 and f"{found['bits_per_dim']:.4f} ± " in out[0] and "steps 2" in out[1]


def test_seeds_choose_noise_and_pictures_and_repeat(place: Path, succeed: Any) -> None:
    def total(*options: object) -> float:
        return float(succeed(*BPD, "--steps", 3, "--count", 4, "--json", *options).json["bits_per_dim"])

    assert total() == total("--seed", 0) != total("--seed", 1)


def test_splits_and_whole_sets(place: Path, succeed: Any, run: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(PARQUET).slice(0, 5)
    at = table.schema.get_field_index("split")
    parquet.write_table(table.set_column(at, "split", pyarrow.array(["train"] * 3 + ["validation"] * 2)), "two.parquet")
    both = ("evaluate", "bpd", "cat-dog.safetensors", "--data", "two.parquet", "--steps", 2)
    splits: list[tuple[str, ...]] = [(), ("--split", "train"), ("--split", "validation")]
    settings = [succeed(*both, *split, "--json").json["settings"] for split in splits]
    assert [(s["split"], s["pictures"], s["of"]) for s in settings] == [
        (None, 5, 5), ("train", 3, 3), ("validation", 2, 2)
    ]  # fmt: skip
    assert "(did you mean 'validation'?); splits: train, validation" in run(*both, "--split", "vaildation").err


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no model": (("evaluate", "bpd", "away.safetensors", "--data", "pictures"), "no model at away.safetensors"),
    "no data": (("evaluate", "bpd", "cat-dog.safetensors"), "--data"),
    "no such data": (("evaluate", "bpd", "cat-dog.safetensors", "--data", "away"), "away"),
    "method": ((*BPD, "--method", "bond"), "unknown method 'bond' (did you mean 'bound'?)"),
    "too many": ((*BPD, "--count", 25), "--count: 25 pictures were asked for, but 'pictures' has 24"),
    "none": ((*BPD, "--count", 0), "--count: must be at least 1, got 0"),
    "split": ((*BPD, "--split", "train"), "has no column 'split'; leave --split out"),
    "label column": ((*BPD, "--label", "class"), "label column 'class' is not in 'pictures'"),
    "no classes": (
        ("evaluate", "bpd", "free.safetensors", "--data", "pictures", "--label", "folder"),
        "this model has no class labels; leave --label out",
    ),
    "variance": ((*BPD, "--variance", "smal"), "unknown variance 'smal' (did you mean 'small'?)"),
    "learned": ((*BPD, "--variance", "learned", "--steps", 2), "has no learned variance"),
    "steps": ((*BPD, "--steps", "many"), "'many' is not understood"),
    "one step": ((*BPD, "--steps", 1), "at least 2 steps"),
    "too many steps": ((*BPD, "--steps", 2000), "2000 steps"),
    "flow steps": ((*BPD, "--method", "flow", "--steps", "ddim5"), "takes a whole number of equal steps, got 'ddim5'"),
    "flow variance": ((*BPD, "--method", "flow", "--variance", "small"), "--variance does not apply to --method flow"),
    "flow clip": ((*BPD, "--method", "flow", "--no-clip"), "--no-clip does not apply to --method flow"),
    "bound probes": ((*BPD, "--probes", 2), "--probes does not apply to --method bound"),
    "both": ((*BPD, "--method", "flow", "--steps", 2, "--tolerance", "1e-3"), "--tolerance does not apply to a fixed"),
    "tolerance": ((*BPD, "--method", "flow", "--tolerance", 0, "--count", 1), "tolerance must lie between 0 and 1"),
    "command": (("evaluate", "bdp"), "unknown command 'bdp' (did you mean 'bpd'?)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence(place: Path, run: Any, name: str) -> None:
    arguments, words = REFUSED[name]
    result: Result = run(*arguments)
    assert result.code == 2 and result.out == ""
    assert words in result.err and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
