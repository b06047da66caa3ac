"""Stable Diffusion twice: as our `Latent` and as diffusers' pipelines, with the same weights.

The networks are tiny, or of the published sizes. Their weights are random, each layer's of about unit gain, but for the
UNet's last: a random network amplifies small differences from step to step, and a network whose output is tame keeps
two correct programs together for ten steps of guidance 7.5 (`test_stable_diffusion.py` measures by how much).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import FAMILIES, Family
from sfumato.checkpoints.formats.single_file import meta_tensors
from sfumato.networks.autoencoder import AutoencoderConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig
from sfumato.random import derived_seed
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import config_of, named

Parts = dict[str, dict[str, Tensor]]

NAMES = ("sd1", "sd2-base", "sd2-v", "sd1-inpainting", "sd2-inpainting", "sd2-depth", "sd-x4-upscaler")
UNIT = 16
"""Pixels that the sides of a picture must be multiples of for diffusers, with the tiny networks."""
TAME = 0.1
"""Gain of the UNet's last layer."""

_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", **_LEADING},
    "euler": {"_class_name": "EulerDiscreteScheduler", **_LEADING},
    "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler", **_LEADING},
    "plms": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_LEADING},
    "euler a": {"_class_name": "EulerAncestralDiscreteScheduler", **_LEADING},
    "euler linspace": {"_class_name": "EulerDiscreteScheduler", **_LEADING, "timestep_spacing": "linspace"},
    "euler trailing": {"_class_name": "EulerDiscreteScheduler", **_LEADING, "timestep_spacing": "trailing"},
    "dpmpp_2m karras": {"_class_name": "DPMSolverMultistepScheduler", **_LEADING, "use_karras_sigmas": True},
    "ddim trailing": {"_class_name": "DDIMScheduler", **_LEADING, "timestep_spacing": "trailing"},
}
"""Fields of `scheduler_config.json`, less the betas and what is predicted, which belong to the family."""

_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "trained_betas")


def tiny(name: str) -> Family:
    """A published family with networks of two levels, and CLIP's own vocabulary."""
    full = FAMILIES[name]
    upscaler = name == "sd-x4-upscaler"
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    unet = {
        **full.unet.to_dict(),
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": down[::-1] if upscaler else down,
        "up_block_types": up[::-1] if upscaler else up,
        "only_cross_attention": [True, False] if upscaler else False,
        "attention_head_dim": [2, 4] if full.open_clip else 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "num_class_embeds": 50 if upscaler else None,
    }
    vae = {
        **full.vae.to_dict(),
        "block_out_channels": [8, 16, 16, 16][: len(full.vae.block_out_channels)],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 64,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return replace(
        full,
        unet=UNet2DConditionConfig.from_dict(unet),
        vae=AutoencoderConfig.from_dict(vae),
        text=replace(full.text, **text),
        size=64,
    )


def weights(family: Family, *, tame: float = TAME, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parts:
    """Random weights of all networks under our names, each tensor from a stream of its own."""
    seen = {"unet": meta_tensors(family.unet), "vae": meta_tensors(family.vae), "text": family.text.tensors()}
    parts = {
        part: {name: _random(f"{part}.{name}", tensor, seed).to(dtype) for name, tensor in tensors.items()}
        for part, tensors in seen.items()
    }
    parts["unet"]["conv_out.weight"] *= tame
    return parts


def _random(name: str, like: Tensor, seed: int) -> Tensor:
    """Convolutions and linear layers of unit gain, norms near the identity, small biases."""
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(derived_seed(name, seed)))
    if name.endswith("embedding.weight"):
        return 0.5 * x
    if name.endswith("bias"):
        return 0.05 * x
    return x / like[0].numel() ** 0.5 if like.ndim > 1 else 1 + 0.1 * x


def scheduler_fields(family: Family, name: str) -> dict[str, Any]:
    """`scheduler_config.json` of a family with another sampler."""
    return {key: family.scheduler[key] for key in _BETAS if key in family.scheduler} | SCHEDULERS[name]


def latent(family: Family, parts: Mapping[str, Mapping[str, Tensor]]) -> Latent:
    """Our model over the given tensors."""
    tensors = {name: t for part, own in parts.items() for name, t in named(part, own).items()}
    model = Latent.load(config_of(family), tensors, what=family.title)
    for network in model.networks().values():
        network.eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class Case:
    """One family with its weights.

    Attributes:
        family: with the configs of its networks.
        parts: the weights.
    """

    family: Family
    parts: Parts

    def model(self, scheduler: str) -> Latent:
        """Our model, which draws by default as that scheduler says; made once, so it must be left as it is."""
        if scheduler not in self._models:
            self._models[scheduler] = self.new_model(scheduler)
        return self._models[scheduler]

    def new_model(self, scheduler: str) -> Latent:
        """The same, made anew; of the weights only the values are shared."""
        return latent(replace(self.family, scheduler=scheduler_fields(self.family, scheduler)), self.parts)

    def pipeline(self, kind: str, scheduler: str) -> Any:
        """diffusers' pipeline: "text", "picture", "inpaint", "depth" or "upscale"."""
        import diffusers

        fields = scheduler_fields(self.family, scheduler)
        made = getattr(diffusers, fields["_class_name"]).from_config(fields)
        return pipeline(self.family, kind, made, self.networks)

    @functools.cached_property
    def _models(self) -> dict[str, Latent]:
        return {}

    @functools.cached_property
    def networks(self) -> dict[str, Any]:
        """diffusers' and transformers' networks."""
        return their_networks(self.family, self.parts)


@functools.cache
def case(name: str) -> Case:
    """A tiny family, made once."""
    family = tiny(name)
    return Case(family, weights(family))


def their_networks(family: Family, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """diffusers' UNet and autoencoder over the given tensors themselves, and transformers' text tower."""
    import diffusers

    networks: dict[str, Any] = {}
    for name, kind, config in (("unet", "UNet2DConditionModel", family.unet), ("vae", "AutoencoderKL", family.vae)):
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**config.to_dict())
        network.load_state_dict(dict(parts[name]), assign=True)
        networks[name] = network
    networks["text_encoder"] = their_text(family, parts["text"])
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def their_text(family: Family, tensors: Mapping[str, Tensor]) -> Any:
    """transformers' text tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    values = {key: value for key, value in family.text.to_dict().items() if key != "model_type"}
    tower = CLIPTextModel(CLIPTextConfig(**values))
    nested = any(name.startswith("text_model.") for name in tower.state_dict())
    own = {name if nested else name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    tower.load_state_dict(own)
    if not nested:  # where diffusers looks for the last layer norm when it skips layers
        object.__setattr__(tower, "text_model", tower)
    return tower


def their_tokenizer(family: Family) -> Any:
    """transformers' tokenizer over the packaged vocabulary, padding as the family does."""
    return _their_tokenizer("!" if family.open_clip else "<|endoftext|>")


@functools.cache
def _their_tokenizer(pad: str) -> Any:
    from transformers import CLIPTokenizer

    from sfumato.conditioners.vocabulary import END, START, tables

    vocabulary, merges = tables()
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=77, **marks)


def pipeline(family: Family, kind: str, scheduler: Any, networks: Mapping[str, Any]) -> Any:
    """A pipeline of diffusers over these networks, without a safety checker and without a bar."""
    import diffusers

    classes = {
        "text": "StableDiffusionPipeline",
        "picture": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
        "depth": "StableDiffusionDepth2ImgPipeline",
        "upscale": "StableDiffusionUpscalePipeline",
    }
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "depth":
        more = {"depth_estimator": None, "feature_extractor": None}
    if kind == "upscale":
        more = {"low_res_scheduler": diffusers.DDPMScheduler.from_config(family.low_res_scheduler)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, classes[kind])(
            **networks, tokenizer=their_tokenizer(family), scheduler=scheduler, **more
        )
    made.set_progress_bar_config(disable=True)
    return made


# --- inputs -----------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int = 0) -> Tensor:
    """A picture (3, H, W) in [0, 1], in whole levels of 255."""
    x = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1000 + seed))
    ramp = torch.linspace(0, 1, width).expand(3, height, width)
    return ((0.5 * x + 0.5 * ramp) * 255).round() / 255


def mask(width: int, height: int, *, aligned: bool = True) -> Tensor:
    """A rectangle to be redrawn, (H, W) of 0 and 1; its corners lie on whole latents unless it is not aligned."""
    found = torch.zeros(height, width)
    inset = 0 if aligned else 3
    found[8 + inset : height - 16 - inset, 16 + inset : width - 8 - inset] = 1
    return found


def depth(width: int, height: int) -> Tensor:
    """Inverse depths (H, W) of no range in particular."""
    y, x = torch.meshgrid(torch.linspace(-2, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return 40 + 10 * torch.sin(x) + 3 * y**2
