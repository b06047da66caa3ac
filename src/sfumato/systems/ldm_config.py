"""Latent diffusion's own configs (Rombach 2022, the first published code): what a YAML means, and its checkpoint.

A model there is a file of weights and a YAML beside it that names classes and their arguments. The names are looked up
in tables here, and nothing is imported by them. What comes of it is a `Latent` like any other: class, text, layout,
semantic map, small picture or masked picture are conditions of ours.

>>> tiny = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
...     "linear_start": 0.0015, "linear_end": 0.0195, "image_size": 8, "channels": 3,
...     "cond_stage_config": "__is_unconditional__",
...     "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {
...         "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2],
...         "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4}},
...     "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}}}
>>> config = latent_config_from_ldm(tiny)
>>> config.network["down_block_types"], config.schedule.name
(['DownBlock2D', 'AttnDownBlock2D'], 'scaled_linear')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sfumato.checkpoints.formats import pickles
from sfumato.checkpoints.formats.compvis import stage_map, text_map, unet_map
from sfumato.checkpoints.formats.single_file import AVERAGED, IGNORED, LAST_STEP, unwrapped
from sfumato.checkpoints.io import Wanted, component, take_over
from sfumato.checkpoints.keymap import Coverage, Ignored, KeyMap, Rule, check_cover
from sfumato.checkpoints.tensors import Lazily, TensorFile
from sfumato.conditioners.joint import JointText
from sfumato.conditioners.label import EmbeddedLabel
from sfumato.conditioners.layout import LayoutTokens
from sfumato.conditioners.semantic import Semantic
from sfumato.conditioners.shown import LowResolution, Masked
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import BERT_PIECES, WordPieces
from sfumato.errors import ModelFileError, UserError, raise_unknown
from sfumato.networks.autoencoder import AutoencoderKL, VQModel
from sfumato.networks.unet_2d import UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionModel
from sfumato.systems.config import parse
from sfumato.systems.latent import LABEL, TEXT, Latent, LatentConfig
from sfumato.systems.scheduler_config import from_diffusers

LAYOUT, MAP, SMALL, HOLE = "layout", "map", "small", "hole"
STEPS = 50
GUIDANCE = {TEXT: 5.0, LABEL: 3.0}
"""What the published scripts take; the other models were trained without a null."""
_MOST = 2**20  # bytes of a YAML file

# --- reading YAML ----------------------------------------------------------------------------------------------------


def beside(path: str | Path) -> dict[str, Any] | None:
    """The config beside a file of weights, `NAME.yaml` or `config.yaml`, where it is one of latent diffusion's that
    only this module can read; None where there is none, or a file says by itself what it is (Stable Diffusion)."""
    path = Path(path)
    for place in (path.with_suffix(".yaml"), path.parent / "config.yaml"):
        if place.is_file() and place != path and (values := _read(place)) is not None and is_ldm(values):
            return values
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """A YAML mapping without aliases; None for anything else."""
    if path.stat().st_size > _MOST:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            return None
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def is_ldm(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is a config of a latent diffusion model other than Stable Diffusion's."""
    model = values.get("model")
    if not isinstance(model, Mapping) or not str(model.get("target", "")).endswith(".LatentDiffusion"):
        return False
    params = model.get("params")
    condition = params.get("cond_stage_config") if isinstance(params, Mapping) else None
    return not (isinstance(condition, Mapping) and "CLIP" in str(condition.get("target", "")))


def _table(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{what} must be a table, got {values!r:.60}")
    return dict(values)


def _target(values: Any, what: str) -> tuple[str, dict[str, Any]]:
    """The last part of a class's name, and its arguments."""
    table = _table(values, what)
    return str(table.get("target", "")).rsplit(".", 1)[-1], _table(table.get("params") or {}, f"{what}.params")


def _only(params: Mapping[str, Any], known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Arguments with their defaults; unknown ones are refused."""
    for key in params:
        if key not in known:
            raise_unknown(f"argument of {what}", key, known)
    return {**known, **params}


def _must(params: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    for key, value in wanted.items():
        if params[key] != value:
            raise UserError(f"{what} with {key} {params[key]!r} is not supported; it can be {value!r}")


# --- the config ------------------------------------------------------------------------------------------------------

_MODEL: dict[str, Any] = {
    "linear_start": 1e-4, "linear_end": 2e-2, "beta_schedule": "linear", "timesteps": 1000, "cosine_s": 8e-3,
    "parameterization": "eps", "image_size": 256, "channels": 3, "conditioning_key": None, "concat_mode": True,
    "scale_factor": 1.0, "scale_by_std": False, "first_stage_key": "image", "cond_stage_key": "image",
    "unet_config": None, "first_stage_config": None, "cond_stage_config": None, "num_timesteps_cond": 1,
    "cond_stage_forward": None,
}  # fmt: skip
_OF_TRAINING = (
    "loss_type", "ckpt_path", "ignore_keys", "load_only_unet", "monitor", "use_ema", "log_every_t", "clip_denoised",
    "given_betas", "original_elbo_weight", "v_posterior", "l_simple_weight", "use_positional_encodings", "learn_logvar",
    "logvar_init", "cond_stage_trainable", "scheduler_config", "base_learning_rate",
)  # fmt: skip
_UNET: dict[str, Any] = {
    "image_size": None, "in_channels": None, "model_channels": None, "out_channels": None, "num_res_blocks": None,
    "attention_resolutions": None, "dropout": 0, "channel_mult": (1, 2, 4, 8), "conv_resample": True, "dims": 2,
    "num_classes": None, "use_checkpoint": False, "use_fp16": False, "num_heads": -1, "num_head_channels": -1,
    "num_heads_upsample": -1, "use_scale_shift_norm": False, "resblock_updown": False,
    "use_new_attention_order": False, "use_spatial_transformer": False, "transformer_depth": 1, "context_dim": None,
    "n_embed": None, "legacy": True,
}  # fmt: skip
_STAGE: dict[str, Any] = {
    "double_z": True, "z_channels": None, "resolution": None, "in_channels": 3, "out_ch": 3, "ch": None,
    "ch_mult": (1, 2, 4, 8), "num_res_blocks": None, "attn_resolutions": (), "dropout": 0.0, "resamp_with_conv": True,
    "use_linear_attn": False, "attn_type": "vanilla", "give_pre_end": False, "tanh_out": False,
}  # fmt: skip


def latent_config_from_ldm(values: Mapping[str, Any], scale: float | None = None) -> LatentConfig:
    """What a published YAML is here.

    Args:
        values: its content.
        scale: of the latents, where the file of weights says it (`scale_factor`); None for the config's.

    Raises:
        UserError: for a class or an argument without a counterpart.
    """
    _, given = _target(values.get("model"), "model")
    params = _only({k: v for k, v in given.items() if k not in _OF_TRAINING}, _MODEL, "LatentDiffusion")
    _must(params, {"cond_stage_forward": None, "num_timesteps_cond": 1}, "LatentDiffusion")
    codec = _codec(params, float(params["scale_factor"]) if scale is None else scale)
    factor = 1 if codec["kind"] == "pixels" else 2 ** (len(codec["network"]["block_out_channels"]) - 1)
    conditions, network = _conditions(params, factor), _network(params["unet_config"])
    told = next((name for name in GUIDANCE if name in conditions), None)
    meaning = from_diffusers(_scheduler(params))
    sampling = meaning.sampling.model_copy(update={"steps": STEPS, "guidance": GUIDANCE.get(told or "", 1.0)})
    whole = {
        "size": int(params["image_size"]) * factor,
        "codec": codec,
        "conditions": conditions,
        "network": {key: value for key, value in network.items() if key not in ("in_channels", "out_channels")},
        "schedule": meaning.schedule,
        "prediction": meaning.prediction,
        "sampling": sampling,
        "title": "latent diffusion" + (f", told {', '.join(sorted(conditions))}" if conditions else ""),
    }
    config = parse(LatentConfig, whole, "the config of latent diffusion")
    _check_channels(config, network)
    return config


def _scheduler(params: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule as diffusers says it; their "linear" is linear in the root of beta."""
    names = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    if params["beta_schedule"] not in names:
        raise UserError(f"beta_schedule {params['beta_schedule']!r} is not supported; it can be {', '.join(names)}")
    predicts = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    if params["parameterization"] not in predicts:
        raise_unknown("parameterization", str(params["parameterization"]), predicts)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(params["timesteps"]),
        "beta_start": float(params["linear_start"]),
        "beta_end": float(params["linear_end"]),
        "beta_schedule": names[params["beta_schedule"]],
        "prediction_type": predicts[params["parameterization"]],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def _check_channels(config: LatentConfig, network: Mapping[str, Any]) -> None:
    model = Latent.create(config, "meta")
    for name in ("in_channels", "out_channels"):
        own = getattr(model.denoiser_config, name)
        if own != network[name]:
            raise UserError(
                f"unet_config has {name} {network[name]}, but latents and conditions come to {own}: the condition is "
                "another than its name says"
            )


def _network(values: Any) -> dict[str, Any]:
    """The UNet's config, `in_channels` and `out_channels` still in it."""
    kind, given = _target(values, "unet_config")
    if kind != "UNetModel":
        raise_unknown("class of unet_config", kind, ["UNetModel"])
    u = _only(given, _UNET, "UNetModel")
    fixed = {
        "dims": 2, "conv_resample": True, "num_classes": None, "n_embed": None, "use_new_attention_order": False,
    }  # fmt: skip
    _must(u, fixed, "UNetModel")
    heads = u["num_heads"]
    if u["num_heads_upsample"] not in (-1, heads):
        raise UserError("UNetModel with num_heads_upsample other than num_heads is not supported")
    widths = [int(m) * int(u["model_channels"]) for m in u["channel_mult"]]
    if (heads == -1) == (u["num_head_channels"] == -1):
        raise UserError("UNetModel needs one of num_heads and num_head_channels")
    per_head = [w // heads if u["num_head_channels"] == -1 else int(u["num_head_channels"]) for w in widths]
    told = [2**level in u["attention_resolutions"] for level in range(len(widths))]
    network = {
        "in_channels": u["in_channels"],
        "out_channels": u["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": u["num_res_blocks"],
        "dropout": float(u["dropout"]),
        "resnet_time_scale_shift": "scale_shift" if u["use_scale_shift_norm"] else "default",
    }
    if u["use_spatial_transformer"]:
        return network | _transformers(u, widths, per_head, told)
    return network | _self_attention(u, per_head, told)


def _transformers(u: Mapping[str, Any], widths: list[int], per_head: list[int], told: list[bool]) -> dict[str, Any]:
    if u["resblock_updown"]:
        raise UserError("UNetModel with both resblock_updown and use_spatial_transformer is not supported")
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in told],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(told)],
        "attention_head_dim": [width // head for width, head in zip(widths, per_head, strict=True)],
        "transformer_layers_per_block": u["transformer_depth"],
    }


def _self_attention(u: Mapping[str, Any], per_head: list[int], told: list[bool]) -> dict[str, Any]:
    resampled = "resnet" if u["resblock_updown"] else "conv"
    down, up = ("DownBlock2D", "UpBlock2D")
    if u["resblock_updown"]:
        down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "down_block_types": ["AttnDownBlock2D" if one else down for one in told],
        "up_block_types": ["AttnUpBlock2D" if one else up for one in reversed(told)],
        "attention_head_dim": per_head[0] if len(set(per_head)) == 1 else per_head,
        "attn_norm_num_groups": 32,
        "downsample_type": resampled,
        "upsample_type": resampled,
    }


def _codec(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    kind, given = _target(params["first_stage_config"], "first_stage_config")
    if kind == "IdentityFirstStage":
        if scale != 1:
            raise UserError("a model of pixels with a scale_factor is not supported")
        return {"kind": "pixels", "size": int(params["image_size"]), "channels": int(params["channels"])}
    if kind not in ("AutoencoderKL", "VQModel", "VQModelInterface"):
        raise_unknown("class of first_stage_config", kind, ["AutoencoderKL", "VQModelInterface", "IdentityFirstStage"])
    d = _only(_table(given.get("ddconfig"), "ddconfig"), _STAGE, "ddconfig")
    fixed = {"resamp_with_conv": True, "use_linear_attn": False, "give_pre_end": False, "tanh_out": False}
    _must(d, fixed | {"double_z": kind == "AutoencoderKL"}, "ddconfig")
    if d["attn_type"] not in ("vanilla", "none"):
        raise UserError(f"ddconfig with attn_type {d['attn_type']!r} is not supported")
    embed = int(given.get("embed_dim", d["z_channels"]))
    if kind == "AutoencoderKL" and embed != d["z_channels"]:
        raise UserError("an AutoencoderKL with embed_dim other than z_channels is not supported")
    sides = [int(d["resolution"]) // 2**level for level in range(len(d["ch_mult"]))]
    told = [side in d["attn_resolutions"] and d["attn_type"] != "none" for side in sides]
    network = {
        "block_out_channels": [int(m) * int(d["ch"]) for m in d["ch_mult"]],
        "layers_per_block": int(d["num_res_blocks"]),
        "latent_channels": int(d["z_channels"]),
        "down_block_types": ["AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in told],
        "up_block_types": ["AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(told)],
        "mid_block_add_attention": d["attn_type"] != "none",
        "scaling_factor": scale,
    }
    if kind != "AutoencoderKL":
        network |= {"num_vq_embeddings": int(given["n_embed"]), "vq_embed_dim": embed}
    name = "kl" if kind == "AutoencoderKL" else "vq"
    return {"kind": name, "size": sides[0], "channels": int(d["in_channels"]), "network": network}


# --- conditions ------------------------------------------------------------------------------------------------------


def _conditions(params: Mapping[str, Any], factor: int) -> dict[str, dict[str, Any]]:
    """Conditions by name, from `cond_stage_config`, its key and the way it is joined."""
    stage, key, data = params["cond_stage_config"], params["conditioning_key"], params["cond_stage_key"]
    if stage == "__is_unconditional__":
        return {}
    if key is None:
        key = "concat" if params["concat_mode"] else "crossattn"
    if stage == "__is_first_stage__":
        _joined(key, "concat", "the first stage as the condition's encoder")
        if data != "masked_image":
            raise UserError(f"a condition {data!r} by the first stage is not supported; it can be 'masked_image'")
        return {HOLE: Masked(int(params["channels"]), order="mask-last").describe()}
    kind, given = _target(stage, "cond_stage_config")
    readers = {
        "ClassEmbedder": ("crossattn", _classes), "BERTEmbedder": ("crossattn", _words), "Identity": ("concat", _small),
        "SpatialRescaler": ("concat", _map),
    }  # fmt: skip
    if kind not in readers:
        raise_unknown("class of cond_stage_config", kind, readers)
    way, read = readers[kind]
    _joined(key, way, kind)
    return read(given, str(data), factor)


def _joined(key: str, way: str, what: str) -> None:
    if key != way:
        raise UserError(f"{what} joined by {key!r} is not supported; it can be {way!r}")


def _numbers(count: int) -> list[str]:
    """Classes that no one names here, by number."""
    return [str(i) for i in range(count)]


def _classes(given: Mapping[str, Any], key: str, factor: int) -> dict[str, dict[str, Any]]:
    p = _only(given, {"embed_dim": None, "n_classes": 1000, "key": "class"}, "ClassEmbedder")
    if int(p["n_classes"]) == 1000:
        raise UserError("a ClassEmbedder of ImageNet's 1000 classes has no row for no class, which is needed here")
    with torch.device("meta"):
        return {LABEL: EmbeddedLabel(_numbers(int(p["n_classes"]) - 1), int(p["embed_dim"])).describe()}


def _words(given: Mapping[str, Any], key: str, factor: int) -> dict[str, dict[str, Any]]:
    """A transformer over BERT's word pieces, or over the numbers of a layout."""
    defaults = {
        "n_embed": None, "n_layer": None, "vocab_size": WordPieces.size, "max_seq_len": 77, "device": None,
        "use_tokenizer": True, "embedding_dropout": 0.0,
    }  # fmt: skip
    p = _only(given, defaults, "BERTEmbedder")
    width = int(p["n_embed"])
    network = {
        "vocab_size": int(p["vocab_size"]),
        "max_position_embeddings": int(p["max_seq_len"]),
        "encoder_layers": int(p["n_layer"]),
        "encoder_ffn_dim": 4 * width,
        "d_model": width,
        "dropout": float(p["embedding_dropout"]),
    }
    if p["use_tokenizer"]:
        text = {"tokenizer": {"kind": WordPieces.kind, "sha256": BERT_PIECES}, "padding": "full"}
        return {TEXT: {"kind": JointText.kind, "network": network} | text}
    if key != "coordinates_bbox":
        raise UserError(f"a condition {key!r} of numbers is not supported; it can be 'coordinates_bbox'")
    crop = int(p["max_seq_len"]) % 3 == 2
    objects = (int(p["max_seq_len"]) - 2 * crop) // 3
    with torch.device("meta"):
        return {LAYOUT: LayoutTokens(_numbers(int(p["vocab_size"]) - 1), network, objects, crop).describe()}


def _map(given: Mapping[str, Any], key: str, factor: int) -> dict[str, dict[str, Any]]:
    defaults = {
        "n_stages": 1, "method": "bilinear", "multiplier": 0.5, "in_channels": 3, "out_channels": None, "bias": False,
    }  # fmt: skip
    p = _only(given, defaults, "SpatialRescaler")
    _must(p, {"method": "bilinear", "multiplier": 0.5, "bias": False}, "SpatialRescaler")
    if 2 ** int(p["n_stages"]) != factor:
        raise UserError(f"a SpatialRescaler of {p['n_stages']} stages does not fit a first stage of factor {factor}")
    with torch.device("meta"):
        return {MAP: Semantic(_numbers(int(p["in_channels"])), factor, "bilinear", p["out_channels"]).describe()}


def _small(given: Mapping[str, Any], key: str, factor: int) -> dict[str, dict[str, Any]]:
    if key != "LR_image":
        raise UserError(f"a condition {key!r} that is shown as it is is not supported; it can be 'LR_image'")
    return {SMALL: LowResolution(levels=0, noise=-1, scale=factor).describe()}


# --- checkpoints -----------------------------------------------------------------------------------------------------

ASIDE = (
    Ignored(r"cond_stage_model\.transformer\.to_logits\..+", "scores of words, which no picture needs"),
    Ignored(r"cond_stage_model\.tknz_fn\..+", "a tokenizer, which is known"),
    *IGNORED,
)
"""Tensors that these checkpoints hold and no network needs."""
_TWICE = Ignored(r"cond_stage_model\..+", "the first stage again, by which the condition is encoded")


def ldm_map(model: Latent) -> KeyMap:
    """The names of a whole checkpoint of CompVis, and ours of a model's file."""
    unet, stage = model.denoiser.network, model.codec.network
    assert isinstance(unet, UNet2DModel | UNet2DConditionModel)
    table = unet_map(unet.config).under("model.diffusion_model.", "network.")
    if stage is not None:
        assert isinstance(stage, AutoencoderKL | VQModel)
        table += stage_map(stage.config).under("first_stage_model.", "codec.")
    for name, part in (model.conditioner.parts if model.conditioner is not None else {}).items():
        table += _condition_map(part).under("cond_stage_model.", f"conditioner.{name}.")
    return table


def _condition_map(part: Any) -> KeyMap:
    if isinstance(part, EmbeddedLabel):
        return KeyMap([Rule("embedding.{p}", "embedding.{p}")])
    if isinstance(part, Semantic):
        return KeyMap([Rule("channel_mapper.{p}", "channel_mapper.{p}")])
    encoder = part.encoder if isinstance(part, TextConditioner) else part
    if isinstance(encoder, JointText | LayoutTokens):
        return text_map(encoder.network.config.encoder_layers).under("transformer.")
    return KeyMap([])


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A model from a checkpoint: the model, and what a user should know, each in one sentence."""

    system: Latent
    notes: tuple[str, ...]


def open_checkpoint(
    path: str | Path,
    values: Mapping[str, Any],
    *,
    averaged: bool = False,
    allow_pickle: bool = False,
    dtype: Wanted = torch.float32,
) -> OpenedCheckpoint:
    """Open a checkpoint with its config.

    Args:
        path: of the weights, safetensors or (where that is allowed) a pickle.
        values: the content of its YAML.
        averaged: read the running average of the UNet's weights, which the checkpoint keeps apart.
        allow_pickle: convert a pickle, in a process of its own that builds tensors and nothing else.
        dtype: of the weights; None for the stored types.

    Raises:
        ModelFileError: for weights that do not fit the config.
        UserError: for a config without a counterpart.
    """
    file, notes = pickles.open_tensors(path, allow_pickle=allow_pickle)
    names = unwrapped(file.seen)
    model = Latent.create(latent_config_from_ldm(values, file.number(names.get("scale_factor", ""))), "meta")
    table, wanted = ldm_map(model), model.tensors()
    if averaged:
        names = _with_average(names, table, wanted, path)
    coverage = _accounted(file, names, table, model, wanted, averaged=averaged, what=str(path))
    used = {name: names[name] for name in coverage.matched}
    tensors = table.to_ours(Lazily({name: (file, stored) for name, stored in used.items()}, dtype))[0]
    for name, network in model.networks().items():
        take_over(network, component(tensors, name), what=str(path), dtype=dtype)
        network.eval()
    return OpenedCheckpoint(model, (*notes, coverage.describe(), model.config.title))


def _with_average(
    names: Mapping[str, str], table: KeyMap, wanted: Mapping[str, Tensor], path: str | Path
) -> dict[str, str]:
    """Names with the UNet's averaged weights in the place of the last ones."""
    places = [name for name in table.names_of_theirs(wanted).values() if name.startswith("model.diffusion_model.")]
    flat = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in places}
    if not any(name in names for name in flat.values()):
        raise UserError(f"{path} holds no running average of the weights beside the weights themselves")
    for name, averaged in flat.items():
        if averaged not in names:
            raise ModelFileError(f"{path} lacks the running average of {name}")
    chosen = {name: names[averaged] for name, averaged in flat.items()}
    return {name: stored for name, stored in names.items() if name not in flat.values()} | chosen


def _accounted(
    file: TensorFile,
    names: Mapping[str, str],
    table: KeyMap,
    model: Latent,
    wanted: Mapping[str, Tensor],
    *,
    averaged: bool,
    what: str,
) -> Coverage:
    """Every name is needed, or left aside for a published reason."""
    twice = (_TWICE,) if any(isinstance(part, Masked) for part in model.shown.values()) else ()
    seen = {name: file.seen[stored] for name, stored in names.items()}
    coverage = check_cover(table, seen, wanted, (*twice, *ASIDE), what=what)
    if averaged:
        replaced = tuple(sorted(set(file.seen) - set(names.values())))
        aside = {reason: own for reason, own in coverage.ignored.items() if reason != AVERAGED}
        coverage = replace(coverage, ignored={**aside, LAST_STEP: replaced})
    return coverage
