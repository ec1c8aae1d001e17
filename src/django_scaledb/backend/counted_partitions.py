"""Counters take part when a partition comes or goes: the place where the two features meet."""

from __future__ import annotations

from collections.abc import Iterator

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.counters import detach
from django_scaledb.partitions.hooks import Hook, register
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement


def _on_create(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterator[Statement]:
    for text in detach.on_create(connection, model, table.sql.as_string(None)):
        yield Statement(sql.SQL(text))


def _on_settle(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterator[Statement]:
    lock = (Lock(table, LockMode.ACCESS_EXCLUSIVE),)
    for text in detach.on_settle(connection, model, table.sql.as_string(None)):
        yield Statement(sql.SQL(text), lock)


def _on_restore(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterator[Statement]:
    lock = (Lock(table, LockMode.SHARE_ROW_EXCLUSIVE),)
    for text in detach.on_restore(connection, model, table.sql.as_string(None)):
        yield Statement(sql.SQL(text), lock)


def _on_restored(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterator[Statement]:
    lock = (Lock(table, LockMode.SHARE_ROW_EXCLUSIVE),)
    for text in detach.on_restored(connection, model, table.sql.as_string(None)):
        yield Statement(sql.SQL(text), lock)


def install() -> None:
    """Have every partition of a counted model armed as it is made, and accounted for when it leaves."""
    register(_HOOK)


_HOOK = Hook(on_create=_on_create, on_settle=_on_settle, on_restore=_on_restore, on_restored=_on_restored)
