"""Sampling methods by name. A solver's own file says what it is called; nothing else has to be touched.

Names are compared without case, spaces and punctuation, and may end in a grid's name, as A1111's once did.

>>> from sfumato.diffusion.solvers import find
>>> [find(name)[0].name for name in ("DDIM", "k_euler", "EulerDiscreteScheduler")]
['ddim', 'euler', 'euler']
>>> find("Heun Karras")[1]
'karras'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sfumato.diffusion import grid as grids
from sfumato.diffusion import names
from sfumato.diffusion.restart import restart_karras
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
        schedule: the grid that the method is made for, where it is not at home on the model's own.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    make: Callable[..., Solver[Any]]
    options: Mapping[str, Any]
    evaluations: int = 1
    stochastic: bool = False
    schedule: str | None = None

    def build(self, **options: Any) -> Solver[Any]:
        """The solver; options given here come before the method's own."""
        return self.make(**{**self.options, **options})

    @property
    def order(self) -> int:
        """Of convergence on the probability-flow ODE, as the method is without further options."""
        return self.build().order


grids.spacing("restart", "Restart")(restart_karras)

SOLVERS: dict[str, Method] = {}


def fold(name: str) -> str:
    """How names are compared: as grids' are, and k-diffusion's `sample_` goes."""
    folded = names.fold(name)
    return folded.removeprefix("sample") or folded


_NAMES = names.Names("sampler", fold)


def method(
    name: str,
    title: str,
    *aliases: str,
    evaluations: int = 1,
    stochastic: bool = False,
    schedule: str | None = None,
    **options: Any,
) -> Callable[[SolverClass], SolverClass]:
    """Class decorator: make a solver known under a name and what other programs call it.

    One class may be several methods, with different options. A name or alias that is taken raises `ValueError`, and
    nothing is registered then; the same class defined anew (by its module and name) takes its own place.
    """

    def register(cls: SolverClass) -> SolverClass:
        if name in SOLVERS:
            _NAMES.check_free(name, SOLVERS[name].make, cls)
        _NAMES.add(name, title, *aliases)
        SOLVERS[name] = Method(name, title, aliases, cls, options, evaluations, stochastic, schedule)
        return cls

    return register


def find(name: str) -> tuple[Method, str | None]:
    """The method that a name means, and the grid where the name ends in one ("DPM++ 2M Karras").

    Raises:
        UserError: for an unknown name, with the nearest one; for CFG++, which is a guidance here, and for inversion.
    """
    folded = fold(name)
    if folded == "restart":  # Heun's method on a grid that goes up again
        return SOLVERS["heun"], "restart"
    for ending, grid in [("", None), *grids.endings()]:
        found = _named(folded.removesuffix(ending)) if folded.endswith(ending) else None
        if found is not None:
            return found, grid
    if folded.startswith("ddiminver"):
        where = "a reversed grid (sfumato.diffusion.grid.reversed_ and sample with climb=True)"
        raise UserError(f"{name!r} does not draw: DDIM inversion is 'ddim' on {where}")
    if "cfgpp" in folded:
        raise UserError(f"{name!r}: {_about_cfgpp(_named(folded.replace('cfgpp', '')))}")
    written = [a for m in SOLVERS.values() for a in (*m.aliases, m.title, m.name)]
    raise UserError(f"unknown sampler {name!r}{nearest(name, written)}; known: {', '.join(sorted(SOLVERS))}")


def _named(stem: str) -> Method | None:
    """The method of a folded name that has no grid in it; diffusers' ending may lack, k-diffusion's prefix and `_gpu`
    may be added."""
    added = (stem.removesuffix("scheduler"), stem.removeprefix("k"), stem.removesuffix("gpu"))
    found = _NAMES.find(stem, f"{stem}scheduler", *added)
    return None if found is None else SOLVERS[found]


def _about_cfgpp(plain: Method | None) -> str:
    take = f"; take the sampler {plain.name!r} with it" if plain is not None else ""
    return f"CFG++ is a guidance here (sfumato.diffusion.guidance.cfg_plus_plus), not a sampler{take}"


def solver(name: str, **options: Any) -> Solver[Any]:
    """The solver of that name (any alias, in any case) with its options. Unknown names raise `UserError`."""
    return find(name)[0].build(**options)
