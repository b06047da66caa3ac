"""Where windows begin: by AUTOMATIC1111's commas and breaks, ComfyUI's whole fragments, compel's sentences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.conditioners.chunks import Token, split

PIECES = {"w": "w</w>", "p": "p", ",": ",</w>", ".": ".</w>", ";": ";</w>"}


def group(letters: str, fragment: int = 0) -> list[Token]:
    """A fragment of tokens: whole words `w`, parts of words `p`, and marks."""
    return [Token(ord(letter), fragment=fragment, piece=PIECES[letter]) for letter in letters]


def cut(dialect: str, *texts: str | None, size: int = 10, backtrack: int = 0) -> list[str]:
    groups = [None if text is None else group(text, i) for i, text in enumerate(texts)]
    windows = split(dialect, groups, size=size, backtrack=backtrack)
    return ["".join(chr(token.id) for token in window) for window in windows]


def test_plain_fills_every_window() -> None:
    assert cut("plain", "w" * 23) == ["w" * 10, "w" * 10, "www"]
    assert cut("plain", "w" * 10) == ["w" * 10] and cut("plain") == [""]


def test_commas_move_what_follows_them() -> None:
    text = "wwwwwww,ww" + "www"
    assert cut("a1111", text) == ["wwwwwww,ww", "www"]  # 0 tokens may move
    assert cut("a1111", text, backtrack=2) == ["wwwwwww,ww", "www"]  # the comma and what follows are 3
    assert cut("a1111", text, backtrack=3) == ["wwwwwww,", "wwwww"]
    assert cut("a1111", text[:10], backtrack=3) == ["wwwwwww,ww"]  # nothing to cut
    assert cut("a1111", "w" * 10 + ",ww", backtrack=10) == ["w" * 10, ",ww"]  # a comma itself does not move
    assert cut("a1111", "w" * 9 + ",w", backtrack=3) == ["w" * 9 + ",", "w"]
    assert cut("a1111", "www,", "wwwwww", "ww", backtrack=9) == ["www,", "wwwwwwww"]  # also across fragments
    assert cut("a1111", "," + "w" * 22, backtrack=10) == [",", "w" * 10, "w" * 10, "ww"]


def test_breaks_begin_windows() -> None:
    assert cut("a1111", "ww", None, "w" * 12, None, "w") == ["ww", "w" * 10, "ww", "w"]
    assert cut("a1111", None, "w", None, None, "w", None) == ["", "w", "", "w"]
    assert cut("a1111", "ww,", None, "w" * 11, backtrack=10) == ["ww,", "w" * 10, "w"]  # the comma is forgotten


def test_small_fragments_stay_whole() -> None:
    assert cut("comfy", "w" * 6, "w" * 7) == ["w" * 6, "w" * 7]
    assert cut("comfy", "w" * 6, "w" * 8) == ["w" * 10, "w" * 4]
    assert cut("comfy", "w" * 10, "w") == ["w" * 10, "w"] and cut("comfy") == [""]


def test_sentences_stay_whole() -> None:
    assert cut("compel", "ww.ww,ww;wwww") == ["ww.", "ww,ww;wwww"]
    assert cut("compel", "ww,ww;wwwww") == ["ww,ww;", "wwwww"]
    assert cut("compel", "wwwwwwwwppw") == ["wwwwwwww", "ppw"]
    assert cut("compel", "p" * 12) == ["p" * 10, "pp"]
    assert cut("compel", "w." * 5) == ["w." * 5] and cut("compel") == [""]


@settings(max_examples=60)
@given(
    st.sampled_from(["a1111", "comfy", "compel", "plain"]),
    st.lists(st.one_of(st.none(), st.text("wp,.;", max_size=30)), max_size=6),
    st.integers(8, 20),
    st.integers(0, 20),
)
def test_nothing_is_lost(dialect: str, texts: list[str | None], size: int, backtrack: int) -> None:
    windows = cut(dialect, *texts, size=size, backtrack=min(backtrack, size))
    assert "".join(windows) == "".join(text or "" for text in texts)
    assert windows and all(len(window) <= size for window in windows)
    assert dialect == "a1111" or all(windows[1:])  # empty windows come from breaks only
