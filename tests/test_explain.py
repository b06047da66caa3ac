"""Figures of runs: what `metrics.jsonl` holds is drawn, whatever kind of run wrote it and however it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from sfumato import explain
from sfumato.errors import UserError


def written(folder: Path, *records: dict[str, Any], torn: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    return folder


def test_a_run_without_noise_levels_has_one_panel(tmp_path: Path) -> None:
    """Codecs and CLIP learn nothing by noise levels."""
    records = [{"step": step, "loss": 1 / step, "loss_by_level": []} for step in (1, 2, 3)]
    figure = explain.loss(written(tmp_path, *records, {"step": 3, "validation_loss": 0.5, "validation_by_level": []}))
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 1 / 2, 1 / 3], [0.5]]


def test_steps_that_were_left_out_leave_gaps(tmp_path: Path) -> None:
    levels = [None, *[0.5] * 7]
    records = [{"step": step, "loss": loss, "loss_by_level": levels} for step, loss in ((1, 0.5), (2, None), (3, 0.25))]
    over_time, by_level = explain.loss(written(tmp_path, *records)).axes
    assert list(over_time.lines[0].get_ydata()) == pytest.approx([0.5, float("nan"), 0.25], nan_ok=True)
    assert len(by_level.lines) == 3


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 0.1, "loss_by_level": [0.1, 0.', "4", "\x00"])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, torn: str) -> None:
    records = [{"step": step, "loss": 0.5, "loss_by_level": [0.5] * 8} for step in (1, 2, 3)]
    over_time, _ = explain.loss(written(tmp_path, *records, torn=torn)).axes
    assert list(over_time.lines[0].get_xdata()) == [1, 2, 3]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        explain.loss(tmp_path)
    with pytest.raises(UserError, match="holds no losses yet"):
        explain.loss(written(tmp_path, torn='{"step": 1, "lo'))
