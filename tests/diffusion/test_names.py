"""The names that users of diffusers, A1111, ComfyUI and k-diffusion type, and what they mean here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sfumato.diffusion import grid as grids
from sfumato.diffusion.grid import GRIDS
from sfumato.diffusion.solvers import SOLVERS, Euler, find, method, registry
from sfumato.errors import UserError

DIFFUSERS: dict[str, str] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc_multistep",
    "DEISMultistepScheduler": "deis_multistep",
    "SASolverScheduler": "sa_solver",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "IPNDMScheduler": "ipndm",
    "EDMEulerScheduler": "euler",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "EulerDiscrete": "euler",
    "DPMSolverMultistep": "dpmpp_2m",
}

A1111: dict[str, tuple[str, str | None]] = {
    "Euler a": ("euler_ancestral", None),
    "Euler": ("euler", None),
    "LMS": ("lms", None),
    "Heun": ("heun", None),
    "DPM2": ("dpm_2", None),
    "DPM2 a": ("dpm_2_ancestral", None),
    "DPM++ 2S a": ("dpmpp_2s_ancestral", None),
    "DPM++ 2M": ("dpmpp_2m", None),
    "DPM++ SDE": ("dpmpp_sde", None),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", None),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde_heun", None),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", None),
    "DPM fast": ("dpm_fast", None),
    "DPM adaptive": ("dpm_adaptive", None),
    "LMS Karras": ("lms", "karras"),
    "DPM2 Karras": ("dpm_2", "karras"),
    "DPM2 a Karras": ("dpm_2_ancestral", "karras"),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", "karras"),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Heun Karras": ("dpmpp_2m_sde_heun", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", "karras"),
    "DPM++ 3M SDE Exponential": ("dpmpp_3m_sde", "exponential"),
    "DDIM": ("ddim", None),
    "PLMS": ("plms", None),
    "UniPC": ("uni_pc", None),
    "LCM": ("lcm", None),
    "Restart": ("heun", "restart"),
    "k_euler_a": ("euler_ancestral", None),
    "k_euler_ancestral": ("euler_ancestral", None),
    "k_euler": ("euler", None),
    "k_lms": ("lms", None),
    "k_heun": ("heun", None),
    "k_dpm_2": ("dpm_2", None),
    "k_dpm_2_a": ("dpm_2_ancestral", None),
    "k_dpm_2_ancestral": ("dpm_2_ancestral", None),
    "k_dpmpp_2s_a": ("dpmpp_2s_ancestral", None),
    "k_dpmpp_2m": ("dpmpp_2m", None),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "k_dpmpp_sde": ("dpmpp_sde", None),
    "k_dpmpp_2m_sde": ("dpmpp_2m_sde", None),
    "k_dpm_fast": ("dpm_fast", None),
    "k_dpm_ad": ("dpm_adaptive", None),
    "Euler a SGM Uniform": ("euler_ancestral", "sgm_uniform"),
    "DPM++ 2M Align Your Steps": ("dpmpp_2m", "align_your_steps"),
    "Euler Beta": ("euler", "beta_t"),
}

COMFY: dict[str, str] = {
    "euler": "euler",
    "euler_ancestral": "euler_ancestral",
    "heun": "heun",
    "dpm_2": "dpm_2",
    "dpm_2_ancestral": "dpm_2_ancestral",
    "lms": "lms",
    "dpm_fast": "dpm_fast",
    "dpm_adaptive": "dpm_adaptive",
    "dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "ipndm": "ipndm",
    "ipndm_v": "ipndm_v",
    "deis": "deis",
    "sa_solver": "sa_solver",
    "ddim": "ddim",
    "uni_pc": "uni_pc",
    "uni_pc_bh2": "uni_pc_bh2",
    "tcd": "tcd",
}

K_DIFFUSION: dict[str, str] = {
    "sample_euler": "euler",
    "sample_euler_ancestral": "euler_ancestral",
    "sample_heun": "heun",
    "sample_dpm_2": "dpm_2",
    "sample_dpm_2_ancestral": "dpm_2_ancestral",
    "sample_lms": "lms",
    "sample_dpm_fast": "dpm_fast",
    "sample_dpm_adaptive": "dpm_adaptive",
    "sample_dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
    "sample_dpmpp_sde": "dpmpp_sde",
    "sample_dpmpp_2m": "dpmpp_2m",
    "sample_dpmpp_2m_sde": "dpmpp_2m_sde",
    "sample_dpmpp_3m_sde": "dpmpp_3m_sde",
}

PAPERS: dict[str, str] = {
    "DPM-Solver++(2M)": "dpmpp_2m",
    "DPM-Solver++(3M)": "dpmpp_3m",
    "SDE-DPM-Solver++": "dpmpp_2m_sde",
    "SA-Solver": "sa_solver",
    "p_sample": "ddpm",
    "plain_ddim": "ddim",
    "PNDM": "plms",
}

NAMES: dict[str, tuple[str, str | None]] = {
    **{name: (method, None) for names in (DIFFUSERS, COMFY, K_DIFFUSION, PAPERS) for name, method in names.items()},
    **A1111,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_programs(name: str) -> None:
    method, grid = NAMES[name]
    for variant in (name, name.upper(), f"  {name.lower()} ", name.replace("_", " "), name.replace(" ", "")):
        found = find(variant)
        assert (found[0].name, found[1]) == (method, grid)


def test_the_table_is_long_enough() -> None:
    assert len(NAMES) >= 80
    assert {method for method, _ in NAMES.values()} >= {
        "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "plms", "ipndm",
        "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_fast",
        "dpm_adaptive", "uni_pc", "deis", "sa_solver", "lcm", "tcd",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_own_names_titles_and_aliases_are_found_with_every_grid(name: str) -> None:
    method = SOLVERS[name]
    for written in (method.name, method.title, *method.aliases):
        assert find(written) == (method, None)
    for grid in GRIDS.values():
        assert find(f"{method.title} {grid.title}") == (method, grid.name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ddmi", "did you mean 'ddim'"),
        ("eular", "did you mean 'euler'"),
        ("DPM++ 2N", "did you mean 'DPM"),
        ("dpmpp_2m_sdee", "did you mean 'dpmpp_2m_sde'"),
        ("UniPCMultistepSheduler", "did you mean 'UniPCMultistepScheduler'"),
        ("", "unknown sampler ''"),
        ("Karras", "unknown sampler 'Karras'"),
        ("DDIM CFG++", "CFG.. is a guidance here .*; take the sampler 'ddim' with it"),
        ("euler_cfg_pp", "take the sampler 'euler' with it"),
        ("euler_ancestral_cfg_pp", "take the sampler 'euler_ancestral' with it"),
        ("dpmpp_2m_cfg_pp", "take the sampler 'dpmpp_2m' with it"),
        ("gradient_estimation_cfg_pp", "CFG.. is a guidance here"),
        ("DDIMInverseScheduler", "DDIM inversion is 'ddim' on a reversed grid"),
        ("ddim_inverse", "DDIM inversion is 'ddim' on a reversed grid"),
    ],
)
def test_what_is_no_sampler_is_refused_in_a_sentence(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find(name)
    assert "\n" not in str(caught.value)


# --- one's own -------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The tables of samplers, put back afterwards."""
    table, known = dict(SOLVERS), dict(registry._NAMES._canonical)
    yield SOLVERS, registry._NAMES._canonical
    SOLVERS.clear()
    SOLVERS.update(table)
    registry._NAMES._canonical = known


@pytest.mark.parametrize(
    "names",
    [
        ("euler", "Mine"),
        ("ddim", "DDIM"),
        ("mine", "Heun"),
        ("mine", "Mine", "k_euler"),
        ("Euler", "Mine"),
        ("mine", "Mine", "other of mine", "DPM++ 2M"),
    ],
)
def test_a_taken_name_registers_nothing(names: tuple[str, ...], registered: Any) -> None:
    before = dict(SOLVERS), dict(registry._NAMES._canonical)
    with pytest.raises(ValueError, match="belongs to .* already"):
        method(*names)(type("Mine", (Euler,), {}))
    assert (SOLVERS, registry._NAMES._canonical) == before
    assert find("euler")[0].make is Euler and find("k_euler")[0].name == "euler"


def test_the_same_class_defined_anew_takes_its_place(registered: Any) -> None:
    first, second = (type("Mine", (Euler,), {"version": version}) for version in (1, 2))
    method("mine", "Mine", "my old name")(first)
    assert find("MY-old-name")[0].make is first
    method("mine", "Mine", "my new name")(second)
    assert find("mine")[0].make is second and find("my new name")[0].make is second
    with pytest.raises(UserError, match="unknown sampler 'my old name'"):
        find("my old name")
    with pytest.raises(ValueError, match="sampler name 'mine' belongs to Mine already"):
        method("mine", "Mine")(type("Others", (Euler,), {}))
    assert find("mine")[0].make is second


def test_a_taken_name_of_a_grid_registers_nothing() -> None:
    before = dict(GRIDS), dict(grids._NAMES._canonical)
    for names in (("karras", "Mine"), ("mine", "Karras"), ("mine", "Mine", "SGM Uniform")):
        with pytest.raises(ValueError, match="belongs to .* already"):
            grids.spacing(*names)(lambda schedule, steps: [])
    assert before == (GRIDS, grids._NAMES._canonical)
