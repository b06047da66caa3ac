"""The levels of `--fast`: what each saves, and how far its pictures are from the exact ones.

    python benchmarks/fast_levels.py --data emoji64.parquet [--captions N] [--levels 1,2,3] [--out fast_levels.json]
    python benchmarks/fast_levels.py --family sd1 --size 512 --steps 25 --dtype bfloat16 [--peer]

With `--data` a text model draws the held-out captions, exactly and at each level in turn, all with the same seeds:
seconds a picture, PSNR and feature distance to the exact picture, and KID and FD of each against the training pictures,
as `sfumato evaluate text` measures them. With `--family` a model of a published layout with random weights draws one
prompt: seconds of the sampling loop and of the whole picture, and PSNR. Random weights make a chaotic network, so that
PSNR says how soon two runs part, not how alike pictures look. `--peer` times guided steps of diffusers' network with
the same weights (Stable Diffusion 1, bfloat16, channels-last) before and after, and tells how much faster a loop is.

All take turns in one process, and who begins moves on every round. Work is counted by torch on a copy of the network
without memory, called as the network was called. `--sheet` writes the pictures of some captions, one row for each way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stable_speed
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sfumato
from sfumato import api
from sfumato.backends.fast import LEVELS, FastSettings, applied, level
from sfumato.cli import evaluate_sets
from sfumato.evaluation.captioned import Captioned, reconstruction
from sfumato.evaluation.judge import Judge, Real, compare, judge, remembered
from sfumato.images import from_pil, sheet
from sfumato.systems import Drawing

PROMPT = "a photograph of an astronaut riding a horse"
EXACT = "exact"
KID_BAR = 0.10
"""A level's KID may be so much above the exact pictures'."""


@dataclass
class Way:
    """One way of drawing, and what was found of it.

    Attributes:
        fast: what `generate` is given.
        loop, whole, processor: seconds, a round each: of the sampling loop, of all, and of processor time of all.
        calls: input and slots of every call of the network in the last round, on "meta".
    """

    fast: int | FastSettings | None
    loop: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def settings(self) -> FastSettings | None:
        """What is saved, as the picture itself says it."""
        stored = self.pictures[-1].info["sfumato"].get("fast")
        return None if stored is None else FastSettings.restored(stored)


def ways(levels: Sequence[int], others: Mapping[str, str]) -> dict[str, Way]:
    """The exact way, the levels, and savings by themselves."""
    found = {EXACT: Way(None)} | {f"level {number}": Way(number) for number in levels}
    for name, text in others.items():
        found[name] = Way(FastSettings.restored(json.loads(text)))
    return found


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(model: api.Model, calls: list[tuple[Any, ...]]) -> Iterator[None]:
    """Keep the shapes of what the network is asked."""
    meta = torch.device("meta")

    def record(network: Any, args: tuple[Any, ...], slots: dict[str, Any]) -> None:
        moved = {name: value.to(meta) if isinstance(value, Tensor) else value for name, value in slots.items()}
        calls.append((args[0].to(meta), moved))

    handle = model.system.denoiser.network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def draw(model: api.Model, way: Way, prompts: list[str], seed: int, options: Mapping[str, Any]) -> None:
    """One round of one way."""
    stamps: list[float] = []

    def stamp(x: Tensor, at: Any, prediction: Any, noise: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return x

    way.calls.clear()
    with recorded(model, way.calls):
        wall, processor = time.perf_counter(), time.process_time()
        way.pictures += model.generate(prompts, seed=seed, fast=way.fast, on_step=stamp, **options)
        way.whole.append(time.perf_counter() - wall)
        way.processor.append(time.process_time() - processor)
    way.loop.append(stamps[-1] - stamps[0])


def in_turns(
    model: api.Model, all_ways: dict[str, Way], prompts: Sequence[str], batch: int, options: Mapping[str, Any]
) -> None:
    """Draw all prompts in every way, batch by batch."""
    names = list(all_ways)
    draw(model, Way(None), list(prompts[:1]), 0, {**options, "steps": 2})  # to warm up
    for number, start in enumerate(range(0, len(prompts), batch)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            draw(model, all_ways[name], list(prompts[start : start + batch]), start, options)
            print(f"{name}: {min(start + batch, len(prompts))}/{len(prompts)}", flush=True)


def work(system: Drawing, way: Way) -> float:
    """FLOP of the network in the last round."""
    network = type(system).create(system.config, "meta").denoiser.network  # type: ignore[arg-type]
    settings = way.settings
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with applied(network, settings if settings is not None else FastSettings()):
            for x, slots in way.calls:
                network(widened(x), torch.zeros(len(x), device="meta"), **{n: widened(v) for n, v in slots.items()})
    return float(counter.get_total_flops())


def widened(value: Any) -> Any:
    """Numbers in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def costs(system: Drawing, all_ways: dict[str, Way], each: int) -> dict[str, dict[str, Any]]:
    """Seconds a picture, and ratios to the exact way in the same run."""
    first, table = all_ways[EXACT], {}
    total = work(system, first)
    for name, way in all_ways.items():
        settings = way.settings
        table[name] = {
            "settings": {} if settings is None else settings.stored(),
            "seconds a picture": sum(way.whole) / each,
            "times as fast, whole": sum(first.whole) / sum(way.whole),
            "times as fast, loop": sum(first.loop) / sum(way.loop),
            "times as fast, processor": sum(first.processor) / sum(way.processor),
            "times less work": total / work(system, way),
        }
    return table


def pixels(way: Way) -> Tensor:
    """Its pictures, uint8 (N, 3, H, W)."""
    return ((from_pil(way.pictures).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def nearness(exact: Tensor, other: Tensor, judged: Judge | None) -> dict[str, float]:
    """PSNR in dB over the pictures that differ at all, and the judge's feature distance."""
    maps = getattr(judged.network, "maps", None) if judged is not None else None
    differ = (exact != other).flatten(1).any(1)
    found = {"pictures unchanged": float((~differ).sum())}
    if differ.any():
        row = reconstruction(exact[differ], other[differ], maps)
        found |= {name: row[name].value for name in ("PSNR dB", "feature distance") if name in row}
    return found


# --- the two measurements --------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A trained text model on held-out captions."""
    model = api.load(options.model, dtype=options.dtype)
    columns = {"caption": "text", "style": "style", "validation_fraction": 0.0}
    train, held_out = evaluate_sets._sets(options.data, model.system.config.size, columns)
    prompts = chosen(held_out, options.captions)
    all_ways = ways(options.levels, options.also)
    in_turns(model, all_ways, prompts, options.batch, {"steps": options.steps})
    judged = judge(None, "cpu")
    real = Real.of(judged, remembered(judged, train.pictures), remembered(judged, held_out.pictures))
    table = costs(model.system, all_ways, len(prompts))
    exact = pixels(all_ways[EXACT])
    for name, way in all_ways.items():
        table[name] |= nearness(exact, pixels(way), judged)
        figures = compare(judged, [judged.features(pixels(way))], real)
        table[name] |= {key: figure.value for key, figure in figures.items() if key.startswith(("KID", "FD"))}
    kid = next(key for key in table[EXACT] if key.startswith("KID"))
    for row in table.values():
        row["KID over exact"] = row[kid] / table[EXACT][kid] - 1
    if options.sheet is not None:
        rows = [picture for way in all_ways.values() for picture in way.pictures[: options.columns]]
        sheet(rows, columns=min(options.columns, len(prompts)), scale=2).save(options.sheet)
    return table


def chosen(held_out: Captioned, count: int) -> list[str]:
    """So many of the held-out captions as models are asked for them, spread evenly; 0 for all."""
    prompts = held_out.prompts
    if not 0 <= count <= len(prompts):
        raise SystemExit(f"--captions must be 0 to {len(prompts)}, got {count}")
    return prompts if count == 0 else [prompts[i * len(prompts) // count] for i in range(count)]


def peer_of(model: api.Model, size: int) -> Callable[[], float]:
    """Seconds of a guided step of diffusers with the weights of a model."""
    unet, _ = stable_speed.theirs(model, torch.bfloat16, channels_last=True)
    step, _ = stable_speed.driven(lambda x, t, c: unet(x, t, c, return_dict=False)[0], lambda z: z,
                                  stable_speed.given(size), torch.bfloat16)  # fmt: skip
    step()

    def timed() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    return timed


def random_weights(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A published layout with random weights, one picture in each way and round."""
    model = api.random_model(options.family, dtype="float32" if options.dtype == "auto" else options.dtype)
    all_ways = ways(options.levels, options.also)
    size = {"width": options.size, "height": options.size} if options.size else {}
    peer = peer_of(model, options.size or model.system.config.size) if options.peer else None
    theirs = [peer() for _ in range(3)] if peer is not None else []
    in_turns(model, all_ways, [PROMPT] * options.rounds, 1, {"steps": options.steps} | size)
    theirs += [peer() for _ in range(3)] if peer is not None else []
    table = costs(model.system, all_ways, options.rounds)
    exact = pixels(all_ways[EXACT])
    for name, way in all_ways.items():
        table[name] |= nearness(exact, pixels(way), None)
        if theirs:  # as many calls of the network as the exact loop makes
            loop = len(all_ways[EXACT].calls) * statistics.mean(theirs)
            table[name] |= {"a step of diffusers": statistics.mean(theirs),
                            "times diffusers' loop": loop * options.rounds / sum(way.loop)}  # fmt: skip
    return table


def show(table: dict[str, dict[str, Any]]) -> None:
    """One line for each way."""
    for name, row in table.items():
        said = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float)]
        print(f"{name}: " + ", ".join(said))


def numbers(text: str) -> list[int]:
    """Levels with commas between them, each of which exists."""
    found = [int(part) for part in text.split(",") if part]
    for number in found:
        level(number)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="pictures with captions, some held out")
    parser.add_argument("--model", default="emoji", help="the text model that draws their captions")
    parser.add_argument("--captions", type=int, default=0, help="how many of them; 0 for all")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once")
    parser.add_argument("--family", help="a published layout, drawn with random weights: sd1 …")
    parser.add_argument("--size", type=int, help="of its pictures; its own if left out")
    parser.add_argument("--rounds", type=int, default=1, help="how often it is drawn")
    parser.add_argument("--peer", action="store_true", help="diffusers too, with --family sd1")
    parser.add_argument("--steps", type=int, help="20 with --data, 25 with --family, if left out")
    parser.add_argument("--levels", type=numbers, default=list(LEVELS), help="with commas between them")
    parser.add_argument("--also", action="append", default=[], metavar='NAME={"cache_every": 2}', help="more ways")
    parser.add_argument("--dtype", default="auto", help="of the networks")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    parser.add_argument("--sheet", type=Path, help="write the first pictures, a row for each way")
    parser.add_argument("--columns", type=int, default=12, help="pictures in a row")
    parser.add_argument("--out", type=Path, help="write all of it as JSON")
    options = parser.parse_args()
    if (options.data is None) == (options.family is None):
        parser.error("give either --data or --family")
    if options.peer and (options.family, options.dtype) != ("sd1", "bfloat16"):
        parser.error("--peer needs --family sd1 --dtype bfloat16")
    options.also = dict(text.split("=", 1) for text in options.also)
    options.steps = options.steps or (20 if options.data is not None else 25)
    if options.threads:
        torch.set_num_threads(options.threads)
    measure: Callable[[argparse.Namespace], dict[str, dict[str, Any]]]
    measure = trained if options.data is not None else random_weights
    table = measure(options)
    show(table)
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads; KID may be {KID_BAR:.0%} above the exact")
    if options.out is not None:
        made = {"sfumato": sfumato.__version__, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
        named = {name: str(value) for name, value in vars(options).items()}
        options.out.write_text(json.dumps({"table": table, "options": named, "made_with": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
