"""Which model a single file holds, told from its names and shapes: Stable Diffusion 1 and 2 and their variants.

The published configs stand here as values, so that a file is opened without asking anyone. A file's name never counts.
Where shapes do not tell what the network predicts (Stable Diffusion 2's two sizes have equal ones), the metadata may.

>>> STABLE_DIFFUSION_1.unet.cross_attention_dim, STABLE_DIFFUSION_2_V.text.num_hidden_layers
(768, 23)
>>> detect({"double_blocks.0.img_attn.qkv.weight": Tensor()}, {})
Traceback (most recent call last):
    ...
sfumato.errors.ModelFileError: the file holds a Flux model; only Stable Diffusion 1 and 2 are supported in this layout
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar

from torch import Tensor

from sfumato.checkpoints.formats.open_clip import CLIP_L, OPEN_CLIP_H
from sfumato.errors import ModelFileError, UserError, raise_unknown
from sfumato.networks.autoencoder import AutoencoderConfig
from sfumato.networks.clip_text import CLIPTextConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig

Prediction = Literal["eps", "v", "unknown"]


class Undecided(UserError):
    """What the network predicts cannot be told from the file."""


T = TypeVar("T")

_MOST_WORDS = 64
END_MARK = 49407
"""CLIP's id of the end of a text, which Stable Diffusion 1 also fills windows with; 2 takes 0."""


# --- published configs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A published model, or one with its layout.

    Attributes:
        name: how it is called here.
        title: how people call it.
        unet, vae, text: configs of its networks.
        open_clip: whether single files keep its text tower under OpenCLIP's names.
        pad: id of the token that fills its windows.
        prediction: what the published network predicts.
        size: width and height of the pictures that it learnt.
        scheduler: diffusers' `scheduler_config.json`.
        low_res_scheduler: the same for the noise that is added to a picture before it is enlarged.
        architecture: the name of the metadata standard ModelSpec.
    """

    name: str
    title: str
    unet: UNet2DConditionConfig
    vae: AutoencoderConfig
    text: CLIPTextConfig
    open_clip: bool
    prediction: Literal["eps", "v"]
    size: int
    scheduler: dict[str, Any]
    low_res_scheduler: dict[str, Any] | None = None
    architecture: str = ""
    pad: int = 0


PNDM: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
"""The scheduler of Stable Diffusion 1 and of 2's 512-pixel models."""
DDIM_V: dict[str, Any] = {
    **{key: value for key, value in PNDM.items() if key != "skip_prk_steps"},
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
"""The scheduler of Stable Diffusion 2's 768-pixel models."""
DDIM_X4: dict[str, Any] = {**DDIM_V, "beta_start": 0.0001, "beta_end": 0.02}
"""The scheduler of the x4 upscaler."""
DDPM_X4: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
"""The noise that the x4 upscaler's small picture gets."""

UNET_1 = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
UNET_2 = UNet2DConditionConfig(
    sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
UNET_X4 = UNet2DConditionConfig(
    sample_size=128,
    in_channels=7,
    block_out_channels=(256, 512, 512, 1024),
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    only_cross_attention=(True, True, True, False),
    cross_attention_dim=1024,
    attention_head_dim=8,
    use_linear_projection=True,
    num_class_embeds=1000,
)
VAE_F8 = AutoencoderConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
    force_upcast=False,
)
VAE_F4 = replace(
    VAE_F8,
    block_out_channels=(128, 256, 512),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    sample_size=256,
    scaling_factor=0.08333,
)

STABLE_DIFFUSION_1 = Family(
    name="sd1",
    title="Stable Diffusion 1",
    unet=UNET_1,
    vae=VAE_F8,
    text=CLIP_L,
    open_clip=False,
    prediction="eps",
    size=512,
    scheduler=PNDM,
    architecture="stable-diffusion-v1",
    pad=END_MARK,
)
STABLE_DIFFUSION_1_INPAINTING = replace(
    STABLE_DIFFUSION_1,
    name="sd1-inpainting",
    title="Stable Diffusion 1 for inpainting",
    unet=replace(UNET_1, in_channels=9),
    architecture="stable-diffusion-v1-inpainting",
)
STABLE_DIFFUSION_2_BASE = Family(
    name="sd2-base",
    title="Stable Diffusion 2 base",
    unet=UNET_2,
    vae=replace(VAE_F8, sample_size=768),
    text=OPEN_CLIP_H,
    open_clip=True,
    prediction="eps",
    size=512,
    scheduler=PNDM,
    architecture="stable-diffusion-v2-512",
)
STABLE_DIFFUSION_2_V = replace(
    STABLE_DIFFUSION_2_BASE,
    name="sd2-v",
    title="Stable Diffusion 2 for 768 pixels",
    unet=replace(UNET_2, sample_size=96, upcast_attention=True),
    prediction="v",
    size=768,
    scheduler=DDIM_V,
    architecture="stable-diffusion-v2-768-v",
)
STABLE_DIFFUSION_2_INPAINTING = replace(
    STABLE_DIFFUSION_2_BASE,
    name="sd2-inpainting",
    title="Stable Diffusion 2 for inpainting",
    unet=replace(UNET_2, in_channels=9),
    architecture="stable-diffusion-v2-inpainting",
)
STABLE_DIFFUSION_2_DEPTH = replace(
    STABLE_DIFFUSION_2_BASE,
    name="sd2-depth",
    title="Stable Diffusion 2 with depth",
    unet=replace(UNET_2, in_channels=5),
    architecture="stable-diffusion-v2-depth",
)
STABLE_DIFFUSION_X4 = replace(
    STABLE_DIFFUSION_2_V,
    name="sd-x4-upscaler",
    title="the Stable Diffusion x4 upscaler",
    unet=UNET_X4,
    vae=VAE_F4,
    size=512,
    scheduler=DDIM_X4,
    low_res_scheduler=DDPM_X4,
    architecture="stable-diffusion-v2-x4-upscaler",
)
FAMILIES = {
    family.name: family
    for family in (
        STABLE_DIFFUSION_1,
        STABLE_DIFFUSION_1_INPAINTING,
        STABLE_DIFFUSION_2_BASE,
        STABLE_DIFFUSION_2_V,
        STABLE_DIFFUSION_2_INPAINTING,
        STABLE_DIFFUSION_2_DEPTH,
        STABLE_DIFFUSION_X4,
    )
}
"""Everything that can be opened, by name."""


# --- what a file holds ----------------------------------------------------------------------------------------------

PARTS_KEY = "sfumato.parts"
"""The key in a file's metadata under which our own single files keep their configs."""


@dataclass(frozen=True)
class Place:
    """Where a part lies in a file.

    Attributes:
        prefix: before each of its names.
        layout: whose names they are: "compvis" for unet and vae; for vae also "diffusers" and "diffusers-old" (before
            0.15); for text "clip" (transformers' names), "clip-flat" (without `text_model.`) or "open_clip".
    """

    prefix: str
    layout: str


@dataclass(frozen=True)
class Found:
    """What `detect` saw.

    Attributes:
        families: that it can be; more than one where only what the network predicts would tell; none for a file that
            holds an autoencoder only.
        places: of the parts that are in the file ("unet", "vae", "text").
        vae: the config of a lone autoencoder.
        prediction: what the network predicts, where the file or its family says.
        why: what said so.
        averaged: whether the running average of the weights is there too.
        zero_snr: whether the file says that it was trained with a schedule that ends in noise alone.
    """

    families: tuple[Family, ...]
    places: dict[str, Place]
    vae: AutoencoderConfig | None
    prediction: Prediction
    why: str
    averaged: bool
    zero_snr: bool = False

    def family(self, prediction: Prediction = "unknown") -> Family:
        """The one family.

        Args:
            prediction: what the network predicts, where the file does not say; it overrules what the file says.

        Raises:
            UserError: when it is still not known, or the file holds no diffusion model.
        """
        if not self.families:
            raise UserError("the file holds an autoencoder and no diffusion model")
        known = prediction if prediction != "unknown" else self.prediction
        if known == "unknown":
            titles = " or ".join(f"{one.title} ({one.prediction})" for one in self.families)
            raise Undecided(
                f"the file can be {titles} and does not say which: say what its network predicts, eps or v"
            )
        one = next((one for one in self.families if one.prediction == known), self.families[0])
        more = {"rescale_betas_zero_snr": True} if self.zero_snr else {}
        return predicting(replace(one, scheduler={**one.scheduler, **more}), known)


def predicting(family: Family, prediction: Literal["eps", "v"]) -> Family:
    """The same family with a network that predicts this, and a scheduler that knows."""
    said = {"prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction]}
    return replace(family, prediction=prediction, scheduler={**family.scheduler, **said})


_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_TEXT_PREFIXES = (
    ("cond_stage_model.transformer.", "text_model.embeddings.token_embedding.weight", "clip"),
    ("cond_stage_model.transformer.", "embeddings.token_embedding.weight", "clip-flat"),
    ("cond_stage_model.model.", "token_embedding.weight", "open_clip"),
    ("conditioner.embedders.0.transformer.", "text_model.embeddings.token_embedding.weight", "clip"),
    ("conditioner.embedders.0.model.", "token_embedding.weight", "open_clip"),
)

_CONTROL = r"control_model\.|controlnet_cond_embedding|input_hint_block"
_LORA = r".*\.(lora_(up|down|A|B)\.|alpha$|hada_w1|lokr_w1)|lora_(unet|te)_"
_PEFT = re.compile(r".*\.base_layer\.(weight|bias)")
_ADDITIONS = (
    (_CONTROL, "a ControlNet"),
    (_LORA, "a LoRA"),
    (r"emb_params$|string_to_(param|token)|clip_[lg]$|<[^>]+>$", "a textual inversion"),
    (r"ip_adapter\.|image_proj\.", "an IP-Adapter"),
    (r"(adapter\.)?body\.\d+\.(in_conv|block\d|resnets)\.|adapter\.conv_in\.", "a T2I-Adapter"),
    (r".*motion_modules\.", "a motion module"),
)
"""What is put beside a model, by its names."""
_FOREIGN = (
    (r".*(time_stack|temporal_transformer)\.", "a Stable Video Diffusion model"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(model\.diffusion_model\.)?distilled_guidance_layer\.", "a Chroma model"),
    (r"(model\.diffusion_model\.)?(single_stream|early_stream)_modulation", "a Flux 2 model"),
    (r".*txt_in\.individual_token_refiner\.", "a HunyuanVideo model"),
    (r"(model\.diffusion_model\.)?(double_blocks\.\d+\.img_attn|single_blocks\.)", "a Flux model"),
    (r"clip_txt_mapper\.|.*\.channelwise\.|clip_txt_pooled_mapper", "a Stable Cascade model"),
    (r".*(double_layers\.\d+\.attn\.w1q|single_layers\.\d+\.attn\.w1q)", "an AuraFlow model"),
    (r".*(cap_embedder|caption_projection)\.", "a transformer model (Lumina, PixArt or Sana)"),
    (r".*(scale_shift_table|patchify_proj)", "a video or transformer model"),
    (r".*(head\.modulation|patch_embedding\.weight)", "a Wan model"),
    (r"(transformer_blocks|.*\.transformer_blocks)\.\d+\.(img_mod|txt_mod)\.", "a Qwen-Image model"),
    (r"cc_projection\.", "a Zero-1-to-3 model"),
    (r"(body\.\d+\.rdb1|model\.\d+\.sub\.\d+)\.", "an upscaler of another kind (ESRGAN)"),
    (r"(module\.|student\.)?(pos_embed|x_embedder\.proj|blocks\.\d+\.attn)", "a vision or diffusion transformer"),
    (r"down_blocks\.\d+\.", "one network of a diffusers folder"),
    (r"text_model\.|encoder\.layers\.", "a text encoder alone"),
    (r"vision_model\.|visual\.", "an image encoder"),
)


_AROUND = ("a ControlNet", "a motion module", "a Stable Video Diffusion model", "a Zero-1-to-3 model")
"""What holds a UNet that looks like Stable Diffusion's."""


def refuse_peft(names: Iterable[str], what: str) -> None:
    """Refuse, with a `ModelFileError`, weights with PEFT's layers around a network's own."""
    if (found := next((name for name in names if _PEFT.fullmatch(name)), None)) is not None:
        raise ModelFileError(
            f"{what} was saved with PEFT's layers around its own ({found}), which is not a model to draw with; fuse "
            "them into it first (merge_and_unload, or fuse_lora and unload_lora_weights)"
        )


def _refuse_addition(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is put beside a model and is none."""
    refuse_peft(tensors, "the network in the file")
    title = _named(_ADDITIONS, tensors) or ("a textual inversion" if _words_alone(tensors) else None)
    if title is not None:
        raise ModelFileError(f"the file holds {title}, which changes a model and is not a model to draw with")


def _words_alone(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all there is are vectors of a CLIP text tower's width, each under a word."""
    widths = (768, 1024, 1280)
    return 0 < len(tensors) <= _MOST_WORDS and all(
        "." not in name and tensor.ndim in (1, 2) and tensor.shape[-1] in widths for name, tensor in tensors.items()
    )


def _refuse(what: str) -> NoReturn:
    raise ModelFileError(f"the file holds {what}; only Stable Diffusion 1 and 2 are supported in this layout")


def detect(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Family | None = None) -> Found:
    """What a file holds, by its names and shapes; "meta" tensors are enough.

    Args:
        tensors: under the file's names; a wrapping `state_dict.` has been taken off.
        metadata: of its header; `global_step` too where it is known.
        family: what it is, where that is known; only what is where in the file is looked for then.

    Raises:
        ModelFileError: for anything that is not supported, naming it where it is known.
    """
    places = _places(tensors)
    averaged = any(name.startswith("model_ema.diffusion_model") for name in tensors)
    if (stored := metadata.get(PARTS_KEY)) is not None and "unet" in places:
        if family is None:
            own = _stored(stored)
            return Found((own,), places, None, own.prediction, "the file's metadata", averaged)
    if family is not None and "unet" in places:
        return Found((family,), places, None, family.prediction, "it was said", averaged)
    if "unet" not in places:
        if "vae" not in places or any(re.match(pattern, n) for n in tensors for pattern in (_CONTROL, _LORA)):
            _refuse_addition(tensors)
            _refuse(_foreign(tensors))
        return Found((), places, stage_config(tensors, places["vae"]), "unknown", "", averaged)
    families = _families(tensors, places["unet"].prefix)
    prediction, why = _prediction(tensors, metadata)
    if prediction == "unknown" and len({one.prediction for one in families}) == 1:
        prediction, why = families[0].prediction, f"{families[0].title} does"
    return Found(families, places, None, prediction, why, averaged, "ztsnr" in tensors)


def _places(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    places = {}
    for prefix in _UNET_PREFIXES:
        if f"{prefix}input_blocks.0.0.weight" in tensors and f"{prefix}out.2.weight" in tensors:
            places["unet"] = Place(prefix, "compvis")
            break
    for prefix in _VAE_PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in tensors and f"{prefix}decoder.conv_in.weight" in tensors:
            diffusers = f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in tensors
            old = f"{prefix}encoder.mid_block.attentions.0.query.weight" in tensors
            places["vae"] = Place(prefix, ("diffusers-old" if old else "diffusers") if diffusers else "compvis")
            break
    for prefix, name, layout in _TEXT_PREFIXES:
        if prefix + name in tensors:
            places["text"] = Place(prefix, layout)
            break
    return places


def _foreign(tensors: Mapping[str, Tensor]) -> str:
    """What a file without a network of ours is, as far as its names tell."""
    if (title := _named(_FOREIGN, tensors)) is not None:
        return title
    first = ", ".join(sorted(tensors)[:3])
    return f"no model that is known here (its first tensors are {first})" if first else "no tensors"


def _named(patterns: Iterable[tuple[str, str]], tensors: Iterable[str]) -> str | None:
    """The title of the first pattern that a name begins with, None if there is none."""
    names = list(tensors)
    return next((title for pattern, title in patterns if any(map(re.compile(pattern).match, names))), None)


def _families(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Family, ...]:
    """What a UNet in CompVis' layout can be."""
    channels = tensors[f"{prefix}input_blocks.0.0.weight"].shape[1:2].numel()
    texts = {t.shape[-1] for n, t in tensors.items() if n.startswith(prefix) and n.endswith(".attn2.to_k.weight")}
    vector, table = f"{prefix}label_emb.0.0.weight" in tensors, f"{prefix}label_emb.weight" in tensors
    for pattern, title in (*_ADDITIONS, *_FOREIGN):
        if title in _AROUND and any(re.match(pattern, name) for name in tensors):
            _refuse(title)
    if len(texts) != 1:
        _refuse("a latent diffusion model that is not told a text" if not texts else "a model with several texts")
    text = texts.pop()
    if vector:
        names = {2048: "a Stable Diffusion XL model", 1280: "a Stable Diffusion XL refiner", 1024: "an unCLIP model"}
        _refuse(names.get(text, "a model that is told a vector"))
    found = {
        (768, 4): ("sd1",),
        (768, 9): ("sd1-inpainting",),
        (1024, 4): ("sd2-base", "sd2-v"),
        (1024, 9): ("sd2-inpainting",),
        (1024, 5): ("sd2-depth",),
        (1024, 7): ("sd-x4-upscaler",),
    }.get((text, channels))
    if found is not None and table == (found == ("sd-x4-upscaler",)):
        return tuple(FAMILIES[name] for name in found)
    if channels == 8 and text in (768, 1024):
        _refuse("an InstructPix2Pix model (8 input channels)")
    if text == 2048:
        _refuse("a Stable Diffusion XL model")
    labels = ", and a table of classes" if table else ""
    _refuse(f"a network with {channels} input channels and a text of width {text}{labels}")


# --- what the network predicts ---------------------------------------------------------------------------------------

_SAID: dict[str, Prediction] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}
_STEPS: dict[str, Prediction] = {"875000": "eps", "110000": "v"}
"""Steps that the published files of Stable Diffusion 2 base and 2.1 had been trained for."""


def _prediction(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Prediction, str]:
    """(what is predicted, what said so), from metadata alone."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (said := metadata.get(key)) is not None:
            if said.lower() not in _SAID:
                raise ModelFileError(
                    f"the file's metadata says {key} {said!r}; a Stable Diffusion model predicts epsilon or v"
                )
            return _SAID[said.lower()], key
    architecture = metadata.get("modelspec.architecture", "")
    for family in FAMILIES.values():
        if architecture == family.architecture:
            return family.prediction, "modelspec.architecture"
    if "v_pred" in tensors:
        return "v", "the tensor v_pred"
    step = metadata.get("global_step", "").removesuffix(".0")
    texts = {t.shape[-1:].numel() for name, t in tensors.items() if name.endswith("attn2.to_k.weight")}
    if step in _STEPS and texts == {1024}:
        return _STEPS[step], "global_step"
    return "unknown", ""


# --- configs in a file, and from shapes -------------------------------------------------------------------------


def stored_parts(family: Family) -> str:
    """A family as the JSON text that our own single files carry."""
    return json.dumps(
        {
            "family": family.name,
            "unet": family.unet.to_dict(),
            "vae": family.vae.to_dict(),
            "text": family.text.to_dict(),
            "open_clip": family.open_clip,
            "pad": family.pad,
            "prediction": family.prediction,
            "size": family.size,
            "scheduler": family.scheduler,
            "low_res_scheduler": family.low_res_scheduler,
        },
        sort_keys=True,
    )


def _stored(text: str) -> Family:
    """A family from the JSON text of a file; every key is checked."""

    def refuse(reason: str) -> NoReturn:
        raise ModelFileError(f"the file's own configs cannot be used: {reason}")

    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        refuse("they are not JSON")
    known = (
        "family", "unet", "vae", "text", "open_clip", "pad", "prediction", "size", "scheduler", "low_res_scheduler",
    )  # fmt: skip
    if not isinstance(values, dict) or values.keys() != set(known):
        refuse(f"they must hold {', '.join(known)}")
    if values["family"] not in FAMILIES:
        refuse(f"the family {values['family']!r} is not known")
    if values["prediction"] not in ("eps", "v") or type(values["size"]) is not int or values["size"] < 8:
        refuse("prediction must be eps or v, and size a whole number of 8 or more")
    if type(values["open_clip"]) is not bool or type(values["pad"]) is not int or values["pad"] < 0:
        refuse("open_clip must be true or false, and pad the id of a token")
    schedulers = (values["scheduler"], values["low_res_scheduler"] or {})
    if not all(isinstance(one, dict) for one in schedulers):
        refuse("a scheduler must be a table")
    try:
        return replace(
            FAMILIES[values["family"]],
            unet=_config(UNet2DConditionConfig.from_dict, values["unet"]),
            vae=_config(AutoencoderConfig.from_dict, values["vae"]),
            text=_config(CLIPTextConfig.from_dict, values["text"]),
            open_clip=values["open_clip"],
            pad=values["pad"],
            prediction=values["prediction"],
            size=values["size"],
            scheduler=values["scheduler"],
            low_res_scheduler=values["low_res_scheduler"],
        )
    except UserError as error:
        refuse(str(error))


def _config(read: Callable[[Mapping[str, Any]], T], values: Any) -> T:
    if not isinstance(values, dict):
        raise UserError("a network's config must be a table")
    try:
        return read(values)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"a network's config has an impossible value ({error})") from None


def stage_config(tensors: Mapping[str, Tensor], place: Place) -> AutoencoderConfig:
    """The config of an autoencoder, read off its shapes; the scale of its latents is Stable Diffusion's for its size.

    Raises:
        ModelFileError: for video autoencoders, and for those that round their latents to codes.
    """
    shapes = {n.removeprefix(place.prefix): tuple(t.shape) for n, t in tensors.items() if n.startswith(place.prefix)}
    if len(shapes["encoder.conv_in.weight"]) != 4:
        _refuse("an autoencoder of another kind, or of videos")
    if any(name.startswith("quantize.") for name in shapes):
        _refuse("an autoencoder that rounds its latents to codes")
    diffusers = place.layout != "compvis"
    down, block = ("down_blocks", "resnets") if diffusers else ("down", "block")
    conv1 = re.compile(rf"encoder\.{down}\.(\d+)\.{block}\.(\d+)\.conv1\.weight")
    widths = {tuple(map(int, m.groups())): shapes[m.string][0] for m in map(conv1.fullmatch, shapes) if m is not None}
    levels = sorted({level for level, _ in widths})
    attention = "attentions" if diffusers else "attn"
    told = [any(n.startswith(f"encoder.{down}.{level}.{attention}.") for n in shapes) for level in levels]
    middle = "mid_block.attentions.0" if diffusers else "mid.attn_1"
    if not levels or levels != list(range(len(levels))):
        _refuse("an autoencoder of another kind")
    known = next((one for one in (VAE_F8, VAE_F4) if len(one.block_out_channels) == len(levels)), VAE_F8)
    try:
        return AutoencoderConfig(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(widths[level, 0] for level in levels),
            layers_per_block=1 + max(n for level, n in widths if level == 0),
            down_block_types=tuple("AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in told),
            up_block_types=tuple("AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(told)),
            mid_block_add_attention=any(name.startswith(f"encoder.{middle}.") for name in shapes),
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
            sample_size=known.sample_size,
            scaling_factor=known.scaling_factor,
            force_upcast=known.force_upcast,
        )
    except (KeyError, IndexError):
        _refuse("an autoencoder of another kind")


def family_named(name: str) -> Family:
    """A family by its name; an unknown one is refused with the nearest."""
    if name not in FAMILIES:
        raise_unknown("family", name, FAMILIES)
    return FAMILIES[name]
