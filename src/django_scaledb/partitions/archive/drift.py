"""What became of a table's columns since a partition left it (pure)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from django_scaledb.partitions.archive.columns import Column


@dataclass(frozen=True)
class Drift:
    """`kept` are the old columns that are still there, as they were; `changed` those of another type now.

    `added` are there now and were not; `lost` were there and are not any more.
    """

    kept: tuple[Column, ...]
    changed: tuple[tuple[Column, Column], ...]
    added: tuple[Column, ...]
    lost: tuple[Column, ...]


def compare(old: Sequence[Column], now: Sequence[Column]) -> Drift:
    """Columns are known by their names. What is generated now is computed, whatever it was."""
    before = {column.name: column for column in old if not column.generated}
    today = {column.name: column for column in now}
    stored = {name: column for name, column in today.items() if not column.generated}
    return Drift(
        kept=tuple(column for name, column in before.items() if name in stored),
        changed=tuple(
            (column, stored[name])
            for name, column in before.items()
            if name in stored and stored[name].type != column.type
        ),
        added=tuple(column for name, column in stored.items() if name not in before),
        lost=tuple(column for name, column in before.items() if name not in today),
    )


def objection(drift: Drift, left_out: Collection[str]) -> str | None:
    """Why the rows cannot be taken back as they are, and the way out; None when they can."""
    unknown = sorted(set(left_out) - {column.name for column in drift.lost})
    if unknown:
        return f"--leave-out names {unknown[0]!r}, which is no column that the table has lost"
    lost = [column.name for column in drift.lost if column.name not in left_out]
    if lost:
        options = " ".join(f"--leave-out {name}" for name in lost)
        return (
            f"the rows have {'columns' if len(lost) > 1 else 'a column'} that the table does not have any "
            f"more: {', '.join(lost)}; add it to the model again, or restore without it: {options}"
        )
    return None
