"""Stable Diffusion 1 and 2: published models as latent diffusion, and back.

A published model is a `Latent` like any other: a KL codec, a text tower as its conditioner, for the variants something
shown beside the latents. Here stands what turns a `Family` (configs of a single file or of a folder) into that, and the
probe that tells eps from v where no metadata does.

>>> from sfumato.checkpoints.formats.families import STABLE_DIFFUSION_1_INPAINTING
>>> config = config_of(STABLE_DIFFUSION_1_INPAINTING)
>>> sorted(config.conditions), config.prediction.parameterization, config.sampling.sampler
(['masked', 'text'], 'eps', 'plms')
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.checkpoints.formats import families
from sfumato.checkpoints.formats.families import Family, Prediction
from sfumato.checkpoints.formats.single_file import SingleFile, Written, write
from sfumato.checkpoints.io import Wanted, component, take_over
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.conditioners.shown import Depth, LowResolution, Masked
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import parse
from sfumato.systems.latent import TEXT, Latent, LatentConfig
from sfumato.systems.scheduler_config import Scheduler, from_diffusers, to_diffusers

GUIDANCE, STEPS, FEWER_STEPS = 7.5, 50, 25
_PLAIN = ("plms", "pndm_prk", "ddim", "ddpm")  # methods that want more steps
NAMES = {"network": "unet", "codec": "vae", "conditioner": "text"}
"""Parts of a `Latent` -> parts of a single file."""
TITLES = {"unet": "UNet", "vae": "first stage (VAE)", "text": "text encoder"}
"""What people call them."""
_DERIVED_UNET = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim")
_DERIVED_VAE = ("in_channels", "out_channels", "sample_size")
_TEXT_WEIGHTS = f"{TEXT}."


# --- a family as our config ------------------------------------------------------------------------------------------


def config_of(family: Family) -> LatentConfig:
    """What a published model is here.

    Raises:
        UserError: for a scheduler setting, or channels, without a counterpart.
    """
    meaning = from_diffusers(family.scheduler)
    sampler = meaning.sampling.sampler
    sampling = {"steps": STEPS if sampler in _PLAIN else FEWER_STEPS, "guidance": GUIDANCE}
    network = {key: value for key, value in family.unet.to_dict().items() if key not in _DERIVED_UNET}
    values = {
        "size": family.size,
        "codec": codec_of(family.vae),
        "conditions": {TEXT: _text_of(family)} | _shown_of(family),
        "network": network,
        "schedule": meaning.schedule,
        "prediction": meaning.prediction.model_copy(update={"parameterization": family.prediction}),
        "sampling": meaning.sampling.model_copy(update=sampling),
        "title": family.title,
    }
    return parse(LatentConfig, values, f"the configs of {family.title}")


def codec_of(vae: AutoencoderConfig) -> CodecConfig:
    """A published autoencoder's config."""
    network = {key: value for key, value in vae.to_dict().items() if key not in _DERIVED_VAE}
    values = {"kind": "kl", "size": vae.sample_size, "channels": vae.in_channels, "network": network}
    return parse(CodecConfig, values, "the autoencoder's config")


def _text_of(family: Family) -> dict[str, Any]:
    tower = {key: value for key, value in family.text.to_dict().items() if key != "model_type"}
    return {"kind": ClipPrompt.kind, "tower": tower, "pad": family.pad, "skip": 0, "final_norm": True}


def _shown_of(family: Family) -> dict[str, dict[str, Any]]:
    """What lies beside the latents, told from the number of channels."""
    latents = family.vae.latent_channels
    more, classes = family.unet.in_channels - latents, family.unet.num_class_embeds
    kinds = {0: None, 1 + latents: Masked(latents), 1: Depth(), 3: LowResolution(levels=classes or 1)}
    if more not in kinds or (more == 3) != (classes is not None):
        table = f" and a table of {classes} classes" if classes is not None else ""
        channels = f"{family.unet.in_channels} channels over {latents} of latents"
        raise UserError(f"{family.title}: a network of {channels}{table} is not known")
    part = kinds[more]
    return {} if part is None else {part.kind: part.describe()}


# --- our model as a family -------------------------------------------------------------------------------------------


def family_of(model: Latent) -> Family:
    """The family that a model belongs to, with its own configs.

    Raises:
        UserError: for a model that is not of the layout of Stable Diffusion.
    """
    unet, vae = model.denoiser.network, model.codec.network
    text = model.conditioner.parts.get(TEXT) if model.conditioner is not None else None
    parameterization = model.config.prediction.parameterization
    if not (isinstance(unet, UNet2DConditionModel) and isinstance(vae, AutoencoderKL) and isinstance(text, ClipPrompt)):
        raise UserError("only models with a KL codec and a CLIP text tower of their own have Stable Diffusion's layout")
    if parameterization not in ("eps", "v") or text.skip or not text.final_norm:
        raise UserError("Stable Diffusion's layout has no place for this model's parameterization or text states")
    towers = text.network.config
    open_clip, prediction = towers.hidden_act == "gelu", _known(parameterization)
    shown = next(iter(model.shown), None)
    names = {
        None: {"eps": "sd2-base", "v": "sd2-v"}[prediction] if open_clip else "sd1",
        Masked.kind: "sd2-inpainting" if open_clip else "sd1-inpainting",
        Depth.kind: "sd2-depth",
        LowResolution.kind: "sd-x4-upscaler",
    }
    scheduler = to_diffusers(
        Scheduler(schedule=model.config.schedule, prediction=model.config.prediction, sampling=model.config.sampling)
    )
    return replace(
        families.family_named(names[shown]),
        unet=unet.config,
        vae=vae.config,
        text=towers,
        open_clip=open_clip,
        pad=text.pad,
        prediction=prediction,
        size=model.config.size,
        scheduler=scheduler,
    )


def _known(parameterization: str) -> Literal["eps", "v"]:
    return "v" if parameterization == "v" else "eps"


def parts_of(model: Latent) -> dict[str, dict[str, Tensor]]:
    """The weights by the parts of a single file, the text tower's as `text_model.…`."""
    parts = {NAMES[name]: network.state_dict() for name, network in model.networks().items()}
    return parts | {"text": {name.removeprefix(_TEXT_WEIGHTS): tensor for name, tensor in parts["text"].items()}}


def named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part of a single file under the names of a `Latent`'s file."""
    own = next(name for name, theirs in NAMES.items() if theirs == part)
    inner = _TEXT_WEIGHTS if part == "text" else ""
    return {f"{own}.{inner}{name}": tensor for name, tensor in tensors.items()}


# --- single files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedFile:
    """A model from a single file.

    Attributes:
        system: the model; a codec where the file holds an autoencoder alone.
        file: the account of its tensors.
        notes: what a user should know, each in one sentence.
        missing: the parts that are not there, by their names in a single file; their weights are on "meta".
    """

    system: Latent | CodecSystem
    file: SingleFile
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def open_single_file(
    path: str | Path,
    *,
    prediction: Prediction = "unknown",
    averaged: bool = False,
    allow_pickle: bool = False,
    dtype: Wanted = torch.float32,
    spare: Collection[str] = (),
) -> OpenedFile:
    """Open a file in CompVis' layout.

    Args:
        prediction: "eps" or "v" overrules what the file says.
        averaged: read the running average of the UNet's weights where the file keeps it apart.
        allow_pickle: convert a pickle, in a process that can build tensors and nothing else.
        dtype: of the weights; None for the stored types.
        spare: parts ("vae", "text") that may be missing.

    Raises:
        ModelFileError: damaged, foreign, incomplete.
        UserError: when what the network predicts can be told neither from the file nor by asking the network.
    """
    try:
        file = SingleFile.open(path, prediction=prediction, averaged=averaged, allow_pickle=allow_pickle)
    except families.Undecided as error:
        file = SingleFile.open(path, prediction="eps", averaged=averaged, allow_pickle=allow_pickle)
        found = probe(_load(file, torch.float32, ("unet",)))
        if found is None:
            raise UserError(f"{path}: {error}") from None
        if found == "v":
            file = SingleFile.open(path, prediction="v", averaged=averaged, allow_pickle=allow_pickle)
        file = replace(file, why="the network was asked")
    notes = [*file.notes, file.coverage.describe()]
    if file.family is None:
        return OpenedFile(_load_codec(file, dtype), file, tuple(notes))
    notes.append(f"{file.family.title}; predicts {file.prediction} ({file.why})")
    missing = tuple(part for part in NAMES.values() if part not in file.parts)
    refuse_missing(path, [part for part in missing if part not in spare])
    return OpenedFile(_load(file, dtype, file.parts), file, tuple(notes), missing)


def refuse_missing(path: str | Path, missing: Collection[str]) -> None:
    """Refuse, with a `ModelFileError`, a model that lacks parts; of a first stage it is said how to give one."""
    if not missing:
        return
    hint = "; give one with --vae PATH (vae=)" if tuple(missing) == ("vae",) else ""
    lacking = " and no ".join(TITLES[part] for part in missing)
    raise ModelFileError(f"{path} holds no {lacking}, which drawing needs{hint}")


def _load(file: SingleFile, dtype: Wanted, parts: tuple[str, ...]) -> Latent:
    """The model of a file; with fewer than all parts the others stay on "meta"."""
    assert file.family is not None
    model = Latent.create(config_of(file.family), "meta")
    for name, network in model.networks().items():
        if NAMES[name] in parts:
            own = component(named(NAMES[name], file.read(NAMES[name], dtype)), name)
            take_over(network, _without_spare(network, own), what=str(file.path), dtype=dtype)
            network.eval()
    return model


def _without_spare(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without tables of positions, which newer libraries reckon."""
    own = network.state_dict()
    return {name: t for name, t in tensors.items() if name in own or not name.endswith("position_ids")}


def _load_codec(file: SingleFile, dtype: Wanted) -> CodecSystem:
    assert file.vae is not None
    stage = CodecSystem.create(codec_of(file.vae), "meta")
    assert stage.codec.network is not None
    take_over(stage.codec.network, file.read("vae", dtype), what=str(file.path), dtype=dtype)
    stage.codec.network.eval()
    return stage


def write_single_file(
    model: Latent, path: str | Path, dtype: torch.dtype | None = None, *, missing: Collection[str] = ()
) -> Written:
    """Write a model of this layout as one file.

    Args:
        dtype: of the weights in the file; None leaves each as it is.
        missing: parts that the model lacks, and the file then too: at most the "vae".

    Raises:
        UserError: for another model, or where it cannot be written.
    """
    parts = {part: tensors for part, tensors in parts_of(model).items() if part not in missing}
    return write(path, family_of(model), parts, dtype=dtype, missing=missing)


# --- eps or v --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model: Latent) -> Literal["eps", "v"] | None:
    """What a network predicts, by asking it once; None where its answer is neither.

    At the last step of the schedule almost nothing but noise is shown. A network that predicts eps gives its input back
    (their correlation is near 1); one that predicts v gives `alpha eps - sigma x0`, about `-x0`: hardly correlated with
    the input, and of the smoothness and about the spread of a picture's latents, unlike noise.
    """
    network, schedule = model.denoiser.network, model.config.schedule
    assert isinstance(network, UNet2DConditionModel)
    c: UNet2DConditionConfig = network.config
    x = torch.randn(1, c.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(1, 77, c.context_dim or 1)
    out = network(x, float(schedule.steps - 1), context=context).float()
    alike = _correlation(out, x[:, : out.shape[1]])
    smooth = _correlation(out[..., 1:], out[..., :-1])
    if alike > 0.8:
        return "eps"
    sized = 0.2 < float(out.std()) < 2
    return "v" if abs(alike) < 0.4 and smooth > 0.5 and sized else None


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of all elements, in [-1, 1]; 0 where one does not vary."""
    a, b = (v - v.mean() for v in (a, b))
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm > 0 and norm < float("inf") else 0.0


def with_codec(model: Latent, stage: CodecSystem, what: str) -> Latent:
    """The model with another first stage.

    Raises:
        UserError: when its latents are of another size or scale.
    """
    own, other = model.codec, stage.codec
    if (own.channels, own.factor) != (other.channels, other.factor):
        raise UserError(
            f"{what} makes {other.channels} channels at 1/{other.factor} of the size; the model needs "
            f"{own.channels} at 1/{own.factor}"
        )
    scales = [getattr(one, "scale", 1.0) for one in (own, other)]
    if abs(scales[0] - scales[1]) > 1e-3 * abs(scales[0]):
        raise UserError(f"{what} scales its latents by {scales[1]:.5g}, and the model was made for {scales[0]:.5g}")
    return Latent(model.config.model_copy(update={"codec": stage.config}), model.denoiser, other, model.conditioner)
