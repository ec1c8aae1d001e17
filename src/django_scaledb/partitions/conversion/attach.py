"""The attach strategy: the old table becomes the first partition.

What takes long (a unique index, a scan for the check) locks nobody out; what locks takes
milliseconds. The first partition reaches from MINVALUE to a moment ahead of now, its ceiling, above
which no row may be written from the check to the swap.
"""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from django_scaledb.partitions import hooks
from django_scaledb.partitions.conversion import carry, names, preflight, swap
from django_scaledb.partitions.conversion.job import Job
from django_scaledb.partitions.conversion.stages import (
    INDEX_ROWS_PER_SECOND,
    SCAN_BYTES_PER_SECOND,
    Cost,
    Stage,
)
from django_scaledb.partitions.conversion.state import Phase
from django_scaledb.partitions.conversion.swap import BOUNDS_CHECK
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

_BYTES_PER_KEY = 40


def stages(job: Job) -> Iterator[Stage]:
    """What is left to do; each is looked up in the catalog when it is asked for."""
    if job.conversion.phase == Phase.PREPARING:
        if replaces_primary_key(job):
            yield from unique_index(job, job.table, job.names.key_index, job.pk_columns)
        yield from _bounds_check(job)
        yield _swap(job)
        job.refresh()
    yield from foreign_keys(job, job.table)


def replaces_primary_key(job: Job) -> bool:
    """Whether the table's primary key lacks the partition key."""
    primary = job.inventory.primary_key
    return primary is not None and primary.columns != job.pk_columns


def unique_index(job: Job, table: TableName, name: str, columns: tuple[str, ...]) -> Iterator[Stage]:
    """Build it without standing in anybody's way; one that was cut short is dropped and built again."""
    cost = Cost(
        f"{table} twice",
        job.inventory.rows / INDEX_ROWS_PER_SECOND + 2 * _scan_seconds(job),
        job.inventory.rows * _BYTES_PER_KEY,
    )
    state = job.index_state(name)
    if state is False:
        yield Stage("index", drop_index(job, table, name), resume=lambda: drop_index(job, table, name))
    if state is not True:
        build = _create_index(job, table, name, columns)
        yield Stage(
            "index", build, resume=lambda: _rest_of_index(job, table, name, build), cost=cost, bounded=False
        )
    if not job.dry_run and job.index_state(name) is not True:
        yield from unique_index(job, table, name, columns)


def _create_index(job: Job, table: TableName, name: str, columns: tuple[str, ...]) -> Step:
    how = " CONCURRENTLY" if job.concurrently else ""
    mode = LockMode.SHARE_UPDATE_EXCLUSIVE if job.concurrently else LockMode.SHARE
    query = sql.SQL("CREATE UNIQUE INDEX{} {} ON {} ({})").format(
        sql.SQL(how), sql.Identifier(name), table.sql, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    return Step(
        f"build the unique index {name} on {table}",
        (Statement(query, (Lock(table, mode),)),),
        transactional=not job.concurrently,
    )


def drop_index(job: Job, table: TableName, name: str) -> Step:
    query = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(table.schema, name))
    lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    return Step(f"drop the index {name}", (Statement(query, (lock,)),), transactional=False)


def _rest_of_index(job: Job, table: TableName, name: str, build: Step) -> Step | None:
    state = job.index_state(name)
    if state is None:
        return build
    return None if state else drop_index(job, table, name)


def _bounds_check(job: Job) -> Iterator[Stage]:
    table = job.table
    state = job.constraint_state(table, BOUNDS_CHECK)
    if state is None:
        exclusive = Lock(table, LockMode.ACCESS_EXCLUSIVE)
        query = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK ({}) NOT VALID").format(
            table.sql, sql.Identifier(BOUNDS_CHECK), job.bounds.check(job.config.column, job.config.key_kind)
        )
        # In a transaction of its own: validated in the same one, it would lock everybody out so long.
        yield Stage(
            "check",
            Step(
                f"add the check of the bounds to {table}",
                (Statement(query, (exclusive,)),),
                nowait=(exclusive,),
            ),
        )
    if state is not True:
        query = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
            table.sql, sql.Identifier(BOUNDS_CHECK)
        )
        lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
        yield Stage(
            "validate",
            Step(f"validate the check of the bounds of {table}", (Statement(query, (lock,)),)),
            bounded=False,
            cost=Cost(f"{table} once", _scan_seconds(job)),
        )


def drop_check(table: TableName) -> Step:
    lock = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    query = carry.drop_constraint(table, BOUNDS_CHECK)
    return Step(f"drop the check of the bounds from {table}", (Statement(query, (lock,)),), nowait=(lock,))


def _swap(job: Job) -> Stage:
    guard = None
    if not job.dry_run:
        found, guard = job.observe()
        preflight.refuse_altered(found, job.config, job.pk_column)
        job.names = names.renewed(job.connection, found, job.names)
        job.note(inventory=found.as_json(), names=job.names.as_json())
        job.inventory = found
    step = swap.by_attaching(
        job.inventory,
        job.names,
        job.config,
        job.bounds,
        job.pk_columns,
        beside=hooks.on_create(job.connection, job.model, job.names.aside_table),
        after=job.reach(Phase.SWAPPED),
    )
    return Stage("swap", step, guard=guard)


def foreign_keys(job: Job, table: TableName) -> Iterator[Stage]:
    """Those of the old table still hold; the new one makes them its own, so that new partitions get them."""
    for key in job.inventory.foreign_keys:
        if job.dry_run or job.constraint_state(table, key.name) is None:
            statements = tuple(carry.add_foreign_key(job.inventory, table, key))
            step = Step(
                f"make the foreign key {key.name} one of {table}", statements, nowait=statements[0].locks
            )
            yield Stage("foreign keys", step)


def _scan_seconds(job: Job) -> float:
    return job.inventory.pages * 8192 / SCAN_BYTES_PER_SECOND
