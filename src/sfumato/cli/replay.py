"""`sfumato replay`: a picture again, from its own file.

>>> replay.__name__
'replay'
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import drawing
from sfumato.cli.drawing import AllowPickle
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.replay import Replayed


def replay(
    picture: Annotated[Path, typer.Argument(help="A picture drawn by Sfumato.")],
    out: Annotated[Path, typer.Option(help="Where the regenerated picture goes.")],
    model: Annotated[str | None, typer.Option(help="Where its model is, if it is not found by itself.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Where its other first stage is, if it had one.")] = None,
    original: Annotated[Path | None, typer.Option(help="Where the picture is that was edited.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where the mask is that it was edited with.")] = None,
    depth: Annotated[Path | None, typer.Option(help="Where its map of depths is.")] = None,
    classes: Annotated[Path | None, typer.Option("--map", help="Where the map of classes is.")] = None,
    allow_pickle: AllowPickle = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Regenerate a picture from the settings it carries; on the same machine the same bytes."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; choose another --out, or add --overwrite")
    from sfumato import images
    from sfumato import replay as replaying

    given = {"picture": original, "mask": mask, "depth": depth, "map": classes}
    pictures = {name: place for name, place in given.items() if place is not None}
    drawing.refuse_inputs([out], {"original" if name == "picture" else name: p for name, p in pictures.items()})
    before = picture.read_bytes() if picture.is_file() else b""  # which --out may replace
    again = replaying.replay(picture, model, vae=vae, pictures=pictures, allow_pickle=allow_pickle)
    images.save_picture(again.picture, out, overwrite=overwrite)
    for difference in again.differences:
        print(f"differs: {difference}")
    print(f"{out}: {_verdict(picture, before, out, again)}")


def _verdict(picture: Path, before: bytes, out: Path, again: Replayed) -> str:
    """How near the new file is to what the old one held, and why no nearer where nothing known differs."""
    if out.read_bytes() == before:
        return "the same bytes"
    if again.same_pixels:
        jpeg = [path.suffix.lower() in (".jpg", ".jpeg") for path in (picture, out)]
        return "the same picture, but for the loss of JPEG" if jpeg[0] != jpeg[1] else "the same pixels"
    if again.differences:
        return "the nearest picture"
    return (
        "the nearest picture; its pixels differ although nothing known does, so the settings were edited, or it was "
        "drawn with code that settings do not hold"
    )
