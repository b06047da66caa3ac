"""The nearest caption: what a model that only looks things up would draw for a caption.

For each caption it shows the training picture of the same style whose words are nearest, by the cosine of their counts,
each word weighted by its rarity, `ln(N / n)` (TF-IDF; Salton & Buckley 1988). Its pictures are real ones, so that it is
as good as the floor in all but what the captions ask for.

>>> nearest_captions(["red heart", "blue bird"], ["bird", "red hat", "yellow heart, red"])
[2, 0]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from sfumato.errors import UserError
from sfumato.random import derived_seed
from sfumato.systems.clip import words


def nearest_captions(
    asked: Sequence[str], known: Sequence[str], groups: tuple[Sequence[str | None], Sequence[str | None]] | None = None
) -> list[int]:
    """Index of the known caption nearest to each asked one; where several are as near, the asked one's hash decides.

    Args:
        asked, known: captions.
        groups: a group of each asked and each known caption; only those of one group meet. None for one group.

    Raises:
        UserError: nothing is known, or nothing of a group.
    """
    counts = [Counter(words(caption)) for caption in known]
    spread = Counter(word for found in counts for word in found)
    places = {word: i for i, word in enumerate(spread)}
    rarity = {word: math.log(1 + len(known) / n) for word, n in spread.items()}
    bank = torch.zeros(len(known), len(places))
    for row, found in zip(bank, counts, strict=True):
        for word, n in found.items():
            row[places[word]] = n * rarity[word]
    bank = torch.nn.functional.normalize(bank, dim=1)
    nearest = []
    for i, caption in enumerate(asked):
        rows = list(range(len(known))) if groups is None else [j for j, g in enumerate(groups[1]) if g == groups[0][i]]
        if not rows:
            raise UserError(f"no caption to compare {caption!r} with" + (f" in {groups[0][i]!r}" if groups else ""))
        query = torch.zeros(len(places))
        for word in words(caption):
            if word in places:
                query[places[word]] += rarity[word]
        likeness = bank[rows] @ query
        ties = (likeness >= likeness.max() - 1e-6).nonzero().flatten().tolist()
        nearest.append(rows[ties[derived_seed("nearest caption", caption) % len(ties)]])
    return nearest
