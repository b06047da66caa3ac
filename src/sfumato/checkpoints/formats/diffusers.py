"""Folders in diffusers' layout: one sub-folder per component, each with `config.json` and its weights.

The weights are safetensors, whole or in shards with an index; `….fp16.safetensors` and the like are variants of them,
and one is read where no plain weights lie beside it. Tensors are read when they are asked for, in the wanted type. A
folder is written under another name beside its own and renamed when it is whole.

>>> import tempfile, torch
>>> place = Path(tempfile.mkdtemp())
>>> with new_folder(place / "model") as folder:
...     write_component(folder / "vae", "VQModel", {"latent_channels": 2}, {"weight": torch.ones(2)})
>>> found = read_component(place / "model" / "vae")
>>> found.config, found.tensors["weight"].tolist(), is_pipeline(place / "model")
({'_class_name': 'VQModel', 'latent_channels': 2}, [1.0, 1.0], False)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints import hashes, tensors
from sfumato.checkpoints.formats import pickles
from sfumato.checkpoints.formats.families import refuse_peft
from sfumato.checkpoints.io import Wanted, explain_os_error
from sfumato.checkpoints.tensors import Lazily, TensorFile
from sfumato.errors import ModelFileError, UserError

INDEX = "model_index.json"
CONFIG = "config.json"
CLASS = "_class_name"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
"""What transformers calls the weights of a component of its own."""
_MAX_JSON = 2**20

_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin|ckpt)"
    r"(?P<index>\.index(\.(?P<later>\w+))?\.json)?"
)
_VARIANTS = ("", "fp16", "bf16")  # in the order of preference; others follow by name

# names of the first releases for the parts of an attention over pictures
_EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EARLIER_NAME = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_EARLIER)})\.(weight|bias)")


@dataclass(frozen=True)
class Component:
    """A network of a pipeline, its tensors still on the disk.

    Attributes:
        config: its JSON config.
        tensors: under the names of today, each read when it is asked for.
        seen: the same on "meta", of the stored shapes and types.
        sha256: of its weights' files, hexadecimal.
        notes: what a user should know of how it was opened, each in one sentence.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    seen: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder looks like a diffusers pipeline."""
    return (Path(folder) / INDEX).is_file()


def read_json(path: Path, most: int = _MAX_JSON) -> dict[str, Any]:
    """A JSON object. Raises `ModelFileError` when it is missing, larger than `most` bytes, or not an object."""
    try:
        if path.stat().st_size > most:
            raise ModelFileError(f"{path} is larger than a config can be")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise ModelFileError(f"{path} is not readable JSON") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return values


def class_of(folder: str | Path) -> str | None:
    """The class of the single component that a folder holds, None where it holds none."""
    path = Path(folder) / CONFIG
    name = read_json(path).get(CLASS) if path.is_file() else None
    return name if isinstance(name, str) else None


def addition_in(folder: str | Path) -> str | None:
    """What a folder holds that is put beside a model and is none, told by its files; None for anything else."""
    names = {path.name for path in Path(folder).iterdir()}
    if "adapter_config.json" in names:
        return "a PEFT adapter (a LoRA, most likely)"
    if any(name.startswith("pytorch_lora_weights.") for name in names):
        return "a LoRA"
    return "a textual inversion" if any(name.startswith("learned_embeds") for name in names) else None


# --- reading -------------------------------------------------------------------------------------------------------


def read_component(folder: Path, *, allow_pickle: bool = False, dtype: Wanted = None) -> Component:
    """A component's config and weights.

    Args:
        allow_pickle: convert weights that are there as a pickle only, in a process that can build tensors alone.
        dtype: that tensors are read in; None for the stored types.

    Raises:
        ModelFileError: for weights that are missing, damaged, incomplete, or a pickle that is not allowed.
    """
    config = read_json(folder / CONFIG)
    chosen = _chosen(folder, allow_pickle)
    shards = {chosen.string: None} if not chosen["index"] else _shards(folder, chosen.string)
    places: dict[str, tuple[TensorFile, str]] = {}
    notes = [f"{folder} has no plain weights; its variant {_variant(chosen)} is read"] if _variant(chosen) else []
    for file, listed in shards.items():
        opened, said = pickles.open_tensors(folder / file, allow_pickle=allow_pickle)
        notes += said
        if listed is not None:
            _check_shard(opened, listed, folder / file, chosen.string)
        for name in opened.seen:
            if (now := _now(name)) in places:
                raise ModelFileError(f"{folder / file} holds {now} a second time")
            places[now] = opened, name
    seen = {name: file.seen[stored] for name, (file, stored) in places.items()}
    refuse_peft(seen, str(folder))
    sha256 = hashes.together(*(_sha256(folder / file) for file in shards))
    return Component(config, Lazily(places, dtype), seen, sha256, tuple(notes))


def component_sha256(folder: Path) -> str:
    """One SHA-256, hexadecimal, for a component's weights and what its config says of them."""
    chosen = _chosen(folder, allow_pickle=True)
    files = [chosen.string] if not chosen["index"] else list(_shards(folder, chosen.string))
    return hashes.together(*(_sha256(folder / file) for file in files), hashes.sha256(folder / CONFIG))


def _sha256(path: Path) -> str:
    try:
        return hashes.sha256(path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {explain_os_error(error)}") from None


def _chosen(folder: Path, allow_pickle: bool) -> re.Match[str]:
    """The file or index to read: safetensors before pickles, no variant before fp16, bf16 and others."""
    found = [one for path in folder.iterdir() if (one := _FILE.fullmatch(path.name)) is not None]
    kinds = ("safetensors", "bin", "ckpt") if allow_pickle else ("safetensors",)
    usable = [one for one in found if one["kind"] in kinds]
    if usable:
        return min(usable, key=lambda one: (kinds.index(one["kind"]), *_rank(one)))
    pickle = min((one.string for one in found), default="")
    hint = f"; {pickle} is a pickle and is not opened without --allow-pickle (allow_pickle=True)" if pickle else ""
    raise ModelFileError(f"{folder} holds no safetensors weights ({WEIGHTS}){hint}")


def _variant(file: re.Match[str]) -> str:
    return file["variant"] or file["later"] or ""


def _rank(file: re.Match[str]) -> tuple[Any, ...]:
    """The lower the better: by variant, then whole files before shards."""
    variant = _variant(file)
    place = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
    return place, variant, file["index"] is not None, file.string


def _shards(folder: Path, index: str) -> dict[str, set[str] | None]:
    """File -> the tensors that an index says are in it, in the order of the files' names."""
    table = read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise ModelFileError(f"{folder / index} has no weight_map that tells the file of each tensor")
    shards: dict[str, set[str] | None] = {}
    for file in sorted(set(table.values())):
        if not file or Path(file).name != file or "\\" in file or not file.isprintable():
            raise ModelFileError(f"{folder / index} points outside its folder, to {file!r:.100}")
        if not (folder / file).is_file():
            raise ModelFileError(f"{folder} lacks {file}, which {index} lists")
        shards[file] = {name for name, where in table.items() if where == file}
    return shards


def _check_shard(file: TensorFile, listed: set[str], path: Path, index: str) -> None:
    """A shard must hold what its index says, and nothing else."""
    if missing := sorted(listed - file.seen.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(f"{path} lacks {missing[0]}{more}, which {index} says it holds")
    if foreign := sorted(file.seen.keys() - listed):
        raise ModelFileError(f"{path} holds {foreign[0]}, which {index} does not list there")


def _now(name: str) -> str:
    """Today's name of a tensor."""
    found = _EARLIER_NAME.fullmatch(name)
    return f"{found[1]}.{_EARLIER[found[2]]}.{found[3]}" if found else name


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which takes the place of `path` at the end; on failure nothing is left.

    Raises:
        UserError: when `path` exists and is not an empty folder, or cannot be written.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty folder, so nothing is written there")
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"could not write {path}: {explain_os_error(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_component(folder: Path, class_name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a component's config and weights into a folder, which is made. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {CLASS: class_name, **config})
    write_tensors(folder / WEIGHTS, weights)


def write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write plain safetensors, one tensor at a time, marked as torch's, as others expect. Raises `OSError`."""
    try:
        tensors.write_tensors(path, weights, {"format": "pt"})
    except UserError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # the sentence is for the whole folder to say
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, its folder included. Raises `OSError`."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, its folder included. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
