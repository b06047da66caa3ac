"""Folders in diffusers' layout: written and opened again by ourselves. What diffusers makes of them is in parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.conditioners.joint import JointText, TextTransformerConfig, WordVocabulary
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import VQModel
from sfumato.systems import Opened, open_as, open_system
from sfumato.systems.codec import CodecConfig, CodecSystem, standardised
from sfumato.systems.ddpm import DDPM
from sfumato.systems.exchange import CONDITIONER, OWN, Exchanged, holds_first_stage, save_folder
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.training.data import open_data
from sfumato.training.recipes.latent import LatentRecipe

from .. import tiny

LEVELS: dict[str, Any] = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
FIRST_STAGE: dict[str, Any] = LEVELS | {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
}  # fmt: skip
PLAIN: dict[str, Any] = LEVELS | {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
ATTENDING: dict[str, Any] = LEVELS | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
}  # fmt: skip
LABELS: dict[str, Any] = {"kind": "label", "names": ["cat", "dog"]}


def words() -> dict[str, Any]:
    """The description of a text transformer that is trained with its model."""
    vocabulary = WordVocabulary.from_texts(["a red heart", "a blue fish"])
    small = TextTransformerConfig(
        vocab_size=vocabulary.size, max_position_embeddings=8, encoder_layers=1, encoder_ffn_dim=16,
        encoder_attention_heads=2, head_dim=4, d_model=8,
    )  # fmt: skip
    return JointText(vocabulary, small).describe()


def latent(kind: str = "kl", conditions: dict[str, Any] | None = None, **more: Any) -> Latent:
    """A small model with random weights, always the same."""
    values: dict[str, Any] = {
        "size": 16,
        "codec": {"kind": kind, "size": 16, "network": {} if kind == "pixels" else FIRST_STAGE},
        "conditions": conditions or {},
        "network": ATTENDING if conditions and "text" in conditions else PLAIN,
        "schedule": {"name": "cosine"},
        "prediction": {"parameterization": "v"},
        "sampling": {"sampler": "dpmpp_2m", "steps": 3, "guidance": 2.0 if conditions else 1.0, "threshold": "none"},
        "objective": {"weighting": "min_snr"},
        "title": "Small",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Latent.create(LatentConfig(**values | more))
    for network in model.networks().values():
        network.eval()
    return spread(model)  # type: ignore[no-any-return]


def spread(model: Any) -> Any:
    """The same with codes as far apart as those of a trained codebook; those of a new one are lost in rounding."""
    if isinstance(model.codec.network, VQModel):
        with torch.no_grad():
            model.codec.network.quantize.embedding.weight.mul_(model.codec.network.config.num_vq_embeddings)
    return model


def codec(kind: str = "kl") -> CodecSystem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FIRST_STAGE | {"scaling_factor": 0.5}
        config = CodecConfig(kind=kind, size=16, network=network, title="Stage")  # type: ignore[arg-type]
        return spread(CodecSystem.create(config))  # type: ignore[no-any-return]


def ddpm(**sampling: Any) -> DDPM:
    config = tiny.model_config(labels=("cat", "dog") if sampling.get("guidance", 1) > 1 else ())
    config = config.model_copy(update={"sampling": type(config.sampling)(**{"steps": 3, "guidance": 1.0} | sampling)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DDPM.create(config)


def same(found: Opened, system: Exchanged) -> None:
    """Whether what was opened is the system: its kind, config and tensors."""
    assert type(found.system) is type(system) and found.system.config == system.config
    tensors = found.system.tensors()
    assert list(tensors) == list(system.tensors())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in system.tensors().items())


SYSTEMS: dict[str, Any] = {
    "kl codec": codec,
    "vq codec": lambda: codec("vq"),
    "ddpm": ddpm,
    "ddpm with labels": lambda: ddpm(guidance=2.0),
    "ddpm, ancestral": lambda: ddpm(sampler="ddpm"),
    "unconditional": latent,
    "vq, unconditional": lambda: latent("vq"),
    "labels": lambda: latent(conditions={"label": LABELS}),
    "joint text": lambda: latent(conditions={"text": words()}),
    "text and labels": lambda: latent("vq", {"text": words(), "label": LABELS}),
    "embedded labels": lambda: latent(
        conditions={"label": LABELS | {"kind": "embedded-label", "width": 8}}, network=ATTENDING
    ),
    "pixels": lambda: latent("pixels"),
    "pixels, joint text": lambda: latent("pixels", {"text": words()}),
    "sigmoid": lambda: latent(schedule={"name": "sigmoid"}),
    "zero terminal": lambda: latent(schedule={"name": "scaled_linear", "zero_terminal_snr": True}),
    "flow": lambda: latent(
        schedule={"name": "flow"}, prediction={"parameterization": "flow"}, sampling={"sampler": "euler"}
    ),
    "learned variance": lambda: latent(prediction={"learned_variance": True}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_opens_as_what_was_saved(tmp_path: Path, name: str) -> None:
    system = SYSTEMS[name]()
    save_folder(system, tmp_path / "model")
    same(open_system(tmp_path / "model"), system)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    system = latent(conditions={"text": words()})
    save_folder(system, tmp_path / "a")
    save_folder(open_as(Latent, tmp_path / "a"), tmp_path / "b")
    assert tiny.tree(tmp_path / "a") == tiny.tree(tmp_path / "b")
    assert (tmp_path / "a" / CONDITIONER).is_file()
    assert open_system(tmp_path / "a").sha256 == open_system(tmp_path / "b").sha256


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_folder(codec(), tmp_path / "empty")
    before = tiny.tree(tmp_path)
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        save_folder(codec(), tmp_path / "empty")
    file = tmp_path / "empty" / OWN
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        save_folder(codec(), file)
    with pytest.raises(UserError, match="a part of the path is a file"):
        save_folder(codec(), file / "inside")
    assert tiny.tree(tmp_path) == before


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with mock.patch("sfumato.checkpoints.formats.diffusers.os.fsync", side_effect=[None, None, full]):
        with pytest.raises(UserError, match=f"could not write {tmp_path}/model: the disk is full"):
            save_folder(latent(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to write"):
        save_folder(CodecSystem.create(CodecConfig(kind="pixels", size=16)), tmp_path / "a")
    with pytest.raises(UserError, match="self-conditioned"):
        save_folder(latent(prediction={"self_condition": True}), tmp_path / "a")
    with pytest.raises(UserError, match="no counterpart in diffusers"):
        save_folder(latent(prediction={"preconditioning": "signal"}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("system", "chosen", "remark"),
    [
        (lambda: latent(), "DPMSolverMultistepScheduler", None),
        (lambda: ddpm(sampler="ddim", rederive_eps=False), "DDIMScheduler", None),
        (lambda: ddpm(sampler="ddim"), "DDIMScheduler", "way of keeping x0 in range"),
        (lambda: ddpm(sampler="euler", schedule="trailing"), "DDIMScheduler", "sampler is kept"),
        (lambda: latent(schedule={"name": "sigmoid"}), "DDIMScheduler", "no beta_schedule for 'sigmoid'"),
        (lambda: latent(sampling={"sampler": "dpm_fast", "threshold": "none"}), "DDIMScheduler", "no DPM fast"),
        (lambda: latent(prediction={"learned_variance": True}), "DPMSolverMultistepScheduler", None),
        (
            lambda: latent(prediction={"learned_variance": True}, sampling={"sampler": "heun", "threshold": "none"}),
            "DDPMScheduler",
            "sampler is kept",
        ),
        (
            lambda: latent(conditions={"text": words()}, sampling={"schedule": "leading", "threshold": "none"}),
            "DDIMScheduler",
            "changes the scheduler's steps_offset",
        ),
    ],
)
def test_the_scheduler_is_the_models_own_or_said_not_to_be(
    tmp_path: Path, system: Any, chosen: str, remark: str | None
) -> None:
    made = system()
    remarks = save_folder(made, tmp_path / "model")
    fields = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert fields["_class_name"] == chosen
    assert (remark is None and not remarks) or (remark is not None and len(remarks) == 1 and remark in remarks[0])
    same(open_system(tmp_path / "model"), made)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_exchanged_scheduler_has_the_last_word(tmp_path: Path) -> None:
    first = latent(conditions={"label": LABELS})
    sampling = first.config.sampling.model_copy(update={"guidance_interval": (0.3, 100.0)})
    first.config = first.config.model_copy(update={"sampling": sampling})
    save_folder(first, tmp_path / "model")
    scheduler = tmp_path / "model/scheduler/scheduler_config.json"
    change(scheduler, _class_name="EulerDiscreteScheduler", timestep_spacing="linspace", use_karras_sigmas=True)
    config = open_as(Latent, tmp_path / "model").config
    assert (config.sampling.sampler, config.sampling.schedule) == ("euler", "karras")
    assert (config.sampling.steps, config.sampling.guidance) == (3, 2.0)  # which no scheduler tells
    assert config.sampling.guidance_interval == (0.3, 100.0)
    assert config.schedule.name == "cosine" and config.prediction.parameterization == "v"
    assert config.labels == ("cat", "dog") and config.objective == {"weighting": "min_snr"}


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (OWN, {"system": "clip"}, "system 'clip'"),
        (OWN, {"siz": 8}, "unknown key 'siz'"),
        (OWN, {"size": 32}, "sample_size of the UNet2DModel is not what sfumato.json says"),
        (OWN, {"codec": {"kind": "pixels", "size": 16}}, "UNet2DModel is not what|expects no such part"),
        ("unet/config.json", {"layers_per_block": 2}, "layers_per_block of the UNet2DModel"),
        ("unet/config.json", {"layers_per_block": "two"}, "wrong type"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "where its sfumato.json expects UNet2DModel"),
        ("vqvae/config.json", {"scaling_factor": 2.0}, "scaling_factor of the AutoencoderKL"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    save_folder(latent(), tmp_path / "model")
    change(tmp_path / "model" / file, **values)
    with pytest.raises(UserError, match=message):
        open_system(tmp_path / "model")


def test_missing_parts_are_refused(tmp_path: Path) -> None:
    save_folder(latent(conditions={"text": words()}), tmp_path / "model")
    (tmp_path / "model" / CONDITIONER).unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        open_system(tmp_path / "model")
    (tmp_path / "model" / OWN).unlink()
    with pytest.raises(ModelFileError, match="lacks the folder text_encoder, which drawing needs"):
        open_system(tmp_path / "model")
    (tmp_path / "model/unet").rename(tmp_path / "model/unet2")
    change(tmp_path / "model/model_index.json", _class_name="LDMPipeline")
    with pytest.raises(ModelFileError, match="lacks the folder unet"):
        open_system(tmp_path / "model")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(ModelFileError, match="holds a ControlNetModel; .* AutoencoderKL and VQModel can be opened"):
        open_system(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    with pytest.raises(ModelFileError, match="holds no run, checkpoint or diffusers pipeline"):
        open_system(tmp_path)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_bare_first_stage_opens_with_all_fields(tmp_path: Path, kind: str) -> None:
    """Without sfumato.json the config has every field written out, and means the same."""
    stage = codec(kind)
    save_folder(stage, tmp_path / "stage")
    (tmp_path / "stage" / OWN).unlink()
    found = open_as(CodecSystem, tmp_path / "stage")
    assert found.config.autoencoder() == stage.config.autoencoder() and found.config.title == ""
    assert (found.config.kind, found.config.size) == (kind, 16)
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in stage.tensors().items())
    change(tmp_path / "stage/config.json", sample_size=[16, 24])
    with pytest.raises(UserError, match="only first stages of square pictures"):
        open_system(tmp_path / "stage")


def test_the_attention_names_of_the_first_releases_are_read(tmp_path: Path) -> None:
    stage = codec()
    save_folder(stage, tmp_path / "stage")
    weights = tmp_path / "stage/diffusion_pytorch_model.safetensors"
    earlier = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = load_file(weights)
    for now, then in earlier.items():
        renamed = {name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for name, t in renamed.items()}
    assert sum("proj_attn" in name for name in renamed) == 4
    save_file(renamed, weights)
    found = open_as(CodecSystem, tmp_path / "stage").tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in stage.tensors().items())


def test_a_run_on_a_first_stage_from_a_folder_caches_its_latents(tmp_path: Path) -> None:
    data = {"path": str(tiny.write_captioned(tmp_path / "pictures", count=8)), "size": 16}
    config = codec().config.with_network(scaling_factor=1.0)
    stage = CodecSystem.load(config, codec().tensors(), what="the codec")
    pictures = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found = stage.codec.encode(pictures)
    assert found.std is not None
    deviation = (found.mean.var((0, 2, 3)) + found.std.square().mean()).sqrt()
    stage = standardised(stage, found.mean.mean((0, 2, 3)), deviation)
    save_folder(stage, tmp_path / "stage")
    values: dict[str, Any] = {"data": data, "codec": str(tmp_path / "stage"), "conditions": {}}
    recipe = LatentRecipe(**values, model={"network": PLAIN})  # type: ignore[arg-type]
    task = recipe.task(*open_data(recipe.data))
    cache = task._latents[id(task.data)]
    assert cache.mean.shape == (len(task.data), 4, 8, 8) and 0.5 < cache.deviation() < 2
    assert task.model.config.codec == stage.config


def test_a_recipe_takes_a_first_stage_from_a_folder(tmp_path: Path) -> None:
    """The folder is a codec; what is cached of it follows from its weights and its scale."""
    from sfumato.checkpoints.formats.diffusers import component_sha256

    save_folder(codec(), tmp_path / "stage")
    assert holds_first_stage(tmp_path / "stage") and not holds_first_stage(tmp_path)
    recipe = LatentRecipe(data={"path": "pictures", "size": 16}, codec=str(tmp_path / "stage"))  # type: ignore[arg-type]
    recipe.check()
    assert recipe.stage().config == codec().config
    before = component_sha256(tmp_path / "stage")
    assert open_system(tmp_path / "stage").sha256 == before
    change(tmp_path / "stage/config.json", scaling_factor=0.25)
    assert component_sha256(tmp_path / "stage") != before
