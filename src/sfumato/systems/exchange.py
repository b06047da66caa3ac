"""Models as folders in diffusers' layout, both ways.

The networks and the scheduler go into files that diffusers reads, and so does a CLIP text tower with its tokenizer.
What these cannot say (the words and classes that a model knows, how it was trained, its title) goes into `sfumato.json`
beside them, and the weights of another text encoder that was trained with the model into `conditioner.safetensors`. A
folder without `sfumato.json` is read as far as diffusers' own files tell; where there is one, the scheduler still has
the last word, for it may have been exchanged.

| system | folder |
|---|---|
| a codec | an `AutoencoderKL` or `VQModel` |
| DDPM, and latent diffusion without a codec or anything attended to | `DDPMPipeline` or `DDIMPipeline` |
| latent diffusion whose network attends to nothing | `LDMPipeline` |
| latent diffusion with a context | `StableDiffusionPipeline` |
| the same, shown masked pictures, depths, or small pictures | `StableDiffusion…` `Inpaint`, `Depth2Img`, `Upscale` |

The last two have no text encoder there unless it is a CLIP text tower: give them `text_encoder=None, tokenizer=None`
when opening and `prompt_embeds` when drawing.

>>> import tempfile
>>> config = CodecConfig(kind="vq", size=8, network={"block_out_channels": [8], "norm_num_groups": 4})
>>> system = CodecSystem.create(config)
>>> folder = tempfile.mkdtemp()
>>> save_folder(system, folder), open_folder(folder).system.config == config
([], True)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.diffusers import CLASS, Component
from sfumato.checkpoints.formats.families import Prediction
from sfumato.checkpoints.io import Wanted, read_model
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.diffusion.schedule import TableSchedule
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionModel
from sfumato.systems import exchange_stable as stable
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import PredictionConfig, SamplingConfig, ScheduleConfig, parse
from sfumato.systems.ddpm import DDPM, DDPMConfig, config_from_diffusers
from sfumato.systems.exchange_stable import SCHEDULER, UNET, VAE, Stored, fill, network_config, plain
from sfumato.systems.exchange_text import (
    CLASSES,
    DECISIVE,
    PAD_TOKENS,
    TEXT_ENCODER,
    TOKENIZER,
    Text,
    read_text,
    tower_config,
    write_text,
)
from sfumato.systems.latent import TEXT, Latent, LatentConfig
from sfumato.systems.scheduler_config import Scheduler, from_diffusers, to_diffusers
from sfumato.systems.stable_diffusion import refuse_missing

Exchanged = DDPM | Latent | CodecSystem
"""Systems that have a counterpart in diffusers."""

Read = Callable[[Path], Component]

OWN = "sfumato.json"
CONDITIONER = "conditioner.safetensors"
FIRST_STAGES = ("AutoencoderKL", "VQModel")
_PIXELS, _LATENTS = ("DDPMPipeline", "DDIMPipeline"), "LDMPipeline"
_FAITHFUL = ("DDPMScheduler", "DDIMScheduler")  # the pipelines of pixels run these as they are meant
_DERIVED = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
_NETWORKS = (AutoencoderKL, VQModel, UNet2DModel, UNet2DConditionModel)
_TEXT = f"{TEXT}."

ConfigT = TypeVar("ConfigT", DDPMConfig, LatentConfig)


@dataclass(frozen=True)
class OpenedFolder:
    """A model from a folder.

    Attributes:
        system: the model.
        sha256: of its weights (for a codec, of its config too), hexadecimal.
        notes: what a user should know of how it was opened, each in one sentence.
        missing: the parts that are not there: at most the "vae", whose weights are on "meta" then.
    """

    system: Exchanged
    sha256: str
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass
class _Layout:
    """What a folder holds: its pipeline's name (None for a component alone), networks by the names of ours, and a CLIP
    text tower."""

    pipeline: str | None
    folders: dict[str, str]
    scheduler: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)
    text: ClipPrompt | None = None


# --- writing ---------------------------------------------------------------------------------------------------------


def save_folder(system: Exchanged, folder: str | Path) -> list[str]:
    """Write a model as a folder that diffusers opens, and `sfumato.systems.open_system` too, with the same tensors.

    Args:
        folder: a new or empty one; it appears whole or not at all.

    Returns:
        What a user should know of the folder, each in one sentence: a sampler that diffusers does not have.

    Raises:
        UserError: when something stands there, or cannot be written, or a part of the model has no counterpart.
    """
    layout, networks = _layout(system), _networks(system)
    own = system.config.model_dump(mode="json")
    with diffusers.new_folder(folder) as place:
        for name, where in layout.folders.items():
            network = networks[name]
            assert isinstance(network, _NETWORKS)
            config = network.config.to_dict()
            diffusers.write_component(place / where, type(network).__name__, config, network.state_dict())
        if layout.scheduler is not None:
            diffusers.write_json(place / SCHEDULER, layout.scheduler)
            if layout.pipeline == stable.UPSCALE:
                diffusers.write_json(place / stable.LOW_RES_SCHEDULER, stable.low_res_scheduler(layout.scheduler))
        if layout.pipeline is not None:
            diffusers.write_json(place / diffusers.INDEX, _index(layout, networks))
        _write_conditioner(place, layout.text, networks.get("conditioner"))
        diffusers.write_json(place / OWN, own)
    return layout.remarks


def _write_conditioner(place: Path, text: ClipPrompt | None, network: nn.Module | None) -> None:
    """A CLIP text tower goes where diffusers looks for it, other weights into a file of ours."""
    weights = network.state_dict() if network is not None else {}
    if text is not None:
        tower = {name.removeprefix(_TEXT): tensor for name, tensor in weights.items() if name.startswith(_TEXT)}
        write_text(place, text, tower)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_TEXT)}
    if weights:
        diffusers.write_tensors(place / CONDITIONER, weights)


def _networks(system: Exchanged) -> dict[str, nn.Module]:
    if not isinstance(system, CodecSystem):
        return system.networks()
    return {"codec": system.codec.network} if system.codec.network is not None else {}


def _layout(system: Exchanged) -> _Layout:
    """Where the parts of a system go. Raises `UserError` for what diffusers does not have."""
    if isinstance(system, CodecSystem):
        if system.config.kind == "pixels":
            raise UserError("a codec of pixels has no network, so there is nothing to write")
        return _Layout(None, {"codec": ""})
    if not isinstance(system, DDPM | Latent):
        raise UserError(f"a {system.kind} model has no counterpart in diffusers")
    config, parts = system.config, {"network": UNET}
    if config.prediction.self_condition:
        raise UserError("a self-conditioned network has no counterpart in diffusers")
    if isinstance(system, Latent) and isinstance(system.denoiser.network, UNet2DConditionModel):
        return _layout_of_context(system)
    if isinstance(system, Latent) and system.shown:
        raise UserError("a network that is shown something and attends to nothing has no counterpart in diffusers")
    if "codec" in system.networks():
        fields, remarks = _scheduler(config)
        return _Layout(_LATENTS, parts | {"codec": "vqvae"}, fields, remarks)
    fields, remarks = _scheduler(config, _FAITHFUL)
    return _Layout(_PIXELS[fields[CLASS] == "DDIMScheduler"], parts, fields, remarks)


def _layout_of_context(model: Latent) -> _Layout:
    """Where the parts of a model go whose network attends to something."""
    pipeline = stable.pipeline_for([part.kind for part in model.shown.values()])
    fields, remarks = _scheduler(model.config)
    fields, changed = stable.changed_by(pipeline, fields)
    parts = {"network": UNET} | ({"codec": VAE} if "codec" in model.networks() else {})
    text = _clip_of(model)
    return _Layout(pipeline, parts, fields, remarks + changed + stable.remarks_of(model, pipeline, text), text)


def _clip_of(model: Latent) -> ClipPrompt | None:
    """The CLIP text tower that reads a model's prompts, None where something else does."""
    part = model.conditioner.parts.get(TEXT) if model.conditioner is not None else None
    return part if isinstance(part, ClipPrompt) else None


def _index(layout: _Layout, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The content of `model_index.json`."""
    assert layout.scheduler is not None
    index: dict[str, Any] = {CLASS: layout.pipeline, "scheduler": ["diffusers", layout.scheduler[CLASS]]}
    index |= {where: ["diffusers", type(networks[name]).__name__] for name, where in layout.folders.items()}
    if layout.pipeline not in stable.PIPELINES:
        return index
    if layout.text is not None:
        index |= {TEXT_ENCODER: ["transformers", CLASSES[0]], TOKENIZER: ["transformers", "CLIPTokenizer"]}
    if layout.pipeline == stable.UPSCALE:
        index |= {stable.LOW_RES_SCHEDULER.parent.name: ["diffusers", "DDPMScheduler"]}
    nothing = dict.fromkeys(stable.empty_of(layout.pipeline, told=layout.text is not None), [None, None])
    return {VAE: [None, None]} | index | nothing | stable.settings_of(layout.pipeline)


def _scheduler(
    config: DDPMConfig | LatentConfig, classes: tuple[str, ...] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The scheduler's fields for a model: its own sampler where diffusers has it, else the plain one of its schedule.

    Args:
        classes: of diffusers that will do; None for all.
    """
    own = Scheduler(schedule=config.schedule, prediction=config.prediction, sampling=config.sampling)
    try:
        fields = to_diffusers(own)
        why = f"the pipeline does not take a {fields[CLASS]}"
        if classes is None or fields[CLASS] in classes:
            return fields, []
    except UserError as error:
        why = str(error)
    fields = to_diffusers(_plain(own))
    return fields, [
        f"the folder's scheduler is a plain {fields[CLASS]}, for {why}; the model's own sampler is kept in {OWN}"
    ]


def _plain(own: Scheduler) -> Scheduler:
    """The same schedule and prediction with the sampler that diffusers surely has for them."""
    if own.schedule.name in ("flow", "sine", "ve"):
        classes = {"flow": "FlowMatchEulerDiscreteScheduler", "sine": "IPNDMScheduler", "ve": "EDMEulerScheduler"}
        sampling = from_diffusers({CLASS: classes[own.schedule.name]}).sampling
        return own.model_copy(update={"sampling": sampling})
    learned = own.prediction.learned_variance  # DDIM would not know what to do with it
    clips = own.sampling.threshold != "none"
    sampling = SamplingConfig(
        sampler="ddpm" if learned else "ddim", schedule="trailing", threshold="static" if clips else "none",
        limit=own.sampling.limit, rederive_eps=learned,
    )  # fmt: skip
    return own.model_copy(update={"schedule": _known_table(own.schedule), "sampling": sampling})


def _known_table(schedule: ScheduleConfig) -> ScheduleConfig:
    """The same schedule under a name that diffusers has, if need be as the table of its betas."""
    if schedule.name != "sigmoid" and schedule.interpolation == "log":
        return schedule
    built = schedule.build()
    assert isinstance(built, TableSchedule)
    before = torch.cat([torch.ones(1, dtype=torch.float64), built.alpha_bar[:-1]])
    betas = tuple((1 - built.alpha_bar / before).tolist())
    return ScheduleConfig(name="betas", steps=len(betas), betas=betas)


# --- reading ---------------------------------------------------------------------------------------------------------


def holds_first_stage(folder: str | Path) -> bool:
    """Whether a folder is a first stage in diffusers' layout, alone."""
    return not diffusers.is_pipeline(folder) and diffusers.class_of(folder) in FIRST_STAGES


def open_folder(
    folder: str | Path,
    *,
    allow_pickle: bool = False,
    prediction: Prediction = "unknown",
    dtype: Wanted = torch.float32,
    stage: CodecSystem | None = None,
    spare: Collection[str] = (),
) -> OpenedFolder:
    """Open a folder in diffusers' layout.

    Args:
        allow_pickle: convert weights that are there as a pickle only, in a process that can build tensors alone.
        prediction: "eps" or "v" overrules what the folder says of its network.
        dtype: of the weights; None leaves each in the type that it is stored in.
        stage: what will take the place of a first stage that is missing.
        spare: parts ("vae") that may be missing.

    Raises:
        ModelFileError: for a folder of something else, damaged files, and parts that do not fit one another.
        UserError: for a setting that has no counterpart here.
    """
    folder = Path(folder)
    read: Read = partial(diffusers.read_component, allow_pickle=allow_pickle, dtype=dtype)
    if not diffusers.is_pipeline(folder):
        if prediction != "unknown":
            raise UserError(f"{folder} holds no diffusion model, so there is nothing that it predicts")
        return _open_codec(folder, read, dtype)
    pipeline = str(diffusers.read_json(folder / diffusers.INDEX).get(CLASS))
    if (folder / OWN).is_file():
        return _open_own(folder, read, prediction, dtype, allow_pickle=allow_pickle, spare=spare)
    if pipeline in stable.PIPELINES:
        found = stable.open_pipeline(
            folder, allow_pickle=allow_pickle, prediction=prediction, dtype=dtype, stage=stage, spare=spare
        )
        return OpenedFolder(*found)
    return _open_unconditional(folder, pipeline, read, prediction, dtype)


def _open_unconditional(
    folder: Path, pipeline: str, read: Read, prediction: Prediction, dtype: Wanted
) -> OpenedFolder:
    """A folder of a pipeline that is told no text, by diffusers' own files."""
    readers: dict[str, Callable[..., DDPMConfig | LatentConfig]] = {
        **dict.fromkeys(_PIXELS, _read_pixels),
        _LATENTS: _read_latents,
    }
    if pipeline not in readers:
        known = ", ".join([*readers, *stable.PIPELINES[:-1]]) + f" and {stable.PIPELINES[-1]}"
        raise ModelFileError(f"{folder} holds a {pipeline:.60}; without {OWN} only {known} can be opened")
    parts = _parts(folder, read)
    config = _predicting(readers[pipeline](parts, diffusers.read_json(folder / SCHEDULER)), prediction)
    stored = {name: plain(part) for name, part in parts.items()}
    return _filled(_outline(config), parts, stored, [], folder, dtype)


def _open_own(
    folder: Path,
    read: Read,
    prediction: Prediction,
    dtype: Wanted,
    *,
    allow_pickle: bool,
    spare: Collection[str] = (),
) -> OpenedFolder:
    """A folder of ours: `sfumato.json` says what it is, and the rest must agree."""
    own = diffusers.read_json(folder / OWN)
    parts = _parts(folder, read)
    config = _predicting(_read_own(own, diffusers.read_json(folder / SCHEDULER), folder), prediction)
    model = _outline(config)
    missing = ("vae",) if "codec" in model.networks() and "codec" not in parts else ()
    refuse_missing(folder, [part for part in missing if part not in spare])
    for name, part in parts.items():
        _agree(model.networks().get(name), part, folder)
    stored = {name: plain(part) for name, part in parts.items()}
    digests, notes, told = [], [], Stored({}, dict)
    if isinstance(config, LatentConfig) and config.conditions.get(TEXT, {}).get("kind") == ClipPrompt.kind:
        text = read_text(folder, allow_pickle=allow_pickle, dtype=dtype)
        _agree_on_text(config.conditions[TEXT], text, folder)
        told = stable.told(text)
        digests, notes = [text.part.sha256], [*text.notes]
    if (folder / CONDITIONER).is_file():
        trained = read_model(folder / CONDITIONER)
        told = _both(told, trained.tensors)
        digests.append(trained.sha256)
    if told.seen and "conditioner" not in model.networks():
        raise ModelFileError(f"{folder} holds {CONDITIONER}, where its {OWN} expects no such part")
    opened = _filled(model, parts, stored | {"conditioner": told}, digests, folder, dtype, missing)
    return replace(opened, notes=(*opened.notes, *notes))


def _outline(config: DDPMConfig | LatentConfig) -> DDPM | Latent:
    """The model of a config, on "meta"."""
    return DDPM.create(config, "meta") if isinstance(config, DDPMConfig) else Latent.create(config, "meta")


def _both(first: Stored, tensors: Mapping[str, Tensor]) -> Stored:
    return Stored({**first.seen, **tensors}, lambda: {**first.read(), **tensors})


def _filled(
    model: DDPM | Latent,
    parts: Mapping[str, Component],
    stored: Mapping[str, Stored],
    digests: list[str],
    folder: Path,
    dtype: Wanted,
    missing: tuple[str, ...] = (),
) -> OpenedFolder:
    """An outlined model with its weights."""
    fill(model.networks(), stored, what=str(folder), dtype=dtype, missing=["codec"] if missing else ())
    sha256 = hashes.together(*(part.sha256 for part in parts.values()), *digests)
    return OpenedFolder(model, sha256, tuple(note for part in parts.values() for note in part.notes), missing)


def _predicting(config: DDPMConfig | LatentConfig, prediction: Prediction) -> DDPMConfig | LatentConfig:
    """The same config of a network that predicts this, where that is known."""
    if prediction == "unknown":
        return config
    said = config.prediction.model_copy(update={"parameterization": prediction})
    return config.model_copy(update={"prediction": said})


def _parts(folder: Path, read: Read) -> dict[str, Component]:
    """The networks that a pipeline's folder holds, by the names of ours."""
    places = {"network": (UNET,), "codec": (VAE, "vqvae")}
    found = {name: read(folder / one) for name, many in places.items() for one in many if (folder / one).is_dir()}
    if "network" not in found:
        raise ModelFileError(f"{folder} lacks the folder {UNET}")
    return found


def _open_codec(folder: Path, read: Read, dtype: Wanted) -> OpenedFolder:
    if (name := diffusers.class_of(folder)) not in FIRST_STAGES:
        raise ModelFileError(f"{folder} holds a {name}; of single networks {' and '.join(FIRST_STAGES)} can be opened")
    part = read(folder)
    config = _codec_config(part)
    if (folder / OWN).is_file():
        config = parse(CodecConfig, diffusers.read_json(folder / OWN), str(folder / OWN))
    stage = CodecSystem.create(config, "meta")
    _agree(stage.codec.network, part, folder)
    assert stage.codec.network is not None
    fill({"codec": stage.codec.network}, {"codec": plain(part)}, what=str(folder), dtype=dtype)
    return OpenedFolder(stage, diffusers.component_sha256(folder), part.notes)


def _codec_config(part: Component) -> CodecConfig:
    """What the config of an `AutoencoderKL` or `VQModel` means."""
    kind = {"AutoencoderKL": "kl", "VQModel": "vq"}.get(str(part.config.get(CLASS)))
    if kind is None:
        raise ModelFileError(f"a first stage of class {part.config.get(CLASS)!r} cannot be opened")
    own = network_config(AutoencoderConfig if kind == "kl" else VQConfig, part)
    if own.in_channels != own.out_channels or not isinstance(own.sample_size, int):
        raise UserError("only first stages of square pictures, with as many channels in as out, can be opened")
    network = {key: value for key, value in own.to_dict().items() if key not in _DERIVED}
    values = {"kind": kind, "size": own.sample_size, "channels": own.in_channels, "network": network}
    return parse(CodecConfig, values, "the first stage's config")


def _read_pixels(parts: Mapping[str, Component], scheduler: Mapping[str, Any]) -> DDPMConfig:
    return config_from_diffusers(parts["network"].config, scheduler)


def _read_latents(parts: Mapping[str, Component], scheduler: Mapping[str, Any]) -> LatentConfig:
    """What an `LDMPipeline` means: unconditional latent diffusion."""
    if "codec" not in parts:
        raise ModelFileError(f"an {_LATENTS} needs a folder vqvae")
    codec, unet = _codec_config(parts["codec"]), network_config(UNet2DConfig, parts["network"])
    if unet.num_class_embeds is not None or not isinstance(unet.sample_size, int):
        raise UserError(f"only an {_LATENTS} without classes, of square pictures, can be opened without {OWN}")
    meaning = from_diffusers(scheduler)
    learned = {"learned_variance": unet.out_channels == 2 * unet.in_channels}
    values = {
        "size": unet.sample_size * codec.autoencoder().factor,
        "codec": codec,
        "network": {key: value for key, value in unet.to_dict().items() if key not in _DERIVED},
        "schedule": meaning.schedule,
        "prediction": meaning.prediction.model_copy(update=learned),
        "sampling": meaning.sampling,
    }
    return parse(LatentConfig, values, "the configs of the folder")


def _read_own(values: Mapping[str, Any], scheduler: Mapping[str, Any], folder: Path) -> DDPMConfig | LatentConfig:
    """The config of `sfumato.json`, with what the scheduler says where that was exchanged."""
    where = str(folder / OWN)
    if (system := values.get("system")) == "ddpm":
        return _as_told(parse(DDPMConfig, values, where), scheduler)
    if system == "latent":
        return _as_told(parse(LatentConfig, values, where), scheduler)
    raise ModelFileError(f"{where} tells of the system {system!r}, which has no folder of this kind")


def _as_told(config: ConfigT, scheduler: Mapping[str, Any]) -> ConfigT:
    """The config as it is where it would be written with this scheduler, else with this scheduler's meaning."""
    found = from_diffusers(scheduler)
    if any(from_diffusers(_scheduler(config, classes)[0]) == found for classes in (None, _FAITHFUL)):
        return config
    kept = {name: getattr(config.sampling, name) for name in ("steps", "guidance", "guidance_interval", "perp_neg")}
    learned = {"learned_variance": config.prediction.learned_variance}
    changed: dict[str, ScheduleConfig | PredictionConfig | SamplingConfig] = {
        "schedule": found.schedule,
        "prediction": found.prediction.model_copy(update=learned),
        "sampling": found.sampling.model_copy(update=kept),
    }
    return config.model_copy(update=changed)


def _agree(network: Any, part: Component, folder: Path) -> None:
    name = part.config.get(CLASS)
    if not isinstance(network, _NETWORKS) or type(network).__name__ != name:
        expected = type(network).__name__ if network is not None else "no such part"
        raise ModelFileError(f"{folder} holds a {name}, where its {OWN} expects {expected}")
    found, wanted = network_config(type(network.config), part).to_dict(), network.config.to_dict()
    differ = [key for key in wanted if found[key] != wanted[key]]
    if differ:
        raise ModelFileError(
            f"{folder}: {', '.join(differ)} of the {name} is not what {OWN} says; "
            f"without {OWN} the folder is read as diffusers' own"
        )


def _agree_on_text(values: Mapping[str, Any], text: Text, folder: Path) -> None:
    """Refuse a text tower whose own files are not what `sfumato.json` leads to."""
    tower = values.get("tower")
    wanted = tower_config(tower if isinstance(tower, Mapping) else {}, folder / OWN)
    differ = [key for key in DECISIVE if getattr(text.config, key) != getattr(wanted, key)]
    if values.get("pad") in PAD_TOKENS.values() and text.pad != values["pad"]:
        differ.append("pad_token")
    if differ:
        raise ModelFileError(
            f"{folder}: {', '.join(differ)} of the text encoder is not what {OWN} says; "
            f"without {OWN} the folder is read as diffusers' own"
        )
