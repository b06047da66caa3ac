"""A conditioner comes back from its own description, and only from that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.condition import Condition
from sfumato.conditioners.base import Combined, Conditioner
from sfumato.conditioners.clip import CLIPText
from sfumato.conditioners.label import EmbeddedLabel, LabelConditioner
from sfumato.conditioners.layout import Box, Coordinates, Layout, LayoutTokens
from sfumato.conditioners.pretrained import sha256
from sfumato.conditioners.registry import CONDITIONERS, from_config
from sfumato.conditioners.semantic import Semantic
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import WordPieces, WordVocabulary
from sfumato.errors import ModelFileError, UserError

from . import encoders
from .test_layout import TINY

CASES: dict[str, tuple[Callable[[Path], Conditioner], list[Any]]] = {
    "minilm": (lambda folder: TextConditioner(encoders.minilm()), ["a cat", None]),
    "clip": (lambda folder: TextConditioner(CLIPText(encoders.write_clip(folder), skip=1)), ["a cat", None]),
    "clip-prompt": (lambda folder: encoders.clip_prompt(), ["a (cat:1.2)", None]),
    "joint": (lambda folder: TextConditioner(encoders.joint(WordVocabulary(["cat"]), "full")), ["cat", None]),
    "joint-pieces": (lambda folder: TextConditioner(encoders.joint(WordPieces())), ["cat", None]),
    "label": (lambda folder: LabelConditioner(["cat", "dog"]), ["dog", None]),
    "embedded-label": (lambda folder: EmbeddedLabel(["cat", "dog"], width=4), ["dog", None]),
    "layout": (lambda folder: Layout(["cat", "dog"], 8), [(Box("dog", 0, 0, 1, 1),), None]),
    "layout-tokens": (lambda folder: LayoutTokens(["cat", "dog"], TINY), [(Box("dog", 0, 0, 1, 1),), None]),
    "semantic": (lambda folder: Semantic(["sky", "sea"], 2, mixed=3), [torch.ones(4, 4, dtype=torch.int64), None]),
    "coordinates": (lambda folder: Coordinates(2, droppable=True), [Coordinates(2).planes(4, 4), None]),
    "combined": (
        lambda folder: Combined(
            {"l": LabelConditioner(["cat"]), "t": TextConditioner(encoders.joint(WordVocabulary(["cat"])))}
        ),
        [{"l": "cat", "t": "cat"}, None],
    ),
}


SHOWN = {"masked", "depth", "low-resolution"}  # what is shown has no null; see test_shown.py


def test_every_kind_is_a_case() -> None:
    assert {name.split("-pieces")[0] for name in CASES} == set(CONDITIONERS) - SHOWN


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    conditioner = make(tmp_path)
    config = json.loads(json.dumps(conditioner.describe()))
    tensors = {} if conditioner.network is None else conditioner.network.state_dict()
    files = {sha256(file): file for file in tmp_path.rglob("*.safetensors")}
    back = from_config(config, tensors, find=files.get)
    assert back.describe() == conditioner.describe() and back.slots == conditioner.slots
    assert _same(back.encode(inputs), conditioner.encode(inputs))
    assert _same(back.null(2), conditioner.null(2))


def _same(one: Condition, other: Condition) -> bool:
    mine, theirs = ({**c.for_network(), "concat": c.concat} for c in (one, other))
    mine, theirs = ({n: v for n, v in slots.items() if v is not None} for slots in (mine, theirs))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[slot], theirs[slot]) for slot in mine)


def test_names_the_kinds() -> None:
    with pytest.raises(UserError, match=r"unknown conditioner 'minilmm' \(did you mean 'minilm'\?\); known: clip, "):
        from_config({"kind": "minilmm"})
    with pytest.raises(UserError, match="unknown conditioner 'None'"):
        from_config({})
    with pytest.raises(UserError, match="a conditioner's config is a mapping, got str"):
        from_config({"kind": "combined", "parts": {"a": "torch.nn.Linear"}})


@pytest.mark.parametrize("kind", sorted(CONDITIONERS))
def test_unknown_and_missing_keys(kind: str) -> None:
    with pytest.raises(UserError, match="unknown key of the .* config 'path'"):
        from_config({"kind": kind, "path": "os.system"})
    if kind != "depth":  # whose kind says all
        with pytest.raises(UserError, match="config lacks the key"):
            from_config({"kind": kind})


def test_weights_must_fit() -> None:
    conditioner = EmbeddedLabel(["cat"], width=4)
    tensors = conditioner.network.state_dict()
    with pytest.raises(ModelFileError, match=r"weights do not fit its config \(Missing key.*embedding\.weight"):
        from_config(conditioner.describe(), {})
    with pytest.raises(ModelFileError, match="size mismatch"):
        from_config({**conditioner.describe(), "width": 5}, tensors)
    with pytest.raises(ModelFileError, match="the label conditioner has no weights, but the file has 1"):
        from_config({"kind": "label", "names": ["cat"]}, tensors)


def test_other_minilm_is_refused() -> None:
    with pytest.raises(UserError, match=r"trained with another MiniLM \(00…\)"):
        from_config({"kind": "minilm", "sha256": "00"})


def test_minilm_without_its_package_is_found_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = encoders.minilm_folder()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    back = from_config(encoders.minilm().describe(), find=lambda digest: folder / "model.safetensors")
    assert isinstance(back, TextConditioner) and back.encoder.folder == folder  # type: ignore[attr-defined]


def test_clip_must_be_found_and_be_the_same(tmp_path: Path) -> None:
    folder = encoders.write_clip(tmp_path)
    config, weights = CLIPText(folder).describe(), folder / "text_encoder" / "model.safetensors"
    with pytest.raises(ModelFileError, match="no file on this machine is known to have it: give its folder"):
        from_config(config)
    with pytest.raises(ModelFileError, match="is not the text encoder of this model: its tokenizer differs"):
        from_config({**config, "tokenizer": "00"}, find=lambda digest: weights)
    with pytest.raises(ModelFileError, match="its pad differs"):
        from_config({**config, "pad": 0}, find=lambda digest: weights)
    with pytest.raises(ModelFileError, match="its sha256 differs"):
        from_config({**config, "sha256": "00"}, find=lambda digest: weights)
