"""The lists that the solvers' tests run over: a new solver joins here and gets all of them."""

from __future__ import annotations

from typing import Any

from sfumato.diffusion.solvers import Ancestral, Churn, Euler, Heun, Solver

DETERMINISTIC: dict[str, Solver[Any]] = {
    "euler (ddim)": Euler(),
    "heun": Heun(),
}

STOCHASTIC: dict[str, Solver[Any]] = {
    "ddpm small": Ancestral(),
    "ddpm large": Ancestral(variance="large"),
    "ddim eta 0.5": Euler(eta=0.5),
    "ddim eta 1": Euler(eta=1.0),
    "euler churn": Euler(churn=Churn(10.0)),
}
