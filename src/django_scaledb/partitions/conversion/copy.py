"""The copy strategy: rows are moved into partitions of their own beside the table, which then step in.

A trigger writes into the new table whatever is written into the old one; batches bring the rest.
After the swap the trigger goes the other way, so that the old table stays a way back until
``--finish``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from psycopg import sql

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import catalog, ddl, hooks, inspection
from django_scaledb.partitions.bounds import Range, Unbounded, label
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.conversion import attach, carry, filling, preflight, swap, sync
from django_scaledb.partitions.conversion.ceiling import moment_of
from django_scaledb.partitions.conversion.errors import TableChanged
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.job import Job, differences, utc_now
from django_scaledb.partitions.conversion.stages import (
    COPY_ROWS_PER_SECOND,
    SCAN_BYTES_PER_SECOND,
    Cost,
    Stage,
)
from django_scaledb.partitions.conversion.state import Phase, Strategy
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.plan import Create, plan, plan_span
from django_scaledb.postgres.identifiers import TableName, fit
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

OnRows = Callable[[int, int], None]


def stages(job: Job, on_rows: OnRows) -> Iterator[Stage]:
    """What is left to do until the new table is in place and the old one is written back to."""
    staging = job.names.staging_table
    if job.conversion.phase == Phase.PREPARING:
        if not job.exists(staging):
            yield create_staging(job)
        yield from _missing_partitions(job)
        yield begin_sync(job)
        job.refresh()
    if job.dry_run or job.conversion.phase == Phase.COPYING:
        yield fill(job, on_rows)
        yield from empty_catch_all(job)
        yield from _foreign_keys(job)
        yield verify(job)
        yield _swap(job)
        job.refresh()
    yield _mark(job)


# -- beside the table


def create_staging(job: Job) -> Stage:
    names = job.names
    staging = names.staging_table
    statements = [
        *carry.create_parent(job.inventory, job.table, staging, job.config.column),
        *carry.create_indexes(job.inventory, staging, job.pk_columns, names.staged),
        # Rows of any date must find a place as long as the plain table takes them.
        Statement(
            sql.SQL("CREATE TABLE {} PARTITION OF {} DEFAULT").format(names.catch_all_table.sql, staging.sql)
        ),
    ]
    return Stage("prepare", Step(f"make {staging} beside {job.table}", tuple(statements)))


def _missing_partitions(job: Job) -> Iterator[Stage]:
    """A partition for each period from the first row to those made ahead."""
    parent = staging_set(job)
    span = ends(job)
    spans = [plan(job.config, (), job.now, retire=False)]
    if span is not None:
        spans.append(plan_span(job.config, (), *span))
    wanted = {a.range for span in spans for a in span.actions if isinstance(a, Create)}
    have = {p.range for p in parent.partitions(job.config)} if job.exists(parent.table) else set()
    for bounds in sorted(wanted - have, key=lambda r: str(r.lower)):
        yield Stage("partitions", create_partition(job, parent, bounds))


def create_partition(job: Job, parent: PartitionSet, bounds: Range, moving: bool = False) -> Step:
    table = TableName(parent.table.schema, _partition_name(job, bounds))
    rows: tuple[Statement, ...] = ()
    if moving:
        columns = [c.name for c in job.inventory.columns if not c.generated]
        rows = ddl.move_from_default(parent, table, bounds, job.config, columns, ())
    settings = tuple(carry.partition_settings(job.inventory, table))
    return ddl.create(parent, job.config, bounds, table, moving=rows, beside=settings)


def _partition_name(job: Job, bounds: Range) -> str:
    """The name that it is to have for good, after the table's own."""
    suffix = "_" + label(bounds.lower, job.config.interval, job.config.period_zone)
    candidates = [
        fit(job.conversion.table_name, suffix + number) for number in ("", *(f"_{n}" for n in range(2, 50)))
    ]
    taken = inspection.taken_names(job.connection, job.table.schema, candidates)
    return next(name for name in candidates if name not in taken)


def staging_set(job: Job) -> PartitionSet:
    """The new table's partition set; made up in a dry run, which has none."""
    staging = job.names.staging_table
    [found] = catalog.read(job.connection, [f'{staging.schema}"."{staging.name}'])
    if found is not None:
        return found
    [plain] = catalog.read(job.connection, [job.model._meta.db_table])
    assert plain is not None
    values = {f: getattr(plain, f) for f in plain.__dataclass_fields__}
    return PartitionSet(
        **{
            **values,
            "table": staging,
            "strategy": "r",
            "key_columns": (job.config.column,),
            "references": (),
            "access_method": None,
        }
    )


def ends(job: Job) -> tuple[datetime, datetime] | None:
    """The least and the greatest key, however long it takes to find them; None without rows."""
    key = sql.Identifier(job.config.column)
    query = sql.SQL(
        "SELECT (SELECT {k}::text FROM {t} ORDER BY {k} LIMIT 1), (SELECT {k}::text FROM {t} ORDER BY "
        "{k} DESC LIMIT 1)"
    ).format(k=key, t=job.table.sql)
    with catalog.pinned(job.connection) as cursor:
        cursor.execute(query.as_string(job.connection.connection))
        texts = cursor.fetchone()
    if texts[0] is None:
        return None
    least, greatest = (moment_of(text, job.config.key_kind) for text in texts)
    if isinstance(least, Unbounded) or isinstance(greatest, Unbounded):
        raise DDLError(
            f"{job.table} has rows whose {job.config.column} is infinite or out of the years 1 to 9999; "
            "give them "
            "a date, for no period contains them"
        )
    return least, greatest


def begin_sync(job: Job) -> Stage:
    """From here on nothing can be written that the new table does not get."""
    guard = None
    if not job.dry_run:
        found, guard = job.observe()
        refuse_altered(job, found)
    statements = tuple(
        sync.create(job.inventory, job.names.function, job.table, job.names.staging_table, job.pk_columns)
    )
    lock = Lock(job.table, LockMode.SHARE_ROW_EXCLUSIVE)
    step = Step(
        f"let {job.table} be written into {job.names.staging_table}, too",
        (*statements, *job.reach(Phase.COPYING)),
        nowait=(lock,),
        together=True,
    )
    return Stage("sync", step, guard=guard)


_MADE_AFTER = {
    *("owner", "tablespace", "access_method", "options", "columns", "indexes", "constraints", "statistics"),
    "replica_identity",
}


def refuse_altered(job: Job, found: Inventory) -> None:
    """Raises `DDLError` when the table is not the one any more after which the new one was made."""
    altered = [name for name in differences(job.inventory, found) if name in _MADE_AFTER]
    if altered:
        raise DDLError(
            f"{job.table} was altered since its conversion was begun ({', '.join(altered)}); take it back "
            "with --abort and begin again"
        )


def fill(job: Job, on_rows: OnRows) -> Stage:
    source, target = job.table, job.names.staging_table
    filler = filling.Filler(job, source, target, on_rows)

    def work() -> None:
        if "copying_since" not in job.conversion.details:
            job.note(copying_since=utc_now().isoformat())
        filler.run()

    rows = job.inventory.rows
    cost = Cost(f"{source} once, in batches", rows / COPY_ROWS_PER_SECOND, job.inventory.bytes * 1.1)
    return Stage("copy", work=work, sample=(filling.sample(job, source, target),), cost=cost)


def empty_catch_all(job: Job) -> Iterator[Stage]:
    """Give each row that found no partition one of its own."""
    if job.dry_run:
        return
    catch_all = job.names.catch_all_table
    key = sql.Identifier(job.config.column)
    while job.exists(catch_all):
        query = sql.SQL("SELECT {k}::text FROM {t} ORDER BY {k} LIMIT 1").format(k=key, t=catch_all.sql)
        with catalog.pinned(job.connection) as cursor:
            cursor.execute(query.as_string(job.connection.connection))
            row = cursor.fetchone()
        if row is None:
            return
        moment = moment_of(row[0], job.config.key_kind)
        assert isinstance(moment, datetime)
        zone = job.config.period_zone
        start = job.config.interval.start_of(moment, zone)
        bounds = Range(start, job.config.interval.next(start, zone))
        step = create_partition(job, staging_set(job), bounds, moving=True)
        yield Stage("partitions", step, bounded=False)


def _foreign_keys(job: Job) -> Iterator[Stage]:
    yield from partition_foreign_keys(job)
    yield from attach.foreign_keys(job, job.names.staging_table)


def partition_foreign_keys(job: Job) -> Iterator[Stage]:
    """NOT VALID and VALIDATE on each partition, which block nobody; the parent adopts them later."""
    if not job.inventory.foreign_keys:
        return
    for member in staging_set(job).members:
        for key in job.inventory.foreign_keys:
            state = job.constraint_state(member.table, key.name)
            assert key.target is not None
            target = TableName(*key.target)
            if state is None:
                locks = tuple(Lock(t, LockMode.SHARE_ROW_EXCLUSIVE) for t in (member.table, target))
                query = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(
                    member.table.sql, sql.Identifier(key.name), carry.raw(key.definition)
                )
                summary = f"add the foreign key {key.name} to {member.table}"
                yield Stage("foreign keys", Step(summary, (Statement(query, locks),), nowait=locks))
            if state is not True:
                query = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
                    member.table.sql, sql.Identifier(key.name)
                )
                locks = (
                    Lock(member.table, LockMode.SHARE_UPDATE_EXCLUSIVE),
                    Lock(target, LockMode.ROW_SHARE),
                )
                summary = f"validate the foreign key {key.name} of {member.table}"
                yield Stage("foreign keys", Step(summary, (Statement(query, locks),)), bounded=False)


def verify(job: Job) -> Stage:
    source, target = job.table, job.names.staging_table

    def work() -> None:
        first, second = filling.compare(job, source, target)
        if first != second:
            raise DDLError(
                f"{target} is not the same as {source}: {second[0]} rows (checksum {second[1]}) against "
                f"{first[0]} "
                f"({first[1]}). Nothing was swapped; take it back with --abort and begin again"
            )

    cost = Cost(f"{source} and {target} once each", 2 * job.inventory.bytes / SCAN_BYTES_PER_SECOND)
    return Stage("verify", work=work, cost=cost)


# -- in its place


def _swap(job: Job) -> Stage:
    names, table = job.names, job.table
    catch_all = names.catch_all_table
    observed = None
    if not job.dry_run:
        found, observed = job.observe()
        refuse_altered(job, found)
        preflight.refuse_altered(found, job.config, job.pk_column, Strategy.COPY)
        job.note(inventory=found.as_json())
        job.inventory = found
    keep = names.staging_table.sibling(fit(table.name, "_default"))
    last: list[Statement] = []
    if job.config.default_partition:
        last.append(Statement(carry.rename_table(catch_all, keep.name)))
    else:
        last.append(Statement(sql.SQL("DROP TABLE {}").format(catch_all.sql)))
    step = swap.by_renaming(
        job.inventory,
        names,
        [Lock(names.staging_table, LockMode.ACCESS_EXCLUSIVE)],
        [*sync.drop(job.inventory, names.function, table), *last],
        [
            *sync.create(
                job.inventory,
                names.function,
                table,
                names.aside_table,
                [column for column in _primary_columns(job) if column is not None],
            ),
            *_beside(job),
            *job.reach(Phase.SWAPPED),
        ],
    )

    def guard(cursor: object) -> None:
        if observed is not None:
            observed(cursor)
        if not job.config.default_partition and job.has_rows(catch_all):
            raise TableChanged(f"{catch_all} has got rows for which there is no partition; run again")

    return Stage("swap", step, guard=guard)


def _beside(job: Job) -> Iterator[Statement]:
    """What other features want on every partition; sooner, they would have seen rows that only moved."""
    for member in staging_set(job).members:
        if member.table != job.names.catch_all_table:
            yield from hooks.on_create(job.connection, job.model, member.table)


def _primary_columns(job: Job) -> tuple[str | None, ...]:
    primary = job.inventory.primary_key
    assert primary is not None
    return primary.columns


def _mark(job: Job) -> Stage:
    """The partitions' marks name the set by the name it has now."""
    [parent] = catalog.read(job.connection, [job.model._meta.db_table])
    assert parent is not None
    statements = []
    if parent.is_partitioned:
        for partition in parent.partitions(job.config):
            marker = Marker(MarkState.ATTACHED, parent.table, partition.range)
            lock = Lock(partition.table, LockMode.SHARE_UPDATE_EXCLUSIVE)
            statements.append(Statement(marker.comment_on(partition.table.sql), (lock,)))
    return Stage("mark", Step(f"mark the partitions of {job.table}", tuple(statements)))


# -- the ends


def finish(job: Job) -> Stage:
    """Give up the way back: drop the trigger and the old table."""
    aside, table = job.names.aside_table, job.table
    locks = (*targets(job), Lock(aside, LockMode.ACCESS_EXCLUSIVE), Lock(table, LockMode.ACCESS_EXCLUSIVE))
    step = Step(
        f"drop {aside}, the table that {table} was",
        (
            *sync.drop(job.inventory, job.names.function, table),
            Statement(sql.SQL("DROP TABLE {}").format(aside.sql), (locks[-2],)),
            *job.reach(Phase.DONE, over=True),
        ),
        nowait=locks,
    )
    return Stage("finish", step)


def abort(job: Job) -> Iterator[Stage]:
    """Undo the copy strategy: the old table has all rows, whichever of the two has the name."""
    from django_scaledb.partitions.conversion import undo

    table, names = job.table, job.names
    if job.conversion.phase == Phase.SWAPPED:
        primary = job.inventory.primary_key
        assert primary is not None
        step = swap.back(
            job.inventory,
            names,
            locks=undo.back_locks(job.inventory),
            free=sync.drop(job.inventory, names.function, table),
            primary_key=[
                Statement(carry.rename_index(table.schema, names.indexes[primary.name], primary.name))
            ],
            after=job.reach(Phase.ABORTED, over=True),
        )
        yield Stage("back", step)
        return
    locks = [Lock(table, LockMode.ACCESS_EXCLUSIVE)]
    if job.exists(names.staging_table):
        locks += [Lock(names.staging_table, LockMode.ACCESS_EXCLUSIVE), *targets(job)]
    drop = sql.SQL("DROP TABLE IF EXISTS {}").format(names.staging_table.sql)
    yield Stage(
        "back",
        Step(
            f"drop {names.staging_table} and what writes into it",
            (
                *sync.drop(job.inventory, names.function, table),
                Statement(drop),
                *job.reach(Phase.ABORTED, over=True),
            ),
            nowait=tuple(locks),
        ),
    )


def targets(job: Job) -> list[Lock]:
    keys = job.inventory.foreign_keys
    return [Lock(TableName(*key.target), LockMode.ACCESS_EXCLUSIVE) for key in keys if key.target]
