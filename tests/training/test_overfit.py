"""The whole chain learns: four pictures, seen over and over at the same noise, are known by heart within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.diffusion.objective import Loss
from sfumato.training.data import Batch

from .training_cases import lines, recipe_from, settings, trainer_for, write_pictures


@pytest.mark.parametrize("parameterization", ["v", "x0", "eps"])
def test_one_batch_is_learnt_by_heart(tmp_path: Path, parameterization: str) -> None:
    steps = 80
    optimizer = {"lr": 1e-2, "warmup": 5, "schedule": "cosine"}
    values = settings(write_pictures(tmp_path / "pictures", 4), steps=steps, optimizer=optimizer, log_every=1)
    values["model"]["prediction"] = {"parameterization": parameterization}
    values["model"]["network"] = values["model"]["network"] | {"block_out_channels": [24, 24]}
    values["label_dropout"] = 0.0
    trainer = trainer_for(recipe_from(values), tmp_path / "run")
    loss = trainer.task.loss

    def at_the_same_noise(batch: Batch, generator: object, *args: object) -> Loss:
        """One batch: the same pictures in one order, at one draw of levels and noise."""
        return loss(trainer.task.data.gather(range(4)), torch.Generator().manual_seed(3), *args)  # type: ignore[arg-type]

    trainer.task.loss = at_the_same_noise  # type: ignore[method-assign]
    trainer.train()
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])
