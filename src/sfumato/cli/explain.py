"""`sfumato explain`: figures that explain diffusion.

>>> sorted(command.name or command.callback.__name__ for command in explain_app.registered_commands)
['forward', 'loss', 'reverse', 'schedule', 'solvers']
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

explain_app = typer.Typer(
    help="Figures that explain diffusion.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

Out = Annotated[Path, typer.Option(help="The figure: .png, .svg or .pdf.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]


def _check(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"{out}: figures are written as .png, .svg or .pdf")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; choose another --out, or add --overwrite")


def _save(figure: Figure, out: Path) -> None:
    import io

    from sfumato.checkpoints.io import write_bytes

    buffer = io.BytesIO()
    figure.savefig(buffer, format=out.suffix[1:].lower(), dpi=130)
    write_bytes(out, buffer.getvalue())
    print(out)


@explain_app.command()
def forward(
    picture: Annotated[Path, typer.Argument(help="A picture; it is cut square.")],
    out: Out,
    schedule: Annotated[str, typer.Option(help="linear, scaled_linear, cosine, sigmoid …")] = "linear",
    size: Annotated[int, typer.Option(min=8, max=256, help="Side in pixels at which it is noised.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """The noising of a real picture, step by step and in one jump."""
    _check(out, overwrite)
    if not picture.is_file():
        raise UserError(f"there is no picture at {picture}")
    from sfumato import explain
    from sfumato.training.pictures import decode, fit_square

    square = fit_square(decode(picture.read_bytes()), size, "crop", upscale=True)
    _save(explain.forward(square, schedule, seed), out)


@explain_app.command()
def reverse(
    out: Out,
    model: Annotated[str | None, typer.Option(help="A name, a file or a run. [best in the box]")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    label: Annotated[str | None, typer.Option(help="A class of the model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for models that read text.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    overwrite: Overwrite = False,
) -> None:
    """The way of a model from noise to a picture, with what it expects at each step."""
    _check(out, overwrite)
    from sfumato import api, explain

    _save(explain.reverse(api.load(model), seed, label, steps, prompt), out)


@explain_app.command()
def schedule(
    out: Out,
    names: Annotated[list[str] | None, typer.Argument(help="Schedules to compare. [all]")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Signal-to-noise ratio, amplitude and loss weights of schedules."""
    _check(out, overwrite)
    from sfumato import explain

    _save(explain.schedules(names or list(explain.SCHEDULES)), out)


@explain_app.command()
def loss(
    run: Annotated[Path, typer.Argument(help="A training run's folder.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """A run's loss over time and by noise level."""
    _check(out, overwrite)
    from sfumato import explain

    _save(explain.loss(run), out)


@explain_app.command()
def solvers(
    out: Out,
    methods: Annotated[list[str] | None, typer.Argument(help="Samplers to compare. [all]")] = None,
    model: Annotated[str | None, typer.Option(help="A name, a file or a run. [best in the box]")] = None,
    budgets: Annotated[str, typer.Option(help="Numbers of network evaluations.")] = "8,12,20,32,50,100",
    schedule: Annotated[str | None, typer.Option(help="Spacing of steps. [the model's own]")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print every error as JSON instead of the table.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Error against network evaluations for all solvers: which one to pick for 8, 20 or 50."""
    _check(out, overwrite)
    import json
    import sys

    from sfumato import api, explain

    allowed = [int(part) for part in budgets.split(",") if part.strip().isdecimal() and int(part) > 0]
    if len(allowed) != len(budgets.split(",")):
        raise UserError(f"--budgets {budgets!r} is not understood; write e.g. 8,20,50")

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    figure, found = explain.solvers(
        api.load(model), budgets=allowed, names=methods, schedule=schedule, seed=seed, note=note
    )
    if as_json:
        print(json.dumps({where: [e.as_dict() for e in errors] for where, errors in found.items()}))
    else:
        print(explain.solver_table(found, allowed))
    _save(figure, out)
