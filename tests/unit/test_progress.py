"""Lines of progress where there is no terminal."""

from __future__ import annotations

import io

import pytest

from django_scaledb import progress


def lines(total: int, steps: int) -> list[str]:
    stream = io.StringIO()
    with progress.Progress(total, "rows", stream=stream) as told:
        for _ in range(steps):
            told.advance()
    return [line.split(" (")[0] for line in stream.getvalue().splitlines()]


def test_no_line_is_written_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    assert lines(2, 2) == ["rows: 1 of 2", "rows: 2 of 2"]


def test_the_end_is_told_once_a_line_was(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([0, 0, 6, 6, 7, 8, 9])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert lines(3, 3) == ["rows: 2 of 3", "rows: 3 of 3"]


def test_what_is_over_at_once_says_nothing():
    assert lines(1000, 3) == []
