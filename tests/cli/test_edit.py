"""`sfumato edit`, and what `sfumato generate` does with a Stable Diffusion file: sizes, masks, replay, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.checkpoints.io import write_model
from sfumato.images import read_settings
from sfumato.systems.codec import CodecSystem

from .. import stable

STEPS = ("--steps", 3, "--sampler", "euler", "--guidance", 2)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single files of several layouts, and pictures."""
    folder = tmp_path_factory.mktemp("stable")
    for name in ("sd1", "sd1-inpainting", "sd2-depth", "sd-x4-upscaler"):
        stable.write(folder / f"{name}.safetensors", name)
    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "photo.png")
    mask = np.zeros((50, 70), dtype=np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(values[:, :, 0]).save(folder / "depth.png")
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def array(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def replayed(succeed: Callable, made: Path, *options: object) -> None:
    succeed("replay", made, "--out", "again.png", "--overwrite", *options)
    assert made.read_bytes() == Path("again.png").read_bytes()


def test_words_to_picture_and_back_to_the_same_bytes(here: Path, files: Path, succeed: Callable) -> None:
    done = succeed("generate", "a (red:1.3) hat", "--model", files / "sd1.safetensors", "--negative", "blue",
                   "--seed", 4, *STEPS, "--width", 60, "--height", 40, "--clip-skip", 1, "--out", "a.png")  # fmt: skip
    assert "Stable Diffusion 1; predicts eps" in done.err
    assert array(here / "a.png").shape == (40, 60, 3)
    told = read_settings(here / "a.png")
    assert told["clip_skip"] == 1 and told["prompt"] == "a (red:1.3) hat"
    replayed(succeed, here / "a.png")
    succeed("generate", "a red hat", "--model", files / "sd1.safetensors", "--negative", "blue", "--seed", 4, *STEPS,
            "--width", 60, "--height", 40, "--clip-skip", 1, "--out", "b.png")  # fmt: skip
    assert not np.array_equal(array(here / "a.png"), array(here / "b.png"))


@pytest.mark.parametrize("model", ["sd1", "sd1-inpainting"])
def test_pixels_outside_the_mask_stay(here: Path, files: Path, succeed: Callable, model: str) -> None:
    succeed("edit", files / "photo.png", "a hat", "--mask", files / "mask.png", "--model",
            files / f"{model}.safetensors", "--seed", 1, "--count", 2, *STEPS, "--out", "out")  # fmt: skip
    mask = array(files / "mask.png") == 255
    for seed in (1, 2):
        made = array(here / f"out/{seed}.png")
        assert np.array_equal(made[~mask], array(files / "photo.png")[~mask])
        assert not np.array_equal(made[mask], array(files / "photo.png")[mask])
    replayed(succeed, here / "out/2.png")


def test_a_box_and_strength(here: Path, files: Path, succeed: Callable) -> None:
    options = ("--model", files / "sd1.safetensors", "--seed", 1, *STEPS)
    succeed("edit", files / "photo.png", "a hat", "--box", "8,8,16,16", "--strength", 0.7, *options, "--out", "a.png")
    kept = np.ones((50, 70), dtype=bool)
    kept[8:24, 8:24] = False
    assert np.array_equal(array(here / "a.png")[kept], array(files / "photo.png")[kept])
    assert read_settings(here / "a.png")["edit"]["box"] == [8, 8, 16, 16]
    replayed(succeed, here / "a.png")


def test_the_original_may_have_moved(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    Image.open(files / "photo.png").save(here / "mine.png")
    succeed("edit", "mine.png", "a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--out", "a.png")
    (here / "mine.png").rename(here / "moved.png")
    refused = run("replay", "a.png", "--out", "b.png")
    assert refused.code == 2 and "name it with --original PATH" in refused.err
    replayed(succeed, here / "a.png", "--original", "moved.png")


def test_outpainting(here: Path, files: Path, succeed: Callable) -> None:
    succeed("edit", files / "photo.png", "a hat", "--outpaint", "10,0,6,3", "--model",
            files / "sd1-inpainting.safetensors", "--seed", 1, *STEPS, "--out", "a.png")  # fmt: skip
    made = array(here / "a.png")
    assert made.shape == (53, 86, 3) and np.array_equal(made[:50, 10:80], array(files / "photo.png"))
    replayed(succeed, here / "a.png")


def test_depth(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    options = ("--model", files / "sd2-depth.safetensors", "--seed", 1, *STEPS, "--out", "a.png")
    refused = run("edit", files / "photo.png", "a hat", *options)
    assert refused.code == 2 and "needs the picture's map of depths" in refused.err
    refused = run("generate", "a hat", *options)
    assert refused.code == 2 and "`sfumato edit` takes one" in refused.err
    succeed("edit", files / "photo.png", "a hat", "--depth", files / "depth.png", *options)
    replayed(succeed, here / "a.png")


def test_enlarging_by_a_model_made_for_it(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    options = ("--model", files / "sd-x4-upscaler.safetensors", "--seed", 1, *STEPS, "--out", "a.png")
    succeed("edit", files / "photo.png", "a hat", "--noise-level", 5, *options)
    assert array(here / "a.png").shape == (200, 280, 3)
    replayed(succeed, here / "a.png")
    refused = run("edit", files / "photo.png", "--upscale", 2, *options, "--overwrite")
    assert refused.code == 2 and "enlarges by 4, not by 2" in refused.err


def test_a_second_pass_and_an_enlarged_picture(here: Path, files: Path, succeed: Callable) -> None:
    options = ("--model", files / "sd1.safetensors", "--seed", 1, *STEPS)
    succeed("generate", "a hat", *options, "--width", 40, "--height", 32, "--hires", 1.5, "--out", "a.png")
    assert array(here / "a.png").shape == (48, 60, 3)
    replayed(succeed, here / "a.png")
    succeed("edit", files / "photo.png", "a hat", *options, "--upscale", 1.2, "--strength", 0.4, "--out", "b.png")
    assert array(here / "b.png").shape == (60, 84, 3)
    replayed(succeed, here / "b.png")


def test_pictures_on_the_way_between_prompts_and_seeds(here: Path, files: Path, succeed: Callable) -> None:
    options = ("--model", files / "sd1.safetensors", *STEPS)
    succeed("generate", "a hat", *options, "--seed", 1, "--towards", "a cat", "--towards-seed", 9, "--count", 3,
            "--out", "way")  # fmt: skip
    succeed("generate", "a hat", *options, "--seed", 1, "--out", "first.png")
    succeed("generate", "a cat", *options, "--seed", 9, "--out", "last.png")
    way = [array(here / f"way/1-{i}.png").astype(int) for i in range(3)]
    ends = [array(here / name).astype(int) for name in ("first.png", "last.png")]
    assert np.abs(way[0] - ends[0]).max() <= 1 and np.abs(way[2] - ends[1]).max() <= 1
    assert np.abs(way[1] - ends[0]).max() > 1 and np.abs(way[1] - ends[1]).max() > 1
    replayed(succeed, here / "way/1-1.png")


def test_a_variation_of_strength_0_is_the_picture_itself(here: Path, files: Path, succeed: Callable) -> None:
    options = ("--model", files / "sd1.safetensors", *STEPS, "--seed", 3)
    for name, strength in (("none", 0), ("some", 0.4)):
        succeed("generate", "a hat", *options, "--variation", 8, "--variation-strength", strength,
                "--out", f"{name}.png")  # fmt: skip
    succeed("generate", "a hat", *options, "--out", "plain.png")
    plain, none, some = (array(here / f"{name}.png") for name in ("plain", "none", "some"))
    assert np.array_equal(plain, none) and not np.array_equal(plain, some)
    replayed(succeed, here / "some.png")


def test_tiles_are_stored_and_repeated(here: Path, files: Path, succeed: Callable) -> None:
    succeed("generate", "a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--tiles", "always",
            "--width", 1024, "--height", 64, "--out", "a.png")  # fmt: skip
    assert read_settings(here / "a.png")["tiled"] is True
    replayed(succeed, here / "a.png")


def test_previews_are_written_step_by_step(here: Path, files: Path, succeed: Callable) -> None:
    succeed("generate", "a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--previews", "seen",
            "--out", "a.png")  # fmt: skip
    assert [p.name for p in sorted((here / "seen").iterdir())] == ["001.png", "002.png", "003.png"]
    assert array(here / "seen/003.png").ndim == 3


def test_previews_replace_nothing_unasked(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    options = ("a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--previews", "seen")
    (here / "seen").mkdir()
    (here / "seen/notes.png").write_bytes(b"mine")
    succeed("generate", *options, "--out", "a.png")
    kept = (here / "seen/002.png").read_bytes()
    for command in (("generate", *options), ("edit", files / "photo.png", *options)):
        refused = run(*command, "--out", "b.png")
        assert refused.code == 2 and "seen holds previews already (001.png); choose another" in refused.err
        assert "tensors used" not in refused.err, "it is told before the model is opened"
    assert (here / "seen/002.png").read_bytes() == kept and not (here / "b.png").exists()
    succeed("generate", *options, "--negative", "a cat", "--out", "b.png", "--overwrite")
    assert (here / "seen/002.png").read_bytes() != kept and (here / "seen/notes.png").read_bytes() == b"mine"
    for where in (("--out", "seen"), ("--out", "seen/100.png")):
        refused = run("generate", *options, *where, "--overwrite")
        assert refused.code == 2 and "the same names in seen" in refused.err


@pytest.mark.parametrize("option", ["picture", "mask", "depth", "map"])
def test_what_is_edited_is_not_written_over(here: Path, files: Path, run: Callable, option: str) -> None:
    for name in ("photo", "mask", "depth"):
        (here / f"{name}.png").write_bytes((files / f"{name}.png").read_bytes())
    (here / "out").mkdir()
    (here / "out/7.png").write_bytes((here / "photo.png").read_bytes())
    given = {"picture": (), "mask": ("--mask", "out/7.png"), "depth": ("--depth", "out/7.png")}
    first = "out/7.png" if option == "picture" else "photo.png"
    edit = ("edit", first, "a hat", *given.get(option, ())) if option != "map" else ("generate", "--map", "out/7.png")
    before = (here / "out/7.png").read_bytes()
    for where in (("--out", "out", "--seed", 7), ("--out", here / "out/7.png")):
        refused = run(*edit, "--model", files / "sd1.safetensors", *where, "--overwrite")
        says = "map of depths" if option == "depth" else option
        assert refused.code == 2 and f"7.png is the {says} itself, which a replay needs again" in refused.err
        assert "tensors used" not in refused.err
    assert (here / "out/7.png").read_bytes() == before


def test_a_replay_does_not_write_over_the_original(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    (here / "photo.png").write_bytes((files / "photo.png").read_bytes())
    succeed("edit", "photo.png", "a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--out", "a.png")
    refused = run("replay", "a.png", "--original", "photo.png", "--out", "photo.png", "--overwrite")
    assert refused.code == 2 and "photo.png is the original itself" in refused.err
    assert (here / "photo.png").read_bytes() == (files / "photo.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--guidance-interval", "abc"), "--guidance-interval takes two numbers, LOW,HIGH; got 'abc'"),
        (("--seed", 2**63), "--seed: a seed must be at least 0 and below 2^63, got 9223372036854775808"),
        (("--seed", 2**63 - 1), "seed must be at least 0 and below 2^63, got 9223372036854775807"),
        (("--seed", "9" * 5000), "--seed: '99999"),
        (("--out", ""), "--out: '' is neither a file nor a folder"),
        (("--out", "-"), "--out: '-' is neither a file nor a folder (standard output takes no pictures)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["generate", "edit"])
def test_what_needs_no_model_is_told_before_it_is_opened(
    here: Path, files: Path, run: Callable, command: str, options: tuple[object, ...], sentence: str
) -> None:
    first = (files / "photo.png",) if command == "edit" else ()
    refused = run(command, *first, "a hat", "--model", files / "sd1.safetensors", *options)
    assert refused.code == 2 and refused.err.startswith(f"sfumato: {sentence}") and len(refused.err) < 300
    assert not list(here.iterdir())


@pytest.mark.parametrize("option", ["--variation", "--towards-seed"])
def test_second_seeds_have_the_same_range(here: Path, files: Path, run: Callable, option: str) -> None:
    refused = run("generate", "a hat", "--model", files / "sd1.safetensors", "--count", 2, option, 10**30)
    assert refused.code == 2 and refused.err.startswith(f"sfumato: {option}: a seed must be at least 0 and below 2^63")


@pytest.mark.parametrize("place", ["picture", "--mask", "--depth"])
@pytest.mark.parametrize("missing", ["nowhere.png", "text.png"])
def test_pictures_are_read_before_the_model(here: Path, files: Path, run: Callable, place: str, missing: str) -> None:
    (here / "text.png").write_text("no picture")
    picture, options = (missing, ()) if place == "picture" else (files / "photo.png", (place, missing))
    refused = run("edit", picture, "a hat", "--model", files / "sd1.safetensors", *options)
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and missing in refused.err


def test_a_shape_in_the_alpha_of_a_mask_is_told(here: Path, files: Path, run: Callable) -> None:
    shape = np.zeros((50, 70, 4), dtype=np.uint8)
    shape[10:30, 20:50, 3] = 255
    Image.fromarray(shape).save(here / "mask.png")
    refused = run("edit", files / "photo.png", "a hat", "--mask", "mask.png", "--model", files / "sd1.safetensors")
    assert refused.code == 2 and "transparency is not read" in refused.err.splitlines()[-1]


def test_noise_beyond_what_an_upscaler_knows(here: Path, files: Path, run: Callable) -> None:
    for level in (1000, 2000):
        refused = run("edit", files / "photo.png", "a hat", "--noise-level", level, "--model",
                      files / "sd-x4-upscaler.safetensors", *STEPS, "--out", "a.png")  # fmt: skip
        assert refused.code == 2 and f"got noise level {level}" in refused.err.splitlines()[-1]
        assert not (here / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--strength", 1.5], "strength must be above 0 and at most 1"),
        (["--strength", 0], "strength must be above 0"),
        (["--box", "1,2,3"], "--box takes four whole numbers, X,Y,W,H"),
        (["--box", "1,2,3,x"], "--box takes four whole numbers"),
        (["--noise-level", 3], "belongs to models that enlarge"),
        (["--depth", "DEPTH"], "this model does not follow depths"),
        (["--dialect", "a1113"], "did you mean 'a1111'"),
        (["--clip-skip", 12], "skip must be a whole number from 0 to 1"),
        (["--prediction", "w"], "unknown prediction 'w'"),
        (["--vae", "nowhere.safetensors"], "no model at nowhere.safetensors"),
    ],
)
def test_one_clear_sentence(here: Path, files: Path, run: Callable, options: list[object], sentence: str) -> None:
    given = [files / "depth.png" if one == "DEPTH" else one for one in options]
    refused = run("edit", files / "photo.png", "a hat", "--model", files / "sd1.safetensors", *STEPS, *given)
    assert refused.code == 2 and sentence in refused.err.splitlines()[-1], refused.err
    assert not list(here.iterdir())


@pytest.mark.parametrize("prompt", ["a <lora:hat:1>", "a AND b", "[a:b:0.5]"])
def test_what_is_not_supported_in_a_prompt_is_refused(here: Path, files: Path, run: Callable, prompt: str) -> None:
    refused = run("generate", prompt, "--model", files / "sd1.safetensors", *STEPS, "--out", "a.png")
    assert refused.code == 2 and "not supported" in refused.err and not list(here.iterdir())


def test_another_first_stage(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    other = stable.model("sd1", seed=5)
    stage = CodecSystem(other.config.codec, other.codec)
    write_model(here / "vae.safetensors", stage.tensors(), stage.config.model_dump(mode="json"))
    options = ("--model", files / "sd1.safetensors", "--seed", 1, *STEPS)
    succeed("generate", "a hat", *options, "--out", "a.png")
    succeed("generate", "a hat", *options, "--vae", "vae.safetensors", "--out", "b.png")
    assert not np.array_equal(array(here / "a.png"), array(here / "b.png"))
    replayed(succeed, here / "b.png")
    (here / "vae.safetensors").rename(here / "moved.safetensors")
    refused = run("replay", "b.png", "--out", "c.png")
    assert refused.code == 2 and "name it with --vae PATH" in refused.err
    replayed(succeed, here / "b.png", "--vae", "moved.safetensors")


def test_info_accounts_for_every_tensor(here: Path, files: Path, succeed: Callable) -> None:
    told = succeed("info", files / "sd1-inpainting.safetensors", "--json").json
    assert told["system"] == "latent" and told["title"] == "Stable Diffusion 1 for inpainting"
    assert told["tensors"]["used"] > 100 and told["conditions"]["masked"] == {"kind": "masked", "latents": 4}


def test_a_sheet_of_several_prompts_names_them_all(here: Path, files: Path, succeed: Callable) -> None:
    succeed("generate", "a hat", "a cat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS, "--sheet",
            "--out", "a.png")  # fmt: skip
    told = read_settings(here / "a.png")
    assert told["prompts"] == ["a hat", "a cat"] and "prompt" not in told and told["sheet"] == [1, 2]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_outside_the_mask_stays(here: Path, files: Path, succeed: Callable, kind: str) -> None:
    clear = np.random.default_rng(3).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    clear[:25, :, 3] = 0
    Image.fromarray(clear).save(here / "clear.png")
    options = ("--model", files / "sd1.safetensors", "--seed", 1, *STEPS)
    done = succeed("edit", "clear.png", "a hat", "--box", "20,10,30,20", *options, "--out", f"a.{kind}")
    assert "transparency" not in done.err
    kept = np.ones((50, 70), dtype=bool)
    kept[10:30, 20:50] = False
    made = array(here / f"a.{kind}")
    assert np.array_equal(made[kept], clear[kept]) and (made[~kept][:, 3] == 255).all()
    if kind == "png":
        replayed(succeed, here / "a.png")
        succeed("edit", "clear.png", "a hat", "--outpaint", "6,0,0,4", *options, "--out", "wide.png")
        assert np.array_equal(array(here / "wide.png")[:50, 6:], clear)
        done = succeed("edit", "clear.png", "a hat", *options, "--out", "whole.png")
        assert "note: all of the picture is redrawn, so its transparency is lost" in done.err
        assert array(here / "whole.png").shape == (50, 70, 3)


def test_jpeg_outside_the_mask_is_told(here: Path, files: Path, succeed: Callable) -> None:
    options = ("a hat", "--model", files / "sd1.safetensors", "--seed", 1, *STEPS)
    masked = ("edit", files / "photo.png", "--mask", files / "mask.png", *options)
    told = succeed(*masked, "--out", "a.jpg").err
    assert "note: JPEG is not exact, so pixels outside of what is redrawn change as well; .png" in told
    assert "JPEG" not in succeed(*masked, "--out", "a.webp").err
    assert "JPEG" not in succeed("edit", files / "photo.png", *options, "--out", "b.jpg").err


def test_the_text_for_other_programs_says_what_was_done(here: Path, files: Path, succeed: Callable) -> None:
    def text(*options: object, command: tuple[object, ...] = ("generate",)) -> str:
        succeed(*command, "a hat", "--model", files / "sd1.safetensors", "--seed", 3, "--steps", 3, "--guidance", 2,
                *options, "--out", "a.png", "--overwrite")  # fmt: skip
        with Image.open(here / "a.png") as image:
            return str(image.info["parameters"])

    made = text("--variation", 8, "--variation-strength", 0.2, "--clip-skip", 1, "--sampler", "dpmpp_2m",
                "--schedule", "karras")  # fmt: skip
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in made and "Clip skip: 2" in made
    assert "Variation seed: 8, Variation seed strength: 0.2" in made and "Denoising" not in made
    made = text("--hires", 1.5, "--hires-strength", 0.4, "--width", 64, "--height", 64)
    assert "Size: 64x64" in made and "Denoising strength: 0.4" in made and "Hires upscale: 1.5" in made
    assert "Denoising strength: 0.4" in text("--strength", 0.4, command=("edit", files / "photo.png"))


# --- several prompts ----------------------------------------------------------------------------------------------


def test_prompts_from_a_file(here: Path, files: Path, run: Callable, succeed: Callable) -> None:
    (here / "prompts.txt").write_text("# three\na fox\n\n  a wolf \n# no\n", encoding="utf-8-sig")
    options = ("--model", files / "sd1.safetensors", "--seed", 7, *STEPS)
    succeed("generate", "--prompts", "prompts.txt", *options, "--out", "out")
    assert [read_settings(here / f"out/{seed}.png")["prompt"] for seed in (7, 8)] == ["a fox", "a wolf"]
    told = succeed("edit", files / "photo.png", "--prompts", "prompts.txt", *options, "--out", "changed", "--json").json
    assert [one["prompt"] for one in told["pictures"]] == ["a fox", "a wolf"]
    done = succeed("generate", "prompts.txt", *options, "--out", "name.png")
    assert "note: the prompt 'prompts.txt' is the name of a file; --prompts prompts.txt reads prompts" in done.err
    (here / "empty.txt").write_text("\n# nothing\n")
    (here / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for given, sentence in (
        (("a cat", "--prompts", "prompts.txt"), "prompts stand on the command line or in the file of --prompts"),
        (("--prompts", "nowhere.txt"), "nowhere.txt cannot be read: No such file or directory"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("--prompts", "bytes.txt"), "bytes.txt is not a text file in UTF-8"),
        (("--prompts", "prompts.txt", "--out", "a.png"), "a.png takes one picture, but 2 were asked for"),
    ):
        refused = run("generate", *given, *options)
        assert refused.code == 2 and sentence in refused.err and len(refused.err.splitlines()) == 1


def test_prompts_at_the_same_seeds(here: Path, files: Path, succeed: Callable) -> None:
    options = ("--model", files / "sd1.safetensors", "--seed", 7, "--count", 2, *STEPS)
    done = succeed("generate", "a fox", "a wolf", *options, "--same-seed", "--out", "out", "--json").json
    assert done["files"] == [f"out/{name}.png" for name in ("7-0", "8-0", "7-1", "8-1")]
    assert [(one["prompt"], one["seed"]) for one in done["pictures"]] == [
        ("a fox", 7), ("a fox", 8), ("a wolf", 7), ("a wolf", 8),
    ]  # fmt: skip
    succeed("generate", "a wolf", *options, "--out", "wolf")
    for seed in (7, 8):
        assert (here / f"out/{seed}-1.png").read_bytes() == (here / f"wolf/{seed}.png").read_bytes()
    replayed(succeed, here / "out/8-1.png")
    done = succeed("generate", "a fox", *options, "--same-seed", "--out", "one", "--json").json
    assert done["files"] == ["one/7.png", "one/8.png"]
    succeed("edit", files / "photo.png", "a fox", "a wolf", *options[:4], *STEPS, "--same-seed", "--out", "changed")
    assert sorted(path.name for path in (here / "changed").iterdir()) == ["7-0.png", "7-1.png"]
