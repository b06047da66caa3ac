"""Typed, closed configs that every system shares: schedule, prediction, sampling defaults.

An unknown key is an error that names the nearest one. Nothing in a config is an import path: names are looked up in
registries.

>>> ScheduleConfig(name="cosine").build().steps
1000
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from torch import nn

from sfumato.diffusion import grid as grids
from sfumato.diffusion import schedule as schedules
from sfumato.diffusion.denoiser import Denoiser, Preconditioning, preconditioning
from sfumato.diffusion.guidance import check_interval
from sfumato.diffusion.parameterization import Parameterization, parameterization
from sfumato.diffusion.solvers import Solver, find
from sfumato.errors import UserError, nearest
from sfumato.networks.outline import made_on

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights are asked for in, by name."""
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a type that is given by this name, by one that is common for it, or as torch's own.

    >>> dtype_name("fp16"), dtype_name(torch.bfloat16), dtype_name("float32")
    ('float16', 'bfloat16', 'float32')
    """
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)


_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Strict(BaseModel):
    """A frozen config that refuses unknown keys and numbers that are not finite.

    A whole number may be written 1e4, which YAML takes for text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: ValidationInfo) -> Any:
        whole = info.field_name is not None and cls.model_fields[info.field_name].annotation is int
        return float(value) if whole and isinstance(value, str) and _FLOAT.fullmatch(value) else value


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(model: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Validate a mapping; the first problem becomes one sentence with its place and the nearest right key.

    Args:
        where: what is being read, e.g. "recipe.yaml" or a model's path.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {sentence(model, error)}") from None


def sentence(model: type, error: ValidationError) -> str:
    """The first problem of a config of type `model` as one sentence: where, what is expected, what was given."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path) or "config"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{dotted}'{nearest(path[-1], _fields_at(model, path[:-1]))}"
    if isinstance(own := first.get("ctx", {}).get("error"), UserError):
        return f"{dotted}: {own}"
    given = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message[:1].lower()}{message[1:]}{given}"


def _fields_at(model: type, path: list[str]) -> list[str]:
    """Names of the fields of the config found by following `path` from `model`."""
    for part in path:
        field = model.model_fields.get(part) if issubclass(model, BaseModel) else None
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields) if issubclass(model, BaseModel) else []


CONTINUOUS = ("flow", "sine", "ve")
"""Schedules without a table: every time between two ends has its level."""

_OF_TABLES = {"steps", "zero_terminal_snr", "interpolation"}
_KEYS = {
    "linear": _OF_TABLES | {"start", "end"},
    "scaled_linear": _OF_TABLES | {"start", "end"},
    "cosine": _OF_TABLES,
    "sigmoid": _OF_TABLES,
    "betas": _OF_TABLES,
    "flow": {"shift"},
    "sine": set[str](),
    "ve": {"sigma_min", "sigma_max"},
}
"""Which keys each schedule takes; `betas` has a rule of its own."""


class ScheduleConfig(Strict):
    """A noise schedule.

    A key that its schedule does not take may be there, but only with the default value.

    Attributes:
        name: linear, scaled_linear, cosine, sigmoid, betas (tables), flow, sine or ve (continuous).
        steps: length of a table.
        betas: the table itself, `steps` of them, where the name is "betas".
        start, end: first and last beta of linear and scaled_linear; None for the schedule's own defaults.
        zero_terminal_snr: rescale the table so that it ends in pure noise.
        interpolation: of a table at fractional times.
        shift: of the flow schedule.
        sigma_min, sigma_max: of the exploding schedule.
    """

    name: Literal["linear", "scaled_linear", "cosine", "sigmoid", "betas", "flow", "sine", "ve"] = "linear"
    steps: int = Field(default=1000, ge=2, le=100_000)
    betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    start: float | None = Field(default=None, gt=0, lt=1)
    end: float | None = Field(default=None, gt=0, lt=1)
    zero_terminal_snr: bool = False
    interpolation: Literal["log", "linear"] = "log"
    shift: float = Field(default=1.0, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)

    @model_validator(mode="after")
    def _betas_belong_to_their_name(self) -> ScheduleConfig:
        if (self.betas is None) != (self.name != "betas"):
            raise UserError("schedule.betas and the schedule's name 'betas' belong together")
        if self.betas is not None and len(self.betas) != self.steps:
            raise UserError(f"schedule.betas has {len(self.betas)} numbers for {self.steps} steps")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_their_name(self) -> ScheduleConfig:
        for key, field in type(self).model_fields.items():
            taking = [name for name, keys in _KEYS.items() if key in keys]
            if taking and self.name not in taking and getattr(self, key) != field.default:
                raise UserError(
                    f"schedule.{key}={getattr(self, key)} does nothing with the schedule {self.name!r}; it is for "
                    f"{', '.join(taking)}"
                )
        return self

    def build(self) -> schedules.Schedule:
        """The schedule itself."""
        if self.name == "flow":
            return schedules.FlowSchedule(self.shift)
        if self.name == "sine":
            return schedules.SineSchedule()
        if self.name == "ve":
            return schedules.VESchedule(self.sigma_min, self.sigma_max)
        return schedules.TableSchedule(self._table(), interpolation=self.interpolation)

    def _table(self) -> torch.Tensor:
        tables: dict[str, Callable[..., torch.Tensor]] = {
            "linear": schedules.linear_alpha_bar,
            "scaled_linear": schedules.scaled_linear_alpha_bar,
            "cosine": schedules.cosine_alpha_bar,
            "sigmoid": schedules.sigmoid_alpha_bar,
        }
        ends = {"start": self.start, "end": self.end}
        given = {key: value for key, value in ends.items() if value is not None}
        if self.betas is not None:
            table = schedules.alpha_bar_from_betas(torch.tensor(self.betas, dtype=torch.float64))
        else:
            table = tables[self.name](self.steps, **given)
        return schedules.rescale_zero_terminal_snr(table) if self.zero_terminal_snr else table


class PredictionConfig(Strict):
    """What the network outputs and how it is shown the noise level.

    Attributes:
        parameterization: eps, x0, v, flow or edm.
        sigma_data: standard deviation of the data, for edm.
        preconditioning: time, time_1000, signal, angle or edm; "auto" takes what fits the schedule.
        learned_variance: the network also outputs the variance.
        self_condition: the network also sees its previous estimate.
    """

    parameterization: Literal["eps", "x0", "v", "flow", "edm"] = "eps"
    sigma_data: float = Field(default=0.5, gt=0)
    preconditioning: Literal["auto", "time", "time_1000", "signal", "angle", "edm"] = "auto"
    learned_variance: bool = False
    self_condition: bool = False

    def build_parameterization(self) -> Parameterization:
        return parameterization(self.parameterization, sigma_data=self.sigma_data)

    def build_preconditioning(self, schedule: ScheduleConfig) -> Preconditioning:
        fits = {"flow": "time_1000", "sine": "angle", "ve": "edm"}.get(schedule.name, "time")
        name = fits if self.preconditioning == "auto" else self.preconditioning
        return preconditioning(name, sigma_data=self.sigma_data)


def without_derived(network: dict[str, Any], derived: Collection[str], source: str) -> dict[str, Any]:
    """A network's fields as a config gives them. Raises `ValueError` for one that follows from `source`."""
    for key in derived:
        if key in network:
            raise ValueError(f"network.{key} follows from {source}; leave it out")
    return network


def build_denoiser(
    network: Callable[[], nn.Module], schedule: ScheduleConfig, prediction: PredictionConfig, device: str
) -> Denoiser:
    """A denoiser around a new network, made on `device` ("meta" for none of its weights).

    Raises:
        UserError: when the config asks for what cannot be built.
    """
    try:
        with made_on(device):
            built = network()
        return Denoiser(
            built,
            schedule.build(),
            prediction.build_parameterization(),
            preconditioning=prediction.build_preconditioning(schedule),
            learned_variance=prediction.learned_variance,
            self_condition=prediction.self_condition,
        )
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"the model's config cannot be built: {str(error).splitlines()[0]}") from None


Options = dict[str, bool | int | float | str | tuple[int, ...]]


class GridConfig(Strict):
    """A spacing of steps with its options: what its name alone does not say.

    Attributes:
        name: of the grid, or a respacing spec.
        options: of its function (offset, rho, round_t …).
        within: another grid of as many steps, between whose noisiest and cleanest level this one lies.
        end: the level after the last step: clean; first, the schedule's cleanest; or last, the grid's own cleanest.
        inverse: the same levels clean to noisy, for inversion.
    """

    name: str = "trailing"
    options: Options = Field(default_factory=dict)
    within: GridConfig | None = None
    end: Literal["clean", "first", "last"] = "clean"
    inverse: bool = False

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return grids.canonical(name)

    def build(self, schedule: schedules.Schedule, steps: int) -> grids.Grid:
        """The levels, `steps + 1` of them; `steps` where the cleanest is the end itself."""
        options: dict[str, Any] = dict(self.options)
        if self.within is not None:
            bounds = self.within.build(schedule, steps)[:steps]
            options |= {"low": float(bounds[-1].nsr), "high": float(bounds[0].nsr)}
        try:
            levels = grids.grid(self.name, schedule, steps, **options)
        except TypeError as error:
            raise UserError(f"the schedule {self.name!r} does not take these options ({error})") from None
        levels = self._ended(levels, schedule)
        return grids.reversed_(levels) if self.inverse else levels

    def _ended(self, levels: grids.Grid, schedule: schedules.Schedule) -> grids.Grid:
        if self.end == "clean":
            return levels
        first = schedule.level(schedule.t_range[0])
        there = self.end == "last" or float(levels[-2].nsr) <= float(first.nsr) * (1 + 1e-9)
        return levels[:-1] if there else [*levels[:-1], first]


class SamplingConfig(Strict):
    """How a model is sampled unless told otherwise.

    Attributes:
        sampler, schedule: names of the solver and of the spacing of steps.
        sampler_options: of that solver (order, variance …); another solver does without.
        grid: that spacing in full, where its name alone does not say it; another spacing does without.
        steps: how many.
        guidance: classifier-free guidance; 1 is off.
        guidance_interval: noise-to-signal ratios (low, high) within which it acts; None for all.
        perp_neg: weight of that part of a negative prompt which takes nothing from the prompt (Armandpour 2023); 0: the
            negative takes the null's place.
        start: what sampling begins with: marginal, noise of the first level's whole spread, `sqrt(alpha² + sigma²)`;
            or sigma, of its noise alone.
        threshold: what keeps x0 in range: static (clip), dynamic, or none (latents).
        limit: the range that it is kept in, [-limit, limit].
        quantile: of dynamic thresholding.
        rederive_eps: whether eps then agrees with the x0 that was kept in range.
    """

    sampler: str = "ddim"
    sampler_options: Options = Field(default_factory=dict)
    schedule: str = "trailing"
    grid: GridConfig | None = None
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    guidance_interval: tuple[float, float] | None = None
    perp_neg: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    start: Literal["marginal", "sigma"] = "marginal"
    threshold: Literal["static", "dynamic", "none"] = "static"
    limit: float = Field(default=1.0, gt=0)
    quantile: float = Field(default=0.995, gt=0, le=1)
    rederive_eps: bool = True

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str) -> str:
        find(name)
        return name

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        grids.canonical(name)
        return name

    @field_validator("guidance_interval")
    @classmethod
    def _rising(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        check_interval(interval)
        return interval

    @model_validator(mode="after")
    def _options_fit(self) -> SamplingConfig:
        self.solver()
        if self.grid is not None and self.grid.name != grids.canonical(self.schedule):
            raise UserError(f"the grid is {self.grid.name!r}, but the schedule is {self.schedule!r}")
        return self

    def solver(self) -> Solver[Any]:
        """The default solver with its options."""
        method = find(self.sampler)[0]
        try:
            return method.build(**self.sampler_options)
        except TypeError as error:
            raise UserError(f"the sampler {method.name!r} does not take these options ({error})") from None

    def levels(self, name: str, schedule: schedules.Schedule, steps: int) -> grids.Grid:
        """The grid of a name, in full where it is the default one."""
        if self.grid is not None and grids.canonical(name) == self.grid.name:
            return self.grid.build(schedule, steps)
        return grids.grid(name, schedule, steps)
