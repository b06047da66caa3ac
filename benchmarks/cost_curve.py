"""How the time and the memory of Stable Diffusion 1.5 grow with size and batch, ours beside diffusers'.

    python benchmarks/cost_curve.py [--sizes 256 512 768] [--batches 1 2 4] [--out cost_curve.json] [--plot cost.png]

Random weights of the published size, bfloat16, channels-last on both sides; ours is the library's default path. Every
point is a process of its own: a guided step (both branches in one call), the better of two after one to warm up (the
second of two, or the only one, where they are long), and the most memory that the process has held by then
(ru_maxrss), which counts libraries and weights. The two sides of a point follow one another. Prints a table; `--plot`
draws it (matplotlib). The whole takes a quarter of an hour: points that are in the file `--out` are taken from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

COMMON = """
import json, resource, sys, time, torch
size, batch = int(sys.argv[1]), int(sys.argv[2])
x = torch.randn(2 * batch, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
context = torch.randn(2 * batch, 77, 768, generator=torch.Generator().manual_seed(1))
def told(step):
    seconds = []
    with torch.no_grad():
        area = batch * (size / 512) ** 2
        for _ in range(3 if area <= 1 else 2 if area <= 2.5 else 1):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"step": min(seconds[1:] or seconds), "memory": memory}))
def filled(make):
    # random weights, quickly: a million numbers again and again
    with torch.device("meta"):
        network = make()
    network = network.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    some = torch.randn(2 ** 20, generator=torch.Generator().manual_seed(2)).mul_(0.02).bfloat16()
    for parameter in network.parameters():
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(some)):
            part = flat[start : start + len(some)]
            part.copy_(some[: len(part)])
    return network.to(memory_format=torch.channels_last)
"""
OURS = COMMON + """
from sfumato.backends import convolutions, registry
from sfumato.backends.attention import chosen, using
from sfumato.condition import Condition
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
network = filled(lambda: UNet2DConditionModel(UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)))
cpu, half = torch.device("cpu"), torch.bfloat16
registry.engage("torch", {"network": network}, cpu, half, convolutions.chosen(half, cpu))
from sfumato.diffusion.denoiser import Denoiser
from sfumato.systems.config import ScheduleConfig
denoiser = Denoiser(network, ScheduleConfig(name="scaled_linear").build())
level = denoiser.schedule.level(torch.tensor(500.0, dtype=torch.float64))
with using(chosen(half, cpu)):
    told(lambda: denoiser(x, level, Condition(context=context), None))
"""
THEIRS = COMMON + """
from diffusers import UNet2DConditionModel
network = filled(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
x, context = x.bfloat16(), context.bfloat16()
told(lambda: network(x, torch.tensor(500), context, return_dict=False))
"""
SIDES = {"sfumato": OURS, "diffusers": THEIRS}


def point(side: str, size: int, batch: int) -> dict[str, float]:
    """Seconds and bytes of one side at one size and batch."""
    command = [sys.executable, "-c", SIDES[side], str(size), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"size": size, "batch": batch}


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Seconds and gigabytes by size, one line for each side and batch."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    batches = sorted({one["batch"] for one in found["sfumato"]})
    parts = (("step", 1, "seconds a guided step"), ("memory", 1e9, "peak memory, GB"))
    for axis, (key, unit, title) in zip(axes, parts, strict=True):
        for side, style in (("sfumato", "-o"), ("diffusers", "--s")):
            for i, batch in enumerate(batches):
                line = sorted((one["size"], one[key] / unit) for one in found[side] if one["batch"] == batch)
                label = f"{side}, batch {batch:.0f}"
                axis.plot(*zip(*line, strict=True), style, color=f"C{i}", label=label, markersize=4)
        axis.set(xlabel="side in pixels", title=title, xticks=sorted({one["size"] for one in found["sfumato"]}))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    if args.out is not None and args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
    for size in args.sizes:
        for batch in args.batches:
            known = [[one for one in found[side] if (one["size"], one["batch"]) == (size, batch)] for side in SIDES]
            if not all(known):
                known = [[point(side, size, batch)] for side in SIDES]
                for side, (new,) in zip(SIDES, known, strict=True):
                    found[side].append(new)
            ours, theirs = (one[0] for one in known)
            print(
                f"{size} px x {batch}: sfumato {ours['step']:6.2f} s {ours['memory'] / 1e9:5.2f} GB, "
                f"diffusers {theirs['step']:6.2f} s {theirs['memory'] / 1e9:5.2f} GB: "
                f"{theirs['step'] / ours['step']:.2f} x, {ours['memory'] / theirs['memory']:.0%} of the memory",
                flush=True,
            )
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if args.plot is not None:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
