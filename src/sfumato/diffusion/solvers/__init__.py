"""Sampling methods by name. Adding one is one class in this folder and one line here.

>>> solver("DDIM")
Euler(eta=0.0, churn=Churn(amount=0.0, low=0.0, high=inf, noise=1.0), order=1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfumato.diffusion.solvers.ancestral import Ancestral
from sfumato.diffusion.solvers.base import Solver
from sfumato.diffusion.solvers.euler import Churn, Euler
from sfumato.diffusion.solvers.heun import Heun
from sfumato.errors import raise_unknown

SOLVERS: dict[str, Callable[..., Solver[Any]]] = {
    "ddpm": Ancestral,
    "ddim": Euler,
    "euler": Euler,
    "heun": Heun,
}


def solver(name: str, **options: Any) -> Solver[Any]:
    """The solver of that name (case does not matter) with its options. Unknown names raise `UserError`."""
    folded = name.casefold().strip()
    if folded not in SOLVERS:
        raise_unknown("sampler", name, SOLVERS)
    return SOLVERS[folded](**options)


__all__ = ["SOLVERS", "Ancestral", "Churn", "Euler", "Heun", "Solver", "solver"]
