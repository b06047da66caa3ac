"""How near filled holes come to what was there, for models that are shown masks and for ordinary ones.

    python benchmarks/inpainting.py emoji64.parquet MODEL … [--steps 3] [--pictures 48]

Held-out pictures with random masks (boxes, strokes, one side of a line); what a mask hides is filled by each model, by
the mean colour of the rest, by grey, and by noise, and put into the picture. Told is the distance of
EfficientNet-Lite0's features to the whole picture (smaller is nearer), the mean difference to the fill of mean colour
picture by picture with its standard error, in how many pictures it is nearer, and the largest difference outside the
masks.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from sfumato import api
from sfumato.evaluation.features import efficientnet_lite0
from sfumato.evaluation.reconstruction import feature_distance
from sfumato.systems.latent import Latent
from sfumato.tasks.edit import Source, composited, edit
from sfumato.training.data import DataConfig, open_data
from sfumato.training.shown import random_masks


def eight_bits(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as bytes."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def held_out(path: str, count: int, size: int) -> Tensor:
    """So many held-out pictures, evenly spread over the set, (N, 3, size, size) in [-1, 1]."""
    _, pictures = open_data(DataConfig(path=path, size=size, fit="crop"))
    if pictures is None:
        raise SystemExit(f"{path} holds no pictures out")
    stride = max(1, len(pictures) // count)
    return pictures.gather(range(0, stride * min(count, len(pictures)), stride)).to_float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--steps", type=int, help="of the sampler; each model's own by default")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    x = held_out(args.data, args.pictures, args.size)
    true, generator = eight_bits(x), torch.Generator().manual_seed(1)
    masks = random_masks(len(x), args.size, args.size, generator, full=0.0)[:, 0]
    net = efficientnet_lite0()

    def whole(filled: Tensor) -> Tensor:
        return torch.stack([composited(filled[i : i + 1], true[i], masks[i])[0] for i in range(len(x))])

    def filled_by(model: Latent) -> Tensor:
        sources = [Source(one, mask=mask, strength=1.0) for one, mask in zip(x, masks, strict=True)]
        drawn = [edit(model, source, seeds=[i], steps=args.steps) for i, source in enumerate(sources)]
        return whole(eight_bits(torch.cat(drawn).float()))

    kept = (1 - masks)[:, None]
    mean = (x * kept).sum((2, 3)) / kept.sum((2, 3)).clamp(min=1)
    fills = {"mean colour": whole(eight_bits(mean[:, :, None, None].expand_as(x)))}
    fills["grey"] = whole(eight_bits(torch.zeros_like(x)))
    fills["noise"] = whole(eight_bits(torch.randn(x.shape, generator=generator)))
    for name in args.models:
        system = api.load(name, device="cpu").system
        if not isinstance(system, Latent):
            raise SystemExit(f"{name} is no latent model")
        fills[name] = filled_by(system)
    with torch.no_grad():
        found = {name: feature_distance(net.maps(fill), net.maps(true)) for name, fill in fills.items()}
    for name, distance in found.items():
        apart, error = distance - found["mean colour"], len(x) ** 0.5
        outside = int((fills[name].int() - true.int()).abs().amax(1)[masks == 0].max())
        print(
            f"{name}: {float(distance.mean()):.3f} +- {float(distance.std()) / error:.3f}, against mean colour "
            f"{float(apart.mean()):+.3f} +- {float(apart.std()) / error:.3f}, nearer in {int((apart < 0).sum())} of "
            f"{len(x)}, outside the masks {outside}"
        )


if __name__ == "__main__":
    main()
