"""Training objectives: how far a prediction is from its target, weighted by noise level.

`Objective` is a value: the kind of loss, the weighting, and what else is added. All of its randomness comes from the
generator that it is given, so that a training step is a pure function of (weights, batch, seed).

>>> import torch
>>> from sfumato.diffusion.denoiser import Denoiser
>>> from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar
>>> network = torch.nn.Identity()
>>> network.forward = lambda x, t: torch.zeros_like(x)
>>> denoiser = Denoiser(network, TableSchedule(cosine_alpha_bar()))
>>> loss = Objective()(denoiser, torch.zeros(64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
>>> 0.9 < float(loss.value) < 1.1
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion.assignment import assign
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.likelihood import bound_term
from sfumato.errors import UserError, raise_unknown

LOSSES = ("l2", "l1", "huber")
WEIGHTINGS = ("uniform", "p2", "min_snr")


@dataclass(frozen=True)
class Loss:
    """What one training step measured.

    Attributes:
        value: () the scalar to differentiate.
        per_picture: (B,) unweighted, detached: for curves by noise level.
        level: the levels (B,) that were drawn.
        each: (B,) what every picture adds: weighted, with all terms, differentiable. `value` is its mean.
    """

    value: Tensor
    per_picture: Tensor
    level: NoiseLevel
    each: Tensor


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes:
        loss: "l2", "l1" or "huber" (quadratic below `huber_delta`), of output against target.
        weighting: "uniform"; "p2", `(k + SNR)^-gamma` (Choi 2022); or "min_snr", `min(SNR, gamma)` on the squared
            error of x0, carried over to any parameterization (Hang 2023). With `min_snr_gamma` inf that is the plain
            SNR: every parameterization is weighted like a uniform loss on eps.
        vlb_weight: lambda of the hybrid loss `L_simple + lambda T L_vlb` (Nichol 2021), in bits per dimension, for a
            network that learns its variance; the mean is detached there. 0 for none. Published value 0.001.
        continuous_data: the data are not 8-bit pictures: the bound's last term is a density.
        self_condition_rate: share of batches that see their own first estimate (a self-conditioned network).
        offset_noise: strength of the noise that is added to a whole channel of a picture, `eps + s z`, z of shape
            (B, C, 1, …): the model learns to change mean brightness (Guttenberg 2023; 0.1 is usual). 0 for none.
        immiscible: give each picture of the batch the noise nearest to it, the assignment with the least total
            distance (Li 2024).

    Raises:
        UserError: for an unknown loss or weighting, or a number outside its range.
    """

    loss: Literal["l2", "l1", "huber"] = "l2"
    weighting: Literal["uniform", "p2", "min_snr"] = "uniform"
    huber_delta: float = 1.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.0
    continuous_data: bool = False
    self_condition_rate: float = 0.5
    offset_noise: float = 0.0
    immiscible: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise_unknown("loss", self.loss, LOSSES)
        if self.weighting not in WEIGHTINGS:
            raise_unknown("weighting", self.weighting, WEIGHTINGS)
        for name in ("huber_delta", "min_snr_gamma"):
            if getattr(self, name) <= 0:
                raise UserError(f"objective.{name} must be positive, got {getattr(self, name)}")
        for name in ("vlb_weight", "offset_noise"):
            if getattr(self, name) < 0:
                raise UserError(f"objective.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.self_condition_rate <= 1:
            raise UserError(f"objective.self_condition_rate must lie in [0, 1], got {self.self_condition_rate}")

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what cannot work together. Raises `UserError`."""
        if denoiser.learned_variance and not self.vlb_weight:
            raise UserError(
                "a network that learns its variance needs the hybrid loss: set objective.vlb_weight (0.001 is usual)"
            )
        if self.vlb_weight and not denoiser.learned_variance:
            raise UserError("objective.vlb_weight needs a network that learns its variance: set learned_variance: true")

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition | None = None,
        *,
        generator: torch.Generator,
        level: NoiseLevel | None = None,
        eps: Tensor | None = None,
    ) -> Loss:
        """Draw levels and noise from `generator` (CPU), unless they are given, and measure. `x0` is (B, …)."""
        if level is None:
            u = torch.rand(len(x0), generator=generator, dtype=torch.float64)
            level = denoiser.schedule.level(denoiser.schedule.t_from_uniform(u))
        eps = self.noise(x0, generator, eps)
        twice = denoiser.self_condition and float(torch.rand((), generator=generator)) < self.self_condition_rate
        return self.measure(denoiser, x0, level, eps, condition, look_twice=twice)

    def noise(self, x0: Tensor, generator: torch.Generator, eps: Tensor | None = None) -> Tensor:
        """The noise to train `x0` (B, C, …) with: unit normals, or the `eps` that is given, offset and assigned."""
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator).to(x0)
        if self.offset_noise:
            whole_channel = (*x0.shape[:2], *(1 for _ in x0.shape[2:]))
            eps = eps + self.offset_noise * torch.randn(whole_channel, generator=generator).to(x0)
        if self.immiscible:
            eps = eps[assign(torch.cdist(x0.flatten(1).float(), eps.flatten(1).float())).to(eps.device)]
        return eps

    def measure(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        level: NoiseLevel,
        eps: Tensor,
        condition: Condition | None = None,
        *,
        look_twice: bool = False,
    ) -> Loss:
        """The loss at given levels (B,) and noise; `look_twice` feeds the network its own first estimate."""
        self.check(denoiser)
        x_t = level.noise(x0, eps)
        previous = None
        if look_twice:
            with torch.no_grad():
                previous = denoiser(x_t, level, condition).x0
        prediction = denoiser(x_t, level, condition, previous)
        error = self._distance(prediction.out, denoiser.parameterization.target(x0, eps, level))
        each = error * self.weight(denoiser, level).to(error)
        value = each.mean()
        if self.vlb_weight:
            frozen = denoiser.read(prediction.out.detach(), x_t, level, prediction.var_frac)
            term = bound_term(frozen, x0, x_t, level, denoiser.schedule, continuous=self.continuous_data)
            bound = self.vlb_weight * (denoiser.schedule.steps or 1000)
            each, value = each + bound * term, value + bound * term.mean()
        return Loss(value, error.detach(), level, each)

    def weight(self, denoiser: Denoiser, level: NoiseLevel) -> Tensor:
        """The weight of each level, (B,) float64, on the squared error of the network's output.

        An error e of x0 is an error `D / sigma * e` of the output (D the parameterization's determinant), so a weight w
        on x0 is `w (sigma / D)^2` on the output: `min(SNR, gamma) / SNR` for eps, `/ (SNR + 1)` for v.
        """
        if self.weighting == "uniform":
            return torch.ones_like(level.alpha)
        snr = (level.alpha / level.sigma) ** 2
        if self.weighting == "p2":
            return (self.p2_k + snr) ** -self.p2_gamma
        return snr.clamp(max=self.min_snr_gamma) * (level.sigma / denoiser.parameterization.determinant(level)) ** 2

    def _distance(self, out: Tensor, target: Tensor) -> Tensor:
        if self.loss == "l2":
            error = (out - target) ** 2
        elif self.loss == "l1":
            error = (out - target).abs()
        else:
            error = F.smooth_l1_loss(out, target, reduction="none", beta=self.huber_delta)
        return error.flatten(1).mean(1)
