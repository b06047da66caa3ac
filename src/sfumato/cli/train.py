"""`sfumato train` and `sfumato recipes`.

>>> sorted(command.name for command in recipes_app.registered_commands)
['ls', 'show', 'validate']
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.errors import UserError

recipes_app = typer.Typer(
    help="What can be trained.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


def train(
    recipe: Annotated[str, typer.Argument(help="A name from `sfumato recipes ls`, or FILE.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings, e.g. train.steps=500.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of pictures, or a parquet file.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="A first stage's run (with its data), file, or name: what latents come from.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the checkpoint or run to start from.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad pictures out and list them.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every setting and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, estimate, and stop.")] = False,
) -> None:
    """Train a recipe on your pictures; the same command again goes on where it stopped."""
    from sfumato.training import recipes, run

    extra = ["data.skip_bad=true"] if skip_bad else []
    paths = (str(path) if path is not None else None for path in (data, codec))
    loaded = recipes.load(recipe, [*(overrides or []), *extra], *paths)
    if print_config:
        print(run.dump(loaded), end="")
        return
    if out is None:
        raise UserError("name the run's folder with --out RUN")
    from sfumato.backends.devices import choose_device
    from sfumato.images import PictureError
    from sfumato.training.trainer import TrainingFailed

    chosen = None if device == "auto" else choose_device(device)
    try:
        result = run.train(loaded, out, resume=resume, dry_run=dry_run, device=chosen)
    except (TrainingFailed, PictureError) as error:
        typer.echo(f"sfumato: {error}", err=True)
        raise typer.Exit(3) from None
    if result == "stopped":
        raise typer.Exit(130)


def check(
    recipe: Annotated[str, typer.Argument(help="A name from `sfumato recipes ls`, or FILE.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings, e.g. train.batch=16.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of pictures, or a parquet file.")] = None,
    codec: Annotated[str | None, typer.Option(help="A first stage's run, file or name.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad pictures out and name them.")] = False,
) -> None:
    """Rehearse a run: open every picture, train, validate, sample, save, resume and finish, once each."""
    from sfumato.backends.devices import choose_device
    from sfumato.training import recipes, run

    given = [*(overrides or []), *(["data.skip_bad=true"] if skip_bad else [])]
    loaded = recipes.load(recipe, given, *(str(p) if p is not None else None for p in (data, codec)))
    run.rehearse(loaded, device=None if device == "auto" else choose_device(device))


@recipes_app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with Sfumato."""
    from sfumato.training import recipes

    for name in recipes.names():
        text = recipes.read_yaml(recipes.source(name)[1], name).get("description", "")
        print(f"{name:16} {text}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe, or FILE.yaml.")]) -> None:
    """Print a recipe, to copy and change."""
    from sfumato.training import recipes

    print(recipes.source(name)[1], end="")


@recipes_app.command("validate")
def validate_recipe(
    name: Annotated[str, typer.Argument(help="A recipe, or FILE.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings.")] = None,
) -> None:
    """Check a recipe without training. Where a codec has to be named, a latent one is checked over pixels, a decoder's
    with the codec of emoji."""
    from sfumato.training import recipes

    given = [*(overrides or [])]
    said = {override.partition("=")[0].partition(".")[0] for override in given}
    values = recipes.read_values(name)[1]
    if values.get("recipe") == "latent" and not any(key.startswith("codec=") for key in given):
        sized = isinstance(values.get("data"), dict) and "size" in values["data"]
        stand_in = [] if values.get("codec") else ["codec=pixels", *([] if sized else ["data.size=64"])]
        given = [*stand_in, *given]
    elif values.get("recipe") == "autoencoder" and not {"model", "codec"} & {*values, *said}:
        given = ["codec=emoji", *given]
    recipes.load(name, given, data=".")
    print(f"{name} is a valid recipe")
