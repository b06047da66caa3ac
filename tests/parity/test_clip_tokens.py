"""CLIP's vocabulary, tokens and states against transformers and against published ids."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.conditioners import vocabulary
from sfumato.conditioners.clip import PromptEncoder, check_skip, text_tower
from sfumato.conditioners.prompt import Reading
from sfumato.errors import ModelFileError, UserError

START, END = 49406, 49407

# ids without marks. The first two are published in Apple's ml-stable-diffusion (StableDiffusionTests.swift); the others
# are what OpenAI's own `SimpleTokenizer` (clip-anytorch 2.6.0, with ftfy) gives.
PUBLISHED = [
    ("a photo of an astronaut riding a horse on mars", [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]),
    (
        "Apple CoreML developer tools on a Macbook Air are fast",
        [3055, 19622, 5780, 10929, 5771, 525, 320, 20617, 1922, 631, 1953],
    ),
    ("A  Photo\n\tof a CAT  ", [320, 1125, 539, 320, 2368]),
    (
        "it's, the dogs' We'LL 1234 3.5mm",
        [585, 568, 267, 518, 3255, 262, 649, 1342, 272, 273, 274, 275, 274, 269, 276, 2848],
    ),
    (
        "Straße naïve façade ÀÉÎ",
        [1894, 127, 253, 324, 1097, 35689, 563, 778, 10067, 1928, 36149, 3459, 127, 362],
    ),
    ("東京タワー", [48338, 21078, 105, 34941, 2429, 107, 30391]),
    ("Привет мир", [26302, 16370, 29503, 110, 22176, 141, 480, 38018, 16701, 141, 478]),
    ("🐈\u200d⬛ 🏳️\u200d🌈!!! ...", [2074, 230, 4244, 7930, 505, 27093, 23038, 995, 678]),
    (
        "(masterpiece:1.2), [x] {y} <z> @#$%^&*",
        [263, 12066, 281, 272, 269, 273, 2361, 314, 343, 316, 346, 344, 348, 283, 345, 285, 31, 2, 3, 4, 61, 5, 265],
    ),
    ("wow! a ! b", [2781, 256, 320, 256, 321]),
    ("antidisestablishmentarianism", [3120, 4262, 7726, 12658, 1585, 44351]),
    ("a\u00a0b\u3000c\u200bd", [320, 321, 322, 9844, 323]),
    ("", []),
]


@functools.cache
def tokenizer() -> Any:
    return vocabulary.clip_tokenizer()


@functools.cache
def tower(eos: int = END) -> Any:
    """A tiny tower over the whole vocabulary; weights larger than at the start, so that every token matters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, bos_token_id=START, eos_token_id=eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval().requires_grad_(False)
        for p in model.parameters():
            p.data.normal_(std=0.4)
    return model


def ids(*parts: list[int], pad: int = END) -> list[int]:
    inner = [i for part in parts for i in part]
    return [START, *inner, END, *[pad] * (75 - len(inner))]


def run(rows: list[list[int]], mask: list[list[int]] | None = None) -> Any:
    with torch.no_grad():
        return tower()(
            input_ids=torch.tensor(rows),
            attention_mask=None if mask is None else torch.tensor(mask),
            output_hidden_states=True,
        )


# --- the vocabulary -----------------------------------------------------------------------------------------------


def test_the_file_is_the_published_one() -> None:
    folder = files(vocabulary.__name__)
    data = folder.joinpath(vocabulary.FILE).read_bytes()
    assert hashlib.sha256(data).hexdigest() == vocabulary.SHA256 and len(data) == 1_356_917
    assert vocabulary.SHA256 in folder.joinpath("README.md").read_text(encoding="utf-8")
    assert "Copyright (c) 2021 OpenAI" in folder.joinpath("LICENSE").read_text(encoding="utf-8")


def test_every_file_of_it_is_installed() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = set(declared["package-data"]["sfumato"])
    assert {f"conditioners/vocabulary/{name}" for name in ("*.gz", "README.md", "LICENSE")} <= patterns


def test_a_damaged_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "SHA256", "0" * 64)
    with pytest.raises(ModelFileError, match="is damaged: install sfumato again"):
        vocabulary.tables.__wrapped__()


@pytest.mark.parametrize(("text", "expected"), PUBLISHED)
def test_published_ids(text: str, expected: list[int]) -> None:
    assert tokenizer()(text)["input_ids"] == [START, *expected, END]


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer that transformers builds from vocab.json and merges.txt of the same merges."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokens, merges = vocabulary.tables()
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    marks = {"bos_token": vocabulary.START, "eos_token": vocabulary.END, "unk_token": vocabulary.END}
    settings_ = {**marks, "pad_token": vocabulary.END, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return CLIPTokenizer.from_pretrained(folder)


def test_the_same_as_from_files(from_files: Any) -> None:
    ours = tokenizer()
    assert ours.get_vocab() == from_files.get_vocab() and len(ours) == 49408
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "model_max_length"):
        assert getattr(ours, name) == getattr(from_files, name)
    texts = [text for text, _ in PUBLISHED] + ["word " * 90]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert ours(texts, **options)["input_ids"] == from_files(texts, **options)["input_ids"]


@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_any_text_as_from_files(from_files: Any, text: str) -> None:
    assert tokenizer()(text)["input_ids"] == from_files(text)["input_ids"]


def test_padding_with_a_bang_changes_no_word() -> None:
    """OpenCLIP pads with id 0, "!" within a word; a prompt's own "!" stays 256."""
    row = PromptEncoder(tokenizer(), tower(), pad=0).tokens("wow!", Reading("plain")).windows[0]
    assert [token.id for token in row] == [2781, 256]


# --- states -------------------------------------------------------------------------------------------------------

PROMPT, IDS = PUBLISHED[0]


@pytest.mark.parametrize("dialect", ["a1111", "comfy", "compel", "plain"])
@pytest.mark.parametrize("pad", [END, 0])
def test_one_window_is_transformers_own(dialect: str, pad: int) -> None:
    (found,) = PromptEncoder(tokenizer(), tower(), pad=pad).encode([PROMPT], Reading(dialect))
    expected = run([ids(IDS, pad=pad)])
    assert torch.equal(found.states, expected.last_hidden_state[0])
    assert torch.equal(found.pooled, expected.pooler_output[0])


def test_padding_as_transformers_pads() -> None:
    row = tokenizer()(PROMPT, padding="max_length", max_length=77)["input_ids"]
    assert row == ids(IDS)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skipped_layers(skip: int, norm: bool) -> None:
    """diffusers' `clip_skip`: `hidden_states[-(skip + 1)]`, then the last layer norm; the pooled output stays."""
    (found,) = PromptEncoder(tokenizer(), tower(), skip=skip, final_norm=norm).encode([PROMPT])
    output = run([ids(IDS)])
    hidden = output.hidden_states[-(skip + 1)]
    expected = getattr(tower(), "text_model", tower()).final_layer_norm(hidden) if norm else hidden
    torch.testing.assert_close(found.states, expected[0])
    assert torch.equal(found.pooled, output.pooler_output[0])


def test_pooled_output_by_an_old_config() -> None:
    """Stable Diffusion 1's published config says that the end mark is 2; transformers then takes the highest id."""
    model = tower(2)
    model.load_state_dict(tower().state_dict())
    one, two = (PromptEncoder(tokenizer(), m).encode([PROMPT])[0] for m in (model, tower()))
    assert torch.equal(one.pooled, two.pooled)


def test_projected_pooled_output() -> None:
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPTextModelWithProjection(tower().config).eval().requires_grad_(False)
    (found,) = PromptEncoder(tokenizer(), model).encode([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids(IDS)]))
    assert torch.equal(found.pooled, expected.text_embeds[0]) and found.pooled.shape == (model.config.projection_dim,)
    torch.testing.assert_close(found.states, expected.last_hidden_state[0])


CAT, DOG, A = [2368], [1929], [320]


def test_a1111_weights() -> None:
    (found,) = PromptEncoder(tokenizer(), tower()).encode(["a (cat:1.5) [dog]"], Reading())
    z = run([ids(A, CAT, DOG)]).last_hidden_state[0]
    scaled = z.clone()
    scaled[2] *= 1.5
    scaled[3] /= 1.1
    torch.testing.assert_close(found.states, scaled * (z.mean() / scaled.mean()))
    assert abs(found.states.mean() - z.mean()) < 1e-6


def test_comfy_weights() -> None:
    encoder = PromptEncoder(tokenizer(), tower(), pad=0)
    (found,) = encoder.encode(["a (cat:1.5) (dog:0.3)"], Reading("comfy"))
    z, empty = run([ids(A, CAT, DOG, pad=0), ids(pad=0)]).last_hidden_state
    expected = z.clone()
    expected[2] = (z[2] - empty[2]) * 1.5 + empty[2]
    expected[3] = (z[3] - empty[3]) * 0.3 + empty[3]
    torch.testing.assert_close(found.states, expected)


# compel 2.5.1, `EmbeddingsProvider(tokenizer(), tower(), truncate=False)`, for the prompt below: places 1 to 4 and 76,
# the first four channels.
COMPEL_STATES = [
    [0.03979, 0.02935, -0.09193, 1.14283],
    [-0.34323, -0.01528, -0.12096, 1.09308],
    [0.5883, -0.01212, -0.06883, 1.20917],
    [0.53827, 0.02991, -0.08219, 1.23276],
    [0.66522, -0.02752, -0.0839, 1.10562],
]


def test_compel_weights() -> None:
    """Against the formula and against that program."""
    (found,) = PromptEncoder(tokenizer(), tower()).encode(["a (cat)1.5 (dog)0.3 (horse)0.7"], Reading("compel"))
    row = ids(A, CAT, DOG, [4558])
    empty = run([ids()]).last_hidden_state[0]
    w = torch.ones(77, 1)
    w[2], w[3], w[4] = 1.5, 0.3, 0.7

    def weighted(hidden: int | None) -> torch.Tensor:
        mask = [[int(i != hidden) for i in range(77)]]
        z: torch.Tensor = run([row], mask).last_hidden_state[0]
        return empty + w * (z - empty)

    shares = torch.tensor([1.0, math.tan(0.7 * math.pi / 2), math.tan(0.3 * math.pi / 2)])
    variants = torch.stack([weighted(None), weighted(3), weighted(4)])
    torch.testing.assert_close(found.states, torch.einsum("n,nlc->lc", shares / shares.sum(), variants))
    torch.testing.assert_close(found.states[[1, 2, 3, 4, 76], :4], torch.tensor(COMPEL_STATES), rtol=0, atol=2e-5)


def test_weights_of_one_change_nothing() -> None:
    encoder = PromptEncoder(tokenizer(), tower())
    plain = encoder.encode(["a cat dog"], Reading("plain"))[0].states
    for text, dialect in (("a (cat:1) dog", "a1111"), ("a (cat:1.0) dog", "comfy"), ("a (cat)1 dog", "compel")):
        assert torch.equal(encoder.encode([text], Reading(dialect))[0].states, plain)


# --- long prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["a1111", "comfy", "compel", "plain"])
def test_two_hundred_tokens_are_all_used(dialect: str) -> None:
    encoder = PromptEncoder(tokenizer(), tower())
    texts = [" ".join(["cat"] * 199 + [last]) for last in ("dog", "horse")]
    one, two = encoder.encode(texts, Reading(dialect))
    assert one.states.shape == (3 * 77, 16)
    windows = run([ids(CAT * 75), ids(CAT * 75), ids(CAT * 49, DOG)]).last_hidden_state
    torch.testing.assert_close(one.states, windows.flatten(0, 1))
    assert not torch.equal(one.states, two.states) and torch.equal(one.pooled, two.pooled)


def test_batches_change_nothing() -> None:
    encoder = PromptEncoder(tokenizer(), tower())
    texts = ["a (cat:1.2)", "dog", "", "cat " * 80, "a (cat:1.2)"]
    for alone, together in zip((encoder.encode([t])[0] for t in texts), encoder.encode(texts), strict=True):
        torch.testing.assert_close(alone.states, together.states)
        torch.testing.assert_close(alone.pooled, together.pooled)


def test_breaks_and_weights_over_windows() -> None:
    (found,) = PromptEncoder(tokenizer(), tower()).encode(["a cat BREAK (dog:2)"], Reading())
    z = run([ids(A, CAT), ids(DOG)]).last_hidden_state
    scaled = z[1].clone()
    scaled[1] *= 2
    torch.testing.assert_close(found.states[:77], z[0])  # the window without weights is as it was
    torch.testing.assert_close(found.states[77:], scaled * (z[1].mean() / scaled.mean()))


def test_commas() -> None:
    encoder = PromptEncoder(tokenizer(), tower())
    text = "cat " * 70 + ", " + "dog " * 10
    lengths = {
        options: [len(window) for window in encoder.tokens(text, Reading("a1111", *options)).windows]
        for options in ((), (0,), (3,))
    }
    assert lengths == {(): [71, 10], (0,): [75, 6], (3,): [75, 6]}


@settings(max_examples=40)
@given(text=st.text("abc XYZ .,é猫🐈0'’\n", max_size=30))
def test_plain_text_keeps_its_tokens(text: str) -> None:
    """Without signs of grammar, every dialect gives the tokens of the text as it stands."""
    expected = tokenizer()(text, add_special_tokens=False)["input_ids"]
    encoder = PromptEncoder(tokenizer(), tower())
    for dialect in ("a1111", "comfy", "plain"):
        assert [t.id for window in encoder.tokens(text, Reading(dialect)).windows for t in window] == expected
    words = re.sub(r",(\S)", r", \1", text)  # compel parts words at commas
    expected = tokenizer()(words, add_special_tokens=False)["input_ids"]
    assert [t.id for window in encoder.tokens(text, Reading("compel")).windows for t in window] == expected


# --- what is told -------------------------------------------------------------------------------------------------


def test_tokens_for_people() -> None:
    encoder = PromptEncoder(tokenizer(), tower())
    assert encoder.describe_tokens("a (blue:1.3) Straße 🐈 BREAK [dog]", Reading()) == "\n".join(
        [
            "window 1 of 2: 8 of 75 tokens",
            "  a: 320",
            "  blue: 1746 (x 1.3)",
            "  Straße: 1894 127 253 324",
            "  🐈: 2074 486",
            "window 2 of 2: 1 of 75 tokens",
            "  dog: 1929 (x 0.9091)",
        ]
    )
    assert encoder.describe_tokens("") == "window 1 of 1: 0 of 75 tokens"
    tokens = encoder.tokens("cat " * 73 + "antidisestablishmentarianism", Reading("plain"))
    assert tokens.count == 79 and [len(words) for words in tokens.words()] == [74, 1]
    assert tokens.words()[0][-1] == ("antidise", (3120, 4262), 1.0)
    assert tokens.words()[1] == [("stablishmentarianism", (7726, 12658, 1585, 44351), 1.0)]


def test_what_the_encoder_refuses() -> None:
    encoder = PromptEncoder(tokenizer(), tower(), reading=Reading("plain", max_windows=1))
    with pytest.raises(UserError, match="has 76 tokens; the text encoder reads at most 75$"):
        encoder.states(["cat " * 76])
    with pytest.raises(UserError, match="has 2 tokens; the text encoder reads .* 75, and here they take 2 windows"):
        encoder.tokens("cat BREAK cat", Reading(max_windows=1))
    with pytest.raises(UserError, match=r"cannot read '<\|endoftext\|>'"):
        encoder.states(["a cat <|endoftext|> dog"])
    with pytest.raises(UserError, match="pad must be a token's id from 0 to 49407, got 49408"):
        PromptEncoder(tokenizer(), tower(), pad=49408)
    with pytest.raises(UserError, match="skip must be a whole number from 0 to 2, got 3"):
        PromptEncoder(tokenizer(), tower(), skip=3)
    with pytest.raises(UserError, match="from 0 to 11, got -1"):
        check_skip(-1, 12)


def test_tower_from_tensors() -> None:
    """As a single file gives them: a config and names that begin with `text_model.`."""
    names = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tower().state_dict().items()}
    made = text_tower(tower().config.to_dict(), names, what="a file")
    (one,), (two,) = (PromptEncoder(tokenizer(), m).encode([PROMPT]) for m in (made, tower()))
    assert torch.equal(one.states, two.states)
    del names["text_model.final_layer_norm.bias"]
    with pytest.raises(ModelFileError, match=r"a file does not fit its config .*final_layer_norm\.bias"):
        text_tower(tower().config.to_dict(), names, what="a file")
