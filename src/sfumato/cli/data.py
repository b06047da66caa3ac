"""`sfumato data prepare|check|stats`: what models are trained on.

>>> sorted(command.name for command in data_app.registered_commands)
['check', 'prepare', 'stats']
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli.options import whole
from sfumato.errors import UserError, raise_unknown

if TYPE_CHECKING:
    from sfumato.training.emoji import Built

data_app = typer.Typer(
    help="What models are trained on.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@data_app.command("prepare")
def prepare_data(
    name: Annotated[str, typer.Argument(help="What to build: emoji or shapes.")],
    out: Annotated[Path, typer.Argument(help="The folder it is written into.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Of emoji: folder with the packages, unpacked or as downloaded. [fetch by npm]"),
    ] = None,
    count: Annotated[
        int | None, typer.Option(parser=whole(2), metavar="N", help="Of shapes: how many pictures. [4000]")
    ] = None,
    size: Annotated[
        int | None, typer.Option(parser=whole(16), metavar="N", help="Of shapes: pixels of a side. [32]")
    ] = None,
    seed: Annotated[int | None, typer.Option(parser=whole(0), metavar="N", help="Of shapes: which set. [0]")] = None,
) -> None:
    """Build a data set: captioned emoji of 64x64 pixels in five styles from published packages; or synthetic scenes of
    coloured shapes with captions, boxes and maps."""
    if name not in ("emoji", "shapes"):
        raise_unknown("data set", name, ["emoji", "shapes"])
    drawn = {key: value for key, value in (("count", count), ("size", size), ("seed", seed)) if value is not None}
    if name == "shapes":
        from sfumato.training import shapes

        if source is not None:
            raise UserError("shapes are drawn here and come from no packages; leave --from out")
        train, validation = shapes.prepare(out, **drawn, on_progress=_progress("drawn"))
        print(f"{out}: {train} for training, {validation} for validation")
        return
    from sfumato.training import emoji

    if drawn:
        raise UserError(f"--{next(iter(drawn))} belongs to shapes; leave it out")
    _tell(emoji.prepare(out, source, _progress("drawn")))


def _tell(built: Built) -> None:
    for style in dict.fromkeys(style for style, _ in built.rows):
        train, validation = built.rows[style, "train"], built.rows[style, "validation"]
        print(f"{style:12} {train:5} for training, {validation:4} for validation")
    for absent in built.absent:
        print(f"{absent.name:12} not built: {absent.package.name} {absent.package.version} was not found")
    for what, left_out in (("not in the packages", built.missing), ("equal to another one", built.duplicates)):
        if left_out:
            shown = ", ".join(f"{code} ({style})" for code, style in left_out[:5])
            print(f"left out, {what}: {len(left_out)}: {shown}{' …' if len(left_out) > 5 else ''}")
    print(f"{built.path}: {built.rows.total()} pictures")


@data_app.command("check")
def check_data(
    path: Annotated[str, typer.Argument(help="Folder of pictures, or a parquet file.")],
    size: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="N", help="Also list pictures smaller than this.")
    ] = None,
) -> None:
    """Open every picture as training would, and list those that cannot be used; exit code 1 if there are any."""
    from sfumato.training.statistics import find_bad, open_all

    pictures = open_all(path, size)
    bad = find_bad(pictures, _progress("checked"))
    for picture in bad:
        print(f"{picture.key}: {picture.reason}")
    if bad:
        print(f"{len(bad)} of {len(pictures)} pictures cannot be used")
        raise typer.Exit(1)
    print(f"all {len(pictures)} pictures are sound")


@data_app.command("stats")
def data_statistics(
    path: Annotated[str, typer.Argument(help="Folder of pictures, or a parquet file.")],
    out: Annotated[Path | None, typer.Option(help="FILE.png for a contact sheet.")] = None,
) -> None:
    """Tell what a data set holds: sizes, classes, captions, near-duplicates."""
    if out is not None:
        _check_sheet(out)
    from sfumato.images import save_picture
    from sfumato.training.statistics import contact_sheet, describe, open_all, report

    pictures = open_all(path, caption=None)
    for line in report(describe(pictures, _progress("read"))):
        print(line)
    if out is not None:
        save_picture(contact_sheet(pictures), out, {})
        print(out)


def _check_sheet(out: Path) -> None:
    """Refuse an impossible place for the contact sheet before any picture is read."""
    from sfumato.images import FORMATS

    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: a contact sheet is written as {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} into")


def _progress(done_word: str) -> Callable[[int, int], None]:
    """A hook that says on stderr, about ten times in all, how far a long task is; a short one says nothing."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if total >= 1000 and done * 10 // total > told:
            told = done * 10 // total
            print(f"{done_word} {done}/{total}", file=sys.stderr, flush=True)

    return tell
