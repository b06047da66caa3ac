"""Drawing from words: order and seeds, what guidance leads from and to, other sizes, replay, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import api
from sfumato.checkpoints.io import write_model
from sfumato.conditioners.words import WordVocabulary, minilm_installed
from sfumato.errors import UserError
from sfumato.images import read_settings, save_picture
from sfumato.replay import replay
from sfumato.systems.asked import Asked
from sfumato.systems.latent import Latent, LatentConfig
from sfumato.tasks.draw import Guidance, draw

from .. import tiny
from ..training.codec_cases import CODEC, CROSS, JOINT, PLAIN

needs_minilm = pytest.mark.skipif(not minilm_installed(), reason="all-MiniLM-L6-v2's package is missing")


def write_latent(path: Path, text: dict[str, Any] | None, **changes: Any) -> Path:
    """A latent model with random weights (factor 4, one halving), always the same."""
    codec = CODEC | {"block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3}
    codec |= {"up_block_types": ["UpDecoderBlock2D"] * 3, "scaling_factor": 1.0}
    values: dict[str, Any] = {
        "size": 16,
        "codec": {"kind": "kl", "size": 16, "network": codec},
        "conditions": {"text": text, "label": {"kind": "label", "names": ["cat", "dog"]}} if text else {},
        "network": CROSS if text else PLAIN,
        "prediction": {"parameterization": "v"},
        "sampling": {"sampler": "ddim", "steps": 3, "guidance": 3.0, "threshold": "none"},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Latent.create(LatentConfig.model_validate(values | changes))
    for part in model.networks().values():
        for parameter in part.parameters():
            with torch.no_grad():
                parameter.mul_(1.5)  # so that words are seen
    write_model(path, model.tensors(), model.config.model_dump(mode="json"))
    return path


def joint() -> dict[str, Any]:
    words = WordVocabulary.from_texts(["a red heart", "blue fish"])
    return {
        "kind": "joint", "network": JOINT["network"] | {"vocab_size": words.size}, "tokenizer": words.describe(),
        "padding": "longest",
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent(tmp_path_factory.mktemp("models") / "reader.safetensors", joint())


@pytest.fixture(scope="module")
def model(file: Path) -> api.Model:
    return sfumato.load(file, device="cpu")


def array(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


def told(picture: Image.Image) -> dict[str, Any]:
    settings: dict[str, Any] = picture.info["sfumato"]
    return settings


def test_prompts_are_outermost_and_seeds_run_on(model: api.Model) -> None:
    pictures = model.generate(["red heart", "blue fish", "a fish"], count=2, seed=5)
    said = [(told(p)["prompt"], told(p)["seed"]) for p in pictures]
    assert said == [
        ("red heart", 5), ("red heart", 6), ("blue fish", 7), ("blue fish", 8), ("a fish", 9), ("a fish", 10),
    ]  # fmt: skip
    assert all(p.size == (16, 16) for p in pictures)


def test_a_picture_is_its_own_whoever_shares_the_batch(model: api.Model) -> None:
    together = model.generate(["red heart", "blue fish", "a"], count=2, seed=5, label=["cat", "dog"])
    for i, picture in enumerate(together):
        (alone,) = model.generate(told(picture)["prompt"], seed=5 + i, label=("cat", "dog")[i % 2])
        assert np.abs(array(alone) - array(picture)).max() <= 1
    assert len({p.tobytes() for p in together}) == 6


def test_more_prompts_than_a_batch_takes(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.generate(["red heart", "blue"], count=3, seed=1, steps=2)
    monkeypatch.setattr(api, "_BATCH", 4)
    parts = model.generate(["red heart", "blue"], count=3, seed=1, steps=2)
    assert [told(p)["seed"] for p in parts] == [1, 2, 3, 4, 5, 6]
    assert [told(p)["prompt"] for p in parts] == ["red heart"] * 3 + ["blue"] * 3
    assert max(np.abs(array(a) - array(b)).max() for a, b in zip(whole, parts, strict=True)) <= 1


def test_what_is_said_changes_the_picture(model: api.Model) -> None:
    """Prompt, negative prompt, label and guidance each do something; the default guidance is the model's own."""
    ways: list[dict[str, Any]] = [
        {}, {"prompt": "red heart"}, {"prompt": "blue fish"}, {"prompt": "red heart", "negative": "blue fish"},
        {"prompt": "red heart", "guidance": 1}, {"prompt": "red heart", "guidance": 7}, {"label": "cat"},
        {"prompt": "red heart", "label": "cat"}, {"negative": "blue fish"},
        {"prompt": "red heart", "guidance_rescale": 0.7}, {"prompt": "red heart", "guidance_interval": (0.1, 2.0)},
    ]  # fmt: skip
    drawn = [model.generate(seed=1, **way)[0] for way in ways]
    assert len({p.tobytes() for p in drawn}) == len(ways)
    assert [told(p)["guidance"] for p in drawn] == [1, 3, 3, 3, 1, 7, 3, 3, 3, 3, 3]
    (same,) = model.generate("red heart", seed=1, guidance=3)
    assert same.tobytes() == drawn[1].tobytes()


def test_guidance_leads_from_the_null_or_the_negative(model: api.Model) -> None:
    """`null + w (conditional - null)`: towards itself nothing happens, and the empty prompt is the null."""
    (away,) = model.generate("red heart", negative="", seed=1)
    assert away.tobytes() == model.generate("red heart", seed=1)[0].tobytes()
    (itself,) = model.generate("red heart", negative="red heart", seed=1)
    (plain,) = model.generate("red heart", seed=1, guidance=1)
    assert np.abs(array(itself) - array(plain)).max() <= 1


def test_perp_neg_leads_away_from_what_is_not_the_prompts(model: api.Model) -> None:
    """Its weight changes the picture; a negative that says what the prompt says takes nothing away; 0 is the plain."""
    (plain,) = model.generate("red heart", seed=1, guidance=3)
    drawn = [
        model.generate("red heart", negative="blue fish", seed=1, perp_neg=weight)[0] for weight in (None, 0, 0.5, 1)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes() and len({p.tobytes() for p in [plain, *drawn]}) == 4
    assert [told(p).get("perp_neg") for p in drawn] == [None, None, 0.5, 1]
    (led,) = model.generate("red heart", negative="red heart", seed=1, perp_neg=1.0)
    assert np.abs(array(led) - array(plain)).max() <= 1


def test_pictures_without_a_negative_in_a_batch_are_led_plainly(model: api.Model) -> None:
    both = [Asked("red heart"), Asked("red heart", negative="a fish")]
    with_, alone = (
        draw(model.system, seeds=[1] * len(asked), asked=asked, guidance=Guidance(3.0, perp_neg=1.0))
        for asked in (both, both[:1])
    )
    assert torch.allclose(with_[0], alone[0], atol=1e-4) and not torch.allclose(with_[1], alone[0], atol=1e-2)


def test_a_models_own_weight_of_the_negative(tmp_path: Path, model: api.Model) -> None:
    """It acts where there is a negative, is stored as if it had been given, gives way to 0, and is replayed."""
    sampling = {"sampler": "ddim", "steps": 3, "guidance": 3.0, "perp_neg": 0.5, "threshold": "none"}
    file = write_latent(tmp_path / "own.safetensors", joint(), sampling=sampling)
    own, words = sfumato.load(file, device="cpu"), {"negative": "blue fish", "seed": 1}
    (drawn,), (off,) = own.generate("red heart", **words), own.generate("red heart", perp_neg=0, **words)
    assert drawn.tobytes() == model.generate("red heart", perp_neg=0.5, **words)[0].tobytes()
    assert off.tobytes() == model.generate("red heart", **words)[0].tobytes()
    assert told(drawn)["perp_neg"] == 0.5 and "perp_neg" not in told(own.generate("red heart", seed=1)[0])
    for name, picture in (("drawn.png", drawn), ("off.png", off)):
        save_picture(picture, tmp_path / name)
        assert replay(tmp_path / name, model=file).picture.tobytes() == picture.tobytes()


def test_settings_are_stored_and_give_the_same_bytes(tmp_path: Path, file: Path, model: api.Model) -> None:
    pictures = model.generate(
        ["red heart", "blue fish"], count=2, seed=3, negative="a", label="dog", guidance=4.0, guidance_rescale=0.5,
        guidance_interval=(0.05, 5.0), width=18, height=13,
    )  # fmt: skip
    save_picture(pictures[2], tmp_path / "a.png")
    settings = read_settings(tmp_path / "a.png")
    wanted = {
        "prompt": "blue fish", "negative": "a", "label": "dog", "seed": 5, "guidance": 4.0, "guidance_rescale": 0.5,
        "guidance_interval": [0.05, 5.0], "width": 18, "height": 13,
    }  # fmt: skip
    assert {key: settings[key] for key in wanted} == wanted
    again = replay(tmp_path / "a.png", model=file)
    assert again.differences == [] and again.picture.tobytes() == pictures[2].tobytes()
    save_picture(again.picture, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_a_models_own_interval_of_guidance(tmp_path: Path, model: api.Model) -> None:
    """It acts unless another is given, is stored as if it had been given, and is off where guidance is."""
    sampling = {"sampler": "ddim", "steps": 3, "guidance": 3.0, "guidance_interval": [0.1, 2.0], "threshold": "none"}
    own = sfumato.load(write_latent(tmp_path / "own.safetensors", joint(), sampling=sampling), device="cpu")
    (drawn,) = own.generate("red heart", seed=1)
    (given,) = model.generate("red heart", seed=1, guidance_interval=(0.1, 2.0))
    assert drawn.tobytes() == given.tobytes() and told(drawn)["guidance_interval"] == [0.1, 2.0]
    everywhere = own.generate("red heart", seed=1, guidance_interval=(0, 1e6))[0]
    assert everywhere.tobytes() == model.generate("red heart", seed=1)[0].tobytes() != drawn.tobytes()
    assert "guidance_interval" not in told(own.generate("red heart", seed=1, guidance=1)[0])
    asked = {"seeds": [1], "asked": [Asked("red heart")]}
    by_itself, by_hand = draw(own.system, **asked), draw(own.system, **asked, guidance=Guidance(3.0, interval=(0.1, 2)))
    assert torch.equal(by_itself, by_hand)
    save_picture(drawn, tmp_path / "a.png")
    assert replay(tmp_path / "a.png", model=tmp_path / "own.safetensors").picture.tobytes() == drawn.tobytes()


def test_what_is_off_is_not_stored(model: api.Model) -> None:
    settings = told(model.generate("red heart", seed=1)[0])
    assert not {"guidance_rescale", "guidance_interval", "negative", "label"} & settings.keys()


@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 9), (24, 16), (8, 31), (33, None)])
def test_other_sizes_are_exactly_as_asked(model: api.Model, width: int, height: int | None) -> None:
    (picture,) = model.generate("red heart", seed=1, width=width, height=height, steps=2)
    assert picture.size == (width, height or 16)
    assert (told(picture)["width"], told(picture)["height"]) == (width, height or 16)


def test_half_precision(file: Path, model: api.Model) -> None:
    half = sfumato.load(file, device="cpu", dtype="bfloat16")
    (rough,), (fine,) = (one.generate("red heart", seed=1, guidance=1, steps=2) for one in (half, model))
    assert np.abs(array(rough) - array(fine)).mean() < 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": "red haert"}, "words that this model never saw: 'haert' .*did you mean 'heart'"),
        ({"prompt": ["red", "心"]}, "'心'"),
        ({"prompt": "red", "negative": "green"}, "'green'"),
        ({"prompt": "red " * 9}, "has 11 tokens; this model reads at most 8"),
        ({"prompt": "red", "negative": "blue", "guidance": 1}, "works through guidance, which is off"),
        ({"prompt": "red", "guidance_rescale": 1.5}, r"must lie in \[0, 1\], got 1.5"),
        ({"prompt": "red", "guidance_rescale": 0.5, "guidance": 1}, "the rescaling of guidance does nothing where"),
        ({"guidance_interval": (0.1, 1.0)}, "the interval of guidance does nothing where"),
        ({"prompt": "red", "guidance_interval": (2.0, 1.0)}, "finite, rising noise-to-signal ratios, got 2, 1"),
        ({"prompt": "red", "guidance_interval": (0.0, float("inf"))}, "finite, rising"),
        ({"prompt": "red", "guidance_interval": (float("nan"), 1.0)}, "finite, rising"),
        ({"guidance": 3.0}, "needs a --label or a prompt"),
        ({"prompt": "red", "label": "cow"}, "unknown label 'cow'"),
        ({"prompt": "red", "perp_neg": 0.5}, "does nothing without one; give --negative"),
        ({"prompt": "red", "negative": "a", "perp_neg": -1}, "weight of the negative prompt must be a finite number"),
        ({"prompt": "red", "negative": "a", "perp_neg": "much"}, "perp_neg must be a number"),
        ({"prompt": "red", "width": 7}, "width must be 8 to 4096 pixels, got 7"),
        ({"prompt": "red", "height": 5000}, "height must be 8 to 4096 pixels, got 5000"),
    ],
)
def test_refused(model: api.Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        model.generate(**options)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_read(tmp_path: Path) -> None:
    free = sfumato.load(write_latent(tmp_path / "free.safetensors", None), device="cpu")
    assert free.generate(seed=1, width=20)[0].size == (20, 16)
    for options in ({"prompt": "red"}, {"negative": "red"}):
        with pytest.raises(UserError, match="model free does not read text, so it takes no"):
            free.generate(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no class labels"):
        free.generate(label="cat")


def test_a_codec_draws_nothing(tmp_path: Path, model: api.Model) -> None:
    config = model.system.config
    assert isinstance(config, LatentConfig)
    tensors = {n: t for n, t in model.system.tensors().items() if n.startswith("codec.")}
    write_model(tmp_path / "codec.safetensors", tensors, config.codec.model_dump(mode="json"))
    with pytest.raises(UserError, match="holds a codec model, which draws nothing by itself"):
        sfumato.load(tmp_path / "codec.safetensors")


@needs_minilm
def test_minilm_reads_english_only(tmp_path: Path) -> None:
    from sfumato.conditioners.minilm import MiniLM

    file = write_latent(tmp_path / "mini.safetensors", MiniLM().describe())
    model = sfumato.load(file, device="cpu")
    pictures = model.generate(["a red heart", "a fish with wings"], seed=2, negative="dull")
    assert len({p.tobytes() for p in pictures}) == 2
    for prompt in ("红心", "a 心", "сердце"):
        with pytest.raises(UserError, match="reads English only; it cannot read") as caught:
            model.generate(prompt)
        assert "\n" not in str(caught.value)


# --- the command


def test_the_command_takes_prompts(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = tiny.succeed(
        "generate", "red heart", "blue fish", "--model", file, "--seed", 4, "--count", 2, "--out", "out",
        "--negative", "a", "--guidance-rescale", 0.5, "--guidance-interval", "0.1,3", "--perp-neg", 0.7, "--json",
    )  # fmt: skip
    assert [Path(f).name for f in done.json["files"]] == ["4.png", "5.png", "6.png", "7.png"]
    settings = read_settings(tmp_path / "out" / "6.png")
    assert (settings["prompt"], settings["negative"], settings["seed"]) == ("blue fish", "a", 6)
    assert [settings[f"guidance_{name}"] for name in ("rescale", "interval")] == [0.5, [0.1, 3.0]]
    assert settings["perp_neg"] == 0.7
    tiny.succeed("replay", "out/6.png", "--model", file, "--out", "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out" / "6.png").read_bytes()
    tiny.succeed("generate", "red", "blue", "--model", file, "--seed", 4, "--sheet", "--out", "sheet.png")
    assert Image.open("sheet.png").size[0] > 2 * 96


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("red haert",), "'haert' (did you mean 'heart'?)"),
        (("red", "--guidance-interval", "3"), "--guidance-interval takes two numbers, LOW,HIGH; got '3'"),
        (("red", "--guidance-interval", "a,b"), "--guidance-interval takes two numbers"),
        (("red", "--negative", "blue", "--guidance", "1"), "works through guidance"),
        (("red", "blue", "--out", "a.png"), "takes one picture, but 2"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tiny.run("generate", *arguments, "--model", file)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and not list(tmp_path.iterdir())


def test_prompts_may_begin_with_the_same_seed(model: api.Model) -> None:
    planned: list[int] = []
    words = {"seed": 4, "steps": 2, "label": ["cat", "dog"], "on_plan": planned.append}
    both = model.generate(["a red heart", "blue fish"], count=3, same_seed=True, **words)
    assert [told(one)["seed"] for one in both] == [4, 5, 6, 4, 5, 6] and planned == [4]
    assert [told(one)["label"] for one in both] == ["cat", "dog", "cat"] * 2
    alone = model.generate("blue fish", count=3, **words)
    assert [array(one).tolist() for one in both[3:]] == [array(one).tolist() for one in alone]
    assert told(both[4]) == told(alone[1])
