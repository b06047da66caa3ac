"""A training run from a recipe and a folder: everything is checked before the first step.

>>> differing({"a": {"b": 1}}, {"a": {"b": 2}})
['a.b: 1 -> 2']
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from sfumato import models
from sfumato.backends.devices import native_bfloat16
from sfumato.checkpoints.io import explain_os_error, write_bytes
from sfumato.errors import UserError
from sfumato.systems import open_system
from sfumato.systems.config import parse
from sfumato.training import state
from sfumato.training.config import RESUMABLE_CHANGES
from sfumato.training.data import CaptionUse, PictureSet, check_all, open_data
from sfumato.training.recipes import Recipe, read_values
from sfumato.training.recipes.autoencoder import AutoencoderRecipe
from sfumato.training.recipes.clip import CLIPRecipe
from sfumato.training.recipes.latent import LatentRecipe
from sfumato.training.trainer import Trainer

try:
    import fcntl
except ImportError:  # no such locks on this system, so runs are not guarded there
    fcntl = None  # type: ignore[assignment]

CONFIG, QUARANTINE, LOCK = "config.yaml", "quarantine.txt", ".lock"


def train(
    recipe: Recipe,
    run: Path,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> Literal["finished", "stopped", "dry run"]:
    """Train a recipe into a run folder.

    Ctrl-C, SIGTERM and SIGHUP save and stop: the answer is "stopped" for all of them, and the command's exit code 130.

    Args:
        recipe: validated, with its data path.
        run: created if it does not exist; one that holds another config, or is being trained, is refused.
        resume: "auto" goes on from the newest sound checkpoint if there is one; "never" wants an unused folder; or the
            path of a checkpoint, or of a run, to start from: into an unused folder, unless it is this run's own.
        dry_run: check everything, say what the run would take, and stop.
        device: None takes a GPU if there is one.
        say: told what a person should know.

    Raises:
        UserError: before anything is written, when something does not fit.
    """
    _check_folder(recipe, run, resume)
    if dry_run or int(os.environ.get("RANK", "0")) != 0:  # which torchrun gives to each of several processes
        return _train(recipe, run, resume, dry_run, device, say)
    with _held(run):
        return _train(recipe, run, resume, dry_run, device, say)


def _train(
    recipe: Recipe, run: Path, resume: str, dry_run: bool, device: torch.device | None, say: Callable[[str], None]
) -> Literal["finished", "stopped", "dry run"]:
    """What `train` does in a folder that nobody else trains in."""
    notes: list[str] = []
    start = _where_to_start(recipe, run, resume, notes.append)
    data, validation, bad = _checked_data(recipe)
    trainer = Trainer(recipe.task(data, validation), recipe.train, run, device)
    if trainer.rank != 0:
        say = _say_nothing
    if bad:
        say(_left_out(bad, None if dry_run else run / QUARANTINE))
    for note in notes:
        say(f"passed over a damaged checkpoint: {note}")
    if start is not None:
        _check_checkpoint(start, trainer)
        trainer.resume(start)
        if trainer.step > recipe.train.steps:
            raise UserError(
                f"{start} is at step {trainer.step} already, more than train.steps={recipe.train.steps}; "
                "ask for more steps, or start from an older checkpoint in a new folder (--resume CHECKPOINT)"
            )
        say(f"going on from {start} at step {trainer.step}")
        for change in trainer.changes:
            say(f"note: {change}")
    _describe(trainer, data, validation, say)
    if dry_run:
        return "dry run"
    if trainer.rank == 0:
        write_bytes(run / CONFIG, dump(recipe).encode())
        if bad:
            write_bytes(run / QUARANTINE, "".join(line + "\n" for line in bad).encode())
    trainer.train()
    if trainer.step < recipe.train.steps:
        return "stopped"
    if trainer.rank == 0:
        say(f"finished: {trainer.export()}")
    trainer.wait_for_all()
    return "finished"


def rehearse(recipe: Recipe, *, device: torch.device | None = None, say: Callable[[str], None] = print) -> None:
    """Do everything that a run does, once, in a folder that is removed again, and say what the whole would take.

    Every picture is opened; one step is trained, validated, sampled and saved; a second one resumes from that and
    finishes the model, which is read back. What a run does late (`AutoencoderRecipe.rehearsal`) is done at once.

    Raises:
        UserError: for whatever would stop the run.
    """
    short = {"log_every": 1, "validate_every": 1, "sample_every": 1, "save_every": 1, "sample_steps": 2, "samples": 4}
    settings = recipe.train.model_copy(update=short | {"validation_pictures": recipe.train.batch})
    early = recipe.rehearsal() if isinstance(recipe, AutoencoderRecipe) else recipe
    with tempfile.TemporaryDirectory(prefix="sfumato-check-") as folder:
        train(recipe, Path(folder) / "run", dry_run=True, device=device, say=say)
        for steps in (1, 2):
            again = early.model_copy(update={"train": settings.model_copy(update={"steps": steps})})
            train(again, Path(folder) / "run", device=device, say=_say_nothing)
        opened = open_system(Path(folder) / "run" / state.MODEL)
    say(f"checked: pictures, a step, validation, samples, saving, resuming, and the {opened.system.kind} model's file")


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, every default written out: its kind stands under `method`, so that it inherits nothing."""
    values = recipe.model_dump(mode="json")
    whole = {"method": values.pop("recipe"), **values}
    text: str = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    return text


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two configs and may not between a run and its resumption."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not _may_change(key, old.get(key), new.get(key)) and old.get(key) != new.get(key)
    ]


def _may_change(key: str, old: object, new: object) -> bool:
    if key == "train.precision" and "auto" in (old, new):  # the checkpoint tells which it was
        return True
    return any(key == free or key.startswith(f"{free}.") for free in RESUMABLE_CHANGES)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _left_out(bad: list[str], quarantine: Path | None) -> str:
    """A sentence on the bad pictures: where they are listed, or the first five where no list is written."""
    count = f"{len(bad)} pictures are bad and" if len(bad) > 1 else "1 picture is bad and"
    if quarantine is not None:
        return f"{count} left out; see {quarantine}"
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{count} left out: {'; '.join(bad[:5])}{more}"


@contextmanager
def _held(run: Path) -> Iterator[None]:
    """Hold the run's folder, made if there is none, against a second process; folders that stay empty go again.

    The lock ends with the process, however that ends. Where the system or the file system has no locks nothing is held.

    Raises:
        UserError: when another process trains there, or nothing can be written.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = None if fcntl is None else _locked(run)
    except OSError as error:
        raise UserError(f"could not write into {run}: {explain_os_error(error)}") from None
    try:
        yield
    finally:
        if file is not None:
            (run / LOCK).unlink(missing_ok=True)
            os.close(file)
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _locked(run: Path) -> int:
    """The run's lock file, open and locked, with this process's number in it. Raises as `_held` does."""
    path = run / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(file, 20).decode("ascii", "replace").strip()
            os.close(file)
            whose = f"process {number}" if number else "another process"
            raise UserError(f"{run} is being trained by {whose}; wait for it, or choose another folder") from None
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        os.close(file)  # it was removed between the two, by the process that had it


def _where_to_start(recipe: Recipe, run: Path, resume: str, note: Callable[[str], object]) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. Refuses folders that hold something else.

    `note` is told of damaged checkpoints that were passed over.
    """
    _check_folder(recipe, run, resume)
    if resume not in ("auto", "never"):
        return _checkpoint_at(Path(resume), note)
    return state.newest(run, note)


def _check_folder(recipe: Recipe, run: Path, resume: str) -> None:
    """Refuse a folder that holds something else, or that cannot be written."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; a run needs a folder")
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"{run} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{run} cannot be written: {there} is not writable; choose another folder")
    kept = run / CONFIG
    if not kept.is_file() and run.is_dir() and any(path.name != LOCK for path in run.iterdir()):
        raise UserError(f"{run} is not empty and is no training run; choose another folder")
    if kept.is_file():
        if resume == "never":
            raise UserError(
                f"{run} already holds a run; choose another folder, or leave --resume at auto to go on with it"
            )
        if resume != "auto" and not Path(resume).resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"{run} already holds a run, which --resume {resume} would overwrite; choose another folder for --out, "
                "or leave --resume at auto to go on with the run that is there"
            )
        _refuse_other_run(kept, recipe)


def _refuse_other_run(kept: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run whose config differs in more than may change."""
    before = read_values(str(kept))[1]
    with suppress(UserError):  # with what an older recipe did not know yet
        before = parse(type(recipe), before, str(kept)).model_dump(mode="json")
    changes = differing(before, recipe.model_dump(mode="json"))
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"{kept.parent} holds a run with another config ({'; '.join(changes[:3])}{more}); choose another folder"
        )


def _checkpoint_at(folder: Path, note: Callable[[str], object]) -> Path:
    """The checkpoint that `--resume FOLDER` means: the folder itself, or a run's newest."""
    if folder.is_file() or (not folder.exists() and str(folder) in models.names()):
        raise UserError(
            f"{folder} is a finished model, which training cannot be resumed from (a model does not keep the "
            "optimizer's state); give the folder of a run or of one of its checkpoints"
        )
    newest = state.newest(folder, note) if (folder / state.FOLDER).is_dir() else folder
    if newest is None:
        raise UserError(f"run {folder} has no checkpoint to start from")
    return newest


def _check_checkpoint(start: Path, trainer: Trainer) -> None:
    """Refuse a checkpoint of another model than the one to be trained, naming what differs."""
    changes = differing({"model": state.load(start).config}, {"model": trainer.task.model_config()})
    if changes:
        raise UserError(f"{start} holds another model than this recipe trains ({'; '.join(changes[:3])})")


def _say_nothing(_: str) -> None:
    """For all processes but the main one."""


def _checked_data(recipe: Recipe) -> tuple[PictureSet, PictureSet | None, list[str]]:
    """The training and validation pictures, every one of them opened once, and a line on each that is bad."""
    data, validation = open_data(recipe.data, _caption_use(recipe))
    bad = []
    for pictures in (data, validation):
        if pictures is not None:
            bad += [f"{b.key}: {b.reason}" for b in check_all(pictures)]
    return data, validation, bad


def _caption_use(recipe: Recipe) -> CaptionUse:
    """What a recipe wants of captions, so that those that it does not read stand in nobody's way."""
    if isinstance(recipe, CLIPRecipe):
        return "every"
    told = recipe.conditions.values() if isinstance(recipe, LatentRecipe) else ()
    named = any(condition.is_text or condition.column == "text" for condition in told)
    return "some" if named or recipe.data.label == "text" else "none"


def _describe(
    trainer: Trainer, data: PictureSet, validation: PictureSet | None, say: Callable[[str], None]
) -> None:
    parameters = sum(p.numel() for p in trainer.task.network.parameters())
    held_out = f", {len(validation):,} held out" if validation is not None else ""
    classes = f", {len(data.labels)} classes" if data.labels else ""
    say(
        f"{len(data):,} pictures{held_out}{classes}; {parameters / 1e6:.2f} M parameters on {trainer.device}, "
        f"{trainer.precision}"
    )
    if trainer.precision == "bf16" and not native_bfloat16(trainer.device):
        say("note: this device only emulates bfloat16, which is slow; train.precision=auto takes what suits it")
    if trainer.step < trainer.config.steps:
        say(str(trainer.estimate()))
