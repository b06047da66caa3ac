"""Which lossy savings do something for a model and a way of drawing, so that none is passed over in silence.

>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 2,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> wanted = FastSettings(interval=(0.1, 2), cache_every=2)
>>> found, notes = fitted(model, wanted, *planned(model, None, None, 4), guided=False, told="level 9")
>>> found == FastSettings(cache_every=2), notes
(True, ['of level 9 interval does nothing here: guidance is off'])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sfumato.backends.fast import FastSettings
from sfumato.backends.fast.caching import FIRST, check_depth
from sfumato.backends.fast.merging import check_merging
from sfumato.diffusion.grid import Grid
from sfumato.diffusion.solvers import Solver
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive
from sfumato.errors import UserError
from sfumato.systems import Drawing
from sfumato.tasks.draw import planned

__all__ = ["fitted", "planned"]

_OFF: dict[str, dict[str, Any]] = {
    "interval": {"interval": None},
    "guidance_every": {"guidance_every": 1},
    "cache_every": {"cache_every": 1, "cache_depth": 1},
    "merge": {"merge": 0.0},
}
"""The savings, and what each is when it is off."""


def fitted(
    model: Drawing, wanted: FastSettings, method: Solver[Any], levels: Grid, *, guided: bool, told: str | None
) -> tuple[FastSettings, list[str]]:
    """What of the savings does something, and a sentence for each that does not.

    Args:
        method, levels: how it will be drawn.
        guided: whether there is guidance.
        told: what the savings are called together; those of them that do nothing are then left out. None where each was
            asked for by itself: then they are refused.

    Raises:
        UserError: for a saving that does nothing and was asked for by itself, or where all of them do nothing.
    """
    if not wanted:
        raise UserError(f"{told or 'fast'} saves nothing that is left to save; leave it out")
    notes = []
    for name, why in _idle(model, wanted, method, levels, guided):
        if told is None:
            raise UserError(f"{name} does nothing here: {why}; leave it out")
        notes.append(f"of {told} {name} does nothing here: {why}")
        wanted = replace(wanted, **_OFF[name])
    if not wanted:
        raise UserError("; ".join(notes) + "; leave it out")
    return wanted, notes


def _idle(
    model: Drawing, wanted: FastSettings, method: Solver[Any], levels: Grid, guided: bool
) -> Iterator[tuple[str, str]]:
    """The savings that do nothing, each with the reason."""
    steps = float("inf") if isinstance(method, DPMAdaptive) else len(levels) - 1
    low, high = wanted.interval or (0.0, 0.0)
    if wanted.interval is not None and not guided:
        yield "interval", "guidance is off"
    elif wanted.interval is not None and all(low <= one.nsr <= high for one in levels[:-1]):
        yield "interval", "every step lies within it"
    if wanted.guidance_every > 1 and (steps <= 1 or not guided):
        yield "guidance_every", "guidance is off" if not guided else "there is one step only"
    network = model.denoiser.network
    if wanted.cache_every > 1 and (why := _refused(check_depth, network, wanted.cache_depth)):
        yield "cache_every", why
    elif wanted.cache_every > 1 and steps <= FIRST:
        yield "cache_every", f"there are too few steps, the first {FIRST} are never saved on"
    if wanted.merge > 0 and (why := _refused(check_merging, network)):
        yield "merge", why


def _refused(check: Any, *arguments: Any) -> str:
    """What a check says against its arguments; nothing where it lets them pass."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""
