"""Single files against diffusers' own conversion: the same names and the same numbers, from the same tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.formats.compvis import diffusers_stage_map, stage_map, unet_map
from sfumato.checkpoints.formats.families import FAMILIES, detect
from sfumato.checkpoints.formats.open_clip import clip_map, open_clip_map
from sfumato.checkpoints.formats.single_file import SingleFile, meta_tensors, write
from sfumato.networks.unet_condition import UNet2DConditionModel

from ..checkpoints.compvis_names import random_parts, tiny_family, whole_file

single = pytest.importorskip("diffusers.loaders.single_file_utils")
diffusers = pytest.importorskip("diffusers")

Tensors = dict[str, Tensor]
NAMES = list(FAMILIES)


def same(ours: Tensors, theirs: Tensors) -> bool:
    """Equal names and values; on "meta", equal names and the very tensors' shapes."""
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        return False
    return all(ours[n].is_meta or torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(params=[*NAMES, "full sd1", "full sd2-v", "full sd-x4-upscaler"], scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tensors]:
    """A family and a file of it: small with random values, or of the published size on "meta"."""
    from safetensors.torch import load_file

    full, _, name = request.param.rpartition(" ")
    if full:
        tensors = whole_file(name)
        return FAMILIES[name], {n: t for n, t in tensors.items() if not n.endswith("position_ids")}
    family, path = tiny_family(name), tmp_path_factory.mktemp("files") / "m.safetensors"
    write(path, family, random_parts(family))
    return family, load_file(path)


def test_unet(case: tuple[Any, Tensors]) -> None:
    family, file = case
    theirs = single.convert_ldm_unet_checkpoint(dict(file), family.unet.to_dict())
    assert same(unet_map(family.unet).under("model.diffusion_model.").to_ours(file)[0], theirs)


def test_the_running_average(case: tuple[Any, Tensors]) -> None:
    family, file = case
    raw = {name: tensor for name, tensor in file.items() if name.startswith("model.")}
    averages = {"model_ema." + "".join(name.split(".")[1:]): tensor + 1 for name, tensor in raw.items()}
    theirs = single.convert_ldm_unet_checkpoint({**raw, **averages}, family.unet.to_dict(), extract_ema=True)
    ours = unet_map(family.unet).to_theirs(theirs)[0]
    for name, tensor in ours.items():
        flat = "model_ema.diffusion_model" + name.replace(".", "")
        assert flat in averages and (tensor.is_meta or torch.equal(tensor, averages[flat]))


def test_autoencoder(case: tuple[Any, Tensors]) -> None:
    family, file = case
    theirs = single.convert_ldm_vae_checkpoint(dict(file), family.vae.to_dict())
    assert same(stage_map(family.vae).under("first_stage_model.").to_ours(file)[0], theirs)


def test_an_autoencoder_with_old_names() -> None:
    config = tiny_family().vae
    current = {name: torch.randn(tensor.shape) for name, tensor in meta_tensors(config).items()}
    renamed = {}
    for name, tensor in current.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    theirs = dict(renamed)
    diffusers.AutoencoderKL(**config.to_dict())._fix_state_dict_keys_on_load(theirs)
    assert same(diffusers_stage_map(old=True).to_ours(renamed)[0], theirs) and same(theirs, current)


def test_text(case: tuple[Any, Tensors]) -> None:
    family, file = case
    if not family.open_clip:
        theirs = single.convert_ldm_clip_checkpoint(dict(file))
        assert same(clip_map().under("cond_stage_model.transformer.").to_ours(file)[0], theirs)
        return
    tower = SimpleNamespace(config=SimpleNamespace(hidden_size=family.text.hidden_size))
    theirs = single.convert_open_clip_checkpoint(tower, dict(file), prefix="cond_stage_model.model.")
    ours = open_clip_map(family.text).under("cond_stage_model.model.").to_ours(file)[0]
    assert same(ours, theirs)


def test_the_projection_of_pooled_texts() -> None:
    """Where diffusers takes it over: in every prefix but that of Stable Diffusion 2."""
    config = tiny_family("sd2-v").text
    prefix = "conditioner.embedders.1.model."
    file = open_clip_map(config).under(prefix).to_theirs(config.tensors())[0]
    file = {name: torch.randn(tensor.shape) for name, tensor in file.items()}
    file[prefix + "text_projection"] = torch.randn(config.hidden_size, config.hidden_size)
    tower = SimpleNamespace(config=SimpleNamespace(hidden_size=config.hidden_size))
    theirs = single.convert_open_clip_checkpoint(tower, dict(file), prefix=prefix)
    assert same(open_clip_map(config, projection=True).under(prefix).to_ours(file)[0], theirs)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_diffusers(name: str) -> None:
    """The published configs make diffusers' networks with our names and shapes."""
    family = FAMILIES[name]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**family.unet.to_dict()).state_dict()
        vae = diffusers.AutoencoderKL(**family.vae.to_dict()).state_dict()
    for ours, theirs in ((meta_tensors(family.unet), unet), (meta_tensors(family.vae), vae)):
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


LIKENESS = {
    "sd1": "v1",
    "sd1-inpainting": "inpainting",
    "sd2-base": "v2",
    "sd2-v": "v2",
    "sd2-inpainting": "inpainting_v2",
    "sd2-depth": "v2",
    "sd-x4-upscaler": "upscale",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_taken_for_the_same(name: str) -> None:
    file = whole_file(name)
    assert single.infer_diffusers_model_type(file) == LIKENESS[name]
    assert name in [family.name for family in detect(file, {}).families]


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_diffusers_draws_from_our_file(name: str, tmp_path: Any) -> None:
    """The UNet that diffusers makes of our file gives what ours gives."""
    from safetensors.torch import load_file

    family = tiny_family(name)
    parts = random_parts(family)
    parts["unet"] = {n: 0.2 * t for n, t in parts["unet"].items()}
    write(tmp_path / "m.safetensors", family, parts)
    theirs = diffusers.UNet2DConditionModel(**family.unet.to_dict())
    file = load_file(tmp_path / "m.safetensors")
    theirs.load_state_dict(single.convert_ldm_unet_checkpoint(file, family.unet.to_dict()))
    ours = UNet2DConditionModel(family.unet)
    ours.load_state_dict(SingleFile.open(tmp_path / "m.safetensors").read("unet"))
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        expected = theirs.eval()(x, 7, encoder_hidden_states=context).sample
        torch.testing.assert_close(ours.eval()(x, 7, context=context), expected, rtol=1e-5, atol=1e-5)
