"""Time of a training step against denoising_diffusion_pytorch, with the very same network, optimizer and pictures.

    python benchmarks/train_step.py --peer FOLDER [--pairs 10] [--out train_step.json]

FOLDER holds the peer (see peer_lucidrains.py). The network is Unet(dim=64, dim_mults=(1, 2, 4, 8)), 35.71 M parameters,
at 64 pixels, batch 8, Adam, gradients clipped at 1. Three contestants take turns in one process: the peer at its
default (float32), the peer at its best, and ours at what `train.precision` would be here. The best of either is
channels-last, with bfloat16 autocast where the processor multiplies bfloat16 itself (elsewhere that is many times
slower than float32). Prints the median time of each and the ratio of every pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_lucidrains
import torch
from torch import Tensor, nn

import sfumato

SIZE, BATCH = 64, 8
NETWORK: dict[str, Any] = {"dim": 64, "dim_mults": (1, 2, 4, 8)}
DIFFUSION: dict[str, Any] = {"image_size": SIZE, "timesteps": 1000, "objective": "pred_v", "beta_schedule": "sigmoid"}


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def stepper(diffusion: nn.Module, pictures: Tensor, *, bfloat16: bool, channels_last: bool) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    if channels_last:
        diffusion.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pictures = pictures.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = diffusion(pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def contestants(peer: Path) -> dict[str, Callable[[], float]]:
    """The three, with equal weights."""
    their_unet, their_diffusion = peer_lucidrains.load(peer)
    torch.manual_seed(0)
    weights = sfumato.Unet(**NETWORK).state_dict()
    print(f"{sum(t.numel() for t in weights.values()) / 1e6:.2f} M parameters, {torch.get_num_threads()} threads")
    pictures = torch.rand((BATCH, 3, SIZE, SIZE))

    def made(unet: Any, diffusion: Any, *, bfloat16: bool, channels_last: bool) -> Callable[[], float]:
        network = unet(**NETWORK)
        network.load_state_dict(weights)
        return stepper(diffusion(network, **DIFFUSION), pictures, bfloat16=bfloat16, channels_last=channels_last)

    native = native_bfloat16()
    best = "bfloat16" if native else "float32"
    return {
        "peer, float32": made(their_unet, their_diffusion, bfloat16=False, channels_last=False),
        f"peer, {best} channels-last": made(their_unet, their_diffusion, bfloat16=native, channels_last=True),
        f"ours, {best} channels-last": made(
            sfumato.Unet, sfumato.GaussianDiffusion, bfloat16=native, channels_last=True
        ),
    }


def measure(steps: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every step, contestants in turn; two rounds to warm up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(pairs + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds denoising_diffusion_pytorch")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    chosen = parser.parse_args()
    seconds = measure(contestants(chosen.peer), chosen.pairs)
    *peers, ours = seconds
    for name in seconds:
        print(f"{name:30} {statistics.median(seconds[name]):7.3f} s a step (median of {chosen.pairs})")
    for name in peers:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds[ours], strict=True))
        print(f"ours is {statistics.median(ratios):.2f} x as fast as {name} ({ratios[0]:.2f} … {ratios[-1]:.2f})")
    if chosen.out:
        chosen.out.write_text(json.dumps({"native_bfloat16": native_bfloat16(), "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
