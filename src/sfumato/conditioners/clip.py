"""CLIP's text tower as a frozen encoder, from a folder in the layout of diffusers or transformers (Radford 2021).

The states are those of Stable Diffusion: every window of 77 tokens is `[start, up to 75 of the text, end, padding …]`,
padding included, because the padding's states are part of what such models were trained on. A longer text is read
in several windows one after the other; nothing is cut off.

>>> windows([5, 6, 7], length=4, start=1, end=2, pad=2)
[[1, 5, 6, 2], [1, 7, 2, 2]]
>>> windows([], length=4, start=1, end=2, pad=0)
[[1, 2, 0, 0]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import check_keys
from sfumato.conditioners.pretrained import Hasher, frozen, need, read_json, read_tensors, sha256
from sfumato.conditioners.text import by_length
from sfumato.conditioners.words import quoted
from sfumato.errors import ModelFileError, UserError

_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


def windows(ids: Sequence[int], *, length: int, start: int, end: int, pad: int) -> list[list[int]]:
    """Token ids in windows of `length`, each with start and end mark, the last one padded; at least one."""
    inner = length - 2
    parts = [list(ids[i : i + inner]) for i in range(0, max(len(ids), 1), inner)]
    return [[start, *part, end, *[pad] * (inner - len(part))] for part in parts]


class CLIPText:
    """Texts -> hidden states of CLIP's text tower.

    Args:
        folder: with `text_encoder/` and `tokenizer/` (diffusers), or with all their files in one (transformers).
        skip: how many of the last layers are left out: 0 for Stable Diffusion 1, 1 for the "penultimate" states of
            a 24-layer OpenCLIP tower (Stable Diffusion 2; its converted folders are cut to 23 layers and need 0).
            diffusers' `clip_skip`; other programs count "clip skip" from 1.
        final_norm: whether the last layer norm follows (Stable Diffusion 1 and 2) or not (SDXL).
        max_windows: the longest text, in windows.
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
        device: torch.device | str = "cpu",
        hasher: Hasher = sha256,
    ) -> None:
        self._encoder, self._words = _places(folder)
        self.skip, self.final_norm, self.max_windows = skip, final_norm, max_windows
        self.device, self.hasher = torch.device(device), hasher
        values = read_json(self._encoder / "config.json")
        if values.get("model_type") not in ("clip_text_model", "clip"):
            raise ModelFileError(f"{self._encoder / 'config.json'} is not a CLIP text tower's")
        self._values: dict[str, Any] = values.get("text_config", {}) if values["model_type"] == "clip" else values
        layers = self._values.get("num_hidden_layers", 12)
        if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < layers:
            raise UserError(f"skip must be a whole number from 0 to {layers - 1}, got {skip!r}")
        if max_windows < 1:
            raise UserError(f"max_windows must be 1 or more, got {max_windows}")
        self.width: int = self._values.get("hidden_size", 512)
        self._window: int = self._values.get("max_position_embeddings", 77)
        self.max_tokens = self._window * max_windows
        self._loaded: tuple[Any, Any] | None = None
        self._digests: tuple[str, str] | None = None

    def load(self) -> tuple[Any, Any]:
        """(tokenizer, network), read at the first call."""
        if self._loaded is None:
            transformers = need("transformers", "text")
            tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(self._words), local_files_only=True)
            self._loaded = tokenizer, self._network().to(self.device)
        return self._loaded

    def _network(self) -> nn.Module:
        clip = need("transformers.models.clip.modeling_clip", "text").CLIPTextModel
        config = need("transformers.models.clip.configuration_clip", "text").CLIPTextConfig(
            **{k: v for k, v in self._values.items() if k not in ("torch_dtype", "dtype", "architectures")}
        )
        path = _weights(self._encoder)
        with torch.device("meta"):
            nested = any(name.startswith("text_model.") for name in clip(config).state_dict())
        tensors = {
            ("text_model." if nested else "") + name.removeprefix("text_model."): tensor
            for name, tensor in read_tensors(path).items()
            if not name.startswith(("vision_model.", "visual_projection.", "text_projection."))
            and name != "logit_scale"
            and not name.endswith("position_ids")
        }
        buffers = {"position_ids": torch.arange(config.max_position_embeddings)[None]}
        network: nn.Module = frozen(lambda: clip(config), tensors, buffers, what=str(path))
        return network

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(77 n, C) float32 per text, n its number of windows.

        Raises:
            UserError: for a text of more than `max_windows` windows, or with letters that the vocabulary lacks.
        """
        per_text = [self._ids(text) for text in texts]
        rows = [window for one in per_text for window in one]
        with torch.no_grad():
            states = by_length(rows, self._run, most=16)
        found, start = [], 0
        for one in per_text:
            found.append(torch.cat(states[start : start + len(one)]))
            start += len(one)
        return found

    def _run(self, batch: Tensor) -> Tensor:
        network = self.load()[1]
        hidden = network(input_ids=batch.to(self.device), output_hidden_states=True).hidden_states
        states: Tensor = hidden[-(self.skip + 1)]
        if self.final_norm:
            states = getattr(network, "text_model", network).final_layer_norm(states)
        return states

    def _ids(self, text: str) -> list[list[int]]:
        tokenizer = self.load()[0]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        marks = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        bad = [text[a:b] for i, (a, b) in zip(ids, encoded["offset_mapping"], strict=True) if i in marks]
        if bad:
            raise UserError(f"the text encoder cannot read {quoted(bad)} in the prompt {quoted([text])}")
        most = self.max_windows * (self._window - 2)
        if len(ids) > most:
            raise UserError(f"the prompt {quoted([text])} has {len(ids)} tokens; the text encoder reads at most {most}")
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        return windows(ids, length=self._window, start=start, end=end, pad=pad)

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
            "pad": self.load()[0].pad_token_id,
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
    if not ((words / "tokenizer.json").is_file() or all((words / n).is_file() for n in ("vocab.json", "merges.txt"))):
        raise ModelFileError(f"{words} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)")
    return encoder, words


def _weights(folder: Path) -> Path:
    """The weights' file."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ModelFileError(f"{folder} holds no {_WEIGHTS[0]}")
