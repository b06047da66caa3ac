"""What the network regresses: `out = a * x0 + b * eps`, two coefficients per noise level.

Together with `x_t = alpha * x0 + sigma * eps` that is a 2x2 system, so one inversion serves them all. A new
parameterization is one line and gets training target and sampling for free.

>>> import torch
>>> from sfumato.diffusion.level import NoiseLevel
>>> level, x0, eps = NoiseLevel.of(0, 0.6, 0.8), torch.ones(1, 2), torch.full((1, 2), 0.5)
>>> found, _ = V.solve(V.target(x0, eps, level), level.noise(x0, eps), level)
>>> bool(torch.allclose(found, x0))
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, Number, mix
from sfumato.errors import raise_unknown

Coefficients = tuple[Number, Number]


@dataclass(frozen=True)
class Parameterization:
    """A linear combination of clean signal and noise that the network is trained to output.

    Attributes:
        name: how configs call it.
        of: `(alpha, sigma) -> (a, b)`, plain numbers or float64 tensors alike.
    """

    name: str
    of: Callable[[Number, Number], Coefficients]

    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """`(a, b)`: plain numbers for one level, float64 of its shape for many."""
        return self.of(*level.numbers)

    def determinant(self, level: NoiseLevel) -> Number:
        """`D = alpha * b - sigma * a`: where it is 0 the output does not determine `x0` and `eps`."""
        (a, b), (alpha, sigma) = self.coefficients(level), level.numbers
        return alpha * b - sigma * a

    def target(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """`a * x0 + b * eps`. Shapes (B, …)."""
        a, b = self.coefficients(level)
        return mix(a, x0, b, eps)

    def solve(self, out: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Invert: `x0 = (b x_t - sigma out) / D`, `eps = (alpha out - a x_t) / D`. Shapes (B, …).

        At a clean level (`sigma = 0`) where the output holds no noise, `eps` is 0 by definition.

        Raises:
            ValueError: at a noisy level where the output says nothing about `x0` (of eps, pure noise: `alpha = 0`).
        """
        (a, b), (alpha, sigma), d = self.coefficients(level), level.numbers, self.determinant(level)
        if bool(d.all()) if isinstance(d, Tensor) else d != 0:
            eps = mix(-a / d, x_t, alpha / d, out)
            if isinstance(d, Tensor) or a != 0:
                return mix(b / d, x_t, -sigma / d, out), eps
            return mix(b, x_t, -sigma, out) / d, eps  # dividing last keeps `x_t - sigma eps` as exact as it is
        return self._solve_where_singular(out, x_t, level)

    def _solve_where_singular(self, out: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """`solve` where some level has `D = 0`: a clean one; any other is refused."""
        ones = torch.ones_like(level.alpha)
        (a, b), alpha, sigma, d = self.coefficients(level), level.alpha, level.sigma, self.determinant(level) * ones
        clean = d == 0
        if bool((clean & (alpha == 0)).any()):
            raise ValueError(f"'{self.name}' prediction cannot recover x0 where alpha = 0 (zero terminal SNR)")
        if bool((clean & (sigma != 0)).any()):
            raise ValueError(f"'{self.name}' prediction cannot recover x0 where alpha b = sigma a, at a noisy level")
        d = torch.where(clean, 1.0, d)
        from_out = torch.where(clean, torch.where(a * ones == 0, 0.0, 1 / (a * ones)), -sigma / d)
        x0 = mix(b / d, x_t, from_out, out)
        return x0, mix(torch.where(clean, 0.0, -a / d), x_t, torch.where(clean, 0.0, alpha / d), out)


def _edm(sigma_data: float) -> Callable[[Number, Number], Coefficients]:
    def coefficients(alpha: Number, sigma: Number) -> Coefficients:
        norm = (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5
        return sigma / (sigma_data * norm), -alpha * sigma_data / norm

    return coefficients


EPS = Parameterization("eps", lambda alpha, sigma: (0.0, 1.0))
"""The noise (Ho 2020). Singular at alpha = 0."""

X0 = Parameterization("x0", lambda alpha, sigma: (1.0, 0.0))
"""The clean signal. At sigma = 0 `eps` is taken as 0."""

V = Parameterization("v", lambda alpha, sigma: (-sigma, alpha))
"""`v = alpha eps - sigma x0` (Salimans 2022)."""

FLOW = Parameterization("flow", lambda alpha, sigma: (-1.0, 1.0))
"""The velocity `eps - x0` of the straight path (Liu 2022; Esser 2024)."""


def edm(sigma_data: float = 0.5) -> Parameterization:
    """EDM's `F`, `D(x) = c_skip x + c_out F` (Karras 2022, eq. 7 and table 1), written for any (alpha, sigma) path.

    Args:
        sigma_data: standard deviation of the data, > 0. With 1 on a variance-preserving path it is `-V`.
    """
    if sigma_data <= 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    return Parameterization("edm", _edm(sigma_data))


PARAMETERIZATIONS: dict[str, Parameterization] = {p.name: p for p in (EPS, X0, V, FLOW)}


def parameterization(name: str, *, sigma_data: float = 0.5) -> Parameterization:
    """The parameterization of that name: eps, x0, v, flow or edm. Unknown names raise `UserError`."""
    if name == "edm":
        return edm(sigma_data)
    if name not in PARAMETERIZATIONS:
        raise_unknown("parameterization", name, [*PARAMETERIZATIONS, "edm"])
    return PARAMETERIZATIONS[name]
