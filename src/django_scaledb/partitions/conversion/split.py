"""Splitting a partition of many periods into one for each, while the set is in use.

What the copy strategy does beside a table is done here beside one partition; in the end the new
partitions take its place in the set, in one short transaction, and it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from psycopg import sql

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import hooks
from django_scaledb.partitions.bounds import Bound, Range, Unbounded
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.conversion import carry, copy, sync
from django_scaledb.partitions.conversion.errors import TableChanged
from django_scaledb.partitions.conversion.job import Job
from django_scaledb.partitions.conversion.stages import Stage
from django_scaledb.partitions.conversion.state import Phase
from django_scaledb.partitions.conversion.swap import BOUNDS_CHECK
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.plan import Create, Partition, State, plan_span
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step


def choose(found: PartitionSet, config: PartitionConfig) -> Partition | None:
    """The first attached partition that spans more than one period."""
    zone = config.period_zone
    for partition in found.partitions(config):
        bounds = partition.range
        if partition.state is not State.ATTACHED or bounds is None or isinstance(bounds.upper, Unbounded):
            continue
        if isinstance(bounds.lower, Unbounded) or config.interval.next(bounds.lower, zone) < bounds.upper:
            return partition
    return None


def stages(job: Job, on_rows: copy.OnRows) -> Iterator[Stage]:
    """What is left to do until the partition is split and gone."""
    if job.conversion.phase == Phase.PREPARING:
        if not job.exists(job.names.staging_table):
            yield copy.create_staging(job)
        yield from _missing_partitions(job)
        yield copy.begin_sync(job)
        job.refresh()
    if job.dry_run or job.conversion.phase == Phase.COPYING:
        yield copy.fill(job, on_rows)
        yield from copy.empty_catch_all(job)
        yield from copy.partition_foreign_keys(job)
        yield from _bounds_checks(job)
        yield copy.verify(job)
        if not job.dry_run:
            yield _swap(job)
        job.refresh()
    if job.exists(job.table):
        yield _drop(job)


def _bounds(job: Job) -> Range:
    """Those of the partition that is split."""
    lower, upper = (_read(text) for text in job.conversion.details["split"])
    return Range(lower, upper)


def _read(text: str) -> Bound:
    return Unbounded(text) if text in ("MINVALUE", "MAXVALUE") else datetime.fromisoformat(text)


def _missing_partitions(job: Job) -> Iterator[Stage]:
    parent = copy.staging_set(job)
    bounds = _bounds(job)
    ends = copy.ends(job)
    have = {p.range for p in parent.partitions(job.config)} if job.exists(parent.table) else set()
    start = bounds.lower
    if isinstance(start, Unbounded):
        start = ends[0] if ends is not None else None  # type: ignore[assignment]
    if not isinstance(start, datetime) or not isinstance(bounds.upper, datetime):
        return
    last = bounds.upper - timedelta(microseconds=1)
    for action in plan_span(job.config, (), start, max(start, last)).actions:
        wanted = action.range.intersection(bounds) if isinstance(action, Create) else None
        if wanted is not None and wanted not in have:
            yield Stage("partitions", copy.create_partition(job, parent, wanted))


def _bounds_checks(job: Job) -> Iterator[Stage]:
    """Prove each new partition's bounds beforehand, so that attaching it scans nothing."""
    parent = copy.staging_set(job)
    for partition in parent.partitions(job.config):
        if partition.range is None:
            continue
        table = partition.table
        state = job.constraint_state(table, BOUNDS_CHECK)
        lock = Lock(table, LockMode.ACCESS_EXCLUSIVE)
        if state is None:
            query = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK ({}) NOT VALID").format(
                table.sql,
                sql.Identifier(BOUNDS_CHECK),
                partition.range.check(job.config.column, job.config.key_kind),
            )
            yield Stage(
                "check",
                Step(f"add the check of the bounds to {table}", (Statement(query, (lock,)),), nowait=(lock,)),
            )
        if state is not True:
            query = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
                table.sql, sql.Identifier(BOUNDS_CHECK)
            )
            weak = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
            yield Stage(
                "check",
                Step(f"validate the check of the bounds of {table}", (Statement(query, (weak,)),)),
                bounded=False,
            )


def _swap(job: Job) -> Stage:
    names, leaf, parent = job.names, job.table, job.conversion.table
    unchanged = [job.unchanged(table) for table in (leaf, names.staging_table)]
    staging = copy.staging_set(job)
    statements = [
        *sync.drop(job.inventory, names.function, leaf),
        Statement(sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(parent.sql, leaf.sql)),
    ]
    for partition in staging.partitions(job.config):
        bounds, table = partition.range, partition.table
        if bounds is None:
            continue
        statements += [
            Statement(
                sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(names.staging_table.sql, table.sql)
            ),
            *hooks.on_create(job.connection, job.model, table),
            Statement(
                sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(
                    parent.sql, table.sql, bounds.for_values(job.config.key_kind)
                )
            ),
            Statement(carry.drop_constraint(table, BOUNDS_CHECK)),
            Statement(Marker(MarkState.ATTACHED, parent, bounds).comment_on(table.sql)),
        ]
    statements += [
        Statement(sql.SQL("DROP TABLE {}").format(names.staging_table.sql)),
        *job.reach(Phase.SWAPPED),
    ]
    whole = LockMode.ACCESS_EXCLUSIVE
    locks = (Lock(parent, whole), Lock(names.staging_table, whole), *copy.targets(job))

    def guard(cursor: object) -> None:
        for one in unchanged:
            one(cursor)
        if job.has_rows(names.catch_all_table):
            raise TableChanged(
                f"{names.staging_table} has got rows for which there is no partition; run again"
            )

    step = Step(
        f"put the partitions of its periods in the place of {leaf}",
        tuple(statements),
        nowait=locks,
        together=True,
    )
    return Stage("swap", step, guard=guard)


def _drop(job: Job) -> Stage:
    """In a transaction of its own: giving its files back takes long, and nobody is to wait for that."""
    locks = (Lock(job.table, LockMode.ACCESS_EXCLUSIVE), *copy.targets(job))
    drop = Statement(sql.SQL("DROP TABLE {}").format(job.table.sql), locks[:1])
    return Stage(
        "drop", Step(f"drop {job.table}, whose rows are in partitions of their own", (drop,), nowait=locks)
    )


def abort(job: Job) -> Iterator[Stage]:
    """Leave the partition as it was; raises `DDLError` when it has been replaced already."""
    if job.conversion.phase == Phase.SWAPPED:
        raise DDLError(
            f"{job.table} is split already; run manage.py create_partitions --split "
            f"{job.conversion.model} to finish"
        )
    yield from copy.abort(job)


def refuse(found: PartitionSet) -> None:
    """Raises `DDLError` for a set of which no partition can be taken out."""
    if found.referenced_by:
        raise DDLError(
            f"a partition of {found.table} cannot be split: {found.referenced_by[0]} has a foreign key "
            "to it, and "
            "PostgreSQL does not let referenced rows change their partition; drop that key first"
        )
