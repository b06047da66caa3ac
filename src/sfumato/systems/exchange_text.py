"""The text tower of a folder in diffusers' layout: `text_encoder` and `tokenizer`, both ways.

Prompts are always read with CLIP's own vocabulary, which is in the package. A folder's tokenizer is therefore looked at
only to be sure that it is no other one, and for the id that fills its windows.

>>> import tempfile
>>> place = Path(tempfile.mkdtemp())
>>> write_tokenizer(place, pad=0)
>>> sorted(path.name for path in place.iterdir())
['merges.txt', 'special_tokens_map.json', 'tokenizer_config.json', 'vocab.json']
>>> pad_of(place)
0
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints.formats import diffusers
from sfumato.checkpoints.formats.diffusers import Component
from sfumato.checkpoints.formats.families import END_MARK
from sfumato.checkpoints.formats.open_clip import CLIP_L
from sfumato.checkpoints.io import Wanted
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.conditioners.clip_tokens import ADDED, MERGES, SETTINGS, SPECIAL, VOCABULARY, WHOLE
from sfumato.conditioners.vocabulary import END, START, tables
from sfumato.errors import ModelFileError, UserError, raise_unknown
from sfumato.networks.clip_text import ACTIVATIONS, CLIPTextConfig

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""transformers' classes of text towers that can be opened."""
PAD_TOKENS = {"!": 0, END: END_MARK}
"""Tokens that fill windows, and their ids: of Stable Diffusion 2, and of 1."""
_MOST = 2**24  # bytes of a vocabulary

_PREFIX = "text_model."
_INNER = ("embeddings.", "encoder.", "final_layer_norm.")
_ASIDE = re.compile(r"(.+\.)?position_ids|text_projection\.weight|logit_scale")

_MARKS = {"bos_token_id": CLIP_L.bos_token_id, "eos_token_id": CLIP_L.eos_token_id}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
DECISIVE = (*_SIZES, "hidden_act", "layer_norm_eps")
"""Fields of a tower's config that its weights' shapes and its states depend on."""
_KEPT = (*DECISIVE, "projection_dim")


@dataclass(frozen=True)
class Text:
    """A folder's text tower.

    Attributes:
        config: the tower's.
        part: its weights; `names` gives them our names.
        names: ours, `text_model.…` -> those of the part.
        pad: the id that fills windows.
        notes: what a user should know, each in one sentence.
    """

    config: CLIPTextConfig
    part: Component
    names: dict[str, str]
    pad: int
    notes: tuple[str, ...]

    def seen(self) -> dict[str, Tensor]:
        """The weights on "meta" under our names."""
        return {ours: self.part.seen[theirs] for ours, theirs in self.names.items()}

    def read(self) -> dict[str, Tensor]:
        """The weights under our names."""
        ours = {theirs: name for name, theirs in self.names.items()}
        return {ours[theirs]: tensor for theirs, tensor in self.part.tensors.items() if theirs in ours}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_text(folder: Path, *, allow_pickle: bool = False, dtype: Wanted = None) -> Text:
    """The text tower of a pipeline's folder, its tokenizer checked.

    Args:
        folder: with `text_encoder`, and mostly `tokenizer`.
        allow_pickle, dtype: as in `read_component`.

    Raises:
        ModelFileError: for another class of tower, another vocabulary, or damaged files.
        UserError: for a value in the config that cannot be used.
    """
    part = diffusers.read_component(folder / TEXT_ENCODER, allow_pickle=allow_pickle, dtype=dtype)
    config = tower_config(part.config, folder / TEXT_ENCODER)
    if (folder / TOKENIZER).is_dir():
        pad = pad_of(folder / TOKENIZER)
    else:
        pad = PAD_TOKENS["!" if config.hidden_act == "gelu" else END]
    names = {_ours(name): name for name in part.seen if not _ASIDE.fullmatch(name)}
    aside = sorted(part.seen.keys() - names.values())
    notes = [*part.notes]
    if aside:
        notes.append(f"left aside in {folder / TEXT_ENCODER}, for prompts do not need it: {', '.join(aside)}")
    return Text(config, part, names, pad, tuple(notes))


def _ours(name: str) -> str:
    """transformers 5 writes the names without `text_model.`, earlier versions with it."""
    return f"{_PREFIX}{name}" if name.startswith(_INNER) else name


def tower_config(values: Mapping[str, Any], where: Path) -> CLIPTextConfig:
    """A tower's config from transformers' `config.json`, of which what does not change the states is passed over.

    Raises:
        ModelFileError: for another class of encoder.
        UserError: for an impossible value.
    """
    kind = values.get("model_type", CLIPTextConfig.model_type)
    architectures = values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else CLASSES[0]
    if kind != CLIPTextConfig.model_type or named not in CLASSES:
        other = named if named not in CLASSES else kind
        raise ModelFileError(f"{where} holds a {other!r:.60}; of text encoders {' and '.join(CLASSES)} can be opened")
    given = {key: value for key, value in values.items() if key in _KEPT and value is not None}
    for key in (key for key in given if key in (*_SIZES, "projection_dim")):
        if type(given[key]) is not int or given[key] < 1:
            raise UserError(f"{where}: {key} must be a whole number of 1 or more, got {given[key]!r:.60}")
    eps = given.get("layer_norm_eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise UserError(f"{where}: layer_norm_eps must be a number from 0 to 1, got {eps!r:.60}")
    if (act := given.get("hidden_act", CLIPTextConfig.hidden_act)) not in list(ACTIVATIONS):
        raise_unknown(f"hidden_act in {where}", str(act), list(ACTIVATIONS))
    return CLIPTextConfig(**(_MARKS | given))


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def pad_of(folder: Path) -> int:
    """The id that fills windows, of a tokenizer that must be CLIP's own.

    Raises:
        ModelFileError: for another vocabulary, added words, other marks, and damaged files.
    """
    settings, special, whole, added = (_json(folder / name) for name in (SETTINGS, SPECIAL, WHOLE, ADDED))
    if not (folder / WHOLE).is_file() and not (folder / VOCABULARY).is_file():
        raise ModelFileError(f"{folder} holds neither {VOCABULARY} with {MERGES} nor {WHOLE}")
    if (folder / WHOLE).is_file():
        model = whole["model"] if isinstance(whole.get("model"), dict) else {}
        _check_vocabulary(model.get("vocab"), folder / WHOLE)
        _check_merges(model.get("merges"), folder / WHOLE)
    if (folder / VOCABULARY).is_file():
        _check_vocabulary(_json(folder / VOCABULARY), folder / VOCABULARY)
        _check_merges(_lines(folder / MERGES), folder / MERGES)
    for token, number in _additions(settings, special, whole, added):
        _check_known(token, number, folder)
    # what transformers does: the older file has the last word, unless the newer one lists all tokens
    told = settings if "added_tokens_decoder" in settings else settings | special
    for mark, only in (("bos_token", START), ("eos_token", END)):
        if _content(told.get(mark, only)) != only:
            raise ModelFileError(f"{folder}: {mark} is {_content(told[mark])!r:.60}, where CLIP's own is {only!r}")
    pad = _content(told.get("pad_token") or END)
    if not isinstance(pad, str) or pad not in PAD_TOKENS:
        known = " or ".join(map(repr, PAD_TOKENS))
        raise ModelFileError(f"{folder}: pad_token is {pad!r:.60}; windows can be filled with {known}")
    return PAD_TOKENS[pad]


def _json(path: Path) -> dict[str, Any]:
    return diffusers.read_json(path, _MOST) if path.is_file() else {}


def _lines(path: Path) -> list[str]:
    """Merges, one to a line, without the line that tells the version."""
    if not path.is_file() or path.stat().st_size > _MOST:
        raise ModelFileError(f"{path} is missing, or larger than a list of merges can be")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError:
        raise ModelFileError(f"{path} is not a text") from None
    first = 1 if "#version" in lines[0] else 0
    return [line for line in lines[first:] if line]


def _content(token: Any) -> Any:
    """A token's text; newer files tell more of it."""
    return token.get("content") if isinstance(token, dict) else token


def _check_vocabulary(found: Any, path: Path) -> None:
    own = tables()[0]
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} holds no table of tokens")
    if found == own:
        return
    if len(found) > len(own) and own.items() <= found.items():
        _refuse_added([token for token in found if token not in own], path)
    raise ModelFileError(f"{path} is another vocabulary than CLIP's own, with which such models were trained")


def _check_merges(found: Any, path: Path) -> None:
    """Merges as lines of a text, or as pairs."""
    pairs = isinstance(found, list) and all(isinstance(one, list) for one in found)
    lines = [" ".join(map(str, pair)) for pair in found] if pairs else found
    if lines != _merges():
        raise ModelFileError(f"{path} has other merges than CLIP's own vocabulary")


@functools.cache
def _merges() -> list[str]:
    """CLIP's own, as lines."""
    return [" ".join(pair) for pair in tables()[1]]


def _additions(
    settings: Mapping[str, Any], special: Mapping[str, Any], whole: Mapping[str, Any], added: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Tokens that a tokenizer's files add or list anew, with their ids; None where none is said."""
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        yield from ((_content(token), int(n) if str(n).isdecimal() else n) for n, token in listed.items())
    entries = whole.get("added_tokens")
    for entry in entries if isinstance(entries, list) else ():
        yield _content(entry), entry.get("id") if isinstance(entry, dict) else None
    yield from added.items()
    for values in (settings, special):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = values.get(key)
            yield from ((_content(token), None) for token in (more if isinstance(more, list | dict) else ()))


def _check_known(token: Any, number: Any, folder: Path) -> None:
    own = tables()[0]
    if not isinstance(token, str) or token not in own or (number is not None and own[token] != number):
        _refuse_added([token], folder)


def _refuse_added(words: list[Any], path: Path) -> None:
    more = f" and {len(words) - 1} more" if len(words) > 1 else ""
    raise ModelFileError(
        f"{path} adds {words[0]!r:.60}{more} to CLIP's own vocabulary; models with added words are not supported"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_text(folder: Path, prompt: ClipPrompt, weights: Mapping[str, Tensor]) -> None:
    """Write `text_encoder` and `tokenizer` into a pipeline's folder. Raises `OSError`.

    Args:
        prompt: whose tower it is.
        weights: the tower's, `text_model.…`.
    """
    place = folder / TEXT_ENCODER
    values = tower_config(prompt.values, place).to_dict()
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    diffusers.write_json(place / diffusers.CONFIG, {"architectures": [CLASSES[0]], **values, "torch_dtype": stored})
    diffusers.write_tensors(place / diffusers.TEXT_WEIGHTS, weights)
    write_tokenizer(folder / TOKENIZER, prompt.pad)


def write_tokenizer(folder: Path, pad: int) -> None:
    """Write CLIP's tokenizer as transformers opens it. Raises `OSError`.

    Args:
        pad: the id that fills windows; only those of `PAD_TOKENS` have a token there.
    """
    vocabulary = tables()[0]
    token = next((token for token, number in PAD_TOKENS.items() if number == pad), END)
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {name: {"content": text, **mark} for name, text in (("bos_token", START), ("eos_token", END))}
    special |= {"unk_token": {"content": END, **mark}}
    settings = {
        "add_prefix_space": False, "bos_token": START, "do_lower_case": True, "eos_token": END, "errors": "replace",
        "model_max_length": 77, "pad_token": token, "tokenizer_class": "CLIPTokenizer", "unk_token": END,
    }  # fmt: skip
    diffusers.write_text(folder / VOCABULARY, json.dumps(vocabulary, ensure_ascii=False))
    diffusers.write_text(folder / MERGES, "\n".join(["#version: 0.2", *_merges()]) + "\n")
    diffusers.write_json(folder / SETTINGS, settings)
    diffusers.write_json(folder / SPECIAL, special | {"pad_token": token})
