"""Systems: what a stored config means, and how its parts are put together. One file each.

>>> sorted(SYSTEMS)
['clip', 'codec', 'ddpm', 'latent']
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.families import Prediction
from sfumato.checkpoints.formats.single_file import SingleFile
from sfumato.checkpoints.io import Wanted, check_is_file, read_header, read_model, stored_config
from sfumato.errors import ModelFileError, UserError, raise_unknown
from sfumato.systems import ldm_config
from sfumato.systems.clip import CLIP, CLIPConfig
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import Strict, parse
from sfumato.systems.ddpm import DDPM, DDPMConfig
from sfumato.systems.exchange import open_folder
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.systems.stable_diffusion import open_single_file, with_codec

System = DDPM | Latent | CodecSystem | CLIP
"""What a model file can hold."""

Drawing = DDPM | Latent
"""What draws pictures."""

SYSTEMS: dict[str, tuple[type[Strict], Any]] = {
    "clip": (CLIPConfig, CLIP),
    "codec": (CodecConfig, CodecSystem),
    "ddpm": (DDPMConfig, DDPM),
    "latent": (LatentConfig, Latent),
}


@dataclass(frozen=True)
class Opened:
    """A model read from disk.

    Attributes:
        system: the model.
        path: where it came from.
        sha256: of its weights, hexadecimal; of the model's own, where another first stage was put in.
        notes: what a user should know of how it was opened, each in one sentence.
        file: the account of the tensors of a single file that another program wrote.
        opening: the options that it was opened with, where they change what it draws, as JSON.
        missing: the parts ("vae", "text") that are not there; their weights are on "meta".
    """

    system: System
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()
    file: SingleFile | None = None
    opening: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


SystemT = TypeVar("SystemT", bound=System)


def open_as(kind: type[SystemT], path: str | Path, *, allow_pickle: bool = False) -> SystemT:
    """Open a model file that must hold a certain system. Raises `ModelFileError` naming what it holds instead."""
    system = open_system(path, allow_pickle=allow_pickle).system
    if not isinstance(system, kind):
        raise ModelFileError(f"{path} holds a {system.kind} model, where a {kind.kind} model is needed")
    return system


def open_codec(path: str | Path, *, allow_pickle: bool = False) -> tuple[CodecSystem, str]:
    """A first stage, alone or inside a latent model, and the SHA-256 of its file. Raises `ModelFileError` otherwise."""
    opened = open_system(path, allow_pickle=allow_pickle, incomplete=True)
    system = opened.system
    if "vae" in opened.missing:
        raise ModelFileError(f"{path} holds a model without its first stage (VAE), so that of another one is needed")
    if isinstance(system, Latent):
        system = CodecSystem(system.config.codec, system.codec)
    if not isinstance(system, CodecSystem):
        raise ModelFileError(f"{path} holds a {system.kind} model, which has no first stage (a codec)")
    return system, opened.sha256


def open_system(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    prediction: Prediction = "unknown",
    averaged: bool = False,
    vae: str | Path | None = None,
    dtype: Wanted = torch.float32,
    incomplete: bool = False,
) -> Opened:
    """Open a model file of ours, a single file of Stable Diffusion, a checkpoint of latent diffusion with its YAML
    beside it (`NAME.yaml` or `config.yaml`), or a folder in diffusers' layout.

    Args:
        allow_pickle: convert a `.ckpt` or `.bin`, in a process that can build tensors and nothing else.
        prediction: "eps" or "v", of a foreign model, where nothing says it or what says it is wrong.
        averaged: read the running average of the weights (EMA) of a single file that keeps it apart.
        vae: a first stage to use instead of the model's own, or where it has none.
        dtype: of the weights of latent models; None leaves them as stored.
        incomplete: open a published model too that lacks its first stage or its text encoder, see `Opened.missing`;
            such a one cannot draw.

    Raises:
        ModelFileError: missing, empty, damaged, foreign, or weights that do not fit the stored config.
        UserError: for an option that means nothing for this model.
    """
    path = Path(path)
    if not path.is_dir():
        check_is_file(path)
    stage, sha256 = open_codec(vae, allow_pickle=allow_pickle) if vae is not None else (None, "")
    spare = ("vae", "text") if incomplete else ("vae",) if vae is not None else ()
    if path.is_dir():
        opened = _open_folder(path, allow_pickle, prediction, averaged, dtype, stage, spare)
    else:
        own = _own_config(path)
        if own is None:
            opened = _open_foreign(path, allow_pickle, prediction, averaged, dtype, spare)
        elif prediction != "unknown" or averaged:
            raise UserError(f"{path} says itself what it predicts and holds one set of weights; leave the options out")
        else:
            opened = _open_own(path, dtype)
    how: dict[str, Any] = {"prediction": prediction} if prediction != "unknown" else {}
    opened = replace(opened, opening=how | ({"averaged": True} if averaged else {}))
    if stage is None:
        return opened
    if not isinstance(opened.system, Latent):
        raise UserError(f"{path} holds a {opened.system.kind} model, which takes no other first stage")
    told = {"vae": {"path": str(Path(str(vae)).resolve()), "sha256": sha256}}
    missing = tuple(part for part in opened.missing if part != "vae")
    system = with_codec(opened.system, stage, str(vae))
    return replace(opened, system=system, opening=opened.opening | told, missing=missing)


def _own_config(path: Path) -> dict[str, Any] | None:
    """The config that a file of ours carries; None for any other file, sound or not."""
    try:
        return stored_config(path, read_header(path))
    except (ModelFileError, OSError):
        return None


def _open_own(path: Path, dtype: Wanted) -> Opened:
    file = read_model(path)
    assert file.config is not None
    name = file.config.get("system")
    if name not in SYSTEMS:
        raise_unknown(f"system in {path}", str(name), SYSTEMS)
    config_type, system_type = SYSTEMS[name]
    config = parse(config_type, file.config, str(path))
    options = {"dtype": dtype} if system_type is Latent else {}
    return Opened(system_type.load(config, file.tensors, what=str(path), **options), path, file.sha256)


def _open_foreign(
    path: Path,
    allow_pickle: bool,
    prediction: Prediction,
    averaged: bool,
    dtype: Wanted,
    spare: Collection[str],
) -> Opened:
    if (values := ldm_config.beside(path)) is not None:
        if prediction != "unknown":
            raise UserError(f"the config beside {path} says what its network predicts; leave the option out")
        opened = ldm_config.open_checkpoint(path, values, averaged=averaged, allow_pickle=allow_pickle, dtype=dtype)
        return Opened(opened.system, path, hashes.sha256(path), opened.notes)
    found = open_single_file(
        path, prediction=prediction, averaged=averaged, allow_pickle=allow_pickle, dtype=dtype, spare=spare
    )
    return Opened(found.system, path, hashes.sha256(path), found.notes, found.file, missing=found.missing)


def _open_folder(
    folder: Path,
    allow_pickle: bool,
    prediction: Prediction,
    averaged: bool,
    dtype: Wanted,
    stage: CodecSystem | None,
    spare: Collection[str],
) -> Opened:
    if not diffusers.is_pipeline(folder) and diffusers.class_of(folder) is None:
        if (title := diffusers.addition_in(folder)) is not None:
            raise ModelFileError(f"{folder} holds {title}, which changes a model and is not a model to draw with")
        contents = "is empty" if not any(folder.iterdir()) else "holds no run, checkpoint or diffusers pipeline"
        raise ModelFileError(f"{folder} {contents}; a model is a .safetensors file, a run or a pipeline folder")
    if averaged:
        raise UserError(f"{folder} is a folder, which keeps no running average of the weights apart; leave it out")
    found = open_folder(
        folder, allow_pickle=allow_pickle, prediction=prediction, dtype=dtype, stage=stage, spare=spare
    )
    hashes.remember(folder, found.sha256)
    return Opened(found.system, folder, found.sha256, found.notes, missing=found.missing)
