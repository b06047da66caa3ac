"""Recipe `latent`: what is shown to the network, caches that change nothing, exact resumption, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sfumato import api
from sfumato.checkpoints.io import read_model, write_model
from sfumato.conditioners.words import minilm_installed
from sfumato.diffusion.objective import Loss
from sfumato.errors import DataError, UserError
from sfumato.networks.unet_2d import UNet2DModel
from sfumato.networks.unet_condition import UNet2DConditionModel
from sfumato.systems import open_as
from sfumato.systems.codec import CodecSystem
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.training import cache, recipes, run, state
from sfumato.training.captions import Captions, columns_of, spoken
from sfumato.training.recipes import conditions
from sfumato.training.recipes.latent import LatentRecipe

from .. import tiny
from ..conditioners.encoders import write_clip
from .codec_cases import (
    CODEC,
    CROSS,
    JOINT,
    autoencoder_recipe,
    codec_settings,
    everything,
    latent_recipe,
    latent_settings,
    resumed,
    task_for,
    trainer_for,
)
from .training_cases import CPU, assert_equal, contents, lines

LABEL: dict[str, Any] = {"kind": "label", "column": "kind"}
BOTH: dict[str, Any] = {"text": JOINT, "label": LABEL}

needs_minilm = pytest.mark.skipif(not minilm_installed(), reason="all-MiniLM-L6-v2's package is missing")


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """One noisy picture for each row of `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, _ in enumerate(rows):
        tiny.picture(number).save(folder / f"{number:02}.png")
    named = [json.dumps({"file_name": f"{number:02}.png"} | row) for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(named), encoding="utf-8")
    return folder


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"text": f"{('red', 'blue')[i % 2]} {('heart', 'fish', 'tree')[i % 3]}", "kind": ("warm", "cold")[i % 2],
         "tags": ["one", "two"][: i % 3]}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pictures"), rows())


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished first stage's run."""
    folder = tmp_path_factory.mktemp("codec") / "run"
    values = codec_settings(data, train={"steps": 3, "save_every": 3})
    assert run.train(autoencoder_recipe(values), folder, device=CPU, say=lambda _: None) == "finished"
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sfumato" / "training"


def recipe_for(pictures: Path, stage: Path | str, **own: Any) -> LatentRecipe:
    return latent_recipe(latent_settings(pictures, stage, **own))


# --- captions


def test_templates() -> None:
    row = {"text": "red heart", "style": "noto", "tags": ["love", "", "old"], "none": None, "number": 3}
    found = spoken(row, ["{text}, {style}", "{tags}", "a {none}", "{away}", "{tags} in {style}", "{number}", "plain"])
    assert found == [
        ["red heart, noto"], ["love", "old"], ["love in noto", "old in noto"], ["3"], ["plain"],
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{0}", "{text.a}", "{text[0]}", "{text!r}", "{text:>9}"])
def test_templates_that_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="the caption template"):
        columns_of(template)


def test_a_caption_is_drawn_from_every_template_and_list(data: Path) -> None:
    task = task_for(recipe_for(data, "pixels"))
    captions = Captions(task.data, ["{text}", "{tags} thing"])
    assert captions.rows[2] == [["red tree"], ["one thing", "two thing"]] and captions.rows[0] == [["red heart"]]
    drawn = [captions.drawn([2, 0], torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert {first for first, _ in drawn} == {"red tree", "one thing", "two thing"}
    assert {second for _, second in drawn} == {"red heart"}
    first, again = (captions.drawn([2] * 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again
    assert captions.first(2) == "red tree"


def test_unknown_columns_are_refused_with_the_nearest(data: Path) -> None:
    task = task_for(recipe_for(data, "pixels"))
    with pytest.raises(DataError, match=r"column 'txet'.*did you mean 'text'.*columns: kind, tags, text"):
        Captions(task.data, ["{txet}"])
    with pytest.raises(DataError, match="4 of 12 pictures in .* have no caption by any template .*: 00.png; 03.png"):
        Captions(task.data, ["{tags}"])


def test_unreadable_captions_are_left_out(data: Path) -> None:
    task = task_for(recipe_for(data, "pixels"))

    def unreadable(text: str) -> list[str]:
        return [word for word in text.split() if word in ("one", "fish")]

    captions = Captions(task.data, ["{text}", "{tags} thing"])
    with pytest.raises(DataError, match=r"4 of 12 .* can read .*: 01.png \('fish' of 'blue fish'\); 04.png"):
        captions.leave_out(unreadable)
    assert captions.rows[2] == [["red tree"], ["one thing", "two thing"]]  # nothing was changed
    assert captions.leave_out(lambda text: [w for w in unreadable(text) if w == "one"]) == ["one thing"]
    assert captions.rows[1] == [["blue fish"]] and captions.rows[2] == [["red tree"], ["two thing"]]
    count = len(task.data)
    assert captions.leave_out(lambda text: ["blue"] if "blue fish" in text else [], pictures_too=True) == ["blue fish"]
    assert len(captions.rows) == len(task.data) == count - 2
    assert [r.columns["text"] for r in task.data.records].count("blue fish") == 0


def test_pictures_without_a_caption_are_left_out_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = rows(10)
    for row in described[2:8]:
        row["text"] = ""
    pictures = write_rows(tmp_path / "some", described)
    values = latent_settings(pictures, "pixels", conditions={"text": JOINT}, train={"steps": 1})
    with pytest.raises(DataError, match="6 of 10 pictures .* no caption .*: 02.png; 03.png; .*; 06.png; and 1 more$"):
        run.train(latent_recipe(values), tmp_path / "run", device=CPU)
    values["data"]["skip_bad"] = True
    assert run.train(latent_recipe(values), tmp_path / "run", device=CPU) == "finished"
    said = capsys.readouterr().out
    expected = "6 pictures without a caption that can be read are left out: 02.png, 03.png, 04.png, 05.png, 06.png"
    assert f"{expected} and 1 more" in said
    for row in described:
        row["text"] = ""
    write_rows(pictures, described)
    with pytest.raises(DataError, match="10 of 10 pictures"):
        run.train(latent_recipe(values), tmp_path / "other", device=CPU)


@needs_minilm
def test_captions_that_minilm_cannot_read_are_counted(tmp_path: Path) -> None:
    described = rows(9)
    for row in described[1:4]:
        row["text"] = "心"
    pictures = write_rows(tmp_path / "mixed", described)
    values = latent_settings(pictures, "pixels", conditions={"text": {"kind": "minilm"}})
    said = r"3 of 9 pictures .*skip_bad=true.*conditions.text.kind=joint .*: 01.png \('心' of '心'\); 02.png .*; 03.png"
    with pytest.raises(DataError, match=said):
        task_for(latent_recipe(values))
    values["data"]["skip_bad"] = True
    assert len(task_for(latent_recipe(values)).data) == 6


def test_a_joint_text_of_no_given_size_is_small(data: Path) -> None:
    def network(**said: Any) -> dict[str, Any]:
        text = {"kind": "joint", "network": said}
        found = recipe_for(data, "pixels", conditions={"text": text})
        kinds = conditions.kinds_of(found.conditions)
        outline = conditions.described(kinds, conditions.Frame(1, 3, 16), None)["text"]["network"]
        return {name: outline[name] for name in (*conditions.JointlyTrainedText.small, "max_position_embeddings")}

    small = {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "head_dim": 64, "encoder_ffn_dim": 1024}
    assert network() == small | {"max_position_embeddings": 77}
    assert network(max_position_embeddings=9, dropout=0.0) == small | {"max_position_embeddings": 9}
    published = {"encoder_layers": 32, "encoder_ffn_dim": 5120, "encoder_attention_heads": 8, "head_dim": 64}
    assert network(d_model=64) == published | {"d_model": 64, "max_position_embeddings": 77}


@needs_minilm
def test_minilm_trains_and_leaves_out_what_it_cannot_read(
    tmp_path: Path, codec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = rows(6)
    described[1]["tags"] = ["心", "house"]
    pictures = write_rows(tmp_path / "mixed", described)
    text = {"kind": "minilm", "captions": ["{text}", "{tags}"]}
    trainer = trainer_for(recipe_for(pictures, codec, conditions={"text": text}, train={"steps": 2}), tmp_path / "run")
    assert "1 captions that the text encoder cannot read are left out ('心')" in capsys.readouterr().out
    trainer.train()
    assert "reading 10 captions" in capsys.readouterr().out  # and the empty one
    model = open_as(Latent, trainer.export())
    assert model.config.conditions["text"]["kind"] == "minilm" and set(model.networks()) == {"network", "codec"}
    assert model.denoiser_config.cross_attention_dim == 384  # type: ignore[union-attr]


# --- what the network is shown


class Shown:
    """Records the conditions that an objective is given."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.conditions, self.x0 = objective, [], []  # type: ignore[var-annotated]

    def __call__(self, denoiser: Any, x0: Any, condition: Any, **more: Any) -> Loss:
        self.conditions.append(condition)
        self.x0.append(x0)
        found: Loss = self.objective(denoiser, x0, condition, **more)
        return found


def shown(task: Any, steps: int = 1) -> Shown:
    task.objective = record = Shown(task.objective)
    task.network.train()
    for seed in range(steps):
        task.loss(task.data.gather(range(len(task.data))), torch.Generator().manual_seed(seed), CPU)
    return record


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_conditions_are_dropped_in_their_share(data: Path, share: float) -> None:
    conditions = {"text": JOINT | {"dropout": share}, "label": LABEL | {"dropout": 0.5}}
    task = task_for(recipe_for(data, "pixels", conditions=conditions))
    record = shown(task, 40)
    null = task.model.conditioner.parts["text"].null(1)
    length = null.context.shape[1]
    texts, labels, both = 0, 0, 0
    for condition in record.conditions:
        gone = condition.context_mask.sum(1) == length
        texts, labels = texts + int(gone.sum()), labels + int((condition.labels == 2).sum())
        both += int((gone & (condition.labels == 2)).sum())
        for row in gone.nonzero().flatten():
            torch.testing.assert_close(condition.context[row, :length], null.context[0])
        kept = [("warm", "cold")[i % 2] for i in range(12)]
        assert all(int(n) in (2, ["cold", "warm"].index(k)) for n, k in zip(condition.labels, kept, strict=True))
    assert texts / 480 == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)
    assert labels / 480 == pytest.approx(0.5, abs=0.08)
    assert both / 480 == pytest.approx(share * 0.5, abs=0.08)  # each for itself


def test_validation_drops_nothing_and_takes_first_captions(data: Path) -> None:
    values = latent_settings(data, "pixels", conditions={"text": JOINT | {"dropout": 1.0}, "label": LABEL})
    values["data"]["validation_fraction"] = 0.4
    task = task_for(latent_recipe(values))
    assert task.validation is not None
    task.objective = record = Shown(task.objective)
    task.network.eval()
    pictures = task.validation.gather(range(len(task.validation)))
    with torch.no_grad():
        a, b = (task.loss(pictures, torch.Generator().manual_seed(1), CPU) for _ in range(2))
    assert torch.equal(a.per_picture, b.per_picture)
    words = [task.kinds["text"].captions[id(task.validation)].first(i) for i in range(len(task.validation))]
    expected = task.model.conditioner.parts["text"].encode(words)
    torch.testing.assert_close(record.conditions[0].context, expected.context)
    assert not (record.conditions[0].labels == 2).any()


def test_latents_are_drawn_from_their_distribution(data: Path, codec: Path) -> None:
    task = task_for(recipe_for(data, codec))
    record = shown(task, 2)
    with torch.no_grad():
        moments = task.model.codec.encode(task.data.gather(range(12)).to_float())
    expected = moments.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(record.x0[0], expected)
    assert record.x0[0].shape == (12, 2, 8, 8) and not torch.equal(record.x0[0], record.x0[1])


def test_without_conditions(tmp_path: Path, data: Path, codec: Path) -> None:
    trainer = trainer_for(recipe_for(data, codec, train={"steps": 2, "sample_every": 2, "samples": 2}), tmp_path)
    trainer.train()
    model = open_as(Latent, trainer.export())
    assert isinstance(model.denoiser.network, UNet2DModel) and model.conditioner is None and model.reads == frozenset()
    (picture,) = api.load(tmp_path / "model.safetensors", device="cpu").generate(seed=1)
    assert picture.size == (16, 16)


def test_pixels_as_latents(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(recipe_for(data, "pixels", conditions={"label": LABEL}, train={"steps": 2}), tmp_path)
    trainer.train()
    model = open_as(Latent, trainer.export())
    assert model.shape == (3, 16, 16) and set(model.networks()) == {"network"}
    assert model.config.labels == ("cold", "warm")
    (picture,) = api.load(tmp_path / "model.safetensors", device="cpu").generate(seed=1, label="warm", steps=2)
    assert picture.size == (16, 16)


def test_embedded_labels(tmp_path: Path, data: Path) -> None:
    embedded = LABEL | {"kind": "embedded-label", "width": 8}
    values = latent_settings(data, "pixels", conditions={"label": embedded}, train={"steps": 2})
    values["model"]["network"] = CROSS
    trainer = trainer_for(latent_recipe(values), tmp_path)
    trainer.train()
    model = open_as(Latent, trainer.export())
    assert isinstance(model.denoiser.network, UNet2DConditionModel) and model.config.labels == ("cold", "warm")
    assert api.load(tmp_path / "model.safetensors", device="cpu").generate(seed=1, label="warm")[0].size == (16, 16)


def test_a_clip_tower_is_found_again(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is missing")
    (tmp_path / "clip").mkdir()
    folder = write_clip(tmp_path / "clip")
    described = [{"text": text} for text in ("red cat", "a cat", "heart", "red heart", "a red cat")]
    pictures = write_rows(tmp_path / "pictures", described)
    text = {"kind": "clip", "folder": str(folder)}
    recipe = recipe_for(pictures, "pixels", conditions={"text": text}, train={"steps": 1})
    trainer = trainer_for(recipe, tmp_path / "run")
    trainer.train()
    trainer.export()
    picture = api.load(tmp_path / "run" / "model.safetensors", device="cpu").generate("red cat", seed=1)[0]
    assert picture.info["sfumato"]["prompt"] == "red cat"


def test_a_text_transformer_is_trained_and_stored(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(recipe_for(data, "pixels", conditions={"text": JOINT}), tmp_path)
    name = "conditioner.text.model.embed_tokens.weight"
    before = trainer.task.network.state_dict()[name].clone()
    trainer.train()
    after = trainer.task.network.state_dict()[name]
    assert not torch.equal(before, after)
    model = open_as(Latent, trainer.export())
    assert model.config.conditions["text"]["tokenizer"]["words"] == ["blue", "fish", "heart", "red", "tree"]
    assert model.conditioner is not None and model.conditioner.network is not None
    stored = read_model(tmp_path / "model.safetensors").tensors
    average = trainer.ema.averages
    torch.testing.assert_close(stored[name], average[name])
    with trainer._averaged():
        task: Any = trainer.task
        expected = task.model.conditioner.encode([{"text": "red fish"}]).context
    torch.testing.assert_close(model.conditioner.encode([{"text": "red fish"}]).context, expected)


def test_held_out_captions_with_other_words_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A joint encoder knows the words of the training captions; it must not fall over a held-out one at step 1000."""
    described = [row | {"split": "train"} for row in rows(6)]
    held_out = ("red fish", "green fish", "red tree")
    described += [{"text": text, "kind": "odd", "split": "validation"} for text in held_out]
    pictures = write_rows(tmp_path / "pictures", described)
    train = {"steps": 1, "validate_every": 1, "sample_every": 1, "samples": 2}
    trainer = trainer_for(recipe_for(pictures, "pixels", conditions=BOTH, train=train), tmp_path / "run")
    assert trainer.task.validation is not None and len(trainer.task.validation) == 2
    assert "1 captions that the text encoder cannot read are left out ('green fish')" in capsys.readouterr().out
    trainer.train()
    assert any("validation_loss" in line for line in lines(tmp_path / "run"))
    assert trainer.task.model_config()["conditions"]["label"]["names"] == ["cold", "odd", "warm"]


# --- caches


def weights_after(recipe: LatentRecipe, folder: Path) -> dict[str, torch.Tensor]:
    trainer = trainer_for(recipe, folder)
    trainer.estimate()
    trainer.train()
    return everything(trainer)


def test_a_cache_changes_nothing(
    tmp_path: Path, data: Path, codec: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(data, codec, train={"steps": 3})
    first = weights_after(recipe, tmp_path / "first")
    assert "encoding 12 pictures" in capsys.readouterr().out
    (file,) = own_cache.iterdir()
    assert_equal(weights_after(recipe, tmp_path / "hit"), first)
    assert "captions" not in (said := capsys.readouterr().out) and "encoding" not in said
    shutil.rmtree(own_cache)
    assert_equal(weights_after(recipe, tmp_path / "gone"), first)
    file.write_bytes(file.read_bytes()[:-7])
    capsys.readouterr()
    assert_equal(weights_after(recipe, tmp_path / "damaged"), first)
    assert "is damaged and made anew" in capsys.readouterr().out
    shutil.rmtree(own_cache)
    own_cache.parent.mkdir(exist_ok=True)
    own_cache.write_text("in the way")
    assert_equal(weights_after(recipe, tmp_path / "unwritable"), first)
    assert "kept in memory only" in capsys.readouterr().out


def test_a_cache_belongs_to_pictures_and_codec(tmp_path: Path, data: Path, codec: Path, own_cache: Path) -> None:
    assert task_for(recipe_for(data, codec))._latents
    assert task_for(recipe_for(data, codec))._latents
    assert len(list(own_cache.iterdir())) == 1
    others = write_rows(tmp_path / "others", rows(11))
    assert task_for(recipe_for(others, codec))._latents
    assert len(list(own_cache.iterdir())) == 2
    file = read_model(codec / "model.safetensors")
    assert file.config is not None
    write_model(tmp_path / "moved.safetensors", {n: t * 1.001 for n, t in file.tensors.items()}, file.config)
    assert task_for(recipe_for(data, tmp_path / "moved.safetensors"))._latents
    assert len(list(own_cache.iterdir())) == 3


def test_a_cache_knows_nothing_of_the_precision(tmp_path: Path, data: Path, codec: Path, own_cache: Path) -> None:
    """Made by a bfloat16 training it is what a float32 training makes."""
    for precision in ("bf16", "fp32"):
        trainer_for(recipe_for(data, codec, train={"precision": precision}), tmp_path / precision).estimate()
        (file,) = own_cache.iterdir()
        file.rename(tmp_path / f"{precision}.safetensors")
    assert (tmp_path / "bf16.safetensors").read_bytes() == (tmp_path / "fp32.safetensors").read_bytes()


@needs_minilm
def test_text_states_come_from_the_cache(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = {"steps": 2, "precision": "bf16"}
    recipe = recipe_for(data, "pixels", conditions={"text": {"kind": "minilm"}}, train=train)
    first = weights_after(recipe, tmp_path / "first")
    assert "reading 7 captions" in capsys.readouterr().out
    assert_equal(weights_after(recipe, tmp_path / "second"), first)
    assert "captions" not in (said := capsys.readouterr().out) and "encoding" not in said
    task = task_for(recipe)
    condition = task._conditioner.encode([{"text": "red fish"}, {}])
    expected = task.model.conditioner.encode([{"text": "red fish"}, {}])
    torch.testing.assert_close(condition.context, expected.context, rtol=0, atol=2e-3)  # float16, without autocast
    assert torch.equal(condition.context_mask, expected.context_mask)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() == tmp_path / "cache" / "sfumato" / "training"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "sfumato" / "training"
    assert cache.key_of("ab", "c") != cache.key_of("a", "bc")


def test_augmented_pictures_are_encoded_each_time(tmp_path: Path, data: Path, codec: Path, own_cache: Path) -> None:
    values = latent_settings(data, codec, train={"steps": 2})
    values["data"]["flip"] = True
    trainer_for(latent_recipe(values), tmp_path / "run").train()
    assert not own_cache.exists()


# --- resuming


@pytest.mark.parametrize("importance", [False, True])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, data: Path, codec: Path, importance: bool) -> None:
    objective = {"importance": "second_moment", "importance_history": 1} if importance else {}
    values = latent_settings(data, codec, conditions=BOTH, objective=objective, train={"save_every": 3})
    values["model"]["schedule"] = {"name": "cosine", "steps": 4} if importance else {"name": "cosine"}
    recipe = latent_recipe(values)
    straight = trainer_for(recipe, tmp_path / "straight")
    straight.train()
    cut = trainer_for(recipe, tmp_path / "cut")
    cut.config = recipe.train.model_copy(update={"steps": 3})
    cut.learning_rate = straight.learning_rate  # type: ignore[method-assign]
    cut.train()
    again = resumed(recipe, tmp_path / "cut")
    assert again.step == 3
    again.train()
    assert_equal(everything(again), everything(straight))
    assert straight.export().read_bytes() == again.export().read_bytes()


def test_a_codec_that_was_trained_anew_is_not_gone_on_with(tmp_path: Path, data: Path, codec: Path) -> None:
    stage = tmp_path / "codec.safetensors"
    shutil.copy(codec / "model.safetensors", stage)
    recipe = recipe_for(data, stage, train={"steps": 2})
    trainer_for(recipe, tmp_path / "run").train()
    resumed(recipe, tmp_path / "run")
    file = read_model(stage)
    assert file.config is not None
    name = "codec.encoder.conv_in.bias"
    write_model(stage, file.tensors | {name: file.tensors[name] + 0.01}, file.config)
    with pytest.raises(UserError, match="the checkpoint is of another codec than"):
        resumed(recipe, tmp_path / "run")


def test_the_codec_stays_as_it_is_and_travels_along(tmp_path: Path, data: Path, codec: Path) -> None:
    trainer = trainer_for(recipe_for(data, codec, train={"steps": 2}), tmp_path)
    trainer.train()
    trained, whole = read_model(codec / "model.safetensors").tensors, read_model(trainer.export()).tensors
    assert all(torch.equal(whole[name], tensor) for name, tensor in trained.items())
    assert not any(name.startswith("codec.") for name in trainer.task.network.state_dict())


# --- codecs that do not fit


def scaled_by(codec: Path, target: Path, factor: float) -> Path:
    file = read_model(codec / "model.safetensors")
    assert file.config is not None
    network = file.config["network"] | {"scaling_factor": factor}
    write_model(target, file.tensors, file.config | {"network": network})
    return target


@pytest.mark.parametrize("flip", [False, True])
def test_a_wrong_scale_is_refused_with_the_right_one(tmp_path: Path, data: Path, codec: Path, flip: bool) -> None:
    """Before anything is written, and also where augmentation leaves nothing to be cached."""
    wrong = scaled_by(codec, tmp_path / "wrong.safetensors", 0.125)
    values = latent_settings(data, wrong)
    values["data"]["flip"] = flip
    with pytest.raises(UserError, match="scaling_factor of 0.125 should be about") as caught:
        run.train(latent_recipe(values), tmp_path / "run", device=CPU, say=lambda _: None)
    assert float(str(caught.value).rsplit(" ", 1)[1]) == pytest.approx(1, rel=0.02)
    assert not (tmp_path / "run").exists()


def test_runs_that_are_not_finished_are_refused(tmp_path: Path, data: Path, codec: Path) -> None:
    with pytest.raises(UserError, match="is not finished: it has no model.safetensors"):
        shutil.copytree(codec / "checkpoints", tmp_path / "part" / "checkpoints")
        recipe_for(data, tmp_path / "part")
    newest = state.newest(codec)
    assert newest is not None
    with pytest.raises(UserError, match="is a checkpoint, whose latents are not measured yet"):
        recipe_for(data, newest)
    with pytest.raises(UserError, match="no model at|there is no codec"):
        recipe_for(data, tmp_path / "away.safetensors")
    tiny.write_tiny_model(tmp_path / "ddpm.safetensors")
    with pytest.raises(UserError, match="holds a ddpm model, which has no first stage"):
        recipe_for(data, tmp_path / "ddpm.safetensors")


def test_the_codec_of_a_latent_model_serves_another(tmp_path: Path, data: Path, codec: Path) -> None:
    own = latent_recipe(latent_settings(data, codec)).stage()
    model = Latent.create(LatentConfig(size=own.config.size, codec=own.config, network=UNCONDITIONAL))
    kept = {name: tensor for name, tensor in model.tensors().items() if not name.startswith("codec.")}
    write_model(tmp_path / "m.safetensors", kept | own.tensors(), model.config.model_dump(mode="json"))
    found = latent_recipe(latent_settings(data, tmp_path / "m.safetensors")).stage()
    assert found.config == own.config
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in own.tensors().items())


UNCONDITIONAL = {
    "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"conditions": {"text": LABEL}}, "conditions.text reads prompts, so it cannot be of kind 'label'"),
        ({"conditions": {"label": JOINT}}, "conditions.label is for classes, so it cannot be of kind 'joint'"),
        ({"conditions": {"colour": LABEL, "label": LABEL}}, "conditions.colour and conditions.label both read the"),
        ({"conditions": {"text": {"kind": "clip"}}}, "clip and a folder belong together"),
        ({"conditions": {"text": JOINT | {"folder": "x"}}}, "folder does not belong to conditions of kind 'joint'"),
        ({"conditions": {"text": JOINT | {"dropout": 1.5}}}, "conditions.text.dropout: .*got 1.5"),
        ({"conditions": {"text": {"kind": "joint", "network": {"d_modle": 8}}}}, "did you mean 'd_model'"),
        ({"conditions": {"text": {"kind": "joint", "network": {"vocab_size": 8}}}}, "vocab_size follows from"),
        ({"data": {"path": ".", "size": 16, "label": "kind"}}, "no condition reads the classes of data.label=kind"),
        ({"objective": {"loss": "l3"}}, "l3"),
        ({"model": {"network": {"block_out_chanels": [8]}}}, "did you mean 'block_out_channels'"),
        ({"model": {"network": {"sample_size": 8}}}, "network.sample_size follows from"),
        ({"model": {"network": CODEC}}, "unknown"),
        ({"data": {"path": ".", "size": 16, "channels": 1}}, "the codec takes 3 channels, data.channels is 1"),
        ({"data": {"path": ".", "size": 15}}, "size 15 is not a multiple of the codec's factor 2"),
        ({"codek": "x"}, r"unknown key 'codek' \(did you mean 'codec'\?\)"),
    ],
)
def test_what_is_refused(data: Path, codec: Path, own: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        recipe_for(data, codec, **own)
    assert "\n" not in str(caught.value)


def test_data_that_do_not_fit(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="has no 'sort'"):
        task_for(recipe_for(data, "pixels", conditions={"label": {"kind": "label", "column": "sort"}}))
    with pytest.raises(DataError, match="conditions.label has no column; give it one, or data.label"):
        task_for(recipe_for(data, "pixels", conditions={"label": {"kind": "label"}}))
    short = JOINT | {"network": JOINT["network"] | {"max_position_embeddings": 3}}
    with pytest.raises(UserError, match="has 4 tokens; the text encoder reads at most 3"):
        task_for(recipe_for(data, "pixels", conditions={"text": short}))


# --- recipes


def test_data_and_size_come_from_the_codecs_run(tmp_path: Path, data: Path, codec: Path) -> None:
    values = latent_settings(data, codec)
    del values["data"], values["codec"]
    values["method"] = values.pop("recipe")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    found = recipes.load(str(file), codec=str(codec))
    assert isinstance(found, LatentRecipe)
    assert (found.data.path, found.data.size, found.codec) == (str(data), 16, str(codec))
    other = recipes.load(str(file), ["data.flip=true"], data=str(tmp_path), codec=str(codec))
    assert (other.data.path, other.data.size, other.data.flip) == (str(tmp_path), 16, True)
    with pytest.raises(UserError, match="mine.yaml names no codec; give --codec RUN"):
        recipes.load(str(file), data=str(data))
    with pytest.raises(UserError, match="names no data; give --data FOLDER"):
        recipes.load(str(file), codec=str(codec / "model.safetensors"))


def test_a_rehearsal_leaves_nothing(tmp_path: Path, data: Path, codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = contents(data) | contents(codec)
    said: list[str] = []
    run.rehearse(recipe_for(data, codec, conditions={"label": LABEL}), device=CPU, say=said.append)
    assert list((tmp_path / "temporary").iterdir()) == [] and contents(data) | contents(codec) == before
    assert said[-1].startswith("checked: ") and "latent model's file" in said[-1]


def test_a_dumped_recipe_is_the_same_recipe(data: Path, codec: Path) -> None:
    recipe = recipe_for(data, codec, conditions=BOTH)
    dumped = yaml.safe_load(run.dump(recipe))
    assert latent_recipe({"recipe": dumped.pop("method"), **dumped}) == recipe
    assert isinstance(open_as(CodecSystem, codec / "model.safetensors"), CodecSystem)


@pytest.mark.parametrize("classes", [True, False])
def test_the_recipe_of_classes_trains_and_draws(tmp_path: Path, codec: Path, data: Path, classes: bool) -> None:
    """Sub-folders are the classes; without a condition it draws whatever there is."""
    for i, record in enumerate(sorted(data.glob("*.png"))):
        place = tmp_path / "pictures" / ("warm", "cold")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(record, place)
    small = [
        "train.steps=5", "train.batch=4", "train.optimizer.warmup=1", "train.optimizer.lr=0.03", "train.sample_steps=2",
        "model.network.block_out_channels=[16,16,16]", "model.network.attention_head_dim=8", "train.ema.decay=0.1",
        "model.network.norm_num_groups=4",
        *([] if classes else ["conditions={}", "data.label=null"]),
    ]  # fmt: skip
    recipe = recipes.load("latent-class", small, str(tmp_path / "pictures"), str(codec))
    assert run.train(recipe, tmp_path / "run", device=CPU, say=lambda _: None) == "finished"
    model = api.load(tmp_path / "run")
    assert model.labels == (("cold", "warm") if classes else ())
    named = [{"label": "warm", "guidance": 8}, {"label": "cold", "guidance": 8}] if classes else [{}, {}]
    one, other = (model.generate(seed=1, steps=2, **how)[0].tobytes() for how in named)  # type: ignore[arg-type]
    assert (one != other) == classes
