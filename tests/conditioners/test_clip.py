"""CLIP's text tower from a folder: windows, layers, tokenizers, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.conditioners.clip import CLIPText, windows
from sfumato.conditioners.prompt import Reading
from sfumato.errors import ModelFileError, UserError

from . import encoders

VOCABULARY = encoders.clip_vocabulary()
START, END, BANG = (VOCABULARY[name] for name in ("<|startoftext|>", "<|endoftext|>", "!</w>"))
CAT, RED, HEART = (VOCABULARY[name] for name in ("cat</w>", "red</w>", "heart</w>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.write_clip(tmp_path_factory.mktemp("clip"))


def tower_states(ids: list[list[int]], layer: int = -1, *, norm: bool = True) -> torch.Tensor:
    tower = encoders.clip_tower()
    with torch.no_grad():
        hidden = tower(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states[layer]
        states: torch.Tensor = getattr(tower, "text_model", tower).final_layer_norm(hidden) if norm else hidden
    return states


def test_states_are_the_last_hidden_states_with_padding(folder: Path) -> None:
    ids = [START, CAT, RED, HEART, *[END] * 6]
    with torch.no_grad():
        expected = encoders.clip_tower()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(CLIPText(folder).states(["Cat  red heart"])[0], expected)


def test_empty_text_is_one_window_of_padding(folder: Path) -> None:
    torch.testing.assert_close(CLIPText(folder).states([""])[0], tower_states([[START, *[END] * 9]])[0])


def test_padding_is_the_tokenizers_own(tmp_path: Path) -> None:
    """Stable Diffusion 2 pads with "!", Stable Diffusion 1 with the end mark."""
    states = CLIPText(encoders.write_clip(tmp_path, pad="!</w>")).states(["cat"])[0]
    torch.testing.assert_close(states, tower_states([[START, CAT, END, *[BANG] * 7]])[0])


def test_long_texts_are_read_in_windows(folder: Path) -> None:
    states = CLIPText(folder).states(["cat " * 8 + "red heart", "cat"])
    first, second = [START, *[CAT] * 8, END], [START, RED, HEART, *[END] * 7]
    torch.testing.assert_close(states[0], torch.cat(list(tower_states([first, second]))))
    assert [len(one) for one in states] == [20, 10]


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_number_of_windows(count: int, expected: int) -> None:
    found = windows([7] * count, length=10, start=1, end=2, pad=0)
    assert len(found) == expected and all(len(window) == 10 and window[0] == 1 for window in found)
    assert sum(window.count(7) for window in found) == count


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skipped_layers(folder: Path, skip: int, norm: bool) -> None:
    states = CLIPText(folder, skip=skip, final_norm=norm).states(["cat"])[0]
    expected = tower_states([[START, CAT, *[END] * 8]], -(skip + 1), norm=norm)[0]
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("skip", [-1, 3, 1.0, True])
def test_impossible_skip(folder: Path, skip: object) -> None:
    with pytest.raises(UserError, match="skip must be a whole number from 0 to 2"):
        CLIPText(folder, skip=skip)  # type: ignore[arg-type]


def test_letters_without_tokens_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot read '猫'"):
        CLIPText(folder).states(["cat 猫"])


def test_more_windows_than_allowed(folder: Path) -> None:
    with pytest.raises(UserError, match="has 17 tokens; the text encoder reads at most 16"):
        CLIPText(folder, max_windows=2).states(["cat " * 17])
    with pytest.raises(UserError, match="max_windows must be 1 or more, got 0"):
        CLIPText(folder, max_windows=0)


def test_texts_are_captions_unless_told(folder: Path) -> None:
    """Brackets and BREAK are words of a caption, and grammar of a prompt."""
    encoder = CLIPText(folder)
    text = "red cat, !heart"
    plain = encoder.states([text])[0]
    assert torch.equal(CLIPText(folder, reading=Reading("a1111")).states([text])[0], plain)
    encoder.reading = Reading("a1111")
    weighted = encoder.states(["red (cat:1.5)"])[0]
    z = tower_states([[START, RED, CAT, *[END] * 7]])[0]
    scaled = z * torch.tensor([1, 1, 1.5, *[1] * 7])[:, None]
    torch.testing.assert_close(weighted, scaled * (z.mean() / scaled.mean()))
    assert len(encoder.states(["cat BREAK red"])[0]) == 20
    assert encoder.prompts().describe_tokens("(cat:1.5)").splitlines()[1] == f"  cat: {CAT} (x 1.5)"
    assert encoder.describe() == CLIPText(folder).describe()


def test_the_lower_limit_of_windows_holds(folder: Path) -> None:
    for encoder in (
        CLIPText(folder, max_windows=3, reading=Reading("a1111", max_windows=1)),
        CLIPText(folder, max_windows=1, reading=Reading("a1111", max_windows=3)),
        CLIPText(folder, max_windows=1, reading=Reading("a1111")),
    ):
        with pytest.raises(UserError, match="has 9 tokens; the text encoder reads at most 8$"):
            encoder.states(["cat " * 9])


def test_half_precision_files_run_in_float32(tmp_path: Path) -> None:
    folder = encoders.write_clip(tmp_path, dtype=torch.float16)
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    states = CLIPText(folder).states(["cat"])[0]
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, tower_states([[START, CAT, *[END] * 8]])[0], rtol=0, atol=5e-3)


def test_all_files_in_one_folder(folder: Path, tmp_path: Path) -> None:
    for file in [*(folder / "text_encoder").iterdir(), *(folder / "tokenizer").iterdir()]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.testing.assert_close(CLIPText(tmp_path).states(["cat"]), CLIPText(folder).states(["cat"]))


def test_whole_clip_gives_its_text_tower(tmp_path: Path) -> None:
    """The files of a two-tower model: its vision part and projections are left aside."""
    folder = encoders.write_clip(tmp_path)
    path, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    vision = {"vision_model.pre_layrnorm.weight": torch.ones(2), "logit_scale": torch.ones(())}
    save_file({**load_file(path), **vision, "text_projection.weight": torch.ones(2, 2)}, path)
    config.write_text(json.dumps({"model_type": "clip", "text_config": encoders.clip_config()}))
    torch.testing.assert_close(CLIPText(folder).states(["cat"])[0], tower_states([[START, CAT, *[END] * 8]])[0])


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = encoders.write_clip(tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.final_layer_norm.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelFileError, match=r"does not fit its config \(Missing key.*final_layer_norm\.weight"):
        CLIPText(folder).states(["cat"])
    path.write_bytes(b"no")
    with pytest.raises(ModelFileError, match="cannot read"):
        CLIPText(folder).states(["cat"])


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        CLIPText(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match=r"holds no model\.safetensors"):
        CLIPText(tmp_path)
    folder = encoders.write_clip(tmp_path)
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ModelFileError, match="holds no CLIP tokenizer"):
        CLIPText(folder)
    (folder / "tokenizer" / "merges.txt").touch()
    config = folder / "text_encoder" / "config.json"
    for content, sentence in (
        ('{"model_type": "t5"}', "is not a CLIP text tower's"),
        ("[]", "must hold a JSON object"),
        ("{", "is not JSON"),
    ):
        config.write_text(content)
        with pytest.raises(ModelFileError, match=sentence):
            CLIPText(folder)
