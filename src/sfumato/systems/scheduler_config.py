"""diffusers' `scheduler_config.json`: what it means here, and back.

There one scheduler object owns the noise schedule, what the network predicts, the spacing of steps, the solver and the
clipping. Here a `Scheduler` says the same in three typed configs. What has no counterpart is refused; a config that
`to_diffusers` writes means exactly what it was made from, for it is read again and compared.

>>> found = from_diffusers({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True})
>>> found.sampling.sampler, found.sampling.schedule, found.schedule.name
('euler', 'karras', 'linear')
>>> to_diffusers(found)["use_karras_sigmas"]
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.diffusion.solvers import find
from sfumato.errors import UserError, nearest
from sfumato.systems.config import GridConfig, PredictionConfig, SamplingConfig, ScheduleConfig, Strict, parse

Fields = dict[str, Any]
Found = tuple[str, dict[str, Any]]

_UNCAPPED = 1e6  # sample_max_value from which the quantile of dynamic thresholding counts as free
_TABLES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_RESHAPED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta_sigma"}


class Scheduler(Strict):
    """What one of diffusers' schedulers says: the noise schedule, what is predicted, and how it is sampled."""

    schedule: ScheduleConfig
    prediction: PredictionConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class Kind:
    """One of diffusers' scheduler classes.

    Attributes:
        fields: of its config, with their defaults.
        family: how it spaces its steps: "times" and "ratios" (whole and fractional times), "dpm" (one more, the last
            dropped), "lcm", "flow", "edm", "sine".
        method: the solver and its options for given fields. back: the fields for a solver's name and options.
        samplers: the solvers that it is.
        rederives: whether eps follows an x0 that was kept in range.
        round_karras: whether the network is told whole times on Karras' grid.
        repeats: whether final_sigmas_type sigma_min repeats the last level of a reshaped grid.
    """

    fields: Fields
    family: str
    method: Callable[[Fields], Found]
    back: Callable[[str, dict[str, Any]], Fields]
    samplers: tuple[str, ...]
    rederives: bool = True
    round_karras: bool = False
    repeats: bool = False


# --- solvers ---------------------------------------------------------------------------------------------------------


def _just(name: str) -> tuple[Callable[[Fields], Found], Callable[[str, dict[str, Any]], Fields], tuple[str, ...]]:
    """A class that is one solver without options."""
    return (lambda fields: (name, {})), (lambda _, options: {}), (name,)


def _ddpm(fields: Fields) -> Found:
    variance = fields["variance_type"]
    if variance in ("fixed_large", "fixed_large_log"):
        return "ddpm", {"variance": "large"}
    if variance not in ("fixed_small", "fixed_small_log", "learned_range"):
        raise UserError(f"variance_type {variance!r} has no counterpart")
    return "ddpm", {}


def _ddpm_back(name: str, options: dict[str, Any]) -> Fields:
    return {"variance_type": "fixed_large" if options.get("variance") == "large" else "fixed_small"}


def _pndm(fields: Fields) -> Found:
    return "plms" if fields["skip_prk_steps"] else "pndm_prk", {}


def _pndm_back(name: str, options: dict[str, Any]) -> Fields:
    return {"skip_prk_steps": name == "plms"}


_ODE = {"dpmsolver++": ("dpmpp_2m", "dpmpp_3m"), "dpmsolver": ("dpm_2m", "dpm_3m")}
_SDE = {"sde-dpmsolver++": ("dpmpp_2m_sde", "dpmpp_3m_sde"), "sde-dpmsolver": ("sde_dpmsolver", "sde_dpmsolver")}
_SINGLE = {"dpmsolver++": ("dpmpp_2s", "dpmpp_3s"), "dpmsolver": ("dpm_2s", "dpm_3s")}


def _multistep(fields: Fields) -> Found:
    algorithm, order = fields["algorithm_type"], fields["solver_order"]
    form = _form(fields["solver_type"])
    if algorithm in _ODE:
        options = {"order": order, "form": form, "lower_order_final": fields["lower_order_final"]}
        options |= {"euler_at_final": fields["euler_at_final"]}
        return _ODE[algorithm][order == 3], options | ({"published": True} if order == 3 else {})
    if algorithm not in _SDE:
        raise UserError(f"algorithm_type {algorithm!r} has no counterpart")
    if fields["euler_at_final"]:
        raise UserError(f"euler_at_final with algorithm_type {algorithm!r} has no counterpart")
    options = {"points": order, "kind": form, "lower_order_final": fields["lower_order_final"]}
    return _SDE[algorithm][order == 3], options | {"increments": "fresh"}


def _multistep_back(name: str, options: dict[str, Any]) -> Fields:
    algorithm = next(key for key, names in (_ODE | _SDE).items() if name in names)
    order = options["order"] if algorithm in _ODE else options["points"]
    form = options["form"] if algorithm in _ODE else options["kind"]
    shared = {"algorithm_type": algorithm, "solver_order": order, "solver_type": form}
    return shared | {
        "lower_order_final": options["lower_order_final"],
        "euler_at_final": options.get("euler_at_final", False),
    }


def _form(solver_type: str) -> str:
    """diffusers takes the names of other solvers' types for the midpoint form."""
    if solver_type in ("midpoint", "logrho", "bh1", "bh2"):
        return "midpoint"
    if solver_type != "heun":
        raise UserError(f"solver_type {solver_type!r} has no counterpart")
    return "heun"


def _singlestep(fields: Fields) -> Found:
    algorithm, order = fields["algorithm_type"], fields["solver_order"]
    if algorithm not in _SINGLE:
        raise UserError(f"a single-step solver of algorithm_type {algorithm!r} has no counterpart")
    lower = fields["lower_order_final"] or fields["final_sigmas_type"] == "zero"  # which it then sets itself
    return _SINGLE[algorithm][order == 3], {
        "order": order,
        "form": _form(fields["solver_type"]),
        "lower_order_final": lower,
    }


def _singlestep_back(name: str, options: dict[str, Any]) -> Fields:
    algorithm = next(key for key, names in _SINGLE.items() if name in names)
    shared = {"algorithm_type": algorithm, "solver_order": options["order"], "solver_type": options["form"]}
    return shared | {"lower_order_final": options["lower_order_final"]}


def _unipc(fields: Fields) -> Found:
    known = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
    if fields["solver_type"] not in known:
        raise UserError(f"solver_type {fields['solver_type']!r} has no counterpart")
    return "unipc_multistep", {
        "order": fields["solver_order"],
        "variant": known[fields["solver_type"]],
        "kind": "data" if fields["predict_x0"] else "noise",
        "lower_order_final": fields["lower_order_final"],
        "disable_corrector": tuple(fields["disable_corrector"]),
    }


def _unipc_back(name: str, options: dict[str, Any]) -> Fields:
    return {
        "solver_order": options["order"],
        "solver_type": options["variant"],
        "predict_x0": options["kind"] == "data",
        "lower_order_final": options["lower_order_final"],
        "disable_corrector": list(options["disable_corrector"]),
    }


def _deis(fields: Fields) -> Found:
    if fields["algorithm_type"] not in ("deis", "dpmsolver", "dpmsolver++"):
        raise UserError(f"algorithm_type {fields['algorithm_type']!r} has no counterpart")
    return "deis_multistep", {"order": fields["solver_order"], "lower_order_final": fields["lower_order_final"]}


def _deis_back(name: str, options: dict[str, Any]) -> Fields:
    return {"solver_order": options["order"], "lower_order_final": options["lower_order_final"]}


_SA_SOLVER = ("predictor_order", "corrector_order", "lower_order_final")


def _sa_solver(fields: Fields) -> Found:
    if fields["algorithm_type"] != "data_prediction":
        raise UserError(f"algorithm_type {fields['algorithm_type']!r} has no counterpart")
    return "sa_solver", {key: fields[key] for key in _SA_SOLVER}


def _sa_solver_back(name: str, options: dict[str, Any]) -> Fields:
    return {key: options[key] for key in _SA_SOLVER}


def _ipndm(fields: Fields) -> Found:
    if fields["trained_betas"] is not None:
        raise UserError("IPNDM with trained_betas, which are levels for one number of steps, has no counterpart")
    return "ipndm", {"denoise_last": False}


def _lcm(fields: Fields) -> Found:
    return "lcm", {"scaling": float(fields["timestep_scaling"])}


def _lcm_back(name: str, options: dict[str, Any]) -> Fields:
    return {"timestep_scaling": options["scaling"]}


# --- classes ---------------------------------------------------------------------------------------------------------

_BETAS: Fields = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0,
}  # fmt: skip
_SD_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP: Fields = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD: Fields = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SHAPES: Fields = dict.fromkeys(_RESHAPED, False)
_LEADING: Fields = {"timestep_spacing": "leading"}
_LINSPACE: Fields = {"timestep_spacing": "linspace"}
_RATIOS = _LINSPACE | _SHAPES
_ZERO: Fields = {"rescale_betas_zero_snr": False}
_ONE: Fields = {"set_alpha_to_one": True}
_DYNAMIC: Fields = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_FLOWS: Fields = {"use_flow_sigmas": False, "flow_shift": 1.0}
_DPM = _BETAS | _THRESHOLD | _SHAPES | _FLOWS | {"lower_order_final": True}
_FINAL: Fields = {"final_sigmas_type": "zero"}
_ORDER: Fields = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_CLIPPED: Fields = {"lambda_min_clipped": -math.inf, "variance_type": None}
_DISTILLED = _SD_BETAS | _CLIP | _THRESHOLD | _ZERO | _ONE | _LEADING | {
    "beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0,
}  # fmt: skip
_EDM: Fields = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rho": 7.0, "final_sigmas_type": "zero",
}  # fmt: skip
_FLOW: Fields = {"num_train_timesteps": 1000, "shift": 1.0}
_MULTISTEP = (_multistep, _multistep_back, tuple(name for names in (_ODE | _SDE).values() for name in names))

KINDS: dict[str, Kind] = {
    "DDPMScheduler": Kind(
        _BETAS | _CLIP | _THRESHOLD | _LEADING | _ZERO | {"variance_type": "fixed_small"},
        "times", _ddpm, _ddpm_back, ("ddpm",),
    ),
    "DDIMScheduler": Kind(
        _BETAS | _CLIP | _THRESHOLD | _LEADING | _ZERO | _ONE, "times", *_just("ddim"), rederives=False
    ),
    "DDIMInverseScheduler": Kind(
        _BETAS | _CLIP | _LEADING | _ZERO | _ONE, "times", *_just("ddim"), rederives=False
    ),
    "PNDMScheduler": Kind(
        _BETAS | _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        "times", _pndm, _pndm_back, ("plms", "pndm_prk"),
    ),
    "EulerDiscreteScheduler": Kind(
        _BETAS | _RATIOS | _ZERO | _FINAL
        | {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None},
        "ratios", *_just("euler"),
    ),
    "EulerAncestralDiscreteScheduler": Kind(_BETAS | _LINSPACE | _ZERO, "ratios", *_just("euler_ancestral")),
    "HeunDiscreteScheduler": Kind(_SD_BETAS | _RATIOS | _CLIP | {"clip_sample": False}, "ratios", *_just("heun")),
    "LMSDiscreteScheduler": Kind(_BETAS | _RATIOS, "ratios", *_just("lms")),
    "KDPM2DiscreteScheduler": Kind(_SD_BETAS | _RATIOS, "ratios", *_just("dpm_2"), round_karras=True),
    "KDPM2AncestralDiscreteScheduler": Kind(
        _SD_BETAS | _RATIOS, "ratios", *_just("dpm_2_ancestral"), round_karras=True
    ),
    "DPMSolverSDEScheduler": Kind(
        _SD_BETAS | _RATIOS | {"noise_sampler_seed": None}, "ratios", *_just("dpmpp_sde")
    ),
    "DPMSolverMultistepScheduler": Kind(
        _DPM | _ORDER | _CLIPPED | _FINAL | _LINSPACE | _ZERO | _DYNAMIC
        | {"euler_at_final": False, "use_lu_lambdas": False},
        "dpm", *_MULTISTEP,
    ),
    "DPMSolverSinglestepScheduler": Kind(
        _DPM | _ORDER | _CLIPPED | _FINAL | _DYNAMIC | {"lower_order_final": False},
        "dpm", _singlestep, _singlestep_back, tuple(name for names in _SINGLE.values() for name in names),
    ),
    "UniPCMultistepScheduler": Kind(
        _DPM | _FINAL | _LINSPACE | _ZERO | _DYNAMIC
        | {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None,
           "sigma_min": None, "sigma_max": None, "shift_terminal": None},
        "dpm", _unipc, _unipc_back, ("unipc_multistep", "uni_pc", "uni_pc_bh2"), repeats=True,
    ),
    "DEISMultistepScheduler": Kind(
        _DPM | _LINSPACE | _DYNAMIC | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"},
        "dpm", _deis, _deis_back, ("deis_multistep", "deis"), repeats=True,
    ),
    "SASolverScheduler": Kind(
        _DPM | _LINSPACE | _CLIPPED
        | {"predictor_order": 2, "corrector_order": 2, "tau_func": None, "algorithm_type": "data_prediction"},
        "dpm", _sa_solver, _sa_solver_back, ("sa_solver",), repeats=True,
    ),
    "IPNDMScheduler": Kind(
        {"num_train_timesteps": 1000, "trained_betas": None}, "sine", _ipndm, lambda _, options: {}, ("ipndm",)
    ),
    "LCMScheduler": Kind(_DISTILLED, "lcm", _lcm, _lcm_back, ("lcm",)),
    "TCDScheduler": Kind(_DISTILLED, "lcm", *_just("tcd"), rederives=False),
    "EDMEulerScheduler": Kind(_EDM, "edm", *_just("euler")),
    "EDMDPMSolverMultistepScheduler": Kind(
        _EDM | _ORDER | _THRESHOLD | {"lower_order_final": True, "euler_at_final": False}, "edm", *_MULTISTEP
    ),
    "FlowMatchEulerDiscreteScheduler": Kind(
        _FLOW | _SHAPES | _DYNAMIC
        | {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
           "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
        "flow", *_just("euler"),
    ),
    "FlowMatchHeunDiscreteScheduler": Kind(_FLOW, "flow", *_just("flow_heun")),
}  # fmt: skip
"""diffusers' classes that have a counterpart. Several differ from one another in a default only."""

_SAME_CONFIG = {"DDPMParallelScheduler": "DDPMScheduler", "DDIMParallelScheduler": "DDIMScheduler"}

# fields that must have these values: anything else has no counterpart
_MUST: Fields = {
    "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False, "stochastic_sampling": False,
    "solver_p": None, "tau_func": None, "interpolation_type": "linear", "timestep_type": "discrete",
    "noise_sampler_seed": None,
}  # fmt: skip


# --- from diffusers --------------------------------------------------------------------------------------------------


def from_diffusers(values: Mapping[str, Any]) -> Scheduler:
    """What a `scheduler_config.json` means.

    Args:
        values: its content. Fields of other scheduler classes are passed over, as diffusers does.

    Raises:
        UserError: an unknown class (with the nearest) or field, a value of the wrong type, or a setting that has no
            counterpart here.
    """
    name, kind, fields = _read(values)
    sampler, options = kind.method(fields)
    where = f"the config of a {name}"
    sampling: Fields = {"sampler": sampler, "sampler_options": options} | _kept_in_range(kind, fields)
    grid = _GRIDS[kind.family](kind, fields)
    if name == "DDIMInverseScheduler":
        grid["inverse"] = True
    sampling |= {"grid": grid, "schedule": grid["name"], "start": _start(kind, fields)}
    if name == "DDPMScheduler":
        sampling["steps"] = fields["num_train_timesteps"]
    whole = {"schedule": _schedule(kind, fields), "prediction": _prediction(kind, fields), "sampling": sampling}
    return parse(Scheduler, whole, where)


def _read(values: Mapping[str, Any]) -> tuple[str, Kind, Fields]:
    """The class and all its fields, those left out by their defaults."""
    name = values.get("_class_name", "DDPMScheduler")
    name = _SAME_CONFIG.get(name, name) if isinstance(name, str) else name
    if name not in KINDS:
        raise UserError(f"the scheduler class {name!r} has no counterpart{nearest(str(name), KINDS)}")
    kind = KINDS[name]
    everything = {field for other in KINDS.values() for field in other.fields}
    for field, value in values.items():
        if field.startswith("_"):
            continue
        if field not in everything:
            raise UserError(f"unknown field {field!r} in a scheduler's config{nearest(field, kind.fields)}")
        if field in kind.fields and not _fits(value, kind.fields[field]):
            raise UserError(f"a scheduler's {field} cannot be {value!r:.60}")
    fields = {field: values.get(field, default) for field, default in kind.fields.items()}
    for field, only in _MUST.items():
        if field in fields and fields[field] != only:
            raise UserError(f"a {name} with {field} {fields[field]!r:.60} has no counterpart")
    return name, kind, fields


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its field's type; None is a default that may be anything."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _schedule(kind: Kind, fields: Fields) -> Fields:
    if kind.family == "edm":
        return {"name": "ve", "sigma_min": fields["sigma_min"], "sigma_max": fields["sigma_max"]}
    if kind.family == "sine":
        return {"name": "sine"}
    if kind.family == "flow" or fields.get("use_flow_sigmas"):
        if fields["num_train_timesteps"] != 1000:
            raise UserError("a flow of other than 1000 num_train_timesteps has no counterpart")
        return {"name": "flow"}
    steps, zero = fields["num_train_timesteps"], fields.get("rescale_betas_zero_snr", False)
    if fields["trained_betas"] is not None:
        return {"name": "betas", "steps": steps, "betas": fields["trained_betas"], "zero_terminal_snr": zero}
    table = fields["beta_schedule"]
    if table not in _TABLES:
        raise UserError(f"beta_schedule {table!r} has no counterpart{nearest(table, _TABLES)}")
    found = {"name": _TABLES[table], "steps": steps, "zero_terminal_snr": zero}
    return found if table == "squaredcos_cap_v2" else found | {"start": fields["beta_start"], "end": fields["beta_end"]}


def _prediction(kind: Kind, fields: Fields) -> Fields:
    predicts = fields.get("prediction_type", "flow_prediction")
    if kind.family == "edm":
        if predicts != "epsilon":
            raise UserError(f"an EDM scheduler with prediction_type {predicts!r} has no counterpart")
        return {"parameterization": "edm", "sigma_data": fields["sigma_data"]}
    if kind.family == "sine":
        return {"parameterization": "v"}
    if predicts not in _PREDICTS:
        raise UserError(f"prediction_type {predicts!r} has no counterpart{nearest(predicts, _PREDICTS)}")
    variance = fields.get("variance_type") or ""
    return {"parameterization": _PREDICTS[predicts], "learned_variance": variance in ("learned", "learned_range")}


def _kept_in_range(kind: Kind, fields: Fields) -> Fields:
    """Clipping and thresholding; diffusers caps the quantile at sample_max_value, by default 1, which is clipping."""
    kept = {"rederive_eps": kind.rederives}
    if fields.get("thresholding"):
        cap = fields["sample_max_value"]
        if cap == 1:
            return kept | {"threshold": "static"}
        if cap < _UNCAPPED:
            raise UserError(f"thresholding with sample_max_value {cap:g}, a cap on the quantile, has no counterpart")
        return kept | {"threshold": "dynamic", "quantile": fields["dynamic_thresholding_ratio"]}
    if fields.get("clip_sample"):
        return kept | {"threshold": "static", "limit": fields["clip_sample_range"]}
    return {"threshold": "none"}


def _start(kind: Kind, fields: Fields) -> str:
    """In ratios diffusers leaves the data's share of the first level out, but for leading."""
    return "sigma" if kind.family == "ratios" and fields["timestep_spacing"] != "leading" else "marginal"


# --- grids -----------------------------------------------------------------------------------------------------------


def _spaced(fields: Fields, names: Mapping[str, str]) -> Fields:
    """The grid of a timestep_spacing."""
    spacing = fields.get("timestep_spacing", "linspace")
    if spacing not in names:
        raise UserError(f"timestep_spacing {spacing!r} has no counterpart{nearest(spacing, names)}")
    options = {"offset": fields["steps_offset"]} if spacing == "leading" and fields["steps_offset"] else {}
    return {"name": names[spacing], "options": options}


def _reshaped(fields: Fields) -> str | None:
    """The grid that use_…_sigmas asks for, if one does."""
    asked = [name for field, name in _RESHAPED.items() if fields.get(field)]
    asked += ["exponential"] if fields.get("use_lu_lambdas") else []
    if len(asked) > 1:
        raise UserError("only one of a scheduler's use_…_sigmas can be set")
    return asked[0] if asked else None


def _bounds(fields: Fields) -> Fields:
    given = {"low": fields.get("sigma_min"), "high": fields.get("sigma_max")}
    return {key: float(value) for key, value in given.items() if value is not None}


def _clock(name: str, fields: Fields) -> Fields:
    """Beta's ramp is always in ratios there; ours is only where these are few. Pure noise has no greatest one."""
    return {"clock": "nsr"} if name == "beta_sigma" and not fields.get("rescale_betas_zero_snr") else {}


def _times_grid(kind: Kind, fields: Fields) -> Fields:
    spaced = _spaced(fields, {"leading": "leading", "trailing": "trailing", "linspace": "linspace"})
    return spaced | {"end": "clean" if fields.get("set_alpha_to_one", True) else "first"}


def _ratios_grid(kind: Kind, fields: Fields) -> Fields:
    spaced = _spaced(fields, {"leading": "leading", "trailing": "trailing", "linspace": "normal"})
    if spaced["name"] == "normal":
        spaced["options"] = {"linear_nsr": True}
    end = {"end": "first" if fields.get("final_sigmas_type") == "sigma_min" else "clean"}
    name = _reshaped(fields)
    if name is None:
        return spaced | end
    whole = {"round_t": True} if name == "karras" and kind.round_karras else {}
    within = None if spaced["name"] == "normal" else spaced
    return {"name": name, "options": _bounds(fields) | _clock(name, fields) | whole, "within": within} | end


def _dpm_grid(kind: Kind, fields: Fields) -> Fields:
    final, name = fields.get("final_sigmas_type", "sigma_min"), _reshaped(fields)
    if fields["use_flow_sigmas"]:
        return _flow_sigmas(fields, final, name)
    if name is not None:
        rounded = name == "karras" or bool(fields.get("use_lu_lambdas"))
        cut = "use_lu_lambdas" in fields and fields["beta_schedule"] == "squaredcos_cap_v2"
        whole: bool | str = True if rounded and not cut else "down"
        end = "clean" if final == "zero" else "last" if kind.repeats else "first"
        return {"name": name, "options": _bounds(fields) | _clock(name, fields) | {"round_t": whole}, "end": end}
    spaced = _spaced(fields, {"leading": "dpm_leading", "trailing": "trailing", "linspace": "dpm_linspace"})
    if (least := fields.get("lambda_min_clipped", -math.inf)) != -math.inf:
        if spaced["name"] == "trailing":
            raise UserError("lambda_min_clipped with trailing steps has no counterpart")
        spaced["options"] |= {"lambda_min": least}
    return spaced | {"end": "clean" if final == "zero" else "first"}


def _flow_sigmas(fields: Fields, final: str, name: str | None) -> Fields:
    """On flows: DPM-Solver's even times from almost 1 to 0, UniPC's from 1 to 1/1000; the last is dropped."""
    if name is not None:
        raise UserError("use_flow_sigmas together with another use_…_sigmas has no counterpart")
    ends = {} if "predict_x0" in fields else {"first_t": 0.999, "last_t": 0.0}
    end = "clean" if final == "zero" else "last"
    return {"name": "sgm_uniform", "options": ends | {"shift": float(fields["flow_shift"])}, "end": end}


def _lcm_grid(kind: Kind, fields: Fields) -> Fields:
    options = {"origin_steps": fields["original_inference_steps"]}
    return {"name": "lcm", "options": options, "end": "clean" if fields["set_alpha_to_one"] else "first"}


def _edm_grid(kind: Kind, fields: Fields) -> Fields:
    name = fields["sigma_schedule"]
    if name not in ("karras", "exponential"):
        raise UserError(f"sigma_schedule {name!r} has no counterpart{nearest(name, ('karras', 'exponential'))}")
    end = "clean" if fields["final_sigmas_type"] == "zero" else "last"
    return {"name": name, "options": {"rho": fields["rho"]} if name == "karras" else {}, "end": end}


def _flow_grid(kind: Kind, fields: Fields) -> Fields:
    """Evenly from 1 to the cleanest time, which diffusers has shifted once before it shifts them all."""
    shift = float(fields["shift"])
    last = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    plain = {"name": "linspace", "options": {"last_t": last, "shift": shift}}
    name = _reshaped(fields)
    return plain if name is None else {"name": name, "options": {"clock": "sigma"}, "within": plain}


def _sine_grid(kind: Kind, fields: Fields) -> Fields:
    """Evenly from 1 to 0, of which the last is the clean end."""
    return {"name": "sgm_uniform", "options": {"first_t": 1.0, "last_t": 0.0}}


_GRIDS = {
    "times": _times_grid, "ratios": _ratios_grid, "dpm": _dpm_grid, "lcm": _lcm_grid, "edm": _edm_grid,
    "flow": _flow_grid, "sine": _sine_grid,
}  # fmt: skip


# --- back to diffusers -----------------------------------------------------------------------------------------------


def to_diffusers(scheduler: Scheduler) -> Fields:
    """The `scheduler_config.json` of a diffusers class that means exactly this, every field of the class written out.

    Raises:
        UserError: where there is none.
    """
    method = find(scheduler.sampling.sampler)[0]
    options = {**method.options, **scheduler.sampling.sampler_options}
    why = f"diffusers has no {method.title} scheduler"
    for name, kind in KINDS.items():
        if method.name not in kind.samplers or not _may_be(name, kind, scheduler):
            continue
        try:
            fields = kind.fields | kind.back(method.name, _complete(method.make, options))
            fields |= _fields_of(kind, scheduler)
            found = from_diffusers({"_class_name": name} | fields)
        except UserError as error:
            why = str(error)
            continue
        differs = _difference(scheduler, found)
        if differs is None:
            return {"_class_name": name} | {key: fields[key] for key in kind.fields}
        why = f"a {name} has another {differs}"
    raise UserError(f"this has no counterpart in diffusers: {why}")


def _complete(make: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A solver's options with those that were left out."""
    built = make(**options)
    return {name: getattr(built, name) for name in getattr(built, "__dataclass_fields__", {})}


def _may_be(name: str, kind: Kind, scheduler: Scheduler) -> bool:
    families = {"ve": ("edm",), "flow": ("flow", "dpm"), "sine": ("sine",)}
    possible = families.get(scheduler.schedule.name, ("times", "ratios", "dpm", "lcm"))
    return kind.family in possible and _grid(scheduler).inverse == (name == "DDIMInverseScheduler")


def _grid(scheduler: Scheduler) -> GridConfig:
    """The grid in full."""
    return scheduler.sampling.grid or GridConfig(name=scheduler.sampling.schedule)


def _fields_of(kind: Kind, scheduler: Scheduler) -> Fields:
    """Fields for all but the solver, as far as the class has them; what it lacks shows when they are read again."""
    schedule, prediction, grid = scheduler.schedule, scheduler.prediction, _grid(scheduler)
    fields = _fields_of_grid(kind, grid) | _fields_of_range(kind, scheduler.sampling)
    if schedule.name == "ve":
        fields |= {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        fields |= {"sigma_data": prediction.sigma_data}
    elif schedule.name == "flow":
        fields |= {"use_flow_sigmas": True}
    elif schedule.name != "sine":
        fields |= _fields_of_table(schedule)
    predicts = {ours: theirs for theirs, ours in _PREDICTS.items()} | {"edm": "epsilon"}
    fields |= {"prediction_type": predicts[prediction.parameterization]}
    fields |= {"variance_type": "learned_range"} if prediction.learned_variance else {}
    return {field: value for field, value in fields.items() if field in kind.fields}


def _fields_of_table(schedule: ScheduleConfig) -> Fields:
    names = {ours: theirs for theirs, ours in _TABLES.items()}
    fields: Fields = {"num_train_timesteps": schedule.steps, "rescale_betas_zero_snr": schedule.zero_terminal_snr}
    if schedule.betas is not None:
        return fields | {"trained_betas": list(schedule.betas)}
    if schedule.name not in names:
        raise UserError(f"diffusers has no beta_schedule for {schedule.name!r}")
    start, end = _beta_ends(schedule)
    fields |= {"beta_schedule": names[schedule.name]}
    return fields if start is None else fields | {"beta_start": start, "beta_end": end}


def _beta_ends(schedule: ScheduleConfig) -> tuple[float | None, float | None]:
    """First and last beta, the schedule's own defaults filled in."""
    start, end = {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012)}.get(schedule.name, (None, None))
    return schedule.start or start, schedule.end or end


def _fields_of_range(kind: Kind, sampling: SamplingConfig) -> Fields:
    if sampling.threshold == "dynamic":
        quantile = {"dynamic_thresholding_ratio": sampling.quantile, "sample_max_value": _UNCAPPED}
        return {"clip_sample": False, "thresholding": True} | quantile
    clips = sampling.threshold == "static"
    if "clip_sample" in kind.fields:
        return {"clip_sample": clips, "clip_sample_range": sampling.limit if clips else 1.0}
    return {"thresholding": clips}


def _fields_of_grid(kind: Kind, grid: GridConfig) -> Fields:
    spaced = grid.within or grid
    spacings = {"leading": "leading", "dpm_leading": "leading", "ddim_uniform": "leading", "trailing": "trailing"}
    fields: Fields = {
        "timestep_spacing": spacings.get(spaced.name, "linspace"),
        "steps_offset": spaced.options.get("offset", 1 if spaced.name == "ddim_uniform" else 0),
        "set_alpha_to_one": grid.end == "clean",
        "final_sigmas_type": "zero" if grid.end == "clean" else "sigma_min",
        "lambda_min_clipped": grid.options.get("lambda_min", -math.inf),
        "original_inference_steps": grid.options.get("origin_steps", 50),
        "sigma_schedule": grid.name, "rho": grid.options.get("rho", 7.0),
        "shift": spaced.options.get("shift", 1.0), "flow_shift": grid.options.get("shift", 1.0),
    }  # fmt: skip
    fields |= {"sigma_min": grid.options.get("low"), "sigma_max": grid.options.get("high")}
    fields |= {field: name == grid.name for field, name in _RESHAPED.items()}
    if kind.family == "dpm" and grid.name == "exponential" and grid.options.get("round_t") is True:
        fields |= {"use_exponential_sigmas": False, "use_lu_lambdas": True}
    return fields


def _difference(wanted: Scheduler, found: Scheduler) -> str | None:
    """What two schedulers differ in, in a word, None where they mean the same."""
    ours, theirs = wanted.schedule, found.schedule
    ends = {"start": None, "end": None}
    if ours.model_copy(update=ends) != theirs.model_copy(update=ends) or _beta_ends(ours) != _beta_ends(theirs):
        return "noise schedule"
    told = [_told(scheduler) for scheduler in (wanted, found)]
    if told[0] != told[1]:
        return "prediction"
    a, b = wanted.sampling, found.sampling
    if a.solver() != b.solver():
        return "solver"
    kept = [(s.threshold, s.limit, s.quantile, s.rederive_eps) if s.threshold != "none" else None for s in (a, b)]
    if kept[0] != kept[1]:
        return "way of keeping x0 in range"
    if a.start != b.start:
        return "start"
    return None if _same_levels(wanted, found) else "grid"


def _told(scheduler: Scheduler) -> tuple[Any, ...]:
    """What the network outputs and is shown."""
    prediction = scheduler.prediction
    data = prediction.sigma_data if prediction.parameterization == "edm" else None
    shown = prediction.build_preconditioning(scheduler.schedule).name
    return prediction.parameterization, data, prediction.learned_variance, shown


def _same_levels(wanted: Scheduler, found: Scheduler) -> bool:
    """Whether two grids visit the same levels, looked at with a few numbers of steps."""
    schedule = wanted.schedule.build()
    for steps in (2, 10, 15, 49):
        a, b = (_grid(scheduler).build(schedule, steps) for scheduler in (wanted, found))
        pairs = list(zip(a, b, strict=False))
        numbers = [(float(getattr(x, n)), float(getattr(y, n))) for x, y in pairs for n in ("t", "alpha", "sigma")]
        if len(a) != len(b) or not all(math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-15) for x, y in numbers):
            return False
    return True
