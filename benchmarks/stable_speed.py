"""Time of guided steps and of the decoder of Stable Diffusion 1.5 against diffusers, and against OpenVINO's own.

    python benchmarks/stable_speed.py [--size 512] [--rounds 5] [--sides NAME …] [--errors] [--out stable_speed.json]

All sides hold the same random weights of the published size and take turns in one process; who begins moves on every
round. A step is what a program does between two latents: both branches of guidance in one call of the network, their
mixture, one step of DDIM. Ours goes through the library's denoiser, guidance and solver; diffusers through its network
and `DDIMScheduler`: in bfloat16 with channels-last (`nhwc`), in bfloat16 and in float32 as it comes, in float32 with
channels-last. `sfumato` computes in bfloat16, `sfumato-fp32` in float32. `openvino` is the network of diffusers
converted by OpenVINO in bfloat16, driven the same way; `sfumato-openvino` our own path there. Prints the median
seconds, what they are of the peers', and the share of the machine's own rate of products in the type of the first side.
`--errors` tells instead how far one call of the network in bfloat16 lies from float32, ours and diffusers'.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfumato
from sfumato import api
from sfumato.backends.attention import chosen, using
from sfumato.backends.devices import native_bfloat16
from sfumato.condition import Condition
from sfumato.diffusion import grid as grids
from sfumato.diffusion.guidance import classifier_free
from sfumato.diffusion.sample import sample
from sfumato.diffusion.solvers import find
from sfumato.random import NoiseSource
from sfumato.systems.config import DTYPES
from sfumato.tasks.bench import matmul_rate

FAMILY, SCALE = "sd1", 7.5
BEST, HALF, DEFAULT, FOREIGN = "diffusers-bf16-nhwc", "diffusers-bf16", "diffusers-fp32", "openvino"
FULL, WIDE = "sfumato-fp32", "diffusers-fp32-nhwc"
SIDES = ("sfumato", BEST, HALF, DEFAULT, FOREIGN, "sfumato-openvino", FULL, WIDE)
Side = tuple[Callable[[], Any], Callable[[], Any]]
"""One guided step and one decoding."""


def given(size: int) -> dict[str, Tensor]:
    """Latents and the two contexts, the same for every side."""
    def noise(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return {"x": noise(0, 1, 4, size // 8, size // 8), "said": noise(1, 1, 77, 768), "null": noise(2, 1, 77, 768)}


def ours(model: api.Model, one: dict[str, Tensor]) -> Side:
    """The library's own way from one latent to the next."""
    denoiser, schedule = model.denoiser, model.denoiser.schedule
    denoise = classifier_free(denoiser, Condition(context=one["said"]), Condition(context=one["null"]), SCALE)
    solver, levels = find("ddim")[0].build(), grids.grid("trailing", schedule, 50)[20:22]
    noise = NoiseSource([0], tuple(one["x"].shape[1:]))

    @torch.no_grad()
    def step() -> Tensor:
        with using(chosen(DTYPES[model.dtype], torch.device("cpu"))):
            return sample(denoise, solver, one["x"], levels, schedule, noise=noise)

    return step, lambda: model.system.pictures(one["x"])


def _calls(unet: Any, vae: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """diffusers' network and decoder as functions of tensors."""
    return lambda x, t, c: unet(x, t, c, return_dict=False)[0], lambda z: vae.decode(z, return_dict=False)[0]


def theirs(model: api.Model, dtype: torch.dtype, *, channels_last: bool = False) -> tuple[Any, Any]:
    """diffusers' networks with our weights."""
    diffusers = importlib.import_module("diffusers")
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    parts = model.system.networks()
    for network, own in ((unet, parts["network"]), (vae, parts["codec"])):
        network.load_state_dict({name: value.float() for name, value in own.state_dict().items()})
        network.eval().requires_grad_(False).to(dtype)
        if channels_last:
            network.to(memory_format=torch.channels_last)
    return unet, vae


def driven(unet: Callable[[Tensor, Any, Tensor], Tensor], decode: Callable[[Tensor], Any], one: dict[str, Tensor],
           dtype: torch.dtype) -> Side:  # fmt: skip
    """The loop of diffusers' pipeline around a network."""
    diffusers = importlib.import_module("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        clip_sample=False, set_alpha_to_one=False)  # fmt: skip
    scheduler.set_timesteps(50)
    x, context = one["x"].to(dtype), torch.cat([one["null"], one["said"]]).to(dtype)
    t = scheduler.timesteps[20]

    @torch.no_grad()
    def step() -> Tensor:
        out = unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, context)
        null, said = out.chunk(2)
        following: Tensor = scheduler.step(null + SCALE * (said - null), t, x).prev_sample
        return following

    @torch.no_grad()
    def decoded() -> Any:
        return decode(x)

    return step, decoded


def converted(unet: Any, vae: Any, one: dict[str, Tensor]) -> Side:
    """diffusers' own networks under OpenVINO, bfloat16."""
    ov = importlib.import_module("openvino")
    x, t = torch.cat([one["x"]] * 2), torch.tensor(500)
    context = torch.cat([one["null"], one["said"]])

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            out: Tensor = self.unet(x, t, context, return_dict=False)[0]
            return out

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, z: Tensor) -> Tensor:
            out: Tensor = self.vae.decode(z, return_dict=False)[0]
            return out

    hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY",
             "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip

    def compiled(module: torch.nn.Module, example: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            model = ov.convert_model(module, example_input=example, input=[tuple(e.shape) for e in example])
        return ov.Core().compile_model(model, "CPU", hints)

    network, decoder = compiled(Plain(), (x, t, context)), compiled(Decoder(), (one["x"],))

    def call(x: Tensor, t: Any, context: Tensor) -> Tensor:
        return torch.from_numpy(network([x.numpy(), t.numpy(), context.numpy()])[0])

    return driven(call, lambda z: decoder([z.numpy()])[0], one, torch.float32)


def sides(names: list[str], size: int) -> dict[str, Side]:
    """Every side that is asked for, ready to run."""
    one, found = given(size), dict[str, Side]()
    model = api.random_model(FAMILY, dtype="float32" if all("fp32" in name for name in names) else "bfloat16")
    if "sfumato" in names:
        found["sfumato"] = ours(model, one)
    if FULL in names:
        whole = model if model.dtype == "float32" else api.random_model(FAMILY, dtype="float32")
        found[FULL] = ours(whole, one)
    if "sfumato-openvino" in names:
        foreign = api.random_model(FAMILY, dtype="bfloat16", backend="openvino")
        found["sfumato-openvino"] = ours(foreign, one)
    for name in (BEST, HALF, DEFAULT, WIDE):
        if name in names:
            dtype = torch.float32 if "fp32" in name else torch.bfloat16
            unet, vae = theirs(model, dtype, channels_last="nhwc" in name)
            found[name] = driven(*_calls(unet, vae), one, dtype)
    if FOREIGN in names:
        found[FOREIGN] = converted(*theirs(model, torch.float32), one)
    return found


def measured(found: dict[str, Side], rounds: int, part: int) -> dict[str, list[float]]:
    """Seconds of each round of one part (0: step, 1: decoder), after one that does not count.

    In each turn the second of two is timed: a step follows one of its own, as in a picture, not one of another side,
    which has left other memory behind.
    """
    names, seconds = list(found), {name: list[float]() for name in found}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name][part]()
            began = time.perf_counter()
            found[name][part]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@torch.no_grad()
def errors(size: int, times: tuple[float, ...] = (100.0, 500.0, 900.0)) -> None:
    """Relative errors of one call in bfloat16 against float32 by the norm, at some times."""
    one = given(size)
    x, context = torch.cat([one["x"]] * 2), torch.cat([one["null"], one["said"]])
    found: dict[str, list[Tensor]] = {}
    model = api.random_model(FAMILY, dtype="float32")
    exact = [model.denoiser.network(x, torch.tensor([t, t]), context=context) for t in times]
    del model
    half, bf16 = api.random_model(FAMILY, dtype="bfloat16"), torch.bfloat16
    small, said = x.to(bf16), context.to(bf16)
    for kernel in ("sdpa", "adaptive"):
        with using(kernel):
            network = half.denoiser.network
            found[f"sfumato, {kernel}"] = [network(small, torch.tensor([t, t]), context=said) for t in times]
    unet = theirs(half, bf16, channels_last=True)[0]
    found["diffusers"] = [unet(small, torch.tensor(t), said, return_dict=False)[0] for t in times]
    for name, values in found.items():
        parts = [float((v.float() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)]
        print(f"{name:20}" + "  ".join(f"t {t:.0f}: {part:.5f}" for t, part in zip(times, parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decodes", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="[in bfloat16 where the processor has it]")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.errors:
        errors(args.size)
        return
    native = native_bfloat16(torch.device("cpu"))
    args.sides = args.sides or (["sfumato", BEST, HALF, DEFAULT] if native else [FULL, DEFAULT, WIDE])
    kind = torch.float32 if "fp32" in args.sides[0] else torch.bfloat16
    rate, found = matmul_rate(kind, torch.device("cpu")), sides(args.sides, args.size)
    times = {"step": measured(found, args.rounds, 0)}
    times["decode"] = measured(found, args.decodes, 1) if args.decodes else {}
    work = 1.606e12 * (args.size / 512) ** 2 if args.size == 512 else None
    for part, seconds in times.items():
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            against = "  ".join(f"{other} {medians[other] / median:5.2f} x" for other in medians if other != name)
            share = f"{work / median / rate:4.0%} of the rate" if part == "step" and work else ""
            print(f"{part:7}{name:18}{median:7.2f} s  {share}  {against}")
    if args.out is not None:
        known = {"rate": rate, "size": args.size, "threads": torch.get_num_threads(), "cpu": platform.processor()}
        known |= {"torch": str(torch.__version__), "sfumato": sfumato.__version__, "seconds": times}
        args.out.write_text(json.dumps(known, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
