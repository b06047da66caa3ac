"""`sfumato info`, `sfumato models`, `sfumato doctor`: what things are.

>>> sorted(command.name for command in models_app.registered_commands)
['ls', 'show']
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.drawing import AllowPickle
from sfumato.errors import UserError, nearest

if TYPE_CHECKING:
    from sfumato.systems import Opened

models_app = typer.Typer(
    help="The models in the box.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@models_app.command("ls")
def list_models() -> None:
    """List the models that come with Sfumato."""
    from sfumato import models
    from sfumato.checkpoints.io import read_header, stored_config

    if not models.names():
        print("the box holds no model in this installation")
    for name in models.names():
        path = models.weights(name)
        config = stored_config(path, read_header(path)) or {}
        best = "  (used when no model is named)" if name == models.BEST else ""
        print(f"{name:16} {config.get('title', '')}, {path.stat().st_size / 1e6:.1f} MB{best}")


@models_app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="A name from `sfumato models ls`.")]) -> None:
    """Print a model's card: data, licence, how it was made, its figures."""
    from sfumato import models

    print(models.card(name), end="")


def info(
    file: Annotated[Path, typer.Argument(help="A model (a name or a file), a run or a picture.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Tell what a model, a run or a picture is."""
    from sfumato import models

    if str(file) not in models.names() and not file.exists():
        raise UserError(f"there is nothing at {file}{nearest(str(file), models.names())}")
    known = _of_picture(file) if file.suffix.lower() in _PICTURES else _of_model(file, allow_pickle)
    if as_json:
        print(json.dumps(known, indent=1, ensure_ascii=False))
        return
    for key, value in known.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def _of_picture(file: Path) -> dict[str, Any]:
    from sfumato.images import read_settings

    settings = read_settings(file)
    if settings is None:
        raise UserError(f"{file} carries no settings")
    return dict(settings)


def _of_model(file: Path, allow_pickle: bool) -> dict[str, Any]:
    from sfumato.api import weights_of
    from sfumato.systems import open_system
    from sfumato.training.report import records
    from sfumato.training.run import CONFIG

    known: dict[str, Any] = {}
    if file.is_dir() and (file / CONFIG).is_file():
        known["run"] = str(file)
        if found := records(file):
            known["last metrics"] = found[-1]
    opened = open_system(weights_of(file), allow_pickle=allow_pickle, dtype=None, incomplete=True)
    config = opened.system.config.model_dump(mode="json")
    parameters = sum(t.numel() for t in opened.system.tensors().values() if not t.is_meta)
    known |= {"weights": str(opened.path), "sha256": opened.sha256, "parameters": parameters}
    if opened.missing:
        known["missing"] = _missing_from(opened)
    if opened.notes:
        known["notes"] = list(opened.notes)
    if opened.file is not None:
        coverage = opened.file.coverage
        left = {reason: len(names) for reason, names in coverage.ignored.items()}
        known["tensors"] = {"used": len(coverage.matched), "left aside": left}
    return known | config


def _missing_from(opened: Opened) -> list[str]:
    """What a model lacks for drawing, in words."""
    from sfumato.systems.stable_diffusion import TITLES

    return [TITLES[part] + (": give one with --vae PATH" if part == "vae" else "") for part in opened.missing]


def doctor() -> None:
    """Check this installation and say what is found."""
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    from sfumato import __version__, models
    from sfumato.backends.devices import default_device, native_bfloat16
    from sfumato.systems import open_system

    print(f"sfumato {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, computes on {default_device()}")
    bfloat16 = "runs natively" if native_bfloat16(torch.device("cpu")) else "is emulated, so float32 is faster"
    print(f"CPU: {torch.backends.cpu.get_cpu_capability()}; bfloat16 {bfloat16}")
    if importlib.util.find_spec("torchvision") is not None:
        print("torchvision is installed: Sfumato does not need it, and a build that does not match torch breaks others")
    for package in ("accelerate", "pyarrow", "efficientnet-lite-pytorch", "openvino"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed (optional)")
    for name in models.names():
        opened = open_system(models.weights(name))
        print(f"model {name}: sound ({opened.sha256[:10]})")
