"""Word lists and word pieces: what is a word, what is unknown, and what is suggested."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.conditioners.words import WordPieces, WordVocabulary, quoted, spelling, split, tokenizer_from_config
from sfumato.errors import UserError


def test_words_and_marks() -> None:
    assert split("A red-ish Heart, 3D!") == ["a", "red", "-", "ish", "heart", ",", "3d", "!"]
    assert split("红心 red") == ["红", "心", "red"]
    assert split("ＲＥＤ\u00a0Straße") == ["red", "strasse"]
    assert split("  ") == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_every_training_text_can_be_read(texts: list[str]) -> None:
    words = WordVocabulary.from_texts(texts)
    for text in texts:
        ids = words.ids(text)
        assert ids[0] == words.start and ids[-1] == words.end and max(ids) < words.size
        assert [words.words[i - 3] for i in ids[1:-1]] == split(text)
        assert spelling(text, words.words) == {}


def test_rare_words_are_left_out_and_refused() -> None:
    words = WordVocabulary.from_texts(["red heart", "red cat"], least=2)
    assert words.words == ("red",)
    with pytest.raises(UserError, match="words that this model never saw: 'heart'$"):
        words.ids("red heart")


def test_unknown_words_come_with_the_nearest() -> None:
    words = WordVocabulary(["cat", "heart", "red"])
    assert spelling("a rde haert", words.words) == {
        "a": "",
        "rde": " (did you mean 'red'?)",
        "haert": " (did you mean 'heart'?)",
    }
    suggested = r"never saw: 'rde' \(did you mean 'red'\?\), 'haert' \(did you mean 'heart'\?\)"
    with pytest.raises(UserError, match=suggested):
        words.ids("rde haert")


@pytest.mark.parametrize("words", [["cat", "cat"], ["Cat"], ["red heart"], [""]])
def test_lists_that_are_no_vocabulary(words: list[str]) -> None:
    with pytest.raises(UserError, match="in the vocabulary is not one word|holds a word twice"):
        WordVocabulary(words)


def test_quotes_are_short() -> None:
    assert quoted(["a", "a", "b"]) == "'a', 'b'"
    assert quoted("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
    assert len(quoted(["x" * 500])) < 50


def test_word_pieces_are_berts() -> None:
    pieces = WordPieces()
    assert pieces.ids("A red heart") == [101, 1037, 2417, 2540, 102]
    assert pieces.ids("") == [101, 102]


def test_word_pieces_of_a_trained_encoder_take_every_script_that_has_pieces() -> None:
    assert len(WordPieces().ids("日出")) == 4
    assert WordPieces().unreadable("日出 龘龘 red") == ["龘龘"]
    assert WordPieces(latin=True).unreadable("日出 龘龘 red") == ["日出", "龘龘"]


def test_tokenizers_come_back() -> None:
    for tokenizer in (WordVocabulary(["cat"]), WordPieces()):
        back = tokenizer_from_config(tokenizer.describe())
        assert back.ids("cat") == tokenizer.ids("cat") and back.size == tokenizer.size


def test_wrong_configs() -> None:
    with pytest.raises(UserError, match=r"unknown tokenizer 'word' \(did you mean 'words'\?\)"):
        tokenizer_from_config({"kind": "word"})
    with pytest.raises(UserError, match="unknown key of the vocabulary's config 'wrods'"):
        tokenizer_from_config({"kind": "words", "wrods": []})
    with pytest.raises(UserError, match="lacks the key 'words'"):
        tokenizer_from_config({"kind": "words"})
    with pytest.raises(UserError, match="not those of bert-base-uncased"):
        tokenizer_from_config({"kind": "wordpieces", "sha256": "0"})
