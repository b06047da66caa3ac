"""The trainer: resuming is bit-exact, bad steps leave no trace, and looking at a run does not change it."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.backends import compiled, convolutions, winograd
from sfumato.checkpoints.io import read_model
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.objective import Loss
from sfumato.errors import ModelFileError, UserError
from sfumato.training import state
from sfumato.training.config import OptimizerConfig, TrainConfig
from sfumato.training.data import Batch, DataConfig, PictureSet, open_data
from sfumato.training.trainer import Tally, Trainer, TrainingFailed, level_bin

from .training_cases import (
    CPU,
    assert_equal,
    contents,
    everything,
    lines,
    recipe_from,
    resumed,
    settings,
    trainer_for,
    write_pictures,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


class LineTask:
    """A linear map of each picture onto noise of its own, so that a step depends on its pictures alone."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.data, self.validation = open_data(DataConfig(path=str(folder), size=8, **options))
        torch.manual_seed(5)
        self.network: nn.Module = nn.Linear(3 * 8 * 8, 4)
        self.seen: list[list[int]] = []
        self.poison: dict[int, float] = {}  # number of the call: what the loss is multiplied by
        self.bad_pictures: set[int] = set()

    def wrap(self, prepare: Any) -> None:
        raise AssertionError("only with several processes")

    def begin(self, step: int) -> None:
        pass

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        x = batch.to_float().flatten(1)
        noise = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(int(i))) for i in batch.indices])
        error = (self.network(x) - noise).square().mean(1)
        value = error.mean() * self.poison.get(len(self.seen), 1.0)
        if self.bad_pictures & set(batch.indices.tolist()):
            value = value * float("nan")
        self.seen.append(batch.indices.tolist())
        half = torch.full((len(x),), 0.5, dtype=torch.float64)
        return Loss(value, error.detach(), NoiseLevel(half, half.sqrt(), half.sqrt()), error)

    def draw(self, count: int, steps: int) -> Image.Image:
        weight = next(self.network.parameters()).detach()
        return Image.new("RGB", (count, steps), (int(weight.sum().abs() * 10) % 256, 0, 0))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"line.{n}": t for n, t in weights.items()}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix("line."): t for n, t in tensors.items()}

    def model_config(self) -> dict[str, Any]:
        return {"system": "line"}

    def finished(self, weights: Any) -> Any:
        return self.tensors(dict(weights)), self.model_config()


def line_trainer(folder: Path, run: Path, options: dict[str, Any] | None = None, **train: Any) -> Trainer:
    few = {"steps": 8, "batch": 4, "validate_every": 0, "sample_every": 0, "log_every": 1, "save_every": 1000}
    config = TrainConfig.model_validate(few | train)
    return Trainer(LineTask(folder, **(options or {})), config, run, CPU)


# --- resuming

IMPORTANCE = {"importance": "second_moment", "importance_history": 1}

RICH: dict[str, Any] = {
    "plain": {},
    "accumulate": {"train": {"accumulate": 2}},
    "everything": {
        "train": {"accumulate": 2, "channels_last": True, "ema": {"decay": 0.9}},
        "data": {"flip": True},
        "network": {"dropout": 0.3},
        "label_dropout": 0.4,
        "prediction": {"self_condition": True},
    },
    "bf16, row-major": {"train": {"precision": "bf16", "channels_last": False}, "network": {"dropout": 0.2}},
    "fp16": {"train": {"precision": "fp16"}},
    "recomputed": {
        "train": {"gradient_checkpointing": True},
        "network": {"dropout": 0.3},
        "data": {"random_crop": True},
    },
    "learned variance": {
        "prediction": {"learned_variance": True, "parameterization": "eps"},
        "objective": {"vlb_weight": 0.001},
        "train": {"ema": {"decay": 0.0}, "optimizer": {"schedule": "linear", "clip_norm": 0, "weight_decay": 0.1}},
    },
    "importance": {"objective": IMPORTANCE, "schedule": {"name": "cosine", "steps": 3}, "train": {"accumulate": 2}},
    "coloured noise": {
        "objective": {"density": "log_normal", "pyramid_noise": 0.8, "input_perturbation": 0.1, "offset_noise": 0.1}
    },
}


def rich(data: Path, case: dict[str, Any], **train: Any) -> Any:
    """The recipe of a case; 10 pictures in batches of 4, so epochs end inside batches 2, 5 and 7."""
    values = settings(data, **(train | case.get("train", {})))
    values["data"] |= case.get("data", {}) | {"upscale": True}
    values["model"]["network"] = values["model"]["network"] | case.get("network", {})
    values["model"]["prediction"] |= case.get("prediction", {})
    values["objective"] = case.get("objective", {})
    values["model"]["schedule"] = case.get("schedule", values["model"]["schedule"])
    values["label_dropout"] = case.get("label_dropout", 0.1)
    return recipe_from(values)


@pytest.mark.parametrize("name", RICH)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, data: Path, name: str) -> None:
    # the schedule of the learning rate depends on the number of steps, so the first half stops by itself
    recipe = rich(data, RICH[name], steps=6)
    straight = trainer_for(recipe, tmp_path / "straight")
    straight.train()
    first = trainer_for(rich(data, RICH[name], steps=6, save_every=3), tmp_path / "halves")
    stop_after(first, 3)
    first.train()
    assert first.step == 3
    second = resumed(recipe, tmp_path / "halves")
    assert_equal(everything(second), everything(first))
    second.train()
    assert second.step == 6
    assert_equal(everything(second), everything(straight))
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        left, right = (tmp_path / run / "checkpoints" / "step-00000006" / file for run in ("straight", "halves"))
        if file.endswith("json"):
            assert left.read_bytes() == right.read_bytes()
        else:
            assert_equal(read_model(left).tensors, read_model(right).tensors)
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("straight", "halves")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["plain", "everything", "recomputed"])
def test_convolutions_with_fewer_products(
    tmp_path: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They learn what those by the definition do, up to rounding, and resume bit for bit."""
    monkeypatch.setattr(convolutions, "LEAST_IN_TRAINING", 8)
    monkeypatch.setattr(convolutions, "LEAST_WORK", 0)
    test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, data, name)
    direct = trainer_for(rich(data, RICH[name], steps=6, convolution="direct"), tmp_path / "direct")
    assert not [m for m in direct.task.network.modules() if isinstance(m, convolutions.Learning)]
    direct.train()
    assert not winograd.work._kept
    own, fewer = everything(direct), everything(resumed(rich(data, RICH[name], steps=6), tmp_path / "straight"))
    weights = [name for name in own if name.startswith("weights ")]
    assert all(torch.allclose(own[name], fewer[name], atol=1e-4) for name in weights)
    assert not all(torch.equal(own[name], fewer[name]) for name in weights)


def test_importance_sampling_remembers_what_training_saw_and_validation_does_not_move(
    tmp_path: Path, data: Path
) -> None:
    case = RICH["importance"] | {"data": {"validation_fraction": 0.3}}
    trainer = trainer_for(rich(data, case, steps=6, validate_every=2), tmp_path / "run")
    history = trainer.history
    assert history is not None
    trainer.estimate()
    assert int(history.counts.sum()) == 0
    trainer.train()
    assert history.warm and not torch.equal(history.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    kept = history.tensors()
    before = trainer.validate()
    history.record(torch.tensor([0, 1]), torch.tensor([100.0, 1e-3]))
    assert trainer.validate() == before
    history.restore(kept)
    trainer.validate()
    assert all(torch.equal(t, kept[n]) for n, t in history.tensors().items())


def test_a_step_that_is_left_out_is_not_remembered(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(rich(data, RICH["importance"], steps=2), tmp_path / "run")
    loss = trainer.task.loss

    def poisoned(*args: Any) -> Loss:
        found = loss(*args)
        return replace(found, value=found.value * float("nan")) if trainer.step == 1 else found

    monkeypatch.setattr(trainer.task, "loss", poisoned)
    seen = []
    assert trainer.history is not None
    monkeypatch.setattr(trainer.history, "record", lambda parts, losses: seen.append((len(parts), len(losses))))
    trainer.train()
    assert seen == [(4, 4)]


def test_a_checkpoint_with_another_importance_sampling_is_refused(tmp_path: Path, data: Path) -> None:
    plain, adaptive = RICH["plain"], RICH["importance"]
    longer = adaptive | {"objective": IMPORTANCE | {"importance_history": 2}}
    for name, made, opened in (("a", plain, adaptive), ("b", adaptive, plain), ("c", adaptive, longer)):
        first = trainer_for(rich(data, made, steps=2), tmp_path / name)
        first.train()
        with pytest.raises(ModelFileError, match="importance sampling"):
            resumed(rich(data, opened, steps=4), tmp_path / name)



def stop_after(trainer: Trainer, steps: int) -> None:
    """Ask for a stop once so many steps are done, as Ctrl-C does."""
    one_step = trainer._one_step

    def counted(*args: Any) -> float:
        norm = one_step(*args)
        trainer.stop_asked = trainer.step >= steps
        return norm

    trainer._one_step = counted  # type: ignore[method-assign]


def test_every_step_draws_its_own_noise_and_every_epoch_all_pictures(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path, steps=5)
    trainer.train()
    seen = [i for batch in trainer.task.seen for i in batch]  # type: ignore[attr-defined]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path / "run", steps=1)
    trainer.train()
    folder = state.newest(tmp_path / "run")
    assert folder is not None
    with pytest.raises(UserError, match="data have changed .*: 10 pictures then, 12 now"):
        line_trainer(write_pictures(tmp_path / "more", 12), tmp_path / "run").resume(folder)
    other = write_pictures(tmp_path / "renamed")
    (other / "bird" / "00.png").rename(other / "bird" / "aa.png")
    with pytest.raises(UserError, match="other names or classes"):
        line_trainer(other, tmp_path / "run").resume(folder)
    with pytest.raises(UserError, match="other names or classes"):
        line_trainer(data, tmp_path / "run", {"label": "folder"}).resume(folder)
    line_trainer(write_pictures(tmp_path / "moved"), tmp_path / "run").resume(folder)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, data: Path) -> None:
    line_trainer(data, tmp_path / "run", steps=1).train()
    folder = state.newest(tmp_path / "run")
    assert folder is not None
    task = LineTask(data)
    task.network = nn.Linear(3 * 8 * 8, 5)
    trainer = Trainer(task, TrainConfig(batch=4), tmp_path / "run", CPU)
    with pytest.raises(ModelFileError, match="weight has shape"):
        trainer.resume(folder)


# --- accumulation, clipping, learning rate


def test_accumulation_gives_the_same_update(tmp_path: Path, data: Path) -> None:
    whole = line_trainer(data, tmp_path / "1", {"flip": True}, accumulate=1)
    parts = line_trainer(data, tmp_path / "2", {"flip": True}, accumulate=2)
    whole.train()
    parts.train()
    pairs = iter(parts.task.seen)  # type: ignore[attr-defined]
    assert [a + next(pairs) for a in pairs] == whole.task.seen  # type: ignore[attr-defined]
    for left, right in zip(whole.task.network.parameters(), parts.task.network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    for left, right in zip(lines(tmp_path / "1"), lines(tmp_path / "2"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_a_batch_must_divide(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch 4 must be a multiple of accumulate x processes \(3 x 1\)"):
        line_trainer(data, tmp_path, accumulate=3).train()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 0.5 + 0.5**1.5, 0.5, 0.0]),
    ],
)
def test_learning_rate(tmp_path: Path, data: Path, schedule: Any, expected: list[float]) -> None:
    optimizer = OptimizerConfig(lr=2e-3, warmup=20, schedule=schedule)
    trainer = line_trainer(data, tmp_path, steps=100, optimizer=optimizer)
    found = [trainer.learning_rate(step) / 2e-3 for step in (9, 20, 40, 60, 100)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert trainer.learning_rate(0) == pytest.approx(2e-3 / 20)


def test_the_optimizer_gets_the_learning_rate_of_the_step(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path, optimizer=OptimizerConfig(lr=1e-3, warmup=4))
    trainer.train()
    assert [line["lr"] for line in lines(tmp_path)] == [trainer.learning_rate(step) for step in range(8)]
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.learning_rate(7)


def test_the_gradient_is_clipped(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for clip in (0.01, 0.0):
        trainer = line_trainer(data, tmp_path / str(clip), steps=1, optimizer=OptimizerConfig(clip_norm=clip))
        step = trainer.optimizer.step

        def measured(*args: Any, step: Any = step, trainer: Trainer = trainer) -> Any:
            norms.append(float(torch.cat([p.grad.flatten() for p in trainer.task.network.parameters()]).norm()))  # type: ignore[union-attr]
            return step(*args)

        monkeypatch.setattr(trainer.optimizer, "step", measured)
        trainer.train()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    reported = [lines(tmp_path / str(clip))[0]["grad_norm"] for clip in (0.01, 0.0)]
    assert reported[0] == reported[1] == pytest.approx(norms[1], rel=1e-6)


# --- steps that are not finite


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], poison: float, accumulate: int
) -> None:
    trainer = line_trainer(data, tmp_path, steps=3, accumulate=accumulate)
    trainer.task.poison = {3 * accumulate - 1: poison}  # type: ignore[attr-defined]
    stop_after(trainer, 2)
    trainer.train()
    before = everything(trainer)
    trainer._one_step = type(trainer)._one_step.__get__(trainer)  # type: ignore[method-assign]
    trainer.train()
    after = everything(trainer)
    assert after.pop("counters").tolist() == [3, 2]
    assert before.pop("counters").tolist() == [2, 2]
    assert_equal(after, before)
    last = lines(tmp_path)[-1]
    assert (last["loss"], last["grad_norm"], last["skipped"]) == (None, None, 1)
    assert last["loss_by_level"] == [None] * 8
    said = capsys.readouterr().out
    assert "step 2: loss or gradient is not finite; the step is left out (pictures " in said
    assert ".png" in said


def test_a_gradient_that_overflows_is_left_out_too(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path, steps=2)
    trainer.task.network.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr, operator]
    before = everything(trainer)
    trainer.train()
    after = everything(trainer)
    assert after.pop("counters").tolist() == [2, 0]
    del before["counters"]
    assert_equal(after, before)
    line = lines(tmp_path)[0]
    assert line["grad_norm"] is None and line["skipped"] == 1 and line["loss"] > 0


def test_a_skipped_step_equals_a_run_without_it(tmp_path: Path, data: Path) -> None:
    config = {"steps": 4, "optimizer": OptimizerConfig(schedule="constant", warmup=0), "log_every": 2}
    hurt = line_trainer(data, tmp_path / "hurt", **config)
    hurt.task.poison = {1: float("nan")}  # type: ignore[attr-defined]
    hurt.train()
    spared = line_trainer(data, tmp_path / "spared", **config)
    one_step = spared._one_step

    def skipping(stream: Any, *args: Any) -> float:
        if spared.step == 1:
            next(stream)
            spared.step = 2
        return one_step(stream, *args)

    spared._one_step = skipping  # type: ignore[method-assign]
    spared.train()
    assert_equal(everything(hurt), everything(spared))
    first = lines(tmp_path / "hurt")[0]
    assert first["step"] == 2 and first["skipped"] == 1 and first["loss"] > 0


def test_three_in_a_row_end_the_run(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path, steps=20, save_every=1)
    nan = float("nan")
    trainer.task.poison = {1: nan, 2: nan, 4: nan, 5: nan, 6: nan}  # type: ignore[attr-defined]
    with pytest.raises(TrainingFailed, match="3 steps in a row were not finite, up to step 6; lower train.opt"):
        trainer.train()
    found = state.newest(tmp_path)
    assert found is not None and found.name == "step-00000006"
    assert all(torch.isfinite(t).all() for t in state.load(found).tensors.values())


def test_fp16_looks_for_its_scale_and_gives_up_only_when_that_does_not_help(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path / "scale", steps=12, precision="fp16")
    limit = 2.0**12
    weight = trainer.task.network.weight
    weight.register_hook(lambda grad: grad if trainer.scaler.get_scale() < limit else grad * float("inf"))  # type: ignore[union-attr, operator]
    trainer.train()
    assert trainer.scaler.get_scale() == limit / 2
    assert trainer.ema.updates == 12 - sum(line["skipped"] for line in lines(tmp_path / "scale")) == 7
    hopeless = line_trainer(data, tmp_path / "hopeless", steps=40, precision="fp16")
    hopeless.task.network.weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingFailed):
        hopeless.train()
    assert hopeless.ema.updates == 0


# --- what is reported


def test_level_bins() -> None:
    edges = torch.tensor([-9, -3.0, -2.99, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.0, 3.01, 99], dtype=torch.float64)
    assert level_bin(edges).tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7]


def test_loss_by_level() -> None:
    level = torch.tensor([-5.0, -5.0, 0.5, 5.0], dtype=torch.float64)
    alpha = torch.sigmoid(2 * level).sqrt()
    sigma = torch.sigmoid(-2 * level).sqrt()
    each = torch.tensor([1.0, 2.0, 4.0, 8.0])
    tally = Tally()
    tally.add(Loss(each.mean(), each, NoiseLevel(level, alpha, sigma), each))
    assert tally.by_level() == [1.5, None, None, None, 4.0, None, None, 8.0]
    assert tally.mean == pytest.approx(3.75)


def held_out(data: Path, **train: Any) -> Any:
    values = settings(data, **train)
    values["data"]["validation_fraction"] = 0.4
    return recipe_from(values)


def test_metrics_have_the_documented_keys(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(held_out(data, steps=4, log_every=2, validate_every=4), tmp_path)
    trainer.train()
    first, second, validation = lines(tmp_path)
    assert list(first) == [
        "step",
        "loss",
        "loss_by_level",
        "lr",
        "grad_norm",
        "skipped",
        "pictures_per_second",
        "data_wait_share",
        "seconds_left",
    ]
    assert list(validation) == ["step", "validation_loss", "validation_by_level"]
    assert [first["step"], second["step"], validation["step"]] == [2, 4, 4]
    assert len(first["loss_by_level"]) == len(validation["validation_by_level"]) == 8
    assert first["skipped"] == 0 and first["pictures_per_second"] > 0
    assert 0 <= first["data_wait_share"] <= 1
    assert second["seconds_left"] == 0


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path, data: Path) -> None:
    line_trainer(data, tmp_path, steps=5, save_every=2).train()
    whole = lines(tmp_path)
    shorter = tmp_path / "checkpoints" / "step-00000004"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a crash in the middle of a line
    again = line_trainer(data, tmp_path, steps=5)
    again.resume(shorter)
    again.train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in whole]


def test_validation_is_deterministic_and_changes_nothing(tmp_path: Path, data: Path) -> None:
    recipe = held_out(data, steps=3, ema={"decay": 0.5})
    trainer = trainer_for(recipe, tmp_path)
    trainer.train()
    before = everything(trainer)
    first = trainer.validate()
    torch.rand(5)
    assert trainer.validate() == first
    assert_equal(everything(trainer), before)
    limited = trainer_for(held_out(data, steps=3, validation_pictures=3), tmp_path)
    counted: list[int] = []
    loss = limited.task.loss

    def counting(batch: Batch, *args: Any) -> Loss:
        counted.append(len(batch.indices))
        return loss(batch, *args)

    limited.task.loss = counting  # type: ignore[method-assign]
    limited.validate()
    assert sum(counted) == 3


def test_looking_at_a_run_does_not_change_it(tmp_path: Path, data: Path) -> None:
    """Estimates, validation, sample sheets and checkpoints leave the weights bit-equal."""
    plain = trainer_for(held_out(data, steps=4), tmp_path / "plain")
    plain.train()
    watched = trainer_for(
        held_out(data, steps=4, validate_every=1, sample_every=1, save_every=1, samples=2, sample_steps=2),
        tmp_path / "watched",
    )
    before = everything(watched)
    estimate = watched.estimate()
    assert_equal(everything(watched), before)
    assert all(p.grad is None for p in watched.task.network.parameters())
    assert estimate.steps == 4 and estimate.seconds_per_step > 0 and (estimate.memory or 0) > 2**20
    assert str(estimate).startswith("about ") and "4 steps" in str(estimate)
    watched.train()
    assert_equal(everything(watched), everything(plain))


def test_a_sample_sheet_is_written(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(held_out(data, steps=4, sample_every=3, samples=2, sample_steps=2), tmp_path)
    trainer.train()
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in sheets] == ["step-00000003.png", "step-00000004.png"]
    with Image.open(sheets[0]) as picture:
        assert picture.format == "PNG" and picture.width >= 2 * 8


def test_bf16_trains(tmp_path: Path, data: Path) -> None:
    values = settings(data, steps=3, precision="bf16")
    trainer = trainer_for(recipe_from(values), tmp_path)
    before = everything(trainer)
    trainer.train()
    assert {p.dtype for p in trainer.task.network.parameters()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in everything(trainer).values())
    assert not torch.equal(everything(trainer)["weights conv_in.weight"], before["weights conv_in.weight"])


# --- torch's compiler


def test_what_learns_is_compiled_and_the_rest_is_not(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go through the compiled call, validation and samples do not, and the same comes out."""
    calls: list[bool] = []

    def stand_in(function: Any, **options: Any) -> Any:
        def called(*args: Any, **slots: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return function(*args, **slots)

        return called

    often = {"steps": 3, "validate_every": 3, "sample_every": 3}
    plain = trainer_for(recipe_from(settings(data, **often)), tmp_path / "plain")
    plain.train()
    monkeypatch.setattr(compiled, "refused", lambda device: None)
    monkeypatch.setattr(torch, "compile", stand_in)
    other = trainer_for(recipe_from(settings(data, **often, compile=True)), tmp_path / "compiled")
    other.train()
    assert calls == [True] * 3
    assert_equal(everything(other), everything(plain))


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="train.compile is for networks that denoise"):
        line_trainer(data, tmp_path / "line", compile=True)
    monkeypatch.setattr(compiled, "refused", lambda device: "no g++")
    with pytest.raises(UserError, match=r"train.compile cannot be used here: .*\(no g\+\+\)"):
        trainer_for(recipe_from(settings(data, compile=True)), tmp_path / "run")


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_resumes_exactly(tmp_path: Path, data: Path) -> None:
    if (reason := compiled.refused(CPU)) is not None:
        pytest.skip(reason)
    plain = trainer_for(recipe_from(settings(data, steps=4)), tmp_path / "plain")
    plain.train()
    recipe = recipe_from(settings(data, steps=4, compile=True))
    straight = trainer_for(recipe, tmp_path / "straight")
    straight.train()
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("plain", "straight")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    first = trainer_for(recipe_from(settings(data, steps=4, save_every=2, compile=True)), tmp_path / "halves")
    stop_after(first, 2)
    first.train()
    second = resumed(recipe, tmp_path / "halves")
    second.train()
    assert_equal(everything(second), everything(straight))


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_the_finished_model_holds_the_averages(tmp_path: Path, data: Path, name: str, dtype: torch.dtype) -> None:
    trainer = line_trainer(data, tmp_path, steps=3, export=name)
    trainer.train()
    file = read_model(trainer.export())
    assert file.path == tmp_path / "model.safetensors"
    assert file.config == {"system": "line"}
    assert torch.equal(file.tensors["line.weight"], trainer.ema.averages["weight"].to(dtype))


def test_failing_to_write_is_one_sentence(tmp_path: Path, data: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="could not write .*metrics.jsonl: it is a folder"):
        line_trainer(data, tmp_path / "run").train()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples").write_text("in the way")
    with pytest.raises(UserError, match="could not write .*step-00000001.png"):
        line_trainer(data, tmp_path / "other", sample_every=1).train()


# --- being stopped


def interrupt(trainer: Trainer, after: int, times: int = 1) -> None:
    """Send real interrupts from another thread once so many steps are done."""
    one_step = trainer._one_step
    arrived = threading.Event()

    def kill() -> None:
        arrived.wait(30)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=kill, daemon=True).start()

    def announced(*args: Any) -> float:
        norm = one_step(*args)
        if trainer.step == after:
            arrived.set()
            for _ in range(200):  # the signal is handled between bytecodes of this thread
                if trainer.stop_asked:
                    break
                threading.Event().wait(0.01)
        return norm

    trainer._one_step = announced  # type: ignore[method-assign]


def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_from(settings(data, steps=6))
    straight = trainer_for(recipe, tmp_path / "straight")
    straight.train()
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_for(recipe, tmp_path / "stopped")
    interrupt(trainer, after=2)
    trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.step == 2
    said = capsys.readouterr().out
    assert "stopping after this step" in said and "stopped and saved at step 2" in said
    second = resumed(recipe, tmp_path / "stopped")
    second.train()
    assert_equal(everything(second), everything(straight))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path, steps=50)
    handler = signal.getsignal(signal.SIGINT)
    one_step = trainer._one_step

    def twice(*args: Any) -> float:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(*args)

    trainer._one_step = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 3
    assert state.newest(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_save_too_however_often_they_come(tmp_path: Path, data: Path, name: str) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} here")
    trainer = line_trainer(data, tmp_path, steps=50)
    outside = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, number)}
    one_step = trainer._one_step

    def told_twice(*args: Any) -> float:
        if trainer.step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return one_step(*args)

    trainer._one_step = told_twice  # type: ignore[method-assign]
    try:
        trainer.train()
        assert {n: signal.getsignal(n) for n in before} == before
    finally:
        signal.signal(number, outside)
    newest = state.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000004" and trainer.step == 4


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, data: Path) -> None:
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("there is no SIGHUP here")
    trainer = line_trainer(data, tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    one_step = trainer._one_step

    def hung_up(*args: Any) -> float:
        os.kill(os.getpid(), signal.SIGHUP)
        return one_step(*args)

    trainer._one_step = hung_up  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.step == 8


def test_stopping_just_after_a_save_does_not_save_again(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    save = state.save

    def counted(run: Path, new: state.Checkpoint, keep: int) -> Path:
        saves.append(new.state["step"])
        return save(run, new, keep)

    monkeypatch.setattr(state, "save", counted)
    trainer = line_trainer(data, tmp_path, save_every=2)
    stop_after(trainer, 4)
    trainer.train()
    assert saves == [2, 4]
    trainer._one_step = type(trainer)._one_step.__get__(trainer)  # type: ignore[method-assign]
    trainer.train()
    assert trainer.step == 8 and saves == [2, 4, 6, 8]


def test_training_works_outside_the_main_thread(tmp_path: Path, data: Path) -> None:
    trainer = line_trainer(data, tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(30)
    assert trainer.step == 8


def test_two_runs_in_a_row_are_the_same_run(tmp_path: Path, data: Path) -> None:
    recipe = recipe_from(settings(data, steps=3))
    for name in ("a", "b"):
        trainer_for(recipe, tmp_path / name).train()
    left, right = contents(tmp_path / "a" / "checkpoints"), contents(tmp_path / "b" / "checkpoints")
    assert left == right


def test_an_error_in_the_data_reaches_the_caller(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = line_trainer(data, tmp_path)

    def fail(self: PictureSet, i: int) -> Tensor:
        raise UserError("picture 3 is gone")

    monkeypatch.setattr(PictureSet, "load_stored", fail)
    with pytest.raises(UserError, match="picture 3 is gone"):
        trainer.train()
    assert threading.active_count() < 20
