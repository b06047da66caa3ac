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

from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.errors import raise_unknown

Coefficients = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Parameterization:
    """A linear combination of clean signal and noise that the network is trained to output.

    Attributes:
        name: how configs call it.
        coefficients: `level -> (a, b)`, float64 of the level's shape.
    """

    name: str
    coefficients: Callable[[NoiseLevel], Coefficients]

    def determinant(self, level: NoiseLevel) -> Tensor:
        """`D = alpha * b - sigma * a`: where it is 0 the output does not determine `x0` and `eps`."""
        a, b = self.coefficients(level)
        return level.alpha * b - level.sigma * a

    def target(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """`a * x0 + b * eps`. Shapes (B, …)."""
        a, b = (expand(c, x0) for c in self.coefficients(level))
        return a * x0 + b * eps

    def solve(self, out: Tensor, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Invert: `x0 = (b x_t - sigma out) / D`, `eps = (alpha out - a x_t) / D`. Shapes (B, …).

        At a clean level (`sigma = 0`) where the output holds no noise, `eps` is 0 by definition.

        Raises:
            ValueError: at pure noise (`alpha = 0`) if the output says nothing about `x0` (eps-prediction).
        """
        (a, b), d = self.coefficients(level), self.determinant(level)
        if bool(((d == 0) & (level.alpha == 0)).any()):
            raise ValueError(f"'{self.name}' prediction cannot recover x0 where alpha = 0 (zero terminal SNR)")
        clean = d == 0
        d = torch.where(clean, torch.ones_like(d), d)
        from_out = torch.where(clean, torch.where(a == 0, torch.zeros_like(a), 1 / a), -level.sigma / d)
        x_x0, out_x0 = expand(b / d, x_t), expand(from_out, x_t)
        x_eps = expand(torch.where(clean, 0.0, -a / d), x_t)
        out_eps = expand(torch.where(clean, 0.0, level.alpha / d), x_t)
        return x_x0 * x_t + out_x0 * out, x_eps * x_t + out_eps * out


def _constant(a: float, b: float) -> Callable[[NoiseLevel], Coefficients]:
    return lambda level: (torch.full_like(level.alpha, a), torch.full_like(level.alpha, b))


def _edm(sigma_data: float) -> Callable[[NoiseLevel], Coefficients]:
    def coefficients(level: NoiseLevel) -> Coefficients:
        norm = torch.sqrt(level.sigma**2 + (level.alpha * sigma_data) ** 2)
        return level.sigma / (sigma_data * norm), -level.alpha * sigma_data / norm

    return coefficients


EPS = Parameterization("eps", _constant(0, 1))
"""The noise (Ho 2020). Singular at alpha = 0."""

X0 = Parameterization("x0", _constant(1, 0))
"""The clean signal. At sigma = 0 `eps` is taken as 0."""

V = Parameterization("v", lambda level: (-level.sigma, level.alpha))
"""`v = alpha eps - sigma x0` (Salimans 2022)."""

FLOW = Parameterization("flow", _constant(-1, 1))
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
