"""Models as folders in diffusers' layout, both ways.

The networks and the scheduler go into files that diffusers reads; what these cannot say (the words and classes that a
model knows, how it was trained, its title) goes into `sfumato.json` beside them, and the weights of a text encoder that
was trained with the model into `conditioner.safetensors`. A folder without `sfumato.json` is read as far as diffusers'
own files tell; where there is one, the scheduler still has the last word, for it may have been exchanged.

| system | folder |
|---|---|
| a codec | an `AutoencoderKL` or `VQModel` |
| DDPM, and latent diffusion without a codec or anything attended to | `DDPMPipeline` or `DDIMPipeline` |
| latent diffusion whose network attends to nothing | `LDMPipeline` |
| latent diffusion with a context | `StableDiffusionPipeline` |

The last has no text encoder there: give it `text_encoder=None, tokenizer=None` when opening and `prompt_embeds` when
drawing.

>>> import tempfile
>>> config = CodecConfig(kind="vq", size=8, network={"block_out_channels": [8], "norm_num_groups": 4})
>>> system = CodecSystem.create(config)
>>> folder = tempfile.mkdtemp()
>>> save_folder(system, folder), open_folder(folder)[0].config == config
([], True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sfumato.checkpoints import hashes
from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.diffusers import CLASS, Component
from sfumato.checkpoints.io import read_model
from sfumato.diffusion.schedule import TableSchedule
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionConfig, UNet2DConditionModel
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.config import PredictionConfig, SamplingConfig, ScheduleConfig, parse
from sfumato.systems.ddpm import DDPM, DDPMConfig, config_from_diffusers
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.systems.scheduler_config import Scheduler, from_diffusers, to_diffusers

Exchanged = DDPM | Latent | CodecSystem
"""Systems that have a counterpart in diffusers."""

OWN = "sfumato.json"
CONDITIONER = "conditioner.safetensors"
FIRST_STAGES = ("AutoencoderKL", "VQModel")
_PIXELS, _LATENTS, _CONTEXT = ("DDPMPipeline", "DDIMPipeline"), "LDMPipeline", "StableDiffusionPipeline"
_FAITHFUL = ("DDPMScheduler", "DDIMScheduler")  # the pipelines of pixels run these as they are meant
_EMPTY = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
_SCHEDULER = Path("scheduler") / "scheduler_config.json"
_DERIVED = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
_NETWORKS = (AutoencoderKL, VQModel, UNet2DModel, UNet2DConditionModel)

ConfigT = TypeVar("ConfigT", DDPMConfig, LatentConfig)
NetworkT = TypeVar("NetworkT", bound=AutoencoderConfig | VQConfig | UNet2DConfig | UNet2DConditionConfig)


@dataclass
class _Layout:
    """What a folder holds: its pipeline's name (None for a component alone) and networks by the names of ours."""

    pipeline: str | None
    folders: dict[str, str]
    scheduler: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)


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
            diffusers.write_json(place / _SCHEDULER, layout.scheduler)
        if layout.pipeline is not None:
            diffusers.write_json(place / diffusers.INDEX, _index(layout, networks))
        if (conditioner := networks.get("conditioner")) is not None:
            diffusers.write_tensors(place / CONDITIONER, conditioner.state_dict())
        diffusers.write_json(place / OWN, own)
    return layout.remarks


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
    config, parts = system.config, {"network": "unet"}
    if config.prediction.self_condition:
        raise UserError("a self-conditioned network has no counterpart in diffusers")
    if isinstance(system.denoiser.network, UNet2DConditionModel):
        fields, remarks = _scheduler(config)
        fields, changed = _for_stable_diffusion(fields)
        parts |= {"codec": "vae"} if "codec" in system.networks() else {}
        return _Layout(_CONTEXT, parts, fields, remarks + changed)
    if "codec" in system.networks():
        fields, remarks = _scheduler(config)
        return _Layout(_LATENTS, parts | {"codec": "vqvae"}, fields, remarks)
    fields, remarks = _scheduler(config, _FAITHFUL)
    return _Layout(_PIXELS[fields[CLASS] == "DDIMScheduler"], parts, fields, remarks)


def _index(layout: _Layout, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The content of `model_index.json`."""
    assert layout.scheduler is not None
    index: dict[str, Any] = {CLASS: layout.pipeline, "scheduler": ["diffusers", layout.scheduler[CLASS]]}
    index |= {where: ["diffusers", type(networks[name]).__name__] for name, where in layout.folders.items()}
    if layout.pipeline != _CONTEXT:
        return index
    return {"vae": [None, None]} | index | dict.fromkeys(_EMPTY, [None, None]) | {"requires_safety_checker": False}


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
    if own.schedule.name in ("flow", "ve"):
        classes = {"flow": "FlowMatchEulerDiscreteScheduler", "ve": "EDMEulerScheduler"}
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


def _for_stable_diffusion(fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """That pipeline sets steps_offset to 1 and clip_sample to False in every scheduler that it opens."""
    leading = fields.get("timestep_spacing") == "leading"
    if "steps_offset" in fields and not leading:
        fields = fields | {"steps_offset": 1}  # which nothing but leading steps reads
    changed = ["steps_offset"] if leading and fields["steps_offset"] != 1 else []
    changed += ["clip_sample"] if fields.get("clip_sample") else []
    return fields, [
        f"{_CONTEXT} of diffusers changes the scheduler's {name} when it opens the folder, so load its parts one by one"
        for name in changed
    ]


# --- reading ---------------------------------------------------------------------------------------------------------


def holds_first_stage(folder: str | Path) -> bool:
    """Whether a folder is a first stage in diffusers' layout, alone."""
    return not diffusers.is_pipeline(folder) and diffusers.class_of(folder) in FIRST_STAGES


def open_folder(folder: str | Path) -> tuple[Exchanged, str]:
    """Open a folder in diffusers' layout.

    Returns:
        The system and the SHA-256 of its weights (for a codec, of its config too), hexadecimal.

    Raises:
        ModelFileError: for a folder of something else, damaged files, and parts that do not fit one another.
        UserError: for a setting that has no counterpart here.
    """
    folder = Path(folder)
    if not diffusers.is_pipeline(folder):
        return _open_codec(folder)
    pipeline = str(diffusers.read_json(folder / diffusers.INDEX).get(CLASS))
    own = diffusers.read_json(folder / OWN) if (folder / OWN).is_file() else None
    readers = dict.fromkeys(_PIXELS, _read_pixels) | {_LATENTS: _read_latents}
    if own is None and pipeline not in readers:
        known = ", ".join([*readers][:-1]) + f" and {_LATENTS}"
        raise ModelFileError(f"{folder} holds a {pipeline}; without {OWN} only {known} can be opened")
    parts = {name: diffusers.read_component(folder / where) for name, where in _parts(folder)}
    if "network" not in parts:
        raise ModelFileError(f"{folder} lacks the folder unet")
    scheduler = diffusers.read_json(folder / _SCHEDULER)
    config = readers[pipeline](parts, scheduler) if own is None else _read_own(own, scheduler, folder)
    tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
    digests = [part.sha256 for part in parts.values()]
    if (folder / CONDITIONER).is_file():
        trained = read_model(folder / CONDITIONER)
        tensors |= {f"conditioner.{key}": t for key, t in trained.tensors.items()}
        digests.append(trained.sha256)
    if own is not None:
        _check_agreement(config, parts, folder)
    system = DDPM.load if isinstance(config, DDPMConfig) else Latent.load
    return system(config, tensors, what=str(folder)), hashes.together(*digests)  # type: ignore[arg-type]


def _parts(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of ours and sub-folders of the networks that a pipeline's folder holds."""
    for name, places in (("network", ("unet",)), ("codec", ("vae", "vqvae"))):
        yield from ((name, place) for place in places if (folder / place).is_dir())


def _open_codec(folder: Path) -> tuple[CodecSystem, str]:
    if (name := diffusers.class_of(folder)) not in FIRST_STAGES:
        raise ModelFileError(f"{folder} holds a {name}; of single networks {' and '.join(FIRST_STAGES)} can be opened")
    part = diffusers.read_component(folder)
    config = _codec_config(part)
    if (folder / OWN).is_file():
        config = parse(CodecConfig, diffusers.read_json(folder / OWN), str(folder / OWN))
        _agree(CodecSystem.create(config, "meta").codec.network, part, folder)
    tensors = {f"codec.{name}": tensor for name, tensor in part.tensors.items()}
    return CodecSystem.load(config, tensors, what=str(folder)), diffusers.component_sha256(folder)


def _codec_config(part: Component) -> CodecConfig:
    """What the config of an `AutoencoderKL` or `VQModel` means."""
    kind = {"AutoencoderKL": "kl", "VQModel": "vq"}.get(str(part.config.get(CLASS)))
    if kind is None:
        raise ModelFileError(f"a first stage of class {part.config.get(CLASS)!r} cannot be opened")
    own = _config_of(AutoencoderConfig if kind == "kl" else VQConfig, part)
    if own.in_channels != own.out_channels or not isinstance(own.sample_size, int):
        raise UserError("only first stages of square pictures, with as many channels in as out, can be opened")
    network = {key: value for key, value in own.to_dict().items() if key not in _DERIVED}
    values = {"kind": kind, "size": own.sample_size, "channels": own.in_channels, "network": network}
    return parse(CodecConfig, values, "the first stage's config")


def _config_of(kind: type[NetworkT], part: Component) -> NetworkT:
    """A network's config. Raises `UserError` for unknown keys and impossible values."""
    try:
        return kind.from_dict(part.config)  # type: ignore[return-value]
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"a value of a network's config is of the wrong type or zero ({error})") from None


def _read_pixels(parts: Mapping[str, Component], scheduler: Mapping[str, Any]) -> DDPMConfig:
    return config_from_diffusers(parts["network"].config, scheduler)


def _read_latents(parts: Mapping[str, Component], scheduler: Mapping[str, Any]) -> LatentConfig:
    """What an `LDMPipeline` means: unconditional latent diffusion."""
    if "codec" not in parts:
        raise ModelFileError(f"an {_LATENTS} needs a folder vqvae")
    codec, unet = _codec_config(parts["codec"]), _config_of(UNet2DConfig, parts["network"])
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
    kept = {"steps": config.sampling.steps, "guidance": config.sampling.guidance}
    learned = {"learned_variance": config.prediction.learned_variance}
    changed: dict[str, ScheduleConfig | PredictionConfig | SamplingConfig] = {
        "schedule": found.schedule,
        "prediction": found.prediction.model_copy(update=learned),
        "sampling": found.sampling.model_copy(update=kept),
    }
    return config.model_copy(update=changed)


def _check_agreement(config: DDPMConfig | LatentConfig, parts: Mapping[str, Component], folder: Path) -> None:
    """Refuse networks whose own configs are not those that `sfumato.json` leads to."""
    if isinstance(config, DDPMConfig):
        expected = DDPM.create(config, "meta").networks()
    else:
        expected = Latent.create(config, "meta").networks()
    for name, part in parts.items():
        _agree(expected.get(name), part, folder)


def _agree(network: Any, part: Component, folder: Path) -> None:
    name = part.config.get(CLASS)
    if not isinstance(network, _NETWORKS) or type(network).__name__ != name:
        expected = type(network).__name__ if network is not None else "no such part"
        raise ModelFileError(f"{folder} holds a {name}, where its {OWN} expects {expected}")
    found, wanted = _config_of(type(network.config), part).to_dict(), network.config.to_dict()
    differ = [key for key in wanted if found[key] != wanted[key]]
    if differ:
        raise ModelFileError(
            f"{folder}: {', '.join(differ)} of the {name} is not what {OWN} says; "
            f"without {OWN} the folder is read as diffusers' own"
        )
