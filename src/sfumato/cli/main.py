"""`sfumato`: the command and its groups.

>>> "generate" in {command.name or command.callback.__name__ for command in app.registered_commands}
True
"""

from __future__ import annotations

import sys

import typer

from sfumato.cli.describe import doctor, info, models_app
from sfumato.cli.generate import edit, generate
from sfumato.cli.train import recipes_app, train
from sfumato.errors import UserError

app = typer.Typer(
    help="Diffusion models of pictures: train them on your own pictures, and draw with them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(generate)
app.command()(edit)
app.command()(train)
app.add_typer(recipes_app, name="recipes")
app.add_typer(models_app, name="models")
app.command()(info)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Show the version and stop.")) -> None:
    if version:
        from sfumato import __version__

        print(f"sfumato {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"sfumato: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sfumato: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
