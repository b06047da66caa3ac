"""`sfumato generate`: draw new pictures.

>>> generate.__name__
'generate'
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
from sfumato.cli.options import number, seed_number, whole

Hires = Annotated[
    float | None, typer.Option(parser=number(1), metavar="X", help="Enlarge by X and draw over it once more.")
]
HiresStrength = Annotated[
    float | None,
    typer.Option(parser=number(0), metavar="S", help="How far the second pass forgets the first, 0 to 1. [0.5]"),
]


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw, for models that read text.")] = None,
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
    width: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="In pixels.")] = None,
    dialect: Dialect = None,
    clip_skip: ClipSkip = None,
    variation: Annotated[
        int | None, typer.Option(parser=seed_number, metavar="SEED", help="A second seed to turn the noise to.")
    ] = None,
    variation_strength: Annotated[
        float | None, typer.Option(parser=number(0), metavar="S", help="How far it is turned, 0 to 1. [0.1]")
    ] = None,
    towards: Annotated[
        str | None, typer.Option(help="A second prompt: the --count pictures lead from the first to it.")
    ] = None,
    towards_seed: Annotated[
        int | None, typer.Option(parser=seed_number, metavar="N", help="The same for a second seed.")
    ] = None,
    hires: Hires = None,
    hires_strength: HiresStrength = None,
    fast: Fast = None,
    layout: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Labelled boxes, for models that read layouts.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option("--map", metavar="FILE.png", help="A class for every pixel, for models that read it.")
    ] = None,
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
    """Draw new pictures."""
    texts, same = drawing.prompts(prompt, prompts), towards is not None or towards_seed is not None
    where = Destination(out, count * max(1, len(texts)), sheet, overwrite, same, count if same_seed else None)
    where.check(seed, previews, {"map": classes, "layout": layout})
    span = drawing.interval(guidance_interval)
    opened = drawing.opened(
        model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, allow_pickle=allow_pickle,
        tiles=tiles, backend=backend, offload=offload,
    )  # fmt: skip
    first = drawing.first_seed(seed, as_json)
    options: dict[str, Any] = {
        "count": count, "same_seed": same_seed, "steps": steps, "sampler": sampler, "schedule": schedule,
        "guidance": guidance, "guidance_rescale": guidance_rescale, "guidance_interval": span, "negative": negative,
        "perp_neg": perp_neg, "label": label, "width": width, "height": height, "dialect": dialect,
        "clip_skip": clip_skip, "variation": variation, "variation_strength": variation_strength, "towards": towards,
        "towards_seed": towards_seed, "hires": hires, "hires_strength": hires_strength, "fast": fast,
        "layout": layout, "map": classes,
    }  # fmt: skip
    drawing.tell_notes(opened.remarks(sampler))
    draw = partial(opened.generate, texts or None, seed=first, **options)
    drawing.make(draw, opened, where, first, as_json, previews)
