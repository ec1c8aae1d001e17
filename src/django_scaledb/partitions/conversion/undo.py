"""The way back, from wherever a conversion stands: the table is what it was, and no row is lost."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from django_scaledb.partitions import catalog
from django_scaledb.partitions.conversion import attach, carry, swap
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.job import Job
from django_scaledb.partitions.conversion.stages import Stage
from django_scaledb.partitions.conversion.state import Phase
from django_scaledb.partitions.conversion.swap import BOUNDS_CHECK
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step


def attached(job: Job) -> Iterator[Stage]:
    """Undo the attach strategy."""
    table, names = job.table, job.names
    if job.conversion.phase == Phase.SWAPPED:
        primary = job.inventory.primary_key
        assert primary is not None
        if attach.replaces_primary_key(job):
            columns = tuple(column for column in primary.columns if column is not None)
            yield from attach.unique_index(job, names.aside_table, names.back_index, columns)
        yield Stage("back", _back(job))
        return
    if job.constraint_state(table, BOUNDS_CHECK) is not None:
        yield Stage("check", attach.drop_check(table))
    if job.index_state(names.key_index) is not None:
        step = attach.drop_index(job, table, names.key_index)
        yield Stage("index", step, resume=lambda: step)
    yield ended(job, Phase.ABORTED)


def ended(job: Job, phase: Phase) -> Stage:
    """Write down that the conversion is over."""
    return Stage("end", Step("write down that the conversion is over", job.reach(phase, over=True)))


def _back(job: Job) -> Step:
    inventory, names, table = job.inventory, job.names, job.table
    aside = names.aside_table
    [found] = catalog.read(job.connection, [job.model._meta.db_table])
    others = [m.table for m in found.members if m.table != aside] if found is not None else []
    detach = sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(table.sql, aside.sql)
    free = [Statement(detach), *(copy_rows(inventory, other, aside) for other in others)]
    primary_key = [restore_primary_key(job)]
    return swap.back(
        inventory,
        names,
        locks=back_locks(inventory),
        free=free,
        primary_key=primary_key,
        after=job.reach(Phase.ABORTED, over=True),
    )


def back_locks(inventory: Inventory) -> tuple[Lock, ...]:
    """Dropping the partitioned table drops its foreign keys, which locks their targets."""
    tables = [inventory.table, *(TableName(*key.target) for key in inventory.foreign_keys if key.target)]
    return tuple(Lock(table, LockMode.ACCESS_EXCLUSIVE) for table in dict.fromkeys(tables))


def restore_primary_key(job: Job) -> Statement:
    """The old primary key, on an index that is there already."""
    inventory, names = job.inventory, job.names
    primary = inventory.primary_key
    assert primary is not None
    if not attach.replaces_primary_key(job):
        return Statement(carry.rename_index(inventory.schema, names.indexes[primary.name], primary.name))
    return Statement(
        sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}, ADD CONSTRAINT {} PRIMARY KEY USING INDEX {}").format(
            inventory.table.sql,
            sql.Identifier(names.indexes[primary.name]),
            sql.Identifier(primary.name),
            sql.Identifier(names.back_index),
        )
    )


def copy_rows(inventory: Inventory, source: TableName, target: TableName) -> Statement:
    columns = sql.SQL(", ").join(
        sql.Identifier(column.name) for column in inventory.columns if not column.generated
    )
    # The values of an identity column come along.
    return Statement(
        sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}").format(
            target.sql, columns, columns, source.sql
        )
    )
