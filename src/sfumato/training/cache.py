"""What a frozen network makes of a training set, reckoned once: latents of pictures, states of captions.

A cache is a safetensors file under the user's cache folder, named by a hash of everything that it depends on: the
pictures' pixels or the texts themselves, and the weights and settings of the network. Nothing in it can be stale; the
folder can be deleted at any time.

>>> key_of("codec", b"pixels") == key_of("codec", b"pixels"), len(key_of("x"))
(True, 40)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.io import write_model
from sfumato.codecs import Codec, Moments
from sfumato.conditioners.text import TextConditioner
from sfumato.errors import UserError
from sfumato.training.data import PictureSet, to_float

_BATCH = 32


def folder() -> Path:
    """Where caches are kept: `$XDG_CACHE_HOME/sfumato/training`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sfumato" / "training"


def key_of(*parts: str | bytes) -> str:
    """A name for what follows from these parts and nothing else."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def kept(name: str, make: Callable[[], dict[str, Tensor]], say: Callable[[str], object]) -> dict[str, Tensor]:
    """The tensors of that name, memory-mapped from their file; made and written first where there is none.

    A file that cannot be read is made anew; where none can be written the tensors stay in memory, and `say` is told.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder() / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            say(f"the cache {path} is damaged and made anew")
    with full_precision():  # the name says nothing of the precision of the training that asks first
        tensors = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(path, tensors, {"system": "cache"})
    except (OSError, UserError) as error:
        say(f"the cache cannot be written, so it is kept in memory only ({error})")
        return tensors
    return load_file(path)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast, for a frozen network inside a training that has it."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class LatentCache:
    """Mean and deviation of every picture's latents, in float32."""

    def __init__(self, mean: Tensor, std: Tensor | None) -> None:
        self.mean, self.std = mean, std

    @classmethod
    @torch.no_grad()
    def of(
        cls, pictures: PictureSet, codec: Codec, weights: str, device: torch.device, say: Callable[[str], object]
    ) -> LatentCache:
        """For a set, by a codec whose weights have this hash."""
        digest = hashlib.blake2b(digest_size=20)
        for part in pictures.in_order(256):
            digest.update(part.images.numpy().tobytes())
        size = pictures.config.size

        def make() -> dict[str, Tensor]:
            say(f"encoding {len(pictures):,} pictures")
            found = list(_moments(pictures, codec, device))
            tensors = {"mean": torch.cat([m.mean for m in found])}
            stds = [m.std for m in found if m.std is not None]
            return tensors | ({"std": torch.cat(stds)} if stds else {})

        tensors = kept(key_of("latents", digest.digest(), weights, str(size)), make, say)
        return cls(tensors["mean"], tensors.get("std"))

    def rows(self, indices: Tensor) -> Moments:
        """Of the pictures with these indices (B,)."""
        return Moments(self.mean[indices], self.std[indices] if self.std is not None else None)

    def deviation(self) -> float:
        """Standard deviation of the latents over the whole set, their own spread included."""
        spread = self.std.double().square().mean() if self.std is not None else torch.zeros(()).double()
        return float((self.mean.double().var(correction=0) + spread).sqrt())


def _moments(pictures: PictureSet, codec: Codec, device: torch.device) -> Iterator[Moments]:
    for part in pictures.in_order(_BATCH):
        moments = codec.encode(to_float(part.images).to(device))
        yield Moments(moments.mean.float().cpu(), moments.std.float().cpu() if moments.std is not None else None)


class TextCache:
    """States of all texts that a training can show, by a frozen encoder; one flat tensor, no padding."""

    def __init__(self, texts: Sequence[str], states: Tensor, lengths: Tensor) -> None:
        ends = lengths.cumsum(0).tolist()
        self._states = states
        self._where = dict(zip(texts, zip([0, *ends[:-1]], ends, strict=True), strict=True))

    @classmethod
    @torch.no_grad()
    def of(cls, texts: Sequence[str], conditioner: TextConditioner, say: Callable[[str], object]) -> TextCache:
        """For these texts; the empty one, which is the null, is added. States are kept in float16."""
        wanted = sorted({*texts, ""})

        def make() -> dict[str, Tensor]:
            say(f"reading {len(wanted):,} captions")
            found: list[Tensor] = []
            for start in range(0, len(wanted), 512):
                found += [one.half().cpu() for one in conditioner.encoder.states(wanted[start : start + 512])]
            return {"states": torch.cat(found), "lengths": torch.tensor([len(one) for one in found])}

        described = repr(sorted(conditioner.describe().items()))
        tensors = kept(key_of("texts", described, *wanted), make, say)
        return cls(wanted, tensors["states"], tensors["lengths"])

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(L_i, C) float32 per text. Raises `KeyError` for one that was not announced."""
        return [self._states[slice(*self._where[text])].float() for text in texts]
