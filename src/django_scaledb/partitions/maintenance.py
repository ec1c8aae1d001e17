"""Where catalog, plan and DDL meet: bringing the partition sets of models to what they should be.

The catalog is read once without any lock; only when there is something to do is the run's lock
taken, and the catalog read again under it. All models are given the partitions they lack before
any is relieved of old ones. What fails stays with its model; what is only blocked is put off, so
that a busy table does not use up the time of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError, connections, models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from django_scaledb.conf import settings
from django_scaledb.exceptions import (
    ArchiveError,
    ArchiveOutdated,
    DDLError,
    LockNotAvailable,
    PlanError,
    ScaleDBError,
)
from django_scaledb.partitions import catalog, registry
from django_scaledb.partitions.archive import session as archive_session
from django_scaledb.partitions.archive import writer
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.overview import no_table
from django_scaledb.partitions.plan import (
    Action,
    Archive,
    Create,
    CreateDefault,
    Detach,
    Drop,
    Finalize,
    Partition,
    Plan,
    Settle,
    plan,
    plan_span,
)
from django_scaledb.partitions.report import ModelReport, Report, Result, Sent, Status
from django_scaledb.partitions.work import Task, Worker
from django_scaledb.postgres.executor import Executor, Waiting, script, sqlstate

logger = logging.getLogger("django_scaledb.partitions")
# The commands print what a run did: where nobody has asked for logs, nothing is said twice.
logger.addHandler(logging.NullHandler())

PATIENCE_SECONDS = 1.0
"""How long one blocked action is tried before the others get their turn."""

Planner = Callable[[PartitionConfig, Sequence[Partition]], Plan]


class Listener:
    """Told how a run gets on, so that long ones can be followed; does nothing by itself."""

    def on_start(self, actions: int) -> None:
        """`actions` are to be done."""

    def on_result(self, model: ModelReport, result: Result) -> None:
        """One action was done, has failed, or was skipped."""

    def on_wait(self, waiting: Waiting) -> None:
        """Somebody is in the way."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """So many rows of `total` are done; `what` says which, and done how."""


def rotate(
    partitioned: Iterable[type[models.Model]],
    *,
    using: str = DEFAULT_DB_ALIAS,
    now: datetime | None = None,
    create: bool = True,
    retire: bool = True,
    dry_run: bool = False,
    lock_timeout: int | None = None,
    deadline: float | None = None,
    drain_default: bool = False,
    command: str = "rotate_partitions",
    listener: Listener | None = None,
) -> Report:
    """Bring the partition sets of `partitioned` to what their PartitioningMeta says at `now` (aware).

    `create` makes what is missing, `retire` applies retention; either finishes what an earlier run
    left undone. `lock_timeout` is in milliseconds and `deadline` in seconds; they default to
    ``SCALEDB["LOCK_TIMEOUT"]`` and ``SCALEDB["DDL_DEADLINE"]``. With `drain_default` any number of
    rows is moved out of a default partition that is in the way of a new one.

    Failures are in the report, by model; nothing is raised for them.
    """
    moment = now or timezone.now()

    def planner(config: PartitionConfig, partitions: Sequence[Partition]) -> Plan:
        return plan(config, partitions, moment, create=create, retire=retire)

    options = _options(using, moment, command, dry_run, lock_timeout, deadline, drain_default)
    return _Run(options, listener).perform(list(partitioned), planner)


def preview(
    partitioned: Iterable[type[models.Model]], *, using: str = DEFAULT_DB_ALIAS, now: datetime, limit: int
) -> Report:
    """What `rotate` would do at `now` (aware), for whoever only looks and need not own the tables.

    All actions are in the report; the first `limit` of them with their SQL, so that the number of
    queries is bounded.
    """

    def planner(config: PartitionConfig, partitions: Sequence[Partition]) -> Plan:
        return plan(config, partitions, now)

    options = _options(using, now, "rotate_partitions", True, None, None, False)
    return _Run(replace(options, shown=limit), None).perform(list(partitioned), planner)


def create_span(
    partitioned: Iterable[type[models.Model]],
    start: datetime,
    end: datetime,
    *,
    using: str = DEFAULT_DB_ALIAS,
    now: datetime | None = None,
    dry_run: bool = False,
    lock_timeout: int | None = None,
    deadline: float | None = None,
    drain_default: bool = False,
    command: str = "create_partitions",
    listener: Listener | None = None,
) -> Report:
    """Give each period of `partitioned` that touches ``[start, end)`` (aware) its partition.

    The other arguments, and the report, are those of `rotate`.
    """

    def planner(config: PartitionConfig, partitions: Sequence[Partition]) -> Plan:
        return plan_span(config, partitions, start, end)

    options = _options(using, now or timezone.now(), command, dry_run, lock_timeout, deadline, drain_default)
    return _Run(options, listener).perform(list(partitioned), planner)


@dataclass(frozen=True)
class _Options:
    using: str
    now: datetime
    command: str
    dry_run: bool
    lock_timeout: int
    deadline: float
    drain_default: bool
    shown: int | None = None
    """Of a preview: as many actions are shown with their SQL."""


def _options(
    using: str,
    now: datetime,
    command: str,
    dry_run: bool,
    lock_timeout: int | None,
    deadline: float | None,
    drain_default: bool,
) -> _Options:
    return _Options(
        using=using,
        now=now.astimezone(UTC),
        command=command,
        dry_run=dry_run,
        lock_timeout=settings.LOCK_TIMEOUT if lock_timeout is None else lock_timeout,
        deadline=settings.DDL_DEADLINE if deadline is None else deadline,
        drain_default=drain_default,
    )


@dataclass(eq=False)
class _Item:
    """An action of one model, on its way. `left_pending`: it failed, and is in the way of other detaches."""

    job: _Job
    action: Action
    result: Result
    left_pending: bool = False

    @property
    def is_done(self) -> bool:
        return self.result.status is Status.DONE


@dataclass(eq=False)
class _Job:
    """One model's part of the run; no worker where an error stands in the report."""

    report: ModelReport
    worker: Worker | None = None
    items: tuple[_Item, ...] = ()


class _Run:
    def __init__(self, options: _Options, listener: Listener | None) -> None:
        self.options = options
        self.connection: BaseDatabaseWrapper = connections[options.using]
        self.listener = listener or Listener()

    def perform(self, partitioned: Sequence[type[models.Model]], planner: Planner) -> Report:
        report = self._perform(partitioned, planner)
        for model in report.models:
            if model.error is not None:
                self._log(logging.WARNING, model.error, "%s: %s", model.label, model.error, model=model.label)
        if report.error is not None:
            text = "%s of the database %s was stopped: %s"
            self._log(logging.ERROR, report.error, text, report.command, report.database, report.error)
        return report

    def _perform(self, partitioned: Sequence[type[models.Model]], planner: Planner) -> Report:
        options = self.options
        report = Report(options.command, options.using, options.now, options.dry_run)
        try:
            jobs = self._load(partitioned, planner)
            report.models = [job.report for job in jobs]
            if not any(job.items for job in jobs):
                return report
            if options.dry_run:
                self._show(jobs)
                return report
            with Executor(
                self.connection,
                command=options.command,
                lock_timeout=options.lock_timeout,
                deadline=options.deadline,
                on_wait=self.listener.on_wait,
            ) as executor:
                jobs = self._load(partitioned, planner)
                report.models = [job.report for job in jobs]
                self._execute(executor, jobs)
            self._archive(jobs)
        except (ScaleDBError, DatabaseError, InterfaceError) as error:
            report.error = error
            # What was planned without the lock and never begun is no result.
            for model in report.models:
                model.results = [r for r in model.results if r.status is not Status.PLANNED]
        return report

    # -- what is to be done

    def _load(self, partitioned: Sequence[type[models.Model]], planner: Planner) -> list[_Job]:
        sets = catalog.read(self.connection, [model._meta.db_table for model in partitioned])
        return [self._job(model, found, planner) for model, found in zip(partitioned, sets, strict=True)]

    def _job(self, model: type[models.Model], found: PartitionSet | None, planner: Planner) -> _Job:
        job = _Job(ModelReport(model._meta.label, found.table if found else None))
        try:
            config = registry.config_for(model)
            if found is None:
                raise PlanError(no_table(model, self.options.using))
            actions = planner(config, found.partitions(config)).actions
            worker = Worker(
                self.connection,
                model,
                config,
                found,
                self.options.now,
                drain_default=self.options.drain_default,
            )
            if actions and self.options.shown is None:
                worker.require_rights()
                actions = self._archivable(job, found, actions)
        except (ScaleDBError, ValueError) as error:
            job.report.error = error
            return job
        job.worker = worker
        job.items = tuple(_Item(job, action, Result(_KINDS[type(action)])) for action in actions)
        job.report.results += [item.result for item in job.items]
        return job

    def _archivable(self, job: _Job, found: PartitionSet, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        """`actions`, less all that takes partitions off a set that cannot be archived."""
        wanted = [action.partition for action in actions if isinstance(action, Archive)]
        if not wanted:
            return actions
        try:
            writer.require(self.connection, found.table)
        except ScaleDBError as error:
            refused = Result(_KINDS[Archive], wanted[0].table, wanted[0].range, Status.FAILED, error)
            job.report.results.append(refused)
            return tuple(action for action in actions if not isinstance(action, Detach | Archive))
        return actions

    def _begin(self, item: _Item) -> Iterator[Task]:
        worker = item.job.worker
        assert worker is not None
        item.result.sent = []
        item.result.partition, item.result.range = worker.target(item.action)
        for task in worker.tasks(item.action):
            for statement in script(task.step, self.options.lock_timeout):
                text = statement.query.as_string(self.connection.connection)
                item.result.sent.append(Sent(text, statement.locks))
            yield task

    def _show(self, jobs: Iterable[_Job]) -> None:
        items = [item for job in jobs for item in job.items]
        shown = len(items) if self.options.shown is None else self.options.shown
        for item in items[shown:]:
            if isinstance(item.action, Create):  # to find a free name takes a query
                item.result.range = item.action.range
            elif not isinstance(item.action, CreateDefault):
                partition = item.action.partition
                item.result.partition, item.result.range = partition.table, partition.range
        for item in items[:shown]:
            try:
                for _ in self._begin(item):
                    pass
                if isinstance(item.action, Archive):
                    read = writer.statement(self.connection, item.action.partition.table)
                    text = read.query.as_string(self.connection.connection)
                    item.result.sent.append(Sent(text, read.locks))
            except (ScaleDBError, DatabaseError) as error:
                item.result.status, item.result.reason = Status.FAILED, error

    # -- doing it

    def _execute(self, executor: Executor, jobs: Iterable[_Job]) -> None:
        items = [item for job in jobs for item in job.items]
        self.listener.on_start(len(items))
        items = [item for item in items if not isinstance(item.action, Archive)]
        self._in_turns(executor, [item for item in items if not isinstance(item.action, Detach | Drop)])
        self._in_turns(executor, [item for item in items if isinstance(item.action, Detach | Drop)])

    def _archive(self, jobs: Iterable[_Job]) -> None:
        """Last, and outside the run's lock: it takes long, and is in nobody's way."""
        for item in [item for job in jobs for item in job.items]:
            if not isinstance(item.action, Archive):
                continue
            worker, table = item.job.worker, item.action.partition.table
            assert worker is not None
            item.result.partition, item.result.range = worker.target(item.action)
            needed = next((other for other in item.job.items if _needs(item, other)), None)
            if needed is not None:
                self._end(item, Status.SKIPPED, _not_tried(needed))
                continue
            options = archive_session.Options(
                self.options.command,
                self.options.now,
                self.options.lock_timeout,
                self.options.deadline,
                self.listener.on_wait,
                self.listener.on_progress,
            )
            try:
                [found] = catalog.read(self.connection, [worker.model._meta.db_table])
                assert found is not None
                writer.Archiver(self.connection, worker.model, worker.config, found, options).archive(table)
            except (ScaleDBError, DatabaseError, InterfaceError) as error:
                self._end(item, Status.FAILED, error)
            except Exception as error:  # a storage raises whatever it likes
                text = f"cannot archive {table}: {type(error).__name__}: {error}"
                self._end(item, Status.FAILED, ArchiveError(text))
            else:
                self._end(item, Status.DONE, None)

    def _in_turns(self, executor: Executor, items: list[_Item]) -> None:
        """Do all of them, coming back to those that are blocked until the deadline."""
        while items:
            put_off: list[_Item] = []
            for item in items:
                needed = next((other for other in item.job.items if _needs(item, other)), None)
                if needed is not None and needed.result.status in (Status.FAILED, Status.SKIPPED):
                    self._end(item, Status.SKIPPED, _not_tried(needed))
                elif needed is not None or not self._do(executor, item, put_off):
                    put_off.append(item)
            if executor.is_over:
                self._give_up(put_off)
                return
            items = put_off

    def _give_up(self, blocked: Iterable[_Item]) -> None:
        for item in blocked:
            needed = next((other for other in item.job.items if _needs(item, other)), None)
            if needed is not None:
                self._end(item, Status.SKIPPED, _not_tried(needed))
            else:
                self._end(item, Status.FAILED, item.result.reason)

    def _do(self, executor: Executor, item: _Item, put_off: Sequence[_Item]) -> bool:
        """Whether `item` came to an end, good or bad; False when it is blocked."""
        alike = next((other for other in put_off if _is_blocked_alike(item, other)), None)
        if alike is not None:
            item.result.reason = alike.result.reason
            return False
        try:
            for task in self._begin(item):
                executor.run(
                    task.step,
                    patience=PATIENCE_SECONDS,
                    guard=task.guard,
                    resume=task.resume,
                    bounded=task.bounded,
                )
        except LockNotAvailable as error:
            item.result.reason = error
            item.left_pending = self._is_left_pending(item)
            return False
        except ArchiveOutdated as error:
            assert item.job.worker is not None
            assert isinstance(item.action, Drop)
            executor.run(item.job.worker.forget_archive(item.action.partition))
            self._end(item, Status.FAILED, error)
        except (ScaleDBError, DatabaseError, InterfaceError, OSError) as error:
            executor.recover()
            item.left_pending = self._is_left_pending(item)
            self._end(item, Status.FAILED, _explained(item.action, error))
        else:
            self._end(item, Status.DONE, None)
        return True

    def _is_left_pending(self, item: _Item) -> bool:
        assert item.job.worker is not None
        try:
            return isinstance(item.action, Detach) and item.job.worker.is_pending(item.action.partition)
        except (DatabaseError, InterfaceError):
            return True  # nobody knows; then it is better not to try the others

    def _end(self, item: _Item, status: Status, reason: Exception | None) -> None:
        result, label = item.result, item.job.report.label
        result.status, result.reason = status, reason
        level, text = (
            (logging.WARNING, "%s: %s of %s %s: %s") if reason else (logging.INFO, "%s: %s of %s %s")
        )
        words = (label, result.action, result.partition, status.value, *([reason] if reason else []))
        fields = {"partition": str(result.partition or ""), "action": result.action, "state": status.value}
        self._log(level, reason, text, *words, model=label, range=str(result.range or ""), **fields)
        self.listener.on_result(item.job.report, result)

    def _log(self, level: int, reason: Exception | None, text: str, *words: object, **fields: object) -> None:
        extra = {"command": self.options.command, "database": self.options.using, **fields}
        if reason is not None:
            extra |= {"error": type(reason).__name__, "reason": str(reason)}
        logger.log(level, text, *words, extra=extra)


def _needs(item: _Item, other: _Item) -> bool:
    """Whether `item` cannot be done as long as `other`, of the same model, is not."""
    if other is item or other.is_done:
        return False
    if isinstance(other.action, Finalize):
        partition = other.action.partition
        match item.action:
            case Create(range=wanted):
                return partition.range is not None and partition.range.overlaps(wanted)
            case Settle(partition=settled):
                return settled == partition
            case Detach():
                return True  # PostgreSQL allows one pending detach in a set
    if isinstance(item.action, Archive):
        return isinstance(other.action, Detach | Settle) and other.action.partition == item.action.partition
    if isinstance(other.action, Create) and isinstance(item.action, Detach):
        # The plan lets the last partition go because of the newer ones it makes; without them it stays.
        assert item.job.worker is not None
        return item.job.worker.is_last(item.action.partition)
    return other.left_pending and isinstance(item.action, Detach)


def _is_blocked_alike(item: _Item, other: _Item) -> bool:
    """Whether both need the same locks: all the partitions that one model is to be given do."""
    return item.job is other.job and isinstance(item.action, Create) and isinstance(other.action, Create)


def _not_tried(needed: _Item) -> DDLError:
    what = f"{needed.result.action} of {needed.result.partition}"
    return DDLError(f"not tried, because the {what} has not been done")


def _explained(action: Action, error: Exception) -> Exception:
    """A violated foreign key, with what can be done about it."""
    if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
        return error
    if isinstance(action, Create):
        return DDLError(
            f"{error}; PostgreSQL cannot move a row out of the default partition that is referenced"
        )
    return DDLError(f"{error}; delete or re-point the rows that reference it, or lengthen the retention")


_FOREIGN_KEY_VIOLATION = "23503"
_KINDS: dict[type, str] = {
    Create: "create",
    CreateDefault: "create default",
    Finalize: "finalize",
    Detach: "detach",
    Settle: "settle",
    Archive: "archive",
    Drop: "drop",
}
