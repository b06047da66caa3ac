"""What a person sees of a training run: a progress bar on a terminal, plain lines elsewhere, `metrics.jsonl` always.

>>> duration(3725)
'1 h 02 min'
>>> duration(42)
'42 s'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


def duration(seconds: float) -> str:
    """A length of time in words a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Reporter:
    """Writes `metrics.jsonl` and tells the terminal. Only the main process speaks.

    Args:
        run: the run's folder.
        total: steps of the whole run.
        start: the step it begins with.
        speaks: whether this process reports at all.
    """

    def __init__(self, run: Path, total: int, start: int, *, speaks: bool = True) -> None:
        self.run, self.total, self.start, self.speaks = run, total, start, speaks
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self.speaks and sys.stdout.isatty():
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
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """A line for the person."""
        if not self.speaks:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def metrics(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and show its main figures."""
        if not self.speaks:
            return
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = [f"step {record['step']:>7}/{self.total}"]
        for key, form in (("loss", ".4f"), ("validation_loss", ".4f"), ("lr", ".2e"), ("pictures_per_second", ".1f")):
            if key in record:
                shown.append(f"{key.replace('_', ' ')} {record[key]:{form}}")
        if "seconds_left" in record:
            shown.append(f"{duration(record['seconds_left'])} left")
        line = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, description=line.split("  ", 1)[-1] if "  " in line else line)
            if "validation_loss" not in record:
                return
        self.say(line)
