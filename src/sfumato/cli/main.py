"""`sfumato`: the command and its groups.

>>> "generate" in {command.name or command.callback.__name__ for command in app.registered_commands}
True
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

import typer

from sfumato.cli.bench import bench
from sfumato.cli.convert import convert
from sfumato.cli.data import data_app
from sfumato.cli.describe import doctor, info, models_app
from sfumato.cli.edit import edit
from sfumato.cli.evaluate import evaluate_app
from sfumato.cli.explain import explain_app
from sfumato.cli.generate import generate
from sfumato.cli.replay import replay
from sfumato.cli.samplers import samplers, schedules
from sfumato.cli.train import check, recipes_app, train
from sfumato.errors import UserError, nearest

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # the parent of all errors in how a command is called

app = typer.Typer(
    help="Diffusion models of pictures: train them on your own pictures, and draw with them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(generate)
app.command()(edit)
app.command()(replay)
app.command()(convert)
app.command()(samplers)
app.command()(schedules)
app.command()(train)
app.command()(check)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(explain_app, name="explain")
app.command()(bench)
app.command()(info)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Show the version and stop.")) -> None:
    if version:
        from sfumato import __version__

        print(f"sfumato {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command and exit.

    0: done. 2: a user's error, in one sentence on stderr. 3: the model computed values that are not finite, so there is
    no picture. 130: interrupted. 141: who reads the output has gone.
    """
    try:
        code = app(prog_name="sfumato", standalone_mode=False)
    except UserError as error:
        code = _refuse(str(error))
    except _UsageError as error:
        code = _misused(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        from sfumato.checkpoints.io import explain_os_error

        where = f"{error.filename}: " if error.filename is not None else ""
        code = _refuse(f"{where}{explain_os_error(error)}")
    if code == 130:
        with suppress(OSError):  # the terminal may have gone
            print("sfumato: interrupted", file=sys.stderr)
    sys.exit(code or 0)


def _refuse(sentence: str) -> int:
    print(f"sfumato: {sentence}", file=sys.stderr)
    return 2


def _misused(error: Any) -> int:
    """Say what is wrong with the command line itself, and where its help is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    command = error.ctx.command_path if error.ctx is not None else "sfumato"
    return _refuse(f"{_usage(error)} (see {command} --help)")


def _usage(error: Any) -> str:
    """What is wrong with the command line: which option or command, what was expected, the nearest right name."""
    parameter, context = getattr(error, "param", None), error.ctx
    unknown = re.match(r"No such command '(.*?)'", error.message)
    if unknown is not None:
        return f"unknown command {unknown[1]!r}{nearest(unknown[1], context.command.commands)}"
    if hasattr(error, "possibilities"):
        return f"unknown option {error.option_name!r}{_right_option(error.option_name, context)}"
    if parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()
        return f"{name}: {error.message or 'is missing'}"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}"


# other programs' names of options -> ours
_OPTIONS = {
    ("--cfg-scale", "--cfg", "--scale", "--guidance-scale"): "--guidance",
    ("--denoise", "--denoising-strength", "--denoising"): "--strength",
    ("--size", "--resolution"): "--width and --height",
    ("--negative-prompt", "--neg", "--neg-prompt"): "--negative",
    ("--batch-size", "--batch", "--n", "-n", "--num", "--num-images", "--n-iter", "--n-samples"): "--count",
    ("--checkpoint", "--ckpt", "--ckpt-path"): "--model",
    ("--scheduler",): "--schedule or --sampler",
    ("--num-inference-steps", "--ddim-steps", "--num-steps"): "--steps",
    ("--outdir", "--output", "--output-dir", "-o"): "--out",
    ("--mask-image",): "--mask",
}
_OTHER = {"generate": "edit", "edit": "generate"}
_WORDS = {
    ("--prompt", "-p"): 'prompts stand without an option: sfumato generate "a fox"',
    ("--image", "--init-image", "--init-img", "--input"): "a picture to change stands first: sfumato edit photo.png",
    ("--lora", "--loras", "--lora-path"): "LoRA is not supported",
    ("--control", "--controlnet", "--control-net", "--controlnet-model"): "ControlNet is not supported",
    ("--embedding", "--embeddings", "--textual-inversion"): "textual inversion is not supported",
    ("--ip-adapter",): "an IP-Adapter is not supported",
    ("--refiner",): "a refiner is not supported",
}


def _right_option(name: str, context: Any) -> str:
    """Which option was meant: what other programs call so, else the nearest name."""
    folded = name.casefold().replace("_", "-") if name.startswith("--") else name
    known = ["--help", *(option for known in context.command.params for option in known.opts)]
    if folded not in known and context.command.name in _OTHER:
        for theirs, words in _WORDS.items():
            if folded in theirs and theirs[0] not in known:
                return f" ({words})"
        for theirs, ours in _OPTIONS.items():
            if folded in theirs and set(re.findall(r"--\w+", ours)) <= set(known):
                return f" (did you mean {re.sub(r'--[a-z]+', lambda found: repr(found[0]), ours)}?)"
            if folded in theirs:
                return f" (sfumato {_OTHER[context.command.name]} has {ours})"
        other = context.parent.command.commands[_OTHER[context.command.name]]
        if name in {option for known in other.params for option in known.opts}:
            return f" (sfumato {other.name} has it)"
    return nearest(name, known)


if __name__ == "__main__":
    main()
