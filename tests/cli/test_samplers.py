"""`sfumato samplers`, `sfumato schedules`, and their names in `sfumato generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.io import write_model
from sfumato.diffusion.grid import GRIDS
from sfumato.diffusion.solvers import SOLVERS
from sfumato.images import read_settings
from sfumato.systems.ddpm import DDPM, DDPMConfig

from .. import tiny

MODEL = "cat-dog.safetensors"


def test_samplers_are_listed(place: Path, succeed: Callable) -> None:
    lines = succeed("samplers").out.splitlines()
    assert lines[0].split() == ["name", "title", "order", "evaluations", "noise", "also", "known", "as"]
    assert [line.split()[0] for line in lines[1:]] == sorted(SOLVERS)
    (heun,) = (line for line in lines if line.startswith("heun "))
    assert heun.split()[:5] == ["heun", "Heun", "2", "2", "no"] and "HeunDiscreteScheduler" in heun


def test_samplers_as_json(place: Path, succeed: Callable) -> None:
    told = {one["name"]: one for one in succeed("samplers", "--json").json}
    assert told.keys() == SOLVERS.keys()
    ancestral = told["euler_ancestral"]
    assert ancestral["stochastic"] and ancestral["order"] == 1 and "k_euler_a" in ancestral["aliases"]
    assert not told["dpmpp_2m"]["stochastic"] and told["dpmpp_2m"]["title"] == "DPM++ 2M"


def test_schedules_are_listed(place: Path, succeed: Callable) -> None:
    lines = succeed("schedules").out.splitlines()
    names = [line.split()[0] for line in lines[1:] if line.strip() and not line.startswith("also")]
    assert names == sorted(GRIDS) and "ddim50" in lines[-1]
    told = {one["name"]: one for one in succeed("schedules", "--json").json}
    assert told.keys() == GRIDS.keys() and "Karras 2022" in told["karras"]["summary"]


@pytest.mark.parametrize(
    ("options", "sampler", "schedule", "steps"),
    [
        (("--sampler", "DPM++ 2M Karras"), "dpmpp_2m", "karras", 3),
        (("--sampler", "DPM++ 2M Karras", "--schedule", "Beta"), "dpmpp_2m", "beta_t", 3),
        (("--sampler", "k_euler_a", "--schedule", "SGM Uniform"), "euler_ancestral", "sgm_uniform", 3),
        (("--sampler", "EulerDiscreteScheduler", "--schedule", "automatic"), "euler", "trailing", 3),
        (("--schedule", "ddim5"), "ddim", "ddim5", 5),
        (("--schedule", "2, 3"), "ddim", "2,3", 5),
        (("--sampler", "Restart", "--steps", 20), "heun", "restart", 20),
    ],
)
def test_any_programs_names(
    options: tuple[object, ...], sampler: str, schedule: str, steps: int, place: Path, succeed: Callable
) -> None:
    """The picture carries our own names, from which it can be drawn again."""
    succeed("generate", "--model", MODEL, "--seed", 3, *options, "--out", "a.png")
    made = read_settings(place / "a.png")
    assert (made["sampler"], made["schedule"], made["steps"]) == (sampler, schedule, steps)
    succeed("replay", "a.png", "--model", MODEL, "--out", "b.png")
    assert (place / "a.png").read_bytes() == (place / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sampler", "DDIM CFG++"), "CFG++ is a guidance here"),
        (("--sampler", "dpmpp_2mm"), "did you mean 'dpmpp_2m'?"),
        (("--schedule", "sgm_unifrom"), "did you mean 'sgm_uniform'?"),
        (("--schedule", "ddim5", "--steps", 7), "has 5 steps of its own, not 7"),
        (("--schedule", "ddim300",), "no whole stride gives 300"),
    ],
)
def test_refusals(options: tuple[object, ...], words: str, place: Path) -> None:
    done = tiny.run("generate", "--model", MODEL, "--seed", 3, *options, "--out", "a.png")
    assert done.code == 2 and words in done.err and len(done.err.splitlines()) == 1


def test_a_sampler_that_ignores_a_learned_variance_says_so(place: Path) -> None:
    values = tiny.model_config().model_dump() | {"prediction": {"learned_variance": True}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DDPM.create(DDPMConfig.model_validate(values))
    learned = place / "learned.safetensors"
    write_model(learned, model.tensors(), model.config.model_dump(mode="json"))
    for sampler, noted in [("ddpm", False), ("euler_ancestral", False), ("ddim", True), ("DPM++ 2M", True)]:
        options = ("--model", learned, "--seed", 1, "--sampler", sampler)
        done = tiny.succeed("generate", *options, "--out", f"{sampler}.png")
        notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
        assert len(notes) == noted
        if noted:
            assert "has learned the variance of its steps, which the sampler" in notes[0] and "ignores" in notes[0]
    done = tiny.succeed("generate", "--model", MODEL, "--seed", 1, "--sampler", "ddim", "--out", "plain.png")
    assert "note" not in done.err
