"""Sampling methods: one class each. Every module of this folder is imported, and with it registered.

>>> solver("DDIM")
Euler(eta=0.0, churn=Churn(amount=0.0, low=0.0, high=inf, noise=1.0), variance='own', order=1)
"""

from __future__ import annotations

import importlib
import pkgutil

from sfumato.diffusion.solvers.ancestral import Ancestral
from sfumato.diffusion.solvers.base import Solver
from sfumato.diffusion.solvers.euler import Churn, Euler
from sfumato.diffusion.solvers.heun import Heun
from sfumato.diffusion.solvers.registry import SOLVERS, Method, find, method, solver

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SOLVERS", "Ancestral", "Churn", "Euler", "Heun", "Method", "Solver", "find", "method", "solver"]
