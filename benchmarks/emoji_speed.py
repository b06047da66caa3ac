"""Seconds per picture of the model `emoji`, before and after, and where they go.

    python benchmarks/emoji_speed.py [--before COMMIT] [--rounds 3] [--pictures 4] [--steps 20]

"before" is the source of an earlier commit (by default the last one without backends), exported to a temporary folder.
Every measurement is a process of its own, sides take turns; in each, one picture warms up, then some are drawn one at a
time with guidance. "network" is the time in the UNet, "decoder" in the codec, "rest" everything else: solver, guidance,
noise, the prompt's encoder, checks, the PNG's settings. "command" is `sfumato generate` from the shell to its end, a
process that imports everything and draws one picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from earlier import ROOT, sources

WITHOUT_BACKENDS = "42d6c89"

DRAW = """
import json, sys, time
import sfumato
pictures, steps, options = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
model = sfumato.load("emoji", **options)
spent = {"network": 0.0, "decoder": 0.0}
def watched(name, function):
    def run(*args, **slots):
        began = time.perf_counter()
        out = function(*args, **slots)
        spent[name] += time.perf_counter() - began
        return out
    return run
network = model.denoiser.network
network.forward = watched("network", network.forward)
codec = model.system.codec.network
codec.decode = watched("decoder", codec.decode)
model.generate("a red heart, noto style", seed=0, steps=steps)
spent.update(network=0.0, decoder=0.0)
began = time.perf_counter()
for seed in range(pictures):
    model.generate("a red heart, noto style", seed=seed, steps=steps)
spent["whole"] = time.perf_counter() - began
print(json.dumps({name: seconds / pictures for name, seconds in spent.items()}))
"""


def drawn(source: Path, pictures: int, steps: int, options: dict[str, str]) -> dict[str, float]:
    """One process: seconds per picture by part."""
    command = [sys.executable, "-c", DRAW, str(pictures), str(steps), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_with(source))
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"rest": found["whole"] - found["network"] - found["decoder"]}


def commanded(source: Path, steps: int, options: dict[str, str], out: Path) -> float:
    """Seconds of the whole command."""
    words = [part for name, value in options.items() for part in (f"--{name}", value)]
    asked = ["a red heart, noto style", "--model", "emoji", "--seed", "0", "--steps", str(steps), "--out", str(out)]
    command = [sys.executable, "-m", "sfumato", "generate", *asked, *words]
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=_with(source))
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def _with(source: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=WITHOUT_BACKENDS, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        before, now = sources(args.before, Path(temporary)), ROOT / "src"
        sides: dict[str, tuple[Path, dict[str, str]]] = {
            "before": (before, {}), "now": (now, {}), "now, bfloat16": (now, {"dtype": "bfloat16"}),
        }  # fmt: skip
        if importlib.util.find_spec("openvino") is not None:
            sides["now, openvino"] = (now, {"backend": "openvino"})
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(args.rounds):
            names = list(sides)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                source, options = sides[name]
                one = drawn(source, args.pictures, args.steps, options)
                one["command"] = commanded(source, args.steps, options, Path(temporary) / "a.png")
                found[name].append(one)
    print(f"one picture of 64 x 64, {args.steps} steps, guidance, {args.rounds} rounds, medians")
    for name, values in found.items():
        part = {key: statistics.median(one[key] for one in values) for key in values[0]}
        shares = "  ".join(f"{key} {part[key] / part['whole']:4.0%}" for key in ("network", "decoder", "rest"))
        print(f"{name:15}{part['whole']:7.3f} s  {shares}  command {part['command']:6.2f} s")


if __name__ == "__main__":
    main()
