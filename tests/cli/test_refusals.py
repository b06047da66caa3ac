"""What cannot be done is refused with one clear sentence on stderr, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml

from sfumato.checkpoints.io import read_model, write_model
from sfumato.training import state

from .. import tiny

MODEL = ("--model", "cat-dog.safetensors")
FREE = ("--model", "free.safetensors")


@pytest.fixture(scope="module")
def spoilt(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with everything in it that can be wrong."""
    folder = tmp_path_factory.mktemp("spoilt") / "place"
    shutil.copytree(template, folder)
    with chdir(folder):
        _spoil_models(folder)
        _spoil_data(folder)
        _spoil_recipes(folder)
    return folder


def _spoil_models(folder: Path) -> None:
    Path("empty").mkdir()
    Path("nothing.safetensors").touch()
    Path("random.safetensors").write_bytes(os.urandom(4096))
    for name in ("pickle.ckpt", "pickle.safetensors"):
        torch.save({"weight": torch.ones(3)}, name)
    torch.save({"weight": torch.ones(3)}, "old.ckpt", _use_new_zipfile_serialization=False)
    whole = Path("cat-dog.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-100])
    file = read_model(folder / "cat-dog.safetensors")
    assert file.config is not None
    write_model("foreign.safetensors", {"weight": torch.ones(3)}, {"system": "dpm"})
    write_model("larger.safetensors", file.tensors, file.config | {"network": tiny.NETWORK | {"layers_per_block": 2}})
    write_model("typo.safetensors", file.tensors, file.config | {"sise": 8})
    write_model("odd.safetensors", file.tensors, file.config | {"network": tiny.NETWORK | {"norm_num_groups": 0}})
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    Path("taken.png").write_bytes(b"mine")


def _spoil_data(folder: Path) -> None:
    Path("bare").mkdir()
    for name in ("cut", "small"):
        tiny.write_pictures(folder / name)
    picture = Path("cut/cat/00.png")
    picture.write_bytes(picture.read_bytes()[:300])
    tiny.picture(1, size=6).save("small/dog/tiny.png")
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("not a run")


def _spoil_recipes(folder: Path) -> None:
    Path("malformed.yaml").write_text("recipe: ddpm\ntrain: {steps: 3\ndata: [")
    Path("list.yaml").write_text("- recipe\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00recipe")
    Path("alias.yaml").write_text("a: &a [1]\nb: *a\n")
    Path("stranger.yaml").write_text("recipe: ddmp\n")
    tiny.write_recipe(folder / "key.yaml", train={"steps": 3, "bacth": 4})
    tiny.write_recipe(folder / "network.yaml", model={"network": {"block_out_chanels": [16]}})
    tiny.write_recipe(folder / "sampler.yaml", model={"network": tiny.NETWORK, "sampling": {"sampler": "ddmi"}})
    tiny.write_recipe(folder / "objective.yaml", objective={"loss": "l3"})
    wide = yaml.safe_load(Path("tiny.yaml").read_text())
    wide["model"]["network"] = tiny.NETWORK | {"block_out_channels": [8, 16]}
    Path("wide.yaml").write_text(yaml.safe_dump(wide))


TRAIN = ("train", "tiny.yaml", "--out", "new")

# what is asked, and what the sentence must say
CASES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    # models
    "missing model": (("generate", "--model", "away/model.safetensors"), ("no model at away/model.safetensors",)),
    "a hub's name": (("generate", "--model", "org/sd-v1-5"), ("no file or folder org/sd-v1-5; nothing is downloaded",)),
    "misspelt model": (("generate", "--model", "cat-dgo.safetensors"), ("did you mean 'cat-dog.safetensors'?",)),
    "unknown name": (("generate", "--model", "dpm-emoji23"), ("no model or file is called 'dpm-emoji23'",)),
    "empty folder": (("generate", "--model", "empty"), ("empty is empty", "a model is a .safetensors file, a run")),
    "folder of something": (("generate", "--model", "notes"), ("notes holds no run, checkpoint or",)),
    "other pipeline": (("generate", "--model", "pipeline"), ("FluxPipeline", "DDPMPipeline")),
    "empty file": (("generate", "--model", "nothing.safetensors"), ("nothing.safetensors is not a safetensors file",)),
    "random bytes": (("generate", "--model", "random.safetensors"), ("random.safetensors is ",)),
    "cut file": (("generate", "--model", "cut.safetensors"), ("cut.safetensors is damaged",)),
    "pickle": (("generate", "--model", "pickle.ckpt"), ("is a pickle checkpoint", "allow it with --allow-pickle")),
    "old pickle": (("generate", "--model", "old.ckpt"), ("is a pickle checkpoint",)),
    "disguised pickle": (("generate", "--model", "pickle.safetensors"), ("is a pickle checkpoint",)),
    "not a model": (("generate", "--model", "taken.png"), ("taken.png is not a safetensors file",)),
    "unknown system": (("generate", "--model", "foreign.safetensors"), ("'dpm' (did you mean 'ddpm'?)",)),
    "config and weights": (("generate", "--model", "larger.safetensors"),
                           ("the weights of larger.safetensors do not fit its config", "is missing")),
    "config key": (("generate", "--model", "typo.safetensors"), ("unknown key 'sise' (did you mean 'size'?)",)),
    "config value": (("generate", "--model", "odd.safetensors"), ("odd.safetensors: network: ",)),
    "info of nothing": (("info", "away"), ("there is nothing at away",)),
    "info of a name": (("info", "emojy"), ("there is nothing at emojy (did you mean 'emoji'?)",)),
    "info of no picture": (("info", "taken.png"), ("'taken.png' is not a PNG, JPEG or WebP picture",)),
    "info of a plain picture": (("info", "pictures/cat/00.png"), ("carries no settings",)),
    "unknown card": (("models", "show", "nothing"), ("unknown model 'nothing'",)),
    # numbers and names
    "no steps": (("generate", *MODEL, "--steps", 0), ("--steps: must be at least 1, got 0", "sfumato generate --help")),
    "steps banana": (("generate", *MODEL, "--steps", "banana"), ("--steps: 'banana' is not a whole number",)),
    "steps 1.5": (("generate", *MODEL, "--steps", "1.5"), ("--steps: '1.5' is not a whole number",)),
    "too many steps": (("generate", *MODEL, "--steps", 1001), ("steps must be at most the schedule's 1000",)),
    "no count": (("generate", *MODEL, "--count", 0), ("--count: must be at least 1, got 0",)),
    "negative count": (("generate", *MODEL, "--count", -1), ("--count: must be at least 1, got -1",)),
    "negative seed": (("generate", *MODEL, "--seed", -2), ("--seed: must be at least 0, got -2",)),
    "seed of others": (("generate", *MODEL, "--seed", -1), ("--seed: ", "got -1; leave --seed out for a random one",)),
    "huge seed": (("generate", *MODEL, "--seed", 2**63), ("seed must be at least 0 and below 2^63",)),
    "sampler": (("generate", *MODEL, "--sampler", "ddmi"), ("unknown sampler 'ddmi' (did you mean 'ddim'?)",)),
    "schedule": (("generate", *MODEL, "--schedule", "karas"), ("unknown schedule 'karas' (did you mean 'karras'?)",)),
    "low guidance": (("generate", *MODEL, "--label", "cat", "--guidance", -1), ("--guidance: must be at least 0",)),
    "no number": (("generate", *MODEL, "--label", "cat", "--guidance", "nan"), ("--guidance: must be finite",)),
    "endless guidance": (("generate", *MODEL, "--label", "cat", "--guidance", "inf"), ("--guidance: must be finite",)),
    "guidance word": (("generate", *MODEL, "--guidance", "much"), ("--guidance: 'much' is not a number",)),
    "guidance without label": (("generate", *MODEL, "--guidance", 3), ("--guidance needs a --label",)),
    "guidance without labels": (("generate", *FREE, "--guidance", 3), ("--guidance needs a --label",)),
    "dtype": (("generate", *MODEL, "--dtype", "float23"), ("unknown dtype 'float23' (did you mean 'float32'?)",)),
    "device": (("generate", *MODEL, "--device", "toaster"), ("device 'toaster' cannot be used here",)),
    "device without memory": (("generate", *MODEL, "--device", "meta"), ("device 'meta' cannot be used here",)),
    # what the model cannot do
    "prompt": (("generate", "a fox", *MODEL), ("does not read text, so it takes no prompt", "cat, dog")),
    "empty prompt": (("generate", "", *MODEL), ("does not read text, so it takes no prompt",)),
    "negative prompt": (("generate", *FREE, "--negative", "fog"), ("takes no negative prompt",)),
    "label": (("generate", *MODEL, "--label", "dgo"), ("unknown label 'dgo' (did you mean 'dog'?)", "cat, dog")),
    "label among others": (("generate", *MODEL, "--label", "cat", "--label", "cow"), ("unknown label 'cow'",)),
    "label without labels": (("generate", *FREE, "--label", "cat"), ("this model has no class labels",)),
    "width": (("generate", *MODEL, "--width", 16), ("draws 8 x 8 pixels; width 16 cannot be had",)),
    "height": (("generate", *MODEL, "--width", 8, "--height", 9), ("height 9 cannot be had",)),
    "edit": (("edit", "taken.png", "brighter"), ("taken.png cannot be read as a picture",)),
    # where to write
    "taken file": (("generate", *MODEL, "--out", "taken.png"), ("taken.png exists already", "--overwrite")),
    "many into one": (("generate", *MODEL, "--count", 2, "--out", "a.png"), ("takes one picture, but 2", "--sheet")),
    "other format": (("generate", *MODEL, "--out", "a.gif"), ("a.gif: pictures are written as .png",)),
    "file as folder": (("generate", *MODEL, "--out", "tiny.yaml/a.png"), ("tiny.yaml is a file, not a folder",)),
    # how the command is called
    "option": (("generate", *MODEL, "--stepz", 3), ("unknown option '--stepz' (did you mean '--steps'?)",)),
    "their guidance": (("generate", *MODEL, "--cfg-scale", 7), ("'--cfg-scale' (did you mean '--guidance'?)",)),
    "their size": (("generate", "--size", 64), ("'--size' (did you mean '--width' and '--height'?)",)),
    "their scheduler": (("edit", "a.png", "--scheduler", "x"), ("(did you mean '--schedule' or '--sampler'?)",)),
    "their negative": (("edit", "a.png", "--negative_prompt", "x"), ("(did you mean '--negative'?)",)),
    "their strength": (("edit", "a.png", "--denoise", 1), ("'--denoise' (did you mean '--strength'?)",)),
    "strength elsewhere": (("generate", "--denoising-strength", 1), ("(sfumato edit has --strength)",)),
    "size elsewhere": (("edit", "a.png", "--size", 1), ("(sfumato generate has --width and --height)",)),
    "an option of edit": (("generate", "--mask", "a.png"), ("unknown option '--mask' (sfumato edit has it)",)),
    "their count": (("generate", "--batch-size", 2), ("'--batch-size' (did you mean '--count'?)",)),
    "their model": (("generate", "--ckpt", "a"), ("'--ckpt' (did you mean '--model'?)",)),
    "their prompt": (("generate", "--prompt", "a fox"), ("'--prompt' (prompts stand without an option",)),
    "what there is not": (("generate", "--controlnet", "a"), ("'--controlnet' (ControlNet is not supported)",)),
    "nor that": (("edit", "a.png", "--refiner", "a"), ("'--refiner' (a refiner is not supported)",)),
    "short option": (("generate", "-n", 3), ("unknown option '-n'",)),
    "option without value": (("generate", "--steps"), ("option '--steps' requires an argument",)),
    "command": (("genrate",), ("unknown command 'genrate' (did you mean 'generate'?)", "see sfumato --help")),
    "sub-command": (("recipes", "lst"), ("unknown command 'lst' (did you mean 'ls'?)", "see sfumato recipes --help")),
    "missing argument": (("train",), ("RECIPE: is missing", "see sfumato train --help")),
    "extra argument": (("doctor", "now"), ("got unexpected extra argument", "see sfumato doctor --help")),
    # recipes
    "recipe": (("train", "ddpm-emojy32", "--out", "new"), ("unknown recipe", "did you mean 'ddpm-emoji32'?")),
    "recipe file": (("train", "away.yaml", "--out", "new"), ("no recipe file at away.yaml",)),
    "malformed": (("train", "malformed.yaml", "--out", "new"), ("malformed.yaml: line 3: malformed YAML",)),
    "not a mapping": (("train", "list.yaml", "--out", "new"), ("list.yaml: a recipe is a mapping",)),
    "not text": (("train", "binary.yaml", "--out", "new"), ("binary.yaml cannot be read as text",)),
    "alias": (("train", "alias.yaml", "--out", "new"), ("YAML aliases are not allowed",)),
    "method": (("train", "stranger.yaml", "--out", "new"), ("got 'ddmp' (did you mean 'ddpm'?)",)),
    "key": (("train", "key.yaml", "--out", "new"), ("key.yaml: unknown key 'train.bacth' (did you mean 'batch'?)",)),
    "network key": (("recipes", "validate", "network.yaml"),
                    ("network.yaml: model: network: ", "did you mean 'block_out_channels'?")),
    "recipe's sampler": (("recipes", "validate", "sampler.yaml"), ("model.sampling.sampler", "did you mean 'ddim'?")),
    "recipe's loss": (("recipes", "validate", "objective.yaml"), ("objective", "'l3'")),
    "recipe's value": (("recipes", "validate", "tiny.yaml", "train.steps=0"), ("train.steps: ", "got 0")),
    "recipe's type": (("recipes", "validate", "tiny.yaml", "train.steps=many"), ("train.steps: ", "got 'many'")),
    "objective's type": (("recipes", "validate", "tiny.yaml", "objective.loss=3"), ("objective: loss: ", "got 3")),
    "network's type": (("recipes", "validate", "tiny.yaml", "model.network.layers_per_block=two"), ("tiny.yaml: ",)),
    "network's zero": (("recipes", "validate", "tiny.yaml", "model.network.norm_num_groups=0"), ("tiny.yaml: ",)),
    "network's block": (("recipes", "validate", "tiny.yaml", "model.network.down_block_types=[DownBlock2D, Up]"),
                        ("tiny.yaml: ", "'Up'")),
    "override": ((*TRAIN, "train.steps"), ("'train.steps' is not understood; write key=value",)),
    "override's key": ((*TRAIN, "train.step=3"), ("unknown key 'train.step' (did you mean 'steps'?)",)),
    "override's group": ((*TRAIN, "train.steps.x=3"), ("steps is a value, not a group of keys",)),
    "override's value": ((*TRAIN, "train.steps=[3"), ("the value is not readable YAML",)),
    # data
    "no data": (("train", "ddpm-emoji32", "--out", "new"), ("ddpm-emoji32 names no data", "--data")),
    "missing data": ((*TRAIN, "--data", "away"), ("data path 'away' does not exist",)),
    "empty data": ((*TRAIN, "--data", "bare"), ("data path 'bare' holds no pictures",)),
    "data of another kind": ((*TRAIN, "--data", "tiny.yaml"), ("neither a folder of pictures nor a parquet file",)),
    "cut picture": ((*TRAIN, "--data", "cut"), ("1 of ", "cat/00.png", "damaged")),
    "small picture": ((*TRAIN, "--data", "small"), ("dog/tiny.png", "smaller than asked: 6x6", "size is 8")),
    "label column": ((*TRAIN, "data.label=kind"), ("column 'kind' is not in",)),
    # runs
    "no run folder": (("train", "tiny.yaml"), ("--out RUN",)),
    "other config": (("train", "tiny.yaml", "--out", "run", "train.batch=2"),
                     ("run holds a run with another config", "train.batch: 4 -> 2")),
    "other network": (("train", "wide.yaml", "--out", "run"), ("model.network.block_out_channels",)),
    "no run": (("train", "tiny.yaml", "--out", "notes"), ("notes is not empty and is no training run",)),
    "run is a file": (("train", "tiny.yaml", "--out", "taken.png"), ("taken.png is a file; a run needs a folder",)),
    "used run": (("train", "tiny.yaml", "--out", "run", "--resume", "never"), ("run already holds a run",)),
    "no checkpoint": ((*TRAIN, "--resume", "away"), ("no checkpoint at away",)),
    "not a checkpoint": ((*TRAIN, "--resume", "notes"), ("notes has no readable manifest",)),
    "checkpoint into other run": (("train", "tiny.yaml", "--out", "run", "train.seed=5", "--resume", "run"),
                                  ("train.seed: 0 -> 5",)),
    "checkpoint of other model": (("train", "wide.yaml", "--out", "new", "--resume", "run"),
                                  ("holds another model", "network.block_out_channels")),
    "training device": ((*TRAIN, "--device", "toaster"), ("device 'toaster' cannot be used here",)),
    "batch and accumulation": ((*TRAIN, "train.accumulate=3"), ("train.batch 4 must be a multiple",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, spoilt: Path, run: Callable[..., tiny.Result]) -> None:
    arguments, said = CASES[case]
    before = tiny.tree(spoilt)
    with chdir(spoilt):
        result = run(*arguments)
    assert result.code == 2, result
    sentence = _one_sentence(result.err)
    for part in said:
        assert part in sentence, sentence
    assert tiny.tree(spoilt) == before


def _one_sentence(err: str) -> str:
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("sfumato: ")
    return lines[0]


# --- a disk that fills up -----------------------------------------------------------------------------------------


class FullDisk:
    """`os.fsync` that succeeds a number of times and then finds the disk full, as it does for delayed allocation."""

    def __init__(self, after: int) -> None:
        self.left, self.fsync = after, os.fsync

    def __call__(self, descriptor: int) -> None:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self.fsync(descriptor)


@pytest.mark.parametrize("out", ["a.png", "new/deep/a.webp", "folder"])
def test_full_disk_leaves_no_picture(place: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    before = tiny.tree(place)
    monkeypatch.setattr(os, "fsync", FullDisk(after=0))
    result = run("generate", *MODEL, "--seed", 1, "--steps", 1, "--out", out)
    assert result.code == 2
    sentence = _one_sentence(result.err)
    assert out in sentence and ("No space left on device" in sentence or "disk is full" in sentence)
    assert tiny.tree(place) == before


def test_full_disk_keeps_the_old_picture(place: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run("generate", *MODEL, "--seed", 1, "--steps", 1, "--out", "a.png")
    before = tiny.tree(place)
    monkeypatch.setattr(os, "fsync", FullDisk(after=0))
    assert run("generate", *MODEL, "--seed", 2, "--steps", 1, "--out", "a.png", "--overwrite").code == 2
    assert tiny.tree(place) == before


def test_full_disk_between_pictures_keeps_whole_ones(
    place: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", FullDisk(after=2))
    assert run("generate", *MODEL, "--seed", 1, "--count", 4, "--steps", 1, "--out", "many").code == 2
    assert sorted(p.name for p in (place / "many").iterdir()) == ["1.png", "2.png"]


@pytest.mark.parametrize("after", [1, 2, 4, 6, 7])
def test_full_disk_leaves_no_half_checkpoint(
    place: Path, run: Callable, succeed: Callable, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """One write is the run's config; then come four files, the manifest, and two folders of the first checkpoint."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FullDisk(after))
        result = run("train", "tiny.yaml", "--out", "mine")
    assert result.code == 2
    assert "the disk is full" in _one_sentence(result.err)
    checkpoints = place / "mine/checkpoints"
    assert not list(place.rglob("*tmp*")) and not list(place.rglob(".*"))
    for kept in checkpoints.iterdir() if checkpoints.is_dir() else []:
        assert state.damage(kept) is None
    assert not (place / "mine/model.safetensors").exists()
    succeed("train", "tiny.yaml", "--out", "mine")
    assert (place / "mine/model.safetensors").read_bytes() == (place / "run/model.safetensors").read_bytes()


def test_full_disk_keeps_the_older_checkpoint(
    place: Path, run: Callable, succeed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FullDisk(after=11))
        result = run("train", "tiny.yaml", "--out", "mine")
    assert result.code == 2 and "step-00000004" in _one_sentence(result.err)
    assert [p.name for p in (place / "mine/checkpoints").iterdir()] == ["step-00000002"]
    assert "at step 2" in succeed("train", "tiny.yaml", "--out", "mine").out
    assert (place / "mine/model.safetensors").read_bytes() == (place / "run/model.safetensors").read_bytes()


def test_other_errors_of_the_file_system_are_sentences(place: Path, run: Callable) -> None:
    shutil.copytree("run", "mine")
    (place / "mine/metrics.jsonl").unlink()
    (place / "mine/metrics.jsonl").mkdir()
    result = run("train", "tiny.yaml", "--out", "mine", "train.steps=7")
    assert result.code == 2 and "metrics.jsonl: it is a folder" in _one_sentence(result.err)


def test_result_that_is_no_picture(place: Path, run: Callable) -> None:
    file = read_model(place / "cat-dog.safetensors")
    broken = {name: tensor * float("nan") for name, tensor in file.tensors.items()}
    write_model("broken.safetensors", broken, file.config or {})
    before = tiny.tree(place)
    result = run("generate", "--model", "broken.safetensors", "--steps", 1, "--seed", 0)
    assert result.code == 3 and "values that are not finite" in _one_sentence(result.err)
    assert tiny.tree(place) == before


def test_losses_that_are_not_finite_stop_the_run(place: Path, run: Callable) -> None:
    result = run("train", "tiny.yaml", "--out", "mine", "train.optimizer.lr=1e30", "train.optimizer.clip_norm=0",
                 "train.optimizer.warmup=0", "train.steps=12", "train.sample_every=0", "train.validate_every=0",
                 "train.save_every=100")  # fmt: skip
    assert result.code == 3 and "not finite" in _one_sentence(result.err)


# --- the command itself, as its own process -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "--steps", "banana"), "--steps: 'banana' is not a whole number"),
        (("generate", "--model", "away.safetensors"), "no model at away.safetensors"),
        (("recipes", "show", "ddpm-emojy32"), "did you mean 'ddpm-emoji32'?"),
    ],
)
def test_refused_in_a_process_of_its_own(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert said in _one_sentence(done.stderr)
    assert tiny.tree(tmp_path) == {}
