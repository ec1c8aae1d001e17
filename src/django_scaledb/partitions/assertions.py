"""`assert_pruned`, which is imported from `django_scaledb.testing`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, overload

from django.core.exceptions import EmptyResultSet
from django.db import connections, models

from django_scaledb.partitions.options import is_partitioned
from django_scaledb.partitions.reading import Reading, read_by
from django_scaledb.partitions.watching import Asked, concerns_partitions, watched


@overload
def assert_pruned(queryset: models.QuerySet[Any], at_most: int = 1, *, run: bool = False) -> None: ...


@overload
def assert_pruned(queryset: None = None, at_most: int = 1) -> Any: ...


def assert_pruned(
    queryset: models.QuerySet[Any] | None = None, at_most: int = 1, *, run: bool = False
) -> Any:
    """Raise `AssertionError` when a query reads more than `at_most` partitions of a model.

    The queryset is planned by PostgreSQL (EXPLAIN, with its real parameters) on the alias that it
    would use, and not run. Partitions count that are left when execution begins: those that
    ``Now()`` and other stable functions rule out do not count. What PostgreSQL can rule out
    only while the query runs (a key that comes from a subquery or from a joined row, partitions
    behind a LIMIT) does count, because all of them are planned and locked; with ``run=True``
    the query is run, in a transaction that is rolled back, and only those that were read count. A default
    partition counts as any other.

    Without a queryset this is a context manager for all that is asked in its block by this thread::

        with assert_pruned(at_most=2):
            client.get("/orders/")

    The message names the model, the partitions, the query and what is missing from its filters.
    Raises `ValueError` for a queryset of ordinary tables.
    """
    if queryset is None:
        return _all_pruned(at_most)
    connection = connections[queryset.db]
    try:
        statement, params = queryset.query.get_compiler(connection=connection).as_sql()
    except EmptyResultSet:
        return None  # not even sent
    readings = read_by(connection, statement, params, run=run)
    if not readings and not is_partitioned(queryset.model) and not concerns_partitions(statement):
        raise ValueError(
            f"{queryset.model._meta.label} is not partitioned, and no partitioned model is joined"
        )
    _check(Asked(connection.alias, f"{statement}  {params}", "this query", queryset.query, readings), at_most)
    return None


@contextmanager
def _all_pruned(at_most: int) -> Iterator[None]:
    found: list[Asked] = []
    with watched(found.append):
        yield
    for asked in found:
        _check(asked, at_most)


def _check(asked: Asked, at_most: int) -> None:
    by_table: dict[Any, list[Reading]] = {}
    for reading in asked.readings:
        by_table.setdefault(reading.table, []).append(reading)
    complaints = [
        asked.complaint(max(readings, key=lambda r: len(r.partitions)), f", and not {at_most} at most")
        for readings in by_table.values()
        if len({name for reading in readings for name in reading.partitions}) > at_most
    ]
    if complaints:
        raise AssertionError("\n".join(complaints))
