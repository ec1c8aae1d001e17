"""Walks through a conversion, from wherever it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from django.core.management import call_command
from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.conf import settings
from django_scaledb.exceptions import AnotherRunInProgress, DDLError
from django_scaledb.partitions import catalog, inspection, maintenance, registry
from django_scaledb.partitions.bounds import Bound
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.conversion import (
    attach,
    ceiling,
    copy,
    names,
    preflight,
    split,
    state,
    undo,
)
from django_scaledb.partitions.conversion import inventory as inventories
from django_scaledb.partitions.conversion.errors import ConversionRefused, Obstacle, TableChanged
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.job import Job, utc_now
from django_scaledb.partitions.conversion.stages import Stage
from django_scaledb.partitions.conversion.state import Conversion, Phase, Strategy
from django_scaledb.partitions.conversion.swap import BOUNDS_CHECK
from django_scaledb.partitions.marker import iso
from django_scaledb.partitions.overview import no_table
from django_scaledb.partitions.plan import Create, Partition, State, plan
from django_scaledb.postgres.executor import Executor, sqlstate
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.session import RUN_LOCK
from django_scaledb.postgres.statements import Statement, Step

RUN_SECONDS = 7 * 86400.0
"""A conversion may take days; what is bounded is how long it waits for one lock."""

_TRIES = 5
_OTHER_CONVERTER_SECONDS = 5.0
_CHECK_VIOLATION = "23514"
_ASIDE = {Strategy.ATTACH: "_start", Strategy.COPY: "_old", Strategy.SPLIT: "_old"}


class Listener(maintenance.Listener):
    """Told how a conversion gets on; does nothing by itself."""

    def on_stage(self, stage: Stage) -> None:
        """`stage` is about to be done."""

    def on_note(self, text: str) -> None:
        """Something that people should know."""

    def on_rows(self, done: int, total: int) -> None:
        """So many rows of an estimated total are copied."""


@dataclass(frozen=True)
class Options:
    """`lock_timeout` in milliseconds, `deadline` in seconds for each lock, `throttle` in rows a second."""

    using: str
    command: str = "convert_to_partitioned"
    lock_timeout: int | None = None
    deadline: float | None = None
    throttle: float | None = None
    now: datetime | None = None


class Runner:
    """Converts one model's table, or takes that back.

    Every method raises `DDLError`, or another `ScaleDBError`, with the reason where it cannot go
    on; what was done is kept, and calling it again goes on from there.
    """

    def __init__(self, model: type[models.Model], options: Options, listener: Listener | None = None) -> None:
        self.model = model
        self.options = options
        self.listener = listener or Listener()
        self.connection: BaseDatabaseWrapper = connections[options.using]
        self.config = registry.config_for_migration(model)
        self.now = options.now or utc_now()

    # -- what can be asked for

    def convert(self, strategy: Strategy | None = None, until: datetime | None = None) -> str:
        """Go on until the table is partitioned; the answer says what there is to know."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None and found.is_partitioned:
            found.partitions(self.config)  # raises where it is partitioned by something else
            return f"{found.table} is partitioned already; nothing to do"
        if conversion is None:
            self._install()
            conversion = self._begin(found, strategy or Strategy.ATTACH, until)
        elif strategy is not None and conversion.strategy != strategy:
            raise DDLError(
                f"a conversion of {found.table} by {conversion.strategy} is under way; go on with "
                f"--strategy {conversion.strategy}, or take it back with --abort first"
            )
        with self._alone(conversion):
            conversion.refresh_from_db(using=self.connection.alias)
            return self._go_on(self._job(conversion))

    def abort(self) -> str:
        """Back to the plain table."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None:
            return f"no conversion of {found.table} is under way; nothing to take back"
        with self._alone(conversion):
            conversion.refresh_from_db(using=self.connection.alias)
            if conversion.ended_at is None:
                job = self._job(conversion)
                self._do_all(job, self._undo)
        if conversion.strategy == Strategy.SPLIT:
            return f"{found.table} is as it was before its partition was to be split"
        return f"{found.table} is the plain table again that it was"

    def finish(self) -> str:
        """Give up the way back that the copy strategy keeps; goes on first where that is not reached."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None or conversion.strategy != Strategy.COPY:
            return self.convert()
        self.convert()
        with self._alone(conversion):
            conversion.refresh_from_db(using=self.connection.alias)
            job = self._job(conversion)
            self.do(job, copy.finish(job))
        return f"{found.table} is partitioned, and the old table is gone"

    def split(self) -> str:
        """Split the first partition that spans several periods; the answer says which."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None:
            split.refuse(found)
            partition = split.choose(found, self.config)
            if partition is None:
                return f"each partition of {found.table} is one period already; nothing to split"
            self._install()
            conversion = self._prepare_split(found, partition)
            conversion.save(using=self.connection.alias)
        elif conversion.strategy != Strategy.SPLIT:
            raise DDLError(
                f"a conversion of {found.table} is under way ({conversion.strategy}, "
                f"{conversion.phase}); finish it "
                f"first: manage.py convert_to_partitioned {conversion.model}"
            )
        with self._alone(conversion):
            conversion.refresh_from_db(using=self.connection.alias)
            return self._go_on(self._job(conversion))

    def _prepare_split(self, found: PartitionSet, partition: Partition) -> Conversion:
        with catalog.pinned(self.connection) as cursor:
            leaf = inventories.read(cursor, partition.table)
        assert partition.range is not None
        refuse(leaf, preflight.for_split(leaf))
        return Conversion(
            model=self.model._meta.label,
            table_schema=found.table.schema,
            table_name=found.table.name,
            strategy=str(Strategy.SPLIT),
            rows_total=leaf.rows,
            details={
                "inventory": leaf.as_json(),
                "names": names.choose(self.connection, leaf, aside="_old").as_json(),
                "split": [iso(partition.range.lower), iso(partition.range.upper)],
            },
        )

    def plan(self, strategy: Strategy | None, until: datetime | None = None) -> Iterator[Stage]:
        """The stages that are left, for ``--dry-run``; nothing is touched."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None:
            if found.is_partitioned:
                return
            conversion = self._prepare(found, strategy or Strategy.ATTACH, until)
        job = self._job(conversion, dry_run=True)
        yield from self._stages(job)
        if conversion.strategy == Strategy.ATTACH:
            yield from partitions_ahead(job, found)
        yield analyze(job, found.table)

    def plan_split(self) -> Iterator[Stage]:
        """The stages of a split that are left, for ``--dry-run``."""
        found = self.find()
        conversion = state.current(self.connection, found.table)
        if conversion is None:
            partition = split.choose(found, self.config)
            if partition is None:
                return
            conversion = self._prepare_split(found, partition)
        yield from self._stages(self._job(conversion, dry_run=True))

    def find(self) -> PartitionSet:
        """The table as it stands; raises `DDLError` when there is none."""
        [found] = catalog.read(self.connection, [self.model._meta.db_table])
        if found is None:
            raise DDLError(no_table(self.model, self.options.using))
        if found.kind not in ("r", "p"):
            found.partitions(self.config)
        return found

    # -- beginning

    def _install(self) -> None:
        if not state.is_installed(self.connection):
            self.listener.on_note("making the table in which conversions are kept (migrate django_scaledb)")
            call_command("migrate", "django_scaledb", database=self.options.using, verbosity=0)

    def _begin(self, found: PartitionSet, strategy: Strategy, until: datetime | None) -> Conversion:
        conversion = self._prepare(found, strategy, until)
        conversion.save(using=self.connection.alias)
        return conversion

    def _prepare(self, found: PartitionSet, strategy: Strategy, until: datetime | None) -> Conversion:
        """A conversion that is not saved yet; raises `ConversionRefused`."""
        with catalog.pinned(self.connection) as cursor:
            inventory = inventories.read(cursor, found.table)
        refuse(
            inventory, preflight.obstacles(inventory, self.config, str(self.model._meta.pk.column), strategy)
        )
        end = first_end(self.connection, self.config, found, self.now, until)
        chosen = names.choose(self.connection, inventory, aside=_ASIDE[strategy])
        return Conversion(
            model=self.model._meta.label,
            table_schema=found.table.schema,
            table_name=found.table.name,
            strategy=str(strategy),
            rows_total=inventory.rows,
            details={
                "inventory": inventory.as_json(),
                "names": chosen.as_json(),
                "ceiling": end.isoformat(),
            },
        )

    def _job(self, conversion: Conversion, *, dry_run: bool = False) -> Job:
        return Job(
            connection=self.connection,
            model=self.model,
            conversion=conversion,
            inventory=Inventory.from_json(conversion.details["inventory"]),
            names=names.Names.from_json(conversion.details["names"]),
            now=self.now,
            dry_run=dry_run,
            kept=not dry_run,
            throttle=self.options.throttle,
        )

    # -- going on

    def _go_on(self, job: Job) -> str:
        if job.conversion.ended_at is not None:
            return f"{job.conversion.table} is converted already; nothing to do"
        keep_room(job, partial(self.do, job))
        self._do_all(job, self._stages)
        if job.conversion.strategy == Strategy.SPLIT:
            self.do(job, analyze(job, job.conversion.table))
            self.do(job, undo.ended(job, Phase.DONE))
            return f"{job.table} is split into a partition for each of its periods"
        self._make_partitions()
        self.do(job, analyze(job, job.table))
        if job.conversion.strategy == Strategy.COPY:
            return (
                f"{job.table} is partitioned now, and all that is written to it goes to "
                f"{job.names.aside_table}, too; "
                f"run migrate to record it, then give up the way back: manage.py convert_to_partitioned "
                f"{job.conversion.model} --finish (or go it: --abort)"
            )
        self.do(job, undo.ended(job, Phase.DONE))
        return f"{job.table} is partitioned now; run migrate to record it"

    def _stages(self, job: Job) -> Iterator[Stage]:
        if job.conversion.strategy == Strategy.COPY:
            yield from copy.stages(job, self.listener.on_rows)
        elif job.conversion.strategy == Strategy.SPLIT:
            yield from split.stages(job, self.listener.on_rows)
        else:
            yield from attach.stages(job)

    def _undo(self, job: Job) -> Iterator[Stage]:
        ways = {Strategy.COPY: copy.abort, Strategy.SPLIT: split.abort, Strategy.ATTACH: undo.attached}
        yield from ways[Strategy(job.conversion.strategy)](job)

    def _do_all(self, job: Job, stages: Callable[[Job], Iterator[Stage]]) -> None:
        for attempt in range(_TRIES):
            try:
                for stage in stages(job):
                    self.do(job, stage)
            except DDLError as error:
                if attempt == _TRIES - 1:
                    raise
                if isinstance(error, TableChanged):
                    continue
                if sqlstate(error) != _CHECK_VIOLATION or job.conversion.phase != Phase.PREPARING:
                    raise
                # A row lies above the ceiling; its key was not to be found quickly.
                raise_ceiling(job, partial(self.do, job))
            else:
                return

    def do(self, job: Job, stage: Stage) -> None:
        """Do one stage, with the patience that was asked for."""
        self.listener.on_stage(stage)
        if job.kept and job.conversion.ended_at is None:
            job.note(step=stage.step.summary if stage.step is not None else stage.name)
        if stage.work is not None:
            stage.work()
        if stage.step is None:
            return
        patience = settings.DDL_DEADLINE if self.options.deadline is None else self.options.deadline
        until = time.monotonic() + patience
        while True:
            try:
                with self._executor() as executor:
                    executor.run(
                        stage.step,
                        patience=patience,
                        guard=stage.guard,
                        resume=stage.resume,
                        bounded=stage.bounded,
                    )
            except AnotherRunInProgress:
                # Somebody rotates; that is over soon.
                if time.monotonic() >= until:
                    raise
            else:
                return

    def _executor(self) -> Executor:
        lock_timeout = self.options.lock_timeout
        return Executor(
            self.connection,
            command=self.options.command,
            lock_timeout=settings.LOCK_TIMEOUT if lock_timeout is None else lock_timeout,
            deadline=RUN_SECONDS,
            on_wait=self.listener.on_wait,
        )

    def _make_partitions(self) -> None:
        report = maintenance.rotate(
            [self.model],
            using=self.options.using,
            now=self.now,
            retire=False,
            lock_timeout=self.options.lock_timeout,
            deadline=self.options.deadline,
            command=self.options.command,
            listener=self.listener,
        )
        for _, reason in report.failures():
            raise DDLError(reason)
        if report.error is not None:
            raise report.error

    @contextmanager
    def _alone(self, conversion: Conversion) -> Iterator[None]:
        """One run for each conversion at a time: the lock of a killed one goes with its session."""
        key = [RUN_LOCK[0], 1000 + conversion.pk]
        until = time.monotonic() + _OTHER_CONVERTER_SECONDS
        while not self._ask("SELECT pg_try_advisory_lock(%s, %s)", key):
            if time.monotonic() >= until:
                raise AnotherRunInProgress(
                    f"another run is converting {conversion.table}; see manage.py convert_to_partitioned "
                    f"{conversion.model} --status"
                )
            time.sleep(0.1)
        try:
            yield
        finally:
            if self.connection.connection is not None and not self.connection.connection.closed:
                self._ask("SELECT pg_advisory_unlock(%s, %s)", key)

    def _ask(self, query: str, parameters: list[Any]) -> Any:
        with self.connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchone()[0]


# -- shared with `migrate`, which converts small tables itself


def refuse(inventory: Inventory, obstacles: list[Obstacle]) -> None:
    """Raises `ConversionRefused` when there is anything in the way."""
    if obstacles:
        raise ConversionRefused(inventory.table, obstacles)


def first_end(
    connection: BaseDatabaseWrapper, config: Any, found: PartitionSet, now: datetime, until: datetime | None
) -> datetime:
    """Where the first partition is to end, as far as one can tell quickly."""
    greatest: Bound | None = None
    ends = inspection.ends_of_key(connection, found.table, config.column)
    if ends is not None and ends[1] is not None:
        greatest = ceiling.moment_of(ends[1], config.key_kind)
    wanted = ceiling.first_end(config, now, greatest)
    return wanted if until is None else ceiling.chosen_end(config, now, greatest, until)


def keep_room(job: Job, do: Callable[[Stage], None]) -> None:
    """Move the ceiling up when time has come close to it: a conversion may have been left lying."""
    preparing = job.conversion.phase == Phase.PREPARING and job.conversion.strategy == Strategy.ATTACH
    if preparing and job.bounds.upper < job.config.on_key_axis(utc_now()) + timedelta(days=1):
        raise_ceiling(job, do)


def raise_ceiling(job: Job, do: Callable[[Stage], None]) -> None:
    """Look for the greatest key, however long that takes, and let the first partition end above it."""
    table = job.table
    if job.constraint_state(table, BOUNDS_CHECK) is not None:
        do(Stage("check", attach.drop_check(table)))
    with catalog.pinned(job.connection) as cursor:
        query = sql.SQL("SELECT max({})::text FROM {}").format(sql.Identifier(job.config.column), table.sql)
        if job.config.key_kind.value == "uuid":
            query = sql.SQL("SELECT {k}::text FROM {t} ORDER BY {k} DESC LIMIT 1").format(
                k=sql.Identifier(job.config.column), t=table.sql
            )
        cursor.execute(query.as_string(job.connection.connection))
        row = cursor.fetchone()
    greatest = ceiling.moment_of(row[0], job.config.key_kind) if row and row[0] is not None else None
    job.note(ceiling=ceiling.first_end(job.config, datetime.now(UTC), greatest).isoformat())


def partitions_ahead(job: Job, found: PartitionSet) -> Iterator[Stage]:
    """For a dry run: the partitions that will be made behind the first one."""
    first = Partition(job.names.aside_table, job.bounds, State.ATTACHED, managed=True)
    parent = replace(found, strategy="r", key_columns=(job.config.column,), access_method=None)
    for action in plan(job.config, [first], job.now, retire=False).actions:
        if isinstance(action, Create):
            yield Stage("partitions", copy.create_partition(job, parent, action.range))


def analyze(job: Job, table: TableName) -> Stage:
    """Autovacuum never analyzes a partitioned table itself."""
    lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    statement = Statement(sql.SQL("ANALYZE {}").format(table.sql), (lock,))
    return Stage("analyze", Step(f"analyze {table}", (statement,)), bounded=False)
