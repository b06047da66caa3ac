"""What a recipe for a diffusion model is refused for before anything is read or written.

>>> from sfumato.systems.config import PredictionConfig, ScheduleConfig
>>> refuse_idle({"min_snr_gamma": 3}, PredictionConfig(), ScheduleConfig())
Traceback (most recent call last):
    ...
sfumato.errors.UserError: objective.min_snr_gamma=3 does nothing without objective.weighting=min_snr; leave it out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.diffusion import grid as grids
from sfumato.diffusion.objective import Objective
from sfumato.errors import UserError
from sfumato.systems import Drawing
from sfumato.systems.config import PredictionConfig, ScheduleConfig
from sfumato.systems.ddpm import objective_from
from sfumato.tasks.draw import planned
from sfumato.training.config import TrainConfig

_NEEDS = {
    "huber_delta": ("loss", "huber"),
    "p2_gamma": ("weighting", "p2"),
    "p2_k": ("weighting", "p2"),
    "min_snr_gamma": ("weighting", "min_snr"),
    "logit_mean": ("density", "logit_normal"),
    "logit_std": ("density", "logit_normal"),
    "log_nsr_mean": ("density", "log_normal"),
    "log_nsr_std": ("density", "log_normal"),
    "importance_history": ("importance", "second_moment"),
    "importance_uniform": ("importance", "second_moment"),
}
"""Key of the objective -> the one it goes with, and that one's value."""


def refuse_idle(values: Mapping[str, Any], prediction: PredictionConfig, schedule: ScheduleConfig) -> None:
    """Refuse keys of the objective and of the prediction that would do nothing, unless they have their defaults.

    Args:
        values: fields of `Objective`.

    Raises:
        UserError: names the key, and what it would need.
    """
    objective, usual = objective_from(values), Objective()
    needs = {key: (getattr(objective, other) == value, f"objective.{other}={value}") for key, (other, value) in
             _NEEDS.items()}  # fmt: skip
    needs["self_condition_rate"] = (prediction.self_condition, "model.prediction.self_condition=true")
    needs["continuous_data"] = (objective.vlb_weight > 0, "objective.vlb_weight")
    for key, (met, what) in needs.items():
        if not met and getattr(objective, key) != getattr(usual, key):
            raise UserError(f"objective.{key}={values[key]} does nothing without {what}; leave it out")
    told = prediction.build_preconditioning(schedule).name
    if prediction.sigma_data != PredictionConfig().sigma_data and "edm" not in (prediction.parameterization, told):
        raise UserError(
            f"model.prediction.sigma_data={prediction.sigma_data} does nothing without the parameterization or the "
            "preconditioning edm; leave it out"
        )


def refuse_steps(model: Drawing, train: TrainConfig) -> None:
    """Refuse numbers of sampling steps that the model's own sampler and schedule cannot take. Raises `UserError`."""
    own = model.config.sampling
    spaced = grids.spec_steps(own.schedule) is not None
    asked: dict[str, int | None] = {
        f"model.sampling.schedule={own.schedule}" if spaced else f"model.sampling.steps={own.steps}": None
    }
    if train.sample_every:
        asked[f"train.sample_steps={train.sample_steps}"] = train.sample_steps
    for key, steps in asked.items():
        try:
            planned(model, None, None, steps)
        except UserError as error:
            raise UserError(f"{key} does not go with model.schedule: {error}") from None
