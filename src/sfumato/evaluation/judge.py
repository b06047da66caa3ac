"""The judge: a fixed network, and all figures of a set of pictures against real ones under it.

KID stands on its last pooled features, the Fréchet distance on fewer ones where the network offers them, since it needs
many pictures for each feature. Sets are compared with the training pictures; the held-out pictures' own figures are the
floor, which no model can be expected to pass.

>>> import torch
>>> class Thumbnail:
...     name, sha256 = "Thumbnail", ""
...     def __call__(self, images):
...         return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
>>> judge = Judge(Thumbnail(), kid=slice(None), frechet=slice(None))
>>> pictures = torch.randint(256, (3, 20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
>>> train, held_out, new = (judge.features(some) for some in pictures)
>>> list(compare(judge, [new], Real.of(judge, train, held_out)))
['KID-Thumbnail x1000', 'FD-Thumbnail', 'precision', 'recall', 'near copies']
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sfumato.checkpoints.hashes import memory_file
from sfumato.checkpoints.io import write_bytes
from sfumato.errors import UserError
from sfumato.evaluation.coverage import near_copies, precision_recall
from sfumato.evaluation.features import efficientnet_lite2, extract
from sfumato.evaluation.figures import Figure, bootstrapped
from sfumato.evaluation.inception import inception
from sfumato.evaluation.kid import Reference, frechet_distance

_HEAD = 1280


class HashedNetwork(Protocol):
    """A feature network that knows where its weights are from."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Judge:
    """A feature network and which of its features are for which distance.

    Attributes:
        network: features (B, D) of 8-bit pictures.
        kid, frechet: the columns for KID (precision, recall and neighbours too), and for the Fréchet distance.
    """

    network: HashedNetwork
    kid: slice
    frechet: slice

    @property
    def name(self) -> str:
        """The network's, for the names of figures."""
        return self.network.name

    def features(self, pictures: Tensor | Iterable[Tensor]) -> Tensor:
        """Float32 (N, D), of pictures, uint8 (N, 3, H, W), or of batches of them."""
        return extract(self.network, pictures)


def remembered(judge: Judge, pictures: Tensor) -> Tensor:
    """Features of real pictures, which many figures are measured against: kept in the user's cache folder.

    They stand under `features/` beside `hashes.json` (see `sfumato.checkpoints.hashes`), by the SHA-256 of the
    network's weights and of the pictures. The files may be deleted at any time; where none can be written, all is
    measured again.

    Args:
        pictures: uint8 (N, 3, H, W).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    if not judge.network.sha256:
        return judge.features(pictures)
    digest = hashlib.sha256(f"{judge.network.sha256} {judge.kid} {judge.frechet} {tuple(pictures.shape)}".encode())
    digest.update(pictures.contiguous().numpy().tobytes())
    file = memory_file().parent / "features" / f"{judge.name}-{digest.hexdigest()[:32]}.safetensors"
    try:
        kept = load_file(file)["features"]
        if len(kept) == len(pictures):
            return kept
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or damaged: measured below
    found = judge.features(pictures)
    with suppress(UserError):
        write_bytes(file, save({"features": found}))
    return found


def judge(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Judge:
    """EfficientNet-Lite2, or the Inception network of FID from a file of its weights.

    Raises:
        UserError: packages that are not installed, or a file that does not fit.
    """
    if weights is not None:
        return Judge(inception(weights, device), slice(None), slice(None))
    return Judge(efficientnet_lite2("both", device), slice(_HEAD), slice(_HEAD, None))


@dataclass(frozen=True)
class Real:
    """The real pictures that others are compared with.

    Attributes:
        train, held_out: their features (M, D) and (V, D).
        reference: of KID, the training pictures.
    """

    train: Tensor
    held_out: Tensor
    reference: Reference

    @classmethod
    def of(cls, judge: Judge, train: Tensor, held_out: Tensor, seed: int = 0) -> Real:
        """From features of both sets; what counts as a near-copy follows from the held-out ones."""
        return cls(train, held_out, Reference(train[:, judge.kid], seed=seed))


def compare(judge: Judge, new: Sequence[Tensor], real: Real, *, seed: int = 0) -> dict[str, Figure]:
    """All figures of pictures against the training pictures, by name.

    KID and the share of near-copies are of all pictures at once. Fréchet distance, precision and recall depend on the
    numbers of pictures: they are means over the sets, and precision and recall are measured against as many training
    pictures as a set has.

    Args:
        judge: whose features these are.
        new: features of one or more sets (N, D) of equal size, as one set for each seed.
        real: the pictures that they are compared with.
        seed: of choices and resamplings.
    """
    k, f, train, held_out = judge.kid, judge.frechet, real.train, real.held_out
    together = torch.cat(list(new))
    value, spread = real.reference.kid(together[:, k])
    figures = {f"KID-{judge.name} x1000": Figure(value, spread).times(1000)}
    distances = [_frechet(one[:, f], train[:, f], seed) for one in new]
    figures[f"FD-{judge.name}"] = _averaged(distances)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    shares = [precision_recall(one[:, k], train[chosen[: len(one)], k], seed=seed) for one in new]
    figures["precision"] = _averaged([pair.precision for pair in shares])
    figures["recall"] = _averaged([pair.recall for pair in shares])
    figures["near copies"] = near_copies(together[:, k], train[:, k], held_out[:, k], seed=seed)[0]
    return figures


def _frechet(new: Tensor, train: Tensor, seed: int) -> Figure:
    """Of one set, with the deviation over resamplings of the set."""
    if len(new) < 2:
        raise UserError("a Fréchet distance needs at least 2 pictures")
    spread = bootstrapped(lambda rows: frechet_distance(new[rows], train), len(new), times=20, seed=seed)
    return Figure(frechet_distance(new, train), spread)


def _averaged(figures: Sequence[Figure]) -> Figure:
    """The mean of figures; the deviations too, since sets of the same captions move together."""
    spreads = [figure.deviation for figure in figures if figure.deviation is not None]
    value = sum(figure.value for figure in figures) / len(figures)
    return Figure(value, sum(spreads) / len(spreads) if spreads else None)
