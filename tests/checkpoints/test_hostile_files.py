"""Every kind of file opens with no network; damaged, foreign and malicious ones give one sentence and run nothing.

Every test goes through the doors that a user has: `open_system` and `open_single_file`, another first stage, a folder
with a pickle in it, and the command.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import socket
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.checkpoints.formats import families
from sfumato.errors import UserError
from sfumato.systems import open_system
from sfumato.systems.codec import CodecSystem
from sfumato.systems.exchange import save_folder
from sfumato.systems.latent import Latent
from sfumato.systems.stable_diffusion import open_single_file, write_single_file

from .. import tiny
from ..parity import stable_cases
from .compvis_names import SD1, SD2, on_meta, stage, unet
from .test_pickles import PAYLOADS, zipped

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, on protocols and TorchScript

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the network was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)


def sentence(act: Callable[[], Any]) -> str:
    """What it is refused with: one clear sentence."""
    with pytest.raises(UserError) as error:
        act()
    return clear(str(error.value))


def clear(text: str) -> str:
    assert text and "\n" not in text and len(text) < 1500 and "Traceback" not in text, text
    return text


def command_refuses(*arguments: object) -> str:
    """The same of the command: exit code 2, and the sentence alone."""
    result = tiny.run(*arguments)
    assert result.code == 2 and result.out == "" and result.err.startswith("sfumato: "), result
    return clear(result.err.removesuffix("\n"))


# --- files that are sound --------------------------------------------------------------------------------------------


def model(name: str = "sd1") -> Latent:
    return stable_cases.case(name).model("ddim")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sound model in every layout; read only."""
    home = tmp_path_factory.mktemp("sound")
    write_single_file(model(), home / "file.safetensors")
    write_single_file(model(), home / "half.safetensors", dtype=torch.float16)
    save_folder(model(), home / "folder")
    return home


def file_of(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def header_of(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        found: dict[str, str] = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return found


@pytest.mark.parametrize("name", stable_cases.NAMES)
def test_single_files_open(name: str, tmp_path: Path) -> None:
    """Under any name: what is in it counts."""
    write_single_file(model(name), tmp_path / "m.gguf", dtype=torch.bfloat16)
    found = open_system(tmp_path / "m.gguf")
    assert isinstance(found.system, Latent) and found.system.config == model(name).config
    assert found.file is not None and found.file.dropped == () and found.notes


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sd2-inpainting", "sd2-depth", "sd-x4-upscaler"])
def test_folders_open(name: str, tmp_path: Path) -> None:
    save_folder(model(name), tmp_path / "m")
    found = open_system(tmp_path / "m").system
    assert isinstance(found, Latent)
    assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in model(name).tensors().items())


@pytest.mark.parametrize("kind", ["plain", "variant", "sharded", "with a safety checker"])
def test_folders_of_diffusers_open(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipeline = stable_cases.case("sd1").pipeline("text", "ddim")
    options: dict[str, Any] = {"variant": {"variant": "fp16"}, "sharded": {"max_shard_size": "100KB"}}.get(kind, {})
    pipeline.save_pretrained(tmp_path / "m", **options)
    if kind == "sharded":
        assert len(list((tmp_path / "m" / "unet").glob("*.safetensors"))) > 1
    if kind == "with a safety checker":
        index = json.loads((tmp_path / "m" / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "m" / "safety_checker").mkdir()
        (tmp_path / "m" / "safety_checker" / "config.json").write_text("{}")
        (tmp_path / "m" / "safety_checker" / "pytorch_model.bin").write_bytes(b"never opened")
    found = open_system(tmp_path / "m")
    assert isinstance(found.system, Latent)
    assert all(torch.equal(found.system.tensors()[key], tensor) for key, tensor in model().tensors().items())
    assert any("safety checker" in note for note in found.notes) == (kind == "with a safety checker")


@pytest.mark.slow
def test_pickles_open_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle carries no configs: with the width of the published texts, and the small networks as those published."""
    small = stable_cases.tiny("sd1")
    wide = replace(small, unet=replace(small.unet, cross_attention_dim=768), text=replace(small.text, hidden_size=768))
    monkeypatch.setitem(families.FAMILIES, "sd1", wide)
    own = stable_cases.latent(wide, stable_cases.weights(wide))
    write_single_file(own, tmp_path / "m.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "m.safetensors"), "global_step": 470000}, tmp_path / "m.ckpt")
    assert "--allow-pickle" in sentence(lambda: open_system(tmp_path / "m.ckpt"))
    found = open_system(tmp_path / "m.ckpt", allow_pickle=True)
    assert isinstance(found.system, Latent)
    assert any("is a pickle and has been converted" in note for note in found.notes)
    assert all(torch.equal(found.system.tensors()[key], tensor) for key, tensor in own.tensors().items())


@pytest.mark.slow
def test_folders_of_pickles_open_when_allowed(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    stable_cases.case("sd1").pipeline("text", "ddim").save_pretrained(tmp_path / "m", safe_serialization=False)
    if not list((tmp_path / "m" / "text_encoder").glob("*.bin")):  # newer transformers write safetensors alone
        weights = load_file(tmp_path / "m" / "text_encoder" / "model.safetensors")
        torch.save(weights, tmp_path / "m" / "text_encoder" / "pytorch_model.bin")
        (tmp_path / "m" / "text_encoder" / "model.safetensors").unlink()
    assert "pickle" in sentence(lambda: open_system(tmp_path / "m"))
    found = open_system(tmp_path / "m", allow_pickle=True).system
    assert isinstance(found, Latent)
    assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in model().tensors().items())


@pytest.mark.parametrize("layout", ["compvis", "compvis alone", "diffusers", "folder"])
def test_first_stages_open_alone(layout: str, sound: Path, tmp_path: Path) -> None:
    """As a model of their own, and in the place of another's; a file without configs has norms of 32 groups."""
    small = stable_cases.tiny("sd1")
    vae = replace(small.vae, block_out_channels=(32, 32, 32, 32), norm_num_groups=32, sample_size=512)
    family = replace(small, vae=vae)
    own = stable_cases.latent(family, stable_cases.weights(family, seed=1))
    if layout == "folder":
        save_folder(own, tmp_path / "folder")
        place = tmp_path / "folder" / "vae"
    elif layout == "diffusers":
        place = file_of(own.codec.network.state_dict(), tmp_path / "vae.safetensors")  # type: ignore[union-attr]
    else:
        write_single_file(own, tmp_path / "m.safetensors")
        prefix = "first_stage_model."
        names = {n: t for n, t in load_file(tmp_path / "m.safetensors").items() if n.startswith(prefix)}
        names = {n.removeprefix(prefix if layout.endswith("alone") else ""): t for n, t in names.items()}
        place = file_of(names, tmp_path / "vae.safetensors")
    stage = open_system(place)
    assert isinstance(stage.system, CodecSystem)
    whole = open_system(sound / "file.safetensors", vae=place)
    assert isinstance(whole.system, Latent) and whole.opening["vae"]["sha256"] == stage.sha256
    expected = model().tensors() | {n: t for n, t in own.tensors().items() if n.startswith("codec.")}
    expected = {n: t for n, t in expected.items() if not n.startswith("codec.") or n in own.tensors()}
    found = whole.system.tensors()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_the_running_average_opens(sound: Path, tmp_path: Path) -> None:
    weights = load_file(sound / "file.safetensors")
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in weights.items()
        if name.startswith(UNET)
    }
    path = file_of({**weights, **average}, tmp_path / "ema.safetensors", header_of(sound / "file.safetensors"))
    for averaged in (False, True):
        found, name = open_system(path, averaged=averaged).system, "network.conv_in.bias"
        assert isinstance(found, Latent)
        assert torch.equal(found.tensors()[name], model().tensors()[name] + averaged)


# --- damaged ---------------------------------------------------------------------------------------------------------


DOORS: dict[str, Callable[[Path], str]] = {
    "open_system": lambda path: sentence(lambda: open_system(path)),
    "open_single_file": lambda path: sentence(lambda: open_single_file(path)),
    "info": lambda path: command_refuses("info", path),
    "generate": lambda path: command_refuses("generate", "hat", "--model", path, "--out", path.parent / "never.png"),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_model(door: str, sound: Path, tmp_path: Path) -> None:
    whole = (sound / "half.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cases = {
        "empty": b"",
        "one byte": b"\x00",
        "zeros": bytes(4096),
        "text": b"404: Not Found\n",
        "a page": b"<!DOCTYPE html><html><body>Log in</body></html>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "NumPy": b"\x93NUMPY\x01\x00v\x00" + bytes(64),
        "an archive with nothing in it": b"PK\x05\x06" + bytes(18),
        "a header that claims the world": b"\xff" * 8 + b"{}",
        "a header of no length": bytes(8) + b"{}",
        "a header of no JSON": (9).to_bytes(8, "little") + b"{not json",
        "a header that is a list": (10).to_bytes(8, "little") + b'{"a": [1]}',
        "a header that goes too deep": (20002).to_bytes(8, "little") + b'{"' + b"[" * 20000,
    }
    for cut in (4, 8, 9, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        cases[f"cut at {cut}"] = whole[:cut]
    cases["too long"] = whole + b"x"
    for name, data in cases.items():
        path = tmp_path / "m.safetensors"
        path.write_bytes(data)
        assert str(path) in DOORS[door](path), name


def test_flipped_bits_never_surprise(sound: Path, tmp_path: Path) -> None:
    """Anywhere in the header: refused with a sentence, or a model with the right names and shapes."""
    whole = bytearray((sound / "half.safetensors").read_bytes())
    header, dice, path = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), tmp_path / "m.safetensors"
    refused = 0
    for _ in range(150):
        place, bit = dice.randrange(header), 1 << dice.randrange(8)
        whole[place] ^= bit
        path.write_bytes(whole)
        try:
            found = open_single_file(path).system
            assert isinstance(found, Latent)
        except UserError as error:
            clear(str(error))
            refused += 1
        whole[place] ^= bit
    assert refused > 100


@pytest.mark.parametrize("damage", ["missing", "misshapen", "unknown", "of numbers that are none"])
def test_tensors_that_do_not_fit(damage: str, sound: Path, tmp_path: Path) -> None:
    weights, name = load_file(sound / "file.safetensors"), f"{UNET}time_embed.0.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "misshapen":
        weights[name] = weights[name][:, :-1]
    elif damage == "unknown":
        weights[f"{UNET}time_embed.9.weight"] = torch.ones(1)
    else:
        weights[name] = weights[name].to(torch.int64)
    path = file_of(weights, tmp_path / "m.safetensors", header_of(sound / "file.safetensors"))
    says = DOORS["open_system"](path)
    assert "time_embed" in says


@pytest.mark.parametrize(
    "damage",
    ["no unet", "no scheduler", "cut weights", "index of no JSON", "index that is a list", "config of another network",
     "an unknown key", "empty weights", "a shard that is missing"],
)  # fmt: skip
@pytest.mark.parametrize("door", ["open_system", "info", "generate"])
def test_damaged_folders(door: str, damage: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sound / "folder", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "no unet":
        shutil.rmtree(folder / "unet")
    elif damage == "no scheduler":
        (folder / "scheduler" / "scheduler_config.json").unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "index of no JSON":
        (folder / "model_index.json").write_text("{")
    elif damage == "index that is a list":
        (folder / "model_index.json").write_text("[]")
    elif damage == "config of another network":
        shutil.copy(folder / "vae" / "config.json", folder / "unet" / "config.json")
    elif damage == "an unknown key":
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"attention_heads": 3}))
    elif damage == "empty weights":
        weights.write_bytes(b"")
    else:
        shards = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
        weights.unlink()
        (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps(shards))
    DOORS[door](folder)


# --- foreign ---------------------------------------------------------------------------------------------------------


def small_unet(**changes: Any) -> dict[str, Tensor]:
    """A UNet of CompVis' layout with the widths of texts of a published model, else small."""
    return {UNET + n: torch.zeros(s) for n, s in unet(**{**SD1, "mc": 32, "mult": (1, 1), **changes}).items()}


FOREIGN: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "SDXL": (lambda: small_unet(context=2048, adm=2816, linear=True), "a Stable Diffusion XL model"),
    "SDXL refiner": (lambda: small_unet(context=1280, adm=2560, linear=True), "refiner"),
    "SDXL inpainting": (lambda: small_unet(context=2048, adm=2816, in_channels=9), "a Stable Diffusion XL model"),
    "Flux": (lambda: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, "a Flux model"),
    "Flux in a checkpoint": (lambda: {f"{UNET}double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, "a Flux model"),
    "SD 3": (lambda: {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3)}, "a Stable Diffusion 3 model"),
    "ControlNet": (lambda: {"control_model.time_embed.0.weight": torch.zeros(3)}, "a ControlNet"),
    "ControlNet of diffusers": (lambda: {"controlnet_cond_embedding.conv_in.bias": torch.zeros(3)}, "a ControlNet"),
    "SD 1 with a ControlNet": (
        lambda: small_unet() | {"control_model.time_embed.0.weight": torch.zeros(3)}, "a ControlNet",
    ),
    "LoRA": (lambda: {"lora_unet_down_blocks_0_proj_in.lora_down.weight": torch.zeros(3)}, "a LoRA"),
    "LoRA of PEFT": (lambda: {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(3)}, "a LoRA"),
    "LoHa": (lambda: {"lora_unet_down_blocks_0_proj_in.hada_w1_a": torch.zeros(3)}, "a LoRA"),
    "textual inversion": (lambda: {"emb_params": torch.zeros(1, 768)}, "a textual inversion"),
    "IP-Adapter": (lambda: {"image_proj.proj.weight": torch.zeros(3)}, "an IP-Adapter"),
    "InstructPix2Pix": (lambda: small_unet(in_channels=8), "InstructPix2Pix"),
    "unCLIP": (lambda: small_unet(context=1024, adm=2048, linear=True), "unCLIP"),
    "a UNet of diffusers": (lambda: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)}, "of a diffusers folder"),
    "a text encoder": (lambda: {"text_model.embeddings.token_embedding.weight": torch.zeros(3)}, "a text encoder"),
    "an image encoder": (lambda: {"vision_model.embeddings.class_embedding": torch.zeros(3)}, "an image encoder"),
    "a VQGAN": (
        lambda: {n: torch.zeros(s) for n, s in stage(ch=32, mult=(1, 2), z=3, codes=16).items()}, "rounds its latents",
    ),
    "ESRGAN": (lambda: {"body.0.rdb1.conv1.weight": torch.zeros(3)}, "an upscaler of another kind"),
    "a language model": (lambda: {"model.layers.0.mlp.gate_proj.weight": torch.zeros(3)}, "no model that is known"),
    "nothing": (dict, "no tensors"),
}  # fmt: skip
"""Files of other models, and what they are called."""


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named(name: str, door: str, tmp_path: Path) -> None:
    tensors, says = FOREIGN[name]
    path = file_of(tensors(), tmp_path / "sd1.safetensors")
    assert says in DOORS[door](path) and not (tmp_path / "never.png").exists()


def test_shapes_of_the_published_size_are_told_apart() -> None:
    """The names above are small; the sizes of the real networks are looked at too."""
    big = on_meta(unet(**{**SD2, "context": 2048, "adm": 2816, "mult": (1, 2, 4), "attention": (2, 4)}), UNET)
    assert "a Stable Diffusion XL model" in sentence(lambda: families.detect(big, {}))


@pytest.mark.parametrize(
    "pipeline", ["StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "KandinskyPipeline"]
)
def test_foreign_folders_are_named(pipeline: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "folder", tmp_path / "m")
    (tmp_path / "m" / "sfumato.json").unlink()
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    assert pipeline in DOORS["open_system"](tmp_path / "m") and pipeline in DOORS["info"](tmp_path / "m")


# --- malicious -------------------------------------------------------------------------------------------------------


def legacy(data: bytes) -> bytes:
    """As torch wrote before 1.6: marks, then the pickle, then storages."""
    marks = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(one, protocol=2) for one in marks) + data + pickle.dumps([], protocol=2)


def tarred(data: bytes) -> bytes:
    """As torch wrote at first."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("sys_info", pickle.dumps({})), ("pickle", data), ("storages", data), ("tensors", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "bare": lambda data: data,
    "zip": zipped,
    "legacy": legacy,
    "tar": tarred,
    "zip in zip": lambda data: zipped(zipped(data)),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file or folder that only a payload makes."""
    return tmp_path / "c"


def poisoned(kind: str, name: str, form: str, canary: Path, sound: Path) -> Path:
    """A file, or a folder with a file, whose content is a payload."""
    data = FORMS[form](PAYLOADS[name](str(canary)))
    home = canary.parent
    if kind != "folder":
        path = home / kind
        path.write_bytes(data)
        return path
    folder = home / "folder"
    shutil.copytree(sound / "folder", folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(data)
    return folder


def as_first_stage(path: Path, sound: Path, allow: bool) -> str:
    return sentence(lambda: open_system(sound / "half.safetensors", vae=path, allow_pickle=allow))


ENTRIES: dict[str, Callable[[Path, Path, bool], str]] = {
    "open_system": lambda path, sound, allow: sentence(lambda: open_system(path, allow_pickle=allow)),
    "open_single_file": lambda path, sound, allow: sentence(lambda: open_single_file(path, allow_pickle=allow)),
    "vae": as_first_stage,
    "folder": lambda path, sound, allow: sentence(lambda: open_system(path, allow_pickle=allow)),
    "info": lambda path, sound, allow: command_refuses("info", path, *["--allow-pickle"] * allow),
    "generate": lambda path, sound, allow: command_refuses(
        "generate", "hat", "--model", path, "--out", path.parent / "never.png", *["--allow-pickle"] * allow
    ),
    "generate --vae": lambda path, sound, allow: command_refuses(
        "generate", "hat", "--model", sound / "half.safetensors", "--vae", path, "--out", path.parent / "never.png",
        *["--allow-pickle"] * allow,
    ),
    "convert": lambda path, sound, allow: command_refuses(
        "convert", path, path.parent / "never", "--to", "diffusers", *["--allow-pickle"] * allow
    ),
}  # fmt: skip


def attempt(entry: str, name: str, form: str, allow: bool, canary: Path, sound: Path, file: str = "m.ckpt") -> str:
    path = poisoned("folder" if entry == "folder" else file, name, form, canary, sound)
    says = ENTRIES[entry](path, sound, allow)
    assert not canary.exists() and not (canary.parent / "never.png").exists() and not (canary.parent / "never").exists()
    return says


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("number", "name"), list(enumerate(PAYLOADS)))
def test_payloads_are_not_even_read(number: int, name: str, entry: str, canary: Path, sound: Path) -> None:
    """Without permission; each in one of the forms."""
    says = attempt(entry, name, list(FORMS)[number % len(FORMS)], False, canary, sound)
    assert "pickle" in says or "not a safetensors file" in says


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["m.ckpt", "m.safetensors", "m.bin", "m.pt"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_under_every_name(name: str, file: str, form: str, canary: Path, sound: Path) -> None:
    attempt("open_system", name, form, False, canary, sound, file)


@pytest.mark.parametrize("entry", ["open_system", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_payload_that_is_allowed_is_refused(entry: str, canary: Path, sound: Path) -> None:
    assert "os.system" in attempt(entry, "os.system", "zip", True, canary, sound)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("number", "name"), list(enumerate(PAYLOADS)))
def test_payloads_that_are_allowed_are_refused(number: int, name: str, entry: str, canary: Path, sound: Path) -> None:
    """With permission, through every door: the process that reads them builds tensors and nothing else."""
    attempt(entry, name, list(FORMS)[number % len(FORMS)], True, canary, sound)


def test_python_files_in_a_folder_are_not_run(sound: Path, canary: Path) -> None:
    """Neither a pipeline of its own, nor classes that its configs name, nor pickles beside the weights."""
    folder = canary.parent / "m"
    shutil.copytree(sound / "folder", folder)
    code = f"open({str(canary)!r}, 'w').close()\n"
    for place in ("pipeline.py", "my_pipeline.py", "unet/my_unet.py", "unet/__init__.py", "__init__.py"):
        (folder / place).write_text(code)
    (folder / "training_args.bin").write_bytes(PAYLOADS["os.system"](str(canary)))
    (folder / "optimizer.pt").write_bytes(PAYLOADS["os.system"](str(canary)))
    for part in ("unet", "vae"):
        config = json.loads((folder / part / "config.json").read_text())
        config |= {"auto_map": {"AutoModel": "my_unet.Model"}, "_name_or_path": "../../" + str(canary)}
        (folder / part / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    named: dict[str, Any] = {"_class_name": ["my_pipeline", "Pipeline"], "unet": ["my_unet", "Model"]}
    for more in ({}, named, {"unet": named["unet"]}, {"vae": ["os", "system"]}):
        (folder / "model_index.json").write_text(json.dumps(index | more))
        try:
            open_system(folder, allow_pickle=True)
        except UserError as error:
            clear(str(error))
        assert not canary.exists()


@pytest.mark.parametrize("where", ["../outside", "/etc", "unet/../../outside"])
def test_shards_stay_within_their_folder(where: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sound / "folder", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, f"{where}.safetensors")}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    sentence(lambda: open_system(folder))
