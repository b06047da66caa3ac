"""Systems: what a stored config means, and how its parts are put together. One file each.

>>> sorted(SYSTEMS)
['clip', 'codec', 'ddpm', 'latent']
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.io import check_is_file, read_model
from sfumato.errors import ModelFileError, raise_unknown
from sfumato.systems.clip import CLIP, CLIPConfig
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import Strict, parse
from sfumato.systems.ddpm import DDPM, DDPMConfig
from sfumato.systems.exchange import open_folder
from sfumato.systems.latent import Latent, LatentConfig

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
    """A model read from disk: the system, where it came from and the SHA-256 of its weights."""

    system: System
    path: Path
    sha256: str


SystemT = TypeVar("SystemT", bound=System)


def open_as(kind: type[SystemT], path: str | Path) -> SystemT:
    """Open a model file that must hold a certain system. Raises `ModelFileError` naming what it holds instead."""
    system = open_system(path).system
    if not isinstance(system, kind):
        raise ModelFileError(f"{path} holds a {system.kind} model, where a {kind.kind} model is needed")
    return system


def open_system(path: str | Path) -> Opened:
    """Open a model file, or a folder in diffusers' layout.

    Raises:
        ModelFileError: missing, empty, damaged, foreign, or weights that do not fit the stored config.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    check_is_file(path)
    file = read_model(path)
    if file.config is None:
        raise ModelFileError(f"{path} carries no Sfumato config, so what it is cannot be told")
    name = file.config.get("system")
    if name not in SYSTEMS:
        raise_unknown(f"system in {path}", str(name), SYSTEMS)
    config_type, system_type = SYSTEMS[name]
    config = parse(config_type, file.config, str(path))
    return Opened(system_type.load(config, file.tensors, what=str(path)), path, file.sha256)


def _open_folder(folder: Path) -> Opened:
    if not diffusers.is_pipeline(folder) and diffusers.class_of(folder) is None:
        contents = "is empty" if not any(folder.iterdir()) else "holds no run, checkpoint or diffusers pipeline"
        raise ModelFileError(f"{folder} {contents}; a model is a .safetensors file, a run or a pipeline folder")
    system, sha256 = open_folder(folder)
    return Opened(system, folder, sha256)
