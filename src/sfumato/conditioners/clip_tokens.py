"""CLIP's tokens by the library `tokenizers`: byte-level pairs in lower-case words with an end mark (Radford 2021).

A text is composed (NFC), its white space becomes single spaces, and it is lower-cased; it falls apart into words of
letters, single digits, runs of other signs and English endings such as "'s"; each word's bytes are merged pair by pair.

>>> letters = {letter: i for i, letter in enumerate(["c", "a", "t</w>", "ca", "cat</w>", "<s>", "<e>"])}
>>> tokenizer = ClipTokenizer(letters, [("c", "a"), ("ca", "t</w>")], Marks("<s>", "<e>", "<e>", "<e>"))
>>> tokenizer.read("A Cat")
[Piece(id=6, text='<e>', span=(0, 1)), Piece(id=4, text='cat</w>', span=(2, 5))]
>>> tokenizer.start, tokenizer.end, tokenizer.unknown, tokenizer.pad
(5, 6, 6, 6)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.conditioners.pretrained import need, read_json
from sfumato.conditioners.vocabulary import END, END_OF_WORD, START, tables
from sfumato.errors import ModelFileError

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What a text falls apart into; what lies between is left out."""
VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
SETTINGS, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

_MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Piece(NamedTuple):
    """A token of a text.

    Attributes:
        id: its number.
        text: as the vocabulary has it.
        span: where it begins and ends in the text as it was given, in letters.
    """

    id: int
    text: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """The tokens that are no words: a window's start and end, what no token stands for, and what fills windows."""

    start: str = START
    end: str = END
    unknown: str = END
    pad: str = END


class ClipTokenizer:
    """Texts -> tokens, without marks around them.

    Args:
        vocabulary: token -> id.
        merges: pairs of tokens, the first merged first.
        marks: the tokens that are no words.
        added: tokens that are found in a text before it falls apart, as `tokenizers.AddedToken`; those that the
            vocabulary lacks get the next ids in turn.
        split_marks: whether a special mark in a text is read as words.

    Attributes:
        start, end, unknown, pad: ids of the marks.

    Raises:
        ModelFileError: for merges, or a mark of the unknown, that the vocabulary lacks.
        UserError: where tokenizers is not installed.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        marks: Marks = Marks(),
        added: Iterable[Any] = (),
        *,
        split_marks: bool = False,
    ) -> None:
        library = need("tokenizers", "text")
        if marks.unknown not in vocabulary:
            raise ModelFileError(f"the vocabulary lacks {marks.unknown!r:.60}, which stands for what no token does")
        try:
            pairs = library.models.BPE(
                vocab=dict(vocabulary),
                merges=list(merges),
                continuing_subword_prefix="",
                end_of_word_suffix=END_OF_WORD,
                unk_token=marks.unknown,
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelFileError(f"vocabulary and merges do not fit one another ({str(error)[:200]})") from None
        self._tokenizer = library.Tokenizer(pairs)
        clean, part, regex = library.normalizers, library.pre_tokenizers, library.Regex
        self._tokenizer.normalizer = clean.Sequence([clean.NFC(), clean.Replace(regex(r"\s+"), " "), clean.Lowercase()])
        words = part.Split(regex(WORDS), behavior="removed", invert=True)
        self._tokenizer.pre_tokenizer = part.Sequence([words, part.ByteLevel(add_prefix_space=False)])
        tokens = list(added)
        known = [token.content for token in tokens]
        own = [mark for mark in (marks.start, marks.end, marks.unknown, marks.pad) if mark not in known]
        tokens += [library.AddedToken(mark, special=True, normalized=False) for mark in dict.fromkeys(own)]
        self._tokenizer.add_tokens(tokens)
        self._tokenizer.encode_special_tokens = split_marks
        find = self._tokenizer.token_to_id
        self.start: int = find(marks.start)
        self.end: int = find(marks.end)
        self.unknown: int = find(marks.unknown)
        self.pad: int = find(marks.pad)

    def read(self, text: str) -> list[Piece]:
        """The tokens of a text; `unknown` stands where the vocabulary has none."""
        found, name = self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.id_to_token
        return [Piece(i, name(i), span) for i, span in zip(found.ids, found.offsets, strict=True)]

    def ids(self, text: str) -> list[int]:
        """The ids of a text's tokens."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found


def clip_tokenizer() -> ClipTokenizer:
    """CLIP's tokenizer over the packaged vocabulary, made in memory: no file, no network.

    It knows the two marks only. Padding is not its business: Stable Diffusion 1 pads with the end mark, OpenCLIP with
    id 0, which is "!" in the midst of a word; were "!" its padding token, it would also read every "!" of a prompt so.

    Raises:
        UserError: where tokenizers is not installed.
    """
    return ClipTokenizer(*tables())


# --- from files ------------------------------------------------------------------------------------------------------


def from_folder(folder: Path) -> ClipTokenizer:
    """A tokenizer from the files that transformers writes, read as its `CLIPTokenizer` reads them.

    Args:
        folder: with `tokenizer.json`, or `vocab.json` and `merges.txt`; marks and added tokens of the other files.

    Raises:
        ModelFileError: for damaged files.
    """
    library = need("tokenizers", "text")
    settings, whole = (_read(folder / name) for name in (SETTINGS, WHOLE))
    listed = settings.get("added_tokens_decoder")
    special = {} if listed is not None else _read(folder / SPECIAL)
    try:
        vocabulary, merges = _tables(folder, whole)
        told = settings | {key: _flagged(value) for key, value in special.items()}
        numbered: dict[int, Any] = {int(n): _token(library, token) for n, token in (listed or {}).items()}
        if listed is None:
            named = {_content(told.get(key)) for key in _MARKS} | {_content(token) for token in _extra(told)}
            for content, n in _read(folder / ADDED).items():
                flag = content in named
                numbered[n] = library.AddedToken(content, special=flag, normalized=not flag)
            numbered |= {entry["id"]: _token(library, entry) for entry in whole.get("added_tokens", ())}
        marks, added = _added(library, told, [numbered[n] for n in sorted(numbered)])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder} holds no CLIP tokenizer that can be read ({error!r:.200})") from None
    return ClipTokenizer(vocabulary, merges, marks, added, split_marks=bool(settings.get("split_special_tokens")))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tables(folder: Path, whole: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; those of `tokenizer.json` come first."""
    if whole:
        pairs = [one.split(" ") if isinstance(one, str) else one for one in whole["model"]["merges"]]
        return whole["model"]["vocab"], [(first, second) for first, second in pairs]
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return read_json(folder / VOCABULARY), [(first, second) for first, second in pairs]


def _content(token: Any) -> Any:
    """A token's text."""
    return token["content"] if isinstance(token, dict) else token


def _extra(told: Mapping[str, Any]) -> list[Any]:
    """Tokens that are no marks and yet special."""
    extra = told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
    return list(extra.values() if isinstance(extra, dict) else extra)


def _flagged(value: Any) -> Any:
    """A mark of `special_tokens_map.json`, which is special whatever it says."""
    return value | {"special": True} if isinstance(value, dict) and "content" in value else value


def _token(library: Any, token: Any) -> Any:
    """A token of a file as the library's, with its flags."""
    if isinstance(token, str):
        return library.AddedToken(token, special=True, normalized=False)
    return library.AddedToken(token["content"], **{key: token[key] for key in _FLAGS if key in token})


def _added(library: Any, told: Mapping[str, Any], tokens: list[Any]) -> tuple[Marks, list[Any]]:
    """The marks, and all tokens to be added: the numbered ones, marks, other tokens of the settings."""
    ours = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), (START, END, END, END), strict=True))
    named = ours | {key: told[key] for key in _MARKS if told.get(key) is not None}
    more = [*(named[key] for key in _MARKS if key in named)]
    more += [value for key, value in told.items() if key.endswith("_token") and key not in _MARKS and value]
    more += _extra(told)
    marks = {_content(token) for token in (named[key] for key in named)}
    for token in tokens:
        token.special = token.special or token.content in marks
    for token in more:
        if _content(token) not in [one.content for one in tokens]:
            tokens.append(_token(library, token))
            tokens[-1].special = tokens[-1].special or _content(token) in marks
    return Marks(*(_content(named[key]) for key in ours)), tokens
