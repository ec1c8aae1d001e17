"""Rows out of the database and into it, as text that does not depend on the session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.exceptions import ArchiveError
from django_scaledb.partitions.archive import columns as sqls
from django_scaledb.partitions.archive import parquet
from django_scaledb.partitions.archive.columns import Column, native_form, refusal
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement, Step

OnRows = Callable[[int], None]

_SETTINGS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "xmloption": "content",
    "lc_monetary": "C",
    # A policy that hides rows must be an error, not a loss.
    "row_security": "off",
    "statement_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
_PIN = (
    "SELECT set_config(name, t.value, true) FROM json_each_text(%s::json) AS t (name, value) "
    "JOIN pg_settings USING (name)"  # not every version has all of them
)
_SCRATCH_NAME = "django_scaledb_scratch"
_SCRATCH = sql.Identifier("pg_temp", _SCRATCH_NAME)
_DROP_SCRATCH = Statement(sql.SQL("DROP TABLE IF EXISTS {}").format(_SCRATCH))


@contextmanager
def pinned(connection: BaseDatabaseWrapper, *, snapshot: bool = False) -> Iterator[Any]:
    """A cursor in a transaction in which each type has one text; with `snapshot` it sees one moment."""
    with transaction.atomic(using=connection.alias, durable=True), connection.cursor() as cursor:
        if snapshot:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute(_PIN, [json.dumps(_SETTINGS)])
        yield cursor


def describe(
    connection: BaseDatabaseWrapper, table: TableName, *, archivable: bool = True
) -> tuple[Column, ...]:
    """The columns of `table`; with `archivable` raises `ArchiveError` when one cannot be archived."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod), t.typtype, a.attnotnull, "
            "a.attgenerated <> '' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped "
            "ORDER BY a.attnum",
            [table.schema, table.name],
        )
        rows = cursor.fetchall()
    found = []
    for name, type_, kind, not_null, generated in rows:
        if archivable and (reason := refusal(type_, kind)) is not None:
            raise ArchiveError(f"{table} cannot be archived because of its column {name!r}: {reason}")
        found.append(Column(name, type_, native_form(type_), not_null, generated))
    return tuple(found)


def export(
    connection: BaseDatabaseWrapper,
    table: TableName,
    columns: Sequence[Column],
    file: IO[bytes],
    notes: dict[str, str],
    on_rows: OnRows,
) -> tuple[tuple[Column, ...], int, str]:
    """Write all rows of `table` to `file`; the columns as they were written, count, checksum."""
    with pinned(connection, snapshot=True) as cursor:
        query = sqls.fits(columns, table)
        if query is not None:
            columns = sqls.limited(columns, _row(cursor, query))
        rows, checksum = _sums(cursor, sqls.stored(columns), sql.SQL("ONLY ") + table.sql)
        writer = parquet.Writer(file, columns, notes)
        with cursor.copy(_text(cursor, sqls.copy_out(columns, table))) as copy:
            for line in copy:
                if writer.add(bytes(line)):
                    on_rows(writer.rows)
        writer.close()
    on_rows(writer.rows)
    if writer.rows != rows:
        raise ArchiveError(f"{table} has {rows} rows, and COPY sent {writer.rows}")
    return tuple(columns), rows, checksum


def load(
    connection: BaseDatabaseWrapper,
    file: IO[bytes],
    columns: Sequence[Column],
    table: TableName,
    on_rows: OnRows,
) -> None:
    """Put the rows of `file` into `table`, in one transaction."""
    done = 0
    with pinned(connection) as cursor, cursor.copy(_text(cursor, sqls.copy_in(columns, table.sql))) as copy:
        for text, count in parquet.chunks(file, columns):
            copy.write(text)
            done += count
            on_rows(done)


def sums(
    connection: BaseDatabaseWrapper,
    columns: Sequence[Column],
    table: TableName,
    as_types: Sequence[str] = (),
) -> tuple[int, str]:
    """Count and checksum of the rows of `table`."""
    with pinned(connection) as cursor:
        return _sums(cursor, columns, sql.SQL("ONLY ") + table.sql, as_types)


def sums_within(cursor: Any, columns: Sequence[Column], table: TableName) -> tuple[int, str]:
    """The same in a transaction that is under way, for the rest of which the settings stay."""
    cursor.execute(_PIN, [json.dumps(_SETTINGS)])
    return _sums(cursor, columns, sql.SQL("ONLY ") + table.sql)


def scratch(columns: Sequence[Column]) -> Step:
    """A table of this session alone, which forgets its rows with each transaction."""
    body = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(column.type)) for column in columns
    )
    create = sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DELETE ROWS")
    statements = (_DROP_SCRATCH, Statement(create.format(sql.Identifier(_SCRATCH_NAME), body)))
    return Step("make a temporary table", statements)


def without_scratch() -> Step:
    return Step("drop a temporary table", (_DROP_SCRATCH,))


def sums_of_file(
    connection: BaseDatabaseWrapper,
    file: IO[bytes],
    columns: Sequence[Column],
    compared: Sequence[Column],
    on_rows: OnRows,
) -> tuple[int, str]:
    """Count and checksum of the rows in `file`, as PostgreSQL reads them: chunk by chunk, into `scratch`."""
    rows = checksum = 0
    for text, _ in parquet.chunks(file, columns):
        with pinned(connection) as cursor:
            with cursor.copy(_text(cursor, sqls.copy_in(columns, _SCRATCH))) as copy:
                copy.write(text)
            count, part = _sums(cursor, compared, _SCRATCH)
        rows += count
        checksum += int(part)
        on_rows(rows)
    return rows, str(checksum)


def _sums(
    cursor: Any, columns: Sequence[Column], source: sql.Composable, as_types: Sequence[str] = ()
) -> tuple[int, str]:
    rows, checksum = _row(cursor, sqls.sums(columns, source, as_types=as_types))
    return int(rows), str(checksum)


def _row(cursor: Any, query: sql.Composable) -> Any:
    cursor.execute(_text(cursor, query))
    return cursor.fetchone()


def _text(cursor: Any, query: sql.Composable) -> str:
    return query.as_string(cursor.db.connection)
