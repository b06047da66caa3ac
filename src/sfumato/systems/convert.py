"""One model file as another: a folder in diffusers' layout, a single file in CompVis', or a file of our own.

Every tensor that the model uses keeps its bits unless another type is asked for. What the source holds besides is
listed with the reason, and so is what the target has no place for. A model in memory is saved in the same ways.

>>> from sfumato.errors import UserError
>>> try:
...     check_target(Path("model.ckpt"), "single-file")
... except UserError as error:
...     print(error)
model.ckpt: a single file is written as safetensors, so its name must end in .safetensors
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import Prediction
from sfumato.checkpoints.formats.single_file import SingleFile
from sfumato.checkpoints.io import CONFIG_KEY, take_over
from sfumato.checkpoints.tensors import write_tensors
from sfumato.errors import UserError, raise_unknown
from sfumato.systems import Drawing, Opened, System, fingerprint, open_system
from sfumato.systems.clip import CLIP
from sfumato.systems.codec import CodecSystem
from sfumato.systems.config import DTYPES
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.systems.stable_diffusion import TITLES, config_of, refuse_missing, write_single_file

FOLDER, FILE, OWN = "diffusers", "single-file", "sfumato"
ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
LAYOUTS = (FOLDER, FILE, OWN)
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
    wanted = _wanted(dtype)
    opened = open_system(
        source, allow_pickle=allow_pickle, prediction=prediction, averaged=averaged, vae=vae, dtype=wanted,
        incomplete=True,
    )  # fmt: skip
    if isinstance(opened.system, CLIP):
        raise UserError(f"{source} holds a clip model, which has no counterpart in other programs' layouts")
    refuse_missing(source, [part for part in opened.missing if part != "vae"])
    used, dropped = _account(opened, replaced=vae is not None)
    notes = [note for note in opened.notes if opened.file is None or note != opened.file.coverage.describe()]
    notes += [] if wanted is None else _cast(opened, wanted)
    if vae is not None:
        notes.append(f"the first stage is that of {vae}")
    lost, said = _written(opened.system, target, to, str(source), opened.missing)
    return Converted(used, dropped | ({NO_PLACE: lost} if lost else {}), (*notes, *said))


@torch.no_grad()
def save(
    system: Drawing,
    target: str | Path,
    *,
    to: str = OWN,
    dtype: str | None = None,
    overwrite: bool = False,
    what: str = "the model",
) -> Converted:
    """Write a model as it is in memory; the target appears whole or not at all, and the model stays as it is.

    Args:
        target: must not exist, but for an empty folder where a folder is written.
        to: one of `LAYOUTS`.
        dtype: one of `DTYPES`; None keeps the types that the weights have in memory.
        overwrite: take the place of a file; a folder with something in it is never replaced.
        what: the model, for messages.

    Raises:
        UserError: for a target that stands in the way, weights that are not those of the model's config (a network with
            layers around its own), and a model that the layout has no place for.
    """
    target = Path(target)
    check_target(target, to, overwrite=overwrite)
    wanted = _wanted(dtype)
    twin: Drawing = type(system).create(system.config, "meta")  # type: ignore[arg-type]
    own, outlines = system.networks(), twin.networks()
    for name, outline in outlines.items():
        if type(own[name]) is not type(outline):
            named = f"{type(own[name]).__name__}, and its config says {type(outline).__name__}"
            raise UserError(f"the {name} of {what} is a {named}; put that in its place again to save the model")
        take_over(outline, {n: _typed(t, wanted) for n, t in own[name].state_dict().items()}, what=what)
    lost, notes = _written(twin, target, to, what, ())
    odd = _not_finite(twin, wanted) if wanted is not None else []
    if (foreign := fingerprint.of(own).get(fingerprint.PROCESSORS)) is not None:
        odd.append(f"the attention processors that are not the library's own ({foreign}) are code, and are not saved")
    return Converted(len(twin.tensors()), {NO_PLACE: lost} if lost else {}, (*odd, *notes))


def _wanted(dtype: str | None) -> torch.dtype | None:
    """The type of that name, None for none."""
    if dtype is not None and dtype not in DTYPES:
        raise_unknown("dtype", dtype, DTYPES)
    return None if dtype is None else DTYPES[dtype]


def _typed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the CPU's memory and of the type, if there is one; the tensor itself where it is both."""
    return tensor.detach().to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)


def _written(
    system: System, target: Path, to: str, source: str, missing: Collection[str]
) -> tuple[tuple[str, ...], list[str]]:
    """Write a model; returns the names that the layout has no place for, and notes."""
    if missing and to != FILE:
        lacking = " and no ".join(TITLES[part] for part in missing)
        raise UserError(f"{source} holds no {lacking}, which only a single file may lack; give one with --vae PATH")
    if to == OWN:
        metadata = {CONFIG_KEY: json.dumps(system.config.model_dump(mode="json"), sort_keys=True)}
        write_tensors(target, system.tensors(), metadata)
        return (), []
    assert not isinstance(system, CLIP)
    if to == FOLDER:
        return (), save_folder(system, target)
    if not isinstance(system, Latent):
        raise UserError(f"{source} holds a {system.kind} model; single files are of Stable Diffusion only")
    lost = write_single_file(system, target, missing=missing).dropped
    notes = [f"the file holds no {TITLES[part]}, as {source} does not; give one with --vae PATH" for part in missing]
    return lost, notes + _not_kept(system.config, target)


def check_target(target: Path, to: str, *, overwrite: bool = False) -> None:
    """Refuse an unknown layout, and a target that stands in the way or has a misleading name. Raises `UserError`.

    Args:
        overwrite: let a file stand in the way of a file.
    """
    if to not in LAYOUTS:
        raise_unknown("layout", to, LAYOUTS)
    if to != FOLDER and target.suffix != ".safetensors":
        which = "a single file" if to == FILE else "the model"
        raise UserError(f"{target}: {which} is written as safetensors, so its name must end in .safetensors")
    if to == FOLDER and target.suffix.lower() in ENDINGS:
        raise UserError(f"{target}: this layout is a folder, so its name must not end as a file's does")
    if to == FOLDER and target.is_dir() and not any(target.iterdir()):
        return
    if overwrite and to != FOLDER and target.is_file():
        return
    if target.exists() or target.is_symlink():
        kept = "; overwriting replaces a file only" if overwrite else ""
        raise UserError(f"{target} exists already; choose another name{kept}")


def _account(opened: Opened, *, replaced: bool) -> tuple[int, dict[str, tuple[str, ...]]]:
    """How many tensors are used, and which are not and why."""
    if opened.file is None:
        return sum(not tensor.is_meta for tensor in opened.system.tensors().values()), {}
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
    return _not_finite(system, dtype)


def _not_finite(system: System, dtype: torch.dtype) -> list[str]:
    """A note where weights hold what is not finite in the type that they were given."""
    odd = [name for name, tensor in system.tensors().items() if not _finite(tensor)]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return [f"{odd[0]}{more} holds values that are not finite as {str(dtype).removeprefix('torch.')}"]


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all())


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
