"""What a data set holds, before anything is trained on it: bad pictures, sizes, captions, near-duplicates.

Pictures are opened by the reader that training uses, one after another, so that no set is too large for the memory.
Two pictures are near-duplicates if their difference hashes (64 bits: whether brightness rises from one cell of a 9x8
grid to the next one in its row) differ in at most 3 bits, and their 8x8 colour thumbnails by at most 8 of 255 (root
mean square). The hash sees structure whatever the brightness, the thumbnail tells a red square from a blue one.

>>> import tempfile
>>> from PIL import Image
>>> with tempfile.TemporaryDirectory() as folder:
...     for name, value in (("a", 100), ("b", 101), ("c", 200)):
...         Image.new("RGB", (12, 8), (value, 0, 0)).save(f"{folder}/{name}.png")
...     statistics = describe(open_all(folder, caption=None))
>>> statistics.total, statistics.sizes[0], statistics.near_duplicates, statistics.near_duplicate_count
(3, (12, 8), [('a.png', 'b.png')], 1)
"""

from __future__ import annotations

import io
import os
import statistics as numbers
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from sfumato.errors import DataError
from sfumato.training.data import BadPicture, DataConfig, PictureSet, open_data
from sfumato.training.pictures import FORMATS, Record

Progress = Callable[[int, int], None]
Seen = TypeVar("Seen")

COMPARED = 50_000
"""Near-duplicates are looked for among that many pictures at most: the work grows with the square."""

_NAMED_PAIRS = 10
_MOST_VALUES = 40  # a column with more values than that is not a class
_HASH_BITS, _COLOUR_DISTANCE = 3, 8.0
_SIDE = 8


@dataclass(frozen=True)
class Look:
    """One picture: its mode in the file, size as (width, height) in pixels, hash (64,) bool, thumbnail (8, 8, 3)."""

    mode: str
    size: tuple[int, int]
    hash: np.ndarray
    thumbnail: np.ndarray


@dataclass
class Statistics:
    """Figures of a set. `sizes` holds (width, height) and `modes` counts the modes of the good pictures; `values`
    counts those of the columns with few of them; `compared` pictures were searched for `near_duplicates`, the first
    few pairs of keys; `across_splits` of all such pairs have one picture in one split and one in another."""

    total: int
    bad: list[BadPicture] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    near_duplicates: list[tuple[str, str]] = field(default_factory=list)
    near_duplicate_count: int = 0
    across_splits: int = 0
    compared: int = 0


def open_all(path: str, size: int | None = None, caption: str | None = "text") -> PictureSet:
    """Every picture under `path`, whatever its split; with `size`, those below that side are bad pictures.

    As in training, either all pictures have a caption or none has; without a `caption` column nobody asks.

    Raises:
        DataError: nothing there, or nothing that can be read as a data set.
    """
    config = DataConfig(path=path, size=size or 1, split=None, validation_split=None, caption=caption, cache_bytes=0)
    return open_data(config)[0]


def find_bad(pictures: PictureSet, on_progress: Progress | None = None) -> list[BadPicture]:
    """Every picture that training would refuse, with the reason; all others are decoded and fitted once."""
    return [seen for seen in _each(pictures, PictureSet.load_stored, on_progress) if isinstance(seen, BadPicture)]


def describe(pictures: PictureSet, on_progress: Progress | None = None) -> Statistics:
    """Look at every picture once and sum up; bad ones are listed and counted in nothing else."""
    found = Statistics(len(pictures))
    keys: list[str] = []
    splits: list[str] = []
    hashes: list[np.ndarray] = []
    thumbnails: list[np.ndarray] = []
    for record, seen in zip(pictures.records, _each(pictures, _look, on_progress), strict=True):
        if isinstance(seen, BadPicture):
            found.bad.append(seen)
            continue
        found.sizes.append(seen.size)
        found.modes[seen.mode] += 1
        if len(keys) < COMPARED:
            keys.append(record.key)
            splits.append(str(record.columns.get("split")))
            hashes.append(seen.hash)
            thumbnails.append(seen.thumbnail)
    found.values = _values(pictures.records)
    found.captions = [caption for record in pictures.records if (caption := _caption(record)) is not None]
    found.compared = len(keys)
    if keys:
        split = np.array(splits)
        for first, second in _near(np.stack(hashes), np.stack(thumbnails)):
            found.near_duplicate_count += len(first)
            found.across_splits += int((split[first] != split[second]).sum())
            room = _NAMED_PAIRS - len(found.near_duplicates)
            found.near_duplicates += [(keys[a], keys[b]) for a, b in zip(first[:room], second[:room], strict=True)]
    return found


def _caption(record: Record) -> str | None:
    caption = record.columns.get("text")
    return caption if isinstance(caption, str) else None


def _each(
    pictures: PictureSet, look: Callable[[PictureSet, int], Seen], on_progress: Progress | None
) -> Iterator[Seen | BadPicture]:
    """`look` at every picture in order, by several threads; what cannot be used comes as a `BadPicture`."""

    def one(i: int) -> Seen | BadPicture:
        try:
            return look(pictures, i)
        except DataError as error:
            return BadPicture(pictures.records[i].key, str(error.__cause__ or error))

    total, block = len(pictures), 256
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, total, block):
            indices = range(start, min(start + block, total))
            yield from pool.map(one, indices)
            if on_progress is not None:
                on_progress(indices.stop, total)


def _look(pictures: PictureSet, i: int) -> Look:
    image = pictures.open(i)
    with Image.open(io.BytesIO(pictures.records[i].source.read_bytes()), formats=FORMATS) as stored:
        mode = stored.mode
    return Look(mode, image.size, difference_hash(image), thumbnail(image))


def difference_hash(image: Image.Image) -> np.ndarray:
    """64 bits (64,) bool: whether brightness rises from each cell of a 9x8 grid to its right neighbour."""
    cells = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    return (cells[:, 1:] > cells[:, :-1]).reshape(-1)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Mean colours of an 8x8 grid, uint8 (8, 8, 3)."""
    return np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX))


def _near(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (first, second) of indices of near-duplicates, first < second, block by block.

    For hashes in {-1, 1} the Hamming distance of two is ``(64 - <a, b>) / 2``.
    """
    signs = hashes.astype(np.float32) * 2 - 1
    colours = thumbnails.reshape(len(thumbnails), -1).astype(np.float32) - 128
    squares = (colours**2).sum(1)
    furthest = colours.shape[1] * _COLOUR_DISTANCE**2
    for start in range(0, len(signs), 512):
        rows = slice(start, start + 512)
        bits = (signs.shape[1] - signs[rows] @ signs[start:].T) / 2
        apart = squares[rows, None] + squares[None, start:] - 2 * (colours[rows] @ colours[start:].T)
        first, second = np.nonzero(np.triu((bits <= _HASH_BITS) & (apart <= furthest), 1))
        yield first + start, second + start


def _values(records: Sequence[Record]) -> dict[str, Counter[str]]:
    """How often each value occurs, for every column of texts or whole numbers that has at most 40 of them."""
    counts: dict[str, Counter[str]] = {}
    dropped: set[str] = set()
    for record in records:
        for name, value in record.columns.items():
            if name in dropped or value is None:
                continue
            column = counts.setdefault(name, Counter())
            if isinstance(value, (str, int)):
                column[str(value)] += 1
            if not isinstance(value, (str, int)) or len(column) > _MOST_VALUES:
                dropped.add(name)
                del counts[name]
    return counts


# ----------------------------------------------------------------------------------------------------------------
# showing


def report(found: Statistics) -> list[str]:
    """The figures as lines of text."""
    lines = [f"pictures: {found.total}" + (f", of which {len(found.bad)} cannot be used" if found.bad else "")]
    lines += [f"  {bad.key}: {bad.reason}" for bad in found.bad[:_NAMED_PAIRS]]
    if found.sizes:
        for name, sides in zip(("width", "height"), zip(*found.sizes, strict=True), strict=True):
            lines.append(f"{name}: {min(sides)} to {max(sides)}, median {numbers.median(sides):g}")
        lines.append(f"modes: {_counted(found.modes)}")
    for name, column in sorted(found.values.items()):
        lines.append(f"{name} ({len(column)} values): {_counted(column)}")
    lines.append(_captions(found.captions))
    if found.compared:
        among = "" if found.compared + len(found.bad) == found.total else f" among the first {found.compared}"
        lines.append(f"near-duplicates{among}: {found.near_duplicate_count} pairs, {found.across_splits} across splits")
        lines += [f"  {first}  {second}" for first, second in found.near_duplicates]
    return lines


def _counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{value or '(empty)'} {count}" for value, count in counts.most_common(12))
    return shown + (f", and {len(counts) - 12} more" if len(counts) > 12 else "")


def _captions(captions: list[str]) -> str:
    if not captions:
        return "captions: none"
    words = [len(caption.split()) for caption in captions]
    return (
        f"captions: {len(captions)}, {len(set(captions))} different; "
        f"{min(words)} to {max(words)} words, median {numbers.median(words):g}"
    )


def contact_sheet(pictures: PictureSet, count: int = 64, side: int = 96) -> Image.Image:
    """A page of good pictures taken evenly from the whole set, at most `side` pixels each, with their captions.

    Raises:
        DataError: there is no good picture.
    """
    from sfumato.images import sheet

    step = max(1.0, len(pictures) / count)
    chosen = [int(number * step) for number in range(min(count, len(pictures)))]
    shown, labels = [], []
    for i in chosen:
        try:
            image = pictures.open(i)
        except DataError:
            continue  # `describe` lists it
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        shown.append(image)
        labels.append(_caption(pictures.records[i]) or Path(pictures.records[i].key).name)
    if not shown:
        raise DataError(f"there is no good picture in {pictures.config.path!r} to show")
    return sheet(shown, labels=labels)
