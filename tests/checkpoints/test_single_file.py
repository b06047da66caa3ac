"""Single files: opened with an account of every tensor, read part by part, written back bit for bit."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.checkpoints.formats import single_file
from sfumato.checkpoints.formats.families import FAMILIES, PARTS_KEY, Family
from sfumato.checkpoints.formats.single_file import AVERAGED, IGNORED, LAST_STEP, SingleFile, meta_tensors, write
from sfumato.checkpoints.tensors import TensorFile, write_tensors
from sfumato.errors import ModelFileError, UserError

from .compvis_names import on_meta, random_parts, tiny_family, whole_file

Parts = Mapping[str, Mapping[str, Tensor]]
UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def written(tmp_path: Path, name: str = "sd1", file: str = "m.safetensors") -> tuple[Path, Family, Parts]:
    family = tiny_family(name)
    parts = random_parts(family)
    write(tmp_path / file, family, parts)
    return tmp_path / file, family, parts


def rewritten(path: Path, change: Mapping[str, Tensor | None], metadata: dict[str, str] | None = None) -> Path:
    """The file with tensors added, or taken out where the value is None, and with other metadata."""
    tensors = {**load_file(path), **change}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kept = header["__metadata__"] if metadata is None else metadata
    target = path.with_name("changed.safetensors")
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, target, metadata=kept)
    return target


# --- there and back


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    path, family, parts = written(tmp_path, name)
    file = SingleFile.open(path)
    assert file.family == family and file.parts == ("unet", "vae", "text") and file.dropped == () and file.notes == ()
    assert file.prediction == family.prediction and file.why == "the file's metadata"
    read = {part: file.read(part) for part in file.parts}
    assert all(same(read[part], parts[part]) for part in parts)
    again = write(tmp_path / "again.safetensors", family, read)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert again.dropped == () and set(again.names) == load_file(path).keys()


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_their_file_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """From a file as it is published, with what it holds besides, to ours and back: each tensor used is the same."""
    path, family, _ = written(tmp_path, name)
    theirs = {n: t.half() for n, t in load_file(path).items()}
    more = {"betas": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    more["first_stage_model.loss.logvar"] = torch.ones(1)
    if name == "sd1":
        more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    else:
        more |= {"cond_stage_model.model.logit_scale": torch.tensor(1.0)}
        more |= {"cond_stage_model.model.transformer.resblocks.2.ln_1.bias": torch.ones(3)}
    save_file({**theirs, **more}, tmp_path / "theirs.ckpt")
    file = SingleFile.open(tmp_path / "theirs.ckpt", family=family)
    assert set(file.dropped) == more.keys() and len(file.coverage.matched) == len(theirs)
    assert all(reason in file.coverage.describe() for reason in file.coverage.ignored)
    back = write(tmp_path / "back.safetensors", family, {part: file.read(part) for part in file.parts})
    assert same(load_file(tmp_path / "back.safetensors"), theirs) and back.dropped == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    path, family, parts = written(tmp_path, "sd2-base")
    for part in parts:
        cast = {name: tensor.to(dtype) for name, tensor in parts[part].items()}
        assert same(SingleFile.open(path).read(part, dtype), cast)
    write(tmp_path / "cast.safetensors", family, parts, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "cast.safetensors").values()} == {dtype}


@pytest.mark.parametrize("name", FAMILIES)
def test_published_sizes_are_accounted_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the published size whose tensors are never looked at."""
    outline = whole_file(name)
    monkeypatch.setattr(single_file.pickles, "open_tensors", lambda path, allow_pickle: (Seen(outline), ()))
    file = SingleFile.open(tmp_path / "m", prediction=FAMILIES[name].prediction)
    assert file.family == FAMILIES[name]
    spare = 5 + 2 + (14 if FAMILIES[name].open_clip else 1)
    assert len(file.dropped) == spare and len(file.coverage.matched) == len(outline) - spare


class Seen:
    """A file of which there is only a header."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen, self.metadata = seen, dict[str, str]()

    def number(self, name: str) -> None:
        return None


# --- variants of the layout


@pytest.fixture
def one(tmp_path: Path) -> tuple[Path, Family, Parts]:
    return written(tmp_path)


def test_names_in_a_wrapper(one: tuple[Path, Family, Parts], tmp_path: Path) -> None:
    path, family, parts = one
    wrapped = {f"state_dict.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**wrapped, "global_step": torch.tensor(5)}, tmp_path / "w")
    file = SingleFile.open(tmp_path / "w", family=family)
    assert same(file.read("unet"), parts["unet"]) and file.dropped == ("global_step",)


def test_a_text_tower_without_its_prefix(one: tuple[Path, Family, Parts], tmp_path: Path) -> None:
    path, family, parts = one
    flat = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(path).items()}
    save_file(flat, tmp_path / "flat")
    assert same(SingleFile.open(tmp_path / "flat", family=family).read("text"), parts["text"])


@pytest.mark.parametrize(("old", "new"), [(UNET, "diffusion_model."), (UNET, ""), ("first_stage_model.", "vae.")])
def test_other_prefixes(one: tuple[Path, Family, Parts], tmp_path: Path, old: str, new: str) -> None:
    path, family, parts = one
    moved = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in load_file(path).items()}
    save_file(moved, tmp_path / "moved")
    file = SingleFile.open(tmp_path / "moved", family=family)
    assert all(same(file.read(part), parts[part]) for part in parts)


def test_parts_may_be_missing(one: tuple[Path, Family, Parts], tmp_path: Path) -> None:
    path, family, parts = one
    save_file({n: t for n, t in load_file(path).items() if n.startswith(UNET)}, tmp_path / "unet")
    file = SingleFile.open(tmp_path / "unet", family=family)
    assert file.parts == ("unet",) and same(file.read("unet"), parts["unet"])
    with pytest.raises(ModelFileError, match="holds no text, only unet"):
        file.read("text")


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def of_old(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder as diffusers saved it before its version 0.15."""
    renamed = {}
    for name, tensor in vae.items():
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["compvis", "first_stage_model.", "diffusers", "diffusers-old"])
def test_an_autoencoder_alone(tmp_path: Path, layout: str) -> None:
    family = replace(tiny_family(), vae=replace(FAMILIES["sd1"].vae, block_out_channels=(32, 32, 64, 64)))
    parts = random_parts(family)
    write(tmp_path / "m", family, parts)
    prefix = "first_stage_model."
    theirs = {n.removeprefix(prefix): t for n, t in load_file(tmp_path / "m").items() if n.startswith(prefix)}
    if layout == "first_stage_model.":
        theirs = {prefix + name: tensor for name, tensor in theirs.items()}
    if layout.startswith("diffusers"):
        theirs = dict(parts["vae"]) if layout == "diffusers" else of_old(parts["vae"])
    save_file(theirs, tmp_path / "vae")
    file = SingleFile.open(tmp_path / "vae")
    assert file.family is None and file.prediction == "unknown" and file.parts == ("vae",)
    assert file.vae == family.vae and same(file.read("vae"), parts["vae"])


def test_a_scale_of_latents_in_the_file_counts(one: tuple[Path, Family, Parts]) -> None:
    file = SingleFile.open(rewritten(one[0], {"scale_factor": torch.tensor(0.25)}))
    assert file.family is not None and file.vae == file.family.vae and file.vae.scaling_factor == 0.25
    assert file.dropped == ("scale_factor",)


def test_steps_in_the_file_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(whole_file("sd2-base") | on_meta({"global_step": ()}))
    monkeypatch.setattr(seen, "number", lambda name: 875000.0 if name == "global_step" else None)
    monkeypatch.setattr(single_file.pickles, "open_tensors", lambda path, allow_pickle: (seen, ()))
    file = SingleFile.open(tmp_path / "m")
    assert (file.prediction, file.why) == ("eps", "global_step")


def test_what_the_user_says_counts_more(one: tuple[Path, Family, Parts]) -> None:
    file = SingleFile.open(one[0], prediction="v")
    assert file.prediction == "v" and file.family is not None and file.why == "it was said"
    assert file.family.scheduler["prediction_type"] == "v_prediction"
    both = SingleFile.open(one[0], family=tiny_family("sd1"), prediction="v")
    assert both.family == file.family and SingleFile.open(one[0], family=tiny_family("sd1")).why == "it was said"


# --- the running average


def with_average(path: Path) -> dict[str, Tensor]:
    raw = {name: tensor for name, tensor in load_file(path).items() if name.startswith(UNET)}
    return {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1 for name, tensor in raw.items()}


def test_the_running_average(one: tuple[Path, Family, Parts]) -> None:
    path, _, parts = one
    averages = with_average(path)
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    changed = rewritten(path, {**averages, "model_ema.decay": torch.tensor(0.5)})
    last, mean = SingleFile.open(changed), SingleFile.open(changed, averaged=True)
    assert same(last.read("unet"), parts["unet"])
    assert same(mean.read("unet"), {name: tensor + 1 for name, tensor in parts["unet"].items()})
    assert same(mean.read("text"), parts["text"]) and same(mean.read("vae"), parts["vae"])
    assert len(last.coverage.ignored[AVERAGED]) == len(averages) + 1
    assert mean.coverage.ignored[AVERAGED] == ("model_ema.decay",)
    assert set(mean.coverage.ignored[LAST_STEP]) == {n for n in load_file(path) if n.startswith(UNET)}


def test_a_running_average_that_is_not_there(one: tuple[Path, Family, Parts]) -> None:
    path, *_ = one
    with pytest.raises(UserError, match="no running average"):
        SingleFile.open(path, averaged=True)
    averages = with_average(path)
    del averages["model_ema.diffusion_modelout2weight"]
    changed = rewritten(path, averages)
    with pytest.raises(ModelFileError, match="lacks the running average of model.diffusion_model.out.2.weight"):
        SingleFile.open(changed, averaged=True)


# --- refusals


def test_a_missing_tensor_and_its_nearest(one: tuple[Path, Family, Parts]) -> None:
    name = f"{UNET}middle_block.1.proj_in.weight"
    changed = rewritten(one[0], {name: None, name + "s": torch.ones(1)})
    with pytest.raises(ModelFileError, match=r"proj_in\.weight is missing \(did you mean '.*proj_in\.weights'"):
        SingleFile.open(changed)


def test_a_tensor_that_nothing_accounts_for(one: tuple[Path, Family, Parts]) -> None:
    with pytest.raises(ModelFileError, match=r"changed\.safetensors does not fit: secret\.sauce is not known$"):
        SingleFile.open(rewritten(one[0], {"secret.sauce": torch.ones(1)}))


def test_a_shape_that_does_not_fit(one: tuple[Path, Family, Parts]) -> None:
    changed = rewritten(one[0], {"first_stage_model.quant_conv.bias": torch.ones(3)})
    with pytest.raises(ModelFileError, match=r"first_stage_model\.quant_conv\.bias has shape \(3,\), expected \(8,\)"):
        SingleFile.open(changed)


def test_a_model_of_another_size(one: tuple[Path, Family, Parts]) -> None:
    """The layout of Stable Diffusion 1 with another width, and nothing that says so."""
    changed = rewritten(one[0], {}, metadata={})
    with pytest.raises(ModelFileError, match="cannot be opened: the file holds a network with 4 input channels and a"):
        SingleFile.open(changed)
    with pytest.raises(ModelFileError, match="has shape .* expected .* and 3\\d\\d more|is missing"):
        SingleFile.open(changed, family=FAMILIES["sd1"])


@pytest.mark.parametrize("keep", [9, 100, 5000, -1])
def test_a_truncated_file(one: tuple[Path, Family, Parts], keep: int) -> None:
    data = one[0].read_bytes()
    one[0].write_bytes(data[:keep])
    with pytest.raises(ModelFileError, match="damaged") as error:
        SingleFile.open(one[0])
    assert "\n" not in str(error.value)


def test_a_file_may_lack_its_first_stage(tmp_path: Path) -> None:
    family = tiny_family()
    parts = {part: tensors for part, tensors in random_parts(family).items() if part != "vae"}
    write(tmp_path / "m", family, parts, missing=("vae",))
    file = SingleFile.open(tmp_path / "m")
    assert file.parts == ("unet", "text") and file.family == family
    read = file.read("unet")
    assert all(torch.equal(read[name], tensor) for name, tensor in parts["unet"].items())


def test_what_training_left_behind_is_left_aside(tmp_path: Path) -> None:
    family = tiny_family()
    write(tmp_path / "m", family, random_parts(family))
    name, tensors = "embedding_manager.initial_embeddings.*", load_file(tmp_path / "m")
    metadata = TensorFile.open(tmp_path / "m").metadata
    save_file(tensors | {name: torch.zeros(1, 8)}, tmp_path / "n", metadata=metadata)
    assert SingleFile.open(tmp_path / "n").dropped == (name,)
    save_file(tensors | {"embedding_boss.x": torch.zeros(1, 8)}, tmp_path / "n", metadata=metadata)
    with pytest.raises(ModelFileError, match="embedding_boss.x"):
        SingleFile.open(tmp_path / "n")


def test_writing_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    family = tiny_family()
    parts = random_parts(family)
    with pytest.raises(UserError, match="text is missing"):
        write(tmp_path / "m", family, {part: parts[part] for part in ("unet", "vae")})
    with pytest.raises(UserError, match="vae is missing"):
        write(tmp_path / "m", family, {part: parts[part] for part in ("unet", "text")}, missing=("text",))
    with pytest.raises(UserError, match="the vae of Stable Diffusion 1 does not fit: more is not known"):
        write(tmp_path / "m", family, {**parts, "vae": {**parts["vae"], "more": torch.ones(1)}})
    with pytest.raises(UserError, match="has no place in the layout"):
        write(tmp_path / "m", replace(family, unet=replace(family.unet, time_cond_proj_dim=8)), without_check(family))
    assert list(tmp_path.iterdir()) == []


def without_check(family: Family) -> Parts:
    """Weights that fit a network with a projection of the guidance, which the layout has no place for."""
    return random_parts(replace(family, unet=replace(family.unet, time_cond_proj_dim=8)))


def test_what_the_layout_has_no_place_for_is_listed(tmp_path: Path) -> None:
    family = tiny_family()
    parts = random_parts(family)
    flat = {name.removeprefix("text_model."): tensor for name, tensor in parts["text"].items()}
    text = {**flat, "embeddings.position_ids": torch.arange(9)[None]}
    done = write(tmp_path / "m", family, {**parts, "text": text})
    assert done.dropped == ("text.text_model.embeddings.position_ids",)
    assert same(SingleFile.open(tmp_path / "m").read("text"), parts["text"])


# --- metadata


def test_what_other_programs_read_of_it(tmp_path: Path) -> None:
    path, family, _ = written(tmp_path, "sd2-v")
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.prediction_type"] == "v" and PARTS_KEY in metadata
    names = load_file(path)
    assert names["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (48, 16)
    assert names["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert names["model.diffusion_model.input_blocks.1.1.proj_in.weight"].shape == (32, 32)


def test_the_published_list_gives_reasons() -> None:
    assert len({one.reason for one in IGNORED}) == len(IGNORED) and all(" " in one.reason for one in IGNORED)


def test_meta_tensors_cost_no_memory() -> None:
    tensors = meta_tensors(FAMILIES["sd1"].vae)
    assert all(tensor.is_meta for tensor in tensors.values())


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", {"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, {})
    with pytest.raises(ModelFileError, match="m cannot be opened: the file holds a Flux model"):
        SingleFile.open(tmp_path / "m")
