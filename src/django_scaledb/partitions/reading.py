"""Which partitions a query reads, as PostgreSQL plans it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from django_scaledb.partitions import pruning
from django_scaledb.postgres.identifiers import TableName

_ROOTS = """
SELECT DISTINCT n.nspname::text, c.relname::text, rn.nspname::text, r.relname::text, a.attname::text,
    (SELECT count(*) FROM pg_partition_tree(r.oid) t WHERE t.isleaf)
FROM unnest(%s::text[], %s::text[]) AS s (schema, name)
JOIN pg_namespace n ON n.nspname = s.schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.name AND c.relispartition
JOIN pg_class r ON r.oid = pg_partition_root(c.oid)
JOIN pg_namespace rn ON rn.oid = r.relnamespace
JOIN pg_partitioned_table p ON p.partrelid = r.oid
JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum = p.partattrs[0]
"""


@dataclass(frozen=True)
class Reading:
    """What one mention of a partitioned table in a query reads.

    `partitions` are the names of those that are left after pruning, `total` is how many there are.
    `is_restricted` says whether a condition on the partition key is among those that they are read
    with, which prunes while the query runs where it does not before. `key_condition` is what else
    the query says about the key, in SQL.
    """

    table: TableName
    column: str
    partitions: tuple[str, ...]
    total: int
    is_restricted: bool
    key_condition: str | None

    @property
    def is_unpruned(self) -> bool:
        """Whether every partition is read, of two or more, and nothing restricts the key."""
        return len(self.partitions) == self.total > 1 and not self.is_restricted


def read_by(
    connection: BaseDatabaseWrapper, statement: str, params: Any, *, run: bool = False
) -> list[Reading]:
    """What `statement` reads of partitioned tables, one entry for each mention of one.

    It is planned with these parameters and not run; pruning that PostgreSQL does when execution
    begins is counted in. With `run` it is run too, in a transaction that is rolled back, and what
    was never read is left out. Neither Django's query log nor its wrappers see any of this.

    Raises `psycopg.Error` where PostgreSQL cannot plan it; a transaction that is open survives that.
    """
    connection.ensure_connection()
    session = connection.connection
    options = "VERBOSE, COSTS OFF, FORMAT JSON" + (", ANALYZE, TIMING OFF" if run else "")
    explain = f"EXPLAIN ({options}) {statement}"
    if session.info.transaction_status == TransactionStatus.IDLE and not run:
        return _read(session, explain, params)
    with session.transaction(force_rollback=True):
        return _read(session, explain, params)


def _read(session: psycopg.Connection[Any], explain: str, params: Any) -> list[Reading]:
    with psycopg.ClientCursor(session) as cursor:
        [(answer,)] = cursor.execute(explain, params).fetchall()
        # Django's sessions leave JSON to Django
        plan = (json.loads(answer) if isinstance(answer, str | bytes) else answer)[0]["Plan"]
        scans = [scan for scan in pruning.scans(plan) if scan.was_run]
        cursor.execute(_ROOTS, [[scan.schema for scan in scans], [scan.table for scan in scans]])
        roots = {(schema, name): root for schema, name, *root in cursor.fetchall()}
    mentions: dict[tuple[TableName, int], list[pruning.Scan]] = {}
    for scan in scans:
        if root := roots.get((scan.schema, scan.table)):
            mentions.setdefault((TableName(*root[:2]), scan.reference), []).append(scan)
    return [_reading(table, found, roots) for (table, _), found in mentions.items()]


def _reading(
    table: TableName, found: Sequence[pruning.Scan], roots: dict[tuple[str, str], Sequence[Any]]
) -> Reading:
    *_, column, total = roots[found[0].schema, found[0].table]
    # A UNION ALL of two queries is one list of scans.
    free = [scan for scan in found if not pruning.is_restricted(scan, column)]
    return Reading(
        table=table,
        column=column,
        partitions=tuple(dict.fromkeys(scan.table for scan in found)),
        total=total,
        is_restricted=not free,
        key_condition=pruning.mentions((free or found)[0], column),
    )
