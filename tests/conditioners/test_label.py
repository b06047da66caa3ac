"""Class labels: names, ids and the null class; combinations of conditioners."""

from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.base import Combined, Conditioner
from sfumato.conditioners.label import EmbeddedLabel, LabelConditioner
from sfumato.conditioners.text import TextConditioner
from sfumato.conditioners.words import WordVocabulary
from sfumato.errors import UserError

from . import encoders


def test_names_ids_and_none() -> None:
    labels = LabelConditioner(["Cat", "dog"])
    assert labels.encode(["cat", "DOG", 1, 0, 2, None]).labels.tolist() == [0, 1, 1, 0, 2, 2]  # type: ignore[union-attr]
    assert labels.null(3).labels.tolist() == [2, 2, 2]  # type: ignore[union-attr]
    assert labels.encode(["cat"]).labels.dtype == torch.int64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("dgo", r"unknown label 'dgo' \(did you mean 'dog'\?\); known: Cat, dog"),
        (3, "label 3 is outside 0 … 2"),
        (-1, "label -1 is outside 0 … 2"),
        (1.5, "a label is a name, an id or None, got 1.5"),
        (True, "a label is a name, an id or None, got True"),
    ],
)
def test_wrong_labels(label: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LabelConditioner(["Cat", "dog"]).encode([label])  # type: ignore[list-item]


def test_names_must_differ() -> None:
    with pytest.raises(UserError, match="hold 'cat' twice"):
        LabelConditioner(["cat", "Cat"])
    with pytest.raises(UserError, match="at least one label"):
        LabelConditioner([])


def test_embedded_label_is_one_trained_token() -> None:
    labels = EmbeddedLabel(["cat", "dog"], width=8)
    condition = labels.encode(["dog", None])
    assert condition.context is not None and condition.context_mask is not None
    assert condition.context.shape == (2, 1, 8) and condition.context_mask.all()
    table = labels.network.state_dict()["embedding.weight"]
    assert torch.equal(condition.context[:, 0], table[1:]) and condition.context.requires_grad
    null = labels.null(1).context
    assert null is not None and torch.equal(null[0, 0], table[2])


# --- combinations ---------------------------------------------------------------------------------------------------


def parts() -> dict[str, Conditioner]:
    return {
        "text": TextConditioner(encoders.joint(WordVocabulary(["cat"]))),
        "label": LabelConditioner(["cat", "dog"]),
    }


def test_combination_fills_all_slots_in_any_order() -> None:
    inputs = [{"label": "dog", "text": "cat"}, {"text": ""}, None]
    one = Combined(parts()).encode(inputs)
    other = Combined(dict(reversed(parts().items()))).encode(inputs)
    assert one.labels is not None and one.labels.tolist() == [1, 2, 2]
    assert one.context is not None and other.context is not None and torch.equal(one.context, other.context)
    assert Combined(parts()).slots == {"labels", "context", "context_mask"}
    assert sorted(one.for_network()) == ["context", "context_mask", "labels"]


def test_null_of_a_combination_is_the_nulls() -> None:
    both = Combined(parts())
    null, empty = both.null(2), both.encode([{}, None])
    assert null.context is not None and empty.context is not None and null.labels is not None
    torch.testing.assert_close(null.context, empty.context, rtol=0, atol=1e-5)
    assert null.labels.tolist() == [2, 2]


def test_network_of_a_combination_is_what_is_trained() -> None:
    network = Combined(parts()).network
    assert network is not None and all(name.startswith("text.") for name in network.state_dict())
    assert Combined({"label": LabelConditioner(["cat"])}).network is None


def test_tokens_of_two_follow_one_another() -> None:
    alone = parts()["text"]
    label = EmbeddedLabel(["cat"], width=int(alone.width))  # type: ignore[attr-defined]
    both = Combined({"text": alone, "label": label}).encode([{"text": "cat", "label": "cat"}])
    text = alone.encode(["cat"]).context
    assert both.context is not None and both.context_mask is not None and text is not None
    torch.testing.assert_close(both.context, torch.cat([label.encode(["cat"]).context, text], dim=1))  # type: ignore[list-item]
    assert bool(both.context_mask.all())


def test_two_for_one_slot_are_refused() -> None:
    with pytest.raises(UserError, match="'one' and 'two' both fill the slot 'labels'"):
        Combined({"one": LabelConditioner(["cat"]), "two": LabelConditioner(["cat"])})
    with pytest.raises(UserError, match="at least one conditioner"):
        Combined({})


def test_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown condition 'txet' \(did you mean 'text'\?\); known: label, text"):
        Combined(parts()).encode([{"txet": "cat"}])
