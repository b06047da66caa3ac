"""`sfumato convert`: a model in the layout of another program, or of ours.

>>> listed(("a", "b", "c"), most=2)
'a, b and 1 more'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.errors import raise_unknown

_SHOWN = 10


def convert(
    source: Annotated[str, typer.Argument(help="A name from `sfumato models ls`, a file, a run or a folder.")],
    target: Annotated[Path, typer.Argument(help="What is written; it must not exist.")],
    to: Annotated[
        str,
        typer.Option(help="diffusers (a folder), single-file (one .safetensors, CompVis' names) or sfumato (our own)."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. [as the weights are stored]")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="eps or v: what the network predicts, where nothing says it, or wrongly.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the running average of the weights that some single files keep apart.")
    ] = False,
    vae: Annotated[Path | None, typer.Option(help="Another first stage: a file, a run or a folder.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .ckpt and .bin, by a reader that builds tensors alone.")
    ] = False,
    all_names: Annotated[
        bool, typer.Option("--all-names", help="List every tensor that is left aside, not the first ten of each kind.")
    ] = False,
) -> None:
    """Write a model in another layout, bit for bit; what it does not take over is listed."""
    from sfumato.api import first_stage_of, weights_of
    from sfumato.systems.convert import check_target
    from sfumato.systems.convert import convert as run

    if prediction not in (None, "eps", "v"):
        raise_unknown("prediction", prediction, ("eps", "v"))
    check_target(target, to)
    known: Any = prediction or "unknown"
    found = weights_of(source)
    stage = first_stage_of(vae) if vae is not None else None
    done = run(
        found, target, to=to, dtype=dtype, prediction=known, averaged=ema, allow_pickle=allow_pickle, vae=stage
    )
    for note in done.notes:
        print(f"note: {note}")
    for reason, names in done.dropped.items():
        print(f"{len(names)} left aside, {reason}: {listed(names, most=len(names) if all_names else _SHOWN)}")
    print(f"{target}: {done.used} tensors")


def listed(names: Sequence[str], *, most: int) -> str:
    """Names with commas, and how many there are besides the first `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
