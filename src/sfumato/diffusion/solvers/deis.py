"""DEIS: the exponential integrator whose noise estimate is a polynomial in the logarithm of the noise-to-signal ratio.

>>> DEIS(order=3).order
3
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sfumato.diffusion.solvers.dpm import DPM, Form, Kind
from sfumato.diffusion.solvers.registry import method


@method("deis_multistep", "DEIS 2", "DEISMultistepScheduler", order=2)
@method("deis", "DEIS", order=3)
@dataclass(frozen=True)
class DEIS(DPM):
    """log-rho multistep: `x'/a' = x/a + int p(log nsr) d nsr`, `p(log nsr_j) = eps_j`, exactly. Reads `eps`.

    log nsr being -lambda, this is DPM-Solver's multistep with the exact integrals at every order (Zhang 2023, "DEIS",
    sections 3.3 and 4, rho-AB with the polynomial in log rho as diffusers has it; ComfyUI's `deis` puts it in the time
    of a linear schedule). Attributes as `DPM`, of which it is the form "heun" of kind "noise".
    """

    kind: Kind = field(default="noise", init=False)
    form: Form = field(default="heun", init=False)
    published: bool = field(default=False, init=False)
