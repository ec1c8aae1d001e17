"""A closer look at single tables, while they are being worked on or shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import OperationalError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import pinned
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.marker import Marker
from django_scaledb.partitions.plan import State
from django_scaledb.postgres.identifiers import TableName


def attachment(connection: BaseDatabaseWrapper, parent: int, oid: int) -> State | None:
    """Where the table `oid` stands towards the set `parent` now; None when it is gone."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT h.inhdetachpending FROM pg_class c "
            "LEFT JOIN pg_inherits h ON h.inhrelid = c.oid AND h.inhparent = %s WHERE c.oid = %s",
            [parent, oid],
        )
        row = cursor.fetchone()
    if row is None:
        return None
    return {None: State.DETACHED, True: State.DETACH_PENDING, False: State.ATTACHED}[row[0]]


def current_marker(cursor: Any, oid: int) -> tuple[TableName, bool, Marker | None] | None:
    """Name, whether it is a partition of anything, and mark of the table `oid`; None when it is gone."""
    cursor.execute(
        "SELECT n.nspname, c.relname, c.relispartition, d.description FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace "
        "LEFT JOIN pg_description d "
        "ON d.objoid = c.oid AND d.classoid = 'pg_catalog.pg_class'::regclass AND d.objsubid = 0 "
        "WHERE c.oid = %s",
        [oid],
    )
    row = cursor.fetchone()
    return None if row is None else (TableName(row[0], row[1]), row[2], Marker.parse(row[3]))


def foreign_keys(connection: BaseDatabaseWrapper, oid: int) -> list[tuple[str, TableName]]:
    """Names and targets of the foreign keys of the table `oid`."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT f.conname, n.nspname, c.relname FROM pg_constraint f "
            "JOIN pg_class c ON c.oid = f.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            # With a partitioned target there is one more for each of its partitions, tied to the first.
            "LEFT JOIN pg_constraint p ON p.oid = f.conparentid AND p.conrelid = f.conrelid "
            "WHERE f.conrelid = %s AND f.contype = 'f' AND p.oid IS NULL ORDER BY 1",
            [oid],
        )
        return [(name, TableName(schema, table)) for name, schema, table in cursor.fetchall()]


def taken_names(connection: BaseDatabaseWrapper, schema: str, names: Sequence[str]) -> set[str]:
    """Those of `names` that a table, index, view or type of `schema` has already."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND relname = ANY(%s) "
            "UNION SELECT typname FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace "
            "WHERE n.nspname = %s AND typname = ANY(%s)",
            [schema, list(names), schema, list(names)],
        )
        return {name for (name,) in cursor.fetchall()}


def count_rows(
    connection: BaseDatabaseWrapper, table: TableName, wanted: Range, config: PartitionConfig, limit: int
) -> int:
    """How many rows of `wanted` lie in `table`; counting ends at `limit`."""
    query = sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} LIMIT {}) AS t").format(
        table.sql, wanted.check(config.column, config.key_kind), sql.Literal(limit)
    )
    with connection.cursor() as cursor:
        cursor.execute(query.as_string(connection.connection))
        return int(cursor.fetchone()[0])


@dataclass(frozen=True)
class Movable:
    """What moving rows out of a table takes: the columns to write, the triggers that must not fire."""

    columns: tuple[str, ...]
    triggers: tuple[str, ...]
    acting_keys: tuple[str, ...]
    """Foreign keys to the set that change other rows when one of its rows is deleted."""


def movable(connection: BaseDatabaseWrapper, default: int, parent: int) -> Movable:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = %s AND attnum > 0 "
            "AND NOT attisdropped AND attgenerated = '' ORDER BY attnum), "
            "ARRAY(SELECT tgname::text FROM pg_trigger WHERE tgrelid = %s AND NOT tgisinternal "
            "AND tgenabled = 'O' ORDER BY tgname), "
            "ARRAY(SELECT conname::text FROM pg_constraint WHERE confrelid = %s AND contype = 'f' "
            "AND conparentid = 0 AND confdeltype IN ('c', 'n', 'd') ORDER BY conname)",
            [default, default, parent],
        )
        columns, triggers, acting_keys = cursor.fetchone()
    return Movable(tuple(columns), tuple(triggers), tuple(acting_keys))


def ends_of_key(
    connection: BaseDatabaseWrapper, table: TableName, column: str
) -> tuple[str | None, str | None] | None:
    """The least and the greatest key in `table` as text (timestamps in UTC); None when it is empty.

    Both are None when finding them takes long: there is seldom an index on the key alone.
    """
    names = {"table": table.sql, "key": sql.Identifier(column)}
    any_row = sql.SQL("SELECT EXISTS (SELECT FROM {table})").format(**names)
    ends = sql.SQL(
        "SELECT (SELECT {key}::text FROM {table} ORDER BY {key} LIMIT 1), "
        "(SELECT {key}::text FROM {table} ORDER BY {key} DESC LIMIT 1)"
    ).format(**names)
    with pinned(connection, ENDS_TIMEOUT) as cursor:
        cursor.execute(any_row.as_string(connection.connection))
        if not cursor.fetchone()[0]:
            return None
        try:
            with transaction.atomic(using=connection.alias):
                cursor.execute(ends.as_string(connection.connection))
                first, last = cursor.fetchone()
                return first, last
        except OperationalError:
            return None, None


ENDS_TIMEOUT = 1000
"""Milliseconds that a statement of `ends_of_key` may take."""


@dataclass(frozen=True)
class Size:
    """Rows by PostgreSQL's estimate (None until it was analyzed) and bytes, indexes and TOAST included."""

    rows: int | None
    bytes: int | None


def sizes(connection: BaseDatabaseWrapper, oids: Sequence[int], *, lock_timeout: int) -> dict[int, Size]:
    """The size of each table, its own partitions summed up; empty when a lock is in the way."""
    try:
        with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{lock_timeout}ms"])
            cursor.execute(
                "SELECT t.oid::int8, sum(CASE WHEN c.reltuples >= 0 THEN c.reltuples END)::int8, "
                "sum(pg_total_relation_size(c.oid))::int8 "
                "FROM unnest(%s::oid[]) AS t (oid) "
                "CROSS JOIN LATERAL (SELECT coalesce(p.relid, t.oid) AS leaf FROM (SELECT t.oid) AS one "
                "LEFT JOIN pg_partition_tree(t.oid) p ON p.isleaf) AS leaves "
                "JOIN pg_class c ON c.oid = leaves.leaf GROUP BY t.oid",
                [list(oids)],
            )
            found = {oid: Size(rows, total) for oid, rows, total in cursor.fetchall()}
            transaction.set_rollback(True, using=connection.alias)
            return found
    except OperationalError:
        return {}
