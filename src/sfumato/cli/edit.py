"""`sfumato edit`: change a picture.

>>> edit.__name__
'edit'
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import drawing
from sfumato.cli.drawing import (
    AllowPickle,
    AsJson,
    Backend,
    ClipSkip,
    Count,
    Destination,
    Device,
    Dialect,
    Dtype,
    Ema,
    Fast,
    GuidanceScale,
    Interval,
    Label,
    ModelName,
    Negative,
    Offload,
    Out,
    Overwrite,
    PerpNeg,
    Predicts,
    Previews,
    Prompts,
    Rescale,
    SameSeed,
    Sampler,
    Schedule,
    Seed,
    Sheet,
    Steps,
    Tiles,
    Vae,
)
from sfumato.cli.options import number, whole
from sfumato.models import BY, ENLARGES, names


def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to change.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="What it, or the mask's inside, should become.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture of the same size; white is redrawn.")] = None,
    box: Annotated[str | None, typer.Option(metavar="X,Y,W,H", help="A box that is redrawn, in pixels.")] = None,
    outpaint: Annotated[
        str | None, typer.Option(metavar="L,T,R,B", help="Pixels to add on the left, top, right and bottom.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(parser=number(0), metavar="S", help="How far it is forgotten, 0 to 1. [0.8; mask 1]")
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="Its map of depths, near is bright, for models that follow one.")
    ] = None,
    upscale: Annotated[
        float | None,
        typer.Option(parser=number(1), metavar="X", help="Enlarge by X; a model of pictures draws over it then."),
    ] = None,
    noise_level: Annotated[
        int | None, typer.Option(parser=whole(0), metavar="N", help="Noise on a small picture, for upscalers. [20]")
    ] = None,
    model: ModelName = None,
    seed: Seed = None,
    count: Count = 1,
    same_seed: SameSeed = False,
    prompts: Prompts = None,
    steps: Steps = None,
    sampler: Sampler = None,
    schedule: Schedule = None,
    guidance: GuidanceScale = None,
    guidance_rescale: Rescale = 0.0,
    guidance_interval: Interval = None,
    negative: Negative = None,
    perp_neg: PerpNeg = None,
    label: Label = None,
    dialect: Dialect = None,
    clip_skip: ClipSkip = None,
    fast: Fast = None,
    vae: Vae = None,
    prediction: Predicts = None,
    ema: Ema = False,
    allow_pickle: AllowPickle = False,
    tiles: Tiles = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    offload: Offload = "auto",
    previews: Previews = None,
    out: Out = Path(),
    sheet: Sheet = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Change a picture: towards a prompt, within a mask or a box, beyond its border, or larger."""
    texts = drawing.prompts(prompt, prompts)
    where = Destination(out, count * max(1, len(texts)), sheet, overwrite, each=count if same_seed else None)
    where.check(seed, previews, {"picture": picture, "mask": mask, "map of depths": depth})
    options: dict[str, Any] = {
        "mask": mask, "box": drawing.numbers(box, "--box", "X,Y,W,H"),
        "outpaint": drawing.numbers(outpaint, "--outpaint", "L,T,R,B"), "strength": strength, "depth": depth,
        "upscale": upscale, "noise_level": noise_level, "count": count, "same_seed": same_seed, "steps": steps,
        "sampler": sampler, "schedule": schedule, "guidance": guidance, "guidance_rescale": guidance_rescale,
        "guidance_interval": drawing.interval(guidance_interval), "negative": negative, "perp_neg": perp_neg,
        "label": label, "dialect": dialect, "clip_skip": clip_skip, "fast": fast,
    }  # fmt: skip
    notes = _check_pictures(picture, options, out)
    if model is None and not texts and _only_enlarges(options):
        model = ENLARGES
    opened = drawing.opened(
        model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, allow_pickle=allow_pickle,
        tiles=tiles, backend=backend, offload=offload,
    )  # fmt: skip
    first = drawing.first_seed(seed, as_json)
    drawing.tell_notes([*notes, *opened.remarks(sampler)])
    draw = partial(opened.edit, picture, texts or None, seed=first, **options)
    drawing.make(draw, opened, where, first, as_json, previews)


def _check_pictures(picture: Path, options: dict[str, Any], out: Path) -> list[str]:
    """Refuse pictures that cannot be read or do not fit each other before the model is opened, and tell what a user
    should know of the result."""
    from sfumato.tasks.original import Original

    original = Original.of(picture, **{name: options[name] for name in ("mask", "box", "outpaint", "depth")})
    if original.mask is None or out.suffix.lower() not in (".jpg", ".jpeg"):
        return original.remarks()
    less = "is not exact" if original.clear is None else "is not exact and has no transparency"
    return [f"JPEG {less}, so pixels outside of what is redrawn change as well; .png and .webp keep them as they are"]


def _only_enlarges(options: dict[str, Any]) -> bool:
    """Whether all that is asked is a picture as many times larger as the box's model for that makes it."""
    about = ("mask", "box", "outpaint", "strength", "depth", "noise_level", "negative", "label", "guidance", "dialect")
    return options["upscale"] == BY and all(options[name] is None for name in about) and ENLARGES in names()
