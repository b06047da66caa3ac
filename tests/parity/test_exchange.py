"""Folders that diffusers opens, and its own that we open: the same tensors, and the same pictures within a level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.images import to_pil
from sfumato.random import NoiseSource
from sfumato.systems import open_as, open_system
from sfumato.systems.asked import Asked
from sfumato.systems.codec import CodecSystem
from sfumato.systems.ddpm import DDPM
from sfumato.systems.exchange import OWN, save_folder
from sfumato.systems.latent import Latent
from sfumato.tasks.draw import draw

from ..systems.test_exchange import LABELS, codec, ddpm, latent, words

diffusers = pytest.importorskip("diffusers")

STEPS, SEEDS = 4, (3, 4)
DDIM: dict[str, Any] = {"sampler": "ddim", "steps": STEPS, "guidance": 2.0, "threshold": "none"}
MODELS: dict[str, Any] = {
    "kl, joint text": lambda: latent(conditions={"text": words()}, sampling=DDIM),
    "vq, joint text": lambda: latent("vq", {"text": words()}, sampling=DDIM),
    "labels": lambda: latent(conditions={"label": LABELS}, sampling=DDIM),
    "text and labels": lambda: latent(conditions={"text": words(), "label": LABELS}, sampling=DDIM),
}
ASKED = {
    "text": [Asked("a red heart"), Asked("fish")],
    "label": [Asked(label="dog"), Asked(label="cat")],
    "both": [Asked("a red heart", label="dog"), Asked("fish", label="cat")],
}


def levels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as levels of 255."""
    return torch.stack([torch.tensor(list(one.tobytes())) for one in to_pil(pictures)])


def start(model: Latent | DDPM) -> Tensor:
    """The noise that our drawing begins with."""
    return NoiseSource(SEEDS, model.shape, device=torch.device("cpu")).draw()


def component(folder: Path, name: str) -> Any:
    """A component, opened by the class that the index names, as diffusers does."""
    _, kind = json.loads((folder / "model_index.json").read_text())[name]
    return getattr(diffusers, kind).from_pretrained(folder / name, local_files_only=True)


def opened(folder: Path) -> Any:
    """The whole folder as diffusers opens it; a context is given as states, so there is no text encoder to name."""
    index = json.loads((folder / "model_index.json").read_text())
    none = {name: None for name in ("text_encoder", "tokenizer") if name in index}
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **none)


@torch.no_grad()
def drawn_by_hand(folder: Path, model: Latent, asked: list[Asked]) -> Tensor:
    """diffusers' UNet, scheduler and autoencoder, put together as its scripts do."""
    index = json.loads((folder / "model_index.json").read_text())
    unet, vae = component(folder, "unet"), component(folder, "vae" if index.get("vae") else "vqvae")
    scheduler = component(folder, "scheduler")
    scheduler.set_timesteps(STEPS)
    sides = model.conditions(asked)
    x, scale = start(model) * scheduler.init_noise_sigma, model.config.sampling.guidance

    def predicted(t: Tensor, side: Any) -> Tensor:
        told: dict[str, Any] = {"class_labels": side.labels}
        if side.context is not None:
            told |= {"encoder_hidden_states": side.context, "encoder_attention_mask": side.context_mask}
        out: Tensor = unet(scheduler.scale_model_input(x, t), t, **told).sample
        return out

    for t in scheduler.timesteps:
        conditional, null = (predicted(t, side) for side in sides)
        x = scheduler.step(null + scale * (conditional - null), t, x).prev_sample
    pictures: Tensor = vae.decode(x / vae.config.scaling_factor).sample
    return pictures


@pytest.mark.parametrize(
    ("name", "asked"),
    [("kl, joint text", "text"), ("vq, joint text", "text"), ("labels", "label"), ("text and labels", "both")],
)
def test_a_folder_draws_the_same_pictures_in_diffusers(tmp_path: Path, name: str, asked: str) -> None:
    model = MODELS[name]()
    assert save_folder(model, tmp_path / "model") == []
    ours = levels(draw(model, seeds=SEEDS, asked=ASKED[asked]))
    theirs = levels(drawn_by_hand(tmp_path / "model", model, ASKED[asked]))
    assert (ours - theirs).abs().max() <= 1
    assert ours.float().std() > 10  # a picture, not a flat field


@pytest.mark.parametrize("name", MODELS)
def test_what_diffusers_saves_again_opens_with_the_same_tensors(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    save_folder(model, tmp_path / "ours")
    pipeline = opened(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "ours").glob("*.*"):
        if not (tmp_path / "theirs" / file.name).exists():
            shutil.copy(file, tmp_path / "theirs")  # what only we know
    found = open_as(Latent, tmp_path / "theirs")
    assert found.config == model.config
    assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in model.tensors().items())


def test_the_pipeline_takes_the_states_of_our_prompts(tmp_path: Path) -> None:
    """Stable Diffusion's pipeline opens the whole folder; guided by states of equal length it draws our pictures."""
    model = latent(conditions={"text": words()}, sampling=DDIM)
    save_folder(model, tmp_path / "model")
    pipeline = opened(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    asked = [Asked("red heart", negative="blue fish"), Asked("a heart", negative="a fish")]
    wanted, unwanted = model.conditions(asked)
    pictures = pipeline(
        prompt_embeds=wanted.context, negative_prompt_embeds=unwanted.context, latents=start(model),
        num_inference_steps=STEPS, guidance_scale=2.0, output_type="pt",
    ).images  # fmt: skip
    ours = levels(draw(model, seeds=SEEDS, asked=asked))
    assert (ours - levels(pictures * 2 - 1)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_unconditional_pipeline_goes_both_ways(tmp_path: Path, kind: str) -> None:
    """Also without sfumato.json, as a folder of diffusers' own."""
    model = latent(kind, sampling=DDIM | {"guidance": 1.0})
    for network in model.networks().values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as models are opened
    save_folder(model, tmp_path / "model")
    pipeline = opened(tmp_path / "model")
    assert type(pipeline).__name__ == "LDMPipeline"
    pipeline.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / OWN).exists()
    found = open_as(Latent, tmp_path / "theirs")
    assert found.config.unet(found.codec, None) == model.denoiser_config
    assert found.config.size == 16 and found.config.schedule.name == "cosine"
    assert torch.equal(draw(found, seeds=SEEDS, steps=STEPS), draw(model, seeds=SEEDS))
    pipeline.scheduler.set_timesteps(STEPS)
    x = start(model)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
        theirs = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
    assert (levels(draw(model, seeds=SEEDS)) - levels(theirs)).abs().max() <= 1


@pytest.mark.parametrize(
    ("sampling", "pipeline"),
    [({"sampler": "ddim", "rederive_eps": False}, "DDIMPipeline"), ({"sampler": "ddpm"}, "DDPMPipeline")],
)
def test_a_model_of_pixels_goes_both_ways(tmp_path: Path, sampling: dict[str, Any], pipeline: str) -> None:
    model = ddpm(**sampling)
    save_folder(model, tmp_path / "model")
    theirs = opened(tmp_path / "model")
    assert type(theirs).__name__ == pipeline
    theirs.save_pretrained(tmp_path / "theirs")
    found = open_as(DDPM, tmp_path / "theirs")
    assert found.config.unet() == model.config.unet()
    x = start(model)
    with torch.no_grad():
        assert torch.allclose(theirs.unet(x, 7).sample, model.denoiser.network(x, torch.tensor([7, 7])), atol=1e-5)
    assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in model.tensors().items())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_first_stage_goes_both_ways(tmp_path: Path, kind: str) -> None:
    stage = codec(kind)
    save_folder(stage, tmp_path / "ours")
    theirs = {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}[kind].from_pretrained(tmp_path / "ours")
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = theirs.decode(z / theirs.config.scaling_factor).sample
        assert (levels(decoded) - levels(stage.codec.decode(z))).abs().max() <= 1
    theirs.save_pretrained(tmp_path / "theirs")
    found = open_as(CodecSystem, tmp_path / "theirs")
    assert found.config.autoencoder() == stage.config.autoencoder()
    assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in stage.tensors().items())


def test_a_remark_comes_where_the_pipeline_changes_the_scheduler(tmp_path: Path) -> None:
    """With the remark heeded, parts loaded one by one, the pictures are ours."""
    model = latent(conditions={"text": words()}, sampling=DDIM | {"schedule": "leading"})
    (remark,) = save_folder(model, tmp_path / "model")
    assert "steps_offset" in remark
    pipeline = opened(tmp_path / "model")
    assert pipeline.scheduler.config.steps_offset == 1
    ours = levels(draw(model, seeds=SEEDS, asked=ASKED["text"]))
    assert (ours - levels(drawn_by_hand(tmp_path / "model", model, ASKED["text"]))).abs().max() <= 1
    pipeline.scheduler.save_pretrained(tmp_path / "model/scheduler")
    found = open_system(tmp_path / "model").system
    assert isinstance(found, Latent) and found.config.sampling.grid is not None
    assert found.config.sampling.grid.options == {"offset": 1}
