"""Published layouts as latent models and back, and what tells eps from v."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.api import Model
from sfumato.checkpoints.formats.families import FAMILIES
from sfumato.checkpoints.tensors import TensorFile, write_tensors
from sfumato.errors import ModelFileError, UserError
from sfumato.systems import open_system
from sfumato.systems.codec import CodecSystem
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import (
    config_of,
    family_of,
    open_single_file,
    probe,
    with_codec,
    write_single_file,
)

from .. import stable


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back(name: str) -> None:
    family = stable.family(name)
    model = Latent.create(config_of(family), "meta")
    again = family_of(model)
    assert (again.name, again.unet, again.vae, again.prediction) == (name, family.unet, family.vae, family.prediction)
    assert config_of(again) == model.config
    assert again.text.tensors().keys() == family.text.tensors().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_published_configs_can_be_built(name: str) -> None:
    model = Latent.create(config_of(FAMILIES[name]), "meta")
    assert model.config.size == FAMILIES[name].size and model.codec.channels == 4
    assert model.reads >= {"text"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_file_holds_every_tensor(name: str, tmp_path: Path) -> None:
    model = stable.model(name)
    write_single_file(model, tmp_path / "m.safetensors")
    opened = open_single_file(tmp_path / "m.safetensors", dtype=None)
    assert isinstance(opened.system, Latent) and opened.system.config == model.config
    ours, theirs = model.tensors(), opened.system.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_weights_are_read_into_the_type_that_is_wanted(tmp_path: Path) -> None:
    stable.write(tmp_path / "m.safetensors")
    opened = open_system(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert {t.dtype for t in opened.system.tensors().values()} == {torch.bfloat16}
    assert opened.notes and opened.file is not None


def without(path: Path, target: Path, *prefixes: str) -> Path:
    """A copy of a single file without some parts."""
    file = TensorFile.open(path)
    kept = {name: file.read(name) for name in file.seen if not name.startswith(prefixes)}
    write_tensors(target, kept, file.metadata)
    return target


def test_a_file_without_its_first_stage(tmp_path: Path) -> None:
    whole = stable.write(tmp_path / "m.safetensors")
    bare = without(whole, tmp_path / "bare.safetensors", "first_stage_model.")
    with pytest.raises(ModelFileError, match=r"bare.safetensors holds no first stage \(VAE\), .* --vae PATH \(vae=\)"):
        open_system(bare)
    opened, full = open_system(bare, vae=whole), open_system(whole)
    ours, theirs = opened.system.tensors(), full.system.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert opened.missing == () and opened.opening["vae"]["sha256"] == full.sha256 != opened.sha256
    with pytest.raises(ModelFileError, match="holds a model without its first stage"):
        open_system(whole, vae=bare)
    partial = open_system(bare, incomplete=True)
    assert partial.missing == ("vae",) and isinstance(partial.system, Latent)
    with pytest.raises(ModelFileError, match="it holds no first stage"):
        Model(partial, "it")
    assert {t.is_meta for n, t in partial.system.tensors().items() if n.startswith("codec.")} == {True}


def test_a_file_of_a_network_alone(tmp_path: Path) -> None:
    whole = stable.write(tmp_path / "m.safetensors")
    alone = without(whole, tmp_path / "unet.safetensors", "first_stage_model.", "cond_stage_model.")
    with pytest.raises(ModelFileError, match=r"holds no first stage \(VAE\) and no text encoder, which drawing needs$"):
        open_system(alone)
    with pytest.raises(ModelFileError, match=r"holds no text encoder, which drawing needs$"):
        open_system(alone, vae=whole)
    assert open_system(alone, incomplete=True).missing == ("vae", "text")


class Echo(nn.Module):
    """A network that answers in one way."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor, t: float, *, context: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4) * 9
        return {"eps": x + 0.2 * noise, "v": smooth + 0.1 * x, "noise": noise}[self.answer]


@pytest.mark.parametrize(("answer", "found"), [("eps", "eps"), ("v", "v"), ("noise", None)])
def test_the_probe(answer: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stable.model("sd2-base")
    network = model.denoiser.network
    monkeypatch.setattr(type(network), "forward", Echo(answer).forward)
    assert probe(model) == found


def test_a_file_that_says_nothing_is_asked_about(tmp_path: Path) -> None:
    stable.write(tmp_path / "m.safetensors", "sd2-base")
    file = TensorFile.open(tmp_path / "m.safetensors")
    full = {name: file.read(name) for name in file.seen}
    write_tensors(tmp_path / "bare.safetensors", full, {})
    with pytest.raises(UserError):  # its shapes are not the published ones
        open_system(tmp_path / "bare.safetensors")


def test_another_codec_must_fit() -> None:
    model, other = stable.model(seed=0), stable.model(seed=1)
    stage = CodecSystem(other.config.codec, other.codec)
    changed = with_codec(model, stage, "it")
    assert changed.codec is other.codec and changed.denoiser is model.denoiser
    upscaler = stable.model("sd-x4-upscaler")
    with pytest.raises(UserError, match="4 channels at 1/4 of the size; the model needs 4 at 1/8"):
        with_codec(model, CodecSystem(upscaler.config.codec, upscaler.codec), "it")
    rescaled = other.config.codec.with_network(scaling_factor=0.13025)
    with pytest.raises(UserError, match=r"scales its latents by 0.13025, and the model was made for 0.18215"):
        with_codec(model, CodecSystem.load(rescaled, stage.tensors(), what="x"), "it")
