"""`sfumato replay`: a picture again, from its own file.

>>> replay.__name__
'replay'
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.drawing import AllowPickle
from sfumato.errors import UserError


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
    again = replaying.replay(picture, model, vae=vae, pictures=pictures, allow_pickle=allow_pickle)
    images.save_picture(again.picture, out, overwrite=overwrite)
    for difference in again.differences:
        print(f"differs: {difference}")
    same = not again.differences and picture.suffix == out.suffix and picture.read_bytes() == out.read_bytes()
    print(f"{out}: {'the same bytes' if same else 'the nearest picture'}")
