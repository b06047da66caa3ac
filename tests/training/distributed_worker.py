"""What each process of `test_distributed` does; started by `torch.distributed.run`, or alone.

Usage: distributed_worker.py PICTURES OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.objective import Loss
from sfumato.systems.config import parse
from sfumato.training import run, state
from sfumato.training.config import TrainConfig
from sfumato.training.data import Batch, DataConfig, open_data
from sfumato.training.recipes.autoencoder import AutoencoderRecipe
from sfumato.training.recipes.ddpm import DDPMRecipe
from sfumato.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training.codec_cases import GAN, codec_settings, everything  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
CPU = torch.device("cpu")


class LineTask:
    """A linear map of each picture onto noise of its own: what is learnt depends on the pictures of a step alone."""

    def __init__(self, folder: Path) -> None:
        self.data, self.validation = open_data(DataConfig(path=str(folder), size=8, flip=True))
        torch.manual_seed(5 + RANK)  # unlike each other: wrapping has to make them alike
        self.network: nn.Module = nn.Linear(3 * 8 * 8, 4)
        self.called = self.network
        self.seen: list[list[int]] = []
        self.losses: list[float] = []
        self.poisoned: tuple[int, int] | None = None  # (rank, call) whose loss is not a number

    def wrap(self, prepare: Any) -> None:
        self.called = prepare(self.network)

    def begin(self, step: int) -> None:
        pass

    def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
        noise = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(int(i))) for i in batch.indices])
        error = (self.called(batch.to_float().flatten(1)) - noise).square().mean(1)
        factor = float("nan") if self.poisoned == (RANK, len(self.seen)) else 1.0
        self.seen.append(batch.indices.tolist())
        self.losses.append(float(error.detach().mean()))
        half = torch.full((len(error),), 0.5, dtype=torch.float64)
        return Loss(error.mean() * factor, error.detach(), NoiseLevel(half, half.sqrt(), half.sqrt()), error)

    def draw(self, count: int, steps: int) -> Image.Image:
        return Image.new("RGB", (count, steps))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def model_config(self) -> dict[str, Any]:
        return {"system": "line"}

    def finished(self, weights: Any) -> Any:
        return self.tensors(dict(weights)), self.model_config()


def line(
    pictures: Path, out: Path, name: str, stop_at: int | None = None, poisoned: tuple[int, int] | None = None
) -> None:
    """Train a `LineTask` and write down what this process saw and ended with."""
    config = TrainConfig(steps=6, batch=8, accumulate=2, log_every=2, save_every=100, validate_every=0, sample_every=0)
    task = LineTask(pictures)
    task.poisoned = poisoned
    trainer = Trainer(task, config, out / name, CPU)
    one_step = trainer._one_step

    def asked(*args: Any) -> float:
        norm = one_step(*args)
        if RANK == trainer.world - 1 and trainer.step == stop_at:
            trainer.stop_asked = True  # as Ctrl-C in one process does
        return norm

    trainer._one_step = asked  # type: ignore[method-assign]
    trainer.train()
    tensors = {f"weights.{n}": t.clone() for n, t in task.network.state_dict().items()}
    tensors |= {f"average.{n}": t.clone() for n, t in trainer.ema.averages.items()}
    save_file(tensors, out / f"{name}-{RANK}.safetensors")
    record = {"seen": task.seen, "losses": task.losses, "step": trainer.step, "updates": trainer.ema.updates}
    (out / f"{name}-{RANK}.json").write_text(json.dumps(record))


def ddpm(out: Path) -> None:
    """Train the recipe in OUT, stop half-way, and go on, through the same door as the command."""
    values = json.loads((out / "recipe.json").read_text())
    said: list[str] = []
    for steps in (2, 4):
        values["train"]["steps"] = steps
        result = run.train(parse(DDPMRecipe, values, "recipe"), out / "run", device=CPU, say=said.append)
        assert result == "finished"
    (out / f"said-{RANK}.json").write_text(json.dumps(said))


def adaptive(out: Path) -> None:
    """Train with importance sampling, at once and in two halves, and write down what this process remembers."""
    values = json.loads((out / "recipe.json").read_text())
    values["objective"] = {"importance": "second_moment", "importance_history": 2}
    values["model"]["schedule"] = {"name": "cosine", "steps": 3}
    for name, ends in (("straight", (6,)), ("halves", (3, 6))):
        for steps in ends:
            values["train"] |= {"steps": steps, "validate_every": 0, "sample_every": 0, "save_every": 3}
            recipe = parse(DDPMRecipe, values, "recipe")
            trainer = Trainer(recipe.task(*open_data(recipe.data)), recipe.train, out / f"adaptive-{name}", CPU)
            if steps != ends[0]:
                trainer.resume(state.newest(trainer.run) or out)
            trainer.train()
        assert trainer.history is not None and trainer.history.warm
        save_file(trainer.history.tensors(), out / f"adaptive-{name}-{RANK}.safetensors")


def first_stage(out: Path) -> None:
    """Train a codebook alone, and one with discriminator and restarts, at once and in two halves."""
    folder = json.loads((out / "recipe.json").read_text())["data"]["path"]
    train: dict[str, Any] = {"batch": 8, "accumulate": 2, "steps": 4, "save_every": 2}
    train["optimizer"] = {"schedule": "constant", "warmup": 0}
    for name, ends, more in (
        ("alone", (4,), {}),
        ("judged", (4,), {"discriminator": GAN, "restart": {"every": 1, "until": 1.0}}),
        ("halves", (2, 4), {"discriminator": GAN, "restart": {"every": 1, "until": 1.0}}),
    ):
        values = codec_settings(Path(folder), "vq", data={"upscale": True}, train=train, **more)
        for steps in ends:
            recipe = parse(AutoencoderRecipe, values, "recipe")
            trainer = Trainer(recipe.task(*open_data(recipe.data)), recipe.train, out / f"codec-{name}", CPU)
            if steps != ends[0]:
                trainer.resume(state.newest(trainer.run) or out)
            trainer.config = recipe.train.model_copy(update={"steps": steps})
            trainer.train()
        found = {n: t.contiguous() for n, t in everything(trainer).items()}
        save_file(found, out / f"codec-{name}-{RANK}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    pictures_, out_ = Path(sys.argv[1]), Path(sys.argv[2])
    line(pictures_, out_, "plain")
    line(pictures_, out_, "stopped", stop_at=3)
    line(pictures_, out_, "poisoned", poisoned=(int(os.environ.get("WORLD_SIZE", "1")) - 1, 5))
    ddpm(out_)
    adaptive(out_)
    first_stage(out_)
