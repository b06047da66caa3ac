"""`sfumato bench`: how fast a model draws on this machine, by kernel and type, each in a process of its own.

>>> bench.__name__
'bench'
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from sfumato.cli.drawing import AllowPickle, AsJson, Device, ModelName, Offload
from sfumato.cli.options import whole
from sfumato.errors import UserError, raise_unknown

DTYPES = ("float32", "bfloat16")
FOREIGN = "openvino"
Side = Annotated[int | None, typer.Option(parser=whole(8), metavar="N", help="In pixels. [the model's own]")]


def bench(
    model: ModelName = None,
    random: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Random weights of a published size instead: sd1, sd2-v …")
    ] = None,
    width: Side = None,
    height: Side = None,
    batch: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Pictures at once.")] = 1,
    steps: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Steps of the picture that is told.")] = 25,
    kernel: Annotated[list[str] | None, typer.Option(help="Attention kernels. [all that suit the type]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Types. [float32; bfloat16 where the device has it]")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="torch, compile, openvino. [torch]")] = None,
    convolution: Annotated[str, typer.Option(help="Of torch: auto, direct, winograd.")] = "auto",
    repeat: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Timings of each part.")] = 3,
    device: Device = "auto",
    offload: Offload = "auto",
    profile: Annotated[bool, typer.Option("--profile", help="Where a step's time goes, by kind of layer.")] = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    one: Annotated[bool, typer.Option("--one", hidden=True, help="Measure here, one kernel and one type.")] = False,
) -> None:
    """Time guided steps and the decoder, with memory, and the share of the machine's own rate that they reach."""
    import sfumato.backends.attention  # noqa: F401  (its kernels are known by name from here on)
    from sfumato.backends import convolutions, registry
    from sfumato.backends import offload as offloading
    from sfumato.backends.devices import choose_device, native_bfloat16
    from sfumato.networks.attention import KERNELS
    from sfumato.systems.config import DTYPES as DTYPES_OF

    native = list(DTYPES) if native_bfloat16(choose_device(device)) else ["float32"]
    kernels, dtypes, backends = kernel or ["sdpa"], dtype or native, backend or ["torch"]
    for name in kernels:
        if name not in KERNELS:
            raise_unknown("attention kernel", name, KERNELS)
    for name in dtypes:
        if name not in (*DTYPES, "float16"):
            raise_unknown("dtype", name, (*DTYPES, "float16"))
    for name in backends:
        for kind in dtypes:
            offloading.check(offload, choose_device(device), registry.chosen(name), DTYPES_OF[kind])
    if convolution not in ("auto", *convolutions.ALGORITHMS):
        raise_unknown("way of convolving", convolution, ("auto", *convolutions.ALGORITHMS))
    for name in backends:
        if registry.chosen(name) != "torch" and profile:
            raise UserError(f"--profile is torch's and sees nothing of backend {name}; leave one of them out")
    if kernel is not None and not one and set(backends) == {FOREIGN}:
        raise UserError(f"backend {FOREIGN} has an attention of its own; leave --kernel out")
    if model is not None and random is not None:
        raise UserError("--model and --random each say what is measured; give one of them")
    if one:
        print(json.dumps(_measure(model, random, width, height, batch, kernels[0], dtypes[0], repeat, device, profile,
                                  allow_pickle, backends[0], convolution, offload)))  # fmt: skip
        return
    shared = [] if model is None else ["--model", model]
    shared += [] if random is None else ["--random", random]
    shared += [] if width is None else ["--width", str(width)]
    shared += [] if height is None else ["--height", str(height)]
    shared += ["--batch", str(batch), "--repeat", str(repeat), "--device", device, *["--profile"] * profile]
    shared += [*["--allow-pickle"] * allow_pickle, "--convolution", convolution, "--offload", offload]
    found = []
    for kind in dtypes:
        more = ["adaptive"] if kernel is None and kind != "float32" else []  # for float32 it is sdpa
        for by in backends:
            for name in kernels[:1] if by == FOREIGN else [*kernels, *more]:
                found.append(_in_a_process([*shared, "--backend", by, "--kernel", name, "--dtype", kind]))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _table(found, steps, batch)


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own, so that memory is its own too."""
    command = [sys.executable, "-m", "sfumato", "bench", "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(last.removeprefix("sfumato: "))
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _measure(
    model: str | None, random: str | None, width: int | None, height: int | None, batch: int, kernel: str, dtype: str,
    repeat: int, device: str, profile: bool, allow_pickle: bool, backend: str, convolution: str,
    offload: str,
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import asdict

    from sfumato import api
    from sfumato.networks.attention import set_attention_kernel
    from sfumato.systems.ddpm import DDPM
    from sfumato.tasks.bench import measured, shares

    set_attention_kernel(kernel)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "convolution": convolution}
    how["offload"] = offload
    if random is not None:
        opened = api.random_model(random, **how)
    else:
        opened = api.load(model, allow_pickle=allow_pickle, **how)
    size = opened.system.config.size
    w, h = width or size, height or size
    if isinstance(opened.system, DDPM) and (w, h) != (size, size):
        what, other = ("width", w) if w != size else ("height", h)
        raise UserError(f"model {opened.name} draws {size} x {size} pixels; {what} {other} cannot be had")
    speed = measured(opened.system, w, h, batch=batch, repeat=repeat)
    known = {"model": opened.name, "width": w, "height": h, "batch": batch, "kernel": kernel, "dtype": dtype}
    known |= {"backend": opened.backend, "convolution": opened.convolution, "offload": opened.offload}
    known |= asdict(speed) | {"share": speed.share}
    return known | ({"profile": shares(opened.system, w, h, batch=batch)} if profile else {})


def _megabytes(memory: int | None) -> str:
    return "unknown" if memory is None else f"{memory / 2**20:.0f} MB"


def _way(row: dict[str, Any]) -> str:
    """Who computed, in a few words: torch's attention kernel, or the backend."""
    if row["backend"] == FOREIGN:
        return FOREIGN
    from sfumato.backends import offload as offloading

    parts = [row["kernel"], *[row["convolution"]] * (row["convolution"] != "direct")]
    parts = parts if row["backend"] == "torch" else [row["backend"], row["kernel"]]
    return ", ".join([*parts, *[offloading.told(row["offload"])] * (row["offload"] != "never")])


def _table(found: list[dict[str, Any]], steps: int, batch: int) -> None:
    one = found[0]
    work = f"{one['step_flop'] / 1e12:.3g} TFLOP a step"
    print(f"{one['model']}, {one['width']} x {one['height']}, batch {batch}: {work}")
    heads = ("s/step", f"s/{steps} steps", "decode", "of matmul", "memory")
    print(f"{'type':9} {'computed by':17} {heads[0]:>8} {heads[1]:>11} {heads[2]:>8} {heads[3]:>9} {heads[4]:>9}")
    for row in found:
        whole = steps * row["step"] + row["decode"]
        print(
            f"{row['dtype']:9} {_way(row):17} {row['step']:8.3f} {whole:11.1f} {row['decode']:8.2f} "
            f"{row['share']:9.0%} {_megabytes(row['memory']):>9}"
        )
        for kind, part in row.get("profile", {}).items():
            share = f"{part['flop'] / part['seconds'] / row['rate']:9.0%}" if part["flop"] and part["seconds"] else ""
            print(f"{'':9} {kind:17} {part['seconds']:8.3f} {'':11} {'':8} {share:>9}")
