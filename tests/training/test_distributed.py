"""Two processes train what one does: the same pictures, the same average gradient, the same decisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .training_cases import lines, settings, write_pictures

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one process and what two processes left behind, by their number."""
    pytest.importorskip("accelerate")
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"), 14)
    found = {}
    for world in (1, 2):
        out = found[world] = tmp_path_factory.mktemp(f"world{world}")
        values = settings(pictures, batch=8, accumulate=2, validate_every=2, sample_every=2, samples=2, sample_steps=2)
        values["data"]["validation_fraction"] = 0.3
        values["train"]["optimizer"]["schedule"] = "constant"
        values["model"]["prediction"]["self_condition"] = True
        (out / "recipe.json").write_text(json.dumps(values))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, str(WORKER), str(pictures), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return found


def record(out: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}-{rank}.json").read_text())
    return found


def test_together_they_see_the_pictures_of_one_process(outs: dict[int, Path]) -> None:
    alone = record(outs[1], "plain", 0)["seen"]
    parts = [record(outs[2], "plain", rank)["seen"] for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == alone
    assert len(alone) == 12 and len(alone[0]) == 4


@pytest.mark.parametrize("name", ["plain", "stopped", "poisoned"])
def test_the_processes_end_with_the_same_weights(outs: dict[int, Path], name: str) -> None:
    left, right = (load_file(outs[2] / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name", ["plain", "poisoned"])
def test_the_weights_are_those_of_one_process(outs: dict[int, Path], name: str) -> None:
    alone = load_file(outs[1] / f"{name}-0.safetensors")
    together = load_file(outs[2] / f"{name}-0.safetensors")
    for tensor in alone:
        torch.testing.assert_close(together[tensor], alone[tensor], rtol=0, atol=1e-6)


def test_the_losses_are_averaged(outs: dict[int, Path]) -> None:
    parts = [record(outs[2], "plain", rank)["losses"] for rank in (0, 1)]
    each = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    expected = [sum(each[i : i + 4]) / 4 for i in range(0, 12, 4)]  # a line is of two steps of two micro-batches
    assert [line["loss"] for line in lines(outs[2] / "plain")] == pytest.approx(expected, rel=1e-6)
    for left, right in zip(lines(outs[1] / "plain"), lines(outs[2] / "plain"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        by_level = [[loss for loss in line["loss_by_level"] if loss is not None] for line in (left, right)]
        assert by_level[0] == pytest.approx(by_level[1], rel=1e-5) and len(by_level[0]) == 1
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_a_stop_asked_of_one_process_stops_all_at_the_same_step(outs: dict[int, Path]) -> None:
    assert [record(outs[2], "stopped", rank)["step"] for rank in (0, 1)] == [3, 3]
    names = [p.name for p in (outs[2] / "stopped" / "checkpoints").iterdir()]
    assert names == ["step-00000003"]


def test_a_step_that_is_bad_in_one_process_is_left_out_by_all(outs: dict[int, Path]) -> None:
    for world in (1, 2):
        for rank in range(world):
            found = record(outs[world], "poisoned", rank)
            assert (found["step"], found["updates"]) == (6, 5)
        assert [line["skipped"] for line in lines(outs[world] / "poisoned")] == [0, 1, 0]


def test_a_whole_run_by_the_front_door(outs: dict[int, Path]) -> None:
    said = [json.loads((outs[2] / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[1] == []
    assert sum(line.startswith("finished: ") for line in said[0]) == 2
    assert any("going on from" in line and "at step 2" in line for line in said[0])
    for world in (1, 2):
        steps = [line["step"] for line in lines(outs[world] / "run") if "loss" in line]
        assert steps == [1, 2, 3, 4]
        assert {p.name for p in (outs[world] / "run").iterdir()} == {
            "checkpoints",
            "config.yaml",
            "metrics.jsonl",
            "model.safetensors",
            "samples",
        }
    # the noise is each process's own, so weights are close to those of one process, not equal
    alone, together = (load_file(outs[world] / "run" / "model.safetensors") for world in (1, 2))
    assert max(float((alone[n] - together[n]).abs().max()) for n in alone) < 0.02


def test_importance_sampling_is_the_same_in_all_processes_and_goes_on(outs: dict[int, Path]) -> None:
    for world in (1, 2):
        found = [
            load_file(outs[world] / f"adaptive-{name}-{rank}.safetensors")
            for name in ("straight", "halves")
            for rank in range(world)
        ]
        assert found[0]["counts"].tolist() == [2, 2, 2] and bool((found[0]["losses"] > 0).all())
        for other in found[1:]:
            assert all(torch.equal(other[n], found[0][n]) for n in found[0])


@pytest.mark.parametrize("name", ["alone", "judged", "halves"])
def test_a_first_stage_is_alike_in_all_processes(outs: dict[int, Path], name: str) -> None:
    """Weights, discriminator, both optimizers, and the counts of codes, which are those of all processes."""
    left, right = (load_file(outs[2] / f"codec-{name}-{rank}.safetensors") for rank in (0, 1))
    assert left.keys() == right.keys() and any(n.startswith("opponent ") for n in left) == (name != "alone")
    assert [n for n in left if not torch.equal(left[n], right[n])] == []


def test_a_codebook_learns_as_in_one_process(outs: dict[int, Path]) -> None:
    alone, together = (load_file(outs[world] / "codec-alone-0.safetensors") for world in (1, 2))
    assert int(alone["memory code_counts"].sum()) == 4 * 8 * 64
    assert torch.equal(alone["memory code_counts"], together["memory code_counts"])
    # Adam divides a small gradient, and its rounding, by its own size: 2.0e-5 was met on AVX2
    for name in (n for n in alone if n.startswith(("weights ", "average "))):
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=5e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_a_first_stage_goes_on_bit_for_bit(outs: dict[int, Path], world: int) -> None:
    straight, halves = (load_file(outs[world] / f"codec-{name}-0.safetensors") for name in ("judged", "halves"))
    assert [n for n in straight if not torch.equal(straight[n], halves[n])] == []


def test_the_command_itself_trains_together(tmp_path: Path) -> None:
    """Launched twice on a machine without a GPU, without a word on the device: one run, not two."""
    write_pictures(tmp_path / "pictures", 12)
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sfumato", "train"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings(tmp_path / "pictures", steps=2)))
    command = [sys.executable, *launcher, str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished: ") == 1
    assert [line["step"] for line in lines(out) if "loss" in line] == [1, 2]
