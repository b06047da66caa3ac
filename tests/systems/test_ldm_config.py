"""Latent diffusion's published configs become ours, their key lists match one to one, and their checkpoints open."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sfumato.api import Model
from sfumato.checkpoints.formats.compvis import by_head
from sfumato.checkpoints.tensors import write_tensors
from sfumato.conditioners.words import minilm_installed
from sfumato.errors import ModelFileError, UserError
from sfumato.systems import open_system
from sfumato.systems.asked import Asked
from sfumato.systems.latent import Latent
from sfumato.systems.ldm_config import beside, is_ldm, latent_config_from_ldm, ldm_map
from sfumato.systems.stable_diffusion import write_single_file
from sfumato.tasks.draw import draw_latents

from .. import stable
from ..checkpoints.compvis_names import Shapes, affine, on_meta, stage, unet

# --- the published facts ---------------------------------------------------------------------------------------------

VQ_F4: dict[str, Any] = {"ch": 128, "mult": (1, 2, 4), "z": 3, "codes": 8192}
KL_F8: dict[str, Any] = {"ch": 128, "mult": (1, 2, 4, 4), "z": 4}


def stage_yaml(ch: int, mult: tuple[int, ...], z: int, codes: int | None = None, middle: bool = True) -> dict[str, Any]:
    table = {
        "double_z": codes is None, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": ch,
        "ch_mult": list(mult), "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    table |= {} if middle else {"attn_type": "none"}
    params = {"embed_dim": z, "ddconfig": table, "lossconfig": {"target": "torch.nn.Identity"}}
    name = "AutoencoderKL" if codes is None else "VQModelInterface"
    return {"target": f"ldm.models.autoencoder.{name}", "params": params | ({"n_embed": codes} if codes else {})}


def config(
    unet_params: dict[str, Any], first: dict[str, Any], condition: Any, *, end: float, side: int = 64,
    channels: int = 3, start: float = 0.0015, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_params}
    params = {
        "linear_start": start, "linear_end": end, "timesteps": 1000, "image_size": side, "channels": channels,
        "first_stage_key": "image", "monitor": "val/loss", "unet_config": network, "first_stage_config": first,
        "cond_stage_config": condition, **more,
    }  # fmt: skip
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 1e-6, "target": target, "params": params}}


def encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


def openai(mc: int, mult: tuple[int, ...], at: tuple[int, ...], inputs: int = 3, out: int = 3, **more: Any) -> Any:
    return {
        "image_size": 64, "in_channels": inputs, "out_channels": out, "model_channels": mc, "num_res_blocks": 2,
        "attention_resolutions": list(at), "channel_mult": list(mult), **more,
    }  # fmt: skip


def told(width: int, depth: int = 1) -> dict[str, Any]:
    return {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": width}


VQ = stage_yaml(**VQ_F4)
CROSS: dict[str, Any] = {"conditioning_key": "crossattn", "cond_stage_trainable": True}
CONCAT: dict[str, Any] = {"concat_mode": True}
FIFTH = (1, 2, 3, 5)
RESCALER = encoder("SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)
LAYOUT = encoder("BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False)

CONFIGS: dict[str, dict[str, Any]] = {
    "text2img256": config(
        openai(192, FIFTH, (8, 4, 2), num_head_channels=32, **told(640)), VQ,
        encoder("BERTEmbedder", n_embed=640, n_layer=32), end=0.0195, cond_stage_key="caption", **CROSS,
    ),
    "txt2img-1.4B": config(
        openai(320, (1, 2, 4, 4), (4, 2, 1), 4, 4, num_heads=8, legacy=False, use_checkpoint=True, **told(1280)),
        stage_yaml(**KL_F8), encoder("BERTEmbedder", n_embed=1280, n_layer=32), start=0.00085, end=0.012, side=32,
        channels=4, cond_stage_key="caption", scale_factor=0.18215, use_ema=False, **CROSS,
    ),
    "cin256-v2": config(
        openai(192, FIFTH, (8, 4, 2), num_heads=1, **told(512)), VQ,
        encoder("ClassEmbedder", n_classes=1001, embed_dim=512, key="class_label"), end=0.0195,
        cond_stage_key="class_label", **CROSS,
    ),
    "layout2img": config(
        openai(128, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32, **told(512, 3)), VQ, LAYOUT, end=0.0205,
        cond_stage_key="coordinates_bbox", loss_type="l1", **CROSS,
    ),
    "semantic256": config(
        openai(128, (1, 4, 8), (32, 16, 8), 6, num_heads=8), VQ, RESCALER, end=0.0205, cond_stage_key="segmentation",
        cond_stage_trainable=True, **CONCAT,
    ),
    "semantic512": config(
        openai(128, (1, 4, 8), (32, 16, 8), 6, num_heads=8), VQ, RESCALER, end=0.0205, side=128,
        cond_stage_key="segmentation", cond_stage_trainable=True, **CONCAT,
    ),
    "bsr_sr": config(
        openai(160, (1, 2, 2, 4), (16, 8), 6, num_head_channels=32), VQ, {"target": "torch.nn.Identity"}, end=0.0155,
        cond_stage_key="LR_image", **CONCAT,
    ),
    "inpainting_big": config(
        openai(256, (1, 2, 3, 4), (8, 4, 2), 7, num_heads=8, resblock_updown=True), stage_yaml(**VQ_F4, middle=False),
        "__is_first_stage__", end=0.0205, cond_stage_key="masked_image", **CONCAT,
    ),
    "celebahq": config(
        openai(224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32), VQ, "__is_unconditional__", end=0.0195,
    ),
    "churches": config(
        openai(192, (1, 2, 2, 4, 4), (1, 2, 4, 8), 4, 4, num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
        stage_yaml(**KL_F8), "__is_unconditional__", end=0.0155, side=32, channels=4, scale_by_std=True,
    ),
}  # fmt: skip

# --- key lists, built as CompVis' modules are and from nothing of ours -----------------------------------------------


def bert(width: int, layers: int, vocabulary: int = 30522, length: int = 77) -> Shapes:
    """x_transformer's wrapper around an encoder of attentions (8 heads of 64) and feed-forwards."""
    shapes = affine("token_emb", vocabulary, width, bias=False) | affine("pos_emb.emb", length, width, bias=False)
    for n in range(layers):
        attention, forward = f"attn_layers.layers.{2 * n}", f"attn_layers.layers.{2 * n + 1}"
        shapes |= affine(f"{attention}.0", width) | affine(f"{forward}.0", width)
        for part in ("to_q", "to_k", "to_v"):
            shapes |= affine(f"{attention}.1.{part}", 512, width, bias=False)
        shapes |= affine(f"{attention}.1.to_out", width, 512)
        shapes |= affine(f"{forward}.1.net.0.0", 4 * width, width) | affine(f"{forward}.1.net.2", width, 4 * width)
    return {f"transformer.{name}": shape for name, shape in (shapes | affine("norm", width)).items()}


CLASSES = affine("embedding", 1001, 512, bias=False)
MAPPER = affine("channel_mapper", 3, 182, 1, 1, bias=False)
HEADS_32: dict[str, Any] = {"out_channels": 3, "in_channels": 3}
NAMES: dict[str, tuple[dict[str, Any], dict[str, Any], Shapes]] = {
    "text2img256": (
        {"mc": 192, "mult": FIFTH, "attention": (8, 4, 2), "context": 640, **HEADS_32}, VQ_F4, bert(640, 32)
    ),
    "txt2img-1.4B": (
        {"mc": 320, "mult": (1, 2, 4, 4), "attention": (4, 2, 1), "context": 1280}, KL_F8, bert(1280, 32)
    ),
    "cin256-v2": ({"mc": 192, "mult": FIFTH, "attention": (8, 4, 2), "context": 512, **HEADS_32}, VQ_F4, CLASSES),
    "layout2img": (
        {"mc": 128, "mult": (1, 2, 3, 4), "attention": (8, 4, 2), "context": 512, "depth": 3, **HEADS_32}, VQ_F4,
        bert(512, 16, 8192, 92),
    ),
    "semantic256": (
        {"mc": 128, "mult": (1, 4, 8), "attention": (32, 16, 8), "context": None, "in_channels": 6, "out_channels": 3},
        VQ_F4, MAPPER,
    ),
    "bsr_sr": (
        {"mc": 160, "mult": (1, 2, 2, 4), "attention": (16, 8), "context": None, "in_channels": 6, "out_channels": 3},
        VQ_F4, {},
    ),
    "inpainting_big": (
        {"mc": 256, "mult": (1, 2, 3, 4), "attention": (8, 4, 2), "context": None, "in_channels": 7, "out_channels": 3,
         "updown": True},
        {**VQ_F4, "middle_attention": False}, {},
    ),
    "celebahq": ({"mc": 224, "mult": (1, 2, 3, 4), "attention": (8, 4, 2), "context": None, **HEADS_32}, VQ_F4, {}),
    "churches": (
        {"mc": 192, "mult": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8), "context": None, "updown": True,
         "scale_shift": True},
        KL_F8, {},
    ),
}  # fmt: skip
NAMES["semantic512"] = NAMES["semantic256"]
UNET_COUNTS = {"cin256-v2": (688, 400_920_579), "txt2img-1.4B": (686, 872_300_484)}
"""Published: names and parameters of the UNet."""


def theirs_of(name: str) -> dict[str, Tensor]:
    network, first, condition = NAMES[name]
    tensors = on_meta(unet(**network), "model.diffusion_model.") | on_meta(stage(**first), "first_stage_model.")
    return tensors | on_meta(condition, "cond_stage_model.")


def counted(tensors: dict[str, Tensor], prefix: str) -> tuple[int, int]:
    chosen = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
    return len(chosen), sum(tensor.numel() for tensor in chosen)


@pytest.mark.parametrize("name", CONFIGS)
def test_key_lists_match_one_to_one(name: str) -> None:
    model = Latent.create(latent_config_from_ldm(CONFIGS[name]), "meta")
    theirs, ours, table = theirs_of(name), model.tensors(), ldm_map(model)
    found, unmatched = table.to_ours(theirs)
    assert not unmatched
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in ours.items()}
    back, unmatched = table.to_theirs(ours)
    assert not unmatched
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in theirs.items()}
    if name in UNET_COUNTS:
        assert counted(theirs, "model.diffusion_model.") == UNET_COUNTS[name]
    if NAMES[name][1] is VQ_F4:
        assert counted(theirs, "first_stage_model.") == (205, 55_322_782)


def test_what_the_configs_say() -> None:
    found = {name: latent_config_from_ldm(values) for name, values in CONFIGS.items()}
    assert {name: one.size for name, one in found.items() if one.size != 256} == {"semantic512": 512}
    assert {name: sorted(one.conditions) for name, one in found.items()} == {
        "text2img256": ["text"], "txt2img-1.4B": ["text"], "cin256-v2": ["label"], "layout2img": ["layout"],
        "semantic256": ["map"], "semantic512": ["map"], "bsr_sr": ["small"], "inpainting_big": ["hole"],
        "celebahq": [], "churches": [],
    }  # fmt: skip
    assert all(one.schedule.name == "scaled_linear" and one.schedule.steps == 1000 for one in found.values())
    assert (found["bsr_sr"].schedule.start, found["bsr_sr"].schedule.end) == (0.0015, 0.0155)
    assert found["txt2img-1.4B"].codec.network["scaling_factor"] == 0.18215
    assert found["inpainting_big"].network["attention_head_dim"] == [32, 64, 96, 128]
    assert found["text2img256"].network["attention_head_dim"] == [6, 12, 18, 30]
    assert found["cin256-v2"].network["attention_head_dim"] == [1, 1, 1, 1]
    assert len(found["cin256-v2"].labels) == 1000
    assert found["inpainting_big"].conditions["hole"]["order"] == "mask-last"


def test_a_scale_in_the_file_counts() -> None:
    assert latent_config_from_ldm(CONFIGS["churches"], 0.22).codec.network["scaling_factor"] == 0.22


def test_rows_of_heads_are_parted_and_put_together() -> None:
    heads, width = 3, 2
    rows = torch.arange(3 * heads * width).float()[:, None].expand(-1, heads * width)[..., None]
    q, k, v = by_head(heads, 3).to_ours(rows)
    assert q[:, 0].tolist() == [0, 1, 6, 7, 12, 13] and k[:, 0].tolist() == [2, 3, 8, 9, 14, 15]
    assert v[:, 0].tolist() == [4, 5, 10, 11, 16, 17]
    assert torch.equal(by_head(heads, 3).to_theirs((q, k, v)), rows)
    bias = rows[:, 0, 0]
    assert torch.equal(by_head(heads, 1).to_theirs(by_head(heads, 1).to_ours(bias)), bias)
    with pytest.raises(ModelFileError, match="has 10 rows"):
        by_head(heads, 3).to_ours(torch.zeros(10, 4, 1))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        ("text2img256", "unet_config.params.context_dmi", 3, "did you mean 'context_dim'"),
        ("text2img256", "unet_config.params.num_classes", 3, "num_classes 3 is not supported"),
        ("text2img256", "unet_config.params.num_heads", 8, "one of num_heads and num_head_channels"),
        ("text2img256", "unet_config.params.resblock_updown", True, "both resblock_updown and"),
        ("text2img256", "unet_config.target", "ldm.Unet", "did you mean 'UNetModel'"),
        ("text2img256", "unet_config.params.in_channels", 4, "in_channels 4, but latents and conditions come to 3"),
        ("text2img256", "first_stage_config.target", "ldm.AutoencoderLK", "did you mean 'AutoencoderKL'"),
        ("text2img256", "first_stage_config.params.ddconfig.double_z", True, "double_z True is not supported"),
        ("text2img256", "cond_stage_config.target", "os.system", "unknown class of cond_stage_config 'system'"),
        ("text2img256", "conditioning_key", "hybrid", "joined by 'hybrid' is not supported"),
        ("text2img256", "beta_schedule", "cosine", "beta_schedule 'cosine' is not supported"),
        ("text2img256", "parameterization", "x1", "unknown parameterization 'x1'"),
        ("text2img256", "image_szie", 3, "did you mean 'image_size'"),
        ("cin256-v2", "cond_stage_config.params.n_classes", 1000, "no row for no class"),
        ("semantic256", "cond_stage_config.params.n_stages", 3, "does not fit a first stage of factor 4"),
        ("bsr_sr", "cond_stage_key", "depth", "it can be 'LR_image'"),
        ("inpainting_big", "cond_stage_key", "image", "it can be 'masked_image'"),
    ],
)
def test_what_has_no_counterpart_is_refused(name: str, place: str, value: Any, says: str) -> None:
    values = copy.deepcopy(CONFIGS[name])
    at = values["model"]["params"]
    *inner, last = place.split(".")
    for key in inner:
        at = at[key]
    at[last] = value
    with pytest.raises(UserError, match=says) as error:
        latent_config_from_ldm(values)
    assert "\n" not in str(error.value)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def shrunk(name: str) -> dict[str, Any]:
    """A published config with networks of some hundred kilobytes."""
    values = copy.deepcopy(CONFIGS[name])
    params = values["model"]["params"]
    params["image_size"] = 4 if name != "txt2img-1.4B" else 2
    params["unet_config"]["params"] |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
    params["unet_config"]["params"]["attention_resolutions"] = [2]
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1, "resolution": 16}
    if "n_embed" in params["first_stage_config"]["params"]:
        params["first_stage_config"]["params"]["n_embed"] = 16
    condition = params["cond_stage_config"]
    if isinstance(condition, dict) and "n_layer" in condition.get("params", {}):
        condition["params"] |= {"n_embed": 16, "n_layer": 1}
        params["unet_config"]["params"]["context_dim"] = 16
    if name == "cin256-v2":
        condition["params"] |= {"n_classes": 4, "embed_dim": 16}
        params["unet_config"]["params"]["context_dim"] = 16
    if name.startswith("semantic"):
        condition["params"]["in_channels"] = 5
    return values


def written(folder: Path, name: str, more: dict[str, Tensor] | None = None) -> tuple[Path, Latent]:
    """A checkpoint with random weights under CompVis' names, its YAML beside it, and the model it was made of."""
    values = shrunk(name)
    torch.manual_seed(0)
    model = Latent.create(latent_config_from_ldm(values))
    for network in model.networks().values():
        network.eval()
    tensors, unmatched = ldm_map(model).to_theirs(model.tensors())
    assert not unmatched
    spare = {"betas": torch.zeros(1000), "logvar": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    for n in list(tensors):
        if n.startswith("model.diffusion_model."):
            spare["model_ema." + n.removeprefix("model.").replace(".", "")] = 2 * tensors[n]
    if name == "inpainting_big":
        spare |= {n.replace("first_stage", "cond_stage"): t.clone() for n, t in tensors.items() if "first" in n}
    if "to_logits" not in spare and name == "text2img256":
        spare["cond_stage_model.transformer.to_logits.weight"] = torch.zeros(30522, 16)
    path = folder / f"{name}.safetensors"
    everything = {n: t.contiguous() for n, t in (tensors | spare | (more or {})).items()}
    write_tensors(path, everything, {}, lambda n: everything[n])
    path.with_suffix(".yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return path, model


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("layout2img", "semantic512", "txt2img-1.4B")])
def test_checkpoints_open(name: str, tmp_path: Path) -> None:
    path, model = written(tmp_path, name)
    opened = open_system(path)
    assert isinstance(opened.system, Latent)
    own, found = model.tensors(), opened.system.tensors()
    assert found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)
    assert "tensors used" in " ".join(opened.notes)
    averaged = open_system(path, averaged=True).system
    assert isinstance(averaged, Latent)
    weight = averaged.tensors()["network.conv_in.weight"]
    assert torch.equal(weight, 2 * own["network.conv_in.weight"])


def test_a_scale_of_latents_in_the_checkpoint(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "churches", {"scale_factor": torch.tensor(0.5)})
    system = open_system(path).system
    assert isinstance(system, Latent) and system.config.codec.network["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    "name", ["cin256-v2", pytest.param("text2img256", marks=pytest.mark.skipif(
        not minilm_installed(), reason="BERT's word pieces are not installed"
    ))],
)  # fmt: skip
def test_they_draw(name: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path, name)
    model = Model(open_system(path), "tiny", device="cpu", dtype="float32")
    said: dict[str, Any] = {"label": "1"} if name == "cin256-v2" else {"prompt": "a red heart"}
    (picture,) = model.generate(**said, seed=0, steps=2)
    assert picture.size == (16, 16)
    assert isinstance(model.system, Latent)
    asked = [Asked(label=text) if "label" in said else Asked(text) for text in ("1", "2")]
    x = draw_latents(model.system, seeds=[0, 0], asked=asked, steps=2)
    assert not torch.equal(x[0], x[1])


def test_they_enlarge_and_fill_in(tmp_path: Path) -> None:
    from PIL import Image

    small = Image.new("RGB", (8, 8), "red")
    path, _ = written(tmp_path, "bsr_sr")
    (picture,) = Model(open_system(path), "tiny", device="cpu", dtype="float32").edit(small, seed=0, steps=2)
    assert picture.size == (32, 32)
    path, _ = written(tmp_path, "inpainting_big")
    model = Model(open_system(path), "tiny", device="cpu", dtype="float32")
    (picture,) = model.edit(small.resize((16, 16)), box=(0, 0, 8, 8), seed=0, steps=2)
    assert picture.size == (16, 16) and picture.getpixel((12, 12)) == (255, 0, 0)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "cin256-v2", {"strange.weight": torch.zeros(2)})
    with pytest.raises(ModelFileError, match=r"strange\.weight is not known"):
        open_system(path)
    path, _ = written(tmp_path, "cin256-v2")
    with pytest.raises(UserError, match="says what its network predicts"):
        open_system(path, prediction="v")
    path, _ = written(tmp_path, "bsr_sr")
    path.with_suffix(".yaml").write_text(yaml.safe_dump(shrunk("celebahq")), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"input_blocks\.0\.0\.weight has shape"):
        open_system(path)


def test_other_configs_beside_a_file_change_nothing(tmp_path: Path) -> None:
    """Stable Diffusion's own YAML, a YAML of something else, and one that is no YAML."""
    path = write_single_file(stable.model("sd1"), tmp_path / "sd.safetensors") and tmp_path / "sd.safetensors"
    clip = copy.deepcopy(CONFIGS["text2img256"])
    clip["model"]["params"]["cond_stage_config"] = encoder("FrozenCLIPEmbedder")
    assert not is_ldm(clip) and is_ldm(CONFIGS["text2img256"])
    for text in (yaml.safe_dump(clip), "a: 1", "{", "- 1", "a: &x [1]\nb: *x", "model: [1]"):
        (tmp_path / "sd.yaml").write_text(text, encoding="utf-8")
        assert beside(path) is None
        assert isinstance(open_system(path).system, Latent)
