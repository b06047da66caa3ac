"""`sfumato evaluate`: how good a model is, in numbers.

>>> [command.name for command in evaluate_app.registered_commands]
['bpd', 'floor', 'pictures', 'codec', 'text', 'upscale']
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import evaluate_sets
from sfumato.cli.options import number, whole
from sfumato.errors import UserError, nearest, raise_unknown

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.evaluation.bpd import BitsPerDim
    from sfumato.systems.ddpm import DDPM
    from sfumato.training.data import PictureSet

METHODS = ("bound", "flow")

evaluate_app = typer.Typer(
    help="How good a model is, in numbers.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@evaluate_app.callback()
def _group() -> None:
    """How good a model is, in numbers."""


@evaluate_app.command("bpd")
def bits_per_dim(
    model: Annotated[str, typer.Argument(help="A name from `sfumato models ls`, a file, a run or a folder.")],
    data: Annotated[Path, typer.Option(help="Folder of pictures, or a parquet file.")],
    split: Annotated[str | None, typer.Option(help="Only pictures whose column 'split' says this. [all]")] = None,
    count: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="N", help="So many pictures, chosen by the seed. [all]")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column that is the class; folder for sub-folders. [the null class]")
    ] = None,
    method: Annotated[str, typer.Option(help="bound: variational; flow: probability flow.")] = "bound",
    steps: Annotated[
        str | None,
        typer.Option(help="bound: of a respaced chain (250, ddim50 or 10,15,20) [all]; flow: equal steps [adaptive]."),
    ] = None,
    variance: Annotated[
        str | None, typer.Option(help="bound: small, large or learned. [learned where the model has it, else small]")
    ] = None,
    no_clip: Annotated[bool, typer.Option("--no-clip", help="bound: let estimates leave the range.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(parser=number(0), metavar="E", help="flow: error allowed in a step. [1e-4]")
    ] = None,
    probes: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="N", help="flow: directions for each picture. [1]")
    ] = None,
    fit: evaluate_sets.Fit = "crop",
    upscale: evaluate_sets.Upscale = False,
    skip_bad: evaluate_sets.SkipBad = False,
    seed: Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Of all noise.")] = 0,
    batch: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, step by step.")] = False,
) -> None:
    """Bits per dimension of 8-bit pictures under a model; fewer are better."""
    of_bound, of_flow = {"variance": variance, "no-clip": no_clip or None}, {"tolerance": tolerance, "probes": probes}
    _check(method, steps, of_bound, of_flow)
    evaluate_sets.check_fit(fit)
    from sfumato import api
    from sfumato.systems.ddpm import DDPM

    opened = api.load(model, device=device, offload="never")  # the flow needs gradients
    if not isinstance(opened.system, DDPM):
        raise UserError(
            f"{opened.name} is a {opened.system.kind} model; bits per dimension need one of kind ddpm, which draws "
            "pixels from noise alone"
        )
    found, indices, total = _choose(
        opened.system, data, split, label, count, seed, {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    )
    pictures, labels = _load(found, indices, label is not None)
    if method == "bound":
        settings: dict[str, Any] = {"steps": steps, "variance": variance, "clip": not no_clip}
    else:
        settings = {
            "steps": int(steps) if steps is not None else None,
            "tolerance": (1e-4 if tolerance is None else tolerance) if steps is None else None,
            "probes": probes or 1,
        }
    common = {"seed": seed, "batch": batch, "on_batch": _progress}
    measured = _measure(opened.system, pictures, labels, method, settings | common)
    if measured.terms is not None:
        learned = opened.system.denoiser.learned_variance
        settings |= {"steps": len(measured.terms), "variance": variance or ("learned" if learned else "small")}
    asked = {"data": str(data), "split": split, "label": label, "seed": seed, "pictures": len(indices), "of": total}
    asked |= {"fit": fit, "upscale": upscale, "skip_bad": skip_bad}
    _tell(measured, {"model": opened.name, "method": method} | settings | asked, as_json)


def _check(method: str, steps: str | None, of_bound: dict[str, Any], of_flow: dict[str, Any]) -> None:
    """Refuse what does not go together before anything is opened."""
    if method not in METHODS:
        raise_unknown("method", method, METHODS)
    for name, value in (of_flow if method == "bound" else of_bound).items():
        if value is not None:
            raise UserError(f"--{name} does not apply to --method {method}; leave it out")
    if method == "flow" and steps is not None:
        if not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"--steps: the flow takes a whole number of equal steps, got {steps!r}")
        if of_flow["tolerance"] is not None:
            raise UserError("--tolerance does not apply to a fixed number of --steps; leave one of them out")


def _measure(
    system: DDPM, pictures: Tensor, labels: list[str] | None, method: str, options: dict[str, Any]
) -> BitsPerDim:
    from sfumato.evaluation.bpd import measure_bound, measure_flow

    if method == "bound":
        return measure_bound(system, pictures, labels, **options)
    given = {name: value for name, value in options.items() if value is not None}
    return measure_flow(system, pictures, labels, **given)


def _choose(
    system: DDPM, data: Path, split: str | None, label: str | None, count: int | None, seed: int,
    columns: dict[str, Any],
) -> tuple[PictureSet, list[int], int]:  # fmt: skip
    """The opened set, the indices to measure, and how many pictures there were to choose from."""
    import torch

    from sfumato.random import derived_seed
    from sfumato.training.data import DataConfig, open_data

    if label is not None and not system.config.labels:
        raise UserError("this model has no class labels; leave --label out")
    config = DataConfig(
        path=str(data), size=system.config.size, channels=system.config.channels, split=None, validation_split=None,
        label=label, caption=None, **columns,
    )  # fmt: skip
    pictures, _ = open_data(config)
    evaluate_sets.check_pictures(pictures)
    indices = list(range(len(pictures)))
    if split is not None:
        splits = [str(record.columns.get("split")) for record in pictures.records]
        if split not in splits:
            known = sorted({name for name in splits if name != "None"})
            said = f"; splits: {', '.join(known)}" if known else ", which has no column 'split'; leave --split out"
            raise UserError(f"--split: no picture in {str(data)!r} has split {split!r}{nearest(split, known)}{said}")
        indices = [i for i in indices if splits[i] == split]
    total = len(indices)
    if count is not None and count > total:
        raise UserError(f"--count: {count} pictures were asked for, but {str(data)!r} has {total}")
    if count is not None and count < total:
        generator = torch.Generator().manual_seed(derived_seed("chosen pictures", seed))
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        indices = [indices[int(i)] for i in chosen]
    return pictures, indices, total


def _load(pictures: PictureSet, indices: list[int], labelled: bool) -> tuple[Tensor, list[str] | None]:
    """The pictures as bytes (N, C, H, W), and the names of their classes."""
    import torch

    loaded = torch.stack([pictures.load(i) for i in indices])
    if not labelled:
        return loaded, None
    return loaded, [pictures.labels[int(pictures.label_of(i) or 0)] for i in indices]


def _progress(done: int, total: int) -> None:
    if total > done or sys.stderr.isatty():
        print(f"measured {done}/{total} pictures", file=sys.stderr, flush=True)


def _tell(found: BitsPerDim, settings: dict[str, Any], as_json: bool) -> None:
    measured: dict[str, Any] = {
        "bits_per_dim": found.total,
        "deviation": found.deviation,
        "prior": found.prior,
        "decoder": found.decoder,
        "dims": found.dims,
        "evaluations": found.evaluations,
    }
    if as_json:
        if found.terms is not None:
            names = {"t": "times", "bits_per_dim": "terms", "x0_mse": "x0_mse", "eps_mse": "eps_mse"}
            measured["by_step"] = {key: getattr(found, name).tolist() for key, name in names.items()}
        print(json.dumps(measured | {"settings": settings}, indent=1, allow_nan=False))
        return
    spread = f" ± {found.deviation:.4f}" if found.deviation is not None else ""
    print(f"{found.total:.4f}{spread} bits/dim")
    if found.prior is not None and found.decoder is not None:
        between = found.total - found.prior - found.decoder
        print(f"  prior {found.prior:.4f}, steps between {between:.4f}, decoder {found.decoder:.4f}")
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    print(f"  {said}; {found.dims} dimensions, {found.evaluations} evaluations")


for _command in (
    evaluate_sets.floor, evaluate_sets.pictures, evaluate_sets.codec, evaluate_sets.text, evaluate_sets.upscale,
):  # fmt: skip
    evaluate_app.command(_command.__name__)(_command)
