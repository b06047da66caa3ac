"""The one trainer: every recipe hands it a `Task`, it does the rest.

A training step is a pure function of (weights, optimizer state, seed, step number): order, augmentation, dropout and
noise are all derived from the seed and the step, so that a resumed run goes on as if it had never stopped.

>>> level_bin(torch.tensor([-9.0, 0.5, 9.0], dtype=torch.float64)).tolist()
[0, 4, 7]
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.checkpoints.io import write_model
from sfumato.diffusion.objective import Loss
from sfumato.errors import UserError
from sfumato.random import derived_seed
from sfumato.training import state as checkpoints
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, Batches, PictureSet
from sfumato.training.ema import EMA
from sfumato.training.report import Reporter, duration

LEVEL_EDGES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
"""Borders, in half log SNR, of the eight noise levels by which losses are recorded; noisiest first."""

_MAX_BAD_STEPS = 3


class Task(Protocol):
    """What a recipe gives to the trainer.

    Attributes:
        network: the module that is trained, unwrapped.
        data, validation: the pictures.
    """

    network: nn.Module
    data: PictureSet
    validation: PictureSet | None

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Put a wrapper (data parallel) around the network wherever it is called."""
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


class TrainingFailed(RuntimeError):
    """The run cannot go on (losses that are not finite); its last checkpoint stands."""


@dataclass
class Tally:
    """Sums between two log lines."""

    loss: float = 0.0
    pictures: int = 0
    level_sums: Tensor = field(default_factory=lambda: torch.zeros(len(LEVEL_EDGES) + 1, dtype=torch.float64))
    level_counts: Tensor = field(default_factory=lambda: torch.zeros(len(LEVEL_EDGES) + 1, dtype=torch.float64))
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: Loss) -> None:
        """Count one micro-batch in."""
        count = len(loss.per_picture)
        self.loss += float(loss.value.detach()) * count
        self.pictures += count
        bins = level_bin(loss.level.half_log_snr)
        self.level_sums.index_add_(0, bins, loss.per_picture.double().cpu())
        self.level_counts.index_add_(0, bins, torch.ones(count, dtype=torch.float64))

    def by_level(self) -> list[float | None]:
        """Mean loss of each noise level, None where nothing was drawn."""
        pairs = zip(self.level_sums.tolist(), self.level_counts.tolist(), strict=True)
        return [round(s / n, 6) if n else None for s, n in pairs]


def level_bin(half_log_snr: Tensor) -> Tensor:
    """Which of the recorded noise levels each half log SNR (B,) falls in, 0 the noisiest."""
    return torch.bucketize(half_log_snr.cpu(), torch.tensor(LEVEL_EDGES, dtype=torch.float64))


@dataclass(frozen=True)
class Estimate:
    """What a run will take, measured on two steps: seconds per step, bytes of memory at the peak."""

    seconds_per_step: float
    memory: int
    steps: int

    def __str__(self) -> str:
        return (
            f"about {duration(self.seconds_per_step * self.steps)} for {self.steps:,} steps "
            f"({self.seconds_per_step:.2f} s each) and {self.memory / 2**30:.1f} GiB of memory"
        )


class Trainer:
    """Trains a task into a run folder.

    Args:
        task: network, data and loss.
        config: how long, how large, how often.
        run: the folder for checkpoints, samples and metrics.
        device: where to compute; None takes a GPU if there is one.
    """

    def __init__(self, task: Task, config: TrainConfig, run: Path, device: torch.device | None = None) -> None:
        self.task, self.config, self.run = task, config, run
        self.accelerator = _accelerator(device)
        self.rank = self.accelerator.process_index if self.accelerator else 0
        self.world = self.accelerator.num_processes if self.accelerator else 1
        self.device = self.accelerator.device if self.accelerator else device or default_device()
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        task.network.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.ema = EMA(task.network, config.ema.decay, config.ema.warmup)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step, self.bad_steps, self.stop_asked = 0, 0, False
        if self.accelerator:
            task.wrap(self.accelerator.prepare)

    def _optimizer(self) -> torch.optim.AdamW:
        o = self.config.optimizer
        return torch.optim.AdamW(
            self.task.network.parameters(), o.lr, o.betas, o.eps, o.weight_decay, fused=True
        )

    def resume(self, folder: Path) -> None:
        """Take over weights, averages, optimizer state and step of a checkpoint."""
        kept = checkpoints.load(folder)
        if kept.state["pictures"] != len(self.task.data):
            raise UserError(
                f"the data have changed since {folder}: {kept.state['pictures']} pictures then, "
                f"{len(self.task.data)} now; start a new run for them"
            )
        self.task.network.load_state_dict(self.task.weights(dict(kept.tensors)))
        self.ema.load(self.task.weights(dict(kept.average)), kept.state["ema_updates"])
        checkpoints.restore_optimizer(self.optimizer, kept.optimizer)
        if self.config.precision == "fp16" and kept.state.get("scaler"):
            self.scaler.load_state_dict(kept.state["scaler"])
        self.step = kept.state["step"]

    def estimate(self) -> Estimate:
        """Measure forward and backward on two micro-batches; weights and optimizer are left as they were."""
        batches = self._batches()
        times = []
        for micro in range(2):
            began = time.perf_counter()
            self._backward(batches.batch(micro), micro)
            times.append(time.perf_counter() - began)
        self.optimizer.zero_grad(set_to_none=True)
        steps = self.config.steps - self.step
        optimizer_state = 2 * sum(p.numel() * p.element_size() for p in self.task.network.parameters())
        return Estimate(min(times) * self.config.accumulate, _peak_memory(self.device) + optimizer_state, steps)

    def train(self) -> None:
        """Run to the last step, or until asked to stop (Ctrl-C), saving on the way.

        Raises:
            TrainingFailed: after three steps in a row whose loss or gradient is not finite.
        """
        config, batches, tally = self.config, self._batches(), Tally()
        stream = batches.prefetch(self.step * config.accumulate)
        with Reporter(self.run, config.steps, self.step, speaks=self.rank == 0) as report, self._stopping(report):
            try:
                while self.step < config.steps and not self.stop_asked:
                    grad_norm = self._one_step(stream, tally, report)
                    report.advance(self.step)
                    last = self.step == config.steps
                    if self.step % config.log_every == 0 or last:
                        report.metrics(self._record(tally, grad_norm, batches))
                        batches.waited_seconds, tally = 0.0, Tally()
                    if _due(self.step, config.validate_every, last) and self.task.validation is not None:
                        report.metrics({"step": self.step, **self.validate()})
                    if _due(self.step, config.sample_every, last) and self.rank == 0:
                        self._sample_sheet()
                    if _due(self.step, config.save_every, last):
                        self.save()
                if self.stop_asked and self.step < config.steps:
                    self.save()
                    report.say(f"stopped and saved at step {self.step}; the same command goes on from here")
            finally:
                stream.close()

    def _one_step(self, stream: Iterator[Batch], tally: Tally, report: Reporter) -> float:
        """Accumulate, clip, update. Returns the gradient's norm."""
        config, parameters = self.config, list(self.task.network.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        seen = []
        for micro in range(config.accumulate):
            batch = next(stream)
            seen += batch.indices.tolist()
            tally.add(self._backward(batch, self.step * config.accumulate + micro))
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or float("inf")))
        if torch.isfinite(torch.tensor(norm)) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.ema.update()
            self.bad_steps = 0
        else:
            self._skip(seen, report)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def _backward(self, batch: Batch, number: int) -> Loss:
        """Loss and gradient of one micro-batch, its randomness derived from its number."""
        config = self.config
        torch.manual_seed(derived_seed("dropout", config.seed, number, self.rank))
        generator = torch.Generator().manual_seed(derived_seed("noise", config.seed, number, self.rank))
        self.task.network.train()
        with self._autocast():
            loss = self.task.loss(batch, generator, self.device)
        scaled = self.scaler.scale(loss.value / config.accumulate)
        if self.accelerator:
            self.accelerator.backward(scaled)
        else:
            scaled.backward()
        return loss

    def _skip(self, indices: list[int], report: Reporter) -> None:
        self.bad_steps += 1
        names = ", ".join(self.task.data.records[i].key for i in indices[:4])
        report.say(f"step {self.step}: loss or gradient is not finite; the step is left out (pictures {names} …)")
        if self.bad_steps >= _MAX_BAD_STEPS:
            raise TrainingFailed(
                f"{_MAX_BAD_STEPS} steps in a row were not finite, up to step {self.step}; lower "
                "train.optimizer.lr or use train.precision=fp32, and start again from the last checkpoint"
            )

    def learning_rate(self, step: int) -> float:
        """Warm-up, then the schedule, as a function of the step (0-based)."""
        o, total = self.config.optimizer, self.config.steps
        if step < o.warmup:
            return o.lr * (step + 1) / o.warmup
        if o.schedule == "constant":
            return o.lr
        done = torch.tensor((step - o.warmup) / max(1, total - o.warmup), dtype=torch.float64).clamp(0, 1)
        fraction = (1 + torch.cos(torch.pi * done)) / 2 if o.schedule == "cosine" else 1 - done
        return o.lr * float(fraction)

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss of the averaged weights on held-out pictures, at levels and noise that never change."""
        assert self.task.validation is not None
        tally, generator = Tally(), torch.Generator().manual_seed(derived_seed("validation", self.config.seed))
        with self._averaged():
            for batch in self.task.validation.in_order(self.config.batch // self.config.accumulate):
                with self._autocast():
                    tally.add(self.task.loss(batch, generator, self.device))
                if tally.pictures >= self.config.validation_pictures:
                    break
        return {"validation_loss": tally.loss / tally.pictures, "validation_by_level": tally.by_level()}

    def _sample_sheet(self) -> None:
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        with self._averaged():
            self.task.draw(self.config.samples, self.config.sample_steps).save(folder / f"step-{self.step:08d}.png")

    def save(self) -> None:
        """Write a checkpoint (main process only)."""
        if self.rank != 0:
            return
        raw = dict(self.task.network.state_dict())
        average = raw | {n: t.to(raw[n].dtype) for n, t in self.ema.averages.items()}
        state: dict[str, Any] = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "pictures": len(self.task.data),
            "torch": torch.__version__,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        checkpoints.save(
            self.run,
            checkpoints.Checkpoint(
                self.task.tensors(raw),
                self.task.tensors(average),
                checkpoints.optimizer_tensors(self.optimizer),
                state,
                self.task.model_config(),
            ),
            self.config.keep,
        )

    def export(self) -> Path:
        """Write the averaged weights as the run's finished model, `model.safetensors`."""
        dtype = getattr(torch, self.config.export)
        weights = dict(self.task.network.state_dict()) | self.ema.averages
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}
        path = self.run / checkpoints.MODEL
        write_model(path, self.task.tensors(cast), self.task.model_config())
        return path

    def _record(self, tally: Tally, grad_norm: float, batches: Batches) -> dict[str, Any]:
        seconds = time.perf_counter() - tally.since
        rate = tally.pictures * self.world / seconds
        left = (self.config.steps - self.step) * self.config.batch / rate
        return {
            "step": self.step,
            "loss": tally.loss / tally.pictures,
            "loss_by_level": tally.by_level(),
            "lr": self.learning_rate(self.step - 1),
            "grad_norm": grad_norm,
            "pictures_per_second": rate,
            "data_wait_share": batches.waited_seconds / seconds,
            "seconds_left": left,
        }

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

    def _autocast(self) -> torch.autocast:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.config.precision != "fp32")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self.task.network.eval()
        with self.ema.in_place():
            yield

    @contextmanager
    def _stopping(self, report: Reporter) -> Iterator[None]:
        """The first Ctrl-C asks for a stop at the end of the step; a second one interrupts at once."""

        def ask(*_: object) -> None:
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True
            report.say("stopping after this step (Ctrl-C again to stop at once, unsaved)")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread: the caller handles interrupts
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def default_device() -> torch.device:
    """A GPU or other accelerator if torch has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")


def _accelerator(device: torch.device | None) -> Any:
    """An `accelerate.Accelerator` when more than one process was launched, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError:
        raise UserError("training in several processes needs accelerate: pip install sfumato[train]") from None
    return Accelerator(cpu=device is not None and device.type == "cpu")


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


def _peak_memory(device: torch.device) -> int:
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
