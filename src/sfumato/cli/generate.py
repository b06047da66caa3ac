"""`sfumato generate`: draw pictures. `sfumato edit` is reserved.

>>> picture_path(Path("out"), 7).as_posix()
'out/7.png'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.options import number, whole
from sfumato.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from sfumato.api import Model

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw, for models that read text.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A name from `sfumato models ls`, a file, a run or a folder. [best in the box]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(parser=whole(0), metavar="N", help="Of the first picture; picture i has seed + i.")
    ] = None,
    count: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures (of each prompt).")] = 1,
    steps: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="N", help="Sampling steps. [the model's own]")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="One of `sfumato samplers`, by any of its names. [the model's own]")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Spacing of steps, one of `sfumato schedules`. [the sampler's or model's own]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(parser=number(0), metavar="W", help="Classifier-free guidance; 1 is off.")
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(parser=number(0), metavar="PHI", help="Pull the spread of guided outputs back, 0 to 1.")
    ] = 0.0,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Noise-to-signal ratios between which guidance acts.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw, for models that read text.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A class of the model (see `sfumato info`); several are taken in turn; all for every one."),
    ] = None,
    width: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="In pixels.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    out: Annotated[
        Path, typer.Option(help="FILE.png for one picture or a sheet; a folder takes <seed>.png.")
    ] = Path(),
    sheet: Annotated[bool, typer.Option("--sheet", help="One contact sheet of all pictures.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Describe what was made as JSON.")] = False,
) -> None:
    """Draw new pictures."""
    total = count * max(1, len(prompt or []))
    single = out.suffix.lower() in _SUFFIXES
    _check_out(out, single, total, sheet, overwrite)
    from sfumato import api

    opened = api.load(model, device=device, dtype=dtype)
    first = _first_seed(seed)
    if seed is None and not as_json:
        print(f"seed {first}")
    paths = [] if single else [picture_path(out, first + i) for i in range(total)]
    if sheet:
        paths = [out if single else out / f"sheet-{first}.png"]
    elif single:
        paths = [out]
    if not overwrite:
        _refuse_existing(paths)
    options: dict[str, Any] = {
        "count": count, "steps": steps, "sampler": sampler, "schedule": schedule, "guidance": guidance,
        "guidance_rescale": guidance_rescale, "guidance_interval": _interval(guidance_interval), "negative": negative,
        "label": label, "width": width, "height": height,
    }  # fmt: skip
    for remark in opened.remarks(sampler):
        print(f"note: {remark}", file=sys.stderr)
    visited = opened.steps(steps, sampler, schedule) * -(-total // 16)
    with _progress(visited) as advance, _overflow_explained():
        pictures = opened.generate(prompt or None, seed=first, on_step=advance, **options)
    with _folder(paths[0].parent):
        _save(pictures, paths, sheet, overwrite, opened)
    _tell(pictures, paths, as_json)


def picture_path(folder: Path, seed: int) -> Path:
    """Where the picture of that seed goes in a folder."""
    return folder / f"{seed}.png"


def _interval(text: str | None) -> tuple[float, float] | None:
    """Two numbers with a comma between them."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--guidance-interval takes two numbers, LOW,HIGH; got {text!r}") from None
    return low, high


def _first_seed(seed: int | None) -> int:
    import secrets

    return secrets.randbelow(2**32) if seed is None else seed


def _check_out(out: Path, single: bool, total: int, sheet: bool, overwrite: bool) -> None:
    """Refuse an impossible destination before anything is loaded."""
    if out.suffix and not single and not out.is_dir():
        raise UserError(f"{out}: pictures are written as {', '.join(_SUFFIXES)}; without an ending it is a folder")
    if single and total > 1 and not sheet:
        raise UserError(f"{out} takes one picture, but {total} were asked for; name a folder, or add --sheet")
    if single and not overwrite:
        _refuse_existing([out])
    folder = out.parent if single else out
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder")


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --out, or add --overwrite")


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder for what follows; if that fails, the folders made here are removed again where they are empty."""
    from sfumato.checkpoints.io import explain_os_error

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"could not write to {folder}: {explain_os_error(error)}") from None
        raise


@contextmanager
def _overflow_explained() -> Iterator[None]:
    """A model whose result is no picture is not the user's error: one sentence and exit code 3."""
    from sfumato.images import PictureError

    try:
        yield
    except PictureError as error:
        print(f"sfumato: {error}", file=sys.stderr)
        raise typer.Exit(3) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., Any]]:
    """A hook for the sampling loop that shows a bar on a terminal and a line at the end elsewhere."""
    done = 0
    if not sys.stderr.isatty():

        def quiet(x: Any, level: Any, prediction: Any, noise: Any) -> Any:
            nonlocal done
            done += prediction is not None
            if prediction is not None and (done == total or done % max(1, total // 5) == 0):
                print(f"step {done}/{total}", file=sys.stderr, flush=True)
            return x

        yield quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=total)

        def show(x: Any, level: Any, prediction: Any, noise: Any) -> Any:
            if prediction is not None:
                bar.advance(task)
            return x

        yield show


def _save(pictures: list[Image.Image], paths: list[Path], sheet: bool, overwrite: bool, opened: Model) -> None:
    from sfumato import images

    if not sheet:
        for picture, path in zip(pictures, paths, strict=True):
            images.save_picture(picture, path, overwrite=overwrite)
        return
    first = dict(pictures[0].info["sfumato"])
    first.pop("batch")
    settings = first | {"sheet": [p.info["sfumato"]["seed"] for p in pictures]}
    said = [p.info["sfumato"].get("prompt") for p in pictures]
    labels = [text or "" for text in said] if any(said) else None
    whole = images.sheet(pictures, labels=labels, scale=max(1, 96 // opened.system.config.size))
    images.save_picture(whole, paths[0], settings, overwrite=overwrite)


def _tell(pictures: list[Image.Image], paths: list[Path], as_json: bool) -> None:
    if as_json:
        settings = [dict(p.info["sfumato"]) for p in pictures]
        print(json.dumps({"files": [str(p) for p in paths], "pictures": settings}, indent=1, ensure_ascii=False))
        return
    for path in paths:
        print(path)


def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to change.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="What it should become.")] = None,
) -> None:
    """Change a picture (not in this version)."""
    raise UserError("editing pictures is not in this version of Sfumato; `sfumato generate` draws new ones")
