"""The lists that the solvers' tests run over: a new solver joins here and gets all of them."""

from __future__ import annotations

from typing import Any

from sfumato.diffusion.solvers import Ancestral, Churn, Euler, Heun, Solver
from sfumato.diffusion.solvers.consistency import LCM, TCD
from sfumato.diffusion.solvers.deis import DEIS
from sfumato.diffusion.solvers.dpm import DPM, DPMSingle
from sfumato.diffusion.solvers.dpm2 import DPM2, DPM2Ancestral
from sfumato.diffusion.solvers.dpm_adaptive import DPMAdaptive, DPMFast
from sfumato.diffusion.solvers.dpmpp_ancestral import DPMpp2SAncestral
from sfumato.diffusion.solvers.dpmpp_sde import DPMppMultistepSDE, DPMppSDE, SDEDPMSolver
from sfumato.diffusion.solvers.euler_ancestral import EulerAncestral
from sfumato.diffusion.solvers.flow_heun import FlowHeun
from sfumato.diffusion.solvers.multistep import LMS, PLMS
from sfumato.diffusion.solvers.sa_solver import SASolver
from sfumato.diffusion.solvers.unipc import UniPC

DETERMINISTIC: dict[str, Solver[Any]] = {
    "euler (ddim)": Euler(),
    "heun": Heun(),
    "heun (flow)": FlowHeun(),
    "dpm 2": DPM2(),
    "dpm fast": DPMFast(),
    "dpm adaptive 2": DPMAdaptive(solver_order=2, h_init=1.0),
    "dpm adaptive 3": DPMAdaptive(h_init=1.0),
    "sa-solver, tau 0": SASolver(tau=0.0),
    "sa-solver 3, tau 0": SASolver(3, 3, tau=0.0, lower_order_final=False),
    "sa-solver 3, 4, tau 0": SASolver(3, 4, tau=0.0, lower_order_final=False),
    **{f"lms {order}": LMS(order) for order in (1, 2, 3, 4)},
    "ipndm_v": LMS(denoise_last=True),
    "plms": PLMS(),
    "pndm, runge-kutta start": PLMS("prk"),
    "ipndm": PLMS("euler", denoise_last=True),
    "dpm++ 1": DPM(1),
    "dpm++ 2m": DPM(),
    "dpm++ 2m heun": DPM(form="heun"),
    "dpm++ 3m": DPM(3),
    "dpm 2m": DPM(kind="noise"),
    "dpm 2m heun": DPM(kind="noise", form="heun"),
    "dpm 3m": DPM(3, kind="noise"),
    "dpm++ 2s": DPMSingle(),
    "dpm++ 2s heun": DPMSingle(form="heun"),
    "dpm++ 3s": DPMSingle(3, lower_order_final=False),
    "dpm++ 3s heun": DPMSingle(3, form="heun", lower_order_final=False),
    "dpm 2s": DPMSingle(kind="noise"),
    "dpm 3s": DPMSingle(3, kind="noise", lower_order_final=False),
    "deis 2": DEIS(),
    "deis 3": DEIS(3),
    "unipc bh1": UniPC(variant="bh1"),
    "unipc bh2": UniPC(),
    "unipc bh2, noise": UniPC(kind="noise"),
    "unipc 1": UniPC(1, lower_order_final=False),
    "unipc 3": UniPC(3, lower_order_final=False),
    "unipc 3 bh1, noise": UniPC(3, "bh1", "noise", lower_order_final=False),
}

STOCHASTIC: dict[str, Solver[Any]] = {
    "ddpm small": Ancestral(),
    "ddpm large": Ancestral(variance="large"),
    "ddim eta 0.5": Euler(eta=0.5),
    "ddim eta 1": Euler(eta=1.0),
    "euler churn": Euler(churn=Churn(10.0)),
    "euler ancestral": EulerAncestral(),
    "dpm 2 ancestral": DPM2Ancestral(),
    "dpm++ 2s ancestral": DPMpp2SAncestral(),
    "dpm++ sde": DPMppSDE(),
    "dpm++ sde, fresh": DPMppSDE(increments="fresh"),
    "dpm++ 2m sde": DPMppMultistepSDE(),
    "dpm++ 2m sde heun": DPMppMultistepSDE(kind="heun"),
    "dpm++ 3m sde": DPMppMultistepSDE(3, "heun"),
    "sde-dpm-solver": SDEDPMSolver(),
    "sa-solver": SASolver(),
    "sa-solver 3, 4": SASolver(3, 4, interval=(0.0, 1.0)),
    "dpm fast, eta 1": DPMFast(eta=1.0),
    "dpm adaptive, eta 1": DPMAdaptive(eta=1.0),
    "lcm": LCM(),
    "tcd": TCD(),
}
