"""Prompts of Stable Diffusion: windows, lengths, mixtures, dialects, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.conditioners.clip_prompt import ClipPrompt, Prompt
from sfumato.conditioners.clip_tokens import clip_tokenizer
from sfumato.conditioners.prompt import DIALECTS
from sfumato.errors import UserError
from sfumato.systems.asked import Asked
from sfumato.tasks.draw import draw_latents

from ..parity import stable_cases

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
START, END, HAT = 49406, 49407, 3801
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LONG = " ".join(NUMBERS[i % 10] for i in range(200))


@functools.cache
def reader(pad: int = END, skip: int = 0, final_norm: bool = True) -> ClipPrompt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ClipPrompt(TOWER, pad=pad, skip=skip, final_norm=final_norm)
    for name, weights in made.network.named_parameters():  # CLIP begins with weights that hardly tell words apart
        weights.data.mul_(1 if name.endswith("bias") or "norm" in name else 5)
    return made


def states(*inputs: str | Prompt | None, pad: int = END) -> Tensor:
    found = reader(pad).encode(inputs).context
    assert found is not None and found.dtype == torch.float32 and torch.isfinite(found).all()
    return found


@torch.no_grad()
def by_hand(ids: list[int], layer: int = -1, *, norm: bool = True) -> Tensor:
    """States of one window, straight from the tower."""
    tower = reader().network
    hidden: Tensor = tower(torch.tensor([ids])).hidden_states[layer]
    return tower.text_model.final_layer_norm(hidden)[0] if norm else hidden[0]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [END, 0])
def test_a_window_is_padded_as_the_model_was_trained(pad: int) -> None:
    (hat,) = clip_tokenizer().ids("hat")
    assert close(states("hat", pad=pad)[0], by_hand([START, hat, END, *[pad] * 74]))
    assert close(states("", pad=pad)[0], by_hand([START, END, *[pad] * 75]))
    assert not close(states("hat", pad=END), states("hat", pad=0))


def test_exclamation_marks_are_words_and_no_padding() -> None:
    """Id 0 is "!" in the midst of a word; one that ends a word is 256, as OpenCLIP reads it."""
    (mark,) = clip_tokenizer().ids("!")
    assert mark == 256
    assert close(states("!", pad=0)[0], by_hand([START, 256, END, *[0] * 74]))


@pytest.mark.parametrize(("words", "windows"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (200, 3)])
def test_prompts_of_any_length(words: int, windows: int) -> None:
    text = " ".join(LONG.split()[:words])
    assert states(text).shape == (1, 77 * windows, 32)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_word_of_a_long_prompt_counts(dialect: str) -> None:
    words = LONG.split()
    whole = states(Prompt(LONG, dialect))
    for place in (0, 74, 75, 149, 150, 199):
        other = " ".join([*words[:place], "hat", *words[place + 1 :]])
        assert not close(states(Prompt(other, dialect)), whole), place


def test_the_last_of_200_words_changes_the_picture() -> None:
    model = stable_cases.case("sd1").model("ddim")
    other = " ".join([*LONG.split()[:-1], "hat"])
    options: dict[str, Any] = {"seeds": [1], "steps": 3, "size": (64, 64)}
    drawn = [draw_latents(model, asked=[Asked(text)], **options) for text in (LONG, other, LONG)]
    assert torch.equal(drawn[0], drawn[2]) and float((drawn[0] - drawn[1]).abs().max()) > 1e-3


def test_a_break_begins_a_window() -> None:
    assert close(states("red hat BREAK blue fish"), torch.cat([states("red hat"), states("blue fish")], dim=1))
    assert states(Prompt("red hat BREAK blue fish", "plain")).shape == (1, 77, 32)


# --- batches and lengths ---------------------------------------------------------------------------------------------


def test_shorter_prompts_are_followed_by_the_empty_text() -> None:
    found, empty = states(LONG, "a hat", None), states("")
    assert found.shape == (3, 231, 32)
    assert close(found[0], states(LONG)[0]) and close(found[1], torch.cat([states("a hat"), empty, empty], dim=1)[0])
    assert close(found[2], empty.repeat(1, 3, 1)[0])


@pytest.mark.parametrize(("prompt", "negative"), [("a hat", LONG), (LONG, "a hat"), (LONG, None), (None, LONG)])
def test_prompt_and_negative_of_unequal_lengths(prompt: str | None, negative: str | None) -> None:
    model = stable_cases.case("sd2-base").model("ddim")
    condition, null = model.conditions([Asked(prompt, negative), Asked("a dog")])
    assert condition.context is not None and null.context is not None
    assert condition.context.shape == null.context.shape == (2, 231, 32)
    x = draw_latents(model, seeds=[1], asked=[Asked(prompt, negative)], steps=2, guidance=3.0, size=(64, 64))
    assert torch.isfinite(x).all()


def test_null_is_the_empty_text() -> None:
    null = reader().null(2)
    assert isinstance(null, Condition) and null.context is not None
    assert torch.equal(null.context, states("", "")) and torch.equal(null.context, states(None, Prompt("")))
    with pytest.raises(UserError, match="at least one picture"):
        reader().null(0)


def test_a_prompt_is_the_same_whoever_shares_its_batch() -> None:
    assert close(states("a hat", "a dog", Prompt("fish", "comfy", 1))[1], states("a dog")[0])
    assert close(states("a hat", "a hat")[0], states("a hat", "a hat")[1])


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_the_ends_of_a_mixture_are_its_prompts() -> None:
    a, b = states("a hat"), states("a blue fish")
    assert close(states(Prompt("a hat", towards="a blue fish", share=0.0)), a)
    assert close(states(Prompt("a hat", towards="a blue fish", share=1.0)), b)
    assert close(states(Prompt("a hat", towards="a blue fish", share=0.25)), 0.75 * a + 0.25 * b)


def test_a_mixture_of_unequal_lengths() -> None:
    a, b = states("a hat", LONG)
    assert close(states(Prompt("a hat", towards=LONG, share=0.5))[0], (a + b) / 2)


def test_a_mixture_is_read_as_its_prompt_is() -> None:
    own = Prompt("a hat", "comfy", 1, towards="a (blue:1.5) fish", share=1.0)
    assert close(states(own), states(Prompt("a (blue:1.5) fish", "comfy", 1)))


# --- dialects and layers ---------------------------------------------------------------------------------------------


def test_dialects_weigh_as_they_say() -> None:
    plain = states(Prompt("a red hat", "plain"))
    assert all(close(states(Prompt("a red hat", dialect)), plain) for dialect in DIALECTS)
    for dialect in DIALECTS:
        weighted = "a (red)1.5 hat" if dialect == "compel" else "a (red:1.5) hat"
        assert not close(states(Prompt(weighted, dialect)), plain)
    assert close(states(Prompt("a ((red)) hat", "comfy")), states(Prompt("a (red:1.21) hat", "comfy")))
    assert close(states(Prompt("a red++ hat", "compel")), states(Prompt("a (red)1.21 hat", "compel")))


def test_emphasis_is_renormalised() -> None:
    """A1111: every state of the word times its weight, then all so that the mean is what it was."""
    plain, loud = states("a red hat")[0], states("a (red:1.5) hat")[0]
    weights = torch.ones(77, 1)
    weights[2] = 1.5
    scaled = plain * weights
    assert close(loud, scaled * (plain.mean() / scaled.mean()))
    assert abs(float(loud.mean() - plain.mean())) < 1e-6


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_skipped_layers(skip: int, norm: bool) -> None:
    """Said with the prompt, or the model's own; the last layer norm follows where the model has it so."""
    (hat,) = clip_tokenizer().ids("hat")
    expected = by_hand([START, hat, *[END] * 75], -(skip + 1), norm=norm)
    said = reader(final_norm=norm).encode([Prompt("hat", skip=skip)]).context
    own = reader(skip=skip, final_norm=norm).encode(["hat"]).context
    assert said is not None and own is not None and close(said[0], expected) and close(own[0], expected)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt("a <lora:hat:1>"), "LoRA is not supported"),
        (Prompt("a <hypernet:hat:1>"), "not supported"),
        (Prompt("a hat AND a dog"), "AND, which is not supported"),
        (Prompt("a [hat:dog:0.5]"), "changes words while drawing"),
        (Prompt("a [hat|dog]"), "swaps words at every step"),
        (Prompt("embedding:hat", "comfy"), "textual inversion is not supported"),
        (Prompt('("a hat", "a dog").blend(1, 1)', "compel"), "which is not supported"),
        (Prompt("a hat", "a1112"), "a1111"),
        (Prompt("a hat", skip=3), "skip must be a whole number from 0 to 2, got 3"),
        (Prompt("a hat", skip=-1), "skip must be a whole number from 0 to 2"),
        (Prompt("a <|endoftext|> hat"), "cannot read '<|endoftext|>'"),
        (Prompt("a hat", towards="a <lora:hat:1>", share=0.5), "LoRA is not supported"),
    ],
)
def test_what_is_refused(prompt: Prompt, says: str) -> None:
    with pytest.raises(UserError) as error:
        reader().encode(["a dog", prompt])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_refused_grammar_is_words_in_the_plain_dialect() -> None:
    for text in ("a <lora:hat:1>", "a hat AND a dog", "a [hat:dog:0.5]", "(a hat"):
        assert states(Prompt(text, "plain")).shape == (1, 77, 32)


def test_towers_that_cannot_be() -> None:
    with pytest.raises(UserError, match="vocabulary has 50 tokens"):
        ClipPrompt({**TOWER, "vocab_size": 50}, pad=0)
    with pytest.raises(UserError, match="skip must be"):
        ClipPrompt(TOWER, pad=0, skip=3)
    with pytest.raises(UserError, match="one prompt per picture, got an empty one"):
        reader().encode([])


def test_there_and_back() -> None:
    own = reader(0, 1, False)
    again = ClipPrompt.from_config(own.describe())
    assert again.describe() == own.describe() and (again.width, again.layers) == (32, 3)
    again.network.load_state_dict(own.network.state_dict())
    a, b = (one.encode(["a hat"]).context for one in (own, again))
    assert a is not None and b is not None and torch.equal(a, b)
    assert set(own.network.state_dict()) == set(again.network.state_dict())
    assert all(name.startswith("text_model.") for name in own.network.state_dict())
    with pytest.raises(UserError, match="text encoder's config"):
        ClipPrompt.from_config({**own.describe(), "pooled": True})
