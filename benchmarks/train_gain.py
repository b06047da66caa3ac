"""Time of training steps in this tree against an earlier commit, both in one run.

    python benchmarks/train_gain.py [--before COMMIT] [--rounds 8] [--only NAME …] [--profile NAME]

Four steps are measured, those in bfloat16 only where it is asked for or the processor has it, on inputs that are made
up here:

latent     the trainer's own step of the recipe `emoji`: bfloat16, batch 32, latents 16 x 16 x 4, 17 text states of
           width 384, of which each text has some
latent-fp32  the same in float32
unet-bf16  `sfumato.Unet(dim=64, dim_mults=(1, 2, 4, 8))` in a user's loop, 64 pixels, batch 8: bfloat16 autocast,
           channels-last, clipping, Adam
unet-fp32  the same as the first tutorials have it, float32 and weights as they are made

Each side is a process of its own that imports its own sources (the earlier ones from `git archive`), and is told when
to make a step; the sides take turns. Prints medians of processor and wall time and their ratios; processor time is
disturbed less by other work on the machine. How far apart the losses of both are is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from earlier import ROOT, sources

BEFORE = "ed8bcb4"
NOW, EARLIER = "now", "earlier"
Step = Callable[[], float]


# --- the steps, made in a worker -------------------------------------------------------------------------------------


def latent_step(precision: str) -> Step:
    """The trainer's step of the recipe `emoji`, on made-up latents and text states."""
    import torch
    import yaml

    import sfumato
    from sfumato.condition import Condition
    from sfumato.diffusion.objective import Loss
    from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
    from sfumato.systems.config import PredictionConfig, ScheduleConfig, build_denoiser
    from sfumato.systems.ddpm import objective_from
    from sfumato.training.config import TrainConfig
    from sfumato.training.data import Batch
    from sfumato.training.report import Reporter
    from sfumato.training.trainer import Tally, Trainer

    recipe = yaml.safe_load((Path(sfumato.__file__).parent / "training/recipes/emoji.yaml").read_text())
    torch.manual_seed(0)
    model = recipe["model"]
    sizes = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 384}
    network = UNet2DConditionConfig.from_dict(model["network"] | sizes)
    schedule, prediction = ScheduleConfig(**model["schedule"]), PredictionConfig(**model["prediction"])
    denoiser = build_denoiser(lambda: UNet2DConditionModel(network), schedule, prediction, "cpu")
    objective = objective_from(recipe["objective"])
    tokens, size = 17, recipe["train"]["batch"]

    class Task:
        network, data, validation = denoiser.network, range(4096), None

        def begin(self, step: int) -> None:
            pass

        def loss(self, batch: Batch, generator: torch.Generator, device: torch.device) -> Loss:
            x0 = torch.randn((size, 4, 16, 16), generator=generator)
            context = torch.randn((size, tokens, 384), generator=generator)
            lengths = torch.randint(3, tokens + 1, (size, 1), generator=generator)
            lengths[0] = tokens
            condition = Condition(context=context, context_mask=torch.arange(tokens) < lengths)
            return objective(denoiser, x0, condition, generator=generator)

    def batches() -> Iterator[Batch]:
        while True:
            yield Batch(torch.empty(0), None, None, torch.arange(size))

    folder = Path(tempfile.mkdtemp())
    train = TrainConfig.model_validate(recipe["train"] | {"precision": precision})
    task: Any = Task()
    trainer, stream, tally = Trainer(task, train, folder, torch.device("cpu")), batches(), Tally()
    report = Reporter(folder, train.steps, 0, speaks=False)

    def step() -> float:
        before = float(tally.loss)
        trainer._one_step(stream, tally, report)
        return (float(tally.loss) - before) / float(size)

    return step


def unet_step(*, bfloat16: bool) -> Step:
    """A step of the article's network in a user's loop (`train_step.py`)."""
    import torch
    import train_step

    import sfumato

    torch.manual_seed(0)
    diffusion = sfumato.GaussianDiffusion(sfumato.Unet(dim=64, dim_mults=(1, 2, 4, 8)), **train_step.DIFFUSION)
    pictures = torch.rand((train_step.BATCH, 3, train_step.SIZE, train_step.SIZE))
    return train_step.stepper(diffusion, pictures, bfloat16=bfloat16, channels_last=bfloat16)


FLOAT32 = ("latent-fp32", "unet-fp32")
STEPS: dict[str, Callable[[], Step]] = {
    "latent": lambda: latent_step("bf16"),
    "latent-fp32": lambda: latent_step("fp32"),
    "unet-bf16": lambda: unet_step(bfloat16=True),
    "unet-fp32": lambda: unet_step(bfloat16=False),
}


def work(name: str) -> None:
    """A worker: a step for each line that comes in, told with its loss and its seconds (processor, wall)."""
    step = STEPS[name]()
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = step()
        print(json.dumps([loss, time.process_time() - processor, time.perf_counter() - wall]), flush=True)


def profile(name: str, count: int = 3) -> None:
    """Print where a step of this tree spends its time, by operation."""
    import torch

    step = STEPS[name]()
    step(), step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(count):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=60))


# --- the comparison --------------------------------------------------------------------------------------------------


class Side:
    """A worker process on one source tree."""

    def __init__(self, name: str, source: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", name],
            env=os.environ | {"PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> tuple[float, float, float]:
        """Loss, processor seconds, wall seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker has ended early; what it says stands above")
        loss, processor, wall = json.loads(line)
        return loss, processor, wall

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, trees: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Let both sides take turns at one kind of step; the first two rounds warm up."""
    sides = {side: Side(name, tree) for side, tree in trees.items()}
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    try:
        for turn in range(rounds + 2):
            for side in (NOW, EARLIER) if turn % 2 else (EARLIER, NOW):
                found[side].append(sides[side].step())
    finally:
        for one in sides.values():
            one.close()
    for clock, column in (("processor", 1), ("wall", 2)):
        seconds = {side: [one[column] for one in steps[2:]] for side, steps in found.items()}
        pairs = sorted(a / b for a, b in zip(seconds[EARLIER], seconds[NOW], strict=True))
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        print(
            f"{name:10} {clock:9} earlier {medians[EARLIER]:7.3f} s, now {medians[NOW]:7.3f} s: "
            f"{statistics.median(pairs):.2f} x as fast ({pairs[0]:.2f} … {pairs[-1]:.2f})",
            flush=True,
        )
    apart = max(abs(a[0] - b[0]) / abs(a[0]) for a, b in zip(found[EARLIER], found[NOW], strict=True))
    print(f"{name:10} losses of {rounds + 2} steps at most {apart:.1e} apart (relative)", flush=True)
    return {side: {"loss_processor_wall": steps} for side, steps in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="[those that the processor has the types for]")
    parser.add_argument("--profile", choices=list(STEPS), help="show where this tree's step spends its time instead")
    parser.add_argument("--work", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    chosen = parser.parse_args()
    if chosen.work:
        return work(chosen.work)
    if chosen.profile:
        return profile(chosen.profile)
    import torch

    from sfumato.backends.devices import native_bfloat16

    with tempfile.TemporaryDirectory() as folder:
        trees = {EARLIER: sources(chosen.before, Path(folder)), NOW: ROOT / "src"}
        names = chosen.only or (STEPS if native_bfloat16(torch.device("cpu")) else FLOAT32)
        found = {name: compare(name, trees, chosen.rounds) for name in names}
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
