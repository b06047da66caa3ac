"""DPM++ 2S ancestral: two estimates a step in the data prediction's form, down to less noise, then noise.

>>> from sfumato.diffusion.solvers.registry import solver
>>> solver("DPM++ 2S a").eta
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Prediction
from sfumato.diffusion.level import NoiseLevel, expand
from sfumato.diffusion.posterior import Injection, ancestral, check_injection, spread
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.solvers.base import Ask, toward
from sfumato.diffusion.solvers.registry import method
from sfumato.random import NoiseSource


@method(
    "dpmpp_2s_ancestral",
    "DPM++ 2S a",
    "DPM++ 2S ancestral",
    "k_dpmpp_2s_a",
    "k_dpmpp_2s_ancestral",
    "dpmpp_2s_a",
    evaluations=2,
    stochastic=True,
)
@dataclass(frozen=True)
class DPMpp2SAncestral:
    """Towards `x0` half the way in log nsr to `sigma_down`, then the whole way towards the `x0` seen there. Reads `x0`.

    `x_s = toward(x, x0)` at `nsr_s = sqrt(nsr nsr_down)`, `x' = toward(x, x0_s) + sigma_up z`: DPM-Solver++(2S) with
    r = 1/2 (Lu 2022b, alg. 1) within an ancestral step (`posterior.ancestral`), k-diffusion's
    `sample_dpmpp_2s_ancestral`. A step that leaves pure noise or arrives clean has one evaluation.

    Attributes:
        eta: >= 0, share of the posterior's standard deviation that is injected.
        noise: S_noise, standard deviation of the unit noise.
        variance: of the noise, the method's "own" or "learned" by the network at the step's first level.
    """

    eta: float = 1.0
    noise: float = 1.0
    variance: Injection = "own"
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_injection(self.variance, self.eta)

    def init(self, schedule: Schedule, grid: Sequence[NoiseLevel]) -> Schedule:
        return schedule

    def step(
        self, ask: Ask, x: Tensor, now: NoiseLevel, nxt: NoiseLevel, state: Schedule, noise: NoiseSource
    ) -> tuple[Tensor, NoiseLevel, Schedule, Prediction]:
        prediction = ask(x, now).shifted(now)
        if nxt.is_clean:
            return toward(x, prediction.x0, now, nxt), nxt, state, prediction
        down, own = ancestral(now, nxt, self.eta)
        std = self.noise * expand(spread(self.variance, own, prediction.var_frac, now, nxt), x)
        if not (down.is_clean or now.is_noise):
            middle = state.from_nsr(torch.sqrt(now.nsr * down.nsr))
            prediction = ask(toward(x, prediction.x0, now, middle), middle).shifted(middle)
        return toward(x, prediction.x0, now, down) + std * noise.draw(), nxt, state, prediction
