"""A model in memory as a file or a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sfumato.errors import UserError
from sfumato.systems import open_system
from sfumato.systems.convert import FILE, FOLDER, OWN, convert, save
from sfumato.systems.latent import Latent

from .. import stable, tiny
from .test_fingerprint import Own, plain

PLACES = {OWN: "m.safetensors", FILE: "n.safetensors", FOLDER: "folder"}


def test_own_files_can_be_converted_to(tmp_path: Path) -> None:
    stable.write(tmp_path / "file.safetensors")
    done = convert(tmp_path / "file.safetensors", tmp_path / "own.safetensors", to=OWN, dtype="float16")
    found = open_system(tmp_path / "own.safetensors", dtype=None)
    tensors = found.system.tensors()
    assert done.used == len(tensors) and found.file is None
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = open_system(tmp_path / "file.safetensors", dtype=torch.float16).system
    assert found.system.config == expected.config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors().items())


@pytest.mark.parametrize("to", PLACES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_comes_back_as_it_was_in_memory(tmp_path: Path, to: str, dtype: str | None) -> None:
    model = stable.model()
    with torch.no_grad():
        for network in model.networks().values():
            for parameter in network.parameters():
                parameter.add_(0.01)
    model.denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    done = save(model, tmp_path / PLACES[to], to=to, dtype=dtype)
    found = open_system(tmp_path / PLACES[to], dtype=None).system
    assert done.used == len(before) and done.notes == () and done.dropped == {}
    wanted = torch.float32 if dtype is None else torch.bfloat16
    assert isinstance(found, Latent) and found.config == model.config
    tensors = found.tensors()
    assert all(torch.equal(tensors[name], tensor.to(wanted)) for name, tensor in before.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_a_file_is_overwritten_on_demand_and_a_folder_never(tmp_path: Path) -> None:
    first, second = stable.model(seed=0), stable.model(seed=1)
    target, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    save(first, target)
    save(first, folder, to=FOLDER)
    before = tiny.tree(tmp_path)
    for place, to, overwrite in ((target, OWN, False), (target, FILE, False), (folder, FOLDER, True)):
        with pytest.raises(UserError, match=f"{place.name} exists already; choose another name"):
            save(second, place, to=to, overwrite=overwrite)
    assert tiny.tree(tmp_path) == before
    mapped = open_system(target, dtype=None).system
    assert isinstance(mapped, Latent)
    save(mapped, target, dtype="float16", overwrite=True)  # whose weights are mapped from that very file
    found = open_system(target, dtype=None).system.tensors()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in first.tensors().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.safetensors"]


def test_what_cannot_be_saved_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = stable.model()
    for name, options, message in (
        ("a.ckpt", {}, "the model is written as safetensors, so its name must end in .safetensors"),
        ("a.safetensors", {"to": "onw"}, "unknown layout 'onw'"),
        ("a.safetensors", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("a.safetensors", {"to": FOLDER}, "this layout is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            save(model, tmp_path / name, **options)
    network = model.denoiser.network
    model.denoiser.network = nn.Sequential(network)
    with pytest.raises(UserError, match="the network of it is a Sequential, and its config says UNet2DConditionModel"):
        save(model, tmp_path / "a.safetensors", what="it")
    model.denoiser.network = network
    network.set_attn_processor(Own())  # type: ignore[operator]
    with pytest.raises(UserError, match="processor.more.weight is not part of the model"):
        save(model, tmp_path / "a.safetensors")
    small = open_system(tiny.write_tiny_model(tmp_path / "tiny.safetensors")).system
    with pytest.raises(UserError, match="holds a ddpm model; single files are of Stable Diffusion only"):
        save(small, tmp_path / "a.safetensors", to=FILE)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_what_is_not_saved_is_noted(tmp_path: Path) -> None:
    model = stable.model()
    model.denoiser.network.set_attn_processor(plain)  # type: ignore[operator]
    model.denoiser.network.conv_in.bias.data.fill_(1e6)  # type: ignore[union-attr, operator]
    done = save(model, tmp_path / "m.safetensors", dtype="float16")
    assert done.notes == (
        "network.conv_in.bias holds values that are not finite as float16",
        "the attention processors that are not the library's own (plain) are code, and are not saved",
    )
    assert "network.conv_in.bias" in load_file(tmp_path / "m.safetensors")
