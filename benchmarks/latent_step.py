"""Time of a latent training step against a plain diffusers loop: same network, weights, cached latents and text states.

    python benchmarks/latent_step.py [--rounds 10] [--threads N] [--compile] [--profile] [--out latent_step.json]

The network and the objective are those of the recipe `emoji`; the pictures, their captions and the first stage are
made up, so that nothing needs to be at hand but diffusers and the package of the text encoder. Ours is the trainer's
own step, whole: latents and states gathered into a batch, captions dropped, loss, gradient, clipping, AdamW, average.
The peer is what diffusers' training scripts do (`UNet2DConditionModel`, `DDPMScheduler.add_noise`, clipping,
`torch.optim.AdamW`, `EMAModel`); its batches, with the same padded contexts and masks, are gathered before the clock
runs. It takes part twice: in float32 with the usual memory layout, and channels-last under bfloat16 autocast.
`--compile` adds a fourth side, ours with `train.compile`, and some minutes for the compiler.
All take turns in one process, and who begins moves on every round. Prints seconds and ratios, of the clock on the wall
and of processor time, which on one thread other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.checkpoints.io import write_model
from sfumato.codecs import KLCodec
from sfumato.systems.codec import CodecConfig, CodecSystem, standardised
from sfumato.training import recipes
from sfumato.training.data import open_data
from sfumato.training.recipes.latent import LatentRecipe, LatentTask
from sfumato.training.report import Reporter
from sfumato.training.trainer import Tally, Trainer

RECIPE, PICTURES, SIZE = "emoji", 256, 64
OURS, PLAIN, BEST = "ours, as the recipe says", "diffusers, float32", "diffusers, bfloat16 channels-last"
COMPILED = "ours, with train.compile"
BARS = {PLAIN: 1.5, BEST: 1.1}
WORDS = ("red heart", "cat face with tears of joy", "sun behind small cloud", "fish", "open book", "sailboat at sea")
STYLES = ("noto", "fluent 3d", "fluent flat")


@dataclass(frozen=True)
class Given:
    """One batch as the peer gets it: latents (B, C, h, w), context (B, L, D) and its mask (B, L)."""

    latents: Tensor
    context: Tensor
    mask: Tensor


# --- ours ------------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path) -> None:
    """Pictures of noise with captions, and a first stage with random weights whose latents are standard."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        told = {"text": WORDS[i % len(WORDS)], "style": STYLES[i % len(STYLES)], "tags": WORDS[(i + 1) % len(WORDS)]}
        lines.append(json.dumps({"file_name": f"{i:03d}.png"} | told) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@torch.no_grad()
def write_codec(path: Path) -> None:
    """A first stage like the emoji codec, with random weights."""
    torch.manual_seed(0)
    network = {
        "block_out_channels": [24, 48, 96], "down_block_types": ["DownEncoderBlock2D"] * 3, "norm_num_groups": 8,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 1.0,
    }  # fmt: skip
    stage = CodecSystem.create(CodecConfig(kind="kl", size=SIZE, network=network))
    assert isinstance(stage.codec, KLCodec)
    noise = torch.rand((16, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = stage.codec.encode(noise)
    assert found.std is not None
    spread = (found.mean.var((0, 2, 3)) + found.std.square().mean((0, 2, 3))).sqrt()
    stage = standardised(stage, found.mean.mean((0, 2, 3)), spread)
    write_model(path, stage.tensors(), stage.config.model_dump(mode="json"))


def our_trainer(folder: Path, *settings: str) -> Trainer:
    """The trainer of the recipe, on made-up pictures."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
        write_codec(folder / "codec.safetensors")
    recipe = recipes.load(RECIPE, list(settings), str(folder / "pictures"), str(folder / "codec.safetensors"))
    assert isinstance(recipe, LatentRecipe)
    return Trainer(recipe.task(*open_data(recipe.data)), recipe.train, folder / "run", torch.device("cpu"))


@contextmanager
def our_step(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """The trainer's step, as `Trainer.train` makes it."""
    tally, stream = Tally(), trainer._batches().prefetch(0)
    with Reporter(trainer.run, trainer.config.steps, 0, speaks=False) as report:
        try:
            yield lambda: void(trainer._one_step(stream, tally, report))
        finally:
            stream.close()


def void(_: object) -> None:
    """Take a result and drop it."""


# --- the peer --------------------------------------------------------------------------------------------------------


def batches(trainer: Trainer, count: int) -> list[Given]:
    """Batches of the same cached latents and states, padded as ours are."""
    task, found, stream = trainer.task, [], trainer._batches()
    assert isinstance(task, LatentTask)
    conditioner, cache = task._conditioner, task._latents[id(task.data)]
    assert conditioner is not None
    for number in range(count):
        generator, batch = torch.Generator().manual_seed(number), stream.batch(number)
        told = task._entries(task.data, batch, generator, True, trainer.device)
        condition = conditioner.encode(told)
        assert condition.context is not None and condition.context_mask is not None
        found.append(Given(cache.rows(batch.indices).sample(generator), condition.context, condition.context_mask))
    return found


def their_step(trainer: Trainer, given: list[Given], *, best: bool) -> Callable[[], None]:
    """One step of diffusers' training scripts on our weights; `best` is channels-last under bfloat16 autocast."""
    diffusers, utils = importlib.import_module("diffusers"), importlib.import_module("diffusers.training_utils")
    task, o = trainer.task, trainer.config.optimizer
    assert isinstance(task, LatentTask)
    unet = task.model.denoiser.network
    network = diffusers.UNet2DConditionModel(**task.model.denoiser_config.to_dict())
    network.load_state_dict(unet.state_dict())
    check_same(unet, network, given[0])
    if best:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), o.lr, o.betas, o.eps, o.weight_decay)
    average = utils.EMAModel(network.parameters(), decay=trainer.config.ema.decay)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    turn = iter(range(10**9))

    def step() -> None:
        one = given[next(turn) % len(given)]
        noise = torch.randn_like(one.latents)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(noise),))
        noisy = scheduler.add_noise(one.latents, noise, times)
        target = scheduler.get_velocity(one.latents, noise, times)
        if best:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            out = network(noisy, times, one.context, encoder_attention_mask=one.mask, return_dict=False)[0]
        loss: Any = F.mse_loss(out.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        void(loss.item())  # which the scripts log

    return step


@torch.no_grad()
def check_same(ours: Any, theirs: Any, one: Given) -> None:
    """Refuse to time two networks that are not the same function."""
    times = torch.full((len(one.latents),), 500)
    wanted = theirs.eval()(one.latents, times, one.context, encoder_attention_mask=one.mask).sample
    found = ours.eval()(one.latents, times, context=one.context, context_mask=one.mask)
    theirs.train(), ours.train()
    difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if difference > 1e-4:
        raise SystemExit(f"the two networks differ by {difference:.1e} of the largest output")


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, by the clock on the wall and of processor time; two rounds to warm up are not counted."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    names, seconds = list(steps), {clock: {name: list[float]() for name in steps} for clock in clocks}
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = {clock: read() for clock, read in clocks.items()}
            steps[name]()
            if turn >= 2:
                for clock, read in clocks.items():
                    seconds[clock][name].append(read() - began[clock])
    return seconds


def profiled(step: Callable[[], None], count: int = 2) -> str:
    """Where our step spends its time, by operation."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(count):
            step()
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    diffusers = importlib.import_module("diffusers")
    native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return {
        "sfumato": sfumato.__version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(), "native_bfloat16": native,
        "load": [round(x, 1) for x in os.getloadavg()],
    }  # fmt: skip


def report(clock: str, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Print medians and ranges; returns the ratios."""
    print(f"by {clock} time:")
    for name, times in seconds.items():
        print(f"  {name:36} {statistics.median(times):7.3f} s a step ({min(times):.3f} … {max(times):.3f})")
    ratios = {}
    for name, bar in BARS.items():
        ratios[name] = [a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)]
        middle, low, high = statistics.median(ratios[name]), min(ratios[name]), max(ratios[name])
        print(f"  {middle:.2f} x as fast as {name} ({low:.2f} … {high:.2f} of {len(ratios[name])}; wanted {bar})")
    if COMPILED in seconds:
        ratios[COMPILED] = [b / a for a, b in zip(seconds[COMPILED], seconds[OURS], strict=True)]
        print(f"  {statistics.median(ratios[COMPILED]):.2f} x as fast with train.compile")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    parser.add_argument("--compile", action="store_true", help="measure ours with train.compile too")
    parser.add_argument("--profile", action="store_true", help="show where our step spends its time instead")
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the made-up latents are of no use later
        trainer = our_trainer(Path(folder))
        unet = trainer.task.model.denoiser.network  # type: ignore[attr-defined]
        count = sum(p.numel() for p in unet.parameters())
        about = environment() | {"precision": trainer.config.precision, "batch": trainer.config.batch}
        print(f"{count / 1e6:.2f} M parameters; " + ", ".join(f"{k} {v}" for k, v in about.items()))
        with our_step(trainer) as step:
            if chosen.profile:
                print(profiled(step))
                return
            given = batches(trainer, 16)
            peers = {name: their_step(trainer, given, best=name == BEST) for name in (PLAIN, BEST)}
            with ExitStack() as stack:
                sides = {OURS: step}
                if chosen.compile:
                    other = our_trainer(Path(folder), "train.compile=true")
                    sides[COMPILED] = stack.enter_context(our_step(other))
                seconds = measure(sides | peers, chosen.rounds)
    ratios = {clock: report(clock, found) for clock, found in seconds.items()}
    if chosen.out:
        chosen.out.write_text(json.dumps({"about": about, "seconds": seconds, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
