"""The front door: `sfumato.load` and `Model.generate`, on tiny models."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import models
from sfumato.conditioners.words import minilm_installed
from sfumato.diffusion.solvers import Churn, Euler
from sfumato.errors import UserError
from sfumato.images import read_settings
from sfumato.networks.attention import Attention, AttnProcessor

from . import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("models") / "cat-dog.safetensors")


@pytest.fixture(scope="module")
def model(file: Path) -> sfumato.Model:
    return sfumato.load(file, device="cpu")


def test_load_by_path(file: Path, model: sfumato.Model) -> None:
    for path in (file, str(file)):
        assert sfumato.load(path, device="cpu").sha256 == model.sha256
    assert model.name == "cat-dog" and model.labels == ("cat", "dog")
    assert model.system.shape == (3, 8, 8) and model.dtype == "float32"


@pytest.mark.skipif(not models.names(), reason="the box holds no model in this installation")
def test_load_by_name() -> None:
    by_name, best = sfumato.load(models.BEST, device="cpu"), sfumato.load(device="cpu")
    assert by_name.name == best.name == models.BEST and by_name.sha256 == best.sha256
    assert sfumato.load(models.weights(models.BEST), device="cpu").sha256 == best.sha256


def test_names_without_a_box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_FOLDER", tmp_path / "box")
    assert models.names() == []
    with pytest.raises(sfumato.UserError, match="the box holds no model in this installation"):
        sfumato.load()


def test_names_of_a_box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        tiny.write_tiny_model(tmp_path / name / "model.safetensors")
    (tmp_path / "without-weights").mkdir()
    assert models.names() == ["a", "b"]
    assert sfumato.load("a", device="cpu").name == "a"
    with pytest.raises(sfumato.UserError, match="'c'.*the box holds: a, b"):
        sfumato.load("c")


def test_generate(model: sfumato.Model) -> None:
    pictures = model.generate(count=3, seed=5, steps=2)
    assert all(isinstance(p, Image.Image) for p in pictures) and len(pictures) == 3
    assert all(p.size == (8, 8) and p.mode == "RGB" for p in pictures)
    again = model.generate(count=3, seed=5, steps=2)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pictures, again, strict=True))
    other = model.generate(count=3, seed=8, steps=2)
    assert not any(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pictures, other, strict=True))


def test_settings_are_in_info(model: sfumato.Model) -> None:
    (picture,) = model.generate(seed=3, steps=2, sampler="heun", schedule="karras", label="DOG", guidance=2)
    asked = {
        "model": "cat-dog", "model_hash": model.sha256, "seed": 3, "steps": 2, "sampler": "heun", "schedule": "karras",
        "label": "DOG", "guidance": 2, "width": 8, "height": 8, "dtype": "float32",
    }  # fmt: skip
    told = picture.info["sfumato"]
    assert {key: told[key] for key in asked} == asked


def test_drawn_seed_is_in_info(model: sfumato.Model) -> None:
    first, second = (model.generate(count=2, steps=1) for _ in range(2))
    seeds = [p.info["sfumato"]["seed"] for p in (*first, *second)]
    assert seeds[1] == seeds[0] + 1 and seeds[3] == seeds[2] + 1 and seeds[0] != seeds[2]


def test_label_and_guidance_change_the_picture(model: sfumato.Model) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"label": "cat"}, {"label": "dog"}, {"label": "cat", "guidance": 4}, {"label": "cat", "guidance": 1},
    ]  # fmt: skip
    drawn = {np.asarray(model.generate(seed=1, steps=3, **one)[0]).tobytes() for one in settings}
    assert len(drawn) == len(settings)


def test_sampler_may_be_a_solver(model: sfumato.Model) -> None:
    by_name, by_object = (model.generate(seed=1, steps=3, sampler=s)[0] for s in ("ddim", Euler()))
    assert np.array_equal(np.asarray(by_name), np.asarray(by_object))
    assert by_object.info["sfumato"]["sampler"] == "euler"
    churned = model.generate(seed=1, steps=3, sampler=Euler(churn=Churn(amount=3)))[0]
    assert churned.info["sfumato"]["sampler"].startswith("Euler(")


def test_on_step_is_called(model: sfumato.Model) -> None:
    seen: list[tuple[int, ...]] = []

    def watch(x: torch.Tensor, level: Any, prediction: Any, noise: Any) -> torch.Tensor:
        seen.append((len(seen), prediction is not None, *x.shape))
        return x

    model.generate(count=2, seed=0, steps=4, on_step=watch)
    assert seen == [(i, i > 0, 2, 3, 8, 8) for i in range(5)]


def test_on_step_can_change_and_cancel(model: sfumato.Model) -> None:
    white = model.generate(seed=0, steps=2, on_step=lambda x, level, prediction, noise: torch.ones_like(x))[0]
    assert np.asarray(white).min() == 255

    class Enough(Exception):
        pass

    def cancel(x: torch.Tensor, level: Any, prediction: Any, noise: Any) -> torch.Tensor:
        raise Enough

    with pytest.raises(Enough):
        model.generate(seed=0, steps=2, on_step=cancel)


def test_a_hook_that_returns_nothing_only_watches(model: sfumato.Model) -> None:
    seen: list[int] = []
    watched = model.generate(seed=0, steps=3, on_step=lambda x, *_: seen.append(len(x)))[0]
    assert seen == [1] * 4 and np.array_equal(np.asarray(watched), np.asarray(model.generate(seed=0, steps=3)[0]))


def test_a_picture_saved_by_itself_keeps_its_settings(model: sfumato.Model, tmp_path: Path) -> None:
    (picture,) = model.generate(seed=3, steps=2)
    picture.save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == picture.info["sfumato"]


def test_types_by_their_other_names(file: Path) -> None:
    found = [sfumato.load(file, device="cpu", dtype=d).dtype for d in ("fp16", torch.bfloat16, "half")]
    assert found == ["float16", "bfloat16", "float16"]


@pytest.mark.skipif(not minilm_installed(), reason="the text encoder is not installed")
def test_a_network_may_be_wrapped() -> None:
    model = sfumato.load("emoji", device="cpu")
    before = np.asarray(model.generate("a red heart", seed=0, steps=2)[0])
    model.denoiser.network = Doubled(model.denoiser.network)
    assert np.array_equal(before, np.asarray(model.generate("a red heart", seed=0, steps=2)[0]))


def test_what_alters_the_networks_is_in_the_settings(file: Path) -> None:
    model = sfumato.load(file, device="cpu")
    assert model.generate(seed=0, steps=1)[0].info["sfumato"]["model_hash"] == model.sha256
    network, processors = model.denoiser.network, model.denoiser.network.attn_processors

    def told() -> Any:
        settings = model.generate(seed=0, steps=1)[0].info["sfumato"]
        assert ("model_hash" in settings) != ("altered" in settings)
        assert settings.get("altered", {"model_hash": model.sha256})["model_hash"] == model.sha256
        return settings.get("altered", {}).get("parts")

    network.set_attn_processor(Foreign())
    assert told() == ["attention processors"]
    network.set_attn_processor(processors)
    assert told() is None
    model.denoiser.network = Doubled(network)
    assert told() == ["network"]
    model.denoiser.network = network
    assert told() is None
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert told() == ["network"]


class Foreign:
    """A processor of a user that computes as ours does."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        return AttnProcessor()(attn, hidden_states, *given, **named)  # type: ignore[no-any-return]


@pytest.mark.parametrize("to", [None, "diffusers"])
def test_a_model_is_saved(file: Path, model: sfumato.Model, tmp_path: Path, to: str | None) -> None:
    target = tmp_path / ("folder" if to else "m.safetensors")
    said = ["the folder's scheduler is a plain DDIMScheduler"] if to else []
    assert [note.partition(",")[0] for note in model.save(target, to)] == said
    again = sfumato.load(target, device="cpu")
    assert again.system.config == model.system.config
    pictures = [one.generate(seed=4, steps=2)[0].tobytes() for one in (model, again)]
    assert pictures[0] == pictures[1]
    with pytest.raises(UserError, match="exists already; choose another name"):
        model.save(target, to)


class Doubled(torch.nn.Module):
    """A network of a user around another."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **slots: Any) -> torch.Tensor:
        return (self.inner(*given, **slots) + self.inner(*given, **slots)) / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(file: Path, model: sfumato.Model, dtype: str) -> None:
    half = sfumato.load(file, device="cpu", dtype=dtype)
    assert next(half.denoiser.network.parameters()).dtype == getattr(torch, dtype)
    (picture,) = half.generate(seed=0, steps=3)
    assert picture.info["sfumato"]["dtype"] == dtype
    whole = np.asarray(model.generate(seed=0, steps=3)[0]).astype(float)
    assert np.abs(np.asarray(picture) - whole).mean() < 8


def test_unconditional_model(tmp_path: Path) -> None:
    free = sfumato.load(tiny.write_tiny_model(tmp_path / "free.safetensors", labels=()), device="cpu")
    assert free.labels == ()
    assert "label" not in free.generate(seed=0, steps=1)[0].info["sfumato"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"tiles": "always"}, "has no first stage, so there is nothing to compute in tiles"),
    ],
)
def test_refused_when_opened(file: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(sfumato.UserError, match=said):
        sfumato.load(file, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a fox"}, "takes no prompt"),
        ({"prompt": ["a fox"]}, "takes no prompt"),
        ({"negative": ""}, "takes no negative prompt"),
        ({"perp_neg": 0.5}, "does nothing without one; model .* does not read text"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2000}, "steps must be at most"),
        ({"sampler": "ddimm"}, "did you mean 'ddim'"),
        ({"schedule": "trailling"}, "did you mean 'trailing'"),
        ({"label": "dgo"}, "did you mean 'dog'.*known: cat, dog"),
        ({"label": "dog", "guidance": -1}, "guidance must be a finite number of at least 0"),
        ({"label": "dog", "guidance": float("nan")}, "guidance must be a finite number of at least 0"),
        ({"guidance": 2}, "guidance needs a --label"),
        ({"width": 16}, "width 16 cannot be had"),
        ({"dialect": "comfy"}, "takes no dialect"),
        ({"clip_skip": 1}, "takes no clip skip"),
        ({"variation_strength": 0.3}, "variation_strength does nothing without variation"),
        ({"hires_strength": 0.3}, "hires_strength does nothing without hires"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"width": 64.0}, "width must be a whole number, got 64.0"),
        ({"seed": [1, 2]}, "seed must be a whole number"),
        ({"guidance": "7"}, "guidance must be a number, got '7'"),
        ({"negative": ["x"]}, "negative must be a text"),
        ({"schedule": 3}, "schedule must be a text"),
        ({"sampler": Euler}, r"the class Euler; give a solver, Euler\(\)"),
        ({"sampler": 3}, "sampler must be a name or a solver"),
        ({"label": "dog", "guidance_interval": (None, 5)}, "the interval of guidance must be two finite"),
        ({"fast": "2"}, "no level '2' of savings"),
    ],
)
def test_refused_when_drawing(model: sfumato.Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(sfumato.UserError, match=said) as caught:
        model.generate(**options)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


# --- folders of diffusers -----------------------------------------------------------------------------------------


def _pipeline(folder: Path, **scheduler: Any) -> Any:
    """A `DDPMPipeline` with a tiny random UNet, saved into `folder`."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()
    pipeline = DDPMPipeline(unet, DDPMScheduler(**scheduler))
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_folder(tmp_path: Path, schedule: str, prediction: str) -> None:
    """The same UNet output and one DDIM step that agrees with diffusers' own scheduler."""
    from diffusers import DDIMScheduler

    pipeline = _pipeline(tmp_path, beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    ours = sfumato.load(tmp_path, device="cpu")
    assert ours.labels == () and ours.system.shape == (3, 16, 16) and ours.name == tmp_path.name
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t, previous = 600, 599 - 1000 // 10 + 1  # a step of ten, on indices that both know
    level, after = (ours.denoiser.schedule.level(float(time)) for time in (t, previous))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        theirs = pipeline.unet(x, t).sample
        predicted = ours.denoiser(x, level)
        stepped = scheduler.step(theirs, t, x).prev_sample
    assert (predicted.out - theirs).abs().max() < 1e-5
    own = after.alpha * predicted.x0 + after.sigma * predicted.eps
    assert (own - stepped).abs().max() < 1e-4 * stepped.abs().max()


def test_diffusers_folder_draws(tmp_path: Path) -> None:
    _pipeline(tmp_path)
    (picture,) = sfumato.load(tmp_path, device="cpu").generate(seed=0, steps=2)
    assert picture.size == (16, 16)
    assert tiny.succeed("info", tmp_path, "--json").json["system"] == "ddpm"


def test_diffusers_folder_without_safetensors(tmp_path: Path) -> None:
    _pipeline(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(sfumato.UserError, match="holds no safetensors weights.*is a pickle and is not opened"):
        sfumato.load(tmp_path)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"_class_name": "DDPMPipeline", "beta_schedule": "sigmoid", "act": 1}'])
def test_damaged_diffusers_folder(tmp_path: Path, file: str, content: str) -> None:
    _pipeline(tmp_path)
    (tmp_path / file).write_text(content)
    if file == "model_index.json" and content.startswith("{"):
        return  # that one is whole
    with pytest.raises(sfumato.UserError) as caught:
        sfumato.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_of_the_first_form_are_understood(model: sfumato.Model) -> None:
    """Pictures of earlier versions name the labels of their batch, and nothing else was to be said then."""
    pictures = model.generate(label=["cat", "dog"], count=2, seed=4, steps=2)
    settings = dict(pictures[1].info["sfumato"])
    batch = dict(settings["batch"])
    labels = [said["label"] for said in batch.pop("asked")]
    again = model.redraw(settings | {"batch": batch | {"labels": labels}})
    assert labels == ["cat", "dog"] and again.tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize("worked", [True, False])
def test_names_come_with_the_collector_as_it_was(worked: bool) -> None:
    """Python's collector rests while they are imported, no longer."""
    (gc.enable if worked else gc.disable)()
    try:
        assert sfumato.GaussianDiffusion.__name__ == "GaussianDiffusion" and gc.isenabled() == worked
        with pytest.raises(AttributeError, match="Gausian"):
            sfumato.Gausian  # noqa: B018
        assert gc.isenabled() == worked
    finally:
        gc.enable()


def test_a_label_may_be_the_place_of_its_class(model: sfumato.Model) -> None:
    def drawn(label: Any) -> list[Any]:
        return [np.asarray(one).tolist() for one in model.generate(label=label, count=2, seed=3, steps=2)]

    assert drawn(1) == drawn("dog") != drawn(0) and drawn([0, 1]) == drawn(["cat", "dog"])
    for wrong, said in ((2, "not among the model's 2 classes"), (1.5, "got 1.5"), ([True], "got True")):
        with pytest.raises(sfumato.UserError, match=said):
            drawn(wrong)
