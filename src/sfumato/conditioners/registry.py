"""Conditioners from stored configs: `describe()` written into a model's file comes back as the same conditioner.

A config names a kind of this table, never an import path. Frozen encoders are found again by the hash of their weights:
MiniLM in its package, others by `find`, which maps a SHA-256 to a file on this machine.

>>> from_config({"kind": "label", "names": ["cat", "dog"]}).encode(["dog"]).labels.tolist()
[1]
>>> [kind for kind in sorted(CONDITIONERS) if "label" in kind]
['embedded-label', 'label']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import shown
from sfumato.conditioners.base import Combined, Conditioner, check_keys
from sfumato.conditioners.clip import CLIPText
from sfumato.conditioners.clip_prompt import ClipPrompt
from sfumato.conditioners.joint import JointText
from sfumato.conditioners.label import EmbeddedLabel, LabelConditioner
from sfumato.conditioners.layout import Coordinates, Layout, LayoutTokens
from sfumato.conditioners.minilm import MiniLM
from sfumato.conditioners.pretrained import Hasher, sha256
from sfumato.conditioners.semantic import Semantic
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import minilm_installed
from sfumato.errors import ModelFileError, UserError, raise_unknown

Find = Callable[[str], Path | None]


def nowhere(digest: str) -> Path | None:
    """No file is known by its hash."""
    return None


def _combined(config: Mapping[str, Any], find: Find, hasher: Hasher) -> Conditioner:
    check_keys(config, ("kind", "parts"), "the conditioner's config")
    return Combined({name: _build(part, find, hasher) for name, part in config["parts"].items()})


def _clip(config: Mapping[str, Any], find: Find, hasher: Hasher) -> Conditioner:
    with torch.device("cpu"):  # its weights are read at once, also where a model is only outlined, on "meta"
        return TextConditioner(CLIPText.from_config(config, find, hasher))


def _minilm(config: Mapping[str, Any], find: Find, hasher: Hasher) -> Conditioner:
    path = None if minilm_installed() else find(str(config.get("sha256")))
    return TextConditioner(MiniLM.from_config(config, path.parent if path else None, hasher))


CONDITIONERS: dict[str, Callable[[Mapping[str, Any], Find, Hasher], Conditioner]] = {
    "clip": _clip,
    "clip-prompt": lambda config, find, hasher: ClipPrompt.from_config(config),
    "combined": _combined,
    "coordinates": lambda config, find, hasher: Coordinates.from_config(config),
    "depth": lambda config, find, hasher: shown.from_config(config),
    "embedded-label": lambda config, find, hasher: EmbeddedLabel.from_config(config),
    "joint": lambda config, find, hasher: TextConditioner(JointText.from_config(config)),
    "label": lambda config, find, hasher: LabelConditioner.from_config(config),
    "layout": lambda config, find, hasher: Layout.from_config(config),
    "layout-tokens": lambda config, find, hasher: LayoutTokens.from_config(config),
    "low-resolution": lambda config, find, hasher: shown.from_config(config),
    "masked": lambda config, find, hasher: shown.from_config(config),
    "minilm": _minilm,
    "semantic": lambda config, find, hasher: Semantic.from_config(config),
}
"""Kind -> builder of (config, find, hasher)."""


def from_config(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    find: Find = nowhere,
    hasher: Hasher = sha256,
) -> Conditioner:
    """The conditioner that `describe` told of.

    Args:
        config: JSON; an unknown kind or key is refused.
        tensors: the weights of its `network`, names and shapes exactly; None: freshly initialised (from torch's global
            generator, on the device that is the default where this is called).
        find: SHA-256 -> a weights' file with it, in its own folder with config and tokenizer, or None. MiniLM is
            looked for only where its package is missing.
        hasher: file -> SHA-256.

    Raises:
        UserError: for a config that says nothing known.
        ModelFileError: for weights that do not fit it.
    """
    conditioner = _build(config, find, hasher)
    if tensors is not None and conditioner.network is None and tensors:
        raise ModelFileError(f"the {config['kind']} conditioner has no weights, but the file has {len(tensors)}")
    if tensors is not None and conditioner.network is not None:
        try:
            conditioner.network.load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t", 1)[-1].split())
            raise ModelFileError(f"the conditioner's weights do not fit its config ({reason[:300]})") from None
    return conditioner


def _build(config: Mapping[str, Any], find: Find, hasher: Hasher) -> Conditioner:
    if not isinstance(config, Mapping):
        raise UserError(f"a conditioner's config is a mapping, got {type(config).__name__}")
    kind = config.get("kind")
    if kind not in CONDITIONERS:
        raise_unknown("conditioner", str(kind), CONDITIONERS)
    return CONDITIONERS[str(kind)](config, find, hasher)
