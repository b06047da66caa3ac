"""Schedules: closed forms in float64, exact inverses, and the path equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.schedule import (
    FlowSchedule,
    Schedule,
    SineSchedule,
    TableSchedule,
    VESchedule,
    cosine_alpha_bar,
    linear_alpha_bar,
    rescale_zero_terminal_snr,
    scaled_linear_alpha_bar,
    sigmoid_alpha_bar,
)

from .diffusion_cases import SCHEDULES, TABLES, schedules, time

unit = st.floats(0, 1)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def relative(found: float | torch.Tensor, wanted: float | torch.Tensor) -> float:
    found, wanted = (torch.as_tensor(v, dtype=torch.float64) for v in (found, wanted))
    return float(((found - wanted).abs() / wanted.abs()).max())


# --- tables ----------------------------------------------------------------------------------------------------------


def cosine_beta(i: int, steps: int) -> float:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - f((i + 1) / steps) / f(i / steps), 0.999)


def sigmoid_beta(i: int, steps: int) -> float:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def f(u: float) -> float:
        return (logistic(3) - logistic(6 * u - 3)) / (logistic(3) - logistic(-3))

    return min(1 - f((i + 1) / steps) / f(i / steps), 0.999)


BETAS: dict[str, tuple[Callable[[int, int], float], Callable[[int], torch.Tensor]]] = {
    "linear": (lambda i, n: 1e-4 + (0.02 - 1e-4) * i / (n - 1), linear_alpha_bar),
    "scaled_linear": (
        lambda i, n: (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / (n - 1)) ** 2,
        scaled_linear_alpha_bar,
    ),
    "cosine": (cosine_beta, cosine_alpha_bar),
    "sigmoid": (sigmoid_beta, sigmoid_alpha_bar),
}


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", BETAS)
def test_tables_are_the_running_product_of_their_betas(name: str, steps: int) -> None:
    beta, table = BETAS[name]
    product, wanted = 1.0, []
    for i in range(steps):
        product *= 1 - beta(i, steps)
        wanted.append(product)
    found = table(steps)
    assert found.dtype == torch.float64 and found.shape == (steps,)
    assert relative(found, torch.tensor(wanted, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_rescaling(name: str) -> None:
    """Lin 2023, algorithm 1: affine in sqrt(alpha_bar), the last exactly 0, the first kept."""
    table = TABLES[name]
    zero = rescale_zero_terminal_snr(table)
    assert float(zero[-1]) == 0
    assert relative(zero[0], table[0]) < 1e-14
    root, new = torch.sqrt(table), torch.sqrt(zero)
    slope = (new[0] - new[-1]) / (root[0] - root[-1])
    assert torch.allclose(new, slope * (root - root[-1]), rtol=0, atol=1e-15)


# Golden values: pure-Python float64 evaluations of the formulas in Ho 2020 (betas), Nichol 2021 eq. 17 and Jabri 2022
# section 3 with T = 10, and of Stable Diffusion's scaled-linear table (0.00085 to 0.012, T = 1000); five or six digits.
COSINE_10 = [0.027907, 0.075494, 0.124396, 0.177190, 0.237282, 0.309883, 0.404003, 0.536998, 0.743829, 0.999]
SIGMOID_10 = [0.039493, 0.067493, 0.110548, 0.170391, 0.243479, 0.321840, 0.400330, 0.486957, 0.621427, 0.999]
STABLE_DIFFUSION = {
    0: (0.99915000, 0.029167),
    1: (0.99829603, 0.041314),
    21: (0.98038075, 0.141463),
    201: (0.75214340, 0.574050),
    401: (0.42288152, 1.168216),
    601: (0.15981644, 2.292854),
    801: (0.03654652, 5.134431),
    961: (0.00728173, 11.676046),
    981: (0.00577550, 13.120411),
    999: (0.00466010, 14.614641),
}


@pytest.mark.parametrize(("table", "wanted"), [(cosine_alpha_bar, COSINE_10), (sigmoid_alpha_bar, SIGMOID_10)])
def test_golden_betas_of_ten_steps(table: Callable[[int], torch.Tensor], wanted: list[float]) -> None:
    bar = table(10)
    betas = 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    assert torch.allclose(betas, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", STABLE_DIFFUSION)
def test_golden_levels_of_stable_diffusion(t: int) -> None:
    level = SCHEDULES["scaled_linear"].level(t)
    bar, nsr = STABLE_DIFFUSION[t]
    assert float(level.alpha) ** 2 == pytest.approx(bar, abs=1e-8)
    assert float(level.nsr) == pytest.approx(nsr, abs=1e-6)


def test_golden_zero_terminal_table_of_stable_diffusion() -> None:
    bar = TABLES["zero_scaled_linear"]
    assert float(bar[0]) == pytest.approx(0.99915, abs=1e-8)
    assert float(bar[500]) == pytest.approx(0.24101878, abs=1e-8)
    assert float(bar[998]) == pytest.approx(2e-7, abs=5e-8)


@pytest.mark.parametrize(("name", "nsr"), [("linear", 157), ("scaled_linear", 14.61), ("cosine", 2.0e4)])
def test_golden_noisiest_level(name: str, nsr: float) -> None:
    assert SCHEDULES[name].nsr_range[1] == pytest.approx(nsr, rel=3e-2)


# --- paths -----------------------------------------------------------------------------------------------------------


@given(schedules(), unit)
def test_levels_lie_on_their_path(schedule: Schedule, fraction: float) -> None:
    level = schedule.level(time(schedule, fraction))
    alpha, sigma = float(level.alpha), float(level.sigma)
    assert 0 <= alpha <= 1 and sigma > 0
    if isinstance(schedule, TableSchedule):
        assert abs(alpha**2 + sigma**2 - 1) < 1e-14
    elif isinstance(schedule, SineSchedule):
        assert abs(alpha**2 + sigma**2 - 1) < 1e-14
        assert sigma == pytest.approx(math.sin(float(level.t) * math.pi / 2) ** 2, rel=1e-12)
    elif isinstance(schedule, FlowSchedule):
        assert alpha + sigma == pytest.approx(1, abs=1e-15)
    else:
        assert alpha == 1 and sigma == float(level.t)


@given(schedules(), unit, unit)
def test_later_is_noisier(schedule: Schedule, first: float, second: float) -> None:
    a, b = sorted(time(schedule, f) for f in (first, second))
    if b - a > 1e-9 * schedule.t_range[1]:
        assert float(schedule.level(a).nsr) < float(schedule.level(b).nsr)


@given(schedules(), unit)
def test_time_and_ratio_are_inverse(schedule: Schedule, fraction: float) -> None:
    """Fractional times included; the error is that of one rounding of the ratio, seen through the schedule's slope."""
    t = time(schedule, fraction)
    low, high = schedule.t_range
    found = float(schedule.t_from_nsr(schedule.level(t).nsr))
    assert abs(found - t) <= 1e-12 * (high - low)


@given(schedules(), unit)
def test_ratio_and_level_are_inverse(schedule: Schedule, fraction: float) -> None:
    """`from_nsr` is exact in the ratio; its time leads back to the same ratio."""
    low, high = schedule.nsr_range
    nsr = low * (min(high, 1e5) / low) ** fraction
    level = schedule.from_nsr(nsr)
    assert relative(level.nsr, nsr) < 1e-12
    if low <= nsr <= high:
        assert relative(schedule.level(level.t).nsr, nsr) < 1e-10


@each_schedule
def test_inverses_hold_for_batches(schedule: Schedule) -> None:
    times = torch.tensor([time(schedule, f) for f in (0.1, 0.35, 0.8)], dtype=torch.float64)
    level = schedule.level(times)
    assert level.alpha.shape == (3,) and level.alpha.dtype == torch.float64
    assert torch.allclose(schedule.t_from_nsr(level.nsr), times, rtol=1e-10)
    for i, t in enumerate(times):
        assert float(schedule.level(t).nsr) == pytest.approx(float(level.nsr[i]), rel=1e-14)


@each_schedule
def test_pure_noise_is_reached_exactly_or_never(schedule: Schedule) -> None:
    last = schedule.level(schedule.t_range[1])
    assert float(last.nsr) == pytest.approx(schedule.nsr_range[1], rel=1e-15)
    if math.isinf(schedule.nsr_range[1]):
        assert float(last.alpha) == 0 and float(last.sigma) == 1
        level = schedule.from_nsr(math.inf)
        assert (float(level.t), float(level.alpha), float(level.sigma)) == (schedule.t_range[1], 0, 1)


@given(schedules(), unit, unit, st.floats(0.01, 0.99))
def test_between_is_even_in_log_snr(schedule: Schedule, first: float, second: float, r: float) -> None:
    now, nxt = (schedule.level(time(schedule, min(f, 0.99))) for f in (first, second))
    inside = schedule.between(now, nxt, r)
    wanted = (1 - r) * float(now.half_log_snr) + r * float(nxt.half_log_snr)
    assert float(inside.half_log_snr) == pytest.approx(wanted, abs=1e-12)


@each_schedule
def test_half_way_is_the_geometric_mean(schedule: Schedule) -> None:
    now, nxt = schedule.level(time(schedule, 0.9)), schedule.level(time(schedule, 0.3))
    assert relative(schedule.between(now, nxt, 0.5).nsr, torch.sqrt(now.nsr * nxt.nsr)) < 1e-12


def test_there_is_nothing_between_infinite_ends() -> None:
    flow = SCHEDULES["flow"]
    for now, nxt in [(flow.level(1.0), flow.level(0.5)), (flow.level(0.5), CLEAN)]:
        with pytest.raises(ValueError, match="infinite step"):
            flow.between(now, nxt, 0.5)


# --- tables as schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_whole_times_are_exact_lookups(name: str) -> None:
    """Bit for bit, alone, in a batch, and in a batch that also holds a fractional time."""
    schedule, table = SCHEDULES[name], TABLES[name]
    t = torch.arange(len(table))
    level = schedule.level(t)
    assert torch.equal(level.alpha, torch.sqrt(table)) and torch.equal(level.sigma, torch.sqrt(1 - table))
    mixed = schedule.level(torch.cat([t.to(torch.float64), torch.tensor([0.5], dtype=torch.float64)]))
    assert torch.equal(mixed.alpha[:-1], level.alpha) and torch.equal(mixed.sigma[:-1], level.sigma)
    assert float(schedule.level(500).alpha) == float(level.alpha[500])


@given(st.floats(0, 998.999), st.sampled_from(["log", "linear"]))
def test_fractional_times_interpolate_the_ratio(t: float, interpolation: str) -> None:
    schedule = TableSchedule(TABLES["cosine"], interpolation=interpolation)  # type: ignore[arg-type]
    low, w = int(t), t - int(t)
    a, b = (math.sqrt((1 - v) / v) for v in TABLES["cosine"][low : low + 2].tolist())
    wanted = a ** (1 - w) * b**w if interpolation == "log" else a * (1 - w) + b * w
    assert relative(schedule.level(t).nsr, wanted) < 1e-12


def test_the_last_interval_of_a_zero_terminal_table_interpolates_alpha() -> None:
    schedule, table = SCHEDULES["zero_linear"], TABLES["zero_linear"]
    level = schedule.level(998.25)
    assert relative(level.alpha, 0.75 * math.sqrt(table[998])) < 1e-12
    assert relative(level.sigma**2, 1 - float(level.alpha) ** 2) < 1e-12


def test_times_from_ratios_outside_the_table_are_clamped() -> None:
    for name in TABLES:
        schedule = SCHEDULES[name]
        low, high = schedule.nsr_range
        assert float(schedule.t_from_nsr(torch.tensor(low / 2))) == 0
        assert float(schedule.t_from_nsr(torch.tensor(high * 2))) == 999
        assert relative(schedule.from_nsr(low / 2).nsr, low / 2) < 1e-12


@pytest.mark.parametrize(
    "table",
    [[0.9], [0.9, 0.9], [0.5, 0.9], [1.2, 0.9], [1.0, 0.9], [0.9, -0.1]],
    ids=["too short", "flat", "rising", "above one", "clean", "negative"],
)
def test_bad_tables_are_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match="alpha_bar must"):
        TableSchedule(torch.tensor(table))


def test_bad_options_and_times_are_refused() -> None:
    with pytest.raises(ValueError, match="interpolation"):
        TableSchedule(TABLES["linear"], interpolation="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowSchedule(shift=0)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        VESchedule(1.0, 0.5)
    linear = SCHEDULES["linear"]
    for schedule, t in [(linear, 1000), (linear, -1), (FlowSchedule(), 1.5), (VESchedule(), -1)]:
        with pytest.raises(ValueError, match="t must"):
            schedule.level(t)


# --- training times and the training chain ---------------------------------------------------------------------------


@each_schedule
def test_training_times_fill_the_range(schedule: Schedule) -> None:
    low, high = schedule.t_range
    times = schedule.t_from_uniform((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    assert float(times.min()) >= low and float(times.max()) <= high
    if schedule.steps is not None:
        assert torch.equal(torch.bincount(times.long()), torch.full((schedule.steps,), 4000 // schedule.steps))
    elif isinstance(schedule, VESchedule):
        assert float(times.log().mean()) == pytest.approx((math.log(low) + math.log(high)) / 2, abs=1e-6)
    else:
        assert float(times.mean()) == pytest.approx((low + high) / 2, abs=1e-6)


@each_schedule
def test_the_training_chain_ends_clean(schedule: Schedule) -> None:
    """1,000 strictly cleaner levels from the noisiest, the last one clean; alone and in a batch."""
    level, visited = schedule.level(schedule.t_range[1]), 0
    while not level.is_clean:
        nxt = schedule.previous(level.t)
        assert float(nxt.sigma * level.alpha) < float(level.sigma * nxt.alpha)
        level, visited = nxt, visited + 1
    assert abs(visited - 1000) <= 1
    batch = schedule.previous(torch.tensor([schedule.t_range[0], time(schedule, 0.5)], dtype=torch.float64))
    assert (float(batch.alpha[0]), float(batch.sigma[0])) == (1, 0) and float(batch.sigma[1]) > 0


def test_the_level_before_is_the_table_s() -> None:
    schedule = SCHEDULES["linear"]
    found, wanted = schedule.previous(torch.tensor([5.0, 999.0])), schedule.level(torch.tensor([4.0, 998.0]))
    assert torch.equal(found.alpha, wanted.alpha) and torch.equal(found.t, wanted.t)


# --- levels ----------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1), st.floats(1e-3, 100))
def test_ratio_clock_and_log_snr_say_the_same(alpha: float, sigma: float) -> None:
    level = NoiseLevel.of(0, alpha, sigma)
    assert float(level.nsr) == pytest.approx(sigma / alpha, rel=1e-14)
    assert level.log_nsr == pytest.approx(math.log(sigma / alpha), abs=1e-12)
    assert float(level.half_log_snr) == -level.log_nsr


def test_noise_mixes_per_picture_in_the_picture_s_type() -> None:
    level = NoiseLevel(*torch.tensor([[0.0, 1.0], [0.6, 1.0], [0.8, 0.0]], dtype=torch.float64))
    x0, eps = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    x_t = level.noise(x0, eps)
    assert x_t.dtype == torch.float32
    assert torch.allclose(x_t[0], torch.tensor(0.6 + 1.6)) and torch.equal(x_t[1], x0[1])


def test_a_level_can_differ_within_a_picture() -> None:
    """One number per frame, (B, 1, F, 1, 1): clean condition frames beside noisy ones."""
    sigma = torch.tensor([0.0, 0.8], dtype=torch.float64).reshape(1, 1, 2, 1, 1)
    level = NoiseLevel(sigma, torch.sqrt(1 - sigma**2), sigma)
    x0, eps = torch.ones(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4)
    x_t = level.noise(x0, eps)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0]) and torch.allclose(x_t[:, :, 1], torch.tensor(0.6))


def test_what_is_not_a_number_is_refused() -> None:
    nan = math.nan
    for table in ([0.9, nan, 0.1], [nan, 0.2, 0.1], [0.9, 0.5, nan]):
        with pytest.raises(ValueError, match="alpha_bar"):
            TableSchedule(torch.tensor(table))
    for wrong in (nan, math.inf):
        with pytest.raises(ValueError, match="shift"):
            FlowSchedule(wrong)
        with pytest.raises(ValueError, match="sigma_max"):
            VESchedule(0.002, wrong)
    for schedule in SCHEDULES.values():
        with pytest.raises(ValueError, match="t must"):
            schedule.level(nan)


def test_a_table_may_be_a_list() -> None:
    assert torch.equal(TableSchedule([0.9, 0.5, 0.1]).alpha_bar, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
