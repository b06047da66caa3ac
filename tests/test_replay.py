"""A picture again from its own file: the same bytes, or one clear sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sfumato
from sfumato.backends.fast import FastSettings
from sfumato.diffusion.solvers import Churn, Heun
from sfumato.errors import UserError
from sfumato.images import read_settings, save_picture
from sfumato.replay import differences, replay
from sfumato.tasks import stored

from . import tiny


def again(picture: Image.Image, folder: Path, suffix: str = ".png") -> tuple[bytes, bytes]:
    """(bytes as drawn, bytes as replayed from the file alone)."""
    first, second = folder / f"first{suffix}", folder / f"second{suffix}"
    save_picture(picture, first)
    result = replay(first)
    assert result.differences == []
    save_picture(result.picture, second)
    return first.read_bytes(), second.read_bytes()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_same_bytes_for_every_sampler_and_format(sampler: str, suffix: str, tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    picture = model.generate(seed=3, steps=4, sampler=sampler, label="dog", guidance=2.0)[0]
    before, after = again(picture, tmp_path, suffix)
    assert before == after


@pytest.mark.parametrize("sampler", ["DPM++ 2M Karras", "DPM++ 2M SDE", "Euler a", "uni_pc", "dpm_adaptive", "LCM"])
def test_the_same_bytes_for_other_programs_names(sampler: str, tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    picture = model.generate(seed=3, steps=4, sampler=sampler, label="dog", guidance=2.0)[0]
    before, after = again(picture, tmp_path)
    assert before == after


def test_another_program_s_reader_reads_ours(tmp_path: Path) -> None:
    """sd-parsers, which reads what A1111, ComfyUI and others write."""
    parsers = pytest.importorskip("sd_parsers")
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    save_picture(model.generate(seed=3, steps=4, sampler="heun", label="dog", guidance=2.0)[0], tmp_path / "a.png")
    found = parsers.ParserManager().parse(tmp_path / "a.png")
    (sampler,) = found.samplers
    assert (sampler.name, sampler.model.name, sampler.model.hash) == ("Heun", "m", model.sha256[:10])
    expected = {"seed": "3", "steps": "4", "cfg_scale": "2.0", "scheduler": model.system.config.sampling.schedule}
    assert expected.items() <= sampler.parameters.items()
    assert found.metadata["Size"] == "8x8"


@pytest.mark.parametrize("index", [0, 5])
def test_a_picture_of_a_batch(index: int, tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    pictures = model.generate(count=8, seed=10, steps=3, label="all")
    before, after = again(pictures[index], tmp_path)
    assert before == after


def test_bfloat16(tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"), dtype="bfloat16")
    before, after = again(model.generate(seed=1, steps=3)[0], tmp_path)
    assert before == after


def test_what_cannot_be_replayed_gets_one_sentence(tmp_path: Path) -> None:
    stripped, foreign, lost = tmp_path / "s.png", tmp_path / "f.png", tmp_path / "l.png"
    Image.new("RGB", (8, 8)).save(stripped)
    save_picture(Image.new("RGB", (8, 8)), foreign, {"prompt": "a fox", "steps": 20, "seed": 1, "sampler": "Euler a"})
    file = tiny.write_tiny_model(tmp_path / "m.safetensors", labels=("seen nowhere else",))
    save_picture(sfumato.load(file).generate(seed=1, steps=2)[0], lost)
    file.unlink()
    for path, expected in (
        (stripped, "carries no settings"),
        (foreign, "was not drawn by Sfumato"),
        (lost, "is not here; name it with --model"),
        (tmp_path / "none.png", "there is no picture"),
    ):
        with pytest.raises(UserError, match=expected):
            replay(path)


def test_another_model_is_refused_and_the_right_one_taken(tmp_path: Path) -> None:
    file = tiny.write_tiny_model(tmp_path / "m.safetensors")
    picture = tmp_path / "p.png"
    save_picture(sfumato.load(file).generate(seed=1, steps=2)[0], picture)
    moved = file.rename(tmp_path / "moved.safetensors")
    assert replay(picture, moved).differences == []
    with pytest.raises(UserError, match="was drawn by model"):
        replay(picture, tiny.write_tiny_model(tmp_path / "other.safetensors", labels=("bird",)))


def test_what_differs_is_said() -> None:
    assert differences({"torch": "1", "cpu": "x"}, {"torch": "2", "cpu": "x"}) == ["torch: 1 then, 2 now"]


# --- settings that were edited ---------------------------------------------------------------------------------------

DAMAGED: list[tuple[str, Any, str]] = [
    ("width", "64", r"\(width: input should be a valid integer, got '64'\)"),
    ("width", 0, r"\(width: "),
    ("guidance", "x", r"\(guidance: input should be a valid number"),
    ("guidance", float("inf"), r"\(guidance: "),
    ("steps", "five", r"\(steps: "),
    ("steps", True, r"\(steps: "),
    ("sampler", 3, r"\(sampler: input should be a valid string, got 3\)"),
    ("batch.asked", [{"prompt": 3}], r"\(batch.asked.0.prompt: "),
    ("batch.asked", [{"label": 1.5}], r"\(batch.asked.0.label: "),
    ("batch.asked", [{"lable": "cat"}], r"did you mean|unknown key"),
    ("batch.asked", [], r"says of no picture"),
    ("batch.asked", "cat", r"\(batch.asked: "),
    ("batch.seed", "1", r"\(batch.seed: "),
    ("batch.index", None, r"index is null"),
    ("guidance_interval", "abc", r"\(guidance_interval: "),
    ("guidance_interval", [1.0], r"\(guidance_interval: "),
    ("guidance_rescale", [1.0], r"\(guidance_rescale: "),
    ("perp_neg", "a", r"\(perp_neg: "),
    ("opening", 3, r"\(opening: "),
    ("opening", {"vae": "/etc/passwd"}, r"\(opening.vae: "),
    ("opening", {"allow_pickle": True}, r"unknown key 'opening.allow_pickle'"),
    ("hires", {"width": "a"}, r"\(hires.width: "),
    ("hires", {"width": 8, "height": 8}, r"\(hires.strength: field required\)"),
    ("edit", {"picture": {"path": 3, "sha256": "0"}, "strength": 1.0}, r"\(edit.picture.path: "),
    ("edit", {"picture": {"sha256": "0"}, "strength": 1.0, "outpaint": [10**9, 0, 0, 0]}, r"\(edit.outpaint.0: "),
    ("edit", None, r"edit is null"),
    ("fast", {"merge": "much"}, r"\(fast.merge: "),
    ("tiled", "yes", r"\(tiled: "),
    ("map", "map.png", r"\(map: "),
    ("made_with", {}, r"\(made_with.device: field required\)"),
    ("made_with.kernel", ["sdpa"], r"\(made_with.kernel: "),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model and the settings of a picture that has most of what settings may have."""
    folder = tmp_path_factory.mktemp("sound")
    file = tiny.write_tiny_model(folder / "m.safetensors")
    words = {"label": "all", "guidance": 2.0, "guidance_rescale": 0.2}
    fast = FastSettings(interval=(0.1, 50.0), guidance_every=2)
    picture = sfumato.load(file).generate(seed=3, count=2, steps=2, fast=fast, **words)[1]
    return file, dict(picture.info["sfumato"])


def changed(settings: dict[str, Any], entry: str, value: Any) -> dict[str, Any]:
    """The settings with another value at "a.b"."""
    made = copy.deepcopy(settings)
    *groups, name = entry.split(".")
    inner: Any = made
    for group in groups:
        inner = inner[int(group) if isinstance(inner, list) else group]
    inner[int(name) if isinstance(inner, list) else name] = value
    return made


def entries(values: Any, above: str = "") -> Iterator[str]:
    """The dotted names of all values, groups and lists too."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield f"{above}{name}"
        if isinstance(value, dict | list):
            yield from entries(value, f"{above}{name}.")


@pytest.mark.parametrize(("entry", "value", "says"), DAMAGED, ids=[f"{e}={v!r:.30}" for e, v, _ in DAMAGED])
def test_damaged_settings_are_told_by_the_entry(
    entry: str, value: Any, says: str, sound: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file, settings = sound
    if value == float("inf"):  # which is not written, but Python's reader of JSON takes 1e999 for it
        with pytest.raises(UserError, match=says):
            stored.check(changed(settings, entry, value), "a picture")
        return
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "p.png", changed(settings, entry, value))
    with pytest.raises(UserError, match=says) as error:
        replay(tmp_path / "p.png", file)
    said = str(error.value)
    assert "are incomplete or damaged, so the picture cannot be drawn again" in said and "\n" not in said


def test_no_value_of_any_entry_ends_in_a_traceback(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Every entry with values of every type: a sentence, or a picture."""
    file, settings = sound
    kept = 0
    free = ("made_with.cpu", "made_with.torch", "made_with.sfumato", "batch.asked.1", "seed", "label", "model_hash")
    for entry in (one for one in entries(settings) if not one.startswith(free)):
        for value in ("x", -1, 1.5, 10**30, True, None, [], {}):
            save_picture(Image.new("RGB", (8, 8)), tmp_path / "p.png", changed(settings, entry, value), overwrite=True)
            try:
                kept += replay(tmp_path / "p.png", file).picture.size == (8, 8)
            except UserError as error:
                assert "\n" not in str(error), (entry, value)
    assert kept > 10


def test_a_missing_entry_is_named(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file, settings = sound
    for entry in ("steps", "sampler", "schedule", "guidance", "width", "height", "dtype", "model", "model_hash"):
        less = {key: value for key, value in settings.items() if key != entry}
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "p.png", less, overwrite=True)
        with pytest.raises(UserError, match=rf"\({entry}: field required\)"):
            replay(tmp_path / "p.png", file)


def test_pictures_of_before_named_labels_only(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file, settings = sound
    batch = {key: value for key, value in settings["batch"].items() if key != "asked"} | {"labels": [None, "dog"]}
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "p.png", settings | {"batch": batch})
    assert replay(tmp_path / "p.png", file).picture.info["sfumato"]["label"] == "dog"


# --- what is said of the result --------------------------------------------------------------------------------------


def test_a_sampler_of_one_s_own_is_told(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file, settings = sound
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "p.png", settings | {"sampler": "my_euler"})
    with pytest.raises(UserError, match="'my_euler', which is unknown here; where code of your own added it"):
        replay(tmp_path / "p.png", file)


def test_a_solver_object_is_told(tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    save_picture(model.generate(seed=3, steps=3, sampler=Heun(churn=Churn(2.0)))[0], tmp_path / "p.png")
    assert read_settings(tmp_path / "p.png")["sampler"].startswith("Heun(")
    with pytest.raises(UserError, match=r"drawn with a solver object, Heun\(.*, which its settings do not hold"):
        replay(tmp_path / "p.png")


def test_altered_weights_are_told(tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    next(model.denoiser.network.parameters()).data.add_(0.01)
    save_picture(model.generate(seed=3, steps=3)[0], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert "Model: m," in picture.info["parameters"] and "Model hash" not in picture.info["parameters"]
    for given in (None, tmp_path / "m.safetensors"):
        with pytest.raises(UserError, match=r"p.png was drawn by a model that had been altered in Python \(network\)"):
            replay(tmp_path / "p.png", given)
    assert "altered" in model.redraw(read_settings(tmp_path / "p.png") or {}).info["sfumato"]
    for odd in (3, {"parts": 3}, {}, None):
        settings = {"made_with": {}, "batch": {}, "altered": odd}
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "q.png", settings, overwrite=True)
        with pytest.raises(UserError, match=r"altered in Python \(its networks\)"):
            replay(tmp_path / "q.png")


def test_a_saved_model_s_pictures_are_replayed(tmp_path: Path) -> None:
    model = sfumato.load(tiny.write_tiny_model(tmp_path / "m.safetensors"))
    next(model.denoiser.network.parameters()).data.add_(0.01)
    before = model.generate(seed=3, steps=3)[0]
    model.save(tmp_path / "n.safetensors")
    picture = sfumato.load(tmp_path / "n.safetensors").generate(seed=3, steps=3)[0]
    assert before.tobytes() == picture.tobytes()
    first, second = again(picture, tmp_path)
    assert first == second


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (".png", ".png", "the same bytes"),
        (".webp", ".webp", "the same bytes"),
        (".jpg", ".jpg", "the same bytes"),
        (".webp", ".png", "the same pixels"),
        (".jpg", ".png", "the same picture, but for the loss of JPEG"),
        (".png", ".jpg", "the same picture, but for the loss of JPEG"),
    ],
)
def test_pixels_are_compared_across_formats(first: str, second: str, says: str, tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "m.safetensors")
    old, new = tmp_path / f"a{first}", tmp_path / f"b{second}"
    tiny.succeed("generate", "--model", tmp_path / "m.safetensors", "--seed", 1, "--steps", 2, "--out", old)
    assert tiny.succeed("replay", old, "--out", new).out.splitlines() == [f"{new}: {says}"]


def test_an_edited_picture_or_setting_is_told(tmp_path: Path) -> None:
    file = tiny.write_tiny_model(tmp_path / "m.safetensors")
    model, old = sfumato.load(file), tmp_path / "a.png"
    picture = model.generate(seed=1, steps=2)[0]
    settings = dict(picture.info["sfumato"])
    save_picture(picture, old, changed(settings, "batch.seed", 2))
    said = tiny.succeed("replay", old, "--out", tmp_path / "b.png").out
    assert "its pixels differ although nothing known does, so the settings were edited" in said
    save_picture(picture, old, changed(settings, "made_with.sfumato", "0.0.1"), overwrite=True)
    said = tiny.succeed("replay", old, "--out", tmp_path / "b.png", "--overwrite").out
    assert "differs: sfumato: 0.0.1 then" in said and said.endswith("b.png: the same pixels\n")
    save_picture(picture, old, changed(settings, "batch.seed", 2), overwrite=True)
    assert "although nothing known does" in tiny.succeed("replay", old, "--out", old, "--overwrite").out
