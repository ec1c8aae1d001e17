"""Copying rows in small transactions, while a trigger takes care of what is written meanwhile.

A batch locks its rows (FOR UPDATE) before it copies them: without that an UPDATE that was under
way was lost, because the copy had read the old version and the trigger had not fired yet. It waits
for locks only a moment and lets go, so that it can never be part of a deadlock that hits a client:
PostgreSQL looks for deadlocks after `deadlock_timeout` (a second), and by then the batch is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction
from psycopg import sql

from django_scaledb.conf import settings
from django_scaledb.partitions.conversion.job import Job
from django_scaledb.postgres.executor import sqlstate
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement

LOCK_TIMEOUT_MS = 30
TARGET_SECONDS = 0.08
"""As long may one batch take, during which writers of its rows wait for it."""

MOST_ROWS = 20_000
FEWEST_ROWS = 10
_LAG_EVERY_SECONDS = 1.0


def batch_query(job: Job, source: TableName, target: TableName, after: str | None, rows: int) -> sql.Composed:
    """Copy the next rows in the order of the primary key; answers with the last key and the count."""
    columns = sql.SQL(", ").join(
        sql.Identifier(column.name) for column in job.inventory.columns if not column.generated
    )
    pk = sql.Identifier(job.pk_column)
    where: sql.Composable = sql.SQL("")
    if after is not None:
        where = sql.SQL("WHERE {} > {} ").format(pk, sql.Literal(after))
    return sql.SQL(
        "WITH batch AS MATERIALIZED (SELECT {columns} FROM {source} {where}ORDER BY {pk} LIMIT {rows} "
        "FOR UPDATE), "
        "copied AS (INSERT INTO {target} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM batch "
        "ON CONFLICT ({conflict}) DO NOTHING) "
        # b.: without it ORDER BY would mean the text.
        "SELECT (SELECT b.{pk}::text FROM batch b ORDER BY b.{pk} DESC LIMIT 1), (SELECT count(*) FROM batch)"
    ).format(
        columns=columns,
        source=source.sql,
        target=target.sql,
        where=where,
        pk=pk,
        rows=sql.Literal(rows),
        conflict=sql.SQL(", ").join(map(sql.Identifier, job.pk_columns)),
    )


def sample(job: Job, source: TableName, target: TableName) -> Statement:
    return Statement(
        batch_query(job, source, target, None, 2000),
        (Lock(source, LockMode.ROW_SHARE), Lock(target, LockMode.ROW_EXCLUSIVE)),
    )


class Filler:
    """Copies all rows of `source` into `target`, from where the last run came to."""

    def __init__(
        self, job: Job, source: TableName, target: TableName, on_rows: Callable[[int, int], None]
    ) -> None:
        self.job = job
        self.source = source
        self.target = target
        self.on_rows = on_rows
        self.rows = 500
        self._lag_looked = 0.0

    def run(self) -> None:
        job = self.job
        while True:
            begun = time.monotonic()
            try:
                copied = self._batch()
            except OperationalError as error:
                if sqlstate(error) not in ("55P03", "40P01"):
                    raise
                # Somebody holds one of these rows: let them finish, and ask for fewer at a time.
                self.rows = max(self.rows // 2, FEWEST_ROWS)
                time.sleep(0.02)
                continue
            self.on_rows(job.conversion.rows_done, max(job.conversion.rows_total, job.conversion.rows_done))
            if copied == 0:
                return
            spent = time.monotonic() - begun
            self._pause(copied, spent)
            factor = min(max(TARGET_SECONDS / max(spent, 0.001), 0.5), 1.5)
            self.rows = int(min(max(self.rows * factor, FEWEST_ROWS), MOST_ROWS))

    def _batch(self) -> int:
        """One batch, and the cursor in the same transaction."""
        job, conversion = self.job, self.job.conversion
        query = batch_query(job, self.source, self.target, conversion.details.get("cursor"), self.rows)
        with transaction.atomic(using=job.connection.alias), job.connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
            cursor.execute("SET LOCAL statement_timeout = 0")
            # A policy that hides rows must be an error, not a loss.
            cursor.execute("SET LOCAL row_security = off")
            cursor.execute(query.as_string(job.connection.connection))
            last, count = cursor.fetchone()
            if count:
                done = conversion.rows_done + count
                details = {**conversion.details, "cursor": last}
                type(conversion).objects.using(job.connection.alias).filter(pk=conversion.pk).update(
                    rows_done=done, details=details
                )
        if count:
            conversion.rows_done, conversion.details = done, details
        return int(count)

    def _pause(self, copied: int, spent: float) -> None:
        """What `--throttle` asks for, and as long as a standby lags behind."""
        if self.job.throttle is not None:
            time.sleep(max(copied / self.job.throttle - spent, 0))
        if time.monotonic() - self._lag_looked >= _LAG_EVERY_SECONDS:
            while (lag := replica_lag(self.job.connection)) > float(settings.MAX_LAG) / 2:
                self.job.note(step=f"waiting for a standby that is {lag:.0f} s behind")
                time.sleep(1)
            self._lag_looked = time.monotonic()


def replica_lag(connection: Any) -> float:
    """Seconds that the slowest standby is behind; 0 where there is none, or none that answers.

    The primary tells of all its standbys, but only to members of pg_monitor; the replicas in the
    settings are asked themselves.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_current_wal_lsn(), (SELECT coalesce(max(extract(epoch FROM replay_lag)), 0)::float8 "
            "FROM pg_stat_replication WHERE state = 'streaming' AND replay_lsn < pg_current_wal_lsn())"
        )
        position, lag = cursor.fetchone()
    for alias in _replicas(connection.alias):
        with suppress(DatabaseError, InterfaceError), connections[alias].cursor() as cursor:
            cursor.execute(
                "SELECT coalesce(extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()), 0)"
                "::float8 WHERE pg_is_in_recovery() AND pg_last_wal_replay_lsn() < %s::pg_lsn",
                [position],
            )
            row = cursor.fetchone()
            lag = max(lag, row[0] if row else 0)
    return float(lag)


def _replicas(alias: str) -> Iterable[str]:
    if alias == settings.PRIMARY:
        return settings.REPLICAS
    entry: Any = settings.MORE_PRIMARIES.get(alias, {})
    return entry.get("REPLICAS", ())  # type: ignore[no-any-return]


def compare(job: Job, first: TableName, second: TableName) -> tuple[tuple[int, str], tuple[int, str]]:
    """Rows and checksum of both, in one snapshot: with the trigger they agree at every commit."""
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in job.inventory.columns)
    found = []
    with transaction.atomic(using=job.connection.alias), job.connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute("SET LOCAL row_security = off")
        for table in (first, second):
            query = sql.SQL(
                "SELECT count(*), coalesce(sum(hashtextextended(ROW({})::text, 0)), 0)::text FROM {}"
            ).format(columns, table.sql)
            cursor.execute(query.as_string(job.connection.connection))
            rows, checksum = cursor.fetchone()
            found.append((int(rows), str(checksum)))
    return found[0], found[1]
