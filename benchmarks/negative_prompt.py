"""Does a negative prompt take away what it names, and little else?

    python benchmarks/negative_prompt.py --model MODEL [--clip clip-emoji] [--seeds 8] [--perp-neg W] [--pairs F.json]
        [--out F.json] [--sheet F.png]

For each pair of `negative_prompts.json` (a prompt, a word that is not wanted) pictures are drawn with and without
`--negative`, the same seeds. The score of a word is the mean cosine between the pictures and the word in CLIP's space.
The unwanted word's score should fall, and the wanted one's by less than half as much. Models are judged by those ten
pairs; `negative_prompts_more.json` holds others, to choose settings by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from PIL import Image

import sfumato
from sfumato import models
from sfumato.images import from_pil, sheet
from sfumato.systems import open_as
from sfumato.systems.clip import CLIP

PAIRS = Path(__file__).with_name("negative_prompts.json")


def scores(clip: CLIP, pictures: list[Image.Image], words: list[str]) -> list[float]:
    """Mean cosine of the pictures with each word."""
    images = ((from_pil(pictures) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        cosines = clip.pictures(images) @ clip.captions(words).T
    return [float(v) for v in cosines.mean(0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model that reads text")
    parser.add_argument("--clip", default="clip-emoji", help="a CLIP of the box, or a file of one")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="prompts and what is not wanted, JSON")
    parser.add_argument("--perp-neg", type=float, help="None for the model's own")
    parser.add_argument("--guidance", type=float, help="None for the model's own")
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    parser.add_argument("--sheet", type=Path, help="where to write the pictures, a row without above each row with")
    chosen = parser.parse_args()
    judge = models.weights(chosen.clip) if chosen.clip in models.names() else chosen.clip
    model, clip = sfumato.load(chosen.model), open_as(CLIP, judge)
    found, drawn = [], []
    for pair in json.loads(chosen.pairs.read_text(encoding="utf-8")):
        words = [pair["prompt"], pair["unwanted"]]
        options = {"count": chosen.seeds, "seed": 0, "guidance": chosen.guidance}
        without = model.generate(pair["prompt"], **options)
        with_ = model.generate(pair["prompt"], negative=pair["unwanted"], perp_neg=chosen.perp_neg, **options)
        before, after = scores(clip, without, words), scores(clip, with_, words)
        lost, gone = before[0] - after[0], before[1] - after[1]
        good = gone > 0 and lost < gone / 2
        found.append(pair | {"wanted": [before[0], after[0]], "unwanted_score": [before[1], after[1]], "good": good})
        print(f"{pair['prompt']:14} not {pair['unwanted']:12} unwanted {before[1]:+.3f} -> {after[1]:+.3f}, "
              f"wanted {before[0]:+.3f} -> {after[0]:+.3f}  {'good' if good else 'NOT'}")  # fmt: skip
        drawn += without + with_
    lost, gone = (mean(one[key][0] - one[key][1] for one in found) for key in ("wanted", "unwanted_score"))
    print(f"{sum(one['good'] for one in found)} of {len(found)} pairs as they should be; over all, the unwanted score "
          f"falls by {gone:.3f}, the wanted one by {lost:.3f}")  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.sheet:
        sheet(drawn, columns=chosen.seeds).save(chosen.sheet)


if __name__ == "__main__":
    main()
