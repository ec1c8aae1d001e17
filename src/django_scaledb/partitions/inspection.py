"""A closer look at single tables, while they are being worked on or shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import OperationalError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.exceptions import LockNotAvailable
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import pinned
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.marker import Marker
from django_scaledb.partitions.plan import State
from django_scaledb.postgres.blockers import conflicting, describe
from django_scaledb.postgres.executor import sqlstate
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode

LOOK_TIMEOUT = 1000
"""Milliseconds to wait where a table itself has to be looked at."""

_LOCK_NOT_AVAILABLE = "55P03"
_QUERY_CANCELED = "57014"


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


def kind(connection: BaseDatabaseWrapper, oid: int) -> str | None:
    """pg_class.relkind of `oid`; None when it is gone."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT relkind::text FROM pg_class WHERE oid = %s", [oid])
        row = cursor.fetchone()
    return row[0] if row else None


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


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of a table; `is_valid` is None where the table does not have it."""

    name: str
    target: TableName
    definition: str
    is_valid: bool | None = None


def foreign_keys_lacking(connection: BaseDatabaseWrapper, parent: int, oid: int) -> list[ForeignKey]:
    """The foreign keys of the set `parent` that the table `oid` has not, or not validated."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT f.conname, n.nspname, c.relname, pg_get_constraintdef(f.oid), own.convalidated "
            "FROM pg_constraint f "
            "JOIN pg_class c ON c.oid = f.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "LEFT JOIN pg_constraint own ON own.conrelid = %s AND own.contype = 'f' "
            "AND own.conname = f.conname "
            "WHERE f.conrelid = %s AND f.contype = 'f' AND f.conparentid = 0 "
            "AND own.convalidated IS NOT TRUE ORDER BY 1",
            [oid, parent],
        )
        return [
            ForeignKey(name, TableName(schema, table), definition, is_valid)
            for name, schema, table, definition, is_valid in cursor.fetchall()
        ]


def defaults(connection: BaseDatabaseWrapper, oid: int) -> dict[str, str]:
    """The columns of `oid` that have a default in the database, and its SQL."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT a.attname, pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d JOIN pg_attribute a "
            "ON a.attrelid = d.adrelid AND a.attnum = d.adnum WHERE d.adrelid = %s AND a.attgenerated = ''",
            [oid],
        )
        return dict(cursor.fetchall())


def sequences(connection: BaseDatabaseWrapper, table: TableName) -> list[tuple[str, TableName]]:
    """The columns of `table` that own a sequence, and which."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT a.attname, n.nspname, s.relname FROM pg_attribute a "
            "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace t ON t.oid = c.relnamespace "
            "JOIN pg_depend d ON d.refobjid = c.oid AND d.refobjsubid = a.attnum "
            "AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass "
            "AND d.deptype IN ('a', 'i') "
            "JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' "
            "JOIN pg_namespace n ON n.oid = s.relnamespace "
            "WHERE t.nspname = %s AND c.relname = %s",
            [table.schema, table.name],
        )
        return [(column, TableName(schema, name)) for column, schema, name in cursor.fetchall()]


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
    """How many rows of `wanted` lie in `table`; counting ends at `limit`.

    Raises `LockNotAvailable` when somebody has the table for himself.
    """
    query = sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} LIMIT {}) AS t").format(
        table.sql, wanted.check(config.column, config.key_kind), sql.Literal(limit)
    )
    with _reading(connection, table, "lock_timeout", LOOK_TIMEOUT) as cursor:
        cursor.execute(query.as_string(connection.connection))
        return int(cursor.fetchone()[0])


@contextmanager
def _reading(
    connection: BaseDatabaseWrapper, table: TableName, timeout: str, milliseconds: int
) -> Iterator[Any]:
    """A cursor to read `table` with: a lock that is not granted in time is `LockNotAvailable`."""
    try:
        with pinned(connection) as cursor:
            cursor.execute("SELECT set_config(%s, %s, true)", [timeout, f"{milliseconds}ms"])
            yield cursor
    except OperationalError as error:
        if sqlstate(error) not in (_LOCK_NOT_AVAILABLE, _QUERY_CANCELED):
            raise
        blockers = conflicting(connection, [Lock(table, LockMode.ACCESS_SHARE)])
        who = f"in the way: {describe(blockers)}" if blockers else "it took too long"
        raise LockNotAvailable(f"cannot look into {table}: {who}. Run again later") from error


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


def not_empty(connection: BaseDatabaseWrapper, oids: Sequence[int]) -> list[TableName]:
    """Those of the tables that hold a row and that the connected role may read: two queries for all.

    Raises `LockNotAvailable` when somebody has one of them for himself.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.oid = ANY(%s) AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1, 2",
            [list(oids)],
        )
        tables = [TableName(schema, name) for schema, name in cursor.fetchall()]
    if not tables:
        return []
    looks = [sql.SQL("EXISTS (SELECT FROM {})").format(table.sql) for table in tables]
    query = sql.SQL("SELECT ARRAY[{}]").format(sql.SQL(", ").join(looks))
    with _reading(connection, tables[0], "lock_timeout", LOOK_TIMEOUT) as cursor:
        cursor.execute(query.as_string(connection.connection))
        (found,) = cursor.fetchone()
    return [table for table, has_rows in zip(tables, found, strict=True) if has_rows]


def ends_of_key(
    connection: BaseDatabaseWrapper, table: TableName, column: str
) -> tuple[str | None, str | None] | None:
    """The least and the greatest key in `table` as text (timestamps in UTC); None when it is empty.

    Both are None when finding them takes long: there is seldom an index on the key alone. Raises
    `LockNotAvailable` when somebody has the table for himself.
    """
    names = {"table": table.sql, "key": sql.Identifier(column)}
    any_row = sql.SQL("SELECT EXISTS (SELECT FROM {table})").format(**names)
    ends = sql.SQL(
        "SELECT (SELECT {key}::text FROM {table} ORDER BY {key} LIMIT 1), "
        "(SELECT {key}::text FROM {table} ORDER BY {key} DESC LIMIT 1)"
    ).format(**names)
    with _reading(connection, table, "statement_timeout", LOOK_TIMEOUT) as cursor:
        cursor.execute(any_row.as_string(connection.connection))
        if not cursor.fetchone()[0]:
            return None
        try:
            with transaction.atomic(using=connection.alias):
                cursor.execute(ends.as_string(connection.connection))
                first, last = cursor.fetchone()
                return first, last
        except OperationalError as error:
            if sqlstate(error) != _QUERY_CANCELED:
                raise
            return None, None


@dataclass(frozen=True)
class Size:
    """Rows by PostgreSQL's estimate (None until it was analyzed) and bytes, indexes and TOAST included."""

    rows: int | None
    bytes: int | None


def sizes(connection: BaseDatabaseWrapper, oids: Sequence[int]) -> dict[int, Size]:
    """The size of each table, its own partitions summed up.

    Bytes are unknown where somebody has a table for himself: to measure it is to wait for him.
    """
    try:
        with pinned(connection) as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{LOOK_TIMEOUT}ms"])
            cursor.execute(_SIZES, [list(oids)])
            return {oid: Size(rows, total) for oid, rows, total in cursor.fetchall()}
    except OperationalError as error:
        if sqlstate(error) != _LOCK_NOT_AVAILABLE:
            raise
        return {}  # somebody took one just then


_SIZES = """
    WITH RECURSIVE families AS (
        SELECT oid AS root, oid FROM unnest(%s::oid[]) AS t (oid)
        UNION ALL
        SELECT f.root, h.inhrelid FROM families f JOIN pg_inherits h ON h.inhparent = f.oid
    ), measured AS (
        SELECT f.root, CASE WHEN c.reltuples >= 0 THEN c.reltuples END AS tuples,
            CASE WHEN l.relation IS NULL THEN pg_total_relation_size(c.oid) END AS bytes
        FROM families f
        JOIN pg_class c ON c.oid = f.oid AND c.relkind <> 'p'
        LEFT JOIN (
            SELECT DISTINCT relation FROM pg_locks
            WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ) AS l ON l.relation = c.oid
    )
    SELECT root::int8, sum(tuples)::int8, CASE WHEN bool_and(bytes IS NOT NULL) THEN sum(bytes)::int8 END
    FROM measured GROUP BY root
"""
