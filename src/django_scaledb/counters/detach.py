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
from django_scaledb.counters.definition import Definition, identity_of, quote
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
    """SQL to run, in the transaction that marks the detached `table` (SQL) as settled, for its counters.

    ``on_detach = "subtract"`` takes its rows off the totals; ``"keep"`` writes down how much of them
    belongs to tables that have left.
    """
    counted, written = _accounted(connection, source, table, leaving=True)
    return counted + written


def on_restore(connection: BaseDatabaseWrapper, source: type[models.Model], table: str) -> list[str]:
    """SQL to run in the transaction that attaches the settled `table` (SQL) again, before the ATTACH.

    Counts its rows, which may take long, and locks no counter yet.
    """
    return _accounted(connection, source, table, leaving=False)[0]


def on_restored(connection: BaseDatabaseWrapper, source: type[models.Model], table: str) -> list[str]:
    """SQL to run there behind the ATTACH.

    ``on_detach = "subtract"`` adds its rows again, as they are now; with ``"keep"`` they never
    ceased to count. Arms its triggers, too: nothing that fills the table before is counted. Counters
    come last, as in every transaction: whoever waits for them holds no lock that ATTACH needs.
    """
    return _accounted(connection, source, table, leaving=False)[1]


def _accounted(
    connection: BaseDatabaseWrapper, source: type[models.Model], table: str, *, leaving: bool
) -> tuple[list[str], list[str]]:
    """What counts, and what writes: hot rows do not wait for a scan.

    SHARE ROW EXCLUSIVE on `table` comes first: nothing may be written between counting and arming.
    """
    counters = sorted(counters_of(source), key=_turn)
    if not counters:
        return [], []
    locked = [f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"]
    counted, armed, written = [], [], []
    for counter in counters:
        definition = registry.definition(counter, connection)
        held = quote(f"scaledb_{'leaving' if leaving else 'returning'}_{definition.identity}")
        counted.append(f"CREATE TEMPORARY TABLE {held} ON COMMIT DROP AS {groups(definition, table)}")
        if counter._counter_meta.on_detach == "keep":
            # The totals stay; beside them stands what they hold of tables that have left.
            target, sign = definition.direct.with_suffix(KEPT), "" if leaving else "-"
        else:
            target, sign = definition.direct, "-" if leaving else ""
        written.append(fold(target, f"({_signed(definition, held, sign)})"))
        if counter._counter_meta.mechanism == "trigger":
            change = triggers.disarm if leaving else triggers.arm
            armed += change(definition, table)
    return [*locked, *counted], [*armed, *written]


def _turn(counter: type[CounterModel]) -> tuple[bool, str]:
    """The order in which every transaction writes its counters; another one would deadlock with them."""
    if counter._counter_meta.mechanism == "trigger":
        return True, identity_of(counter._meta.label)
    return False, counter._meta.db_table


def _signed(definition: Definition, relation: str, sign: str) -> str:
    keys = [f"s.k{i}" for i in range(len(definition.keys))]
    totals = [f"{sign}s.t{i} AS t{i}" for i in range(len(definition.totals))]
    return f"SELECT {', '.join(keys + totals)} FROM {relation} s"


def kept_groups(definition: Definition) -> str:
    """``SELECT k0.., t0..`` of what is held of tables that have left."""
    keys = [f"{quote(key.column)}::{key.type} AS k{i}" for i, key in enumerate(definition.keys)]
    totals = [f"{quote(t.column + KEPT)} AS t{i}" for i, t in enumerate(definition.totals)]
    return f"SELECT {', '.join(keys + totals)} FROM {quote(definition.table)}"
