"""Regenerate a picture from its own file: the same settings, the same batch, the same bytes.

A picture carries every setting that made it, the batch it was drawn in (its neighbours choose which kernels run, so
they can change the last bit) and what it was made with: versions, threads, type, attention kernel. Where all of that is
the same, so are the bytes; where something differs, the picture is the nearest that can be had, and what differs is
said.

>>> differences({"torch": "1", "threads": 2}, {"torch": "2", "threads": 2})
['torch: 1 then, 2 now']
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sfumato import models
from sfumato.api import Model, load
from sfumato.checkpoints import hashes
from sfumato.diffusion.solvers import find
from sfumato.errors import UserError
from sfumato.images import encode_picture, read_settings
from sfumato.networks.attention import KERNELS
from sfumato.tasks import stored
from sfumato.tasks.original import Given

_SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_OBJECT = re.compile(r"<.*>|[\w.<>]+\(.*\)", re.DOTALL)  # how Python shows one


@dataclass(frozen=True)
class Replayed:
    """A regenerated picture.

    Attributes:
        picture: itself, its settings in `.info`.
        differences: what is not as it was, in words.
        same_pixels: whether the file holds exactly this picture, as far as the file's format can hold it.
    """

    picture: Image.Image
    differences: list[str]
    same_pixels: bool


def replay(
    path: str | Path,
    model: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    pictures: Mapping[str, Given] | None = None,
    allow_pickle: bool = False,
) -> Replayed:
    """Draw the picture of a file again.

    Args:
        path: a PNG, JPEG or WebP written by Sfumato.
        model: where its model is, if it is neither in the box nor where it was last seen.
        vae: where the other first stage is, if it had one and that is not where it was.
        pictures: of an edit, where "picture" (the original), "mask" and "depth" are now; or the "map" it was drawn by.
        allow_pickle: whether the model may be a `.ckpt`.

    Raises:
        UserError: no settings, damaged ones, another program's, or a model that is missing or another one.
    """
    settings = _own_settings(Path(path))
    then = settings["made_with"]
    with _threads(then.get("threads")):
        opened = _model_of(settings, model, vae, Path(path), allow_pickle)
        picture = opened.redraw(settings, pictures)
        now = picture.info["sfumato"]["made_with"]
    return Replayed(picture, differences(then, now), _holds(Path(path), picture))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a picture was made with and is made with now, where they differ."""
    return [
        f"{key}: {then.get(key, 'unknown')} then, {now.get(key, 'unknown')} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _holds(path: Path, picture: Image.Image) -> bool:
    """Whether a file's pixels are those that the picture has when it is written in the file's format."""
    with Image.open(path) as old:
        written = io.BytesIO(encode_picture(picture, _SUFFIX[str(old.format)], {}))
        with Image.open(written) as new:
            return old.size == new.size and old.convert("RGBA").tobytes() == new.convert("RGBA").tobytes()


def _own_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no picture at {path}")
    settings = read_settings(path)
    if not settings:
        raise UserError(f"{path} carries no settings (they are lost when a picture is edited or stripped)")
    if "sheet" in settings:
        raise UserError(f"{path} is a contact sheet; replay works on single pictures (draw them with --out FOLDER)")
    if not isinstance(settings.get("made_with"), dict) or not isinstance(settings.get("batch"), dict):
        version = settings.get("version") or "another program"
        raise UserError(
            f"{path} was not drawn by Sfumato ({version}); its settings can be read with `sfumato info`, not replayed"
        )
    _check_unaltered(settings, path)
    stored.check(settings, str(path))
    _check_sampler(settings["sampler"], path)
    return settings


def _check_unaltered(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse a picture of a model whose networks were altered after it was opened."""
    if "altered" not in settings:
        return
    told = settings["altered"].get("parts") if isinstance(settings["altered"], dict) else None
    parts = ", ".join(str(part)[:80] for part in told) if isinstance(told, list) else "its networks"
    raise UserError(
        f"{path} was drawn by a model that had been altered in Python ({parts:.200}), of which its settings hold "
        "nothing; only its maker's code can draw it again"
    )


def _check_sampler(name: str, path: Path) -> None:
    """Refuse what is no sampler's name: an unknown one, and how Python shows a solver object."""
    try:
        find(name)
    except UserError:
        if _OBJECT.fullmatch(name) is None:
            raise UserError(
                f"{path} was drawn with the sampler {name!r}, which is unknown here; where code of your own added it, "
                "import that code in Python and call sfumato.replay.replay"
            ) from None
        raise UserError(
            f"{path} was drawn with a solver object, {name[:80]}, which its settings do not hold; "
            "only its maker's code can draw it again"
        ) from None


def _model_of(
    settings: Mapping[str, Any], model: str | Path | None, vae: str | Path | None, path: Path, allow_pickle: bool
) -> Model:
    """The model with the stored hash: the one named, one in the box, or one seen before."""
    wanted, made = str(settings["model_hash"]), settings["made_with"]
    device, dtype = str(made["device"]), str(settings["dtype"])
    if device != "cpu" and not torch.accelerator.is_available():
        device = "cpu"
    opening = dict(settings.get("opening", {}))
    stage = _stage_of(opening.pop("vae", None), vae, path)
    found = model
    if found is None:
        boxed = [name for name in models.names() if hashes.sha256(models.weights(name)) == wanted]
        found = boxed[0] if boxed else hashes.find(wanted)
    if found is None:
        raise UserError(
            f"the model of {path}, {settings['model']} ({wanted[:10]}), is not here; name it with --model PATH"
        )
    kernel = made.get("kernel") if made.get("kernel") in KERNELS else "auto"
    opened = load(
        found, device=device, dtype=dtype, vae=stage, allow_pickle=allow_pickle, kernel=kernel,
        backend=str(settings.get("backend", "torch")), convolution=str(made.get("convolution", "direct")), **opening,
    )  # fmt: skip
    if opened.sha256 != wanted:
        raise UserError(f"{path} was drawn by model {wanted[:10]}, but {found} is {opened.sha256[:10]}")
    told = settings.get("opening", {}).get("vae")
    if told is not None and opened.opening["vae"]["sha256"] != told["sha256"]:
        raise UserError(f"{path} was drawn with another first stage than {stage}")
    opened.name = str(settings["model"])
    return opened


def _stage_of(told: Any, named: str | Path | None, path: Path) -> str | Path | None:
    """Where the first stage is that took the place of the model's own."""
    if told is None:
        if named is not None:
            raise UserError(f"{path} was drawn with the model's own first stage; leave --vae out")
        return None
    place = named if named is not None else Path(str(told["path"]))
    if not Path(place).exists():
        raise UserError(f"the first stage of {path}, {place}, is not here; name it with --vae PATH")
    return place


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    """Compute with as many threads as then; the number changes how sums are split."""
    before = torch.get_num_threads()
    if type(count) is int and 1 <= count <= 1024:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
