"""The data reader of every recipe: pictures from folders or parquet, in an order that needs no memory.

`open_data` reads a `DataConfig` and returns a training and a validation `PictureSet`; `check_all` decodes
every picture once before the first step, so a bad one is named then and not on the third night; `Batches`
deals them out. Batch ``s`` is a pure function of (seed, s): the stream is the epochs' permutations one after
another and batch ``s`` takes positions ``[s B, (s+1) B)``, so a resumed run needs only its step number and
sees the same pictures, whatever the number of processes. Flips and crops are pure functions of (seed, stream
position).

>>> import tempfile
>>> from PIL import Image
>>> folder = tempfile.TemporaryDirectory()
>>> for value in range(4):
...     Image.new("RGB", (12, 8), (60 * value, 0, 0)).save(f"{folder.name}/{value}.png")
>>> train, validation = open_data(DataConfig(path=folder.name, size=8))
>>> check_all(train), len(train), validation
([], 4, None)
>>> batches = Batches(train, batch_size=2, seed=0)
>>> batches.batch(0).images.shape, batches.batch(0).to_float().dtype
(torch.Size([2, 3, 8, 8]), torch.float32)
>>> sorted(batches.batch(0).indices.tolist() + batches.batch(1).indices.tolist())
[0, 1, 2, 3]
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import DataError, UserError, nearest
from sfumato.training.pictures import Fit, Record, decode, find_records, fit_square

CaptionUse = Literal["every", "some", "none"]
"""Which captions count: every picture must have one where any has; those that are there are read; none is read."""

_DEFAULT_CAPTION, _DEFAULT_SPLIT, _DEFAULT_VALIDATION = "text", "train", "validation"


class DataConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """What to read and how to fit it to a square. A default name may be absent; any other must exist."""

    path: str = pydantic.Field(description="folder of pictures, parquet file, or folder of parquet files")
    size: int = pydantic.Field(ge=1, le=16384, description="side of the square pictures, in pixels")
    split: str | None = pydantic.Field(
        default=_DEFAULT_SPLIT,
        description="value of the column 'split' to train on; null takes all but validation_split",
    )
    validation_split: str | None = pydantic.Field(
        default=_DEFAULT_VALIDATION, description="value of the column 'split' that is held out"
    )
    validation_fraction: float = pydantic.Field(
        default=0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share held out by a hash of the key where no split is",
    )
    fit: Fit = pydantic.Field(
        default="crop", description="central square, whole picture on white, or aspect ignored"
    )
    random_crop: bool = pydantic.Field(
        default=False, description="with fit 'crop': a random square of a 1/8 larger picture"
    )
    flip: bool = pydantic.Field(default=False, description="mirror left and right at random")
    upscale: bool = pydantic.Field(
        default=False, description="enlarge pictures smaller than asked instead of refusing them"
    )
    label: str | None = pydantic.Field(
        default=None, description="column that is the class; 'folder' for class sub-folders"
    )
    caption: str | None = pydantic.Field(default=_DEFAULT_CAPTION, description="column that is the caption")
    channels: Literal[1, 3] = pydantic.Field(default=3, description="3 for colour, 1 for grey")
    skip_bad: bool = pydantic.Field(
        default=False, description="leave bad pictures out and list them instead of refusing"
    )
    cache_bytes: int = pydantic.Field(
        default=2 * 1024**3, ge=0, description="RAM for the decoded pictures of a set"
    )

    @pydantic.model_validator(mode="after")
    def _random_crop_needs_crop(self) -> DataConfig:
        if self.random_crop and self.fit != "crop":
            raise ValueError(f"random_crop needs fit 'crop', but fit is {self.fit!r}")
        return self

    @property
    def stored_size(self) -> int:
        """Side at which pictures are kept before cropping, in pixels."""
        return self.size + max(1, self.size // 8) if self.random_crop else self.size


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class View:
    """A part of a stored picture: its left upper corner in pixels, and whether it is mirrored afterwards."""

    left: int = 0
    top: int = 0
    mirrored: bool = False


@dataclass(frozen=True)
class Batch:
    """Pictures (B, C, H, W) uint8, labels (B,) int64, B captions, and their indices (B,) int64 in the set.

    ``views`` says for each how it was cut from what is stored: left and top in pixels, and whether it was mirrored
    afterwards; None where that is not known.
    """

    images: Tensor
    labels: Tensor | None
    captions: list[str] | None
    indices: Tensor
    views: list[View] | None = None

    def to_float(self) -> Tensor:
        """The pictures as float32 (B, C, H, W) in [-1, 1]."""
        return to_float(self.images)


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pictures in [0, 255] to float32 in [-1, 1]: ``x / 127.5 - 1``."""
    return images.to(torch.float32) / 127.5 - 1


class PictureSet:
    """Pictures with classes and captions; decoded ones stay in RAM when all of them fit into ``cache_bytes``.

    ``labels`` are the class names; without an argument those found, sorted (whole numbers by value). Reading
    is safe from several threads.

    Raises:
        DataError: no records, a column that is missing or empty on some rows, or of a type it cannot have.
    """

    def __init__(
        self, records: Sequence[Record], config: DataConfig, labels: Sequence[str] | None = None
    ) -> None:
        if not records:
            raise DataError(f"no pictures are left to read in {config.path!r}")
        self.records, self.config = list(records), config
        values = _column(self.records, config.label, "label", config, (str, int)) if config.label else None
        self.labels = list(labels) if labels is not None else _class_names(values or [])
        rank = {name: index for index, name in enumerate(self.labels)}
        if unknown := [value for value in values or [] if str(value) not in rank]:
            raise DataError(
                f"class {unknown[0]!r} in {config.path!r} is not one of: {', '.join(self.labels)}"
            )
        self._label_ids = [rank[str(value)] for value in values] if values is not None else None
        self._captions: list[str] | None = None
        if config.caption and (config.caption != _DEFAULT_CAPTION or _any_has(self.records, config.caption)):
            self._captions = _column(self.records, config.caption, "caption", config, (str,))
        side, count = config.stored_size, len(self.records)
        fits = count * config.channels * side * side <= config.cache_bytes
        self._cache = torch.empty((count, config.channels, side, side), dtype=torch.uint8) if fits else None
        self._filled = bytearray(count)
        self._rows = torch.arange(count)  # cache row of each picture
        self._sizes: dict[int, tuple[int, int]] = {}  # by cache row

    def __len__(self) -> int:
        return len(self.records)

    def label_of(self, i: int) -> int | None:
        """Class number of picture ``i``, an index into ``labels``; None when there is no label column."""
        return None if self._label_ids is None else self._label_ids[i]

    def caption_of(self, i: int) -> str | None:
        """Caption of picture ``i``; None when the set has no captions."""
        return None if self._captions is None else self._captions[i]

    @property
    def cached(self) -> bool:
        """Whether decoded pictures stay in RAM."""
        return self._cache is not None

    def size_of(self, i: int) -> tuple[int, int]:
        """(width, height) of picture ``i`` in pixels, as its file has it, upright."""
        row = int(self._rows[i])
        if row not in self._sizes:
            self._sizes[row] = self.open(i).size
        return self._sizes[row]

    def open(self, i: int) -> Image.Image:
        """Picture ``i`` fully decoded and upright at its own size, ``RGB`` or ``L``."""
        try:
            return self._decode(i)
        except DataError as error:
            raise DataError(f"{self.records[i].key} in {self.config.path!r}: {error}") from error

    def load(self, i: int) -> Tensor:
        """Picture ``i`` as uint8 (C, size, size) in [0, 255], without augmentation."""
        size = self.config.size
        slack = (self.config.stored_size - size) // 2
        return self.load_stored(i)[:, slack : slack + size, slack : slack + size].clone()

    def load_stored(self, i: int) -> Tensor:
        """Picture ``i`` as uint8 (C, S, S) with the room random crops need; may be the cache's own memory."""
        try:
            return self._stored(i)
        except DataError as error:
            raise DataError(f"{self.records[i].key} in {self.config.path!r}: {error}") from error

    def gather(self, indices: Sequence[int]) -> Batch:
        """The pictures of ``indices`` as a batch, without augmentation."""
        slack = (self.config.stored_size - self.config.size) // 2
        views = [View(slack, slack)] * len(indices)
        return self._batch(torch.stack([self.load(i) for i in indices]), indices, views)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every picture once, in the set's order, without augmentation; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.gather(range(start, min(start + batch_size, len(self))))

    def leave_out(self, indices: Sequence[int]) -> None:
        """Remove pictures; those after them move up. Class numbers stay as they are."""
        gone = set(indices)
        keep = [i for i in range(len(self)) if i not in gone]
        self.records = [self.records[i] for i in keep]
        self._rows = self._rows[keep]
        self._label_ids = self._label_ids and [self._label_ids[i] for i in keep]
        self._captions = self._captions and [self._captions[i] for i in keep]

    def _batch(self, images: Tensor, indices: Sequence[int], views: list[View]) -> Batch:
        labels = torch.tensor([self._label_ids[i] for i in indices]) if self._label_ids is not None else None
        captions = [self._captions[i] for i in indices] if self._captions is not None else None
        return Batch(images, labels, captions, torch.tensor(list(indices), dtype=torch.int64), views)

    def _decode(self, i: int) -> Image.Image:
        try:
            data = self.records[i].source.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from error
        return decode(data, self.config.channels)

    def _stored(self, i: int) -> Tensor:
        row = int(self._rows[i])
        if self._cache is not None and self._filled[row]:
            return self._cache[row]
        picture = self._decode(i)
        self._sizes[row] = picture.size
        image = fit_square(picture, self.config.stored_size, self.config.fit, upscale=self.config.upscale)
        pixels = np.array(image)
        tensor = torch.from_numpy(
            pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        ).contiguous()
        if self._cache is not None:
            self._cache[row] = tensor
            self._filled[row] = 1
        return tensor


def _any_has(records: Sequence[Record], column: str) -> bool:
    return any(record.columns.get(column) is not None for record in records)


def _column(
    records: list[Record], name: str, role: str, config: DataConfig, types: tuple[type, ...]
) -> list[Any]:
    """The values of a column that every row must have, or one sentence on what is wrong with it."""
    if not _any_has(records, name):
        known = sorted({column for record in records for column in record.columns})
        raise DataError(
            f"{role} column {name!r} is not in {config.path!r}{nearest(name, known)}; "
            f"columns: {', '.join(known) or 'none'}"
        )
    missing = [record.key for record in records if record.columns.get(name) is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(records)} pictures in {config.path!r} have no {role} "
            f"(column {name!r}; first: {missing[0]}); give them one, take them out, or say data.{role}=null where none "
            "is needed"
        )
    values = [record.columns[name] for record in records]
    for record, value in zip(records, values, strict=True):
        if not isinstance(value, types):
            expected = " or ".join("text" if kind is str else "a whole number" for kind in types)
            raise DataError(
                f"{role} column {name!r} of {record.key} in {config.path!r} is a {type(value).__name__}; "
                f"expected {expected}"
            )
    return values


def _class_names(values: Sequence[Any]) -> list[str]:
    distinct = set(values)
    numeric = all(isinstance(value, int) for value in distinct)
    return (
        [str(value) for value in sorted(distinct)] if numeric else sorted({str(value) for value in distinct})
    )


# ----------------------------------------------------------------------------------------------------------
# opening and checking


def open_data(config: DataConfig, captions: CaptionUse = "every") -> tuple[PictureSet, PictureSet | None]:
    """The training set and, if any rows are held out, the validation set; both number the classes alike.

    Held out are the rows whose ``split`` is ``validation_split``; where there are none,
    ``validation_fraction`` of the rows by a hash of their key, so a picture stays on its side when others are
    added.

    Args:
        config: what to read.
        captions: which count; a column that ``config`` names by another name than its default must always be
            there.

    Raises:
        DataError: a missing path, no pictures, an empty split, a missing column, or labels missing on some
            rows.
    """
    records = find_records(config.path, config.cache_bytes, caption_files=captions != "none")
    train, held_out = _split(records, config)
    if captions != "every" and config.caption == _DEFAULT_CAPTION:
        config = config.model_copy(update={"caption": None})
    both = train + held_out
    labels = None
    if config.label:
        labels = _class_names(_column(both, config.label, "label", config, (str, int)))
    return PictureSet(train, config, labels), PictureSet(held_out, config, labels) if held_out else None


def _split(records: list[Record], config: DataConfig) -> tuple[list[Record], list[Record]]:
    found = sorted(
        {str(record.columns["split"]) for record in records if record.columns.get("split") is not None}
    )

    def rows(name: str, role: str) -> list[Record]:
        chosen = [record for record in records if str(record.columns.get("split")) == name]
        if not chosen and found:
            raise DataError(
                f"no picture in {config.path!r} has the {role} {name!r}{nearest(name, found)}; "
                f"splits: {', '.join(found)}"
            )
        if not chosen:
            raise DataError(
                f"the {role} is {name!r}, but {config.path!r} has no column 'split'; say data.{role}=null"
            )
        return chosen

    held_out: list[Record] = []
    if config.validation_split and (
        config.validation_split != _DEFAULT_VALIDATION or _DEFAULT_VALIDATION in found
    ):
        held_out = rows(config.validation_split, "validation_split")
    if config.split is None or (not found and config.split == _DEFAULT_SPLIT):
        train = [r for r in records if not held_out or str(r.columns.get("split")) != config.validation_split]
    else:
        train = rows(config.split, "split")
    if config.split is not None and config.split == config.validation_split and held_out:
        raise DataError(
            f"split and validation_split are both {config.split!r}; validation must not be trained on"
        )
    if config.validation_fraction:
        if held_out:
            raise DataError(
                f"validation_fraction is {config.validation_fraction}, but {config.path!r} names its own "
                f"{len(held_out)} validation pictures; say "
                "data.validation_fraction=0, or data.validation_split=null"
            )
        held_out = [r for r in train if _share(r.key) < config.validation_fraction]
        train = [r for r in train if _share(r.key) >= config.validation_fraction]
        if not held_out or not train:
            raise DataError(
                f"validation_fraction {config.validation_fraction} leaves {len(train)} pictures to train on "
                f"and {len(held_out)} to validate with; both must be at least 1"
            )
    return train, held_out


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def check_all(
    picture_set: PictureSet, on_progress: Callable[[int, int], None] | None = None
) -> list[BadPicture]:
    """Decode every picture once, filling the cache; call it before building `Batches`.

    Args:
        picture_set: with ``skip_bad`` its bad pictures are removed from it.
        on_progress: called with (pictures done, pictures in all).

    Returns:
        The bad pictures left out: empty unless ``skip_bad`` is set.

    Raises:
        DataError: bad pictures without ``skip_bad`` (the first five are named), or no good picture at all.
    """

    def reason(i: int) -> str | None:
        try:
            picture_set._stored(i)
        except DataError as error:
            return str(error)
        return None

    total, block, bad = len(picture_set), 256, {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, total, block):
            indices = range(start, min(start + block, total))
            bad.update({i: why for i, why in zip(indices, pool.map(reason, indices), strict=True) if why})
            if on_progress is not None:
                on_progress(indices.stop, total)
    listed = [BadPicture(picture_set.records[i].key, why) for i, why in bad.items()]
    if listed and (not picture_set.config.skip_bad or len(listed) == total):
        named = "; ".join(f"{picture.key}: {picture.reason}" for picture in listed[:5])
        more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
        remedy = "" if len(listed) == total else " (--skip-bad, or data.skip_bad=true, leaves them out)"
        raise DataError(
            f"{len(listed)} of {total} pictures in {picture_set.config.path!r} cannot be used{remedy}: "
            f"{named}{more}"
        )
    if bad:
        picture_set.leave_out(list(bad))
    return listed


# ----------------------------------------------------------------------------------------------------------
# order


_ORDER, _AUGMENT = 1, 2  # separate random streams of one seed


def _random(seed: int, number: int, stream: int) -> np.random.Philox:
    """Counter-based generator (Salmon et al. 2011), whose raw output no platform or version changes."""
    mask = 2**64 - 1
    return np.random.Philox(
        key=np.array([seed & mask, number], dtype=np.uint64),
        counter=np.array([0, 0, 0, stream], dtype=np.uint64),
    )


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of ``range(count)`` that epoch ``epoch`` visits: int64 (count,)."""
    order = np.argsort(_random(seed, epoch, _ORDER).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


class Batches:
    """Deals a set out in batches; ``batch(step)`` depends on the seed and the step alone.

    ``batch_size`` counts the pictures of all processes together; process ``rank`` of ``world_size`` takes its
    consecutive share of each batch. The stream of epochs has no end, so there is no last, smaller batch.

    Raises:
        UserError: ``batch_size`` is below 1 or not a multiple of ``world_size``, or ``rank`` is out of range.
    """

    def __init__(
        self, picture_set: PictureSet, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch_size {batch_size} must be a positive multiple of the {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not in 0 .. {world_size - 1}")
        self.picture_set, self.batch_size, self.seed = picture_set, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.waited_seconds = 0.0
        self._count = len(picture_set)

    def positions(self, step: int) -> range:
        """This process's positions in the stream of epochs at ``step``, counted from 0."""
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        return range(start, start + share)

    def batch(self, step: int) -> Batch:
        """This process's share of batch ``step``, augmented: ``batch_size / world_size`` pictures."""
        if step < 0:
            raise UserError(f"step {step} is negative; the first is 0")
        if len(self.picture_set) != self._count:
            raise UserError("pictures were left out after Batches was built; call check_all before it")
        positions = self.positions(step)
        indices = [
            int(epoch_order(self.seed, p // self._count, self._count)[p % self._count]) for p in positions
        ]
        views = [self._view(p) for p in positions]
        images = torch.stack([self._seen(i, view) for i, view in zip(indices, views, strict=True)])
        return self.picture_set._batch(images, indices, views)

    def _view(self, position: int) -> View:
        config = self.picture_set.config
        if not (config.flip or config.random_crop):
            return View()
        mirror, down, right = (int(x) for x in _random(self.seed, position, _AUGMENT).random_raw(3))
        room = config.stored_size - config.size + 1
        return View(right % room, down % room, bool(config.flip and mirror % 2))

    def _seen(self, index: int, view: View) -> Tensor:
        size = self.picture_set.config.size
        image = self.picture_set.load_stored(index)[:, view.top : view.top + size, view.left : view.left + size]
        return image.flip(-1) if view.mirrored else image

    def prefetch(self, start_step: int = 0, *, ahead: int = 2) -> Generator[Batch]:
        """Batches from ``start_step`` on, without end, read ``ahead`` of time by one background thread.

        ``waited_seconds`` adds up the time spent waiting for it. An error in the thread is raised here.
        ``close()`` (or dropping the generator) stops the thread.
        """
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sfumato-data")
        try:
            pending = deque(pool.submit(self.batch, start_step + i) for i in range(ahead))
            step = start_step + ahead
            while True:
                began = time.perf_counter()
                batch = pending.popleft().result()
                self.waited_seconds += time.perf_counter() - began
                pending.append(pool.submit(self.batch, step))
                step += 1
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
