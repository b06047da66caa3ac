"""The grammar of prompts: published rules, what the programs themselves answer, round trips, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfumato.conditioners.prompt import BREAK, DIALECTS, Fragment, Reading, parse, write
from sfumato.errors import UserError

GRAMMARS = ("a1111", "comfy", "compel")
WEIGHTS = st.floats(0.01, 20, allow_nan=False).map(lambda x: round(x, 4)).filter(lambda x: x != 1)
LETTERS = st.text("abc XYZ.,é猫🐈'0", min_size=1, max_size=8)

# The rules that AUTOMATIC1111's wiki publishes under "Attention/emphasis", and what that program's own docstring says
# of `parse_prompt_attention`.
A1111 = [
    ("a (word)", [("a ", 1), ("word", 1.1)]),
    ("a ((word))", [("a ", 1), ("word", 1.21)]),
    ("a [word]", [("a ", 1), ("word", 1 / 1.1)]),
    ("a (word:1.5)", [("a ", 1), ("word", 1.5)]),
    ("a (word:0.25)", [("a ", 1), ("word", 0.25)]),
    (r"a \(word\)", [("a (word)", 1)]),
    (r"anime_\(character\)", [("anime_(character)", 1)]),
    ("((((((n))))))", [("n", 1.771561)]),
    ("[[n]]", [("n", 0.826446281)]),
    ("a (((farm))), daytime", [("a ", 1), ("farm", 1.331), (", daytime", 1)]),
    ("normal text", [("normal text", 1)]),
    ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)]
        + [("sky", 1.4641), (".", 1.1)],
    ),
    ("a) b] c", [("a) b] c", 1)]),
    ("[a", [("a", 1 / 1.1)]),
    ("a:1.5) b", [("a:1.5) b", 1)]),
    ("(a: 1.5 )", [("a", 1.5)]),
    ("(a:b:1.5)", [("a:b", 1.5)]),
    ("(a:-1)", [("a", -1)]),
    ("[a:b]", [("a:b", 1 / 1.1)]),
    (r"a\b \\", [("ab \\", 1)]),
    ("()[]", []),
    ("", []),
]

# ComfyUI's README (the first, `()` is 1.1, `\(` for the sign), and what its `token_weights` answers to the others.
COMFY = [
    ("(good code:1.2) or (bad code:0.8)", [("good code", 1.2), (" or ", 1), ("bad code", 0.8)]),
    ("((a))", [("a", 1.21)]),
    ("((a:1.2))", [("a", 1.2)]),
    ("((a:1.2) b:1.5)", [("a", 1.2), (" b", 1.5)]),
    ("((a) b:1.5)", [("a", 1.65), (" b", 1.5)]),
    (r"a \(b\) (c)", [("a (b) ", 1), ("c", 1.1)]),
    ("[a] BREAK", [("[a] BREAK", 1)]),
    ("(a", [("(a", 1)]),
    ("a (b (c)", [("a ", 1), ("b ", 1.1), ("(c", 1.1)]),
    ("a) (b)", [("a) (b)", 1)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(a)(b)", [("a", 1.1), ("b", 1.1)]),
    ("(a:1e-1)", [("a", 0.1)]),
    ("()", []),
]

# What compel 2.5.1 answers (`PromptParser().parse_conjunction(text)`, fragments without words left out).
COMPEL = [
    ("a man picking apricots", [("a man picking apricots", 1)]),
    ("a man picking apricots+", [("a man picking", 1), ("apricots", 1.1)]),
    ("a tall thin man (picking apricots)--", [("a tall thin man", 1), ("picking apricots", 0.81)]),
    (
        "a man (picking apricots+)++ from a tree",
        [("a man", 1), ("picking", 1.21), ("apricots", 1.331), ("from a tree", 1)],
    ),
    ("a (red (hat)1.3)1.1 man", [("a", 1), ("red", 1.1), ("hat", 1.43), ("man", 1)]),
    ("(a man)0.5, a dog", [("a man", 0.5), (", a dog", 1)]),
    ("well-known c++ a+b", [("well-known", 1), ("c", 1.21), ("a+b", 1)]),
    ("foo,bar+ baz+,", [("foo,", 1), ("bar baz", 1.1), (",", 1)]),
    ("(a - b", [("(a - b", 1)]),
    ("(a - b)+", [("(a - b)+", 1)]),
    ("a) b+", [("a)", 1), ("b", 1.1)]),
    (r'\(smile\)+ "two words"1.4 (x).attend(0.7)', [("(smile)", 1.1), ("two words", 1.4), ("x", 0.7)]),
    ("a, b.c", [("a, b.c", 1)]),
    ("(one)+ (two)+ three+", [("one two three", 1.1)]),
    ("()++ a", [("a", 1)]),
    ('"" b-', [("b", 0.9)]),
    ("x--- y", [("x", 0.729), ("y", 1)]),
    ("2d+ 3.5+", [("2d", 1.1), ("3.5+", 1)]),
]


def check(text: str, dialect: str, expected: list[tuple[str, float]]) -> None:
    found = parse(text, dialect)
    assert [fragment.text for fragment in found] == [words for words, _ in expected]
    assert [fragment.weight for fragment in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(("text", "expected"), A1111)
def test_a1111(text: str, expected: list[tuple[str, float]]) -> None:
    check(text, "a1111", expected)


@pytest.mark.parametrize(("text", "expected"), COMFY)
def test_comfy(text: str, expected: list[tuple[str, float]]) -> None:
    check(text, "comfy", expected)


@pytest.mark.parametrize(("text", "expected"), COMPEL)
def test_compel(text: str, expected: list[tuple[str, float]]) -> None:
    check(text, "compel", expected)


def test_breaks() -> None:
    """Also inside brackets, where AUTOMATIC1111's program takes the word for a word."""
    assert parse("a BREAK  b") == [("a", 1), BREAK, ("b", 1)]
    assert parse("(a BREAK b:1.5) BREAK") == [("a", 1.5), BREAK, ("b", 1.5), BREAK]
    assert parse("BREAKS aBREAK break") == [("BREAKS aBREAK break", 1)]
    assert parse("BREAK BREAK") == [BREAK, BREAK]


# --- properties ---------------------------------------------------------------------------------------------------


def fragments(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Fragment]]:
    """Of changing weights, because neighbours of one weight are one fragment."""
    weights = st.one_of(st.just(1.0), WEIGHTS)
    found = st.lists(st.builds(Fragment, text, weights), max_size=6)
    return found.filter(lambda found: all(a.weight != b.weight for a, b in zip(found, found[1:], strict=False)))


@pytest.mark.parametrize("dialect", GRAMMARS)
@settings(max_examples=40)
@given(st.data())
def test_print_and_parse(dialect: str, data: st.DataObject) -> None:
    signs = {"a1111": r"ab :()[]\|.,", "comfy": "ab :()[].,", "compel": "ab:"}[dialect]
    given_ones = data.draw(fragments(st.text(signs, min_size=1, max_size=8)))
    try:
        text = write(given_ones, dialect)
    except UserError:
        assume(False)  # a comma's neighbours in compel, or what looks like a schedule
    assert parse(text, dialect) == given_ones


def test_what_can_be_printed() -> None:
    """So that the property above cannot hold because everything is refused."""
    three = [Fragment(r"a (b) [c] \ ", 1.0), Fragment("d: e", 1.31), Fragment(" 猫", 0.000001)]
    assert write(three) == r"a \(b\) \[c\] \\ (d: e:1.31)( 猫:0.000001)"
    assert write([Fragment("a (b) ", 1.0), Fragment("c:d", 1.5)], "comfy") == r"a \(b\) (c:d:1.5)"
    assert write([Fragment("a (b)", 1.0), Fragment("c d", 0.5)], "compel") == r"a \(b\) (c d)0.5"
    assert write([Fragment("a", 2.0), BREAK, Fragment("b", 1.0)]) == "(a:2.0) BREAK b"
    assert write([Fragment("a (b)", 1.0)], "plain") == "a (b)"


@pytest.mark.parametrize(
    ("dialect", "bad"),
    [
        ("plain", [Fragment("a", 1.1)]),
        ("comfy", [Fragment("a"), Fragment("b")]),
        ("compel", [Fragment("a+")]),
        ("a1111", [Fragment("x AND y")]),
        ("comfy", [BREAK]),
    ],
)
def test_what_cannot_be_printed(dialect: str, bad: list[Fragment]) -> None:
    with pytest.raises(UserError, match=f"cannot be written in the prompt dialect {dialect}"):
        write(bad, dialect)


@settings(max_examples=40)
@given(WEIGHTS, WEIGHTS)
def test_weights_multiply(a: float, b: float) -> None:
    assert parse(f"((x:{a:f}) y:{b:f})") == [("x", pytest.approx(a * b)), (" y", b)]
    assert parse(f"((x){a:f} y){b:f}", "compel")[0] == ("x", pytest.approx(a * b))
    assert parse(f"((x:{a:f}) y:{b:f})", "comfy") == [("x", a), (" y", b)]  # there the inner number holds alone


@given(st.integers(1, 12))
def test_brackets_multiply(n: int) -> None:
    for dialect in ("a1111", "comfy"):
        assert parse("(" * n + "x" + ")" * n, dialect)[0].weight == pytest.approx(1.1**n)
    assert parse("[" * n + "x" + "]" * n)[0].weight == pytest.approx(1.1**-n)
    assert parse("x" + "+" * n, "compel")[0].weight == pytest.approx(1.1**n)
    assert parse("(x)" + "-" * n, "compel")[0].weight == pytest.approx(0.9**n)


@given(LETTERS)
def test_text_without_signs_is_itself(text: str) -> None:
    for dialect in ("a1111", "comfy", "plain"):
        assert parse(text, dialect) == [(text, 1)]
    found = parse(text, "compel")  # which makes one space of many, and parts words at commas
    assert ["".join(f.text.split()) for f in found] == ([letters] if (letters := "".join(text.split())) else [])
    assert {f.weight for f in found} <= {1.0}


@pytest.mark.parametrize("dialect", DIALECTS)
@given(st.text(r'ab()[]\:+-".,=|<> 12', max_size=30))
def test_any_text_is_read_or_refused(dialect: str, text: str) -> None:
    try:
        found = parse(text, dialect)
    except UserError as error:
        assert dialect != "plain" and "\n" not in str(error)
        return
    assert all(fragment.text and math.isfinite(fragment.weight) for fragment in found)
    letters = "".join(fragment.text for fragment in found)
    assert letters.count("a") == text.count("a") and letters.count("b") == text.count("b")  # no word is lost
    if dialect == "plain":
        assert letters == text


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", GRAMMARS)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a <lora:hat:0.8> b", "asks for '<lora:hat:0.8>', and LoRA is not supported: take it out"),
        ("<LyCO:hat>", "LoRA is not supported"),
        ("<hypernet:x:1>", "asks for '<hypernet:x:1>', and such a network is not supported"),
        ("a AND b", "joins several prompts with AND"),
        ("a AND b :1.2", "joins several prompts with AND"),
        ("a [cat:dog:0.5]", r"changes words while drawing \('\[cat:dog:0.5\]'\)"),
        ("a [cat:dog: 12 ]", "changes words while drawing"),
        ("a [cat::0.5]", "changes words while drawing"),
        ("a [:dog:.5]", "changes words while drawing"),
        ("a [dog:5]", "changes words while drawing"),
        ("a [(x:1.2):[y]:3]", "changes words while drawing"),
        ("a [cat|dog]", r"swaps words at every step \('\[cat\|dog\]'\)"),
        ("a [[cat|dog] b]", "swaps words at every step"),
        ("a {red|blue} hat", r"leaves words to chance \('\{red\|blue\}'\).*with --dialect plain"),
        ("a {2$$red|{blue|green}} hat", "leaves words to chance"),
        ("a __animal__", "leaves words to chance \\('__animal__'\\)"),
        ("(__a/b-c*__:1.2)", "leaves words to chance"),
        ("a <cat-toy>", "asks for '<cat-toy>', and textual inversion is not supported: take it out, or read the signs"),
    ],
)
def test_refused(dialect: str, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse(text, dialect)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 220
    assert parse(text, "plain") == [(text, 1)]


@pytest.mark.parametrize(
    "text",
    [
        r"a \[cat|dog\]", "a [b] | c", "a < b: c", "SAND and", "[a (x|y) b]", r"\[a:1\]",
        "a {b", "a } {b} | c", "{a} | {b}", "snake_case a__b __", "a _b_ __ c __", "a<b > c", "<3 <3>",
        "an embedding: new",
    ],
)  # fmt: skip
def test_words_that_only_look_like_it(text: str) -> None:
    assert parse(text)


@pytest.mark.parametrize(
    ("dialect", "text", "sentence"),
    [
        ("comfy", "a embedding:style b", "asks for 'embedding:style', and textual inversion is not supported"),
        ("comfy", "(embedding:style:1.2)", "textual inversion"),
        ("a1111", "a fox,embedding:easynegative, red", "asks for 'embedding:easynegative', and textual inversion"),
        ("compel", '("a", "b").blend(1, 0.8)', r"compel's \.blend\(\), which is not supported"),
        ("compel", '("a", "b").and()', r"compel's \.and\(\)"),
        ("compel", "cat.swap(dog)", r"compel's \.swap\(\)"),
        ("compel", "a withLora(x, 0.5)", r"compel's withLora\(\)"),
        ("a1111", "(a:1.2.3)", "'1.2.3' in the prompt .* is not a weight"),
        ("a1111", f"(a:{'9' * 400})", "not a finite number"),
        ("comfy", "(a:nan)", "not a finite number"),
        ("comfy", "(" * 65 + "a", "nests more than 64 brackets"),
        ("compel", "(" * 5000 + "a", "nests more than 64 brackets"),
        ("a111", "a", r"unknown prompt dialect 'a111' \(did you mean 'a1111'\?\); known: a1111, comfy, compel, plain"),
    ],
)
def test_refused_in_one_dialect(dialect: str, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(text, dialect)


def test_deep_brackets_are_quick() -> None:
    """Each rule is tried once at each place: 64 brackets in brackets, each of which could be three things."""
    assert parse("(" * 64 + "x" + ")" * 64, "compel") == [("x", 1)]
    assert parse("(" * 64 + "x" + ")+" * 64, "compel")[0].weight == pytest.approx(1.1**64)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dialect": "comfi"}, "unknown prompt dialect 'comfi'"),
        ({"dialect": "comfy", "comma_backtrack": 5}, "belongs to the prompt dialect a1111, not to comfy"),
        ({"comma_backtrack": 76}, "from 0 to 75, got 76"),
        ({"comma_backtrack": True}, "from 0 to 75, got True"),
        ({"max_windows": 0}, "1 or more, got 0"),
    ],
)
def test_impossible_readings(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Reading(**options)  # type: ignore[arg-type]


def test_readings() -> None:
    assert Reading().backtrack == 20 and Reading("plain").backtrack == 0 and Reading(comma_backtrack=0).backtrack == 0
