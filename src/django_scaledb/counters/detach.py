"""A partition leaves its source: the counters follow, once and in the transaction that marks it.

DETACH .. CONCURRENTLY cannot share a transaction with anything. The detached table is therefore
counted afterwards, in the transaction that marks it as settled: killed before that, the next run
counts it, killed after it, nobody does. PostgreSQL waits with the detach for all who wrote to the
partition, so that their deltas are in the counters by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.counters import registry, triggers
from django_scaledb.counters.definition import Definition, quote
from django_scaledb.counters.statements import fold, groups

if TYPE_CHECKING:
    from django_scaledb.counters.models import CounterModel

KEPT = "_kept"
"""What the columns end in that hold the totals of detached partitions, with on_detach = "keep"."""


def counters_of(source: type[models.Model]) -> list[type[CounterModel]]:
    """The counters of `source`, whatever their mechanism, in the order of their tables."""
    key = (source._meta.app_label, source._meta.model_name)
    found = [c for c in registry.counters() if c._counter_meta.is_built and c._counter_meta.source_key == key]
    return sorted(found, key=lambda counter: counter._meta.db_table)


def on_create(connection: BaseDatabaseWrapper, source: type[models.Model], table: str) -> list[str]:
    """SQL to run on a partition that is being made, before it is attached: its statement triggers."""
    return [
        statement
        for counter in counters_of(source)
        if counter._counter_meta.mechanism == "trigger"
        for statement in triggers.arm(registry.definition(counter, connection), table)
    ]


def on_settle(connection: BaseDatabaseWrapper, source: type[models.Model], table: str) -> list[str]:
    """SQL to run, in the transaction that marks the detached `table` (SQL) as settled.

    Takes SHARE ROW EXCLUSIVE on it first: nothing may be written between counting and disarming.
    """
    return _accounted(connection, source, table, leaving=True)


def on_restore(connection: BaseDatabaseWrapper, source: type[models.Model], table: str) -> list[str]:
    """SQL to run when a settled `table` (SQL) is attached again, in the transaction that marks it so."""
    return _accounted(connection, source, table, leaving=False)


def _accounted(
    connection: BaseDatabaseWrapper, source: type[models.Model], table: str, *, leaving: bool
) -> list[str]:
    counters = counters_of(source)
    statements = [f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"] if counters else []
    for counter in counters:
        definition = registry.definition(counter, connection)
        if counter._counter_meta.on_detach == "keep":
            statements.append(_keeping(definition, table, sign="" if leaving else "-"))
        else:
            statements.append(_adding(definition, table, sign="-" if leaving else ""))
        if counter._counter_meta.mechanism == "trigger":
            change = triggers.disarm if leaving else triggers.arm
            statements += change(definition, table)
    return statements


def _signed_groups(definition: Definition, table: str, sign: str) -> str:
    keys = [f"s.k{i}" for i in range(len(definition.keys))]
    totals = [f"{sign}s.t{i} AS t{i}" for i in range(len(definition.totals))]
    return f"SELECT {', '.join(keys + totals)} FROM ({groups(definition, table)}) s"


def _adding(definition: Definition, table: str, sign: str) -> str:
    return fold(definition.direct, f"({_signed_groups(definition, table, sign)})")


def _keeping(definition: Definition, table: str, sign: str) -> str:
    """The counter's totals stay; beside them stands what they hold of tables that have left."""
    return fold(definition.direct.with_suffix(KEPT), f"({_signed_groups(definition, table, sign)})")


def kept_groups(definition: Definition) -> str:
    """``SELECT k0.., t0..`` of what is held of tables that have left."""
    keys = [f"{quote(key.column)}::{key.type} AS k{i}" for i, key in enumerate(definition.keys)]
    totals = [f"{quote(t.column + KEPT)} AS t{i}" for i, t in enumerate(definition.totals)]
    return f"SELECT {', '.join(keys + totals)} FROM {quote(definition.table)}"
