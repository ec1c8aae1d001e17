"""The parts of a conversion: what is to be run next, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from django_scaledb.postgres.executor import Guard
from django_scaledb.postgres.statements import Statement, Step

SCAN_BYTES_PER_SECOND = 200e6
INDEX_ROWS_PER_SECOND = 1e6
COPY_ROWS_PER_SECOND = 25e3
"""Rough, from an ordinary disk: estimates say whether it takes minutes or days."""


@dataclass(frozen=True)
class Cost:
    """What a stage reads, how long that may take (seconds) and the disk space it needs (bytes)."""

    scans: str = "nothing"
    seconds: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One step to be run by the executor, or `work` that runs in many small transactions.

    `done` tells, when the executor asks what is left of a step outside a transaction that was cut
    short. `sample` are the statements that `work` repeats, for ``--dry-run``.
    """

    name: str
    step: Step | None = None
    guard: Guard | None = None
    resume: Callable[[], Step | None] | None = None
    bounded: bool = True
    work: Callable[[], None] | None = None
    sample: tuple[Statement, ...] = ()
    cost: Cost = Cost()
