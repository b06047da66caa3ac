"""CLIP's text tower as a frozen encoder, from a folder in the layout of diffusers or transformers (Radford 2021).

The states are those of Stable Diffusion: every window of 77 tokens is `[start, up to 75 of the text, end, padding …]`,
padding included, because the padding's states are part of what such models were trained on (Stable Diffusion 1 pads
with the end mark, 2 with id 0). A longer text is read in several windows one after the other; nothing is cut off.

`PromptEncoder` reads prompts with a tokenizer and a tower in memory, weights and all (`prompt.py`); `CLIPText` is the
same from a folder, and by default takes a text as it stands, as captions are.

>>> windows([5, 6, 7], length=4, start=1, end=2, pad=2)
[[1, 5, 6, 2], [1, 7, 2, 2]]
>>> windows([], length=4, start=1, end=2, pad=0)
[[1, 2, 0, 0]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import check_keys
from sfumato.conditioners.chunks import Token, split
from sfumato.conditioners.clip_tokens import MERGES, VOCABULARY, WHOLE, ClipTokenizer, from_folder
from sfumato.conditioners.pretrained import Hasher, frozen, read_json, read_tensors, sha256
from sfumato.conditioners.prompt import BREAK, Fragment, Reading, parse
from sfumato.conditioners.weighting import away_from_empty, blend, scale_keeping_mean, without_shares
from sfumato.conditioners.words import quoted
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.clip_text import CLIPTextConfig, CLIPTextModel

_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
_TOKENIZER = (WHOLE, VOCABULARY, MERGES)


PLAIN = Reading("plain")


def windows(ids: Sequence[int], *, length: int, start: int, end: int, pad: int) -> list[list[int]]:
    """Token ids in windows of `length`, each with start and end mark, the last one padded; at least one."""
    inner = length - 2
    parts = [list(ids[i : i + inner]) for i in range(0, max(len(ids), 1), inner)]
    return [[start, *part, end, *[pad] * (inner - len(part))] for part in parts]


@dataclass(frozen=True)
class PromptTokens:
    """What became of a prompt.

    Attributes:
        fragments: as the grammar read them, without the breaks.
        windows: the tokens of each window, without marks and padding.
        size: how many tokens a window holds.
    """

    fragments: tuple[Fragment, ...]
    windows: tuple[tuple[Token, ...], ...]
    size: int

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return sum(len(window) for window in self.windows)

    def words(self) -> list[list[tuple[str, tuple[int, ...], float]]]:
        """(word, ids, weight) per word and window; a word that a window's end cuts is there in two parts."""
        found = []
        for window in self.windows:
            words: list[list[Token]] = []
            for before, token in zip((None, *window), window, strict=False):
                if before is None or before.piece.endswith("</w>") or before.fragment != token.fragment:
                    words.append([])
                words[-1].append(token)
            found.append([(self._text(word), tuple(t.id for t in word), word[0].weight) for word in words])
        return found

    def _text(self, word: Sequence[Token]) -> str:
        return self.fragments[word[0].fragment].text[word[0].span[0] : word[-1].span[1]]

    def describe(self) -> str:
        """For people: a line per window, then each word with its tokens' ids, and its weight where it is not 1."""
        lines = []
        for i, (window, words) in enumerate(zip(self.windows, self.words(), strict=True), 1):
            lines.append(f"window {i} of {len(self.windows)}: {len(window)} of {self.size} tokens")
            for text, ids, weight in words:
                lines.append(f"  {text}: {' '.join(map(str, ids))}" + (f" (x {weight:.4g})" if weight != 1 else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class PromptStates:
    """A prompt for a network.

    Attributes:
        states: (77 n, C) float32, n windows one after the other.
        pooled: (P,) float32, the first window's last layer at its end mark after the last layer norm, and through the
            tower's projection where it has one; weights and `skip` leave it as it is.
    """

    states: Tensor
    pooled: Tensor


Row = tuple[tuple[int, ...], tuple[int, ...]]  # a window's ids, and 1 where they are seen, 0 where hidden
Ran = dict[Row, tuple[Tensor, Tensor]]  # its states and pooled output


class PromptEncoder:
    """Prompts -> states.

    Args:
        tokenizer: such as `clip_tokens.clip_tokenizer()`.
        network: the text tower, frozen.
        pad: the id that fills windows; None for the tokenizer's own. Stable Diffusion 1: the end mark's, 2: 0.
        skip: how many of the last layers are left out, as in `CLIPText`.
        final_norm: whether the last layer norm follows, on skipped layers too.
        reading: how `states` reads its texts.

    Raises:
        UserError: for an impossible `skip` or `pad`.
    """

    network: nn.Module | None = None  # nothing here is trained

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        network: CLIPTextModel,
        *,
        pad: int | None = None,
        skip: int = 0,
        final_norm: bool = True,
        reading: Reading = PLAIN,
    ) -> None:
        config = network.config
        check_skip(skip, config.num_hidden_layers)
        if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < config.vocab_size):
            raise UserError(f"pad must be a token's id from 0 to {config.vocab_size - 1}, got {pad!r}")
        self.tokenizer, self.tower = tokenizer, network
        self.pad: int = tokenizer.pad if pad is None else pad
        self.skip, self.final_norm, self.reading = skip, final_norm, reading
        self.width: int = config.hidden_size
        self.window: int = config.max_position_embeddings

    def tokens(self, prompt: str, reading: Reading | None = None) -> PromptTokens:
        """The prompt's fragments, windows and tokens.

        Raises:
            UserError: for what the grammar refuses, for letters that the vocabulary lacks, for marks such as
                `<|endoftext|>` in the text, and for more windows than the reading allows.
        """
        reading = reading or self.reading
        fragments: list[Fragment] = []
        groups: list[list[Token] | None] = []
        for fragment in parse(prompt, reading.dialect):
            if fragment is BREAK:
                groups.append(None)
            else:
                groups.append(self._fragment(fragment, len(fragments), prompt))
                fragments.append(fragment)
        size = self.window - 2
        found = split(reading.dialect, groups, size=size, backtrack=reading.backtrack)
        most = reading.max_windows
        if most is not None and len(found) > most:
            count = sum(len(one) for one in found)
            raise UserError(
                f"the prompt {quoted([prompt])} has {count} tokens; the text encoder reads at most {most * size}"
                + (f", and here they take {len(found)} windows" if count <= most * size else "")
            )
        return PromptTokens(tuple(fragments), tuple(tuple(one) for one in found), size)

    def describe_tokens(self, prompt: str, reading: Reading | None = None) -> str:
        """For people: which words became which tokens, with which weights, and where windows begin."""
        return self.tokens(prompt, reading).describe()

    def _fragment(self, fragment: Fragment, number: int, prompt: str) -> list[Token]:
        tokenizer = self.tokenizer
        pieces = tokenizer.read(fragment.text)
        marks = {tokenizer.unknown, tokenizer.start, tokenizer.end}
        bad = [fragment.text[slice(*piece.span)] for piece in pieces if piece.id in marks]
        if bad:
            raise UserError(f"the text encoder cannot read {quoted(bad)} in the prompt {quoted([prompt])}")
        return [Token(piece.id, fragment.weight, number, piece.text, piece.span) for piece in pieces]

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(77 n, C) float32 per text, n its number of windows, read as `reading` says."""
        return [one.states for one in self.encode(texts)]

    def encode(self, prompts: Sequence[str], reading: Reading | None = None) -> list[PromptStates]:
        """States and pooled output per prompt.

        Raises:
            UserError: as `tokens`.
        """
        reading = reading or self.reading
        read = [self.tokens(prompt, reading) for prompt in prompts]
        plans = [self._plan(tokens, reading.dialect) for tokens in read]
        needs_empty = reading.dialect in ("comfy", "compel") and any(_weighty(tokens) for tokens in read)
        empty = [self._row(())] if needs_empty else []
        ran = self._run_all([*empty, *(row for plan in plans for variant in plan for row in variant)])
        z_empty = ran[empty[0]][0] if empty else torch.empty(0)
        return [self._combine(*one, reading.dialect, ran, z_empty) for one in zip(read, plans, strict=True)]

    def _row(self, window: Sequence[Token], hidden: int | None = None) -> Row:
        """One window with marks and padding, the tokens of fragment `hidden` hidden from attention."""
        start, end = self.tokenizer.start, self.tokenizer.end
        (ids,) = windows([t.id for t in window], length=self.window, start=start, end=end, pad=self.pad)
        seen = [int(t.fragment != hidden) for t in window]
        return tuple(ids), (1, *seen, *[1] * (self.window - 1 - len(seen)))

    def _plan(self, tokens: PromptTokens, dialect: str) -> list[list[Row]]:
        """The windows to run: the prompt, and for compel the prompt without each fragment of a weight below 1."""
        hidden: list[int | None] = [None]
        if dialect == "compel":
            hidden += _lowered(tokens)
        return [[self._row(window, one) for window in tokens.windows] for one in hidden]

    def _combine(
        self, tokens: PromptTokens, plan: list[list[Row]], dialect: str, ran: Ran, empty: Tensor
    ) -> PromptStates:
        """Weights applied to the states of the plan's windows."""
        pooled = ran[plan[0][0]][1]
        variants = [torch.stack([ran[row][0] for row in variant]) for variant in plan]
        if _weighty(tokens):
            weights = torch.ones(variants[0].shape[:2], device=variants[0].device)
            for row, window in zip(weights, tokens.windows, strict=True):
                row[1 : 1 + len(window)] = torch.tensor([t.weight for t in window])
            if dialect == "a1111":
                variants = [scale_keeping_mean(variants[0], weights)]
            else:
                variants = [away_from_empty(z, empty, weights) for z in variants]
        if len(variants) > 1:
            shares = without_shares([tokens.fragments[i].weight for i in _lowered(tokens)])
            variants = [blend(variants, [1.0, *shares])]
        return PromptStates(variants[0].flatten(0, 1), pooled)

    def _run_all(self, rows: Sequence[Row], most: int = 16) -> Ran:
        """Each row once; rows without hidden tokens run without a mask."""
        found: Ran = {}
        unique = list(dict.fromkeys(rows))
        for masked in (False, True):
            same = [row for row in unique if (0 in row[1]) == masked]
            for start in range(0, len(same), most):
                batch = same[start : start + most]
                states, pooled = self._run(batch, masked)
                found.update(zip(batch, zip(states, pooled, strict=True), strict=True))
        return found

    @torch.no_grad()
    def _run(self, rows: Sequence[Row], masked: bool) -> tuple[Tensor, Tensor]:
        device = next(self.tower.parameters()).device
        ids = torch.tensor([row[0] for row in rows], device=device)
        mask = torch.tensor([row[1] for row in rows], device=device) if masked else None
        hidden, pooled = self.tower(ids, mask)
        states: Tensor = hidden[-(self.skip + 1)]
        if self.final_norm:
            states = self.tower.text_model.final_layer_norm(states)
        return states.float(), pooled.float()


def _weighty(tokens: PromptTokens) -> bool:
    """Whether any token has a weight other than 1."""
    return any(token.weight != 1 for window in tokens.windows for token in window)


def _lowered(tokens: PromptTokens) -> list[int]:
    """The fragments of weight below 1 that have tokens."""
    lowered = {t.fragment: None for window in tokens.windows for t in window if t.weight < 1}
    return list(lowered)


def check_skip(skip: object, layers: int) -> None:
    """`UserError` for a number of skipped layers that the tower cannot do without."""
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < layers:
        raise UserError(f"skip must be a whole number from 0 to {layers - 1}, got {skip!r}")


def text_tower(values: Mapping[str, Any], tensors: Mapping[str, Tensor], *, what: str) -> CLIPTextModel:
    """The text tower of a config with the given weights, frozen.

    Args:
        values: `config.json` of a text tower; what is not the tower's is passed over.
        tensors: `text_model.…` or without that prefix; a whole CLIP's vision tower, projections, scale and the
            positions' numbers are left aside.
        what: names the weights in a sentence.

    Raises:
        ModelFileError: when names or shapes differ.
        UserError: for a config that cannot be.
    """
    known = {field.name for field in fields(CLIPTextConfig)}
    config = CLIPTextConfig.from_dict({k: v for k, v in values.items() if k in known and v is not None})
    own = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("vision_model.", "visual_projection.", "text_projection."))
        and name != "logit_scale"
        and not name.endswith("position_ids")
    }
    return frozen(lambda: CLIPTextModel(config), own, {}, what=what)



class CLIPText:
    """Texts -> hidden states of CLIP's text tower.

    Args:
        folder: with `text_encoder/` and `tokenizer/` (diffusers), or with all their files in one (transformers).
        skip: how many of the last layers are left out: 0 for Stable Diffusion 1, 1 for the "penultimate" states of
            a 24-layer OpenCLIP tower (Stable Diffusion 2; its converted folders are cut to 23 layers and need 0).
            diffusers' `clip_skip`; other programs count "clip skip" from 1.
        final_norm: whether the last layer norm follows (Stable Diffusion 1 and 2) or not (SDXL).
        max_windows: the longest text, in windows.
        reading: how texts are read; a setting of the call, no part of `describe`; the lower `max_windows` holds.
        device: where it runs and its states lie.
        hasher: gives a file's SHA-256.

    Raises:
        ModelFileError: when a file is missing, damaged or does not fit its config.
        UserError: for an impossible `skip`.
    """

    kind = "clip"
    network: nn.Module | None = None

    def __init__(
        self,
        folder: Path,
        *,
        skip: int = 0,
        final_norm: bool = True,
        max_windows: int = 8,
        reading: Reading = PLAIN,
        device: torch.device | str = "cpu",
        hasher: Hasher = sha256,
    ) -> None:
        self._encoder, self._words = _places(folder)
        self.skip, self.final_norm, self.max_windows = skip, final_norm, max_windows
        self.reading, self.device, self.hasher = reading, torch.device(device), hasher
        values = read_json(self._encoder / "config.json")
        if values.get("model_type") not in ("clip_text_model", "clip"):
            raise ModelFileError(f"{self._encoder / 'config.json'} is not a CLIP text tower's")
        self._values: dict[str, Any] = values.get("text_config", {}) if values["model_type"] == "clip" else values
        check_skip(skip, self._values.get("num_hidden_layers", 12))
        if max_windows < 1:
            raise UserError(f"max_windows must be 1 or more, got {max_windows}")
        self.width: int = self._values.get("hidden_size", 512)
        self._window: int = self._values.get("max_position_embeddings", 77)
        self.max_tokens = self._window * max_windows
        self._loaded: tuple[ClipTokenizer, CLIPTextModel] | None = None
        self._digests: tuple[str, str] | None = None

    def load(self) -> tuple[ClipTokenizer, CLIPTextModel]:
        """(tokenizer, network), read at the first call."""
        if self._loaded is None:
            path = _weights(self._encoder)
            network = text_tower(self._values, read_tensors(path), what=str(path))
            self._loaded = from_folder(self._words), network.to(self.device)
        return self._loaded

    def prompts(self) -> PromptEncoder:
        """The encoder of prompts over the same tokenizer, network and settings."""
        own = self.reading.max_windows
        most = self.max_windows if own is None else min(own, self.max_windows)
        reading = replace(self.reading, max_windows=most)
        return PromptEncoder(*self.load(), skip=self.skip, final_norm=self.final_norm, reading=reading)

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(77 n, C) float32 per text, n its number of windows.

        Raises:
            UserError: for a text of more than `max_windows` windows, or with letters that the vocabulary lacks.
        """
        return self.prompts().states(texts)

    def describe(self) -> dict[str, Any]:
        """Hashes of weights and tokenizer, and which states are taken."""
        if self._digests is None:
            words = hashlib.sha256()
            for name in sorted(p.name for p in self._words.iterdir() if p.name in _TOKENIZER):
                words.update((self._words / name).read_bytes())
            self._digests = self.hasher(_weights(self._encoder)), words.hexdigest()
        weights, tokenizer = self._digests
        return {
            "kind": self.kind,
            "sha256": weights,
            "tokenizer": tokenizer,
            "pad": self.load()[0].pad,
            "skip": self.skip,
            "final_norm": self.final_norm,
            "max_windows": self.max_windows,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], find: Callable[[str], Path | None], hasher: Hasher = sha256
    ) -> CLIPText:
        """From `describe`; the folder is found by the hash of its weights, and must give the same description."""
        keys = ("kind", "sha256", "tokenizer", "pad", "skip", "final_norm", "max_windows")
        check_keys(config, keys, "the text encoder's config")
        path = find(config["sha256"])
        if path is None:
            raise ModelFileError(
                f"the model needs the CLIP text tower whose weights have SHA-256 {config['sha256'][:12]}…, "
                "and no file on this machine is known to have it: give its folder"
            )
        folder = path.parent.parent if path.parent.name == "text_encoder" else path.parent
        options = {key: config[key] for key in ("skip", "final_norm", "max_windows")}
        encoder = cls(folder, hasher=hasher, **options)
        found = encoder.describe()
        for key in keys:
            if found[key] != config[key]:
                raise ModelFileError(f"{folder} is not the text encoder of this model: its {key} differs")
        return encoder


def _places(folder: Path) -> tuple[Path, Path]:
    """The folders of weights and of tokenizer files."""
    encoder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not folder.is_dir():
        raise ModelFileError(f"the text encoder's folder {folder} does not exist")
    _weights(encoder)
    if not ((words / WHOLE).is_file() or all((words / name).is_file() for name in (VOCABULARY, MERGES))):
        raise ModelFileError(f"{words} holds no CLIP tokenizer ({VOCABULARY} and {MERGES}, or {WHOLE})")
    return encoder, words


def _weights(folder: Path) -> Path:
    """The weights' file."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ModelFileError(f"{folder} holds no {_WEIGHTS[0]}")
