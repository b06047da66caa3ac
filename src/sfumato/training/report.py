"""What a person sees of a training run: a progress bar on a terminal, plain lines elsewhere, `metrics.jsonl` always.

>>> duration(7500)
'2 h 05 min'
>>> duration(42)
'42 s'
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sfumato.checkpoints.io import explain_os_error, write_bytes
from sfumato.errors import UserError

METRICS = "metrics.jsonl"


def duration(seconds: float) -> str:
    """A length of time in words a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Reporter:
    """Writes `metrics.jsonl` and tells the terminal. Only the main process speaks.

    A line is about the steps since the last one of its kind. Of training: `step`, `loss` (null when every step was left
    out), `loss_by_level` (eight noise levels, noisiest first; null where nothing was drawn), `lr`, `grad_norm` of the
    last step, `skipped` (steps left out because they were not finite), `pictures_per_second`, `data_wait_share` (of the
    time, spent waiting for pictures) and `seconds_left`. Of validation: `step`, `validation_loss`,
    `validation_by_level`. A run that goes on from step s drops the lines after s, which it will write again.

    Args:
        run: the run's folder.
        total: steps of the whole run.
        start: the step it begins with.
        speaks: whether this process reports at all.
    """

    def __init__(self, run: Path, total: int, start: int, *, speaks: bool = True) -> None:
        self.run, self.total, self.start, self.speaks = run, total, start, speaks
        self._on_terminal, self._gone = sys.stdout.isatty(), False
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self.speaks:
            self._drop_lines_after_start()
        if self.speaks and self._on_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.total, completed=self.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError) if self._gone else nullcontext():
                self._bar.stop()

    def hang_up(self) -> None:
        """Print nothing more on a terminal, which has gone; `metrics.jsonl` is written all the same."""
        self._gone = self._on_terminal

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """A line for the person."""
        if not self.speaks or self._gone:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def metrics(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and show its main figures."""
        if not self.speaks:
            return
        path = self.run / METRICS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"could not write {path}: {explain_os_error(error)}") from None
        shown = [f"step {record['step']:>7}/{self.total}"]
        for key, form in (("loss", ".4f"), ("validation_loss", ".4f"), ("lr", ".2e"), ("pictures_per_second", ".1f")):
            if record.get(key) is not None:
                shown.append(f"{key.replace('_', ' ')} {record[key]:{form}}")
        if "seconds_left" in record:
            shown.append(f"{duration(record['seconds_left'])} left")
        line = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, description=line.split("  ", 1)[-1] if "  " in line else line)
            if "validation_loss" not in record:
                return
        self.say(line)

    def _drop_lines_after_start(self) -> None:
        """Leave the lines up to the first step in `metrics.jsonl`, without what an interrupted run wrote after it."""
        path = self.run / METRICS
        if not path.is_file():
            return
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"could not read {path}: {explain_os_error(error)}") from None
        kept = [line for line in lines if _step_of(line) <= self.start]
        if kept != lines:
            write_bytes(path, b"".join(kept))


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, none where there is no such file; those that a crash has cut off are passed
    over."""
    path, found = run / METRICS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def _step_of(line: bytes) -> float:
    """The step of a whole line of `metrics.jsonl`; infinity for a torn one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
