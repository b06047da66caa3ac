"""The formulas of weights: what they keep, what they leave alone, and where they meet."""

from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.weighting import away_from_empty, blend, scale_keeping_mean, without_shares
from sfumato.errors import UserError


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


def test_the_mean_is_kept_window_by_window() -> None:
    z, w = draw(3, 7, 4), torch.ones(3, 7)
    w[0, 2], w[1, 3:5] = 1.3, 0.4
    found = scale_keeping_mean(z, w)
    torch.testing.assert_close(found.mean((1, 2)), z.mean((1, 2)))
    assert torch.equal(found[2], z[2])
    for i in (0, 1):  # all tokens of a window by one factor beside their weights
        ratio = (found[i] / (z[i] * w[i, :, None])).flatten()
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        torch.testing.assert_close(found[i], scale_keeping_mean(z[i], w[i]))
    assert torch.equal(scale_keeping_mean(z, torch.ones(3, 7)), z)


def test_weights_that_cancel_out() -> None:
    with pytest.raises(UserError, match="cancel out"):
        scale_keeping_mean(torch.ones(2, 3), torch.tensor([2.0, -2.0]))


def test_between_the_empty_prompt_and_beyond() -> None:
    z, empty = draw(5, 4), torch.zeros(5, 4)
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, -1.0])
    found = away_from_empty(z, empty + 1, w)
    assert torch.equal(found[0], z[0])
    expected = torch.stack([torch.ones(4), 2 * z[2] - 1, (z[3] + 1) / 2, 2 - z[4]])
    torch.testing.assert_close(found[1:], expected)


def test_shares() -> None:
    assert without_shares([1.0, 0.5, 0.25]) == pytest.approx([0, 1, 2.414213562])
    assert without_shares([0.0, -3.0]) == pytest.approx([63661.977, 63661.977])
    z = [draw(5, 4), torch.zeros(5, 4), torch.ones(5, 4)]
    torch.testing.assert_close(blend(z, [1.0, 1.0, 2.0]), z[0] / 4 + 0.5)
