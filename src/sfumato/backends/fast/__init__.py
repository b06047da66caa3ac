"""Lossy savings: pictures that are nearly the same for less work, each saving by its name and all of them by levels.

Four things are saved: guidance outside of an interval of noise, guidance in some of the evaluations, the deep part of
a UNet in some of the evaluations (`caching`), and tokens of self-attention that say nearly the same (`merging`). The
first two are sampling's affair (`diffusion.guidance`); the other two are put on a network for as long as pictures are
drawn, with `applied`, and leave it as it was.

>>> level(2).cache_every
2
>>> FastSettings.restored(level(3).stored()) == level(3)
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from sfumato.backends.fast.caching import cached, check_depth
from sfumato.backends.fast.merging import MOST, check_merging, merged
from sfumato.errors import UserError


@dataclass(frozen=True)
class FastSettings:
    """Which savings are made. As it stands, none.

    Attributes:
        interval: noise-to-signal ratios (low, high) within which guidance acts; outside, the null branch is not
            evaluated, which halves the work there (Kynkaanniemi 2024). None for all ratios.
        guidance_every: the null branch is evaluated in every so-many-th guided evaluation; between, the difference of
            both branches is the last one (Lv 2024, CFG-Cache). 1 for all.
        cache_every: the deep part of the UNet is evaluated in every so-many-th evaluation; between, its features are
            the last ones (Ma 2023, DeepCache). 1 for all.
        cache_depth: how many of the outermost skip connections are always evaluated, at least 1: what lies within them
            is the deep part.
        merge: in [0, 0.75), the share of tokens that are merged with others before the self-attentions of the largest
            resolution that has transformers (Bolya 2023).
    """

    interval: tuple[float, float] | None = None
    guidance_every: int = 1
    cache_every: int = 1
    cache_depth: int = 1
    merge: float = 0.0

    def __post_init__(self) -> None:
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] < math.inf:
            raise UserError(
                f"the interval of guidance must be two finite, rising noise-to-signal ratios, got {self.interval}"
            )
        for name in ("guidance_every", "cache_every", "cache_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.merge < MOST:
            raise UserError(f"merge must lie in [0, {MOST:g}), got {self.merge:g}")
        if self.cache_depth > 1 and self.cache_every == 1:
            raise UserError(f"cache_depth {self.cache_depth} does nothing without a cache_every above 1")

    @property
    def guides_less(self) -> bool:
        """Whether it saves some of guidance."""
        return self.interval is not None or self.guidance_every > 1

    @property
    def changes_network(self) -> bool:
        """Whether it saves within the network."""
        return self.cache_every > 1 or self.merge > 0

    def __bool__(self) -> bool:
        """Whether anything is saved."""
        return self.guides_less or self.changes_network

    def stored(self) -> dict[str, Any]:
        """As JSON: what is not at its default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return values | ({"interval": list(self.interval)} if self.interval is not None else {})

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> FastSettings:
        """From `stored`, with or without the `level` that it came from; an unknown key raises `TypeError`."""
        low_high = values.get("interval")
        interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        return cls(**{name: value for name, value in values.items() if name != "level"} | {"interval": interval})


INTERVAL = (0.28, 1e6)
"""The levels guide from the noisiest step on, down to the lower end that Kynkaanniemi (2024) found for SD-XL. The
upper end found there, 5.42, leaves what a picture becomes to chance: another picture comes out."""

LEVELS: dict[int, FastSettings] = {
    1: FastSettings(cache_every=2),
    2: FastSettings(interval=INTERVAL, guidance_every=2, cache_every=2),
    3: FastSettings(interval=INTERVAL, guidance_every=3, cache_every=3, merge=0.5),
}
"""The levels, mildest first."""


def level(number: int) -> FastSettings:
    """The savings of a level. Raises `UserError` for one that does not exist."""
    if isinstance(number, bool) or number not in LEVELS:
        raise UserError(f"there is no level {number!r} of savings; there are {', '.join(map(str, LEVELS))}")
    return LEVELS[number]


def check(network: nn.Module, settings: FastSettings) -> None:
    """Refuse, with a `UserError`, what cannot be saved within this network."""
    if settings.cache_every > 1:
        check_depth(network, settings.cache_depth)
    if settings.merge > 0:
        check_merging(network)


@contextmanager
def applied(network: nn.Module, settings: FastSettings) -> Iterator[None]:
    """Make a network save while pictures are drawn, one batch of them: what is kept from one evaluation for the next
    begins anew here, and afterwards the network is as it was.

    The network itself is changed for that time, so it must not be drawn with elsewhere meanwhile.

    Raises:
        UserError: as `check`.
    """
    check(network, settings)
    with ExitStack() as stack:
        if settings.merge > 0:
            stack.enter_context(merged(network, settings.merge))
        if settings.cache_every > 1:
            stack.enter_context(cached(network, settings.cache_every, settings.cache_depth))
        yield
