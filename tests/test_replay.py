"""A picture again from its own file: the same bytes, or one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import sfumato
from sfumato.errors import UserError
from sfumato.images import save_picture
from sfumato.replay import differences, replay

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
    assert (sampler.name, sampler.model.name, sampler.model.hash) == ("heun", "m", model.sha256[:10])
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
