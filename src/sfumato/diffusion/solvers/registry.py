"""Sampling methods by name. A solver's own file says what it is called; nothing else has to be touched.

>>> from sfumato.diffusion.solvers import find
>>> [find(name)[0].name for name in ("DDIM", "k_euler", "EulerDiscreteScheduler")]
['ddim', 'euler', 'euler']
>>> find("Heun Karras")[1]
'karras'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sfumato.diffusion.grid import GRIDS
from sfumato.diffusion.solvers.base import Solver
from sfumato.errors import UserError, nearest

SolverClass = TypeVar("SolverClass", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A sampling method as users know it.

    Attributes:
        name: what is stored and printed, "dpmpp_2m".
        title: how it is written for people, "DPM++ 2M".
        aliases: what other programs call it.
        make: the solver's class. options: with which the class is this method.
        evaluations: of the network in an ordinary step.
        stochastic: whether it draws noise on the way.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    make: Callable[..., Solver[Any]]
    options: Mapping[str, Any]
    evaluations: int = 1
    stochastic: bool = False

    def build(self, **options: Any) -> Solver[Any]:
        """The solver; options given here come before the method's own."""
        return self.make(**{**self.options, **options})


SOLVERS: dict[str, Method] = {}
_BY_ALIAS: dict[str, str] = {}


def method(
    name: str, title: str, *aliases: str, evaluations: int = 1, stochastic: bool = False, **options: Any
) -> Callable[[SolverClass], SolverClass]:
    """Class decorator: make a solver known under a name and what other programs call it.

    One class may be several methods, with different options. A name or alias that is taken raises `ValueError`.
    """

    def register(cls: SolverClass) -> SolverClass:
        SOLVERS[name] = Method(name, title, aliases, cls, options, evaluations, stochastic)
        for alias in {fold(alias) for alias in (name, title, *aliases)}:
            if _BY_ALIAS.setdefault(alias, name) != name:
                raise ValueError(f"sampler name {alias!r} belongs to {_BY_ALIAS[alias]!r} already")
        return cls

    return register


def fold(name: str) -> str:
    """How names are compared: lower case, `++` as pp, without spaces and punctuation; k-diffusion's `sample_` goes."""
    folded = re.sub(r"[^a-z0-9]", "", name.casefold().replace("++", "pp"))
    return folded.removeprefix("sample") or folded


def find(name: str) -> tuple[Method, str | None]:
    """The method that a name means, and the grid where the name ends in one ("DPM++ 2M Karras").

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    folded = fold(name)
    endings: list[tuple[str, str | None]] = [("", None), *((fold(g), g) for g in GRIDS)]
    for ending, grid in endings:
        if not folded.endswith(ending):
            continue
        stem = folded.removesuffix(ending)
        for candidate in (stem, stem.removesuffix("scheduler"), stem.removeprefix("k")):
            if candidate in _BY_ALIAS:
                return SOLVERS[_BY_ALIAS[candidate]], grid
    written = [a for m in SOLVERS.values() for a in (m.name, m.title, *m.aliases)]
    raise UserError(f"unknown sampler {name!r}{nearest(name, written)}; known: {', '.join(sorted(SOLVERS))}")


def solver(name: str, **options: Any) -> Solver[Any]:
    """The solver of that name (any alias, in any case) with its options. Unknown names raise `UserError`."""
    return find(name)[0].build(**options)
