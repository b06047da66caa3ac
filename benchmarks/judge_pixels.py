"""Judge a pixel-space model against the pictures it was trained on.

    python benchmarks/judge_pixels.py --data emoji64.parquet [--model NAME|PATH] [--count 1000] [--out FOLDER]

Prints KID x 1000 on EfficientNet-Lite2 (KID-EffLite2) of new pictures against the training set, and for scale the
same of the held-out pictures and of training pictures blurred by 0.7 pixels; writes the sheet of seeds 0-15, a sheet of
each one's nearest training picture, and everything as `judged.json`. Labels of the new pictures follow the training
set's shares.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import ImageFilter
from torch import Tensor

import sfumato
from sfumato.evaluation.features import efficientnet_lite2, extract
from sfumato.evaluation.kid import kid, nearest_neighbours
from sfumato.images import from_pil, sheet, to_pil
from sfumato.systems.asked import Asked
from sfumato.tasks.draw import draw
from sfumato.training.data import DataConfig, PictureSet, check_all, open_data


def pictures_of(data: PictureSet) -> Tensor:
    """All pictures of a set, uint8 (N, 3, H, W)."""
    check_all(data)
    return torch.cat([batch.images for batch in data.in_order(256)])


def new_pictures(
    model: sfumato.Model, data: PictureSet, count: int, guidance: float | None, steps: int | None
) -> Tensor:
    """`count` new pictures with seeds 0 …, labels drawn in the training set's shares; uint8."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(data), (count,), generator=generator).tolist()
    asked = [Asked(label=model.labels[data.label_of(row) or 0]) for row in rows] if model.labels else None
    drawn = []
    for start in range(0, count, 50):
        seeds = range(start, min(start + 50, count))
        mine = asked[start : start + 50] if asked else None
        x = draw(model.system, seeds=seeds, asked=mine, guidance=guidance, steps=steps)
        drawn.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(drawn)


def blurred(pictures: Tensor, radius: float) -> Tensor:
    """The pictures after a Gaussian blur of that radius in pixels."""
    soft = [p.filter(ImageFilter.GaussianBlur(radius)) for p in to_pil(pictures / 127.5 - 1)]
    return ((from_pil(soft) + 1) * 127.5).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("judged"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = sfumato.load(args.model)
    size, label = model.system.config.size, "group" if model.labels else None
    train, held_out = open_data(DataConfig(path=args.data, size=size, label=label))
    assert held_out is not None, "the data have no validation split"
    real, validation = pictures_of(train), pictures_of(held_out)
    began = time.perf_counter()
    new = new_pictures(model, train, args.count, args.guidance, args.steps)
    seconds = time.perf_counter() - began
    judge = efficientnet_lite2()
    of_real = extract(judge, real)
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(1))[: args.count]
    figures: dict[str, object] = {
        "model": model.name, "sha256": model.sha256, "pictures": args.count, "seconds_to_draw": round(seconds, 1),
        "guidance": args.guidance if args.guidance is not None else model.system.config.sampling.guidance,
        "steps": args.steps or model.system.config.sampling.steps, "judge": judge.name, "training_pictures": len(real),
    }  # fmt: skip
    for name, pictures in (("new", new), ("validation", validation), ("blur_0.7", blurred(real[some], 0.7))):
        mean, deviation = kid(extract(judge, pictures), of_real)
        figures[f"KID-{judge.name} x1000, {name}"] = [round(1000 * mean, 2), round(1000 * deviation, 2)]
        print(f"KID-{judge.name} x 1000 of {name:10}: {1000 * mean:7.2f} +- {1000 * deviation:.2f}", flush=True)
    first = model.generate(count=16, seed=0, label="all" if model.labels else None, steps=args.steps)
    sheet(first, scale=3).save(args.out / "seeds-0-15.png")
    shown = ((from_pil(first) + 1) * 127.5).round().to(torch.uint8)
    indices, distances = nearest_neighbours(extract(judge, shown), of_real)
    nearest = real[indices.flatten()]
    sheet(to_pil(nearest / 127.5 - 1), scale=3).save(args.out / "nearest-training.png")
    figures["nearest"] = [
        {"seed": i, "training picture": train.records[int(j)].key, "distance": round(float(d), 3)}
        for i, (j, d) in enumerate(zip(indices.flatten(), distances.flatten(), strict=True))
    ]
    (args.out / "judged.json").write_text(json.dumps(figures, indent=1))
    print(f"sheets and judged.json are in {args.out}")


if __name__ == "__main__":
    main()
