"""all-MiniLM-L6-v2 as a frozen text encoder: small, English, inside a package that pip brings.

Six layers of BERT, 22.7 million parameters, states of 384 numbers (Wang 2020, fine-tuned by sentence-transformers).
The weights are used only if their SHA-256 is the published file's. Nothing is loaded before the first text.

>>> encoder = MiniLM()
>>> encoder.width, encoder.describe()["kind"]
(384, 'minilm')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import check_keys
from sfumato.conditioners.pretrained import Hasher, frozen, need, read_json, read_tensors, sha256
from sfumato.conditioners.text import by_length
from sfumato.conditioners.words import INSTALL, WordPieces, minilm_folder, quoted
from sfumato.errors import ModelFileError, UserError

WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MiniLM:
    """Texts -> the last hidden states of all-MiniLM-L6-v2, start and end mark included.

    Args:
        folder: that holds the model (config.json, model.safetensors, tokenizer.json); None: the installed package's.
        device: where it runs and its states lie.
        hasher: gives a file's SHA-256; a caller with a memory of hashes passes its own.
    """

    kind = "minilm"
    width, max_tokens = 384, 256
    network: nn.Module | None = None

    def __init__(
        self, folder: Path | None = None, *, device: torch.device | str = "cpu", hasher: Hasher = sha256
    ) -> None:
        self.folder, self.device, self.hasher = folder, torch.device(device), hasher
        self.pieces = WordPieces(folder, latin=True)
        self._model: nn.Module | None = None

    def load(self) -> nn.Module:
        """The network, read at the first call.

        Raises:
            UserError: when the package is missing (with the command that installs it).
            ModelFileError: when the file is another, by its hash.
        """
        if self._model is None:
            folder = minilm_folder(self.folder)
            path = folder / "model.safetensors"
            if not path.is_file():
                raise ModelFileError(f"the text encoder's folder lacks {path.name}: {folder}")
            found = self.hasher(path)
            if found != WEIGHTS:
                raise ModelFileError(
                    f"{path} is not all-MiniLM-L6-v2: its SHA-256 is {found[:12]}…, expected {WEIGHTS[:12]}…; "
                    f"install it anew: {INSTALL} --force-reinstall"
                )
            need("transformers", "text")
            config = need("transformers.models.bert.configuration_bert", "text").BertConfig(
                **read_json(folder / "config.json")
            )
            bert = need("transformers.models.bert.modeling_bert", "text").BertModel
            unused = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
            tensors = {k: v for k, v in read_tensors(path).items() if k not in unused}
            positions = torch.arange(config.max_position_embeddings)[None]
            buffers = {"position_ids": positions, "token_type_ids": torch.zeros_like(positions)}
            network = frozen(lambda: bert(config, add_pooling_layer=False), tensors, buffers, what=str(path))
            self._model = network.to(self.device)
        return self._model

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """(L_i, 384) float32 per text; L_i counts the start and end mark.

        Raises:
            UserError: for words that it cannot read, naming them, and for more than 256 tokens.
        """
        ids = [self._ids(text) for text in texts]
        model = self.load()

        def run(batch: Tensor) -> Tensor:
            states: Tensor = model(input_ids=batch.to(self.device)).last_hidden_state
            return states

        with torch.no_grad():
            return by_length(ids, run)

    def _ids(self, text: str) -> list[int]:
        ids = self.pieces.ids(text)
        if len(ids) > self.max_tokens:
            raise UserError(
                f"the prompt {quoted([text])} has {len(ids)} tokens; the text encoder reads at most {self.max_tokens}"
            )
        return ids

    def describe(self) -> dict[str, Any]:
        """Kind and the weights' hash."""
        return {"kind": self.kind, "sha256": WEIGHTS}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], folder: Path | None = None, hasher: Hasher = sha256) -> MiniLM:
        """From `describe`."""
        check_keys(config, ("kind", "sha256"), "the text encoder's config")
        if config["sha256"] != WEIGHTS:
            raise UserError(f"the model was trained with another MiniLM ({str(config['sha256'])[:12]}…)")
        return cls(folder, hasher=hasher)
