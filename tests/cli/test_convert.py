"""`sfumato convert`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.checkpoints.tensors import TensorFile
from sfumato.systems import open_system
from sfumato.systems.codec import CodecConfig, CodecSystem
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import write_single_file

from .. import tiny
from ..parity.stable_cases import case, latent

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, a single file and its pickle, a model of ours, a first stage; not to be changed."""
    place = tmp_path_factory.mktemp("sources")
    model = latent(case("sd1").family, case("sd1").parts)
    save_folder(model, place / "folder")
    write_single_file(model, place / "file.safetensors")
    tensors, metadata = load_file(place / "file.safetensors"), TensorFile.open(place / "file.safetensors").metadata
    tensors |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.ones(9)}
    tensors |= {f"model_ema.x{n}": torch.zeros(1) for n in range(12)}
    save_file(tensors, place / "more.safetensors", metadata=metadata)
    shutil.copytree(place / "folder", place / "pickled")
    (place / "pickled" / UNET).unlink()
    torch.save(load_file(place / "folder" / UNET), place / "pickled/unet/diffusion_pytorch_model.bin")
    tiny.write_tiny_model(place / "own.safetensors")
    return place


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    with chdir(tmp_path):
        yield tmp_path


def test_a_file_becomes_a_folder_and_the_folder_a_file(sources: Path, work: Path) -> None:
    said = tiny.succeed("convert", sources / "more.safetensors", "folder", "--to", "diffusers").out
    lines = said.splitlines()
    count = len(load_file(sources / "file.safetensors"))
    assert lines[0] == "note: Stable Diffusion 1; predicts eps (the file's metadata)"
    assert "2 left aside, tables of the noise schedule, which follow from the config: alphas_cumprod, betas" in lines
    (averages,) = [line for line in lines if line.startswith("12 left aside")]
    assert averages.endswith("model_ema.x7 and 2 more") and lines[-1] == f"folder: {count} tensors"
    said = tiny.succeed("convert", "folder", "again.safetensors", "--to", "single-file").out
    assert said.splitlines()[-1].startswith("again.safetensors: ")
    assert Path("again.safetensors").read_bytes() == (sources / "file.safetensors").read_bytes()


def test_every_name_is_listed_where_that_is_asked_for(sources: Path, work: Path) -> None:
    said = tiny.succeed("convert", sources / "more.safetensors", "a", "--to", "diffusers", "--all-names").out
    assert all(f"model_ema.x{n}" in said for n in range(12)) and "more" not in said.replace("more.safetensors", "")


def test_another_type_prediction_and_first_stage(sources: Path, work: Path) -> None:
    vae = sources / "folder/vae"
    said = tiny.succeed(
        "convert", sources / "folder", "a.safetensors", "--to", "single-file", "--dtype", "bfloat16", "--vae", vae
    ).out  # fmt: skip
    assert f"note: the first stage is that of {vae}" in said
    assert {t.dtype for t in load_file("a.safetensors").values()} == {torch.bfloat16}
    tiny.succeed("convert", sources / "file.safetensors", "v", "--to", "diffusers", "--prediction", "v")
    model = open_system("v").system
    assert isinstance(model, Latent) and model.config.prediction.parameterization == "v"


def test_a_model_without_its_first_stage(sources: Path, work: Path) -> None:
    file, vae = TensorFile.open(sources / "file.safetensors"), sources / "folder/vae"
    kept = {name: file.read(name) for name in file.seen if not name.startswith("first_stage_model.")}
    save_file(kept, "bare.safetensors", metadata=file.metadata)
    hint = "bare.safetensors holds no first stage (VAE), which"
    for arguments in (
        ("generate", "a fox", "--out", "a.png", "--model", "bare.safetensors"),
        ("convert", "bare.safetensors", "new", "--to", "diffusers"),
    ):
        refused = tiny.run(*arguments)
        assert refused.code == 2 and hint in refused.err and "--vae PATH" in refused.err
    told = tiny.succeed("info", "bare.safetensors").out
    assert 'missing: ["first stage (VAE): give one with --vae PATH"]' in told and f'"used": {len(kept)}' in told
    half = ("half.safetensors", "--to", "single-file", "--dtype", "float16")
    said = tiny.succeed("convert", "bare.safetensors", *half).out
    assert "note: the file holds no first stage (VAE), as bare.safetensors does not; give one with --vae PATH" in said
    found = load_file("half.safetensors")
    assert found.keys() == kept.keys() and all(torch.equal(found[name], tensor.half()) for name, tensor in kept.items())
    tiny.succeed("convert", "bare.safetensors", "filled.safetensors", "--to", "single-file", "--vae", vae)
    assert Path("filled.safetensors").read_bytes() == (sources / "file.safetensors").read_bytes()
    tiny.succeed("convert", "bare.safetensors", "own.safetensors", "--to", "sfumato", "--vae", vae)
    models = {"whole": [sources / "file.safetensors"], "given": ["bare.safetensors", "--vae", vae]}
    pixels = set()
    for name, model in (models | {"own": ["own.safetensors"]}).items():
        tiny.succeed("generate", "a fox", "--seed", "1", "--steps", "1", "--out", f"{name}.png", "--model", *model)
        with Image.open(f"{name}.png") as picture:
            pixels.add(picture.tobytes())
    assert len(pixels) == 1
    assert "the same bytes" in tiny.succeed("replay", "given.png", "--out", "again.png").out


def test_a_pickle_with_permission_only(sources: Path, work: Path) -> None:
    refused = tiny.run("convert", sources / "pickled", "a", "--to", "diffusers")
    assert refused.code == 2 and "not opened without --allow-pickle" in refused.err and not Path("a").exists()
    said = tiny.succeed("convert", sources / "pickled", "a", "--to", "diffusers", "--allow-pickle").out
    assert "is a pickle and has been converted" in said
    plain = load_file(sources / "folder" / UNET)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load_file(f"a/{UNET}").items())


def test_a_model_of_pixels_and_a_first_stage_become_folders(sources: Path, work: Path) -> None:
    tiny.succeed("convert", sources / "own.safetensors", "a", "--to", "diffusers")
    first, second = (open_system(path).system for path in (sources / "own.safetensors", Path("a")))
    assert first.config == second.config
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    tiny.succeed("convert", sources / "folder/vae", "b", "--to", "diffusers", "--dtype", "float16")
    seen = TensorFile.open("b/diffusion_pytorch_model.safetensors").seen
    assert {str(tensor.dtype) for tensor in seen.values()} == {"torch.float16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SRC", "new"), "--to: is missing"),
        (("SRC", "new", "--to", "diffuser"), "unknown layout 'diffuser' (did you mean 'diffusers'?)"),
        (("SRC", "taken", "--to", "diffusers"), "taken exists already; choose another name"),
        (("SRC", "taken.safetensors", "--to", "single-file"), "taken.safetensors exists already"),
        (("SRC", "new.ckpt", "--to", "single-file"), "its name must end in .safetensors"),
        (("SRC", "new.safetensors", "--to", "diffusers"), "new.safetensors: this layout is a folder, so its name"),
        (("SRC", "new.CKPT", "--to", "diffusers"), "new.CKPT: this layout is a folder"),
        (("SRC", "empty", "--to", "single-file"), "must end in .safetensors"),
        (("SRC", "new", "--to", "diffusers", "--dtype", "float61"), "unknown dtype 'float61'"),
        (("SRC", "new", "--to", "diffusers", "--prediction", "x0"), "unknown prediction 'x0'"),
        (("SRC", "new", "--to", "diffusers", "--ema"), "keeps no running average of the weights apart"),
        (("SRC", "new", "--to", "diffusers", "--vae", "nothing"), "nothing"),
        (("nothing.safetensors", "new", "--to", "diffusers"), "no model at nothing.safetensors"),
        (("taken.safetensors", "new", "--to", "diffusers"), "taken.safetensors"),
        (("OWN", "new.safetensors", "--to", "single-file"), "holds a ddpm model; single files are of Stable Diffusion"),
        (("SRC/vae", "new.safetensors", "--to", "single-file"), "holds a codec model; single files"),
    ],
)  # fmt: skip
def test_refusals(sources: Path, work: Path, arguments: tuple[str, ...], message: str) -> None:
    Path("taken").mkdir()
    Path("taken/mine").write_bytes(b"mine")
    Path("taken.safetensors").write_bytes(b"mine")
    Path("empty").mkdir()
    before = tiny.tree(work)
    names = {"SRC": str(sources / "folder"), "OWN": str(sources / "own.safetensors")}
    given = [names.get(a, a.replace("SRC", names["SRC"])) for a in arguments]
    result = tiny.run("convert", *given)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert tiny.tree(work) == before


def test_a_codec_of_pixels_has_nothing_to_convert(work: Path) -> None:
    from sfumato.checkpoints.io import write_model

    stage = CodecSystem.create(CodecConfig(kind="pixels", size=8))
    write_model("pixels.safetensors", {}, stage.config.model_dump(mode="json"))
    result = tiny.run("convert", "pixels.safetensors", "new", "--to", "diffusers", "--dtype", "float16")
    assert result.code == 2 and "nothing to write" in result.err and not Path("new").exists()


def test_an_empty_folder_may_be_filled(sources: Path, work: Path) -> None:
    Path("empty").mkdir()
    tiny.succeed("convert", sources / "folder", "empty", "--to", "diffusers")
    assert Path("empty/model_index.json").is_file()
