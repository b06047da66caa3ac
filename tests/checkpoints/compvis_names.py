"""Names and shapes of CompVis' and OpenCLIP's own modules, built as their code builds them and from nothing of ours: a
list of numbered blocks with a running width, a stack of skips, and a factor by which the picture has been shrunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.checkpoints.formats.families import FAMILIES, Family
from sfumato.networks.autoencoder import AutoencoderConfig
from sfumato.networks.clip_text import CLIPTextConfig
from sfumato.networks.unet_condition import UNet2DConditionConfig

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def unet(
    *,
    mc: int,
    mult: Sequence[int],
    attention: Sequence[int],
    context: int | None,
    in_channels: int = 4,
    out_channels: int = 4,
    res_blocks: int = 2,
    linear: bool = False,
    depth: int = 1,
    classes: int | None = None,
    adm: int | None = None,
    only_cross: Sequence[bool] | None = None,
    updown: bool = False,
    scale_shift: bool = False,
) -> Shapes:
    """openaimodel.UNetModel's state dict; `attention` lists factors of shrinking, `only_cross` is by level.

    Without a context attentions are over pixels alone; `updown` resamples by residual blocks.
    """
    emb, shapes = 4 * mc, Shapes()
    only_cross = only_cross or [False] * len(mult)

    def res(name: str, a: int, b: int) -> None:
        shapes.update(affine(f"{name}.in_layers.0", a))
        shapes.update(affine(f"{name}.in_layers.2", b, a, 3, 3))
        shapes.update(affine(f"{name}.emb_layers.1", 2 * b if scale_shift else b, emb))
        shapes.update(affine(f"{name}.out_layers.0", b))
        shapes.update(affine(f"{name}.out_layers.3", b, b, 3, 3))
        if a != b:
            shapes.update(affine(f"{name}.skip_connection", b, a, 1, 1))

    def transformer(name: str, c: int, cross: bool) -> None:
        if context is None:
            shapes.update(affine(f"{name}.norm", c) | affine(f"{name}.qkv", 3 * c, c, 1))
            shapes.update(affine(f"{name}.proj_out", c, c, 1))
            return
        proj = (c, c) if linear else (c, c, 1, 1)
        shapes.update(affine(f"{name}.norm", c))
        shapes.update(affine(f"{name}.proj_in", *proj))
        for n in range(depth):
            block = f"{name}.transformer_blocks.{n}"
            for attn, width in (("attn1", context if cross else c), ("attn2", context)):
                shapes.update(affine(f"{block}.{attn}.to_q", c, c, bias=False))
                shapes.update(affine(f"{block}.{attn}.to_k", c, width, bias=False))
                shapes.update(affine(f"{block}.{attn}.to_v", c, width, bias=False))
                shapes.update(affine(f"{block}.{attn}.to_out.0", c, c))
            shapes.update(affine(f"{block}.ff.net.0.proj", 8 * c, c))
            shapes.update(affine(f"{block}.ff.net.2", c, 4 * c))
            for norm in ("norm1", "norm2", "norm3"):
                shapes.update(affine(f"{block}.{norm}", c))
        shapes.update(affine(f"{name}.proj_out", *proj))

    shapes |= affine("time_embed.0", emb, mc) | affine("time_embed.2", emb, emb)
    if classes is not None:
        shapes["label_emb.weight"] = (classes, emb)
    if adm is not None:
        shapes |= affine("label_emb.0.0", emb, adm) | affine("label_emb.0.2", emb, emb)
    shapes |= affine("input_blocks.0.0", mc, in_channels, 3, 3)
    skips, number, ds, c = [mc], 1, 1, mc
    for level, m in enumerate(mult):
        for _ in range(res_blocks):
            res(f"input_blocks.{number}.0", c, m * mc)
            c = m * mc
            if ds in attention:
                transformer(f"input_blocks.{number}.1", c, only_cross[level])
            skips.append(c)
            number += 1
        if level < len(mult) - 1:
            if updown:
                res(f"input_blocks.{number}.0", c, c)
            else:
                shapes |= affine(f"input_blocks.{number}.0.op", c, c, 3, 3)
            skips.append(c)
            number, ds = number + 1, 2 * ds
    res("middle_block.0", c, c)
    transformer("middle_block.1", c, cross=False)
    res("middle_block.2", c, c)
    number = 0
    for level in reversed(range(len(mult))):
        for i in range(res_blocks + 1):
            res(f"output_blocks.{number}.0", c + skips.pop(), mult[level] * mc)
            c, place = mult[level] * mc, 1
            if ds in attention:
                transformer(f"output_blocks.{number}.1", c, only_cross[level])
                place = 2
            if level and i == res_blocks:
                if updown:
                    res(f"output_blocks.{number}.{place}", c, c)
                else:
                    shapes |= affine(f"output_blocks.{number}.{place}.conv", c, c, 3, 3)
                ds //= 2
            number += 1
    return shapes | affine("out.0", c) | affine("out.2", out_channels, mc, 3, 3)


def stage(
    *,
    ch: int,
    mult: Sequence[int],
    z: int,
    res_blocks: int = 2,
    attention: Sequence[int] = (),
    resolution: int = 256,
    codes: int | None = None,
    middle_attention: bool = True,
) -> Shapes:
    """AutoencoderKL's state dict, or VQModel's with `codes`; `attention` lists sides of the picture in pixels."""
    shapes = Shapes()

    def res(name: str, a: int, b: int) -> None:
        shapes.update(affine(f"{name}.norm1", a) | affine(f"{name}.conv1", b, a, 3, 3))
        shapes.update(affine(f"{name}.norm2", b) | affine(f"{name}.conv2", b, b, 3, 3))
        if a != b:
            shapes.update(affine(f"{name}.nin_shortcut", b, a, 1, 1))

    def attn(name: str, c: int) -> None:
        shapes.update(affine(f"{name}.norm", c))
        for part in ("q", "k", "v", "proj_out"):
            shapes.update(affine(f"{name}.{part}", c, c, 1, 1))

    def middle(name: str, c: int) -> None:
        res(f"{name}.block_1", c, c)
        if middle_attention:
            attn(f"{name}.attn_1", c)
        res(f"{name}.block_2", c, c)

    shapes |= affine("encoder.conv_in", ch, 3, 3, 3)
    c, side = ch, resolution
    for level, m in enumerate(mult):
        for n in range(res_blocks):
            res(f"encoder.down.{level}.block.{n}", c, m * ch)
            c = m * ch
            if side in attention:
                attn(f"encoder.down.{level}.attn.{n}", c)
        if level < len(mult) - 1:
            shapes |= affine(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
            side //= 2
    middle("encoder.mid", c)
    moments = z if codes else 2 * z
    shapes |= affine("encoder.norm_out", c) | affine("encoder.conv_out", moments, c, 3, 3)
    shapes |= affine("decoder.conv_in", c, z, 3, 3)
    middle("decoder.mid", c)
    for level in reversed(range(len(mult))):
        for n in range(res_blocks + 1):
            res(f"decoder.up.{level}.block.{n}", c, mult[level] * ch)
            c = mult[level] * ch
            if side in attention:
                attn(f"decoder.up.{level}.attn.{n}", c)
        if level:
            shapes |= affine(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
            side *= 2
    shapes |= affine("decoder.norm_out", c) | affine("decoder.conv_out", 3, c, 3, 3)
    if codes:
        shapes["quantize.embedding.weight"] = (codes, z)
    return shapes | affine("quant_conv", moments, moments, 1, 1) | affine("post_quant_conv", z, z, 1, 1)


def clip(config: CLIPTextConfig) -> Shapes:
    """transformers' CLIPTextModel as files of Stable Diffusion 1 have it, with the old table of positions."""
    c, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"embeddings.position_ids": (1, config.max_position_embeddings)}
    shapes |= affine("embeddings.token_embedding", config.vocab_size, c, bias=False)
    shapes |= affine("embeddings.position_embedding", config.max_position_embeddings, c, bias=False)
    for n in range(config.num_hidden_layers):
        layer = f"encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= affine(f"{layer}.self_attn.{part}", c, c)
        shapes |= affine(f"{layer}.layer_norm1", c) | affine(f"{layer}.layer_norm2", c)
        shapes |= affine(f"{layer}.mlp.fc1", inner, c) | affine(f"{layer}.mlp.fc2", c, inner)
    return {f"text_model.{n}": s for n, s in (shapes | affine("final_layer_norm", c)).items()}


def open_clip(config: CLIPTextConfig) -> Shapes:
    """OpenCLIP's text tower as files of Stable Diffusion 2 have it: with the layer that is not used, and more."""
    c, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"positional_embedding": (config.max_position_embeddings, c), "logit_scale": ()}
    shapes |= affine("token_embedding", config.vocab_size, c, bias=False) | {"text_projection": (c, c)}
    for n in range(config.num_hidden_layers + 1):
        block = f"transformer.resblocks.{n}"
        shapes |= affine(f"{block}.ln_1", c) | affine(f"{block}.ln_2", c)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * c, c), f"{block}.attn.in_proj_bias": (3 * c,)}
        shapes |= affine(f"{block}.attn.out_proj", c, c)
        shapes |= affine(f"{block}.mlp.c_fc", inner, c) | affine(f"{block}.mlp.c_proj", c, inner)
    return shapes | affine("ln_final", c)


# --- the published models, and tiny ones ---------------------------------------------------------------------------

SD1 = {"mc": 320, "mult": (1, 2, 4, 4), "attention": (4, 2, 1), "context": 768}
SD2 = {**SD1, "context": 1024, "linear": True}
X4 = {
    "mc": 256,
    "mult": (1, 2, 2, 4),
    "attention": (2, 4, 8),
    "context": 1024,
    "in_channels": 7,
    "linear": True,
    "classes": 1000,
    "only_cross": (True, True, True, False),
}
UNETS: dict[str, dict[str, object]] = {
    "sd1": SD1,
    "sd1-inpainting": {**SD1, "in_channels": 9},
    "sd2-base": SD2,
    "sd2-v": SD2,
    "sd2-inpainting": {**SD2, "in_channels": 9},
    "sd2-depth": {**SD2, "in_channels": 5},
    "sd-x4-upscaler": X4,
}
F8 = {"ch": 128, "mult": (1, 2, 4, 4), "z": 4}
F4 = {"ch": 128, "mult": (1, 2, 4), "z": 4}


def on_meta(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def whole_file(name: str) -> dict[str, Tensor]:
    """All tensors of a published file, on "meta", with what such files hold besides."""
    family = FAMILIES[name]
    tensors = on_meta(unet(**UNETS[name]), "model.diffusion_model.")  # type: ignore[arg-type]
    tensors |= on_meta(stage(**(F4 if name == "sd-x4-upscaler" else F8)), "first_stage_model.")  # type: ignore[arg-type]
    if family.open_clip:
        tensors |= on_meta(open_clip(family.text), "cond_stage_model.model.")
    else:
        tensors |= on_meta(clip(family.text), "cond_stage_model.transformer.")
    buffers = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_variance")
    return tensors | on_meta({**dict.fromkeys(buffers, (1000,)), "model_ema.decay": (), "model_ema.num_updates": ()})


def tiny_family(name: str = "sd1") -> Family:
    """A family with the layout of a published one and networks of a few kilobytes."""
    full = FAMILIES[name]
    levels = 3 if name == "sd-x4-upscaler" else 4
    return replace(
        full,
        unet=UNet2DConditionConfig.from_dict(
            {
                **full.unet.to_dict(),
                "sample_size": 8,
                "block_out_channels": [32, 64, 64, 64],
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "num_class_embeds": 10 if full.unet.num_class_embeds else None,
                "layers_per_block": 1,
            }
        ),
        vae=AutoencoderConfig.from_dict(
            {**full.vae.to_dict(), "block_out_channels": [8, 16, 16, 16][:levels], "norm_num_groups": 4}
        ),
        text=replace(
            full.text,
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=9,
        ),
    )


def random_parts(family: Family, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Weights of all networks of a family, under our names."""
    from sfumato.checkpoints.formats.single_file import meta_tensors

    generator = torch.Generator().manual_seed(seed)
    seen = {"unet": meta_tensors(family.unet), "vae": meta_tensors(family.vae), "text": family.text.tensors()}
    return {
        part: {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        for part, tensors in seen.items()
    }
