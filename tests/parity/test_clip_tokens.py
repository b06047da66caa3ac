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

from sfumato.conditioners import clip_tokens, vocabulary
from sfumato.conditioners.clip import PromptEncoder, check_skip, text_tower
from sfumato.conditioners.clip_tokens import ClipTokenizer
from sfumato.conditioners.prompt import Reading
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.clip_text import CLIPTextConfig, CLIPTextModel

START, END = 49406, 49407
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}

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
def tokenizer() -> ClipTokenizer:
    return clip_tokens.clip_tokenizer()


@functools.cache
def their_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens, merges = vocabulary.tables()
    return CLIPTokenizer(vocab=dict(tokens), merges=list(merges))


@functools.cache
def their_tower() -> Any:
    """A tiny tower over the whole vocabulary; weights larger than at the start, so that every token matters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPTextModel(CLIPTextConfig(**SIZES)).eval().requires_grad_(False)
        for p in model.parameters():
            p.data.normal_(std=0.4)
    return model


@functools.cache
def tower(eos: int = END) -> CLIPTextModel:
    """Ours with the same weights."""
    return text_tower(SIZES | {"eos_token_id": eos}, their_tower().state_dict(), what="their weights")


def ids(*parts: list[int], pad: int = END) -> list[int]:
    inner = [i for part in parts for i in part]
    return [START, *inner, END, *[pad] * (75 - len(inner))]


def run(rows: list[list[int]], mask: list[list[int]] | None = None) -> Any:
    with torch.no_grad():
        return their_tower()(
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
    assert tokenizer().ids(text) == expected


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
    check(tokenizer(), from_files, [*(text for text, _ in PUBLISHED), "word " * 90])


def check(ours: ClipTokenizer, theirs: Any, texts: list[str]) -> None:
    """The same marks, ids, pieces and offsets."""
    marks = (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id)
    assert (ours.start, ours.end, ours.unknown, ours.pad) == marks
    for text in texts:
        expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = ours.read(text)
        assert [piece.id for piece in found] == ours.ids(text) == expected["input_ids"], text
        assert [piece.text for piece in found] == theirs.convert_ids_to_tokens(expected["input_ids"]), text
        assert [piece.span for piece in found] == expected["offset_mapping"], text


NASTY = [
    "", " ", "\n\t \r\n", "a\x00b", "\ufeffbom", "soft\u00adhyphen", "zero\u200bwidth\u200djoiner",
    "a\u2028b\u2029c\x85d", "e\u0301 \u00e9 E\u0301", "\u212b \u2126 \ufb01 \uff21\uff22", "\u1e9b\u0323",
    "İstanbul ıI ſ ẞ ΑΣ ς", "n\u0303\u0303o", "don't DON'T 'tis rock'n'roll it''s 're 'VE’s",
    "1234567 ½ ² Ⅳ ٣ ১", "a_b-c--d...e!?!? (x)[y]{z}<w>", "C++ C# @me #tag $5 50%",
    "https://example.org/a?b=c&d=e", "<|startoftext|>", "a <|endoftext|> b", "<|ENDOFTEXT|>",
    "<|endoftext|><|endoftext|>x", "< |endoftext| >", "<|endoftex", "</w> a</w> cat</w>", "Ġword Ċ ġ",
    "🐈 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ☃️ 👍🏽", "猫と犬 漢字かな交じり文 한국어 ภาษาไทย", "العربية עברית हिन्दी",
    "𝕬𝖇𝖈 𝟙𝟚 \U000e0001", "\u0300", "word ", "x", "ñ", "a\u00a0b\u3000c\u2009d\u1680e",
    "Straße NAÏVE façade Œuvre Ǆ ǅ", "\ud7ff\ue000\uffff", "tab\tin\vthe\fmiddle", "'", "''", "'s", "’s",
    "o'clock's",
]  # fmt: skip


def test_nasty_texts_as_transformers() -> None:
    check(tokenizer(), their_tokenizer(), NASTY)


SIGNS = "aeiou 'strvmldnT’\u0301éÉ1½<|>endofx/\n\u00a0🐈猫!.,"


@settings(max_examples=300)
@given(text=st.one_of(st.text(max_size=40), st.text(SIGNS, max_size=40)))
def test_any_text_as_transformers(text: str) -> None:
    check(tokenizer(), their_tokenizer(), [text])


LETTERS = ["a", "b", "c", "t", "!", "a</w>", "b</w>", "c</w>", "t</w>", "!</w>", "ca", "cat</w>"]
TEXTS = ["", "Cat a!", "<S>cat<e> b", "cat <new> cat<pad>", "<NEW>  <new>! <other>", "dog! < new >"]
TEXTS += ["<|endoftext|>a", "<x>a"]


def small(folder: Path, *, whole: bool = False, **files: Any) -> Path:
    """A folder with a small tokenizer; with `whole` the two tables stand in tokenizer.json."""
    tokens = [*LETTERS, vocabulary.START, vocabulary.END]
    merges = ["c a", "ca t</w>"]
    folder.mkdir()
    if whole:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        pairs = BPE({token: i for i, token in enumerate(tokens)}, [("c", "a"), ("ca", "t</w>")])
        made = json.loads(Tokenizer(pairs).to_str())
        made["added_tokens"] = files.pop("added", [])
        (folder / "tokenizer.json").write_text(json.dumps(made))
    else:
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def told(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True, **flags}


FILES: dict[str, dict[str, Any]] = {
    "tables alone": {},
    "plain marks": {
        "tokenizer_config": {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "b</w>", "pad_token": "!"}
    },
    "old marks": {
        "tokenizer_config": {"pad_token": vocabulary.END, "bos_token": {"__type": "AddedToken", **told("<s>")}},
        "special_tokens_map": {"bos_token": told("<s>"), "unk_token": told("b</w>"), "pad_token": "<pad>"},
    },
    "added tokens": {
        "tokenizer_config": {"pad_token": "<pad>", "additional_special_tokens": ["<other>"]},
        "added_tokens": {"<new>": 14, "<pad>": 15},
    },
    "new settings": {
        "tokenizer_config": {
            "pad_token": "!", "extra_special_tokens": ["<x>"], "image_token": "<other>",
            "added_tokens_decoder": {
                "12": told(vocabulary.START, special=True),
                "13": told(vocabulary.END, special=True, normalized=False),
                "14": told("<new>", lstrip=True, rstrip=True, special=False, normalized=False),
            },
        },
        "special_tokens_map": {"pad_token": "<pad>"},
    },
    "marks as words": {"tokenizer_config": {"split_special_tokens": True}},
    "whole": {
        "whole": True,
        "added": [{"id": 12, **told(vocabulary.START, special=True)}, {"id": 14, **told("<new>", special=False)}],
        "tokenizer_config": {"unk_token": "b</w>", "bos_token": "<s>"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_folders_own_tokenizer_as_transformers(tmp_path: Path, name: str) -> None:
    from transformers import CLIPTokenizer

    folder = small(tmp_path / "tokenizer", **FILES[name])
    check(clip_tokens.from_folder(folder), CLIPTokenizer.from_pretrained(folder), TEXTS)


@pytest.mark.parametrize("name", ["diffusers", "transformers", "transformers, whole"])
def test_written_folders_as_transformers(tmp_path: Path, from_files: Any, name: str) -> None:
    """What we write for diffusers, and what transformers writes itself."""
    from transformers import CLIPTokenizer

    from sfumato.systems.exchange_text import write_tokenizer

    if name == "diffusers":
        write_tokenizer(tmp_path, pad=0)
    else:
        from_files.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
    check(clip_tokens.from_folder(tmp_path), CLIPTokenizer.from_pretrained(tmp_path), NASTY)


def test_damaged_folders(tmp_path: Path) -> None:
    for i, (name, content) in enumerate(
        {
            "merges.txt": "a b c\n", "vocab.json": "[]", "tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}',
            "special_tokens_map.json": '{"bos_token": {}}', "tokenizer.json": '{"model": {"vocab": {}}}',
        }.items()
    ):  # fmt: skip
        folder = small(tmp_path / str(i))
        (folder / name).write_text(content)
        with pytest.raises(ModelFileError):
            clip_tokens.from_folder(folder)
    foreign = small(tmp_path / "foreign", tokenizer_config={"unk_token": "<unk>"})
    with pytest.raises(ModelFileError, match="the vocabulary lacks '<unk>'"):
        clip_tokens.from_folder(foreign)
    (small(tmp_path / "unfit") / "merges.txt").write_text("a q\n")
    with pytest.raises(ModelFileError, match="do not fit one another"):
        clip_tokens.from_folder(tmp_path / "unfit")


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
    row = their_tokenizer()(PROMPT, padding="max_length", max_length=77)["input_ids"]
    assert row == ids(IDS)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skipped_layers(skip: int, norm: bool) -> None:
    """diffusers' `clip_skip`: `hidden_states[-(skip + 1)]`, then the last layer norm; the pooled output stays."""
    (found,) = PromptEncoder(tokenizer(), tower(), skip=skip, final_norm=norm).encode([PROMPT])
    output = run([ids(IDS)])
    hidden = output.hidden_states[-(skip + 1)]
    expected = tower().text_model.final_layer_norm(hidden) if norm else hidden
    torch.testing.assert_close(found.states, expected[0])
    assert torch.equal(found.pooled, output.pooler_output[0])


def test_pooled_output_by_an_old_config() -> None:
    """Stable Diffusion 1's published config says that the end mark is 2; transformers then takes the highest id."""
    one, two = (PromptEncoder(tokenizer(), m).encode([PROMPT])[0] for m in (tower(2), tower()))
    assert torch.equal(one.pooled, two.pooled)


def test_projected_pooled_output() -> None:
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = CLIPTextModelWithProjection(their_tower().config).eval().requires_grad_(False)
    model = CLIPTextModel(CLIPTextConfig(**SIZES), projection=True)
    own = {n if n.startswith("text_") else f"text_model.{n}": t for n, t in theirs.state_dict().items()}
    model.load_state_dict(own)
    (found,) = PromptEncoder(tokenizer(), model).encode([PROMPT])
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids(IDS)]))
    torch.testing.assert_close(found.pooled, expected.text_embeds[0])
    assert found.pooled.shape == (model.config.projection_dim,)
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
    expected = tokenizer().ids(text)
    encoder = PromptEncoder(tokenizer(), tower())
    for dialect in ("a1111", "comfy", "plain"):
        assert [t.id for window in encoder.tokens(text, Reading(dialect)).windows for t in window] == expected
    words = re.sub(r",(\S)", r", \1", text)  # compel parts words at commas
    expected = tokenizer().ids(words)
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
    names = tower().state_dict()
    made = text_tower(tower().config.to_dict(), names, what="a file")
    (one,), (two,) = (PromptEncoder(tokenizer(), m).encode([PROMPT]) for m in (made, tower()))
    assert torch.equal(one.states, two.states)
    del names["text_model.final_layer_norm.bias"]
    with pytest.raises(ModelFileError, match=r"a file does not fit its config .*final_layer_norm\.bias"):
        text_tower(tower().config.to_dict(), names, what="a file")
