"""Bits per dimension of 8-bit pictures under a pixel-space model: what they would cost to store with it, at the best.

Two ways: the variational bound of the model's chain (Ho 2020; evaluated as improved-diffusion does), and the likelihood
under its probability flow (Song 2021), of pictures spread evenly over their bins. Both are estimates, without bias, of
an upper bound; the deviation says how much the choice of pictures matters.

>>> import torch
>>> from sfumato.systems.ddpm import DDPM, DDPMConfig
>>> model = DDPM.create(DDPMConfig(size=8, network={"block_out_channels": [32], "layers_per_block": 1,
...                     "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}))
>>> found = measure_bound(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), steps="3")
>>> found.count, found.dims, found.total > found.decoder > 0
(2, 192, True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.backends import offload
from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.guidance import DenoiseFn, clip_x0, unguided
from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.likelihood import Bound, Variance, bound, chain
from sfumato.diffusion.probability_flow import Divergence, dequantize, flow_density
from sfumato.errors import UserError
from sfumato.evaluation.figures import deviation
from sfumato.random import NoiseSource, derived_seed
from sfumato.systems.ddpm import DDPM
from sfumato.tasks.draw import device_of

Labels = Sequence[str | int | None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BitsPerDim:
    """What was measured, in bits per dimension, as means over the pictures.

    Attributes:
        total: all terms together.
        deviation: standard deviation of `total` over bootstrap resamplings of the pictures; None for one picture.
        per_picture: (N,) float64.
        dims: numbers in one picture.
        evaluations: of the network for each batch of pictures.
        prior, decoder: the bound's first and last term; None for the flow.
        times, terms, x0_mse, eps_mse: (T,) of each step of the bound, noisy to clean; None for the flow.
    """

    total: float
    deviation: float | None
    per_picture: Tensor
    dims: int
    evaluations: int
    prior: float | None = None
    decoder: float | None = None
    times: Tensor | None = None
    terms: Tensor | None = None
    x0_mse: Tensor | None = None
    eps_mse: Tensor | None = None

    @property
    def count(self) -> int:
        """How many pictures were measured."""
        return len(self.per_picture)


def measure_bound(
    model: DDPM,
    pictures: Tensor,
    labels: Labels | None = None,
    *,
    steps: str | None = None,
    variance: Variance | None = None,
    clip: bool = True,
    seed: int = 0,
    batch: int = 32,
    on_batch: Progress | None = None,
) -> BitsPerDim:
    """The variational bound.

    Args:
        pictures: (N, C, H, W) uint8, of the model's size.
        labels: one per picture, a name, an id or None for the null class; None for no labels at all.
        steps: of a respaced chain ("250", "ddim50", "10,15,20"); None for every step of the model's schedule.
        variance: None for the learned one where the model has it, else "small".
        clip: keep the estimates of the picture in [-1, 1] (improved-diffusion's `clip_denoised`).
        seed: of the noise; picture i has its own, whoever shares its batch.
        batch: pictures at once; changes nothing but memory.
        on_batch: told (pictures done, pictures in all).

    Raises:
        UserError: for pictures of another size, or settings that do not fit the model.
    """
    _check(model, pictures, labels, batch)
    levels = chain(model.denoiser.schedule, steps)
    if variance is None:
        variance = "learned" if model.denoiser.learned_variance else "small"
    found: list[Bound] = []
    with offload.resting(model.networks()):
        for x0, denoise, noise in _batches(model, pictures, labels, seed, batch, on_batch):
            denoise = clip_x0(denoise) if clip else denoise
            found.append(bound(denoise, x0, levels, noise, variance=variance))
    whole = {
        name: torch.cat([getattr(part, name).to("cpu", torch.float64) for part in found])
        for name in ("total", "prior", "decoder", "terms", "x0_mse", "eps_mse")
    }
    _refuse_unmeasurable(whole["total"])
    return BitsPerDim(
        float(whole["total"].mean()),
        deviation(whole["total"], seed=seed),
        whole["total"],
        dims=pictures[0].numel(),
        evaluations=_looks(model) * (len(levels) - 1),
        prior=float(whole["prior"].mean()),
        decoder=float(whole["decoder"].mean()),
        times=found[0].times,
        terms=whole["terms"].mean(0),
        x0_mse=whole["x0_mse"].mean(0),
        eps_mse=whole["eps_mse"].mean(0),
    )


def measure_flow(
    model: DDPM,
    pictures: Tensor,
    labels: Labels | None = None,
    *,
    steps: int | None = None,
    tolerance: float = 1e-4,
    divergence: Divergence = "rademacher",
    probes: int = 1,
    seed: int = 0,
    batch: int = 32,
    on_batch: Progress | None = None,
) -> BitsPerDim:
    """The likelihood under the probability flow, of pictures spread evenly over their bins.

    Args:
        pictures, labels, seed, on_batch: as of `measure_bound`; the seed also gives each picture its place in its bins
            and its probes.
        steps, tolerance, divergence, probes: of the integration (see `flow_density`).
        batch: pictures at once. With a tolerance they share their steps, so that it changes the last digits.

    Raises:
        UserError: for pictures of another size, settings out of range, or a tolerance that cannot be met.
    """
    _check(model, pictures, labels, batch)
    bits, evaluations = [], 0
    with offload.resting(model.networks()):
        for x0, denoise, noise in _batches(model, pictures, labels, seed, batch, on_batch):
            spread = dequantize(x0, noise)
            found = flow_density(
                denoise,
                spread,
                model.denoiser.schedule,
                divergence=divergence,
                noise=noise,
                probes=probes,
                tolerance=tolerance,
                steps=steps,
            )
            bits.append(found.bits_per_dim(bins=True))
            evaluations = max(evaluations, found.evaluations)
    each = torch.cat(bits)
    _refuse_unmeasurable(each)
    asked = _looks(model) * evaluations
    return BitsPerDim(float(each.mean()), deviation(each, seed=seed), each, dims=pictures[0].numel(), evaluations=asked)


def _check(model: DDPM, pictures: Tensor, labels: Labels | None, batch: int) -> None:
    if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != model.shape or not len(pictures):
        raise UserError(
            f"bits per dimension need 8-bit pictures (N, {', '.join(map(str, model.shape))}), "
            f"got {tuple(pictures.shape)} of {pictures.dtype}"
        )
    if labels is not None and len(labels) != len(pictures):
        raise UserError(f"{len(labels)} labels for {len(pictures)} pictures")
    if batch < 1:
        raise UserError(f"batch must be at least 1, got {batch}")


def _batches(
    model: DDPM, pictures: Tensor, labels: Labels | None, seed: int, batch: int, on_batch: Progress | None
) -> Iterator[tuple[Tensor, DenoiseFn, NoiseSource]]:
    """(pictures in [-1, 1], the denoiser under their labels, their noise), on the network's device."""
    device = device_of(model)
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        seeds = [derived_seed("bits per dimension", seed, start + i) for i in range(len(part))]
        own = list(labels[start : start + batch]) if labels is not None else [None] * len(part)
        denoise = unguided(model.denoiser, model.condition(own).to(device, torch.float32))
        if model.denoiser.self_condition:
            denoise = _looking_twice(denoise)
        yield part.to(device, torch.float32) / 127.5 - 1, denoise, NoiseSource(seeds, model.shape, device=device)
        if on_batch is not None:
            on_batch(start + len(part), len(pictures))


def _refuse_unmeasurable(per_picture: Tensor) -> None:
    bad = int((~torch.isfinite(per_picture)).sum())
    if bad:
        raise UserError(
            f"the bits per dimension of {bad} of {len(per_picture)} pictures are not finite: the model's outputs are "
            "not, or there are too few steps"
        )


def _looks(model: DDPM) -> int:
    """How often the network is asked for one estimate."""
    return 2 if model.denoiser.self_condition else 1


def _looking_twice(denoise: DenoiseFn) -> DenoiseFn:
    """A self-conditioned denoiser that sees its own first estimate at the same level."""

    def twice(x_t: Tensor, level: NoiseLevel, previous_x0: Tensor | None) -> Prediction:
        return denoise(x_t, level, denoise(x_t, level, None).x0)

    return twice
