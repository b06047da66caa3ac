"""Measurements by which one way is chosen over another."""

from __future__ import annotations

import pytest

from sfumato.backends import timing


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_two_ways_take_turns_and_the_least_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), list[str]()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    slow = iter([1.0, 9.0, 2.0, 9.0])

    def one() -> None:
        calls.append("one")
        clock.work(next(slow))

    def other() -> None:
        calls.append("other")
        clock.work(3.0)

    assert timing.times_as_fast(one, other) == pytest.approx(1.5)
    assert calls == ["one", "other"] * 4


def test_what_is_called_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    seconds = iter([1.0, 5.0, 4.0, 6.0])
    assert timing.least_seconds(lambda: clock.work(next(seconds))) == pytest.approx(4.0)
