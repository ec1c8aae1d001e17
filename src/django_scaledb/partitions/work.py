"""One action on one partition set, as the steps that do it from wherever it stands now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import ddl, hooks, inheritance, inspection
from django_scaledb.partitions.archive import state, writer
from django_scaledb.partitions.bounds import Range, label
from django_scaledb.partitions.catalog import Member, PartitionSet
from django_scaledb.partitions.config import PartitionConfig, RetentionAction
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.plan import (
    Action,
    Create,
    CreateDefault,
    Detach,
    Drop,
    Finalize,
    Partition,
    Settle,
    State,
)
from django_scaledb.postgres.executor import Guard
from django_scaledb.postgres.identifiers import TableName, fit
from django_scaledb.postgres.statements import Statement, Step

MOVED_ROWS = 10_000
"""As many rows as are moved out of a default partition without being asked to."""

_NAMES_TRIED = 50


@dataclass(frozen=True)
class Task:
    """A step, and how the executor is to run it."""

    step: Step
    guard: Guard | None = None
    resume: Callable[[], Step | None] | None = None
    bounded: bool = True


class Worker:
    """Turns the actions of one model into tasks.

    Tasks are worked out from what the database says when they are asked for, so that an action
    that was interrupted can be asked for again.
    """

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        model: type[models.Model],
        config: PartitionConfig,
        parent: PartitionSet,
        now: datetime,
        *,
        drain_default: bool,
    ) -> None:
        self.connection = connection
        self.model = model
        self.config = config
        self.parent = parent
        self.now = now
        self.drain_default = drain_default
        self._names: dict[Action, TableName] = {}

    def require_rights(self) -> None:
        """Raises `DDLError` when the connected role may not change the table."""
        parent = self.parent
        if not parent.may_alter:
            raise DDLError(
                f"{parent.table} belongs to the role {parent.owner!r}, and {parent.role!r}, as which this "
                f"connection works, may not change it; connect as {parent.owner!r}, or GRANT that role "
                f"to {parent.role!r}"
            )

    def target(self, action: Action) -> tuple[TableName, Range | None]:
        """The table that `action` is about, and its bounds."""
        if isinstance(action, Create):
            return self._new_name(action), action.range
        if isinstance(action, CreateDefault):
            return self._new_name(action), None
        return action.partition.table, action.partition.range

    def tasks(self, action: Action) -> Iterator[Task]:
        """What is left to do for `action`, in order; raises `DDLError` where it cannot be done."""
        if isinstance(action, Create):
            yield self._create(action)
        elif isinstance(action, CreateDefault):
            table = self._new_name(action)
            beside = self._beside(table)
            yield Task(ddl.create_default(self.parent, table, beside=beside))
        else:
            member = self.parent.member(action.partition.table)
            if isinstance(action, Detach):
                yield from self._detach(member, action.partition.range)
            elif isinstance(action, Finalize):
                yield from self._finalize(member)
            elif isinstance(action, Drop):
                yield self._drop(member)
            elif isinstance(action, Settle):
                yield from self._settle(member, action.partition.range)

    def is_last(self, partition: Partition) -> bool:
        """Whether no partition of the set, as it was read, reaches farther than `partition`."""
        ranges = (p.range for p in self.parent.partitions(self.config) if p.state is State.ATTACHED)
        return partition.range is not None and all(
            other is None or other.upper <= partition.range.upper for other in ranges
        )

    def is_pending(self, partition: Partition) -> bool:
        """Whether a DETACH CONCURRENTLY of `partition` was begun and not finished."""
        return self._state(self.parent.member(partition.table)) is State.DETACH_PENDING

    def forget_archive(self, partition: Partition) -> Step:
        """Mark a detached table as not archived: its rows are not those in the archive any more."""
        member = self.parent.member(partition.table)
        assert member.marker is not None
        return ddl.mark(member.table, replace(member.marker, archive=None, archived_at=None))

    # -- creating

    def _create(self, action: Create) -> Task:
        table = self._new_name(action)
        moving = self._moving(table, action.range)
        beside = self._beside(table)
        step = ddl.create(self.parent, self.config, action.range, table, moving=moving, beside=beside)
        return Task(step, bounded=not self.drain_default)

    def _beside(self, table: TableName) -> tuple[Statement, ...]:
        """What the new table is to have of its siblings, and what other features want on it."""
        own = inheritance.settings(self.connection, self.model, table)
        return (*own, *hooks.on_create(self.connection, self.model, table))

    def _moving(self, table: TableName, wanted: Range) -> tuple[Statement, ...]:
        default = self.parent.default
        if default is None:
            return ()
        rows = inspection.count_rows(self.connection, default.table, wanted, self.config, MOVED_ROWS + 1)
        if not rows:
            return ()
        if rows > MOVED_ROWS and not self.drain_default:
            raise DDLError(
                f"cannot create a partition for {wanted}: the default partition {default.table} holds more "
                f"than {MOVED_ROWS} of its rows, and the set is locked while they are moved; when it may "
                f"be, say --drain-default: manage.py create_partitions {self.config.label} --drain-default"
            )
        how = inspection.movable(self.connection, default.oid, self.parent.oid)
        if how.acting_keys:
            raise DDLError(
                f"cannot create a partition for {wanted}: the default partition {default.table} holds rows "
                f"of it, and moving them would set off the foreign key {how.acting_keys[0]!r} "
                "(ON DELETE CASCADE or SET); drop that key, rotate, and add it again"
            )
        return ddl.move_from_default(self.parent, table, wanted, self.config, how.columns, how.triggers)

    def _new_name(self, action: Create | CreateDefault) -> TableName:
        """A name that is free in the parent's schema; numbered where the plain one is taken."""
        if action not in self._names:
            suffix = "_default"
            if isinstance(action, Create):
                zone = self.config.period_zone
                suffix = "_" + label(action.range.lower, self.config.interval, zone)
            parent = self.parent.table
            numbers = ("", *(f"_{number}" for number in range(2, _NAMES_TRIED)))
            candidates = [fit(parent.name, suffix + number) for number in numbers]
            taken = inspection.taken_names(self.connection, parent.schema, candidates)
            taken |= {table.name for table in self._names.values()}
            free = next((name for name in candidates if name not in taken), None)
            if free is None:
                raise DDLError(f"cannot name a partition: {candidates[0]} to {candidates[-1]} are all taken")
            self._names[action] = parent.sibling(free)
        return self._names[action]

    # -- taking off

    def _detach(self, member: Member, bounds: Range | None) -> Iterator[Task]:
        state = self._state(member)
        if state is State.ATTACHED:
            step = ddl.detach(self.parent, member, bounds)
            if not step.transactional:
                mark = ddl.mark_retiring(self.parent, member, bounds)
                yield Task(mark, guard=partial(_still_ours, member))
            yield Task(step, resume=partial(self._rest_of_detach, member, step))
        elif state is State.DETACH_PENDING:
            yield from self._finalize(member)
        yield from self._settle(member, bounds)

    def _finalize(self, member: Member) -> Iterator[Task]:
        step = ddl.finalize(self.parent, member)
        if self._state(member) is State.DETACH_PENDING:
            yield Task(step, resume=partial(self._rest_of_detach, member, step))

    def _rest_of_detach(self, member: Member, step: Step) -> Step | None:
        state = self._state(member)
        if state is State.DETACH_PENDING:
            return ddl.finalize(self.parent, member)
        return step if state is State.ATTACHED else None

    def _drop(self, member: Member) -> Task:
        marker = member.marker
        if marker is None or marker.archive is None:
            return Task(ddl.drop(member), guard=partial(_still_detached, member))
        step = ddl.drop(member, beside=[state.dropped(marker.archive, self.now)])
        if self.config.retention_action is not RetentionAction.ARCHIVE:
            return Task(step, guard=partial(_still_detached, member))

        def guard(cursor: Any) -> None:
            _still_detached(member, cursor)
            writer.require_copy(self.connection, member, cursor)

        return Task(step, guard=guard, bounded=False)

    def _settle(self, member: Member, bounds: Range | None) -> Iterator[Task]:
        guard = partial(_retiring_and_off, member)
        foreign_keys = inspection.foreign_keys(self.connection, member.oid)
        if foreign_keys:
            yield Task(ddl.release(member, foreign_keys), guard=guard)
        beside = hooks.on_settle(self.connection, self.model, member.table)
        # Accounting for a large table may take its time; it is in nobody's way.
        step = ddl.settle(self.parent, member, bounds, self.now, beside=beside)
        yield Task(step, guard=guard, bounded=not beside)

    def _state(self, member: Member) -> State | None:
        return inspection.attachment(self.connection, self.parent.oid, member.oid)


# -- looking again, under the step's locks: between reading and doing somebody may have acted


def _look(member: Member, cursor: Any, expected: str) -> tuple[bool, Marker | None]:
    found = inspection.current_marker(cursor, member.oid)
    if found is None or found[0] != member.table:
        raise DDLError(f"{member.table} was dropped or renamed meanwhile; it was {expected}")
    return found[1], found[2]


def _still_ours(member: Member, cursor: Any) -> None:
    _, marker = _look(member, cursor, "to be detached")
    if marker is None:
        raise DDLError(f"{member.table} has lost its mark meanwhile, and is left alone")


def _retiring_and_off(member: Member, cursor: Any) -> None:
    is_partition, marker = _look(member, cursor, "to be settled")
    if is_partition or marker is None or marker.state is not MarkState.RETIRING:
        raise DDLError(f"{member.table} was attached or unmarked meanwhile, and is left alone")


def _still_detached(member: Member, cursor: Any) -> None:
    is_partition, marker = _look(member, cursor, "to be dropped")
    if is_partition or marker != member.marker:
        raise DDLError(f"{member.table} was attached or marked anew meanwhile, and is not dropped")
