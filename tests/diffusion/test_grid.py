"""Grids: golden time lists, and what every grid promises on every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from sfumato.diffusion.grid import (
    ALIGN_YOUR_STEPS,
    GRIDS,
    Grid,
    align_your_steps,
    beta_sigma,
    beta_t,
    canonical,
    ddim_quad,
    ddim_uniform,
    dpm_leading,
    dpm_linspace,
    exponential,
    find_spacing,
    grid,
    karras,
    kl_optimal,
    lcm,
    leading,
    linear_quadratic,
    linspace,
    respaced,
    respaced_times,
    reversed_,
    sgm_uniform,
    simple,
    spec_steps,
    tail,
    trailing,
)
from sfumato.diffusion.level import CLEAN
from sfumato.diffusion.posterior import transition
from sfumato.diffusion.schedule import FlowSchedule, Schedule, TableSchedule, VESchedule, linear_alpha_bar
from sfumato.errors import UserError

from .diffusion_cases import SCHEDULES

LINEAR, SD = SCHEDULES["linear"], SCHEDULES["scaled_linear"]
DOWN = [name for name in GRIDS if name != "restart"]  # which goes up again


def times(levels: Grid) -> list[float]:
    return [float(level.t) for level in levels[:-1]]


# Golden times for T = 1000: pure-Python evaluations of the rules of improved-diffusion's respacing (Nichol 2021), of
# table 2 of Lin 2023 and of NumPy's rounding to even.
GOLDEN: dict[str, tuple[Callable[[Schedule], Grid], list[int]]] = {
    "linspace 10": (partial(linspace, steps=10), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    "linspace 7": (partial(linspace, steps=7), [999, 832, 666, 500, 333, 166, 0]),
    "linspace 25": (
        partial(linspace, steps=25),
        [999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500, 458, 416, 375, 333, 291, 250, 208, 166, 125]
        + [83, 42, 0],
    ),
    "leading 50, offset 1": (partial(leading, steps=50, offset=1), list(range(981, 0, -20))),
    "leading 10, offset 1": (partial(leading, steps=10, offset=1), list(range(901, 0, -100))),
    "trailing 10": (partial(trailing, steps=10), list(range(999, 0, -100))),
    "respaced 10": (partial(respaced, spec="10"), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    "respaced 3,2": (partial(respaced, spec="3,2"), [999, 500, 499, 250, 0]),
    "dpm_linspace 10": (partial(dpm_linspace, steps=10), [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]),
    "dpm_leading 10, offset 1": (
        partial(dpm_leading, steps=10, offset=1),
        [901, 811, 721, 631, 541, 451, 361, 271, 181, 91],
    ),
    "ddim_uniform 10": (partial(ddim_uniform, steps=10), list(range(901, 0, -100))),
    "ddim_quad 10": (partial(ddim_quad, steps=10), [801, 633, 484, 356, 247, 159, 89, 40, 10, 1]),
    "lcm 4": (partial(lcm, steps=4), [999, 759, 499, 259]),
    "simple 6": (partial(simple, steps=6), [999, 833, 666, 499, 333, 166]),
    "beta_t 6": (partial(beta_t, steps=6), [999, 908, 724, 500, 275, 91]),
    "fast27": (
        partial(grid, "fast27", steps=27),
        [997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200, 199, 177, 155, 133, 111]
        + [88, 66, 44, 22, 0],
    ),
    "respaced ddim50": (partial(respaced, spec="ddim50"), list(range(980, -1, -20))),
    "respaced ddim25": (partial(respaced, spec="ddim25"), list(range(960, -1, -40))),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_times(name: str) -> None:
    make, wanted = GOLDEN[name]
    assert times(make(schedule=SD)) == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"), [("5", [0, 5, 10, 14, 19]), ("3,2", [0, 4, 9, 10, 19]), ("ddim5", [0, 4, 8, 12, 16])]
)
def test_golden_respacing_of_twenty_steps(spec: str, wanted: list[int]) -> None:
    assert respaced_times(20, spec) == wanted


def test_golden_respaced_process() -> None:
    """improved-diffusion's linear betas for T = 50 (scaled by 1000 / 50), kept at 5 steps: the betas between them."""
    schedule = TableSchedule(linear_alpha_bar(50, start=20 * 1e-4, end=20 * 0.02))
    levels = respaced(schedule, "5")
    assert times(levels) == [49, 37, 24, 12, 0]
    betas = [float(transition(a, b).beta) for a, b in zip(levels, levels[1:], strict=False)]
    assert betas[::-1] == pytest.approx([0.002, 0.494161, 0.863143, 0.977998, 0.994905], abs=1e-6)


def test_golden_karras() -> None:
    """Karras 2022, eq. 5, rho 7, on Stable Diffusion's table."""
    nsr = [float(level.nsr) for level in karras(SD, 5)]
    assert nsr == pytest.approx([14.614641, 4.796535, 1.274100, 0.247950, 0.029167, 0], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 250])
@pytest.mark.parametrize("name", DOWN)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_grids_go_from_noisy_to_clean(schedule: Schedule, name: str, steps: int) -> None:
    if name == "lcm" and steps > 50:
        with pytest.raises(UserError, match="at most 50 steps"):
            grid(name, schedule, steps)
        return
    levels = grid(name, schedule, steps)
    assert len(levels) == steps + 1 and levels[-1] is CLEAN
    alpha, sigma = (torch.stack([getattr(level, n) for level in levels]) for n in ("alpha", "sigma"))
    assert bool((sigma[1:] * alpha[:-1] < sigma[:-1] * alpha[1:]).all())
    low, high = schedule.t_range
    assert all(low <= float(level.t) <= high for level in levels[:-1])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_which_ends_a_grid_visits(schedule: Schedule) -> None:
    low, high = schedule.nsr_range
    for make in (trailing, linspace, sgm_uniform, dpm_linspace, simple, lcm, beta_t, kl_optimal, karras, exponential):
        first = make(schedule, 10)[0].nsr
        if math.isinf(high) and make in (karras, exponential):
            assert float(first) == pytest.approx(4096, rel=1e-9)
        else:
            assert float(first) == pytest.approx(high, rel=1e-9)
    for make in (leading, linspace, karras, exponential, kl_optimal, beta_sigma):
        assert float(make(schedule, 10)[-2].nsr) == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("make", [karras, exponential])
def test_ratios_are_spaced_by_their_rule(make: Callable[[Schedule, int], Grid]) -> None:
    nsr = torch.stack([level.nsr for level in make(SD, 12)[:-1]])
    even = nsr ** (1 / 7) if make is karras else nsr.log()
    steps = even.diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-10)


@pytest.mark.parametrize("make", [karras, exponential, beta_sigma])
def test_the_network_can_be_told_whole_times(make: Callable[..., Grid]) -> None:
    """The levels stay where they are."""
    exact = make(SD, 8)
    for rounding, whole in ((True, round), ("down", math.floor)):
        for a, b in zip(exact[:-1], make(SD, 8, round_t=rounding)[:-1], strict=True):
            assert float(b.t) == whole(float(a.t))
            assert float(b.alpha) == float(a.alpha) and float(b.sigma) == float(a.sigma)
    with pytest.raises(UserError, match="discrete steps"):
        make(SCHEDULES["flow"], 8, round_t=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_reaches_the_cleaner_half_of_any_range(name: str) -> None:
    """In nsr itself only where the range is narrow; the clock may be asked for."""
    schedule = SCHEDULES[name]
    nsr = [float(level.nsr) for level in beta_sigma(schedule, 64)[:-1]]
    assert sum(0.03 < n < 1 for n in nsr) >= 6
    if not math.isinf(schedule.nsr_range[1]):
        asked = [float(level.nsr) for level in beta_sigma(schedule, 64, clock="nsr")[:-1]]
        assert (asked == nsr) == (schedule.nsr_range[1] <= 20)


def test_fractional_linspace() -> None:
    found = times(linspace(LINEAR, 5, round_t=False))
    assert found == pytest.approx([999, 749.25, 499.5, 249.75, 0])


def test_another_end() -> None:
    end = LINEAR.level(0)
    for levels in [*(GRIDS[name](LINEAR, 4, end=end) for name in DOWN), respaced(LINEAR, "4", end=end)]:
        assert levels[-1] is end and len(levels) == 5


def test_offset_stays_inside_the_table() -> None:
    assert times(leading(LINEAR, 1000, offset=1))[0] == 999


def test_the_whole_table_one_by_one() -> None:
    whole = [float(t) for t in range(999, -1, -1)]
    for levels in (leading(LINEAR, 1000), trailing(LINEAR, 1000), linspace(LINEAR, 1000), respaced(LINEAR, "1000")):
        assert times(levels) == whole


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trailing(LINEAR, 0), "at least 1"),
        (lambda: karras(LINEAR, 1001), "at most the schedule's 1000"),
        (lambda: grid("karas", LINEAR, 10), "did you mean 'karras'"),
        (lambda: grid("karras", SCHEDULES["flow"], 0), "at least 1"),
        (lambda: grid("ddim50", LINEAR, 10), "has 50 steps of its own, not 10"),
        (lambda: grid("ddim50", SCHEDULES["ve"], 50), "discrete steps"),
        (lambda: dpm_leading(LINEAR, 1000), "fewer steps than the schedule's 1000"),
        (lambda: dpm_linspace(LINEAR, 900, lambda_min=-1.0), "above lambda_min -1"),
        (lambda: lcm(LINEAR, 4, origin_steps=2000), "origin_steps must be at most"),
        (lambda: lcm(LINEAR, 40, strength=0.5), "at most 25 steps"),
        (lambda: karras(LINEAR, 4, low=2.0, high=1.0), "0 < low <= high"),
        (lambda: karras(LINEAR, 4, clock="sigm"), "did you mean 'sigma'"),  # type: ignore[arg-type]
        (lambda: beta_t(LINEAR, 4, alpha=0.0), "positive parameters"),
        (lambda: align_your_steps(LINEAR, 4, model="sd16"), "did you mean 'sd15'"),
        (lambda: linspace(LINEAR, 4, shift=3.0), "for flows"),
        (lambda: tail(trailing(LINEAR, 4), 0.0), "strength must lie in"),
        (lambda: tail(trailing(LINEAR, 4), 0.2), "leaves no step"),
        (lambda: respaced(SCHEDULES["flow"], "10"), "discrete steps"),
        (lambda: respaced(LINEAR, "ten"), "not understood"),
        (lambda: respaced(LINEAR, "10,,5"), "not understood"),
        (lambda: respaced(LINEAR, "0"), "not understood"),
        (lambda: respaced(LINEAR, "ddim300"), "no whole stride"),
        (lambda: respaced(LINEAR, "600,10"), "600 steps of a section that has 500"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(call: Callable[[], Grid], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


NAMES = {
    "Karras": "karras", "get_sigmas_karras": "karras", "use_karras_sigmas": "karras", "exponential": "exponential",
    "polyexponential": "exponential", "SGMUniform": "sgm_uniform", "SGM Uniform": "sgm_uniform", "uniform": "normal",
    "normal": "normal", "simple": "simple", "ddim_uniform": "ddim_uniform", "DDIM": "ddim_uniform", "Beta": "beta_t",
    "beta": "beta_t", "use_beta_sigmas": "beta_sigma", "KL Optimal": "kl_optimal", "kl_optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps", "linear_quadratic": "linear_quadratic", "trailing": "trailing",
    "leading": "leading", "linspace": "linspace", "DDIM50": "ddim50", "10, 15, 20": "10,15,20", " Fast27": "fast27",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_forgiving(name: str) -> None:
    assert canonical(name) == NAMES[name]
    for variant in (name.upper(), f" {name.replace('_', ' ')} "):
        assert canonical(variant) == NAMES[name]


def test_every_grid_has_a_title_and_says_what_it_is() -> None:
    for name in DOWN:
        assert GRIDS[name].title and len(GRIDS[name].summary) > 20
        assert find_spacing(GRIDS[name].title).name == name


def test_steps_of_respacing_specs() -> None:
    found = {name: spec_steps(name) for name in ("ddim25", "10,15,20", "250", "fast27", "karras", "DDIM")}
    assert found == {"ddim25": 25, "10,15,20": 45, "250": 250, "fast27": 27, "karras": None, "DDIM": None}


def test_two_betas() -> None:
    """diffusers has the quantiles in nsr, A1111 and ComfyUI in time: two grids (golden for Stable Diffusion, N = 6)."""
    in_nsr, in_time = ([round(float(x.nsr), 2) for x in make(SD, 6)[:-1]] for make in (beta_sigma, beta_t))
    assert in_nsr == [14.61, 12.82, 9.32, 5.32, 1.82, 0.03]
    assert in_time == [14.61, 8.71, 3.68, 1.62, 0.76, 0.32]


def test_sgm_uniform_is_not_trailing() -> None:
    assert times(sgm_uniform(SD, 10)) == pytest.approx([999 - 99.9 * k for k in range(10)])
    assert times(trailing(SD, 10)) == [999 - 100 * k for k in range(10)]


def test_kl_optimal_formula() -> None:
    """Sabour 2024: `tan((1 - i/n) atan(max) + i/n atan(min))`; A1111's list ends at the cleanest level."""
    low, high = SD.nsr_range
    a1111 = [math.tan(i / 8 * math.atan(low) + (1 - i / 8) * math.atan(high)) for i in range(9)]
    assert [float(x.nsr) for x in kl_optimal(SD, 9)[:-1]] == pytest.approx(a1111)


def test_align_your_steps_is_the_published_list_where_it_fits() -> None:
    for model, schedule in [("sd15", SD), ("sdxl", SD), ("svd", VESchedule(0.002, 700.0))]:
        found = [float(x.nsr) for x in align_your_steps(schedule, 10, model=model)[:-1]]
        assert found == pytest.approx(ALIGN_YOUR_STEPS[model][:-1], rel=1e-4)
    twice = [float(x.nsr) for x in align_your_steps(SD, 20)[:-1]]
    assert twice[2::2] == pytest.approx(ALIGN_YOUR_STEPS["sd15"][1:-1], rel=1e-9)
    assert twice[3] == pytest.approx(math.sqrt(6.475 * 3.861), rel=1e-9)
    stretched = align_your_steps(VESchedule(), 10)
    assert float(stretched[0].nsr) == pytest.approx(80.0)


def test_linear_quadratic_formula() -> None:
    """Mochi's: half the steps over the first 2.5 %, then a parabola of the same slope that arrives at the end."""
    sigma = [float(x.sigma) for x in linear_quadratic(FlowSchedule(), 10)]
    assert sigma[:6] == pytest.approx([1 - 0.005 * k for k in range(6)])
    second = [a - 2 * b + c for a, b, c in zip(sigma[5:], sigma[6:], sigma[7:], strict=False)]
    assert second == pytest.approx([second[0]] * len(second)) and second[0] < 0
    slope = sigma[5] - sigma[6] + second[0] / 2
    assert slope == pytest.approx(0.005)
    comfy = [float(x.nsr) for x in linear_quadratic(SD, 10, clock="nsr")]
    assert comfy == pytest.approx([14.614641 * s for s in sigma], rel=1e-6)


def test_shifted_flow_times() -> None:
    """The network is told the shifted time: the schedule stays straight, the grid is shifted."""
    plain, shifted = (sgm_uniform(FlowSchedule(), 6, shift=s) for s in (1.0, 3.0))
    for a, b in zip(plain[:-1], shifted[:-1], strict=True):
        s = float(a.sigma)
        assert float(b.t) == float(b.sigma) == pytest.approx(3 * s / (1 + 2 * s))


def test_tail_and_reverse() -> None:
    """`int(steps * strength)` steps are left, as in diffusers' picture-to-picture."""
    levels = trailing(SD, 50)
    for strength, steps in [(1.0, 50), (0.8, 40), (0.75, 37), (0.29, 14), (0.02, 1)]:
        part = tail(levels, strength)
        assert len(part) == steps + 1 and part == levels[-steps - 1 :]
    assert reversed_(levels) == levels[::-1] and reversed_(reversed_(levels)) == levels


def test_lambda_min_leaves_out_the_noisiest() -> None:
    """The recommendation for cosine tables, -5.1: nsr up to exp(5.1)."""
    cosine = SCHEDULES["cosine"]
    first = dpm_linspace(cosine, 10, lambda_min=-5.1)[0]
    assert float(first.nsr) <= math.exp(5.1) < float(cosine.level(first.t + 1).nsr)


@pytest.mark.parametrize("name", ["trailing", "leading", "karras", "beta", "exponential"])
def test_steps_are_whole(name: str) -> None:
    for wrong in (2.5, 0, -1):
        with pytest.raises(UserError, match="whole number"):
            grid(name, SCHEDULES["flow"], wrong)  # type: ignore[arg-type]
