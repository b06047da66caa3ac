"""Time to open Stable Diffusion 1.5, time from a cold process to the first step, and memory, against diffusers.

    python benchmarks/stable_start.py [--rounds 3] [--size 512] [--dtype float32] [--work FOLDER]

A model of the published size with random weights is written once: a folder in diffusers' layout and a single file, both
float16, both opened in one type: bfloat16 where the processor has it, else float32 (diffusers gets `low_cpu_mem_usage`
and `torch_dtype`, its best setting). In float32 two sides more let the weights rest in 16 bits, one of them without
transformed kernels. Every measurement is a process of its own; sides take turns. "load" is the call that opens the
model; what is imported before differs (diffusers imports transformers with its pipeline, Sfumato when it opens a model
that needs it), so "open", from the process's start to the opened model, is what compares. "cold" is from the start to
the end of the first guided step, "step" the second one, "peak" the most memory it has held (ru_maxrss) after two steps
and the decoder. The files are in the page cache.
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
from pathlib import Path
from typing import Any

import torch

from sfumato.backends.devices import native_bfloat16

OURS, FILE, THEIRS = "sfumato, folder", "sfumato, single file", "diffusers, folder"
HALF, LEAN = "sfumato, half", "sfumato, half, direct"

START = """
import json, os, resource, sys, time
path, size, began, dtype = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
known, options = {}, json.loads(sys.argv[5])
def first(*_):
    now = time.time() - began
    known["step"], known["last"] = now - known.get("last", 0), now
    known.setdefault("cold", now)
"""
FIGURES = """
known["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(known))
"""
SFUMATO = START + """
import sfumato
from sfumato import api
known["imports"] = time.time() - began
at = time.time()
model = sfumato.load(path, dtype=dtype, **options)
known["load"] = time.time() - at
def hook(x, level, prediction, noise):
    if prediction is not None:
        first()
    return x
model.generate("a red heart", negative="blue", steps=2, seed=0, guidance=7.5, width=size, height=size, sampler="ddim",
               on_step=hook)
""" + FIGURES
DIFFUSERS = START + """
import torch
from diffusers import StableDiffusionPipeline, DDIMScheduler
known["imports"] = time.time() - began
at = time.time()
pipe = StableDiffusionPipeline.from_pretrained(path, torch_dtype=getattr(torch, dtype), low_cpu_mem_usage=True)
known["load"] = time.time() - at
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.unet.to(memory_format=torch.channels_last)
pipe.set_progress_bar_config(disable=True)
def hook(pipe, step, t, values):
    first()
    return values
pipe("a red heart", negative_prompt="blue", num_inference_steps=2, guidance_scale=7.5, width=size, height=size,
     generator=torch.Generator().manual_seed(0), callback_on_step_end=hook)
""" + FIGURES


def prepare(folder: Path) -> dict[str, Path]:
    """The model in both layouts, written where it is not there yet."""
    from sfumato import api
    from sfumato.systems.exchange import save_folder
    from sfumato.systems.latent import Latent
    from sfumato.systems.stable_diffusion import write_single_file

    paths = {"folder": folder / "sd", "file": folder / "sd.safetensors"}
    if not all(path.exists() for path in paths.values()):
        model = api.random_model("sd1", dtype="float16")
        assert isinstance(model.system, Latent)
        save_folder(model.system, paths["folder"])
        write_single_file(model.system, paths["file"])
    return paths


def run(script: str, path: Path, options: dict[str, str], size: int, dtype: str) -> dict[str, float]:
    """One process of one side."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", script, str(path), str(size), str(time.time()), dtype, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"open": found["imports"] + found["load"]}


def report(seconds: dict[str, list[dict[str, float]]], weights: int) -> dict[str, dict[str, Any]]:
    """Medians, and what they are of the peer's."""
    medians = {name: {key: statistics.median(one[key] for one in values) for key in values[0]}
               for name, values in seconds.items()}  # fmt: skip
    print(f"weights {weights / 1e9:.2f} GB")
    for name, found in medians.items():
        keys = ("load", "open", "cold", "step")
        parts = [f"{key} {found[key]:6.2f} s ({found[key] / medians[THEIRS][key]:4.0%})" for key in keys]
        peak = found["peak"] / 1e9
        print(f"{name:22}" + "  ".join(parts) + f"  peak {peak:.2f} GB (weights + {peak - weights / 1e9:.2f})")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[what the processor computes with]")
    parser.add_argument("--work", type=Path, help="where the model is written and kept; a temporary folder by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = args.dtype or ("bfloat16" if native_bfloat16(torch.device("cpu")) else "float32")
    with tempfile.TemporaryDirectory() as temporary:
        paths = prepare(args.work or Path(temporary))
        weights = paths["file"].stat().st_size
        sides: dict[str, tuple[str, Path, dict[str, str]]] = {
            OURS: (SFUMATO, paths["folder"], {}),
            FILE: (SFUMATO, paths["file"], {}),
            THEIRS: (DIFFUSERS, paths["folder"], {}),
        }
        if dtype == "float32":
            sides[HALF] = SFUMATO, paths["file"], {"offload": "half", "convolution": "winograd"}
            sides[LEAN] = SFUMATO, paths["file"], {"offload": "half", "convolution": "direct"}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(args.rounds):
            names = list(sides)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found[name].append(run(*sides[name], args.size, dtype))
    medians = report(found, weights)
    if args.out is not None:
        args.out.write_text(json.dumps({"medians": medians, "rounds": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
