"""One model file as another: a folder in diffusers' layout, or a single file in CompVis'.

Every tensor that the model uses keeps its bits unless another type is asked for. What the source holds besides is
listed with the reason, and so is what the target has no place for.

>>> from sfumato.errors import UserError
>>> try:
...     check_target(Path("model.ckpt"), "single-file")
... except UserError as error:
...     print(error)
model.ckpt: a single file is written as safetensors, so its name must end in .safetensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import Prediction
from sfumato.checkpoints.formats.single_file import SingleFile
from sfumato.errors import UserError, raise_unknown
from sfumato.systems import Opened, open_system
from sfumato.systems.clip import CLIP
from sfumato.systems.codec import CodecSystem
from sfumato.systems.config import DTYPES
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.systems.stable_diffusion import config_of, write_single_file

FOLDER, FILE = "diffusers", "single-file"
ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
LAYOUTS = (FOLDER, FILE)
"""What a model can be converted to."""
NO_PLACE = "the layout of single files has no place for it"
REPLACED = "of the first stage, instead of which another one was given"


@dataclass(frozen=True)
class Converted:
    """What became of a model.

    Attributes:
        used: how many of the source's tensors the model uses.
        dropped: for each reason, the names of tensors that were left aside.
        notes: what a user should know, each in one sentence.
    """

    used: int
    dropped: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    prediction: Prediction = "unknown",
    averaged: bool = False,
    allow_pickle: bool = False,
    vae: str | Path | None = None,
) -> Converted:
    """Write a model in another layout; the target appears whole or not at all.

    Args:
        source: anything that `open_system` opens.
        target: must not exist, but for an empty folder where a folder is written.
        to: one of `LAYOUTS`.
        dtype: one of `DTYPES`; None keeps the types that the weights are stored in.
        prediction, averaged, allow_pickle, vae: as in `open_system`.

    Raises:
        ModelFileError: for a source that cannot be opened.
        UserError: for a target that exists, and a model that the layout has no place for.
    """
    target = Path(target)
    check_target(target, to)
    if dtype is not None and dtype not in DTYPES:
        raise_unknown("dtype", dtype, DTYPES)
    wanted = None if dtype is None else DTYPES[dtype]
    opened = open_system(
        source, allow_pickle=allow_pickle, prediction=prediction, averaged=averaged, vae=vae, dtype=wanted
    )
    used, dropped = _account(opened, replaced=vae is not None)
    notes = [note for note in opened.notes if opened.file is None or note != opened.file.coverage.describe()]
    notes += [] if wanted is None else _cast(opened, wanted)
    if vae is not None:
        notes.append(f"the first stage is that of {vae}")
    if isinstance(opened.system, CLIP):
        raise UserError(f"{source} holds a clip model, which has no counterpart in other programs' layouts")
    if to == FOLDER:
        notes += save_folder(opened.system, target)
    else:
        if not isinstance(opened.system, Latent):
            raise UserError(f"{source} holds a {opened.system.kind} model; single files are of Stable Diffusion only")
        lost = write_single_file(opened.system, target).dropped
        dropped |= {NO_PLACE: lost} if lost else {}
        notes += _not_kept(opened.system.config, target)
    return Converted(used, dropped, tuple(notes))


def check_target(target: Path, to: str) -> None:
    """Refuse an unknown layout, and a target that stands in the way or has a misleading name. Raises `UserError`."""
    if to not in LAYOUTS:
        raise_unknown("layout", to, LAYOUTS)
    if to == FILE and target.suffix != ".safetensors":
        raise UserError(f"{target}: a single file is written as safetensors, so its name must end in .safetensors")
    if to == FOLDER and target.suffix.lower() in ENDINGS:
        raise UserError(f"{target}: this layout is a folder, so its name must not end as a file's does")
    if to == FOLDER and target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; choose another name")


def _account(opened: Opened, *, replaced: bool) -> tuple[int, dict[str, tuple[str, ...]]]:
    """How many tensors are used, and which are not and why."""
    if opened.file is None:
        return len(opened.system.tensors()), {}
    used, dropped = list(opened.file.coverage.matched), dict(opened.file.coverage.ignored)
    if replaced:
        known = set(_of_vae(opened.file))
        used, old = [name for name in used if name not in known], tuple(name for name in used if name in known)
        dropped |= {REPLACED: old} if old else {}
    return len(used), dropped


def _of_vae(file: SingleFile) -> list[str]:
    """Names of a single file's autoencoder."""
    first = "encoder.conv_in.weight"
    prefix = next((name for name in file.coverage.matched if name.endswith(first)), first).removesuffix(first)
    inner = tuple(f"{prefix}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    return [name for name in file.coverage.matched if name.startswith(inner)]


def _cast(opened: Opened, dtype: torch.dtype) -> list[str]:
    """Give all weights the type, those too that were opened in another, and note what does not fit into it."""
    system: Any = opened.system
    networks = [system.codec.network] if isinstance(system, CodecSystem) else list(system.networks().values())
    for network in networks:
        if network is not None:
            network.to(dtype)
    odd = [name for name, tensor in system.tensors().items() if not _finite(tensor)]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return [f"{odd[0]}{more} holds values that are not finite as {str(dtype).removeprefix('torch.')}"]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _not_kept(config: LatentConfig, target: Path) -> list[str]:
    """What of a model's config the file that was written does not say."""
    family = SingleFile.open(target).family
    assert family is not None
    own, found = (one.model_dump(mode="json") for one in (config, config_of(family)))
    differ = _differences(own, found)
    return [f"a single file has no place for {', '.join(differ)} of the model's config"] if differ else []


def _differences(own: Mapping[str, Any], found: Mapping[str, Any], within: str = "") -> list[str]:
    """Names of the fields that are said in one and not so in the other, those of tables with a dot."""
    names = []
    for key, value in own.items():
        other = found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += _differences(value, other, f"{within}{key}.")
        elif value is not None and value != other:
            names.append(f"{within}{key}")
    return names
