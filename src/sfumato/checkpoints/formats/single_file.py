"""Stable Diffusion in one file, in the layout of CompVis: opened, accounted for, read part by part, and written.

`SingleFile.open` looks at names and shapes only: what the file holds, whether every tensor that the networks need is
there, and what is left aside and why. `read` then gives one network's weights under our names. `write` is the way back,
from the same tables, bit for bit.

>>> file = SingleFile.open("model.ckpt")  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
    ...
sfumato.errors.ModelFileError: no model at model.ckpt
>>> sorted(PARTS)
['text', 'unet', 'vae']
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.formats import pickles
from sfumato.checkpoints.formats.compvis import diffusers_stage_map, stage_map, unet_map
from sfumato.checkpoints.formats.families import (
    PARTS_KEY,
    Family,
    Found,
    Place,
    Prediction,
    detect,
    stored_parts,
)
from sfumato.checkpoints.formats.open_clip import clip_map, ignored_of_open_clip, open_clip_map
from sfumato.checkpoints.io import Wanted
from sfumato.checkpoints.keymap import Coverage, Ignored, KeyMap, Rule, Step, check_cover
from sfumato.checkpoints.tensors import Lazily, TensorFile, write_tensors
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.networks.clip_text import CLIPTextConfig
from sfumato.networks.outline import made_on
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel

PARTS = ("unet", "vae", "text")
"""The networks of a model, as they are called here."""

AVERAGED = "the running average of the network's weights, which is read when it is asked for"
LAST_STEP = "the network's weights of the last step, instead of which their running average is read"
IGNORED = (
    Ignored(r"(first_stage_model\.)?model_ema\..+", AVERAGED),
    Ignored(
        r"betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|posterior|log_one_minus)_\w+|lvlb_weights|logvar"
        r"|denoiser\.sigmas|low_scale_model\.\w+",
        "tables of the noise schedule, which follow from the config",
    ),
    Ignored(r"(first_stage_model\.)?loss\..+", "what the autoencoder was trained against"),
    Ignored(r"depth_model\..+", "the estimator of depths, which is a model of its own"),
    Ignored(r".+\.position_ids", "a table that follows from the config"),
    Ignored(
        r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?(text_projection(\.weight)?|logit_scale)",
        "CLIP's comparison of texts with pictures",
    ),
    Ignored(r"embedding_manager\..+", "words that textual inversion learnt, or would have, when the model was trained"),
    Ignored("global_step|scale_factor|v_pred|ztsnr", "a mark or a number, which has been taken into account"),
)
"""Tensors that single files hold and no network needs, with the reasons."""
_WRAPPER = "state_dict."


@dataclass(frozen=True)
class SingleFile:
    """A file that has been opened and accounted for, and whose tensors are still on the disk.

    Attributes:
        path: where it is.
        family: what it holds, with the configs of its networks; None for an autoencoder alone.
        vae: the config of its autoencoder, None if there is none.
        prediction: what the network predicts; "unknown" for an autoencoder alone.
        why: what said so.
        coverage: which names are used, and which are left aside.
        notes: sentences that a user should see.
    """

    path: Path
    family: Family | None
    vae: AutoencoderConfig | None
    prediction: Prediction
    why: str
    coverage: Coverage
    notes: tuple[str, ...]
    _file: TensorFile
    _names: dict[str, str]
    _tables: dict[str, KeyMap]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        averaged: bool = False,
        prediction: Prediction = "unknown",
        family: Family | None = None,
        allow_pickle: bool = False,
    ) -> SingleFile:
        """Look at a file.

        Args:
            path: of a safetensors file, or, where that is allowed, of a pickle (`.ckpt`, `.bin`, `.pt`); its content
                counts, not its name.
            averaged: read the running average of the UNet's weights (EMA) where the file keeps it apart.
            prediction: "eps" or "v" where the file does not say, or to overrule it.
            family: configs to use instead of those that are found; for an autoencoder alone it has no meaning.
            allow_pickle: convert a pickle, in a process of its own that builds tensors and nothing else.

        Raises:
            ModelFileError: for what is damaged, foreign, incomplete, or has tensors that nothing accounts for.
            UserError: when it cannot be told whether the network predicts eps or v.
        """
        file, notes = pickles.open_tensors(path, allow_pickle=allow_pickle)
        names = unwrapped(file.seen)
        found = _detected(file, names, family, path)
        family = found.family(prediction) if found.families else None
        if family is not None and (scale := file.number(names.get("scale_factor", ""))) is not None:
            family = replace(family, vae=replace(family.vae, scaling_factor=scale))
        vae = found.vae if family is None else family.vae
        tables = _tables(found.places, family, vae)
        if averaged:
            names = _with_average(names, found, family, tables, path)
        coverage = _accounted(file, names, found, family, vae, tables, averaged=averaged, what=str(path))
        known: Prediction = "unknown" if family is None else family.prediction
        why = found.why if prediction == "unknown" else "it was said"
        return cls(Path(path), family, vae, known, why, coverage, notes, file, names, tables)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which networks are in the file."""
        return tuple(part for part in PARTS if part in self._tables)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the tensors that nothing here uses."""
        return self.coverage.dropped

    def read(self, part: str, dtype: Wanted = None) -> dict[str, Tensor]:
        """A network's weights under our names, each read when its turn comes.

        Args:
            part: "unet", "vae" or "text".
            dtype: None for the stored type, in which the tensors stay mapped from the disk.
        """
        if part not in self._tables:
            raise ModelFileError(f"{self.path} holds no {part}, only {', '.join(self.parts)}")
        table = self._tables[part]
        used = set(self.coverage.matched)
        mine = {name: (self._file, s) for name, s in self._names.items() if name in used and table.knows(name)}
        return table.to_ours(Lazily(mine, dtype))[0]


def unwrapped(seen: Mapping[str, Tensor]) -> dict[str, str]:
    """The names that count -> the file's names; they differ where all are wrapped as `state_dict.…`."""
    wrapped = bool(seen) and all(name.startswith(_WRAPPER) or "." not in name for name in seen)
    return {name.removeprefix(_WRAPPER) if wrapped else name: name for name in seen}


def _detected(file: TensorFile, names: Mapping[str, str], family: Family | None, path: str | Path) -> Found:
    step = file.number(names.get("global_step", ""))
    metadata = file.metadata if step is None else {"global_step": f"{step:.0f}", **file.metadata}
    try:
        return detect({name: file.seen[stored] for name, stored in names.items()}, metadata, family)
    except UserError as error:
        raise ModelFileError(f"{path} cannot be opened: {error}") from None


# --- tables and the account -------------------------------------------------------------------------------------------


def _tables(places: Mapping[str, Place], family: Family | None, vae: AutoencoderConfig | None) -> dict[str, KeyMap]:
    """For each part that is there, the table of its names with the file's prefix."""
    tables = {}
    for part, place in places.items():
        if part == "vae" and vae is not None:
            tables[part] = _vae_table(vae, place)
        elif part == "unet" and family is not None:
            tables[part] = unet_map(family.unet).under(place.prefix)
        elif part == "text" and family is not None:
            tables[part] = _text_table(family.text, place)
    return tables


def _vae_table(config: AutoencoderConfig, place: Place) -> KeyMap:
    if place.layout == "compvis":
        return stage_map(config).under(place.prefix)
    return diffusers_stage_map(old=place.layout == "diffusers-old").under(place.prefix)


def _text_table(config: CLIPTextConfig, place: Place) -> KeyMap:
    if place.layout == "open_clip":
        return open_clip_map(config).under(place.prefix)
    return clip_map(flat=place.layout == "clip-flat").under(place.prefix)


def _wanted(part: str, family: Family | None, vae: AutoencoderConfig | None) -> dict[str, Tensor]:
    """Names and shapes of a part's weights, as tensors on "meta"."""
    if part == "text" and family is not None:
        return family.text.tensors()
    config = vae if part == "vae" else family.unet if family is not None else None
    return meta_tensors(config) if config is not None else {}


def meta_tensors(config: UNet2DConditionConfig | AutoencoderConfig) -> dict[str, Tensor]:
    """Names and shapes of a network's weights, as tensors on "meta"."""
    return dict(_state_on_meta(config))


@lru_cache(maxsize=16)
def _state_on_meta(config: UNet2DConditionConfig | AutoencoderConfig) -> dict[str, Tensor]:
    with made_on("meta"):
        network: torch.nn.Module
        if isinstance(config, UNet2DConditionConfig):
            network = UNet2DConditionModel(config)
        else:
            network = AutoencoderKL(config)
    return network.state_dict()


def _with_average(
    names: Mapping[str, str], found: Found, family: Family | None, tables: Mapping[str, KeyMap], path: str | Path
) -> dict[str, str]:
    """Names with the UNet's averaged weights in the place of the last ones."""
    if family is None or "unet" not in tables or not found.averaged:
        raise UserError(f"{path} holds no running average of the weights beside the weights themselves")
    places = set(tables["unet"].names_of_theirs(meta_tensors(family.unet)).values())
    chosen = {}
    for name in places:
        flat = "model_ema." + name.removeprefix("model.").replace(".", "")
        if flat not in names:
            raise ModelFileError(f"{path} lacks the running average of {name}")
        chosen[name] = names[flat]
    used = set(chosen.values())
    return {name: stored for name, stored in {**names, **chosen}.items() if name in chosen or stored not in used}


def _accounted(
    file: TensorFile,
    names: Mapping[str, str],
    found: Found,
    family: Family | None,
    vae: AutoencoderConfig | None,
    tables: Mapping[str, KeyMap],
    *,
    averaged: bool,
    what: str,
) -> Coverage:
    """Every name of the file is needed, or left aside for a published reason."""
    table = KeyMap(())
    wanted: dict[str, Tensor] = {}
    for part, own in tables.items():
        table += own.under(ours=f"{part}.")
        wanted |= {f"{part}.{name}": tensor for name, tensor in _wanted(part, family, vae).items()}
    ignored: tuple[Ignored, ...] = IGNORED
    if family is not None and found.places.get("text", Place("", "")).layout == "open_clip":
        prefix = re.escape(found.places["text"].prefix)
        ignored += tuple(Ignored(f"{prefix}({o.names})", o.reason) for o in ignored_of_open_clip(family.text))
    seen = {name: file.seen[stored] for name, stored in names.items()}
    coverage = check_cover(table, seen, wanted, ignored, what=what)
    if averaged:
        replaced = tuple(sorted(set(file.seen) - set(names.values())))
        coverage = Coverage(coverage.matched, {**coverage.ignored, LAST_STEP: replaced})
    return coverage


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What `write` did: the file's SHA-256, the names in it, and the names of ours that the layout has no place for."""

    sha256: str
    names: tuple[str, ...]
    dropped: tuple[str, ...]


def write(
    path: str | Path,
    family: Family,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    missing: Collection[str] = (),
) -> Written:
    """Write a model as one safetensors file in CompVis' layout.

    The configs travel in its metadata, and what ModelSpec says of it.

    Args:
        path: of the file.
        family: with the configs of the networks.
        parts: "unet", "vae" and "text" -> its weights under our names; a text tower's may lack `text_model.`, as
            transformers names them now.
        dtype: of the weights in the file; None leaves each as it is.
        missing: parts that are left out: "vae", for the first stage can be given when the file is opened.

    Raises:
        UserError: when the weights do not fit the configs, or the file cannot be written.
    """
    plan: dict[str, Step] = {}
    source: dict[str, Tensor] = {}
    dropped: list[str] = []
    for part in PARTS:
        if part not in parts and part == "vae" and part in missing:
            continue
        if part not in parts:
            raise UserError(f"a single file needs the weights of {', '.join(PARTS)}; {part} is missing")
        own = _as_stored(parts[part]) if part == "text" else dict(parts[part])
        wanted = _wanted(part, family, family.vae)
        aside = [name for name in own if name not in wanted and _SPARE.fullmatch(name)]
        own = {name: tensor for name, tensor in own.items() if name not in aside}
        _check_fit(own, wanted, f"the {part} of {family.title}")
        table = _tables({part: _STANDARD[part, family.open_clip]}, family, family.vae)[part].under(ours=f"{part}.")
        steps, unmatched = table.plan_of_theirs(f"{part}.{name}" for name in own)
        if unmatched:
            raise UserError(f"the layout of single files has no place for {', '.join(unmatched[:10])}")
        plan |= steps
        source |= {f"{part}.{name}": tensor for name, tensor in own.items()}
        dropped += [f"{part}.{name}" for name in aside]

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    seen = {name: torch.empty_like(tensor, device="meta") for name, tensor in source.items()}
    outline = {name: typed(step.of(seen)) for name, step in plan.items()}
    sha256 = write_tensors(path, outline, _metadata(family), lambda name: typed(plan[name].of(source)))
    return Written(sha256, tuple(sorted(plan)), tuple(sorted(dropped)))


_STANDARD = {
    ("unet", True): Place("model.diffusion_model.", "compvis"),
    ("vae", True): Place("first_stage_model.", "compvis"),
    ("text", True): Place("cond_stage_model.model.", "open_clip"),
    ("text", False): Place("cond_stage_model.transformer.", "clip"),
}
_STANDARD |= {(part, False): _STANDARD[part, True] for part in ("unet", "vae")}
_SPARE = re.compile(r"(.+\.)?position_ids|text_projection\.weight|logit_scale")


def _as_stored(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's weights with `text_model.` before the names that lack it."""
    inner = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(inner) else name: tensor for name, tensor in text.items()}


def _check_fit(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Names and shapes must be those of the config."""
    identity = KeyMap([Rule("{rest}", "{rest}")])
    try:
        check_cover(identity, own, wanted, what=what)
    except ModelFileError as error:
        raise UserError(str(error)) from None


def _metadata(family: Family) -> dict[str, str]:
    return {
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/CompVis/latent-diffusion",
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[family.prediction],
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": family.title,
        PARTS_KEY: stored_parts(family),
    }
