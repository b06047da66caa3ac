"""Analytic denoisers: data distributions whose optimal denoiser `E[x0 | x_t]` is known in closed form.

They stand in for a network wherever the mathematics is tested or taught: solvers, guidance and grids take them as a
`DenoiseFn`. `sample` draws from the data distribution itself.

>>> import torch
>>> from sfumato.diffusion.level import NoiseLevel
>>> data = GaussianData(mean=torch.zeros(2), variance=0.25)
>>> p = data(torch.ones(1, 2), NoiseLevel.of(0, 0.6, 0.8), None)
>>> [round(v, 6) for v in p.x0[0].tolist()]
[0.205479, 0.205479]
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand


def _prediction(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Prediction:
    sigma = torch.where(level.sigma == 0, torch.ones_like(level.sigma), level.sigma)
    eps = (x_t - expand(level.alpha, x_t) * x0) * expand(torch.where(level.sigma == 0, 0.0, 1 / sigma), x_t)
    return Prediction(x0, eps, x0)


class GaussianData:
    """`x0 ~ N(mean, variance I)`.

    Args:
        mean: of one sample's shape, (*S).
        variance: > 0, a number or a tensor that broadcasts against `mean`.
    """

    def __init__(self, mean: Tensor, variance: float | Tensor) -> None:
        self.mean, self.variance = mean, torch.as_tensor(variance, dtype=mean.dtype)

    def __call__(self, x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None = None) -> Prediction:
        """`E[x0|x_t] = mean + alpha var / (alpha² var + sigma²) (x_t - alpha mean)`; x_t (B, *S)."""
        here = level.like(x_t)
        mean, variance = self.mean.to(x_t), self.variance.to(x_t)
        gain = here.alpha * variance / (here.alpha**2 * variance + here.sigma**2)
        return _prediction(mean + gain * (x_t - here.alpha * mean), x_t, level)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, *S) exact draws."""
        z = torch.randn((n, *self.mean.shape), generator=generator, dtype=self.mean.dtype)
        return self.mean + torch.sqrt(self.variance) * z


class MixtureData:
    """A mixture of isotropic Gaussians, `x0 ~ sum_k w_k N(m_k, variance_k I)`.

    Args:
        means: (K, *S).
        variances: (K,), > 0.
        weights: (K,), positive; normalised here. None for equal shares.
    """

    def __init__(self, means: Tensor, variances: Tensor | float, weights: Tensor | None = None) -> None:
        self.means = means
        self.variances = torch.as_tensor(variances, dtype=means.dtype).expand(len(means))
        shares = torch.ones(len(means), dtype=means.dtype) if weights is None else weights.to(means.dtype)
        self.weights = shares / shares.sum()

    def __call__(self, x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None = None) -> Prediction:
        """Posterior mean over components; x_t (B, *S)."""
        means, variances = self.means.to(x_t), self.variances.to(x_t)
        b, k, d = len(x_t), len(means), means[0].numel()
        alpha = level.alpha.to(x_t).reshape(-1, 1)
        sigma = level.sigma.to(x_t).reshape(-1, 1)
        flat, centres = x_t.reshape(b, 1, d), means.reshape(1, k, d)
        total = alpha**2 * variances + sigma**2
        difference = flat - alpha[..., None] * centres
        log_likelihood = -0.5 * (difference**2).sum(-1) / total - 0.5 * d * torch.log(total)
        share = torch.softmax(log_likelihood + torch.log(self.weights.to(x_t)), dim=1)
        per_component = centres + (alpha * variances / total)[..., None] * difference
        x0 = (share[..., None] * per_component).sum(1).reshape(x_t.shape)
        return _prediction(x0, x_t, level)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, *S) exact draws."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=self.means.dtype)
        return self.means[which] + expand(torch.sqrt(self.variances[which]), z) * z


class EmpiricalData(MixtureData):
    """The optimal denoiser of a finite data set: it can only return what it has seen (Karras 2022, appendix B.3).

    Args:
        data: (N, *S), the samples.
        bandwidth: standard deviation of a kernel around each sample, >= 0; 0 is the data set itself.
    """

    def __init__(self, data: Tensor, bandwidth: float = 0.0) -> None:
        super().__init__(data, bandwidth**2)
