"""Stable Diffusion as folders in diffusers' layout: opened by their own files alone, whatever form the weights have."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.checkpoints.formats.diffusers import read_component
from sfumato.checkpoints.formats.families import DDPM_X4, END_MARK
from sfumato.checkpoints.tensors import TensorFile
from sfumato.conditioners.vocabulary import END, START, tables
from sfumato.errors import ModelFileError, UserError
from sfumato.systems import Opened, open_system
from sfumato.systems.convert import NO_PLACE, REPLACED, convert
from sfumato.systems.exchange import CONDITIONER, OWN, save_folder
from sfumato.systems.exchange_text import pad_of, write_tokenizer
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import config_of, write_single_file

from ..checkpoints.test_pickles import PAYLOADS, zipped
from ..parity.stable_cases import NAMES, case, latent
from .test_exchange import change

CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd2-base": "StableDiffusionPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sd-x4-upscaler": "StableDiffusionUpscalePipeline",
}
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)


def model_of(name: str) -> Latent:
    one = case(name)
    return latent(one.family, one.parts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder as diffusers has it, without what only we know; not to be changed."""
    place = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        if not (place / name).exists():
            save_folder(model_of(name), place / name)
            (place / name / OWN).unlink()
        return place / name

    return folder


@pytest.fixture
def sd1(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of Stable Diffusion 1 that may be changed."""
    return Path(shutil.copytree(folders("sd1"), tmp_path / "sd1"))


@pytest.fixture
def sd2(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders("sd2-v"), tmp_path / "sd2"))


def same(found: Any, model: Latent) -> bool:
    """Equal configs, names, types and bits."""
    tensors = found.tensors()
    return (
        found.config == model.config
        and tensors.keys() == model.tensors().keys()
        and all(tensors[n].dtype == t.dtype and torch.equal(tensors[n], t) for n, t in model.tensors().items())
    )


# --- whole folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_its_model_with_and_without_our_own_file(tmp_path: Path, name: str) -> None:
    model, folder = model_of(name), tmp_path / "model"
    save_folder(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == CLASSES[name] and not (folder / CONDITIONER).exists()
    with_own = open_system(folder)
    assert same(with_own.system, model) and with_own.notes == ()
    (folder / OWN).unlink()
    found = open_system(folder)
    assert same(found.system, model) and found.sha256 == with_own.sha256
    said = f"{case(name).family.title}; predicts {case(name).family.prediction} (its scheduler says so)"
    assert found.notes == (said,)


@pytest.mark.parametrize("name", NAMES)
def test_folder_to_file_to_folder_keeps_every_bit(
    tmp_path: Path, folders: Callable[[str], Path], name: str
) -> None:
    first, file, second = folders(name), tmp_path / "m.safetensors", tmp_path / "second"
    there = convert(first, file, to="single-file")
    back = convert(file, second, to="diffusers")
    assert not there.dropped and not back.dropped
    model = model_of(name)
    assert there.used == len(model.tensors()) and back.used == len(load_file(file))
    assert same(open_system(file).system, model) and same(open_system(second).system, model)
    paths = {p.relative_to(first) for p in first.rglob("*") if p.is_file()}
    assert paths | {Path(OWN)} == {p.relative_to(second) for p in second.rglob("*") if p.is_file()}
    for path in paths:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_file_to_folder_to_file_keeps_every_byte(tmp_path: Path, name: str) -> None:
    write_single_file(model_of(name), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", to="diffusers")
    convert(tmp_path / "folder", tmp_path / "b.safetensors", to="single-file")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_types_are_kept_unless_another_is_asked_for(tmp_path: Path, sd1: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(sd1 / UNET).items()}
    save_file(halves, sd1 / UNET)
    done = convert(sd1, tmp_path / "m.safetensors", to="single-file")
    stored = TensorFile.open(tmp_path / "m.safetensors").seen
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in stored.items()}
    assert kinds == {
        "model": torch.float16, "first_stage_model": torch.float32, "cond_stage_model": torch.float32
    }  # fmt: skip
    assert not done.dropped
    convert(tmp_path / "m.safetensors", tmp_path / "back", to="diffusers")
    found = load_file(tmp_path / "back" / UNET)
    assert all(torch.equal(found[name], tensor) for name, tensor in halves.items())
    for dtype in ("bfloat16", "float16"):
        convert(sd1, tmp_path / dtype, to="diffusers", dtype=dtype)
        for file in (UNET, TEXT):
            seen = TensorFile.open(tmp_path / dtype / file).seen
            assert {str(tensor.dtype) for tensor in seen.values()} == {f"torch.{dtype}"}
        config = json.loads((tmp_path / dtype / "text_encoder/config.json").read_text())
        assert config["torch_dtype"] == dtype
    opened = open_system(tmp_path / "float16", dtype=None).system
    assert isinstance(opened, Latent)
    assert torch.equal(opened.denoiser.network.state_dict()["conv_in.weight"], halves["conv_in.weight"])
    in_float = open_system(tmp_path / "float16").system
    assert {tensor.dtype for tensor in in_float.tensors().values()} == {torch.float32}


def test_what_a_type_cannot_hold_is_told(tmp_path: Path, sd1: Path) -> None:
    tensors = load_file(sd1 / UNET)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, sd1 / UNET)
    notes = convert(sd1, tmp_path / "half", to="diffusers", dtype="float16").notes
    assert any("network.conv_in.bias holds values that are not finite as float16" in note for note in notes)
    notes = convert(sd1, tmp_path / "brain", to="diffusers", dtype="bfloat16").notes
    assert not any("finite" in note for note in notes)


def test_every_tensor_is_read_once(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, counts = TensorFile.begin, dict[str, int]()

    def counted(self: TensorFile, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
        key = f"{self.path.parent.name}/{name}"
        counts[key] = counts.get(key, 0) + 1
        return begin(self, name, dtype)

    monkeypatch.setattr(TensorFile, "begin", counted)
    model = open_system(sd1, dtype=torch.bfloat16).system
    assert len(counts) == len(model.tensors()) and set(counts.values()) == {1}


def test_nothing_is_read_of_a_folder_that_does_not_fit(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(sd1 / TEXT)
    del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, sd1 / TEXT)
    for how in ("read", "begin"):
        monkeypatch.setattr(TensorFile, how, lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ModelFileError, match="text_model.final_layer_norm.bias is missing"):
        open_system(sd1)


# --- what the network predicts, and the scheduler ---------------------------------------------------------------------


def predicts(opened: Opened) -> str:
    assert isinstance(opened.system, Latent)
    return opened.system.denoiser.parameterization.name


def test_what_is_said_overrules_the_scheduler(sd2: Path, tmp_path: Path) -> None:
    assert predicts(open_system(sd2)) == "v"
    said = open_system(sd2, prediction="eps")
    assert predicts(said) == "eps" and said.notes[-1].endswith("predicts eps (it was said)")
    save_folder(model_of("sd2-v"), tmp_path / "own")
    own = open_system(tmp_path / "own", prediction="eps")
    assert predicts(own) == "eps" and isinstance(own.system, Latent)
    assert own.system.config.prediction.parameterization == "eps"
    convert(sd2, tmp_path / "m.safetensors", to="single-file", prediction="eps")
    assert predicts(open_system(tmp_path / "m.safetensors")) == "eps"
    change(sd2 / "scheduler/scheduler_config.json", prediction_type="sample")
    assert predicts(open_system(sd2, prediction="v")) == "v"
    with pytest.raises(UserError, match="predicts eps or v, and this says x0"):
        open_system(sd2)
    with pytest.raises(UserError, match="nothing that it predicts"):
        open_system(sd2 / "vae", prediction="eps")


def test_a_scheduler_is_taken_as_the_pipeline_takes_it(sd1: Path) -> None:
    scheduler = sd1 / "scheduler/scheduler_config.json"
    whole = open_system(sd1).system.config
    change(scheduler, steps_offset=0)
    found = open_system(sd1)
    assert found.system.config == whole
    assert found.notes[0] == "steps_offset of the folder's scheduler is taken as 1, as a StableDiffusionPipeline does"
    change(scheduler, timestep_spacing="trailing", _class_name="DDIMScheduler", clip_sample=True)
    assert [note for note in open_system(sd1).notes if "scheduler is taken" in note] == [
        "clip_sample of the folder's scheduler is taken as False, as a StableDiffusionPipeline does"
    ]


def test_the_small_pictures_noise_must_be_the_models_own(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sd-x4-upscaler"), tmp_path / "x4"))
    low = folder / "low_res_scheduler/scheduler_config.json"
    assert json.loads(low.read_text()) == DDPM_X4 | {"rescale_betas_zero_snr": False}
    change(low, beta_end=0.012)
    with pytest.raises(UserError, match="another noise schedule than the model's own"):
        open_system(folder)


def test_a_first_release_means_64_where_it_says_32(sd1: Path) -> None:
    change(sd1 / "unet/config.json", sample_size=32, _diffusers_version="0.6.0")
    assert open_system(sd1).system.config.size == 512
    change(sd1 / "unet/config.json", _diffusers_version="0.9.0.dev0")
    assert open_system(sd1).system.config.size == 256
    change(sd1 / "unet/config.json", sample_size=[32, 32])
    assert open_system(sd1).system.config.size == 256
    change(sd1 / "unet/config.json", sample_size=None)
    assert open_system(sd1).system.config.size == 512


def test_what_is_no_part_of_the_model_is_left_aside_with_a_note(sd1: Path, sd2: Path) -> None:
    model = open_system(sd1).system
    change(
        sd1 / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    found = open_system(sd1)
    assert same(found.system, model)  # type: ignore[arg-type]
    assert found.notes[:-1] == (
        f"the safety checker of {sd1} is left aside: nothing here looks at what is drawn",
    )
    change(sd2 / "model_index.json", depth_estimator=["transformers", "DPTForDepthEstimation"])
    assert "estimator of depths" in open_system(sd2).notes[0]


# --- the forms of weights ---------------------------------------------------------------------------------------------


def split(folder: Path, index: str, name: str) -> dict[str, dict[str, Tensor]]:
    """Replace whole weights by three shards and their index; `name` has a place for the number."""
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    shards: dict[str, dict[str, Tensor]] = {name.format(n): {} for n in (1, 2, 3)}
    for place, key in enumerate(sorted(tensors)):
        shards[name.format(place % 3 + 1)][key] = tensors[key]
    for file, own in shards.items():
        save_file(own, folder / file)
    table = {key: file for file, own in shards.items() for key in own}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return shards


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ("{}.safetensors.index.json", "{}-0000%-of-00003.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}-0000%-of-00003.fp16.safetensors"),
        ("{}.fp16.safetensors.index.json", "{}.fp16-0000%-of-00003.safetensors"),
    ],
)
def test_shards(sd1: Path, index: str, name: str) -> None:
    model, stem = open_system(sd1).system, "diffusion_pytorch_model"
    split(sd1 / "unet", index.format(stem), name.format(stem).replace("%", "{}"))
    split(sd1 / "text_encoder", "model.safetensors.index.json", "model-0000{}-of-00003.safetensors")
    found = open_system(sd1)
    assert same(found.system, model)  # type: ignore[arg-type]
    assert ("fp16" in index) == any("its variant fp16 is read" in note for note in found.notes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda unet, index: (unet / "b-2.safetensors").unlink(), "unet lacks b-2.safetensors, which .* lists"),
        (lambda unet, index: shutil.copy(unet / "b-1.safetensors", unet / "b-2.safetensors"), "b-2.safetensors lacks "),
        (lambda unet, index: change(index, weight_map={"conv_in.bias": "b-1.safetensors"}), "does not list there"),
        (lambda unet, index: change(index, weight_map={"a": "../vae/x.safetensors"}), "points outside its folder"),
        (lambda unet, index: change(index, weight_map={"a": "/etc/passwd"}), "points outside its folder"),
        (lambda unet, index: change(index, weight_map={"a": ".."}), "points outside its folder|lacks"),
        (lambda unet, index: change(index, weight_map={"a": "..\\x"}), "points outside its folder"),
        (lambda unet, index: change(index, weight_map={"a": "x\n"}), "points outside its folder"),
        (lambda unet, index: change(index, weight_map={"a": 1}), "no weight_map"),
        (lambda unet, index: change(index, weight_map=[]), "no weight_map"),
        (lambda unet, index: index.write_text("{"), "not readable JSON"),
        (lambda unet, index: (unet / "b-3.safetensors").write_bytes(b"\x10"), "b-3.safetensors is not a safetensors"),
        (
            lambda unet, index: torch.save({"a": torch.ones(1)}, unet / "b-3.safetensors"),
            "b-3.safetensors is a pickle checkpoint",
        ),
    ],
)
def test_damaged_shards_are_refused(sd1: Path, damage: Callable[[Path, Path], Any], message: str) -> None:
    index = "diffusion_pytorch_model.safetensors.index.json"
    split(sd1 / "unet", index, "b-{}.safetensors")
    damage(sd1 / "unet", sd1 / "unet" / index)
    with pytest.raises(ModelFileError, match=message):
        open_system(sd1)


def test_the_plain_weights_come_before_variants_and_these_in_order(sd1: Path) -> None:
    whole = load_file(sd1 / UNET)
    plain = sd1 / UNET

    def bias() -> float:
        model = open_system(sd1).system
        return float(model.tensors()["network.conv_in.bias"][0])

    for number, variant in enumerate(("non_ema", "zz", "bf16", "fp16")):
        changed = whole | {"conv_in.bias": torch.full_like(whole["conv_in.bias"], number)}
        save_file(changed, plain.with_suffix(f".{variant}.safetensors"))
    assert bias() == float(whole["conv_in.bias"][0])
    plain.unlink()
    for variant, number in (("fp16", 3), ("bf16", 2), ("non_ema", 0), ("zz", 1)):
        assert bias() == number
        assert f"{sd1 / 'unet'} has no plain weights; its variant {variant} is read" in open_system(sd1).notes
        plain.with_suffix(f".{variant}.safetensors").unlink()
    with pytest.raises(ModelFileError, match="unet holds no safetensors weights"):
        open_system(sd1)


def pickled(folder: Path, file: str) -> None:
    (whole,) = folder.glob("*.safetensors")
    torch.save(load_file(whole), folder / file)
    whole.unlink()


def test_pickles_are_opened_where_that_is_allowed(sd1: Path) -> None:
    model = open_system(sd1).system
    pickled(sd1 / "unet", "diffusion_pytorch_model.bin")
    pickled(sd1 / "text_encoder", "pytorch_model.fp16.bin")
    with pytest.raises(ModelFileError, match="diffusion_pytorch_model.bin is a pickle and is not opened without"):
        open_system(sd1)
    found = open_system(sd1, allow_pickle=True)
    assert same(found.system, model)  # type: ignore[arg-type]
    assert sum("is a pickle and has been converted" in note for note in found.notes) == 2
    torch.save({"conv_in.weight": torch.nn.Linear}, sd1 / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelFileError, match="is refused"):
        open_system(sd1, allow_pickle=True)


PLACES = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.safetensors", "shard")


def place_payload(folder: Path, place: str, data: bytes) -> None:
    """A component whose weights are a pickle, by a name of its own or by another's."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    if place == "shard":
        index = {"weight_map": {"a": "shard"}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / place).write_bytes(data)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore")
def test_no_payload_is_even_read_without_permission(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "c"
    for name, payload in PAYLOADS.items():
        for data in (payload(str(canary)), zipped(payload(str(canary)))):
            place_payload(tmp_path / "unet", place, data)
            with pytest.raises(ModelFileError, match="is a pickle|is not a safetensors file"):
                read_component(tmp_path / "unet")
            assert not canary.exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs_with_permission(tmp_path: Path, name: str, place: str) -> None:
    canary = tmp_path / "c"
    place_payload(tmp_path / "unet", place, zipped(PAYLOADS[name](str(canary))))
    with pytest.raises(ModelFileError):
        read_component(tmp_path / "unet", allow_pickle=True)
    assert not canary.exists()


def test_safetensors_come_before_a_pickle_that_is_allowed(sd1: Path) -> None:
    (sd1 / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04nothing")
    (sd1 / UNET).rename((sd1 / UNET).with_suffix(".fp16.safetensors"))
    assert isinstance(open_system(sd1, allow_pickle=True).system, Latent)


def test_the_hash_follows_all_weights(sd1: Path) -> None:
    before = open_system(sd1).sha256
    for file in (UNET, "vae/diffusion_pytorch_model.safetensors", TEXT):
        tensors = load_file(sd1 / file)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, sd1 / file)
        after = open_system(sd1).sha256
        assert after != before
        before = after


# --- the text tower ---------------------------------------------------------------------------------------------------

OLD_KEYS: dict[str, Any] = {
    "_name_or_path": "openai/clip", "add_cross_attention": False, "bad_words_ids": None, "bos_token_id": 0,
    "chunk_size_feed_forward": 0, "eos_token_id": 2, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "output_attentions": False, "output_hidden_states": False, "pad_token_id": 1, "pruned_heads": {},
    "return_dict": True, "temperature": 1.0, "tie_word_embeddings": True, "torch_dtype": "float16",
    "torchscript": False, "transformers_version": "4.22.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def test_names_without_prefix_and_all_that_towers_hold_besides(sd1: Path) -> None:
    model = open_system(sd1).system
    tensors = load_file(sd1 / TEXT)
    old = tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(old, sd1 / TEXT)
    change(sd1 / "text_encoder/config.json", **OLD_KEYS)
    found = open_system(sd1)
    assert same(found.system, model) and "text_model.embeddings.position_ids" in found.notes[0]  # type: ignore[arg-type]
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(flat | {"text_projection.weight": torch.ones(4, 32)}, sd1 / TEXT)
    change(sd1 / "text_encoder/config.json", architectures=["CLIPTextModelWithProjection"], projection_dim=768)
    found = open_system(sd1)
    assert same(found.system, model) and "text_projection.weight" in found.notes[0]  # type: ignore[arg-type]


def test_a_config_that_leaves_a_field_out_means_the_librarys_default(sd1: Path) -> None:
    path = sd1 / "text_encoder/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_attention_heads"}))
    model = open_system(sd1).system
    assert isinstance(model, Latent) and model.config.conditions["text"]["tower"]["num_attention_heads"] == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 49409}, "vocabulary has 49409 tokens"),
        ({"model_type": "xlm-roberta"}, "text_encoder holds a 'xlm-roberta'"),
        ({"architectures": ["RobertaSeriesModelWithTransformation"]}, "holds a 'RobertaSeriesModelWithTransformation'"),
        ({"hidden_act": "gelluu"}, "unknown hidden_act .* 'gelluu' .did you mean 'gelu'"),
        ({"hidden_act": ["gelu"]}, "unknown hidden_act"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number of 1 or more, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"layer_norm_eps": True}, "layer_norm_eps must be a number"),
        ({"hidden_size": 64}, "attends to states of width 32, and the text encoder gives 64"),
        ({"num_hidden_layers": 4}, "encoder.layers.3.*is missing"),
        ({"num_hidden_layers": 2}, "is not part of the model"),
    ],
)
def test_text_encoders_that_cannot_be_opened(sd1: Path, values: dict[str, Any], message: str) -> None:
    change(sd1 / "text_encoder/config.json", **values)
    with pytest.raises(UserError, match=message):
        open_system(sd1)


def pad(folder: Path) -> Any:
    model = open_system(folder).system
    assert isinstance(model, Latent)
    return model.config.conditions["text"]["pad"]


def test_windows_are_filled_as_the_tokenizer_says_or_else_the_activation(sd1: Path, sd2: Path) -> None:
    assert (pad(sd1), pad(sd2)) == (END_MARK, 0)
    write_whole_tokenizer(sd1 / "tokenizer", pad_token="!")
    assert pad(sd1) == 0
    write_whole_tokenizer(sd1 / "tokenizer", pad_token={"content": END})
    assert pad(sd1) == END_MARK
    for folder in (sd1, sd2):
        shutil.rmtree(folder / "tokenizer")
    assert (pad(sd1), pad(sd2)) == (END_MARK, 0)


def write_whole_tokenizer(folder: Path, **settings: Any) -> None:
    """A tokenizer as newer libraries write it, in one file."""
    shutil.rmtree(folder)
    folder.mkdir()
    vocabulary, merges = tables()
    added = [{"id": vocabulary[mark], "content": mark, "special": True} for mark in (START, END)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": START, "eos_token": END} | settings))


def test_which_file_has_the_last_word_on_padding(tmp_path: Path) -> None:
    """As in transformers: the older one, unless the newer one lists all tokens itself."""
    write_tokenizer(tmp_path, pad=0)
    change(tmp_path / "tokenizer_config.json", pad_token=END)
    assert pad_of(tmp_path) == 0
    listed = {"0": {"content": "!"}, "49406": {"content": START}, "49407": {"content": END}}
    change(tmp_path / "tokenizer_config.json", added_tokens_decoder=listed)
    assert pad_of(tmp_path) == END_MARK
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert pad_of(tmp_path) == END_MARK


def _vocabulary(**more: Any) -> str:
    return json.dumps({**tables()[0], **more})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", _vocabulary(sks=49408), "vocab.json adds 'sks' to CLIP's own vocabulary"),
        ("vocab.json", _vocabulary(sks=49408, zwx=49409), "adds 'sks' and 1 more"),
        ("vocab.json", _vocabulary(**{"horse</w>": 1}), "vocab.json is another vocabulary than CLIP's own"),
        ("vocab.json", "{}", "another vocabulary"),
        ("vocab.json", "[", "not readable JSON"),
        ("merges.txt", "#version: 0.2\ni n\n", "merges.txt has other merges"),
        ("merges.txt", "", "merges.txt has other merges"),
        ("added_tokens.json", '{"<cat-toy>": 49408}', "adds '<cat-toy>'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"49408": {"content": "<x>"}}}', "adds '<x>'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "!"}}}', "adds '!'"),
        ("tokenizer_config.json", '{"additional_special_tokens": ["<y>"]}', "adds '<y>'"),
        ("special_tokens_map.json", '{"additional_special_tokens": [{"content": "<y>"}]}', "adds '<y>'"),
        ("special_tokens_map.json", '{"pad_token": "?"}', "pad_token is '.'; windows can be filled with '!' or"),
        ("special_tokens_map.json", '{"pad_token": ["!"]}', "pad_token is "),
        ("special_tokens_map.json", '{"bos_token": "!"}', "bos_token is '!', where CLIP's own is"),
        ("special_tokens_map.json", '{"eos_token": {"content": "!"}}', "eos_token is '!'"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": []}}', "tokenizer.json is another vocabulary"),
        ("tokenizer.json", "{}", "tokenizer.json holds no table of tokens"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_tokenizer(tmp_path, pad=0)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelFileError, match=message):
        pad_of(tmp_path)


def test_missing_files_of_a_tokenizer(tmp_path: Path, sd1: Path) -> None:
    write_tokenizer(tmp_path / "t", pad=0)
    (tmp_path / "t/merges.txt").unlink()
    with pytest.raises(ModelFileError, match="merges.txt is missing"):
        pad_of(tmp_path / "t")
    (tmp_path / "t/vocab.json").unlink()
    with pytest.raises(ModelFileError, match="neither vocab.json with merges.txt nor tokenizer.json"):
        pad_of(tmp_path / "t")
    (sd1 / "tokenizer/vocab.json").write_text(_vocabulary(sks=49408))
    with pytest.raises(ModelFileError, match="models with added words are not supported"):
        open_system(sd1)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act of the text encoder is not what sfumato.json"),
        ("tokenizer/special_tokens_map.json", {"pad_token": "!"}, "pad_token of the text encoder is not what"),
        ("tokenizer/vocab.json", {"sks": 49408}, "adds 'sks'"),
        ("unet/config.json", {"upcast_attention": True}, "upcast_attention of the UNet2DConditionModel"),
    ],
)
def test_our_own_folder_must_agree_with_itself(
    tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    save_folder(model_of("sd1"), tmp_path / "own")
    change(tmp_path / "own" / file, **values)
    with pytest.raises(ModelFileError, match=message):
        open_system(tmp_path / "own")


# --- other folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pipeline",
    [
        "StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionControlNetPipeline",
        "StableUnCLIPImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline", "AltDiffusionPipeline",
        "LatentConsistencyModelPipeline", "StableDiffusionLatentUpscalePipeline",
    ],
)  # fmt: skip
def test_other_pipelines_are_named(sd1: Path, pipeline: str) -> None:
    change(sd1 / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelFileError, match=f"holds a {pipeline}; without sfumato.json only .* can be opened"):
        open_system(sd1)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"in_channels": 8}, "8 channels over 4 of latents"),
        ("unet/config.json", {"out_channels": 8}, "gives 8 channels, and the latents have 4"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unet holds a 'UNet2DModel', where a UNet2DConditionM"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is told more than a text"),
        ("unet/config.json", {"num_class_embeds": 5}, "a table of 5 classes"),
        ("unet/config.json", {"sample_size": [8, 16]}, "only models of square pictures"),
        ("unet/config.json", {"act_fnn": "silu"}, "unknown network key 'act_fnn' .did you mean 'act_fn'"),
        ("unet/config.json", {"layers_per_block": "two"}, "wrong type"),
        ("unet/config.json", {"layers_per_block": 2}, "is missing"),
        ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "vae holds a 'AsymmetricAutoencoderKL'"),
        ("vae/config.json", {"sample_size": [8, 16]}, "only first stages of square pictures"),
        ("scheduler/scheduler_config.json", {"_class_name": "MyScheduler"}, "scheduler class 'MyScheduler'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
    ],
)
def test_parts_that_cannot_be_used_are_refused(sd1: Path, file: str, values: dict[str, Any], message: str) -> None:
    change(sd1 / file, **values)
    with pytest.raises(UserError, match=message):
        open_system(sd1)


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_without_its_first_stage(tmp_path: Path, folders: Callable[[str], Path], own: bool) -> None:
    model, folder, vae = model_of("sd1"), tmp_path / "folder", folders("sd1") / "vae"
    save_folder(model, folder)
    shutil.rmtree(folder / "vae")
    if not own:
        (folder / OWN).unlink()
    for refused in (lambda: open_system(folder), lambda: convert(folder, tmp_path / "x", to="diffusers", dtype=None)):
        with pytest.raises(UserError, match=r"folder holds no first stage \(VAE\), which .*; give one with --vae PATH"):
            refused()
    with pytest.raises(ModelFileError, match="a model without its first stage"):
        open_system(folders("sd1"), vae=folder)
    partial = open_system(folder, incomplete=True)
    assert partial.missing == ("vae",)
    lacking = {name.partition(".")[0] for name, tensor in partial.system.tensors().items() if tensor.is_meta}
    assert lacking == {"codec"}
    opened = open_system(folder, vae=vae)
    assert same(opened.system, model) and opened.missing == () and opened.sha256 == partial.sha256
    convert(folder, tmp_path / "filled", to="diffusers", vae=vae)
    assert same(open_system(tmp_path / "filled").system, model)
    convert(folder, tmp_path / "bare.safetensors", to="single-file")
    assert same(open_system(tmp_path / "bare.safetensors", vae=vae).system, model)


@pytest.mark.parametrize("other", ["sd-x4-upscaler", "rescaled"])
def test_a_first_stage_in_a_missing_one_s_place_must_fit(
    tmp_path: Path, folders: Callable[[str], Path], other: str
) -> None:
    save_folder(model_of("sd1"), tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder/vae")
    vae = Path(shutil.copytree(folders("sd1" if other == "rescaled" else other) / "vae", tmp_path / "vae"))
    change(vae / "config.json", scaling_factor=0.5)
    with pytest.raises(UserError, match="scales its latents by 0.5" if other == "rescaled" else "of the size|scales"):
        open_system(tmp_path / "folder", vae=vae)


def test_what_changes_a_model_is_no_folder_of_one(tmp_path: Path, sd1: Path) -> None:
    for file, title in (
        ("pytorch_lora_weights.safetensors", "a LoRA"),
        ("learned_embeds.bin", "a textual inversion"),
        ("adapter_config.json", "a PEFT adapter"),
    ):
        place = tmp_path / file.partition(".")[0]
        place.mkdir()
        (place / file).write_bytes(b"{}")
        with pytest.raises(ModelFileError, match=f"holds {title}.*, which changes a model and is not a model to draw"):
            open_system(place)
    tensors = load_file(sd1 / UNET)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[name.replace("to_q.", "to_q.base_layer.")] = tensors.pop(name)
    save_file(tensors, sd1 / UNET)
    with pytest.raises(ModelFileError, match=r"unet was saved with PEFT's layers .*to_q.base_layer.weight.*fuse them"):
        open_system(sd1)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_missing_part_is_named(sd1: Path, name: str) -> None:
    shutil.rmtree(sd1 / name)
    with pytest.raises(ModelFileError, match=f"lacks the folder {name}, which drawing needs"):
        open_system(sd1)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", UNET, TEXT])
@pytest.mark.parametrize("content", [None, b"", b"\x00" * 64])
def test_damaged_files_are_refused(sd1: Path, file: str, content: bytes | None) -> None:
    (sd1 / file).unlink() if content is None else (sd1 / file).write_bytes(content)
    with pytest.raises(ModelFileError):
        open_system(sd1)
    if file in (UNET, TEXT) and content is None:
        return
    (sd1 / file).write_bytes(b"{" * 100_000)
    with pytest.raises(ModelFileError):
        open_system(sd1)


def test_remarks_for_who_opens_the_folder_elsewhere(tmp_path: Path) -> None:
    model = model_of("sd2-depth")
    (remark,) = save_folder(model, tmp_path / "depth")
    assert "depth_estimator=None" in remark
    assert save_folder(model_of("sd1"), tmp_path / "sd1") == []
    config = config_of(case("sd1").family)
    text = config.conditions["text"] | {"skip": 1, "final_norm": False, "pad": 7}
    changed = Latent.load(
        config.model_copy(update={"conditions": {"text": text}}), model_of("sd1").tensors(), what="the model"
    )
    remarks = save_folder(changed, tmp_path / "other")
    assert ["clip_skip" in remarks[0], "last norm" in remarks[1], "with the id 7" in remarks[2]] == [True] * 3
    assert same(open_system(tmp_path / "other").system, changed)


# --- converting -------------------------------------------------------------------------------------------------------


def test_what_a_single_file_holds_besides_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_single_file(model_of("sd1"), file)
    tensors = load_file(file)
    more = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9)}
    renamed = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": t + 1 for n, t in tensors.items()}
    averages = {n: t for n, t in renamed.items() if n.startswith("model_ema.diffusion_model")}
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    metadata = TensorFile.open(file).metadata
    save_file({**tensors, **more, **averages, **positions}, file, metadata=metadata)
    done = convert(file, tmp_path / "folder", to="diffusers")
    assert done.used == len(tensors)
    assert {n for names in done.dropped.values() for n in names} == {*more, *averages, *positions}
    average = convert(file, tmp_path / "average", to="diffusers", averaged=True)
    assert average.used == done.used
    plain, averaged = (load_file(tmp_path / name / UNET) for name in ("folder", "average"))
    assert all(torch.equal(averaged[name], tensor + 1) for name, tensor in plain.items())


def test_another_first_stage_is_taken_in(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    stage = Path(shutil.copytree(folders("sd1") / "vae", tmp_path / "vae"))
    tensors = load_file(stage / "diffusion_pytorch_model.safetensors")
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors, stage / "diffusion_pytorch_model.safetensors")
    done = convert(folders("sd1"), tmp_path / "folder", to="diffusers", vae=stage)
    assert f"the first stage is that of {stage}" in done.notes
    found = load_file(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    write_single_file(model_of("sd1"), tmp_path / "m.safetensors")
    done = convert(tmp_path / "m.safetensors", tmp_path / "n.safetensors", to="single-file", vae=stage)
    assert len(done.dropped[REPLACED]) == len(tensors) and NO_PLACE not in done.dropped
    assert same(open_system(tmp_path / "n.safetensors").system, open_system(tmp_path / "folder").system)  # type: ignore[arg-type]


def test_what_a_single_file_does_not_say_of_a_model_is_noted(tmp_path: Path) -> None:
    model = model_of("sd1")
    sampling = model.config.sampling.model_copy(update={"guidance": 3.0})
    config = model.config.model_copy(update={"title": "Mine", "licence": "CC0", "sampling": sampling})
    own = Latent(config, model.denoiser, model.codec, model.conditioner)
    save_folder(own, tmp_path / "own")
    done = convert(tmp_path / "own", tmp_path / "m.safetensors", to="single-file")
    assert done.notes[-1] == "a single file has no place for sampling.guidance, title, licence of the model's config"
