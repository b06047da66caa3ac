"""The cost of the sampling loop itself, without a network, against diffusers' schedulers of the same name.

    python benchmarks/solver_loop.py [--steps 50] [--rounds 40] [--out solver_loop.json]

A latent of (1, 4, 64, 64), float32, unguided, no hook; the network returns a tensor that was made before. Each round
times our `sample` and their `step` loop in turn, grids and time steps made outside. Prints the median time of a whole
loop and the median ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from sfumato.diffusion import grid as grids
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import unguided
from sfumato.diffusion.sample import sample
from sfumato.diffusion.schedule import TableSchedule, scaled_linear_alpha_bar
from sfumato.diffusion.solvers import solver
from sfumato.random import NoiseSource

SHAPE = (4, 64, 64)
PAIRS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class Constant(nn.Module):
    """A network that costs nothing."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def ours(name: str, x: Tensor, out: Tensor, steps: int) -> Callable[[], Tensor]:
    schedule = TableSchedule(scaled_linear_alpha_bar())
    denoise = unguided(Denoiser(Constant(out), schedule))
    levels, method = grids.trailing(schedule, steps), solver(name)
    return lambda: sample(denoise, method, x, levels, schedule, noise=NoiseSource([0], SHAPE))


def theirs(name: str, x: Tensor, out: Tensor, steps: int) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """(what sets the scheduler back to its start, the loop)"""
    options: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name == "DDIMScheduler":
        options["clip_sample"] = False
    scheduler = getattr(diffusers, name)(**options, timestep_spacing="trailing")

    def loop() -> Tensor:
        state: Tensor = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(state, t)
            state = scheduler.step(out, t, state, return_dict=False)[0]
        return state

    return lambda: scheduler.set_timesteps(steps), loop


def seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(name: str, peer: str, steps: int, rounds: int) -> list[tuple[float, float]]:
    """(ours, theirs) of every round; three more to warm up."""
    x, out = torch.randn((2, 1, *SHAPE), generator=torch.Generator().manual_seed(0)).unbind()
    mine, (reset, other) = ours(name, x, out, steps), theirs(peer, x, out, steps)
    times = []
    for _ in range(rounds + 3):
        reset()
        times.append((seconds(mine), seconds(other)))
    return times[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    chosen = parser.parse_args()
    found = {}
    for name, peer in PAIRS.items():
        times = measure(name, peer, chosen.steps, chosen.rounds)
        a, b = (statistics.median(side) for side in zip(*times, strict=True))
        ratio = statistics.median(m / o for m, o in times)
        found[name] = {"ours": a, "diffusers": b, "ratio": ratio}
        print(f"{name:10} ours {1e3 * a:7.2f} ms, diffusers {1e3 * b:7.2f} ms: {ratio:.2f} of its time")
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
