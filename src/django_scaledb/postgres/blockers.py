"""Who stands in the way of a lock: pg_locks and pg_stat_activity, read for people.

Every role sees all of pg_locks; of other roles' sessions pg_stat_activity shows the pid and the
application_name, and the rest only to members of pg_read_all_stats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode

# Partitions count for their table: a lock on a foreign key's target goes down to them. Not
# pg_partition_tree(), which locks them itself and would wait for the very session that is asked for.
_HOLDERS = """
    WITH RECURSIVE wanted AS (
        SELECT c.oid, n.nspname, c.relname
        FROM unnest(%s::text[], %s::text[]) AS t (nspname, relname)
        JOIN pg_namespace n ON n.nspname = t.nspname
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.relname
    ), families AS (
        SELECT nspname, relname, oid FROM wanted
        UNION
        SELECT f.nspname, f.relname, h.inhrelid FROM families f JOIN pg_inherits h ON h.inhparent = f.oid
    )
    SELECT f.nspname, f.relname, f.oid = w.oid, l.mode, l.virtualtransaction, l.pid, a.application_name,
           a.backend_type, a.state, extract(epoch FROM clock_timestamp() - a.xact_start)::float8
    FROM families f
    JOIN wanted w USING (nspname, relname)
    JOIN pg_locks l ON l.relation = f.oid AND l.locktype = 'relation' AND l.granted
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.pid IS DISTINCT FROM pg_backend_pid()
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    ORDER BY a.xact_start NULLS LAST, l.pid
"""


@dataclass(frozen=True)
class Blocker:
    """A session (or a prepared transaction: pid None) that holds a lock on `table`.

    `transaction` tells its transactions apart: a session that came back later is another blocker.
    `age` is the seconds since the transaction began, None where we may not see it.
    """

    table: TableName
    on_partition: bool
    mode: LockMode
    transaction: str
    pid: int | None
    application: str | None
    kind: str | None
    state: str | None
    age: float | None

    def __str__(self) -> str:
        if self.pid is None:
            return f"a prepared transaction ({self.mode.sql} on {self.table}; see pg_prepared_xacts)"
        facts = []
        if self.application:
            facts.append(f'application_name "{self.application}"')
        elif self.kind and self.kind != "client backend":
            facts.append(self.kind)
        if self.age is not None:
            facts.append(f"{self.state or 'running'}, transaction open for {self.age:.0f} s")
        where = f"a partition of {self.table}" if self.on_partition else str(self.table)
        facts.append(f"holds {self.mode.sql} on {where}")
        return f"pid {self.pid} ({', '.join(facts)})"


def holders(connection: BaseDatabaseWrapper, tables: Iterable[TableName]) -> list[Blocker]:
    """Everybody else who holds any lock on one of `tables` or their partitions, oldest first."""
    wanted = sorted(set(tables))
    if not wanted:
        return []
    with connection.cursor() as cursor:
        cursor.execute(_HOLDERS, [[t.schema for t in wanted], [t.name for t in wanted]])
        rows = cursor.fetchall()
    return [
        Blocker(TableName(schema, name), not is_itself, LockMode(mode), *rest)
        for schema, name, is_itself, mode, *rest in rows
        if mode in _MODES
    ]


_MODES = {mode.value for mode in LockMode}


def conflicting(connection: BaseDatabaseWrapper, locks: Iterable[Lock]) -> list[Blocker]:
    """Those of `holders` whose lock does not go together with one of `locks`."""
    wanted = list(locks)
    return [
        blocker
        for blocker in holders(connection, (lock.table for lock in wanted))
        if any(
            lock.table == blocker.table
            and lock.mode.conflicts_with(blocker.mode)
            and not (lock.only and blocker.on_partition)
            for lock in wanted
        )
    ]


def describe(blockers: Iterable[Blocker]) -> str:
    """At most three of them, each session once, strongest lock first."""
    by_session: dict[tuple[int | None, str], Blocker] = {}
    for blocker in sorted(blockers, key=lambda b: b.mode, reverse=True):
        by_session.setdefault((blocker.pid, blocker.transaction), blocker)
    shown = [str(blocker) for blocker in by_session.values()]
    if len(shown) > 3:
        shown = [*shown[:3], f"{len(shown) - 3} more"]
    return ", ".join(shown)
