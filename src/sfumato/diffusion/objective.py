"""Training objectives: how far a prediction is from its target, weighted by noise level.

`Objective` is a value: the kind of loss, the weighting, and what else is added. All of its randomness comes from the
generator that it is given, so that a training step is a pure function of (weights, batch, seed) and, with importance
sampling, of the history of losses that it is shown.

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

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion import noising
from sfumato.diffusion.assignment import assign
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.densities import CONTINUOUS_BINS, LossHistory, log_normal, logit_normal, signal, uniform
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.likelihood import bound_term
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import UserError, raise_unknown

LOSSES = ("l2", "l1", "huber")
WEIGHTINGS = ("uniform", "p2", "min_snr", "debiased")
DENSITIES = ("uniform", "signal", "logit_normal", "log_normal")
IMPORTANCES = ("none", "second_moment")

_PLAIN_SNR = ("min_snr_gamma", math.inf)  # the one number that may be infinite


@dataclass(frozen=True)
class Loss:
    """What one training step measured.

    Attributes:
        value: () the scalar to differentiate.
        per_picture: (B,) unweighted, detached: for curves by noise level.
        level: the levels (B,) that were drawn; None for a network that knows no noise (an autoencoder).
        each: (B,) what every picture adds: weighted, with all terms, differentiable. `value` is its mean.
        parts: (B,) which part of the path each level was drawn from by importance; None without it.
        sampled: (B,) detached, `each` before the weights of importance sampling: what its history is to record. None
            without it.
        figures: other means over the batch that are worth a curve, by name.
    """

    value: Tensor
    per_picture: Tensor
    level: NoiseLevel | None
    each: Tensor
    parts: Tensor | None = None
    sampled: Tensor | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes:
        loss: "l2", "l1" or "huber" (quadratic below `huber_delta`), of output against target.
        weighting: "uniform"; "p2", `(k + SNR)^-gamma` (Choi 2022); "min_snr", `min(SNR, gamma)` on the squared error of
            x0, carried over to any parameterization (Hang 2023): with `min_snr_gamma` inf that is the plain SNR, and
            every parameterization is weighted like a uniform loss on eps; or "debiased", `1 / sqrt(SNR)` on the squared
            error of eps, carried over likewise (Yu 2024).
        density: where levels are drawn: "uniform", the schedule's own (even over the times of a table or a flow, over
            log nsr on an exploding path); "signal", the same with the amplitudes between a table's too (Saharia 2021);
            "logit_normal" with `logit_mean` and `logit_std`, on t in [0, 1] (Esser
            2024); or "log_normal" with `log_nsr_mean` and `log_nsr_std`, of ln nsr (Karras 2022). See `densities`.
        importance: "second_moment" draws levels more often where losses are large, and weights them down by as much, so
            that the mean loss stays what it is (Nichol 2021); its state is a `LossHistory`, which remembers
            `importance_history` losses of each index of the table and mixes in `importance_uniform` of the uniform.
        vlb_weight: lambda of the hybrid loss `L_simple + lambda T L_vlb` (Nichol 2021), in bits per dimension, for a
            network that learns its variance; the mean is detached there. 0 for none. Published value 0.001.
        continuous_data: the data are not 8-bit pictures: the bound's last term is a density.
        self_condition_rate: share of batches that see their own first estimate (a self-conditioned network).
        offset_noise: strength of the noise that is added to a whole channel of a picture, `eps + s z`, z of shape
            (B, C, 1, …): the model learns to change mean brightness (Guttenberg 2023; 0.1 is usual). 0 for none.
        pyramid_noise: discount, in [0, 1], of noise of half the size, a quarter, … that is added (Whitaker 2023; 0.8 is
            usual); every element keeps variance 1. 0 for none.
        input_perturbation: strength of noise that the network is shown beside `eps` and not asked for (Ning 2023; 0.1
            is usual). 0 for none.
        immiscible: give each picture of the batch the noise nearest to it, the assignment with the least total
            distance (Li 2024). Noise and data then depend on one another, the more the larger the batch and the fewer
            the dimensions: the probability flow still leads to the data, steps that add fresh noise need not.

    Raises:
        UserError: for an unknown name, or a number outside its range.
    """

    loss: Literal["l2", "l1", "huber"] = "l2"
    weighting: Literal["uniform", "p2", "min_snr", "debiased"] = "uniform"
    huber_delta: float = 1.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    min_snr_gamma: float = 5.0
    density: Literal["uniform", "signal", "logit_normal", "log_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    log_nsr_mean: float = -1.2
    log_nsr_std: float = 1.2
    importance: Literal["none", "second_moment"] = "none"
    importance_history: int = 10
    importance_uniform: float = 0.001
    vlb_weight: float = 0.0
    continuous_data: bool = False
    self_condition_rate: float = 0.5
    offset_noise: float = 0.0
    pyramid_noise: float = 0.0
    input_perturbation: float = 0.0
    immiscible: bool = False

    def __post_init__(self) -> None:
        known = {"loss": LOSSES, "weighting": WEIGHTINGS, "density": DENSITIES, "importance": IMPORTANCES}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise_unknown(name, getattr(self, name), choices)
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, float) and not math.isfinite(value) and (own.name, value) != _PLAIN_SNR:
                raise UserError(f"objective.{own.name} must be a finite number, got {value}")
        for name in ("huber_delta", "min_snr_gamma", "logit_std", "log_nsr_std"):
            if getattr(self, name) <= 0:
                raise UserError(f"objective.{name} must be positive, got {getattr(self, name)}")
        for name in ("p2_gamma", "p2_k", "vlb_weight", "offset_noise", "input_perturbation"):
            if getattr(self, name) < 0:
                raise UserError(f"objective.{name} must not be negative, got {getattr(self, name)}")
        for name in ("self_condition_rate", "pyramid_noise", "importance_uniform"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.importance_history < 1:
            raise UserError(f"objective.importance_history must be at least 1, got {self.importance_history}")

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what cannot work together. Raises `UserError`."""
        if denoiser.learned_variance and not self.vlb_weight:
            raise UserError(
                "a network that learns its variance needs the hybrid loss: set objective.vlb_weight (0.001 is usual)"
            )
        if self.vlb_weight and not denoiser.learned_variance:
            raise UserError("objective.vlb_weight needs a network that learns its variance: set learned_variance: true")
        if self.weighting == "p2" and self.p2_k == 0 and math.isinf(denoiser.schedule.nsr_range[1]):
            raise UserError("objective.p2_k must be positive with a schedule that ends in pure noise, where SNR is 0")

    def history(self, schedule: Schedule) -> LossHistory | None:
        """The state of importance sampling at the start of a training: one part for each index of a table, or
        `CONTINUOUS_BINS`. None where nothing is to be remembered."""
        if self.importance == "none":
            return None
        return LossHistory(schedule.steps or CONTINUOUS_BINS, self.importance_history, self.importance_uniform)

    def level(self, schedule: Schedule, u: Tensor) -> NoiseLevel:
        """The levels (B,) at uniform numbers `u` in [0, 1): the inverse CDF of the density, rising with noise."""
        if self.density == "logit_normal":
            return logit_normal(schedule, u, self.logit_mean, self.logit_std)
        if self.density == "log_normal":
            return log_normal(schedule, u, self.log_nsr_mean, self.log_nsr_std)
        if self.density == "signal":
            return signal(schedule, u)
        return uniform(schedule, u)

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition | None = None,
        *,
        generator: torch.Generator,
        level: NoiseLevel | None = None,
        eps: Tensor | None = None,
        history: LossHistory | None = None,
    ) -> Loss:
        """Draw levels and noise from `generator` (CPU), unless they are given, and measure. `x0` is (B, …).

        Args:
            history: what importance sampling draws by, and nothing here changes: record `loss.parts` and
                `loss.sampled` in it after the step. Without one levels are drawn by the density alone, as for
                validation, where they must not move.
        """
        parts, share = None, None
        if level is None:
            u = torch.rand(len(x0), generator=generator, dtype=torch.float64)
            if history is not None:
                u, share = history.draw(u)
                parts = history.part_of(u)
            level = self.level(denoiser.schedule, u)
        eps = self.noise(x0, generator, eps)
        twice = denoiser.self_condition and float(torch.rand((), generator=generator)) < self.self_condition_rate
        seen = noising.perturb(eps, self.input_perturbation, generator) if self.input_perturbation else None
        loss = self.measure(denoiser, x0, level, eps, condition, look_twice=twice, seen=seen)
        if parts is None or share is None:
            return loss
        each = loss.each * share.to(loss.each)
        return replace(loss, value=each.mean(), each=each, parts=parts, sampled=loss.each.detach())

    def noise(self, x0: Tensor, generator: torch.Generator, eps: Tensor | None = None) -> Tensor:
        """The noise to train `x0` (B, C, …) with: unit normals, or the `eps` that is given; coloured and assigned."""
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator).to(x0)
        if self.pyramid_noise:
            eps = noising.pyramid(eps, self.pyramid_noise, generator)
        if self.offset_noise:
            eps = noising.offset(eps, self.offset_noise, generator)
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
        seen: Tensor | None = None,
    ) -> Loss:
        """The loss at given levels (B,) and noise, or rather those that the network is asked at (`Denoiser.asked`).

        Args:
            look_twice: feed the network its own first estimate.
            seen: the noise in what the network is shown, if it is another than `eps`, the target's.
        """
        self.check(denoiser)
        level = denoiser.asked(level)
        x_t = level.noise(x0, eps if seen is None else seen)
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
        on x0 is `w (sigma / D)^2` on the output: `min(SNR, gamma) / SNR` for eps, `/ (SNR + 1)` for v. "debiased" is
        `w = sqrt(SNR)` on x0, which makes `alpha sigma / D^2` on the output. All of them are finite at every level that
        the network is asked at (`Denoiser.asked`); at pure noise the last two are 0.
        """
        if self.weighting == "uniform":
            return torch.ones_like(level.alpha)
        determinant = denoiser.parameterization.determinant(level)
        if self.weighting == "debiased":
            return level.alpha * level.sigma / determinant**2
        snr = (level.alpha / level.sigma) ** 2
        if self.weighting == "p2":
            return (self.p2_k + snr) ** -self.p2_gamma
        return snr.clamp(max=self.min_snr_gamma) * (level.sigma / determinant) ** 2

    def _distance(self, out: Tensor, target: Tensor) -> Tensor:
        if self.loss == "l2":
            error = (out - target) ** 2
        elif self.loss == "l1":
            error = (out - target).abs()
        else:
            error = F.smooth_l1_loss(out, target, reduction="none", beta=self.huber_delta)
        return error.flatten(1).mean(1)
