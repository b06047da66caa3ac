"""diffusers' scheduler configs: the levels that their schedulers visit, the way back, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sfumato.errors import UserError
from sfumato.systems.config import GridConfig, PredictionConfig, SamplingConfig, ScheduleConfig
from sfumato.systems.scheduler_config import KINDS, Scheduler, from_diffusers, to_diffusers

STEPS = 12
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OFFSET = {**SD, "timestep_spacing": "leading", "steps_offset": 1}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": [
        {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"variance_type": "fixed_large"},
        {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}, {"thresholding": True},
        {"trained_betas": np.linspace(0.001, 0.02, 100).tolist(), "num_train_timesteps": 100},
        {"thresholding": True, "sample_max_value": 1e6, "clip_sample": False},
    ],
    "DDIMScheduler": [
        {**OFFSET, "clip_sample": False, "set_alpha_to_one": False}, {"clip_sample_range": 2.0},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    "DDIMInverseScheduler": [{**OFFSET, "set_alpha_to_one": False}],
    "PNDMScheduler": [{**OFFSET, "skip_prk_steps": True}],
    "EulerDiscreteScheduler": [
        {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, OFFSET,
        {"use_karras_sigmas": True}, {**OFFSET, "use_karras_sigmas": True}, {"use_exponential_sigmas": True},
        {**SD, "use_beta_sigmas": True}, {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 100.0},
    ],
    "EulerAncestralDiscreteScheduler": [OFFSET],
    "HeunDiscreteScheduler": [{"use_karras_sigmas": True, "timestep_spacing": "trailing"}, {"clip_sample": True}],
    "LMSDiscreteScheduler": [{**SD, "use_exponential_sigmas": True}],
    "KDPM2DiscreteScheduler": [{"use_karras_sigmas": True}, {"use_beta_sigmas": True}],
    "KDPM2AncestralDiscreteScheduler": [{"use_karras_sigmas": True}],
    "DPMSolverMultistepScheduler": [
        OFFSET, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True}, {"use_lu_lambdas": True}, {"final_sigmas_type": "sigma_min"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {"solver_order": 3, "euler_at_final": True},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 1},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {"thresholding": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"variance_type": "learned_range", "lower_order_final": False},
    ],
    "DPMSolverSinglestepScheduler": [
        {"use_karras_sigmas": True}, {"solver_order": 3}, {"lambda_min_clipped": -3.0, "lower_order_final": True},
    ],
    "UniPCMultistepScheduler": [
        OFFSET, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "solver_order": 3, "disable_corrector": [0, 1], "predict_x0": False},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ],
    "DEISMultistepScheduler": [{"use_karras_sigmas": True}, {"solver_order": 3, "timestep_spacing": "leading"}],
    "SASolverScheduler": [{"use_karras_sigmas": True}, {"predictor_order": 3, "corrector_order": 4}],
    "LCMScheduler": [{"timestep_scaling": 5.0, "original_inference_steps": 100}],
    "TCDScheduler": [{"prediction_type": "v_prediction"}],
    "EDMEulerScheduler": [{"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min", "rho": 5.0}],
    "EDMDPMSolverMultistepScheduler": [{"solver_order": 3, "sigma_max": 20.0}],
    "FlowMatchEulerDiscreteScheduler": [
        {"shift": 3.0}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True, "shift": 2.0},
        {"use_exponential_sigmas": True},
    ],
    "FlowMatchHeunDiscreteScheduler": [{"shift": 3.0}],
}  # fmt: skip
NEEDS_TORCHSDE = "DPMSolverSDEScheduler"
CASES = [
    (name, options) for name in KINDS if name != NEEDS_TORCHSDE for options in [{}, *VARIANTS.get(name, [])]
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {json.dumps(o)[:70]}" for n, o in CASES])


def make(name: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(STEPS)
    return scheduler


def config(scheduler: Any) -> dict[str, Any]:
    """What `save_pretrained` writes."""
    return json.loads(scheduler.to_json_string())


def visited(name: str, scheduler: Any) -> tuple[list[float], list[float]]:
    """(times that the network is told, noise-to-signal ratios with the one at the end) of a scheduler."""
    times, sigmas = scheduler.timesteps.tolist(), getattr(scheduler, "sigmas", None)
    if name == "IPNDMScheduler":
        return times, (scheduler.betas.double() / scheduler.alphas.double()).tolist()
    if name.startswith("EDM"):
        return [float(s) for s in sigmas[:-1]], [float(s) for s in sigmas]
    if name.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False):
        every = 2 if name == "FlowMatchHeunDiscreteScheduler" else 1
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1][::every], sigmas[-1:]]).double()
        return [float(s) for s in sigmas[:-1]], [float(s / (1 - s)) for s in sigmas]
    if KINDS[name].family == "ratios":
        every = 1 if "Euler" in name or "LMS" in name else 2
        inner = sigmas[1:-1][::every]
        found = [sigmas[0], *inner, sigmas[-1]][: STEPS + 1]
        return [times[0], *times[every::every]], [float(s) for s in found]
    if sigmas is not None:
        return [float(t) for t in times], [float(s) for s in sigmas]
    bar = scheduler.alphas_cumprod.double()
    ratios = [float(((1 - bar[int(t)]) / bar[int(t)]) ** 0.5) for t in times]
    final = float(getattr(scheduler, "final_alpha_cumprod", getattr(scheduler, "initial_alpha_cumprod", 1.0)))
    return [float(t) for t in times], [*ratios, ((1 - final) / final) ** 0.5]


@each_case
def test_levels_are_theirs(name: str, options: dict[str, Any]) -> None:
    """"Doubled times": PNDM lists its Runge-Kutta evaluations and one PLMS time twice. "Last level twice": where the
    end is the grid's last level theirs makes a step that changes nothing, ours leaves it out. "Told the end": DDIM
    inversion asks the network at the time it goes to, ours at the one it comes from. "Almost one": UniPC on flows
    begins at 1 - 1e-6. "Almost no signal": Euler's table of zero terminal SNR ends in alpha_bar = 2^-24. "Cancelling
    tail": in float32 1 - alpha_bar of the cleanest level is wrong by 3e-4, which moves the times of reshaped grids by
    up to 0.01, and one that is cut to a whole number by one.
    """
    scheduler = make(name, options)
    meaning = from_diffusers(config(scheduler))
    assert meaning.sampling.grid is not None
    levels = meaning.sampling.grid.build(meaning.schedule.build(), STEPS)
    levels = levels[::-1] if name == "DDIMInverseScheduler" else levels
    times, ratios = visited(name, scheduler)
    if name == "DDIMInverseScheduler":
        times, ratios = times[::-1], [*ratios[-2::-1], ratios[-1]]
    if name == "PNDMScheduler":
        times, pairs = sorted(set(times), reverse=True), dict(zip(times, ratios, strict=False))
        ours = [float(level.t) for level in levels]
        times = [t for t in times if t in ours]
        ratios = [*(pairs[t] for t in times), ratios[-1]]
    if len(levels) == len(ratios) - 1:
        assert ratios[-1] == pytest.approx(ratios[-2], rel=1e-6)
        ratios, times = ratios[:-1], [*times[:-1], float(levels[-1].t)]
        assert len(times) == len(levels)
        levels_t = [float(level.t) for level in levels]
    else:
        levels_t = [float(level.t) for level in levels[:-1]]
    if name == "IPNDMScheduler":  # the network is told the angle
        shown = meaning.prediction.build_preconditioning(meaning.schedule)
        levels_t = [float(shown.time(level)) for level in levels[:-1]]
    assert len(levels) == len(ratios)
    found = torch.stack([level.nsr for level in levels])
    wanted = torch.tensor(ratios, dtype=torch.float64)
    almost = {"UniPCMultistepScheduler": 9e5, "EulerDiscreteScheduler": 4095.0}
    if name in almost and torch.isinf(found[0]):
        assert almost[name] < float(wanted[0]) < math.inf
        found, wanted = found[1:], wanted[1:]
    finite = torch.isfinite(wanted)
    assert torch.equal(finite, torch.isfinite(found))
    tail = {"rtol": 5e-4} if "squaredcos" in str(options) else {"rtol": 1.5e-4}
    assert torch.allclose(found[finite], wanted[finite], atol=1e-6, **tail)
    apart = np.abs(np.array(levels_t) - np.array(times))
    assert float(apart.max()) <= 1.0 and int((apart > 0.02).sum()) <= ("use_" in str(options))


@each_case
def test_there_and_back(name: str, options: dict[str, Any]) -> None:
    """Reading what was written gives the same meaning, and diffusers opens it as the same scheduler."""
    scheduler = make(name, options)
    meaning = from_diffusers(config(scheduler))
    written = to_diffusers(meaning)
    assert written["_class_name"] == name
    assert from_diffusers(json.loads(json.dumps(written))) == meaning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = getattr(diffusers, name).from_config(written)
        again.set_timesteps(STEPS)
    assert torch.allclose(again.timesteps.double(), scheduler.timesteps.double())
    if hasattr(scheduler, "sigmas"):
        assert torch.allclose(again.sigmas, scheduler.sigmas)


@pytest.mark.parametrize("options", [{}, OFFSET, {"use_karras_sigmas": True}])
def test_the_class_that_needs_torchsde(options: dict[str, Any]) -> None:
    """Its grids are LMS's, with other betas by default."""
    name, betas = NEEDS_TORCHSDE, {"beta_start": 0.00085, "beta_end": 0.012}
    ours, lms = (from_diffusers({"_class_name": n, **betas, **options}) for n in (name, "LMSDiscreteScheduler"))
    assert ours == from_diffusers({"_class_name": name, **options})
    assert ours.sampling == lms.sampling.model_copy(update={"sampler": "dpmpp_sde"}) and ours.schedule == lms.schedule
    written = to_diffusers(ours)
    assert written["_class_name"] == name and from_diffusers(written) == ours


def test_every_class_of_the_list_is_known_or_refused() -> None:
    names = "DDPM DDIM DDIMInverse PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete "
    names += "KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE UniPCMultistep DEISMultistep "
    names += "SASolver LCM TCD EDMEuler EDMDPMSolverMultistep FlowMatchEulerDiscrete FlowMatchHeunDiscrete IPNDM"
    assert {f"{name}Scheduler" for name in names.split()} == set(KINDS)


def test_stable_diffusion() -> None:
    """The scheduler of Stable Diffusion 1.5 as it is on disk, with fields that PNDM itself does not have."""
    meaning = from_diffusers(
        {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "clip_sample": False}
        | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
        | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    )
    assert meaning.sampling.sampler == "plms" and meaning.sampling.threshold == "none"
    grid = GridConfig(name="leading", options={"offset": 1}, end="first")
    assert meaning.sampling.grid == grid
    levels = grid.build(meaning.schedule.build(), 50)
    assert [int(level.t) for level in levels[:3]] == [981, 961, 941] and int(levels[-1].t) == 0
    assert meaning.schedule == ScheduleConfig(name="scaled_linear", start=0.00085, end=0.012)


def test_start_noise_convention() -> None:
    for name, spacing, start in [
        ("EulerDiscreteScheduler", "linspace", "sigma"),
        ("EulerDiscreteScheduler", "trailing", "sigma"),
        ("EulerDiscreteScheduler", "leading", "marginal"),
        ("DDIMScheduler", "trailing", "marginal"),
        ("DPMSolverMultistepScheduler", "linspace", "marginal"),
    ]:
        scheduler = make(name, {"timestep_spacing": spacing})
        meaning = from_diffusers(config(scheduler))
        assert meaning.sampling.start == start
        assert meaning.sampling.grid is not None
        first = meaning.sampling.grid.build(meaning.schedule.build(), STEPS)[0]
        spread = float(scheduler.init_noise_sigma)
        if "Euler" in name:  # theirs is in x / alpha
            spread *= float(first.alpha)
        ours = first.sigma if start == "sigma" else torch.sqrt(first.alpha**2 + first.sigma**2)
        assert spread == pytest.approx(float(ours), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "has no counterpart"),
        ({"_class_name": 3}, "has no counterpart"),
        ({"beta_shedule": "linear"}, "did you mean 'beta_schedule'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' has no counterpart"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps cannot be 'many'"),
        ({"clip_sample": 1}, "clip_sample cannot be 1"),
        ({"trained_betas": [0.1, 0.2]}, "2 numbers for 1000 steps"),
        ({"trained_betas": "x"}, "betas"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras'"),
        ({"variance_type": "learned"}, "variance_type 'learned'"),
        ({"thresholding": True, "sample_max_value": 1.5}, "a cap on the quantile"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "1000 num_train_timesteps"),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.9, 0.0]}, "levels for one number of steps"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "EDM scheduler"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"}, "single-step"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 7}, "order"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        from_diffusers(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"sampler": "dpm_fast"}, "has no DPM fast scheduler"),
        ({"sampler": "euler"}, "another start"),
        ({"sampler": "euler", "start": "sigma", "schedule": "align_your_steps"}, "another grid"),
        ({"sampler": "ddim", "threshold": "static"}, "keeping x0 in range"),
        ({"sampler": "lms", "sampler_options": {"order": 2}, "start": "sigma"}, "another solver"),
    ],
)
def test_what_diffusers_has_not(sampling: dict[str, Any], words: str) -> None:
    values = {"threshold": "none", **sampling}
    scheduler = Scheduler(
        schedule=ScheduleConfig(), prediction=PredictionConfig(), sampling=SamplingConfig.model_validate(values)
    )
    with pytest.raises(UserError, match=words):
        to_diffusers(scheduler)


def test_our_own_defaults_go_there_where_they_can() -> None:
    """A config that never came from diffusers: other names, grids without options, betas left out."""
    sampling = SamplingConfig(sampler="DPM++ 2M", schedule="Trailing", threshold="none")
    schedule = ScheduleConfig(name="scaled_linear")
    written = to_diffusers(Scheduler(schedule=schedule, prediction=PredictionConfig(), sampling=sampling))
    assert written["_class_name"] == "DPMSolverMultistepScheduler"
    assert (written["timestep_spacing"], written["beta_start"]) == ("trailing", 0.00085)
