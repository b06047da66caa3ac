"""Figures that explain diffusion, drawn from the real thing: a picture, a schedule, a model, a run.

Each function returns a matplotlib `Figure` (`pip install sfumato[explain]`); `sfumato explain` saves them.

>>> figure = schedules(["linear", "cosine"])
>>> len(figure.axes)
3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.api import Model
from sfumato.backends import offload
from sfumato.diffusion.denoiser import Denoiser, Prediction
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import X0
from sfumato.diffusion.posterior import renoise
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, raise_unknown
from sfumato.evaluation import solvers as comparison
from sfumato.images import from_pil, to_pil
from sfumato.random import NoiseSource
from sfumato.systems.asked import Asked
from sfumato.systems.config import ScheduleConfig
from sfumato.tasks.draw import device_of, guided
from sfumato.training.report import METRICS, records
from sfumato.training.trainer import LEVEL_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 8
_DRAWS = 64  # noisings of the picture over which the two ways are compared

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "scaled_linear": {"name": "scaled_linear", "start": 0.00085, "end": 0.012},
    "cosine": {"name": "cosine"},
    "sigmoid": {"name": "sigmoid"},
    "scaled_linear_zero_snr": {
        "name": "scaled_linear", "start": 0.00085, "end": 0.012, "zero_terminal_snr": True,
    },
    "flow": {"name": "flow"},
}  # fmt: skip


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    try:
        from matplotlib.figure import Figure as NewFigure
    except ImportError:
        raise UserError("figures need matplotlib: pip install sfumato[explain]") from None
    figure = NewFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _show(axes: Axes, picture: Tensor, title: str = "") -> None:
    """A picture (C, H, W) in [-1, 1] without ticks."""
    axes.imshow(to_pil(picture.clamp(-1, 1)[None])[0], interpolation="nearest", cmap="gray")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _schedule(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise_unknown("schedule", name, SCHEDULES)
    return ScheduleConfig(**SCHEDULES[name]).build()


def forward(picture: Image.Image, schedule: str = "linear", seed: int = 0) -> Figure:
    """The forward process on a real picture, twice: step by step through the chain, and in one jump.

    The two strips differ in their noise but not in distribution: the lower panels compare, over 64 noisings, the mean
    and the standard deviation of what was added to `alpha x0` (which should be 0 and `sigma`; Ho 2020, eq. 4).
    """
    path = _schedule(schedule)
    if path.steps is None:
        raise UserError(f"schedule {schedule!r} is continuous: it has no chain to go through step by step")
    x0 = from_pil([picture])
    shown = torch.linspace(0, path.steps - 1, _COLUMNS).round().long().tolist()
    chain, jump = _noised(x0, path, shown, seed)
    figure, rows = _figure(3, _COLUMNS, 1.35 * _COLUMNS, 5.2)
    for column, t in enumerate(shown):
        _show(rows[0][column], chain[column][0], f"t = {t}")
        _show(rows[1][column], jump[column][0])
        _compare(rows[2][column], path.level(t), x0, chain[column], jump[column])
    rows[0][0].set_ylabel("step by step", fontsize=8)
    rows[1][0].set_ylabel("in one jump", fontsize=8)
    rows[2][0].set_ylabel("added noise", fontsize=8)
    figure.suptitle(f"Forward process, {schedule} schedule: x_t = alpha x0 + sigma eps", fontsize=10)
    return figure


def _noised(x0: Tensor, path: Schedule, shown: list[int], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """(by the chain, in one jump) at the times shown, each (64, C, H, W)."""
    many = x0.expand(_DRAWS, -1, -1, -1)
    noise = NoiseSource(range(seed, seed + _DRAWS), x0.shape[1:])
    x, chain, jump = path.level(0).noise(many, noise.draw()), [], []
    for t in range(shown[-1] + 1):
        if t > 0:
            x = renoise(x, path.level(t - 1), path.level(t), noise.draw())
        if t in shown:
            chain.append(x)
            jump.append(path.level(t).noise(many, noise.draw()))
    return chain, jump


def _compare(axes: Axes, level: NoiseLevel, x0: Tensor, chain: Tensor, jump: Tensor) -> None:
    for way, x, filled in (("chain", chain, True), ("jump", jump, False)):
        added = (x - float(level.alpha) * x0).flatten()
        style: dict[str, Any] = {"histtype": "step", "fill": filled, "alpha": 0.6}
        axes.hist(added.numpy(), bins=41, density=True, label=way, range=(-4, 4), **style)
        axes.plot([], [], " ", label=f"{added.mean():+.3f}, {added.std():.3f}")
    axes.set_title(f"sigma = {float(level.sigma):.3f}", fontsize=7)
    axes.legend(fontsize=4.5, loc="upper right", frameon=False)
    axes.set_yticks([])
    axes.tick_params(labelsize=6)


def reverse(
    model: Model, seed: int = 0, label: str | None = None, steps: int | None = None, prompt: str | None = None
) -> Figure:
    """The reverse process of a model: the state `x_t` on its way from noise, and the clean picture it expects there.

    Of a latent model both are shown as its codec decodes them.
    """
    states: list[tuple[NoiseLevel, Tensor]] = []
    estimates: list[Tensor] = []

    def record(x: Tensor, level: NoiseLevel, prediction: Prediction | None, noise: NoiseSource) -> Tensor:
        states.append((level, x[0].cpu()))
        if prediction is not None:
            estimates.append(prediction.x0[0].cpu())
        return x

    picture = model.generate(prompt, seed=seed, label=label, steps=steps, on_step=record)[0]
    settings = picture.info["sfumato"]
    device = device_of(model.system)

    def decoded(x: Tensor) -> Tensor:
        return model.system.pictures(x[None].to(device))[0].cpu()

    chosen = torch.linspace(0, len(estimates) - 1, min(_COLUMNS, len(estimates))).round().long().tolist()
    figure, rows = _figure(2, len(chosen) + 1, 1.35 * (len(chosen) + 1), 3.2)
    with offload.resting(model.system.networks()):
        for column, index in enumerate(chosen):
            level, state = states[index]
            spread = float(torch.sqrt(level.alpha**2 + level.sigma**2))
            _show(rows[0][column], decoded(state / max(1.0, spread)), f"t = {float(level.t):.0f}")
            _show(rows[1][column], decoded(estimates[index]))
        _show(rows[0][-1], decoded(states[-1][1]), "result")
    rows[1][-1].axis("off")
    rows[0][0].set_ylabel("x_t", fontsize=8)
    rows[1][0].set_ylabel("x0 expected", fontsize=8)
    what = f"{settings['sampler']}, {settings['steps']} steps, seed {seed}" + "".join(
        f", {said}" for said in (label, prompt) if said
    )
    figure.suptitle(f"Reverse process of {model.name}: {what}", fontsize=10)
    return figure


def schedules(names: Sequence[str]) -> Figure:
    """Signal-to-noise ratio, amplitude, and loss weights on the squared error of x0, of a set of schedules.

    The right panel shows what a plain loss on eps, on v, and min-SNR (gamma 5) each mean as a weight on x0's error.
    """
    figure, rows = _figure(1, 3, 12.5, 3.6)
    signal, amplitude, weight = rows[0]
    u = torch.linspace(0, 1, 400, dtype=torch.float64)
    for name in names:
        path = _schedule(name)
        low, high = path.t_range
        level = path.level((low + (high - low) * u).round() if path.steps else low + (high - low) * u)
        signal.plot(u, 2 * level.half_log_snr.clamp(-12, 12), label=name)
        amplitude.plot(u, level.alpha, label=name)
    signal.set_ylabel("log SNR")
    amplitude.set_ylabel("alpha (share of the picture)")
    for axes in (signal, amplitude):
        axes.set_xlabel("t / T")
        axes.legend(fontsize=7)
    _weights(weight, _schedule(names[0]), names[0])
    return figure


def _weights(axes: Axes, path: Schedule, name: str) -> None:
    level = path.level(torch.linspace(*path.t_range, 400, dtype=torch.float64).round() if path.steps else 0.5)
    snr = (level.alpha / level.sigma) ** 2
    x0 = Denoiser(torch.nn.Identity(), path, X0)
    axes.plot(2 * level.half_log_snr, snr, label="plain loss on eps: SNR")
    axes.plot(2 * level.half_log_snr, snr + 1, label="plain loss on v: SNR + 1")
    axes.plot(2 * level.half_log_snr, torch.ones_like(snr), label="plain loss on x0: 1")
    minimum = Objective(weighting="min_snr").weight(x0, level)
    axes.plot(2 * level.half_log_snr, minimum, label="min-SNR, gamma 5", linewidth=2.5, alpha=0.7)
    axes.set_yscale("log")
    axes.set_xlabel(f"log SNR ({name})")
    axes.set_ylabel("weight on the squared error of x0")
    axes.legend(fontsize=7)


def loss(run: Path) -> Figure:
    """A run's loss over its steps and, where the run knows noise levels, at first, halfway and at last by them."""
    file = run / METRICS
    if not file.is_file():
        raise UserError(f"{run} has no {METRICS}; it is not a training run, or has not logged yet")
    found = records(run)
    train = [r for r in found if "loss" in r]
    held_out = [r for r in found if "validation_loss" in r]
    if not train:
        raise UserError(f"{file} holds no losses yet")
    levelled = [r for r in train if r.get("loss_by_level")]
    figure, rows = _figure(1, 2 if levelled else 1, 10 if levelled else 5, 3.6)
    over_time = rows[0][0]
    over_time.plot([r["step"] for r in train], [_number(r["loss"]) for r in train], alpha=0.6, label="training")
    if held_out:
        points = [r["step"] for r in held_out], [_number(r["validation_loss"]) for r in held_out]
        over_time.plot(*points, "o-", markersize=3, label="held out, averaged weights")
    over_time.set_yscale("log")
    over_time.set_xlabel("step")
    over_time.set_ylabel("loss")
    over_time.legend(fontsize=8)
    if levelled:
        _losses_by_level(rows[0][1], levelled)
    return figure


def _number(value: float | None) -> float:
    """A recorded figure; not a number where none was."""
    return float("nan") if value is None else value


def _losses_by_level(by_level: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    edges = [-4.0, *LEVEL_EDGES, 4.0]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    for record in (train[0], train[len(train) // 2], train[-1]):
        values = [_number(v) for v in record["loss_by_level"]]
        by_level.plot(centres, values, "o-", markersize=3, label=f"step {record['step']}")
    by_level.set_xlabel("half log SNR (left: mostly noise)")
    by_level.set_ylabel("unweighted loss")
    by_level.legend(fontsize=8)


def solvers(
    model: Model,
    *,
    budgets: Sequence[int] = comparison.BUDGETS,
    names: Sequence[str] | None = None,
    schedule: str | None = None,
    seed: int = 0,
    pictures: int = 4,
    note: Callable[[str], object] = lambda _: None,
) -> tuple[Figure, dict[str, list[comparison.Error]]]:
    """Error against network evaluations for all solvers, on a mixture whose solution is known and on a model.

    The mixture lies on the model's own path (its noise schedule), so both panels ask the same grids of the solvers.

    Args:
        budgets: numbers of network evaluations.
        names: methods; None for all.
        schedule: spacing of steps for all methods but those that want one of their own; None for the model's own.
        pictures: of the model, seeds `seed` …, without labels.
        note: told what is at work.

    Returns:
        the figure, and the errors behind it by "mixture" and "model".
    """
    path, spacing = model.denoiser.schedule, schedule or model.system.config.sampling.schedule
    data, count = comparison.mixture(), 2000
    note("mixture")
    on_mixture = comparison.compare(
        data, path, lambda: comparison.Together(seed, count, (2,)), spacing=spacing, budgets=budgets,
        names=names, data=data.sample(count, torch.Generator().manual_seed(seed)), note=note,
    )  # fmt: skip
    note(model.name)
    device = device_of(model.system)
    with offload.resting(model.system.networks()):
        denoise = guided(model.system, [Asked()] * pictures, None)
        on_model = comparison.compare(
            denoise, path, lambda: NoiseSource(range(seed, seed + pictures), model.system.shape, device=device),
            spacing=spacing, budgets=budgets, names=names, note=note,
        )  # fmt: skip
    found = {"mixture": on_mixture, "model": on_model}
    return _solver_figure(found, model.name, spacing), found


def kept(errors: Sequence[comparison.Error], budget: int) -> list[comparison.Error]:
    """Those at this budget that kept to it but for one evaluation; a Runge-Kutta start and DPM adaptive do not."""
    return [e for e in errors if e.budget == budget and e.evaluations <= budget + 1]


def solver_table(found: Mapping[str, Sequence[comparison.Error]], budgets: Sequence[int]) -> str:
    """The errors as a table in Markdown, best first at the middle budget; with a line on which to pick at each budget.

    Each cell holds the distance from the exact solution on the model, or for a stochastic method the sliced Wasserstein
    distance to the data on the mixture, marked with a star.
    """
    values: dict[str, dict[int, float]] = {}
    stochastic = {e.method for e in found["mixture"] if e.ode is None}
    for error in (*found["mixture"], *found["model"]):
        if error.method in stochastic and error.distribution is not None:
            values.setdefault(error.method, {})[error.budget] = error.distribution
    for error in found["model"]:
        if error.ode is not None:
            values.setdefault(error.method, {})[error.budget] = error.ode
    middle = budgets[len(budgets) // 2]
    ordered = sorted(values, key=lambda m: (m in stochastic, values[m].get(middle, float("inf"))))
    lines = ["| sampler | " + " | ".join(str(b) for b in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for method in ordered:
        cells = [f"{values[method][b]:.4f}" if b in values[method] else "" for b in budgets]
        lines.append(f"| {method}{' *' if method in stochastic else ''} | " + " | ".join(cells) + " |")
    for budget in budgets:
        reached = sorted((e.ode, e.method) for e in kept(found["model"], budget) if e.ode is not None)
        if reached:
            lines.append(f"{budget} evaluations: {', '.join(method for _, method in reached[:3])}")
    return "\n".join(lines)


FAMILIES: dict[str, tuple[str, ...]] = {
    "Euler, Heun, DPM2": ("euler", "heun", "flow_heun", "dpm2"),
    "linear multistep, DEIS": ("multistep", "deis"),
    "DPM-Solver": ("dpm", "dpm_adaptive"),
    "DPM-Solver++, UniPC": ("unipc",),
    "ancestral": ("ancestral", "euler_ancestral", "dpmpp_ancestral"),
    "SDE": ("dpmpp_sde", "sa_solver"),
    "for distilled models": ("consistency",),
}
"""Panels of the comparison of solvers, and which files of `diffusion.solvers` they show; any other is in the last."""


def family(name: str) -> str:
    """The panel that a method belongs to."""
    method = comparison.methods([name])[0]
    file = method.make.__module__.rpartition(".")[2]
    if file == "dpm" and name.startswith("dpmpp"):
        return "DPM-Solver++, UniPC"
    if method.stochastic and file == "dpm2":
        return "ancestral"
    return next((title for title, files in FAMILIES.items() if file in files), "others")


def _solver_figure(found: dict[str, list[comparison.Error]], name: str, spacing: str) -> Figure:
    """Two rows of deterministic families, by the distance from the exact solution on mixture and model; one of
    stochastic ones, by the distance of what they draw. Every panel has all other methods of its ruler in grey."""
    names = list(dict.fromkeys(e.method for e in found["mixture"]))
    drawn = {e.method for e in found["mixture"] if e.ode is None}
    families = dict.fromkeys((*FAMILIES, "others"))
    panels: list[tuple[int, str, str, str, list[str]]] = []
    for row, where, what, ruler, members in (
        (0, "mixture", "ode", "mixture", [m for m in names if m not in drawn]),
        (1, "model", "ode", name, [m for m in names if m not in drawn]),
        (2, "mixture", "distribution", "mixture", [m for m in names if m in drawn]),
    ):
        shown = {title: [m for m in members if family(m) == title] for title in families}
        panels += [(row, where, what, f"{title} ({ruler})", group) for title, group in shown.items() if group]
    rows = sorted({row for row, *_ in panels})
    columns = max(sum(row == panel[0] for panel in panels) for row in rows)
    figure, grid = _figure(len(rows), columns, 3.6 * columns + 0.6, 3.1 * len(rows) + 0.6)
    for row, axes in zip(rows, grid, strict=True):
        mine = [panel for panel in panels if panel[0] == row]
        for place, panel in zip(axes, mine, strict=False):
            _solver_panel(place, found[panel[1]], panel[2], panel[3], panel[4])
        for place in axes[1 : len(mine)]:
            place.sharey(axes[0])
        for place in axes[len(mine) :]:
            place.axis("off")
        if row == 2 and len(mine) < len(axes):
            style: dict[str, Any] = {"va": "top", "fontsize": 7, "linespacing": 1.5, "in_layout": False}
            axes[len(mine)].text(0, 1, _nearest_at_each_budget(found, name), **style)
        ode = mine[0][2] == "ode"
        axes[0].set_ylabel("distance from the exact solution" if ode else "sliced Wasserstein distance to the data")
    title = f"Solvers on the schedule of {name}, {spacing} grid: error against network evaluations"
    figure.suptitle(title, fontsize=11)
    return figure


def _solver_panel(axes: Axes, errors: Sequence[comparison.Error], what: str, title: str, group: Sequence[str]) -> None:
    """The methods of a group in colour, those that come out the same as one; the others of this ruler in grey."""
    curves: dict[str, tuple[tuple[int, float], ...]] = {}
    stochastic = {e.method for e in errors if e.ode is None}
    for error in errors:
        value = getattr(error, what)
        if value is not None and (error.method in stochastic) == (what == "distribution"):
            curves[error.method] = (*curves.get(error.method, ()), (error.evaluations, value))
    alike: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for method, points in curves.items():
        if method in group:
            rounded = tuple((count, float(f"{value:.3g}")) for count, value in sorted(points))
            alike.setdefault(rounded, []).append(method)
        axes.plot(*zip(*sorted(points), strict=True), color="0.85", linewidth=0.7, zorder=0)
    for index, (points, methods) in enumerate(alike.items()):
        style: dict[str, Any] = {"marker": "osD^v<>"[index % 7], "markersize": 3.5, "linewidth": 1.3}
        axes.plot(*zip(*points, strict=True), color=f"C{index}", label=" = ".join(methods), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({e.budget for e in errors})
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.set_xticks([], minor=True)
    values = sorted(value for points in curves.values() for _, value in points)
    axes.set_ylim(values[0] / 1.3, 8 * values[int(0.75 * len(values))])  # room for the names; the worst run out of it
    axes.set_title(title, fontsize=9)
    axes.tick_params(which="both", labelsize=7)
    axes.legend(fontsize=6.5, loc="upper right", ncols=2, frameon=False)


def _nearest_at_each_budget(found: Mapping[str, Sequence[comparison.Error]], name: str) -> str:
    """The best methods that keep to each budget: deterministic ones on the model, stochastic ones on the mixture."""
    lines = []
    for budget in sorted({e.budget for e in found["model"]}):
        exact = sorted((e.ode, e.method) for e in kept(found["model"], budget) if e.ode is not None)
        drawn = [e for e in kept(found["mixture"], budget) if e.ode is None and e.distribution is not None]
        likely = sorted((e.distribution or 0.0, e.method) for e in drawn)
        lines.append(f"{budget} evaluations")
        for where, best in ((name, exact[:3]), ("mixture, with noise", likely[:2])):
            if best:
                lines.append(f"   {where}: {', '.join(method for _, method in best)}")
    return "\n".join(lines)
