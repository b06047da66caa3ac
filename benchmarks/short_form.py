"""The known quick start, ours and denoising_diffusion_pytorch's, on the same lines in one run.

    python benchmarks/short_form.py --peer FOLDER [--calls N] [--out short_form.json]

FOLDER holds the peer (see peer_lucidrains.py). Each side makes the network, one loss with its gradients, and four
pictures of 128 pixels in 1,000 steps; the same threads, float32, the same weights. `--calls` ends both samplings after
so many calls of the network, for a quick look.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peer_lucidrains
import torch
from torch import Tensor, nn

import sfumato


class Enough(Exception):
    """The calls that were asked for have been made."""


def stop_after(model: nn.Module, calls: int) -> None:
    """Make the network's call number `calls + 1` raise `Enough`."""
    made = 0

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal made
        if made == calls:
            raise Enough
        made += 1

    model.register_forward_pre_hook(count)


def quick_start(unet: Any, gaussian_diffusion: Any, weights: dict[str, Tensor], calls: int | None) -> dict[str, float]:
    """The lines themselves, timed. (The peer's present version has no `loss_type`; its loss is L2.)"""
    ours = gaussian_diffusion is sfumato.GaussianDiffusion
    began = time.perf_counter()
    model = unet(dim=64, dim_mults=(1, 2, 4, 8))
    model.load_state_dict(weights)
    diffusion = gaussian_diffusion(model, image_size=128, timesteps=1000, **({"loss_type": "l1"} if ours else {}))
    training_images = torch.rand(8, 3, 128, 128)
    loss = diffusion(training_images)
    loss.backward()
    trained = time.perf_counter()
    if calls is not None:
        stop_after(model, calls)
    try:
        sampled_images = diffusion.sample(batch_size=4)
        assert sampled_images.shape == (4, 3, 128, 128)
    except Enough:
        pass
    return {"loss and gradients": trained - began, "pictures": time.perf_counter() - trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds denoising_diffusion_pytorch")
    parser.add_argument("--calls", type=int, help="end the sampling after so many calls of the network")
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    weights = sfumato.Unet(dim=64, dim_mults=(1, 2, 4, 8)).state_dict()
    sides = {"ours": (sfumato.Unet, sfumato.GaussianDiffusion), "peer": peer_lucidrains.load(chosen.peer)}
    times = {name: quick_start(*side, weights, chosen.calls) for name, side in sides.items()}
    for part in times["ours"]:
        a, b = times["ours"][part], times["peer"][part]
        print(f"{part:20} ours {a:8.1f} s, peer {b:8.1f} s: ours is {b / a:.2f} x as fast")
    total = {name: sum(parts.values()) for name, parts in times.items()}
    print(f"{'in all':20} ours {total['ours']:8.1f} s, peer {total['peer']:8.1f} s")
    if chosen.out:
        chosen.out.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
