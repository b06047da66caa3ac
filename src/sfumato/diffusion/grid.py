"""Grids: which levels a sampler visits, noisy to clean. Pure functions from a schedule and a number of steps.

Every function returns `steps + 1` levels; the last is `end`, by default the clean picture. Discrete spacings work on a
table's indices; on a continuous schedule they space its training density. A spacing says its own names, as a solver
does: `grid(name, …)` takes any of them, and improved-diffusion's respacing specs.

>>> from sfumato.diffusion.schedule import TableSchedule, linear_alpha_bar
>>> schedule = TableSchedule(linear_alpha_bar())
>>> [int(level.t) for level in trailing(schedule, 4)[:-1]]
[999, 749, 499, 249]
>>> [int(level.t) for level in grid("ddim5", schedule, 5)[:-1]]
[800, 600, 400, 200, 0]
>>> find_spacing("SGM Uniform").name
'sgm_uniform'
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.beta import beta_quantile
from sfumato.diffusion.level import CLEAN, NoiseLevel
from sfumato.diffusion.names import Names, fold
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, nearest, raise_unknown

Grid = list[NoiseLevel]
Clock = Literal["nsr", "sigma"]
Rounding = bool | Literal["down"]
GridFunction = TypeVar("GridFunction", bound=Callable[..., Grid])

_FINITE_NSR = 4096.0  # where a grid in nsr starts if the schedule ends in pure noise: alpha_bar = 2^-24
_WIDE_NSR = 20.0  # beyond it quantiles are better drawn in the flow's sigma
_SMALL_NSR = 1e-3  # and where it stops if the schedule begins clean
_SPEC = re.compile(r"fast27|(ddim)?\d+(,\d+)*")


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spacing:
    """A grid as users know it; called with a schedule, a number of steps and options it makes the levels.

    Attributes:
        name: what is stored and printed, "sgm_uniform".
        title: how it is written for people, "SGM Uniform".
        aliases: what other programs call it.
        make: the function. options: with which the function is this spacing.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    make: Callable[..., Grid]
    options: Mapping[str, Any]

    def __call__(self, schedule: Schedule, steps: int, **options: Any) -> Grid:
        return self.make(schedule, steps, **{**self.options, **options})

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.make.__doc__ or "").splitlines()[0]


GRIDS: dict[str, Spacing] = {}
_NAMES = Names("schedule")


def spacing(name: str, title: str, *aliases: str, **options: Any) -> Callable[[GridFunction], GridFunction]:
    """Decorator: make a grid function known under a name and what other programs call it.

    One function may be several spacings, with different options. A name or alias that is taken raises `ValueError`;
    the same function defined anew takes its own place.
    """

    def register(make: GridFunction) -> GridFunction:
        if name in GRIDS:
            _NAMES.check_free(name, GRIDS[name].make, make)
        _NAMES.add(name, title, *aliases)
        GRIDS[name] = Spacing(name, title, aliases, make, options)
        return make

    return register


def find_spacing(name: str) -> Spacing:
    """The spacing that a name means, whoever's name it is ("Karras", "get_sigmas_karras", "SGMUniform").

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    folded = fold(name)
    found = _NAMES.find(folded, folded.removeprefix("getsigmas"))
    if found is not None:
        return GRIDS[found]
    written = [a for s in GRIDS.values() for a in (*s.aliases, s.title, s.name)]
    raise UserError(f"unknown schedule {name!r}{nearest(name, written)}; known: {', '.join(sorted(GRIDS))}")


def endings() -> list[tuple[str, str]]:
    """Every folded name of a grid with its canonical name, longest first: what a sampler's name may end in."""
    return _NAMES.longest_first()


def canonical(name: str) -> str:
    """A grid's own name for any of its names; a respacing spec without its spaces. Unknown ones raise `UserError`."""
    spec = _as_spec(name)
    return find_spacing(name).name if spec is None else spec


def spec_steps(name: str) -> int | None:
    """How many steps a respacing spec has of itself ("ddim50", "10,15,20"); None for a grid's name."""
    spec = _as_spec(name)
    if spec is None:
        return None
    return 27 if spec == "fast27" else sum(int(part) for part in spec.removeprefix("ddim").split(","))


def _as_spec(name: str) -> str | None:
    squeezed = re.sub(r"\s", "", name.casefold())
    return squeezed if _SPEC.fullmatch(squeezed) else None


def grid(name: str, schedule: Schedule, steps: int, **options: Any) -> Grid:
    """The grid of that name (any alias, in any case), or of a respacing spec, with `steps` steps.

    Raises:
        UserError: unknown names (with the nearest), specs of another number of steps, what the grid itself refuses.
    """
    own = spec_steps(name)
    if own is None:
        return find_spacing(name)(schedule, steps, **options)
    if own != steps:
        raise UserError(f"the schedule {name!r} has {own} steps of its own, not {steps}; leave the number of steps out")
    return respaced(schedule, canonical(name), **options)


# --- spaced in time --------------------------------------------------------------------------------------------------


def _levels(schedule: Schedule, times: Sequence[float] | Tensor, end: NoiseLevel) -> Grid:
    return [schedule.level(float(t)) for t in times] + [end]


def _check(schedule: Schedule, steps: int) -> None:
    if not isinstance(steps, Integral) or steps < 1:
        raise UserError(f"steps must be a whole number, at least 1, got {steps}")
    if schedule.steps is not None and steps > schedule.steps:
        raise UserError(f"steps must be at most the schedule's {schedule.steps}, got {steps}")


def _from_density(schedule: Schedule, u: Tensor, end: NoiseLevel) -> Grid:
    return _levels(schedule, schedule.t_from_uniform(u), end)


def _even(schedule: Schedule, count: int, first_t: float | None, last_t: float | None, shift: float) -> Tensor:
    """`count` times, noisiest first: evenly in t, or in the training density of a continuous schedule; then shifted."""
    low, high = schedule.t_range
    if schedule.steps is None and first_t is None and last_t is None:
        times = schedule.t_from_uniform(torch.linspace(1, 0, count, dtype=torch.float64))
    else:
        first, last = high if first_t is None else first_t, low if last_t is None else last_t
        times = torch.linspace(first, last, count, dtype=torch.float64)
    if shift == 1:
        return times
    if schedule.steps is not None or high != 1:
        raise UserError("shift is for flows, whose times end at 1")
    return shift * times / (1 + (shift - 1) * times)


def _distinct(times: Sequence[int]) -> list[int]:
    """Descending times without repeats: a repeated one moves to the next free time below, at the end above."""
    found = list(times)
    for i in range(1, len(found)):
        found[i] = min(found[i], found[i - 1] - 1)
    for i in range(len(found) - 1, -1, -1):
        found[i] = max(found[i], len(found) - 1 - i)
    return found


@spacing("leading", "Leading", "leading_timesteps")
def leading(schedule: Schedule, steps: int, *, offset: int = 0, end: NoiseLevel = CLEAN) -> Grid:
    """`t = k (T // steps) + offset`, k = steps-1 … 0: every so-many-th index from the clean end (SD uses offset 1)."""
    _check(schedule, steps)
    if schedule.steps is None:
        return _from_density(schedule, torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps, end)
    stride = schedule.steps // steps
    times = [min(k * stride + offset, schedule.steps - 1) for k in range(steps - 1, -1, -1)]
    return _levels(schedule, _distinct(times), end)


@spacing("ddim_uniform", "DDIM Uniform", "ddim", "ddim_scheduler")
def ddim_uniform(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """CompVis' and ComfyUI's DDIM spacing, `t = k (T // steps) + 1`.

    Where `steps` does not divide T theirs may have a step too many at the noisy end; here there are `steps`.
    """
    return leading(schedule, steps, offset=1, end=end)


@spacing("ddim_quad", "DDIM Quadratic", "quad", "ddim_quadratic")
def ddim_quad(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """CompVis' quadratic DDIM spacing, `t = floor(0.8 T (k / (steps-1))²) + 1` (Song 2021, appendix D.2).

    It never visits the noisiest fifth. Where the rule repeats a time, the next one is taken.
    """
    _check(schedule, steps)
    gaps = max(steps - 1, 1)
    squares = [k * k for k in range(gaps, gaps - steps, -1)]
    if schedule.steps is None:
        return _from_density(schedule, 0.8 * torch.tensor(squares, dtype=torch.float64) / gaps**2, end)
    times = [min(8 * schedule.steps * square // (10 * gaps**2) + 1, schedule.steps - 1) for square in squares]
    return _levels(schedule, _distinct(times), end)


@spacing("trailing", "Trailing", "trailing_timesteps")
def trailing(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """`t = round(T - k T / steps) - 1`, k = 0 … steps-1: starts at the noisiest index (Lin 2023, table 2)."""
    _check(schedule, steps)
    if schedule.steps is None:
        return _from_density(schedule, torch.arange(steps, 0, -1, dtype=torch.float64) / steps, end)
    times = [round(schedule.steps - k * schedule.steps / steps) - 1 for k in range(steps)]
    return _levels(schedule, times, end)


@spacing("simple", "Simple", "simple_scheduler")
def simple(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """ComfyUI's simple spacing, `t = T - 1 - floor(k T / steps)`: every so-many-th index from the noisy end."""
    _check(schedule, steps)
    if schedule.steps is None:
        return trailing(schedule, steps, end=end)
    return _levels(schedule, [schedule.steps - 1 - k * schedule.steps // steps for k in range(steps)], end)


@spacing("linspace", "Linspace", "linspace_timesteps")
@spacing("normal", "Normal", "uniform", "discrete", "normal_scheduler", round_t=False)
def linspace(
    schedule: Schedule,
    steps: int,
    *,
    round_t: bool = True,
    linear_nsr: bool = False,
    first_t: float | None = None,
    last_t: float | None = None,
    shift: float = 1.0,
    end: NoiseLevel = CLEAN,
) -> Grid:
    """Evenly from the noisiest time to the cleanest, both included; rounded half to even, or fractional ("normal").

    Args:
        round_t: to a table's whole times (DDPM, DDIM); without it times are fractional (k-diffusion, Euler).
        linear_nsr: at fractional times interpolate the noise-to-signal ratio linearly between the table's levels, as
            diffusers does, whatever the schedule's own interpolation.
        first_t, last_t: other ends than the schedule's; between them a continuous schedule is spaced evenly in t.
        shift: of a flow's times afterwards, `shift t / (1 + (shift - 1) t)` (Esser 2024, eq. 23).
    """
    _check(schedule, steps)
    times = _even(schedule, steps, first_t, last_t, shift)
    if schedule.steps is None or not (round_t or linear_nsr):
        return _levels(schedule, times, end)
    if round_t:
        return _levels(schedule, times.round(), end)
    return [_between_whole_times(schedule, t) for t in times] + [end]


def _between_whole_times(schedule: Schedule, t: Tensor) -> NoiseLevel:
    """The level at a fractional time whose nsr lies linearly between the neighbours', finite under pure noise."""
    a, b = (schedule.level(whole).nsr.clamp(max=_FINITE_NSR) for whole in (t.floor(), t.ceil()))
    level = schedule.from_nsr(torch.lerp(a, b, t - t.floor()))
    return schedule.level(t) if bool(t == t.round()) else NoiseLevel(t, level.alpha, level.sigma)


@spacing("sgm_uniform", "SGM Uniform", "sgm")
def sgm_uniform(
    schedule: Schedule,
    steps: int,
    *,
    first_t: float | None = None,
    last_t: float | None = None,
    shift: float = 1.0,
    end: NoiseLevel = CLEAN,
) -> Grid:
    """`steps + 1` even times from the noisiest to the cleanest, less the last; fractional (A1111, ComfyUI).

    diffusers' nearest is `trailing`, which rounds: another grid. `first_t`, `last_t` and `shift` as in `linspace`.
    """
    _check(schedule, steps)
    return _levels(schedule, _even(schedule, steps + 1, first_t, last_t, shift)[:-1], end)


def _last_index(schedule: Schedule, lambda_min: float) -> int:
    """How many of a table's times have a half log SNR of at least `lambda_min`."""
    assert schedule.steps is not None
    if lambda_min == -math.inf:
        return schedule.steps
    return int((schedule.level(torch.arange(schedule.steps)).half_log_snr >= lambda_min).sum())


@spacing("dpm_linspace", "DPM-Solver Linspace", "unipc_linspace")
def dpm_linspace(
    schedule: Schedule, steps: int, *, lambda_min: float = -math.inf, end: NoiseLevel = CLEAN
) -> Grid:
    """`steps + 1` even times from the noisiest to the cleanest, rounded, less the last (DPM-Solver, UniPC).

    Args:
        lambda_min: of a table only the times with a half log SNR above this count (-5.1 for cosine tables).
    """
    _check(schedule, steps)
    if schedule.steps is None:
        return sgm_uniform(schedule, steps, end=end)
    last = _last_index(schedule, lambda_min)
    if steps > last:
        raise UserError(f"dpm_linspace has at most {last} steps above lambda_min {lambda_min:g}, got {steps}")
    times = torch.linspace(last - 1, 0, steps + 1, dtype=torch.float64).round()[:-1]
    return _levels(schedule, _distinct([int(t) for t in times]), end)


@spacing("dpm_leading", "DPM-Solver Leading", "unipc_leading")
def dpm_leading(
    schedule: Schedule, steps: int, *, offset: int = 0, lambda_min: float = -math.inf, end: NoiseLevel = CLEAN
) -> Grid:
    """`t = k (T // (steps+1)) + offset`, k = steps … 1 (DPM-Solver, UniPC); `lambda_min` as in `dpm_linspace`."""
    _check(schedule, steps)
    if schedule.steps is None:
        ramp = torch.arange(steps, 0, -1, dtype=torch.float64) / (steps + 1)
        return _from_density(schedule, ramp, end)
    stride = _last_index(schedule, lambda_min) // (steps + 1)
    if stride < 1:
        raise UserError(f"dpm_leading needs fewer steps than the schedule's {schedule.steps} times, got {steps}")
    times = [min(k * stride + offset, schedule.steps - 1) for k in range(steps, 0, -1)]
    return _levels(schedule, _distinct(times), end)


@spacing("lcm", "LCM", "lcm_timesteps", "tcd_timesteps")
def lcm(
    schedule: Schedule, steps: int, *, origin_steps: int = 50, strength: float = 1.0, end: NoiseLevel = CLEAN
) -> Grid:
    """Every so-many-th of the `origin_steps` times of a consistency model's distillation (Luo 2023).

    The distilled times are `k i - 1`, i = 1 … origin_steps, k = T // origin_steps; of the first `strength` of them,
    descending, those at `floor(j n / steps)` are visited.
    """
    _check(schedule, steps)
    count = int(origin_steps * strength)
    if steps > count:
        raise UserError(f"the lcm schedule has at most {count} steps (the distilled times), got {steps}")
    if schedule.steps is not None and origin_steps > schedule.steps:
        raise UserError(f"origin_steps must be at most the schedule's {schedule.steps}, got {origin_steps}")
    kept = [count - j * count // steps for j in range(steps)]
    if schedule.steps is None:
        return _from_density(schedule, torch.tensor(kept, dtype=torch.float64) / origin_steps, end)
    return _levels(schedule, [i * (schedule.steps // origin_steps) - 1 for i in kept], end)


@spacing("beta_t", "Beta", "beta_scheduler", "beta_timesteps")
def beta_t(
    schedule: Schedule, steps: int, *, alpha: float = 0.6, beta: float = 0.6, end: NoiseLevel = CLEAN
) -> Grid:
    """Quantiles of a Beta distribution in time, many at both ends (Lee 2024); A1111's and ComfyUI's "beta".

    `t = round((T-1) F^-1(1 - k / steps))`. Where rounding repeats a time, theirs drop it; here the next one is taken.
    """
    _check(schedule, steps)
    u = beta_quantile(1 - torch.arange(steps, dtype=torch.float64) / steps, alpha, beta)
    if schedule.steps is None:
        return _from_density(schedule, u, end)
    times = (u * (schedule.steps - 1)).round()
    return _levels(schedule, _distinct([int(t) for t in times]), end)


def respaced(schedule: Schedule, spec: str, *, end: NoiseLevel = CLEAN) -> Grid:
    """improved-diffusion's spacing: "250", "ddim50", "10,15,20" (so many in each equal section, clean to noisy).

    Raises:
        UserError: for a continuous schedule, a spec that cannot be read, or one that does not fit the table.
    """
    if schedule.steps is None:
        raise UserError("respacing needs a schedule with discrete steps")
    times = respaced_times(schedule.steps, spec)
    return _levels(schedule, [float(t) for t in reversed(times)], end)


def respaced_times(total: int, spec: str) -> list[int]:
    """The kept indices of a table of `total` steps, ascending, for a respacing spec (Nichol 2021, section 4).

    "fast27" is GLIDE's "10,10,3,2,2" with its noisiest index two lower.
    """
    if spec == "fast27":
        times = respaced_times(total, "10,10,3,2,2")
        return [*times[:-1], total - 3]
    if spec.startswith("ddim"):
        count = _whole(spec.removeprefix("ddim"), spec)
        for whole in range(1, total):
            if len(range(0, total, whole)) == count:
                return list(range(0, total, whole))
        raise UserError(f"no whole stride gives {count} of {total} steps (spacing {spec!r})")
    counts = [_whole(part, spec) for part in spec.split(",")]
    size, longer = divmod(total, len(counts))
    start = 0
    times = []
    for i, count in enumerate(counts):
        section = size + (i < longer)
        if count > section:
            raise UserError(f"spacing {spec!r} asks for {count} steps of a section that has {section}")
        stride = 1.0 if count <= 1 else (section - 1) / (count - 1)
        times += [start + round(k * stride) for k in range(count)]
        start += section
    return times


def _whole(text: str, spec: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"spacing {spec!r} is not understood; write e.g. '250', 'ddim50' or '10,15,20'")
    return int(text)


# --- spaced in the noise-to-signal ratio -----------------------------------------------------------------------------


def nsr_ends(schedule: Schedule) -> tuple[float, float]:
    """The schedule's noise-to-signal range with finite, positive ends, for grids that are spaced in it."""
    low, high = schedule.nsr_range
    return max(low, _SMALL_NSR) if low <= 0 else low, min(high, _FINITE_NSR) if math.isinf(high) else high


def _ends(schedule: Schedule, low: float | None, high: float | None, clock: Clock) -> tuple[float, float]:
    """(cleanest, noisiest) nsr of a grid on a clock; "sigma" reaches pure noise, where "nsr" must stay finite."""
    if clock not in ("nsr", "sigma"):
        raise_unknown("clock", clock, ("nsr", "sigma"))
    own_low, own_high = nsr_ends(schedule) if clock == "nsr" else schedule.nsr_range
    low, high = own_low if low is None else low, own_high if high is None else high
    if not 0 < low <= high:
        raise UserError(f"a schedule in noise-to-signal ratio needs 0 < low <= high, got {low:g} and {high:g}")
    return low, high


def _flow_sigma(nsr: float) -> float:
    """`sigma / (alpha + sigma)` of a ratio: the flow's own sigma, 1 in pure noise."""
    return 1.0 if math.isinf(nsr) else nsr / (1 + nsr)


def _on_clock(clock: Clock, low: float, high: float, ramp: Callable[[float, float], Tensor]) -> Tensor:
    """The ratios of a ramp that is drawn in nsr itself or in the flow's sigma."""
    if clock == "nsr":
        return ramp(low, high)
    sigma = ramp(_flow_sigma(low), _flow_sigma(high)).clamp(max=1)
    return sigma / (1 - sigma)


def _from_end_to_end(clock: Clock, low: float, high: float, ramp: Callable[[float, float], Tensor]) -> Tensor:
    """A ramp whose ends are exact in spite of rounding; a single one is the noisiest."""
    nsr = _on_clock(clock, low, high, ramp)
    nsr[-1], nsr[0] = (low if len(nsr) > 1 else high), high
    return nsr


def _in_nsr(schedule: Schedule, nsr: Tensor, round_t: Rounding, end: NoiseLevel) -> Grid:
    found = [schedule.from_nsr(n) for n in nsr]
    if not round_t:
        return [*found, end]
    if schedule.steps is None:
        raise UserError("round_t needs a schedule with discrete steps")
    whole = torch.floor if round_t == "down" else torch.round
    return [*(NoiseLevel(whole(level.t), level.alpha, level.sigma) for level in found), end]


@spacing("karras", "Karras", "use_karras_sigmas", "ka")
def karras(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 7.0,
    low: float | None = None,
    high: float | None = None,
    clock: Clock = "nsr",
    round_t: Rounding = False,
    end: NoiseLevel = CLEAN,
) -> Grid:
    """`nsr_i = (max^(1/rho) + i/(steps-1) (min^(1/rho) - max^(1/rho)))^rho` (Karras 2022, eq. 5).

    Args:
        low, high: other ends than the schedule's, in nsr.
        clock: "sigma" draws the ramp in the flow's sigma, `sigma / (alpha + sigma)`, instead of nsr.
        round_t: the network is told the nearest whole time, or the one below ("down"); the levels stay exact. So do
            diffusers' DPM-Solver and UniPC.
    """
    _check(schedule, steps)
    i = torch.linspace(0, 1, steps, dtype=torch.float64)

    def ramp(a: float, b: float) -> Tensor:
        first, last = math.pow(b, 1 / rho), math.pow(a, 1 / rho)
        return torch.pow(first + i * (last - first), rho)

    return _in_nsr(schedule, _from_end_to_end(clock, *_ends(schedule, low, high, clock), ramp), round_t, end)


@spacing("exponential", "Exponential", "polyexponential", "use_exponential_sigmas", "use_lu_lambdas")
def exponential(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 1.0,
    low: float | None = None,
    high: float | None = None,
    clock: Clock = "nsr",
    round_t: Rounding = False,
    end: NoiseLevel = CLEAN,
) -> Grid:
    """Evenly in log nsr from the noisiest to the cleanest (Lu 2022); with `rho` not 1 polynomially so (k-diffusion).

    The other arguments as in `karras`.
    """
    _check(schedule, steps)
    i = torch.linspace(0, 1, steps, dtype=torch.float64)

    def ramp(a: float, b: float) -> Tensor:
        return torch.exp(math.log(a) + (1 - i) ** rho * (math.log(b) - math.log(a)))

    return _in_nsr(schedule, _from_end_to_end(clock, *_ends(schedule, low, high, clock), ramp), round_t, end)


@spacing("beta_sigma", "Beta (sigma)", "use_beta_sigmas")
def beta_sigma(
    schedule: Schedule,
    steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    low: float | None = None,
    high: float | None = None,
    clock: Clock | None = None,
    round_t: Rounding = False,
    end: NoiseLevel = CLEAN,
) -> Grid:
    """Quantiles of a Beta distribution between the least and the greatest nsr: diffusers' beta schedule.

    `nsr_i = min + (max - min) F^-1(1 - i/(steps-1))`. A1111's and ComfyUI's is `beta_t`, another grid. The other
    arguments as in `karras`, but for the clock: without one the ramp is drawn in nsr up to 20, which holds Stable
    Diffusion's 14.6, and in the flow's sigma on wider ranges and from pure noise. There the quantiles of nsr itself
    would leave nothing for the cleaner half of the way: of 64 on [0, 80] all but one lie above 0.1.
    """
    _check(schedule, steps)
    clock = clock or ("sigma" if schedule.nsr_range[1] > _WIDE_NSR else "nsr")
    u = beta_quantile(1 - torch.linspace(0, 1, steps, dtype=torch.float64), alpha, beta)
    ratios = _on_clock(clock, *_ends(schedule, low, high, clock), lambda a, b: a + (b - a) * u)
    return _in_nsr(schedule, ratios, round_t, end)


@spacing("kl_optimal", "KL Optimal", "kl_optimal_scheduler")
def kl_optimal(schedule: Schedule, steps: int, *, end: NoiseLevel = CLEAN) -> Grid:
    """Evenly in `atan(nsr)` (Sabour 2024, eq. 3.5), the cleanest level included, as in ComfyUI.

    A1111's list of that name ends at that level, not at the clean picture: `kl_optimal(schedule, steps + 1)[:-1]`.
    """
    _check(schedule, steps)
    low, high = schedule.nsr_range
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    nsr = torch.tan(ramp * math.atan(low) + (1 - ramp) * math.atan(high))
    nsr[0] = high
    return _in_nsr(schedule, nsr, False, end)


ALIGN_YOUR_STEPS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise-to-signal ratios of the optimised ten-step grids, noisy to clean (Sabour 2024, table 3)."""


@spacing("align_your_steps", "Align Your Steps", "ays", "align_your_steps_sd15", "ays_sd15")
@spacing("align_your_steps_sdxl", "Align Your Steps SDXL", "ays_sdxl", model="sdxl")
@spacing("align_your_steps_svd", "Align Your Steps SVD", "ays_svd", model="svd")
def align_your_steps(schedule: Schedule, steps: int, *, model: str = "sd15", end: NoiseLevel = CLEAN) -> Grid:
    """The published ten-step grid of a model, interpolated log-linearly to other numbers of steps (Sabour 2024).

    On a schedule whose range is the list's own (within 2 %) the ratios are the published ones; on any other the list
    is stretched to its range in log nsr. The last ratio gives way to `end`.

    Args:
        model: which list: sd15, sdxl or svd.
    """
    _check(schedule, steps)
    if model not in ALIGN_YOUR_STEPS:
        raise_unknown("align-your-steps list", model, ALIGN_YOUR_STEPS)
    listed = [math.log(nsr) for nsr in ALIGN_YOUR_STEPS[model]]
    low, high = nsr_ends(schedule)
    own = (math.log(high), math.log(low))
    if max(abs(own[0] - listed[0]), abs(own[1] - listed[-1])) > 0.02:
        scale = (own[0] - own[1]) / (listed[0] - listed[-1])
        listed = [own[1] + scale * (value - listed[-1]) for value in listed]
    table = torch.tensor(listed, dtype=torch.float64)
    place = torch.linspace(0, len(listed) - 1, steps + 1, dtype=torch.float64)[:-1]
    before = place.floor().long()
    nsr = torch.exp(torch.lerp(table[before], table[before + 1], place - before)).clamp(low, high)
    return _in_nsr(schedule, nsr, False, end)


@spacing("linear_quadratic", "Linear Quadratic", "mochi", "linear_quadratic_schedule")
def linear_quadratic(
    schedule: Schedule, steps: int, *, threshold: float = 0.025, clock: Clock = "sigma", end: NoiseLevel = CLEAN
) -> Grid:
    """Half the steps linear over the noisiest `threshold`, the others quadratic with the same slope (Mochi 2024).

    Drawn in the flow's sigma `s`, `s_i = s_max (1 - r_i)` with `r_i = threshold i / h` up to `h = steps // 2`, then
    the parabola that goes on from there with that slope and is 1 at i = steps.

    Args:
        clock: "nsr" draws it in nsr itself, as ComfyUI does on models that are not flows.
    """
    _check(schedule, steps)
    half = steps // 2
    slope = threshold / half if half else 0.0
    rest = steps - half
    bend = (1 - threshold * bool(half) - slope * rest) / rest**2
    i = torch.arange(steps, dtype=torch.float64)
    r = slope * i + bend * (i - half).clamp(min=0) ** 2
    _, high = _ends(schedule, None, None, clock)
    return _in_nsr(schedule, _on_clock(clock, 0.0, high, lambda _, top: top * (1 - r)), False, end)


# --- parts and directions --------------------------------------------------------------------------------------------


def tail(levels: Sequence[NoiseLevel], strength: float) -> Grid:
    """The last `strength` of a grid, for picture-to-picture: `int(steps * strength)` of its steps, at least one.

    Args:
        levels: `steps + 1` levels, noisy to clean.
        strength: in (0, 1]; 1 is the whole grid.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength must lie in (0, 1], got {strength}")
    steps = len(levels) - 1
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise UserError(f"strength {strength} of {steps} steps leaves no step; take more steps or more strength")
    return list(levels[steps - kept :])


def reversed_(levels: Sequence[NoiseLevel]) -> Grid:
    """The same levels clean to noisy, for inversion (`sample(…, climb=True)`)."""
    return list(reversed(levels))
