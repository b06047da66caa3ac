"""Which noise levels training looks at: densities over the path, and importance sampling by the losses seen there.

A density maps a uniform number `u` in [0, 1) to a level, rising from clean to noisy: it is the inverse of a cumulative
distribution function. `LossHistory` draws the `u` themselves more often where losses are large and says by what weight
to divide that out again, whatever the density.

>>> import torch
>>> from sfumato.diffusion.schedule import FlowSchedule
>>> middle = logit_normal(FlowSchedule(), torch.tensor([0.5], dtype=torch.float64))
>>> round(float(middle.t), 3)
0.5
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel
from sfumato.diffusion.schedule import Schedule, TableSchedule, VESchedule

CONTINUOUS_BINS = 100
"""Into how many equally likely parts a continuous schedule is divided for importance sampling."""


def uniform(schedule: Schedule, u: Tensor) -> NoiseLevel:
    """The schedule's own density: even over a table's whole indices and a flow's `t`, over log nsr on an exploding
    path."""
    return schedule.level(schedule.t_from_uniform(u))


def signal(schedule: Schedule, u: Tensor) -> NoiseLevel:
    """Every amplitude in turn: a whole index of a table, then `alpha = sqrt(alpha_bar)` evenly between its cleaner
    neighbour's and its own (Saharia 2021, SR3, section 2.3). On other schedules `uniform`, which is as continuous.
    """
    if not isinstance(schedule, TableSchedule):
        return uniform(schedule, u)
    alphas = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar.sqrt()])
    place = u.to(torch.float64) * len(schedule.alpha_bar)
    index = place.floor().long().clamp(max=len(schedule.alpha_bar) - 1)
    alpha = torch.lerp(alphas[index], alphas[index + 1], place - index)
    return schedule.from_nsr((torch.sqrt(1 - alpha**2) / alpha).clamp(*schedule.nsr_range))


def logit_normal(schedule: Schedule, u: Tensor, mean: float = 0.0, std: float = 1.0) -> NoiseLevel:
    """`logit(s) ~ N(mean, std²)` (Esser 2024, eq. 19), s the place in [0, 1] on the path, from clean to noisy.

    s is `t` itself where t lies in [0, 1], as on a flow (before its shift), `t / (T - 1)` on a table (so that t is
    fractional), the place between the ends of log nsr on an exploding path, and that between the ends of t on any
    other. Cut off, not piled up, at the ends of what is trained.

    Args:
        u: (B,) in [0, 1).
        mean: above 0 prefers noise.
        std: > 0.
    """
    low, high = schedule.t_range
    if isinstance(schedule, TableSchedule):
        return schedule.level(_squashed(u, mean, std, 0.0, 1.0) * high)
    if isinstance(schedule, VESchedule):
        place = _squashed(u, mean, std, 0.0, 1.0)
        return schedule.level((math.log(low) + (math.log(high) - math.log(low)) * place).exp().clamp(low, high))
    if 0 <= low < high <= 1:
        return schedule.level(_squashed(u, mean, std, low, high))
    return schedule.level(low + (high - low) * _squashed(u, mean, std, 0.0, 1.0))


def log_normal(schedule: Schedule, u: Tensor, mean: float = -1.2, std: float = 1.2) -> NoiseLevel:
    """`ln nsr ~ N(mean, std²)` (Karras 2022, table 1), cut off at the ends of the schedule's range.

    Args:
        u: (B,) in [0, 1).
        mean, std: P_mean and P_std of the paper; std > 0.
    """
    low, high = schedule.nsr_range
    ends = tuple((math.log(end) if 0 < end < math.inf else math.copysign(math.inf, end - 1)) for end in (low, high))
    nsr = torch.exp(_truncated_normal(u, mean, std, *ends))
    return schedule.from_nsr(nsr.clamp(low, high))


def _squashed(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """The logistic function of a normal number, within [low, high] of [0, 1]; the inverse CDF at `u`."""
    ends = (_logit(low), _logit(high))
    return torch.sigmoid(_truncated_normal(u, mean, std, *ends)).clamp(low, high)


def _logit(p: float) -> float:
    if p <= 0 or p >= 1:
        return -math.inf if p <= 0 else math.inf
    return math.log(p) - math.log1p(-p)


def _truncated_normal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """The inverse CDF at `u` of N(mean, std²) within (low, high); float64."""
    ends = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)
    below, above = torch.special.ndtr(ends)
    z: Tensor = torch.special.ndtri(below + (above - below) * u.to(torch.float64))
    return mean + std * z


class LossHistory:
    """Importance sampling of noise levels by the second moment of their losses (Nichol 2021, section 3.3).

    The path is divided into K parts that the objective's density draws equally often: the indices of a table, say.
    Part k is drawn with `p_k`, proportional to `sqrt(E[L_k²])` over its last losses, mixed with a little of the
    uniform; a loss from there counts `1 / (K p_k)`, which leaves the mean loss what it was. Until every part has its
    full history all are equally likely.

    Every process of a training must record the same losses in the same order, to draw alike.

    Args:
        parts: K.
        length: how many losses of each part are kept (10 in the paper).
        uniform: share of the uniform distribution, in [0, 1] (0.001).

    Attributes:
        losses: (K, length) float64, oldest first.
        counts: (K,) int64, how many of each row are filled.
    """

    def __init__(self, parts: int, length: int = 10, uniform: float = 0.001) -> None:
        self.uniform = uniform
        self.losses = torch.zeros((parts, length), dtype=torch.float64)
        self.counts = torch.zeros(parts, dtype=torch.int64)

    @property
    def warm(self) -> bool:
        """Whether every part has a full history."""
        return bool((self.counts == self.losses.shape[1]).all())

    def probabilities(self) -> Tensor:
        """(K,) float64, summing to 1."""
        parts = len(self.counts)
        even = torch.full((parts,), 1 / parts, dtype=torch.float64)
        moments = self.losses.square().mean(1).sqrt()
        if not self.warm or float(moments.sum()) == 0:
            return even
        return (1 - self.uniform) * moments / moments.sum() + self.uniform * even

    def part_of(self, u: Tensor) -> Tensor:
        """Which part each `u` in [0, 1) lies in, (B,) int64."""
        return (u * len(self.counts)).floor().long().clamp(max=len(self.counts) - 1)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers (B,) into numbers `u` that prefer large losses, and the weights of what is drawn there.

        Both (B,) float64. As long as all parts are equally likely the numbers are returned as they are.
        """
        p = self.probabilities()
        if bool((p == p[0]).all()):
            return uniform, torch.ones_like(uniform)
        upper = p.cumsum(0)
        part = torch.searchsorted(upper, uniform * upper[-1], right=True).clamp(max=len(p) - 1)
        inside = (uniform * upper[-1] - (upper[part] - p[part])) / p[part]
        u = (part + inside.clamp(1e-9, 1 - 1e-9)) / len(p)  # strictly inside, so that it is found there again
        return u, 1 / (len(p) * p[part])

    def record(self, parts: Tensor, losses: Tensor) -> None:
        """Append losses (N,) to the rows of `parts` (N,), in this order; the oldest ones drop out."""
        length = self.losses.shape[1]
        parts, order = parts.cpu().sort(stable=True)
        losses = losses.cpu().to(torch.float64)[order]
        ends = torch.bincount(parts, minlength=len(self.counts)).cumsum(0)
        before_end = ends[parts] - torch.arange(len(parts))  # 1 for the last one of its part
        for turn in range(length, 0, -1):  # of what one part gets at once only the last `length` stay
            part, loss = parts[before_end == turn], losses[before_end == turn]
            full = part[self.counts[part] == length]
            self.losses[full, :-1] = self.losses[full, 1:]
            self.counts[part] = (self.counts[part] + 1).clamp(max=length)
            self.losses[part, self.counts[part] - 1] = loss

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave. Raises `ValueError` when it is of another size."""
        for name, own in self.tensors().items():
            found = tensors.get(name)
            if found is None or found.shape != own.shape or found.dtype != own.dtype:
                raise ValueError(f"a history of losses needs {name!r} of shape {tuple(own.shape)} and {own.dtype}")
        self.losses, self.counts = tensors["losses"].clone(), tensors["counts"].clone()
