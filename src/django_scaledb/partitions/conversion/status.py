"""Where a conversion stands, for people."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django_scaledb.partitions.conversion import state
from django_scaledb.partitions.conversion.state import Conversion, Phase
from django_scaledb.postgres.identifiers import TableName

if TYPE_CHECKING:
    from django_scaledb.partitions.conversion.runner import Runner

_SESSIONS = """
    SELECT a.pid, a.application_name, left(a.query, 60), a.wait_event_type, pg_blocking_pids(a.pid)
    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = %s AND l.objid = %s
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_INDEX = """
    SELECT phase, CASE WHEN blocks_total > 0 THEN blocks_done::float8 / blocks_total END
    FROM pg_stat_progress_create_index WHERE pid = %s
"""


@dataclass(frozen=True)
class Status:
    """`eta` is in seconds, None where nothing can be said."""

    model: str
    table: TableName
    is_partitioned: bool
    conversion: Conversion | None
    progress: str = ""
    eta: float | None = None
    session: str | None = None
    blockers: str | None = None


def look(runner: Runner) -> Status:
    """Read the conversion's row and what its session is doing; locks nothing."""
    found = runner.find()
    conversion = state.latest(runner.connection, found.table)
    label = runner.model._meta.label
    if conversion is None or conversion.ended_at is not None:
        return Status(label, found.table, found.is_partitioned, conversion)
    with runner.connection.cursor() as cursor:
        session, blockers, pid = _session(cursor, conversion)
        progress, eta = _progress(cursor, conversion, pid)
    return Status(label, found.table, found.is_partitioned, conversion, progress, eta, session, blockers)


def _session(cursor: Any, conversion: Conversion) -> tuple[str | None, str | None, int | None]:
    from django_scaledb.postgres.session import RUN_LOCK

    cursor.execute(_SESSIONS, [RUN_LOCK[0], 1000 + conversion.pk])
    row = cursor.fetchone()
    if row is None:
        return None, None, None
    pid, name, query, waiting, blocking = row
    blockers = ", ".join(f"pid {other}" for other in blocking) if blocking else None
    return (
        f'pid {pid} ("{name}"): {query}',
        blockers or (f"waiting ({waiting})" if waiting == "Lock" else None),
        pid,
    )


def _progress(cursor: Any, conversion: Conversion, pid: int | None) -> tuple[str, float | None]:
    seconds = max((datetime.now(UTC) - conversion.begun_at).total_seconds(), 0.001)
    if conversion.phase == Phase.COPYING:
        done, total = conversion.rows_done, max(conversion.rows_total, conversion.rows_done)
        begun = conversion.details.get("copying_since")
        if begun:
            seconds = max((datetime.now(UTC) - datetime.fromisoformat(begun)).total_seconds(), 0.001)
        rate = done / seconds
        text = f"{done:,} of about {total:,} rows copied, {rate:,.0f} a second"
        return text, (total - done) / rate if rate else None
    if pid is not None:
        cursor.execute(_INDEX, [pid])
        row = cursor.fetchone()
        if row is not None:
            share = f", {row[1]:.0%} of it" if row[1] is not None else ""
            return f"building an index: {row[0]}{share}", seconds * (1 / row[1] - 1) if row[1] else None
    return f"about {conversion.rows_total:,} rows; {seconds:.0f} s since it was begun", None
