"""The one trainer: every recipe hands it a `Task`, it does the rest.

A training step is a pure function of (weights, optimizer state, seed, step number) and, with importance sampling, the
history of losses: order, augmentation, dropout and noise are all derived from the seed and the step, so that a resumed
run goes on as if it had never stopped.

>>> level_bin(torch.tensor([-9.0, 0.5, 9.0], dtype=torch.float64)).tolist()
[0, 4, 7]
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.backends import convolutions, winograd
from sfumato.backends.compiled import engage_in_training
from sfumato.backends.devices import default_device, native_bfloat16
from sfumato.backends.timing import peak_memory
from sfumato.checkpoints.io import load_strictly, replacing, write_model
from sfumato.diffusion.densities import LossHistory
from sfumato.diffusion.objective import Loss
from sfumato.errors import ModelFileError, UserError
from sfumato.random import derived_seed
from sfumato.training import state as checkpoints
from sfumato.training.config import OptimizerConfig, TrainConfig
from sfumato.training.data import Batch, Batches, PictureSet
from sfumato.training.ema import EMA
from sfumato.training.report import Reporter, duration

LEVEL_EDGES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
"""Borders, in half log SNR, of the eight noise levels by which losses are recorded; noisiest first."""

_MAX_BAD_STEPS = 3
# what the names of other tensors begin with, among the optimizer's: importance sampling's, the task's own, and the
# opponent's weights and optimizer
_HISTORY, _MEMORY, _OPPONENT = "history.", "memory.", ("adversary.", "adversary_optimizer.")


class Task(Protocol):
    """What a recipe gives to the trainer.

    Attributes:
        network: the module that is trained, unwrapped.
        data, validation: the pictures.

    A task whose losses are drawn by importance also has `history`, a `LossHistory`: the trainer records the losses of
    each step of all processes in it, and keeps it in the checkpoints. One that trains a second network against the
    first has `adversary`, an `Adversary`. One that must remember more than weights has `memory`, tensors by name, which
    it changes in place: they travel in the checkpoints. One whose work is a network that torch's compiler can take has
    `denoises`, that network.
    """

    network: nn.Module
    data: PictureSet
    validation: PictureSet | None

    def begin(self, step: int) -> None:
        """Told the number of the step whose losses are asked for next; the number of all steps for a rehearsal."""
        ...

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Call `prepare(network)` in place of the network from now on: a data parallel wrapper, or itself again."""
        ...

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        """The loss of a batch; all randomness from `generator`."""
        ...

    def draw(self, count: int, steps: int) -> Image.Image:
        """A sheet of `count` samples with fixed seeds, made with the weights that the network holds now."""
        ...

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of `network` under the names of a model file."""
        ...

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tensors`."""
        ...

    def model_config(self) -> dict[str, Any]:
        """The config that travels in the model file."""
        ...

    def finished(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and config of the finished model's file, from the final weights of `network` in float32."""
        ...


class Adversary(Protocol):
    """A second network, trained against the first on the same pictures, after it, in every step.

    Attributes:
        network: the module that is trained, unwrapped.
        optimizer: its settings; the learning rate is scaled as the first network's is.
    """

    network: nn.Module
    optimizer: OptimizerConfig

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Call `prepare(network)` in place of the network from now on."""
        ...

    def loss(self) -> Tensor | None:
        """Its loss on the micro-batch that the task has just measured; None where it rests."""
        ...


class TrainingFailed(RuntimeError):
    """The run cannot go on (losses that are not finite); its last checkpoint stands."""


@dataclass
class Tally:
    """Sums between two log lines.

    Attributes:
        loss: sum over pictures of the losses that were taken. pictures: how many those are.
        seen: pictures that were looked at, in steps that were left out too. skipped: how many steps those are.
        level_sums, level_counts: losses and pictures of each noise level.
        figures: sums over pictures of a task's other figures.
        levelled: whether the task knows noise levels.
        since: when it began, moved on by time that was spent on anything but training.
    """

    loss: float = 0.0
    pictures: int = 0
    seen: int = 0
    skipped: int = 0
    level_sums: Tensor = field(default_factory=lambda: torch.zeros(len(LEVEL_EDGES) + 1, dtype=torch.float64))
    level_counts: Tensor = field(default_factory=lambda: torch.zeros(len(LEVEL_EDGES) + 1, dtype=torch.float64))
    figures: dict[str, float] = field(default_factory=dict)
    levelled: bool = True
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: Loss) -> None:
        """Count one micro-batch in."""
        count = len(loss.per_picture)
        self.loss += float(loss.value.detach()) * count
        self.pictures += count
        self.seen += count
        for name, value in loss.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + float(value) * count
        if loss.level is None:
            self.levelled = False
            return
        bins = level_bin(loss.level.half_log_snr)
        self.level_sums.index_add_(0, bins, loss.per_picture.cpu().double())
        self.level_counts.index_add_(0, bins, torch.ones(count, dtype=torch.float64))

    def take(self, step: Tally) -> None:
        """Count in what a whole step measured; a step whose loss is not finite adds to `seen` and `skipped` only."""
        self.seen += step.seen
        self.skipped += step.skipped
        self.levelled = step.levelled
        if math.isfinite(step.loss):
            self.loss += step.loss
            self.pictures += step.pictures
            self.level_sums += step.level_sums
            self.level_counts += step.level_counts
            for name, value in step.figures.items():
                self.figures[name] = self.figures.get(name, 0.0) + value

    @property
    def mean(self) -> float | None:
        """Mean loss, None when nothing was counted or it is not finite."""
        return self.loss / self.pictures if self.pictures and math.isfinite(self.loss) else None

    def mean_figures(self) -> dict[str, float]:
        """Means of the task's other figures."""
        return {name: round(value / self.pictures, 6) for name, value in self.figures.items()} if self.pictures else {}

    def by_level(self) -> list[float | None]:
        """Mean loss of each noise level, None where nothing was drawn or it is not finite; empty if there are none."""
        if not self.levelled:
            return []
        pairs = zip(self.level_sums.tolist(), self.level_counts.tolist(), strict=True)
        return [round(s / n, 6) if n and math.isfinite(s) else None for s, n in pairs]


def level_bin(half_log_snr: Tensor) -> Tensor:
    """Which of the recorded noise levels each half log SNR (B,) falls in, 0 the noisiest."""
    return torch.bucketize(half_log_snr.cpu(), torch.tensor(LEVEL_EDGES, dtype=torch.float64))


@dataclass(frozen=True)
class Estimate:
    """What a run will take, measured on two micro-batches.

    Attributes:
        seconds_per_step: of one optimizer step.
        memory: bytes at the peak, None where the system does not tell.
        steps: that are left.
    """

    seconds_per_step: float
    memory: int | None
    steps: int

    def __str__(self) -> str:
        memory = f" and {self.memory / 2**30:.1f} GiB of memory" if self.memory is not None else ""
        return (
            f"about {duration(self.seconds_per_step * self.steps)} for {self.steps:,} steps "
            f"({self.seconds_per_step:.2f} s each){memory}"
        )


def precision_for(asked: str, device: torch.device) -> str:
    """What "auto" stands for on a device: bf16 where it computes with bfloat16 itself, else fp16 on a GPU and fp32 on a
    CPU; any other precision is itself.

    >>> precision_for("fp16", torch.device("cpu"))
    'fp16'
    """
    if asked != "auto":
        return asked
    if native_bfloat16(device):
        return "bf16"
    return "fp32" if device.type == "cpu" else "fp16"


class Trainer:
    """Trains a task into a run folder.

    Args:
        task: network, data and loss.
        config: how long, how large, how often.
        run: the folder for checkpoints, samples and metrics.
        device: where to compute; None takes a GPU if there is one.

    Attributes:
        step: how many are done.
        precision: that it computes in, fp32, bf16 or fp16.
        changes: after `resume`, a sentence on each setting that makes this another run than one that never stopped.
    """

    def __init__(self, task: Task, config: TrainConfig, run: Path, device: torch.device | None = None) -> None:
        self.task, self.config, self.run = task, config, run
        self.accelerator = _accelerator(device)
        self.rank = self.accelerator.process_index if self.accelerator else 0
        self.world = self.accelerator.num_processes if self.accelerator else 1
        place = self.accelerator.device if self.accelerator else device or default_device()
        self.device = torch.device("cpu") if place.type == "cpu" else place  # to "cpu:0" tensors are copied every time
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        task.network.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        if config.convolution == "winograd":
            convolutions.engage_in_training(task.network)
        if config.compile:
            self._compile()
        self.optimizer = self._optimizer()
        self.precision = precision_for(config.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step, self.bad_steps, self.stop_asked = 0, 0, False
        self.changes: list[str] = []
        self._saved_step: int | None = None
        self._wrapped: nn.Module | None = None
        if self.accelerator:
            task.wrap(self._prepare)  # which gives all processes the weights of the main one
        self.ema = EMA(task.network, config.ema.decay, config.ema.warmup)
        self.history: LossHistory | None = getattr(task, "history", None)
        self.memory: Mapping[str, Tensor] = getattr(task, "memory", {})
        adversary: Adversary | None = getattr(task, "adversary", None)
        self.opponent = Opponent(adversary, self.device, layout, self.accelerator) if adversary is not None else None

    def _prepare(self, network: nn.Module) -> nn.Module:
        """Wrap the network for data parallel training, remembering the wrapper."""
        wrapped: nn.Module = self.accelerator.prepare(network)
        self._wrapped = wrapped
        return wrapped

    def _compile(self) -> None:
        """Hand the network that denoises to the compiler."""
        network: nn.Module | None = getattr(self.task, "denoises", None)
        if network is None:
            raise UserError("train.compile is for networks that denoise; leave it out for this recipe")
        engage_in_training(network)

    def _optimizer(self) -> torch.optim.AdamW:
        return adamw(self.task.network, self.config.optimizer)

    def resume(self, folder: Path) -> None:
        """Take over weights, averages, optimizer state and step of a checkpoint.

        Raises:
            UserError: when the pictures are others than then (their number, names or classes).
            ModelFileError: when the checkpoint is damaged, or of another network.
        """
        kept = checkpoints.load(folder)
        if kept.state["pictures"] != len(self.task.data):
            raise UserError(
                f"the data have changed since {folder}: {kept.state['pictures']} pictures then, "
                f"{len(self.task.data)} now; start a new run for them"
            )
        if kept.state.get("data", self._data_sum) != self._data_sum:
            raise UserError(
                f"the data have changed since {folder}: as many pictures, but other names or classes; "
                "start a new run for them"
            )
        load_strictly(self.task.network, self.task.weights(dict(kept.tensors)), what=str(folder))
        self.ema.load(self.task.weights(dict(kept.average)), kept.state["ema_updates"])
        others = {prefix: _under(prefix, kept.optimizer) for prefix in (_HISTORY, _MEMORY, *_OPPONENT)}
        own = {n: t for n, t in kept.optimizer.items() if not n.startswith(tuple(others))}
        checkpoints.restore_optimizer(self.optimizer, own)
        self._restore_history(others[_HISTORY], folder)
        self._restore_memory(others[_MEMORY], folder)
        if self.opponent is not None:
            self.opponent.restore(others[_OPPONENT[0]], others[_OPPONENT[1]], folder)
        if self.precision == "fp16" and kept.state.get("scaler"):
            self.scaler.load_state_dict(kept.state["scaler"])
        self.step = kept.state["step"]
        self.changes = self._changes_since(kept.state)

    def _restore_history(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Take over the losses that importance sampling remembers; the task and the checkpoint must agree on it."""
        if self.history is None:
            if tensors:
                raise ModelFileError(f"{folder} was trained with importance sampling, this run is not")
            return
        try:
            self.history.restore(tensors)
        except ValueError as error:
            raise ModelFileError(f"{folder} does not fit this run's importance sampling: {error}") from None

    def _restore_memory(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Take over what the task remembers; names and shapes must agree."""
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in self.memory.items()}:
            raise ModelFileError(f"{folder} remembers other things than this run does; it belongs to another recipe")
        for name, tensor in self.memory.items():
            tensor.copy_(tensors[name])

    @cached_property
    def _data_sum(self) -> str:
        """SHA-256 of the training pictures' names and classes, in order."""
        digest = hashlib.sha256()
        for i, record in enumerate(self.task.data.records):
            digest.update(f"{record.key}\0{self.task.data.label_of(i)}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def estimate(self) -> Estimate:
        """Measure forward and backward on two micro-batches; weights and optimizer are left as they were.

        With several processes, all of them have to call it.
        """
        batches = self._batches()
        times = []
        changing = list(self.memory.values())
        if self.opponent is not None:
            changing += self.opponent.adversary.network.buffers()
        before = [tensor.clone() for tensor in changing]
        self.task.begin(self.config.steps)
        for micro in range(2):
            began = time.perf_counter()
            self._backward(batches.batch(micro), micro)
            times.append(time.perf_counter() - began)
        self.optimizer.zero_grad(set_to_none=True)
        if self.opponent is not None:
            self.opponent.optimizer.zero_grad(set_to_none=True)
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
        steps = self.config.steps - self.step
        optimizer_state = 2 * sum(p.numel() * p.element_size() for p in self.task.network.parameters())
        peak = peak_memory(self.device)
        memory = peak + optimizer_state if peak is not None else None
        return Estimate(min(times) * self.config.accumulate, memory, steps)

    def train(self) -> None:
        """Run to the last step, or until asked to stop (Ctrl-C, SIGTERM, SIGHUP), saving on the way.

        Raises:
            TrainingFailed: after three steps in a row whose loss or gradient is not finite.
            UserError: when a checkpoint, sample sheet or metrics line cannot be written; older checkpoints stay.
        """
        config, batches, tally = self.config, self._batches(), Tally()
        stopped, self.stop_asked = False, False
        self._check_agreement()
        stream = batches.prefetch(self.step * config.accumulate)
        with Reporter(self.run, config.steps, self.step, speaks=self.rank == 0) as report, self._stopping(report):
            try:
                while self.step < config.steps and not (stopped := self._in_any_process(self.stop_asked)):
                    grad_norm = self._one_step(stream, tally, report)
                    report.advance(self.step)
                    last = self.step == config.steps
                    if self.step % config.log_every == 0 or last:
                        report.metrics(self._record(tally, grad_norm, batches))
                        batches.waited_seconds, tally = 0.0, Tally()
                    began = time.perf_counter()
                    self._at_intervals(report, last)
                    tally.since += time.perf_counter() - began
                if stopped:
                    if self._saved_step != self.step:
                        self.save()
                    report.say(f"stopped and saved at step {self.step}; the same command goes on from here")
            finally:
                stream.close()
                winograd.work.clear()
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Wait until every process has come this far."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    def _check_agreement(self) -> None:
        """Refuse to start when the processes are at different steps."""
        if self.accelerator is None:
            return
        sums = torch.tensor([self.step, self.step**2], dtype=torch.int64, device=self.device)
        total, squares = self.accelerator.reduce(sums, "sum").tolist()
        if squares * self.world != total**2:
            raise UserError(
                f"process {self.rank} is at step {self.step}, others are not; all need the same run folder"
            )

    def _at_intervals(self, report: Reporter, last: bool) -> None:
        """Validate, draw and save when it is time to."""
        config = self.config
        if _due(self.step, config.validate_every, last) and self.task.validation is not None:
            report.metrics({"step": self.step, **self.validate()})
        if _due(self.step, config.sample_every, last) and self.rank == 0:
            self._sample_sheet()
        if _due(self.step, config.save_every, last):
            self.save()

    def _one_step(self, stream: Iterator[Batch], tally: Tally, report: Reporter) -> float:
        """Accumulate, clip, update. Returns the gradient's norm."""
        config, parameters, this = self.config, list(self.task.network.parameters()), Tally()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.task.begin(self.step)
        indices, drawn = [], []
        for micro in range(config.accumulate):
            batch = next(stream)
            indices += batch.indices.tolist()
            number, last = self.step * config.accumulate + micro, micro == config.accumulate - 1
            loss = self._backward(batch, number, add_up=last)
            this.add(loss)
            drawn.append((loss.parts, loss.sampled))
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or float("inf")))
        bad_loss = self._in_any_process(not math.isfinite(this.loss))
        if math.isfinite(norm) and not bad_loss:
            self.scaler.step(self.optimizer)
            self.ema.update()
            if self.opponent is not None:
                self.opponent.step(self.scaler, self.learning_rate(self.step) / config.optimizer.lr)
            self._remember(drawn)
            self.bad_steps = 0
        else:
            this.skipped = 1
            # a gradient that overflows in fp16 is how the scaler finds its scale, as long as that can still shrink
            if bad_loss or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self._skip(indices, report)
        tally.take(this)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.opponent is not None:
            self.opponent.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def _backward(self, batch: Batch, number: int, *, add_up: bool = True) -> Loss:
        """Loss and gradient of one micro-batch, its randomness derived from its number.

        Args:
            add_up: whether the gradients of all processes are averaged now or with a later micro-batch.
        """
        config = self.config
        torch.manual_seed(derived_seed("dropout", config.seed, number, self.rank))
        generator = torch.Generator().manual_seed(derived_seed("noise", config.seed, number, self.rank))
        self.task.network.train()
        alone: AbstractContextManager[Any] = nullcontext()
        if self.accelerator and not add_up:
            alone = self.accelerator.no_sync(self._wrapped)
        with alone:
            with self._autocast():
                loss = self.task.loss(batch, generator, self.device)
            torch.autograd.backward(self.scaler.scale(loss.value / config.accumulate))
        if self.opponent is not None:
            with self.opponent.alone(add_up), self._autocast():
                against = self.opponent.adversary.loss()
            if against is not None:
                torch.autograd.backward(self.scaler.scale(against / config.accumulate))
        return loss

    def _remember(self, drawn: list[tuple[Tensor | None, Tensor | None]]) -> None:
        """Record a step's (parts, losses) for importance sampling: those of all processes, in their order, in each."""
        if self.history is None:
            return
        pairs = [
            torch.stack([parts.cpu().double(), losses.cpu().double()], dim=1)
            for parts, losses in drawn
            if parts is not None and losses is not None
        ]
        found = torch.cat(pairs)
        if self.accelerator:
            found = self.accelerator.gather(found.to(self.device)).cpu()
        self.history.record(found[:, 0].long(), found[:, 1])

    def _in_any_process(self, flag: bool) -> bool:
        """Whether a flag is set in any process, so that all of them decide alike."""
        if self.accelerator is None:
            return flag
        return bool(self.accelerator.reduce(torch.tensor([float(flag)], device=self.device), "sum").item())

    def _skip(self, indices: list[int], report: Reporter) -> None:
        """Tell of a step that was left out; give up after too many in a row."""
        self.bad_steps += 1
        if self.accelerator:
            from accelerate.utils import gather_object

            indices = gather_object(indices)
        names = ", ".join(self.task.data.records[i].key for i in indices[:4]) + (" …" if len(indices) > 4 else "")
        report.say(f"step {self.step}: loss or gradient is not finite; the step is left out (pictures {names})")
        if self.bad_steps >= _MAX_BAD_STEPS:
            raise TrainingFailed(
                f"{_MAX_BAD_STEPS} steps in a row were not finite, up to step {self.step}; lower "
                "train.optimizer.lr or use train.precision=fp32, and start again from the last checkpoint "
                "(--resume CHECKPOINT, in a new folder)"
            )

    def learning_rate(self, step: int) -> float:
        """Warm-up, then the schedule, as a function of the step (0-based)."""
        return learning_rate(self.config.optimizer, self.config.steps, step)

    def _changes_since(self, then: Mapping[str, Any]) -> list[str]:
        """A sentence on each setting that may change from a checkpoint's state and makes this another run than one that
        never stopped: the number of steps where the learning rate ends with them, the number of processes, the
        precision where the device chooses it, and the way of convolving."""
        notes, o = list[str](), self.config.optimizer
        steps, processes = then.get("steps", self.config.steps), then.get("processes", self.world)
        if steps != self.config.steps and o.schedule != "constant" and self.step > o.warmup + 1:
            before, now = (learning_rate(o, n, self.step) for n in (steps, self.config.steps))
            notes.append(
                f"the {o.schedule} of the learning rate ends at step {self.config.steps:,} now, not {steps:,}: it goes "
                f"on at {now:.2e}, not {before:.2e}, which is not what a run of so many steps does from its start"
            )
        if processes != self.world:
            notes.append(
                f"{processes} process{'es' * (processes > 1)} trained it until here and {self.world} from here on: the "
                "noise is not what it would have been, so this run is not bit for bit one that never stopped"
            )
        if (before := then.get("precision", self.precision)) != self.precision:
            notes.append(
                f"it was trained in {before} until here and is in {self.precision} from here on, which suits this "
                "device: this run is not bit for bit one that never stopped"
            )
        if (before := then.get("convolution", "direct")) != self._convolution:
            notes.append(
                f"its convolutions were computed by train.convolution={before} until here and are by "
                f"{self._convolution} from here on: this run is not bit for bit one that never stopped"
            )
        return notes

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss of the averaged weights on held-out pictures, at levels and noise that never change."""
        assert self.task.validation is not None
        tally, generator = Tally(), torch.Generator().manual_seed(derived_seed("validation", self.config.seed))
        size = self.config.batch // self.config.accumulate
        count = min(len(self.task.validation), self.config.validation_pictures)
        with self._averaged():
            for start in range(0, count, size):
                batch = self.task.validation.gather(range(start, min(start + size, count)))
                with self._autocast():
                    tally.add(self.task.loss(batch, generator, self.device))
        figures = {f"validation_{name}": value for name, value in tally.mean_figures().items()}
        return {"validation_loss": tally.mean, "validation_by_level": tally.by_level(), **figures}

    def _sample_sheet(self) -> None:
        with self._averaged():
            picture = self.task.draw(self.config.samples, self.config.sample_steps)
        with replacing(self.run / "samples" / f"step-{self.step:08d}.png") as temporary:
            picture.save(temporary, "PNG")

    def save(self) -> None:
        """Write a checkpoint (main process only). Raises `UserError` when it cannot be written."""
        self._saved_step = self.step
        if self.rank != 0:
            return
        raw = dict(self.task.network.state_dict())
        average = raw | {n: t.to(raw[n].dtype) for n, t in self.ema.averages.items()}
        state: dict[str, Any] = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "pictures": len(self.task.data),
            "data": self._data_sum,
            "torch": torch.__version__,
            "steps": self.config.steps,
            "processes": self.world,
            "precision": self.precision,
            "convolution": self._convolution,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        checkpoints.save(
            self.run,
            checkpoints.Checkpoint(
                self.task.tensors(raw),
                self.task.tensors(average),
                checkpoints.optimizer_tensors(self.optimizer) | self._other_tensors(),
                state,
                self.task.model_config(),
            ),
            self.config.keep,
        )

    def _other_tensors(self) -> dict[str, Tensor]:
        """What is kept beside the optimizer's own tensors: losses by importance, the task's memory, the opponent."""
        tensors: dict[str, Tensor] = {f"{_MEMORY}{name}": tensor for name, tensor in self.memory.items()}
        if self.history is not None:
            tensors |= {f"{_HISTORY}{name}": tensor for name, tensor in self.history.tensors().items()}
        if self.opponent is not None:
            for prefix, own in zip(_OPPONENT, self.opponent.tensors(), strict=True):
                tensors |= {f"{prefix}{name}": tensor for name, tensor in own.items()}
        return tensors

    def export(self) -> Path:
        """Write the averaged weights as the run's finished model, `model.safetensors`."""
        dtype = getattr(torch, self.config.export)
        weights = {n: t.cpu() for n, t in (dict(self.task.network.state_dict()) | self.ema.averages).items()}
        tensors, config = self.task.finished(weights)
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        path = self.run / checkpoints.MODEL
        write_model(path, cast, config)
        return path

    def _record(self, tally: Tally, grad_norm: float, batches: Batches) -> dict[str, Any]:
        """The line of `metrics.jsonl` for the steps since the last one; its keys are listed in `Reporter`."""
        seconds = max(time.perf_counter() - tally.since, 1e-9)
        rate = tally.seen * self.world / seconds
        left = (self.config.steps - self.step) * self.config.batch / rate
        self._add_up(tally)
        return {
            "step": self.step,
            "loss": tally.mean,
            "loss_by_level": tally.by_level(),
            **tally.mean_figures(),
            "lr": self.learning_rate(self.step - 1),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped": tally.skipped,
            "pictures_per_second": rate,
            "data_wait_share": batches.waited_seconds / seconds,
            "seconds_left": left,
        }

    def _add_up(self, tally: Tally) -> None:
        """Put the sums over all processes into a tally."""
        if self.accelerator is None:
            return
        names = sorted(tally.figures)
        own = torch.tensor([tally.loss, tally.pictures, *(tally.figures[n] for n in names)], dtype=torch.float64)
        sums = torch.cat([own, tally.level_sums, tally.level_counts]).to(self.device)
        total = self.accelerator.reduce(sums, "sum").cpu()
        tally.loss, tally.pictures = float(total[0]), int(total[1])
        tally.figures = dict(zip(names, total[2 : len(own)].tolist(), strict=True))
        tally.level_sums, tally.level_counts = total[len(own) :].chunk(2)

    def _batches(self) -> Batches:
        config = self.config
        if config.batch % (config.accumulate * self.world):
            raise UserError(
                f"train.batch {config.batch} must be a multiple of accumulate x processes "
                f"({config.accumulate} x {self.world})"
            )
        return Batches(
            self.task.data, config.batch // config.accumulate, config.seed, rank=self.rank, world_size=self.world
        )

    @property
    def _convolution(self) -> str:
        """How convolutions that learn are computed here."""
        fewer = any(isinstance(module, convolutions.Learning) for module in self.task.network.modules())
        return "winograd" if fewer and (self.device.type, self.precision) == ("cpu", "fp32") else "direct"

    def _autocast(self) -> torch.autocast:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the network, and no wrapper around it: a process may call it alone."""
        self.task.network.eval()
        if self._wrapped is not None:
            self.task.wrap(lambda network: network)
        try:
            with self.ema.in_place():
                yield
        finally:
            if (wrapped := self._wrapped) is not None:
                self.task.wrap(lambda _: wrapped)

    @contextmanager
    def _stopping(self, report: Reporter) -> Iterator[None]:
        """The first Ctrl-C, SIGTERM or SIGHUP asks for a stop at the end of the step; a Ctrl-C after it interrupts.

        A signal that is ignored already stays so (SIGHUP, under nohup). All are as they were afterwards.
        """

        def ask(number: int, _: object) -> None:
            if self.stop_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            if number not in (signal.SIGINT, signal.SIGTERM):  # that is, SIGHUP
                report.hang_up()
            if not self.stop_asked:
                self.stop_asked = True
                with suppress(RuntimeError):  # the signal came in the middle of printing another line
                    report.say("stopping after this step (Ctrl-C again to stop at once, unsaved)")

        wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        handled = [n for n in wanted if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        try:
            before = {number: signal.signal(number, ask) for number in handled}
        except ValueError:  # not in the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Opponent:
    """The trainer's side of an `Adversary`: its optimizer, its wrapper, its place in a checkpoint."""

    def __init__(
        self, adversary: Adversary, device: torch.device, layout: torch.memory_format, accelerator: Any
    ) -> None:
        self.adversary, self.accelerator = adversary, accelerator
        adversary.network.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = adamw(adversary.network, adversary.optimizer)
        self._wrapped: nn.Module | None = None
        if accelerator:
            adversary.wrap(self._prepare)

    def _prepare(self, network: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare(network)
        self._wrapped = wrapped
        return wrapped

    def alone(self, add_up: bool) -> AbstractContextManager[Any]:
        """Where the gradients of all processes are averaged later, not now."""
        return self.accelerator.no_sync(self._wrapped) if self.accelerator and not add_up else nullcontext()

    def step(self, scaler: torch.amp.GradScaler, share: float) -> None:
        """Update at `share` of the peak learning rate, where there is a gradient and it is finite."""
        parameters = [p for p in self.adversary.network.parameters() if p.grad is not None]
        if not parameters:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.adversary.optimizer.lr * share
        scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.adversary.optimizer.clip_norm or float("inf"))
        if bool(norm.isfinite()):
            scaler.step(self.optimizer)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights, and the optimizer's tensors."""
        return dict(self.adversary.network.state_dict()), checkpoints.optimizer_tensors(self.optimizer)

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], folder: Path) -> None:
        """Take over what `tensors` gave. Raises `ModelFileError` for another network's."""
        load_strictly(self.adversary.network, weights, what=f"the adversary in {folder}")
        checkpoints.restore_optimizer(self.optimizer, optimizer)


def learning_rate(o: OptimizerConfig, steps: int, step: int) -> float:
    """The learning rate at a step (0-based) of so many: warm-up, then the schedule."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "constant":
        return o.lr
    done = torch.tensor((step - o.warmup) / max(1, steps - o.warmup), dtype=torch.float64).clamp(0, 1)
    fraction = (1 + torch.cos(torch.pi * done)) / 2 if o.schedule == "cosine" else 1 - done
    return o.lr * float(fraction)


def adamw(network: nn.Module, o: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a network."""
    return torch.optim.AdamW(network.parameters(), o.lr, o.betas, o.eps, o.weight_decay, fused=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _accelerator(device: torch.device | None) -> Any:
    """An `accelerate.Accelerator` when more than one process was launched, else None."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError:
        raise UserError("training in several processes needs accelerate: pip install sfumato[train]") from None
    accelerator = Accelerator(cpu=(device or default_device()).type == "cpu", mixed_precision="no")
    if accelerator.num_processes != world:
        raise UserError(f"{world} processes were launched, but only {accelerator.num_processes} train together")
    return accelerator


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)
