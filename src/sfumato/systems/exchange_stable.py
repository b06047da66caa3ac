"""Stable Diffusion 1 and 2 as folders in diffusers' layout: what such a folder means, and what is written of one.

A folder is told by its own configs, not by its name: the channels of its UNet say what the model is shown beside the
latents, its scheduler what the network predicts, its text tower and tokenizer how prompts are read. From them comes a
`Family`, and from that the `Latent`, as from a single file.

>>> pipeline_for(["text", "depth"])
'StableDiffusionDepth2ImgPipeline'
>>> empty_of(pipeline_for(["text"]), told=True)
('safety_checker', 'feature_extractor', 'image_encoder')
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.diffusers import CLASS, Component
from sfumato.checkpoints.formats.families import (
    DDPM_X4,
    UNET_1,
    UNET_X4,
    VAE_F4,
    VAE_F8,
    Family,
    Prediction,
    family_named,
    predicting,
)
from sfumato.checkpoints.io import Wanted, check_fit, take_over
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.conditioners.shown import Depth, LowResolution, Masked
from sfumato.diffusion.schedule import TableSchedule
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.networks.config import NetworkConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig
from sfumato.systems.codec import CodecSystem
from sfumato.systems.config import ScheduleConfig
from sfumato.systems.exchange_text import PAD_TOKENS, TEXT_ENCODER, TOKENIZER, Text, read_text
from sfumato.systems.latent import TEXT, Latent
from sfumato.systems.scheduler_config import KINDS, from_diffusers
from sfumato.systems.stable_diffusion import config_of, refuse_missing

PLAIN = "StableDiffusionPipeline"
PICTURES = "StableDiffusionImg2ImgPipeline"
INPAINT, DEPTH, UPSCALE = (f"StableDiffusion{what}Pipeline" for what in ("Inpaint", "Depth2Img", "Upscale"))
PIPELINES = (PLAIN, PICTURES, INPAINT, DEPTH, UPSCALE)
"""diffusers' pipelines of Stable Diffusion that can be opened."""
SCHEDULER = Path("scheduler") / "scheduler_config.json"
LOW_RES_SCHEDULER = Path("low_res_scheduler") / "scheduler_config.json"
UNET, VAE = "unet", "vae"

_BY_SHOWN = {Masked.kind: INPAINT, Depth.kind: DEPTH, LowResolution.kind: UPSCALE}
_SAFETY = ("safety_checker", "feature_extractor")
_EMPTY = {
    PLAIN: (*_SAFETY, "image_encoder"),
    INPAINT: (*_SAFETY, "image_encoder"),
    DEPTH: ("depth_estimator", "feature_extractor"),
    UPSCALE: (*_SAFETY, "watermarker"),
}
_SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"requires_safety_checker": False},
    INPAINT: {"requires_safety_checker": False, "_diffusers_version": "0.42.1"},  # which that one looks at
    UPSCALE: {"max_noise_level": 350},
}
_CORRECTED: dict[str, dict[str, Any]] = {
    PLAIN: {"steps_offset": 1, "clip_sample": False},
    PICTURES: {"steps_offset": 1, "clip_sample": False},
    INPAINT: {"steps_offset": 1, "skip_prk_steps": True},
}
"""Fields of a scheduler that diffusers' pipelines change when they open a folder."""
_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_TOLD_MORE = ("class_embed_type", "addition_embed_type", "encoder_hid_dim", "time_cond_proj_dim")
_ASIDE = {
    "safety_checker": "the safety checker of {} is left aside: nothing here looks at what is drawn",
    "depth_estimator": "the estimator of depths of {} is left aside: give an edit its map of depths",
}

ConfigT = TypeVar("ConfigT", bound=NetworkConfig)


@dataclass(frozen=True)
class Stored:
    """The weights of one of our networks in a folder: on "meta", and read, under our names."""

    seen: Mapping[str, Tensor]
    read: Callable[[], Mapping[str, Tensor]]


def network_config(kind: type[ConfigT], part: Component) -> ConfigT:
    """A network's config. Raises `UserError` for unknown keys and impossible values."""
    try:
        return kind.from_dict(part.config)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"a value of a network's config is of the wrong type or zero ({error})") from None


def fill(
    networks: Mapping[str, nn.Module],
    stored: Mapping[str, Stored],
    *,
    what: str,
    dtype: Wanted,
    missing: Collection[str] = (),
) -> None:
    """Give networks on "meta" their weights; all names and shapes are looked at before the first value is read.

    Args:
        missing: names of networks that stay on "meta".

    Raises:
        ModelFileError: for what does not fit.
    """
    nothing = Stored({}, dict)
    networks = {name: network for name, network in networks.items() if name not in missing}
    for name, network in networks.items():
        check_fit(network, stored.get(name, nothing).seen, what=what)
    for name, network in networks.items():
        take_over(network, stored.get(name, nothing).read(), what=what, dtype=dtype)
        network.eval()


def plain(part: Component) -> Stored:
    """A network whose names are ours."""
    return Stored(part.seen, lambda: dict(part.tensors.items()))  # which reads ahead


def told(text: Text) -> Stored:
    """A text tower, which is the condition called text."""
    return Stored(
        {f"{TEXT}.{name}": tensor for name, tensor in text.seen().items()},
        lambda: {f"{TEXT}.{name}": tensor for name, tensor in text.read().items()},
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def open_pipeline(
    folder: Path,
    *,
    allow_pickle: bool = False,
    prediction: Prediction = "unknown",
    dtype: Wanted = torch.float32,
    stage: CodecSystem | None = None,
    spare: Collection[str] = (),
) -> tuple[Latent, str, tuple[str, ...], tuple[str, ...]]:
    """Open a folder of one of the `PIPELINES`, by diffusers' own files.

    Args: as in `exchange.open_folder`.

    Returns:
        (model, SHA-256 of its weights, notes, the parts that are missing).

    Raises:
        ModelFileError: for parts that are missing, damaged, of another class, or do not fit one another.
        UserError: for a setting that has no counterpart here.
    """
    missing = () if (folder / VAE).is_dir() else ("vae",)
    for name in (UNET, TEXT_ENCODER):
        if not (folder / name).is_dir():
            raise ModelFileError(f"{folder} lacks the folder {name}, which drawing needs")
    refuse_missing(folder, [part for part in missing if part not in spare])
    read: Callable[[Path], Component] = partial(diffusers.read_component, allow_pickle=allow_pickle, dtype=dtype)
    unet, vae = read(folder / UNET), None if missing else read(folder / VAE)
    text = read_text(folder, allow_pickle=allow_pickle, dtype=dtype)
    index = diffusers.read_json(folder / diffusers.INDEX)
    scheduler, corrections = _scheduler(folder, str(index.get(CLASS)))
    first = _first_stage(unet, vae, stage, folder)
    family = _family(unet, first, text, scheduler, prediction, folder)
    stored = {"network": plain(unet), "conditioner": told(text)} | ({} if vae is None else {"codec": plain(vae)})
    model = Latent.create(config_of(family), "meta")
    fill(model.networks(), stored, what=str(folder), dtype=dtype, missing=() if vae is not None else ("codec",))
    why = "its scheduler says so" if prediction == "unknown" else "it was said"
    aside = [note.format(folder) for name, note in _ASIDE.items() if _holds(index, name)]
    read_ones = [part for part in (unet, vae, text.part) if part is not None]
    notes = [*unet.notes, *(() if vae is None else vae.notes), *text.notes, *corrections, *aside]
    notes.append(f"{family.title}; predicts {family.prediction} ({why})")
    return model, hashes.together(*(part.sha256 for part in read_ones)), tuple(notes), missing


def _first_stage(
    unet: Component, vae: Component | None, stage: CodecSystem | None, folder: Path
) -> AutoencoderConfig:
    """The config of the folder's own autoencoder. Where there is none: for a published network that of the published
    model, for another one that of the first stage given in its place."""
    if vae is not None:
        _check_class(vae, "AutoencoderKL", folder / VAE)
        return network_config(AutoencoderConfig, vae)
    network = network_config(UNet2DConditionConfig, unet)
    published = VAE_F4 if network.block_out_channels == UNET_X4.block_out_channels else VAE_F8
    known = network.block_out_channels in (UNET_1.block_out_channels, UNET_X4.block_out_channels)
    given = None if stage is None else stage.codec.network
    return given.config if not known and isinstance(given, AutoencoderKL) else published


def _holds(index: Mapping[str, Any], name: str) -> bool:
    """Whether a pipeline has a component of that name."""
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def _scheduler(folder: Path, pipeline: str) -> tuple[dict[str, Any], list[str]]:
    """The scheduler's fields as the pipeline takes them, and what it changes."""
    values = diffusers.read_json(folder / SCHEDULER)
    name = values.get(CLASS)
    known = KINDS[name].fields if isinstance(name, str) and name in KINDS else {}
    notes = []
    for field, value in _CORRECTED.get(pipeline, {}).items():
        if field in known and values.get(field, known[field]) != value:
            values = values | {field: value}
            if field != "steps_offset" or values.get("timestep_spacing", known.get("timestep_spacing")) == "leading":
                notes.append(f"{field} of the folder's scheduler is taken as {value}, as a {pipeline} does")
    return values, notes


def _family(
    unet: Component,
    first: AutoencoderConfig,
    text: Text,
    scheduler: dict[str, Any],
    prediction: Prediction,
    folder: Path,
) -> Family:
    """The published model that a folder comes nearest to, with the folder's own configs."""
    _check_class(unet, "UNet2DConditionModel", folder / UNET)
    network = network_config(UNet2DConditionConfig, unet)
    if first.in_channels != first.out_channels or not isinstance(first.sample_size, int):
        raise UserError("only first stages of square pictures, with as many channels in as out, can be opened")
    _check_network(network, first, text, folder)
    known = _prediction(scheduler, folder) if prediction == "unknown" else prediction
    open_clip = text.config.hidden_act == "gelu"
    family = predicting(
        replace(
            family_named(_nearest(network.in_channels - first.latent_channels, first, open_clip, known)),
            unet=network, vae=first, text=text.config, open_clip=open_clip, pad=text.pad, scheduler=scheduler,
        ),
        known,
    )  # fmt: skip
    if (folder / LOW_RES_SCHEDULER).is_file():
        low = diffusers.read_json(folder / LOW_RES_SCHEDULER)
        _check_noise(from_diffusers(low).schedule, from_diffusers(scheduler).schedule, folder)
        family = replace(family, low_res_scheduler=low)
    side = _side(unet, network)
    return replace(family, size=family.size if side is None else side * first.factor)


def _check_class(part: Component, wanted: str, where: Path) -> None:
    if (name := part.config.get(CLASS)) != wanted:
        raise ModelFileError(f"{where} holds a {name!r:.60}, where a {wanted} is expected")


def _check_network(unet: UNet2DConditionConfig, vae: AutoencoderConfig, text: Text, folder: Path) -> None:
    for field in _TOLD_MORE:
        if getattr(unet, field) is not None:
            raise UserError(
                f"{folder / UNET}: a network with {field} {getattr(unet, field)!r} is told more than a text and a "
                "time, which is not supported"
            )
    if unet.context_dim != text.config.hidden_size:
        raise ModelFileError(
            f"{folder}: the network attends to states of width {unet.context_dim}, "
            f"and the text encoder gives {text.config.hidden_size}"
        )
    if unet.out_channels != vae.latent_channels:
        raise ModelFileError(
            f"{folder}: the network gives {unet.out_channels} channels, and the latents have {vae.latent_channels}"
        )


def _prediction(scheduler: Mapping[str, Any], folder: Path) -> Literal["eps", "v"]:
    found = from_diffusers(scheduler).prediction.parameterization
    if found not in ("eps", "v"):
        raise UserError(f"{folder / SCHEDULER}: Stable Diffusion predicts eps or v, and this says {found}")
    return found


def _nearest(more: int, vae: AutoencoderConfig, open_clip: bool, prediction: Literal["eps", "v"]) -> str:
    """The name of the family with so many channels beside the latents."""
    plain = {"eps": "sd2-base", "v": "sd2-v"}[prediction] if open_clip else "sd1"
    inpainting = "sd2-inpainting" if open_clip else "sd1-inpainting"
    return {1: "sd2-depth", 3: "sd-x4-upscaler", 1 + vae.latent_channels: inpainting}.get(more, plain)


def _side(part: Component, unet: UNet2DConditionConfig) -> int | None:
    """The latents' side; the first releases say 32 where 64 is meant, as diffusers knows."""
    side = unet.sample_size
    if isinstance(side, tuple):
        if len(set(side)) != 1:
            raise UserError(f"only models of square pictures can be opened, and this one says {list(side)}")
        side = side[0]
    version = re.match(r"0\.(\d+)\.", str(part.config.get("_diffusers_version", "")))
    early = version is not None and int(version[1]) < 9
    return 64 if early and side is not None and side < 64 else side


def _check_noise(low: ScheduleConfig, own: ScheduleConfig, folder: Path) -> None:
    """The small picture gets its noise by the model's own schedule, so the folder must not say another."""
    a, b = low.build(), own.build()
    same = isinstance(a, TableSchedule) and isinstance(b, TableSchedule) and torch.equal(a.alpha_bar, b.alpha_bar)
    if not same:
        raise UserError(
            f"{folder / LOW_RES_SCHEDULER} has another noise schedule than the model's own scheduler, "
            "which is not supported"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def pipeline_for(conditions: Collection[str]) -> str:
    """The pipeline for a model with these kinds of conditions. Raises `UserError` where there is none."""
    found = [pipeline for kind, pipeline in _BY_SHOWN.items() if kind in conditions]
    if len(found) > 1:
        raise UserError("a model that is shown several things beside its latents has no counterpart in diffusers")
    return found[0] if found else PLAIN


def empty_of(pipeline: str, *, told: bool) -> tuple[str, ...]:
    """What a pipeline holds besides networks and scheduler, and no model here has.

    Args:
        told: whether the model's text tower is written.
    """
    return _EMPTY[pipeline] if told else (TEXT_ENCODER, TOKENIZER, *_EMPTY[pipeline])


def settings_of(pipeline: str) -> dict[str, Any]:
    """What else `model_index.json` says for a pipeline."""
    return _SETTINGS.get(pipeline, {})


def low_res_scheduler(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler of a small picture's noise, from the fields of the model's own."""
    return DDPM_X4 | {field: fields[field] for field in _NOISE if field in fields}


def remarks_of(model: Latent, pipeline: str, text: ClipPrompt | None) -> list[str]:
    """What someone who opens the folder with diffusers should know, each in one sentence."""
    remarks = []
    if pipeline == DEPTH:
        remarks.append(
            "the estimator of depths is a model of its own: "
            "give diffusers one, or depth_estimator=None, feature_extractor=None and a depth_map"
        )
    if pipeline == UPSCALE and (scale := getattr(model.codec, "scale", None)) != VAE_F4.scaling_factor:
        remarks.append(f"{UPSCALE} takes {VAE_F4.scaling_factor} for the scale of the latents, and here it is {scale}")
    if text is None:
        return remarks
    if text.skip:
        remarks.append(f"the model leaves out {text.skip} layers of its text encoder: give diffusers clip_skip")
    if not text.final_norm:
        remarks.append("the model takes its text encoder's states before the last norm, which diffusers always applies")
    if text.pad not in PAD_TOKENS.values():
        remarks.append(f"the model fills windows with the id {text.pad}, and the folder's tokenizer with the end mark")
    return remarks


def changed_by(pipeline: str, fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A scheduler's fields for a pipeline that changes some when it opens a folder, and a remark on each that matters.

    Args:
        fields: of the scheduler, all that its class has.
    """
    corrected = _CORRECTED.get(pipeline, {})
    leading = fields.get("timestep_spacing") == "leading"
    if "steps_offset" in fields and "steps_offset" in corrected and not leading:
        fields = fields | {"steps_offset": 1}  # which nothing but leading steps reads
    return fields, [
        f"{pipeline} of diffusers changes the scheduler's {name} when it opens the folder, so load its parts one by one"
        for name, value in corrected.items()
        if name in fields and fields[name] != value
    ]
