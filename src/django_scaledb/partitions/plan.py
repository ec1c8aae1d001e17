"""From what is there and what should be there to what is to be done (pure).

`plan()` never reads a clock, a setting or a database: the moment is an argument, the partition
set is the catalog's, the wishes are the model's. Partitions are known by their bounds; a name is
a label for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.postgres.identifiers import TableName


class State(Enum):
    """Where a partition stands in its life; the value is what the commands print."""

    ATTACHED = "attached"
    DETACH_PENDING = "detach pending"
    """An interrupted DETACH CONCURRENTLY: rows are out of the parent, the range refuses inserts."""
    DETACHED = "detached"
    """An ordinary table again, kept for its grace period."""


@dataclass(frozen=True)
class Partition:
    """One partition as the catalog has it.

    `range` is None for the default partition. `managed` says that django_scaledb (or
    django-postgres-extra) made it: only those are ever retired. `retiring` says that a rotation
    had begun to take it off the set. `detached_at` is set once the rotation has finished that.
    """

    table: TableName
    range: Range | None
    state: State
    managed: bool
    retiring: bool = False
    detached_at: datetime | None = None

    @property
    def is_default(self) -> bool:
        return self.range is None


@dataclass(frozen=True)
class Create:
    """Make and attach a partition for `range`."""

    range: Range


@dataclass(frozen=True)
class CreateDefault:
    """Make and attach the default partition that the model asks for."""


@dataclass(frozen=True)
class Finalize:
    """Finish an interrupted DETACH CONCURRENTLY."""

    partition: Partition


@dataclass(frozen=True)
class Detach:
    """Take a partition that is past retention off the set; its table and rows stay."""

    partition: Partition


@dataclass(frozen=True)
class Settle:
    """Write down that a partition has left the set, and when: its grace period begins."""

    partition: Partition


@dataclass(frozen=True)
class Drop:
    """Drop a detached partition whose grace period is over."""

    partition: Partition


Action = Create | CreateDefault | Finalize | Detach | Settle | Drop


@dataclass(frozen=True)
class Plan:
    """The actions for one model, in the order in which they are to run."""

    config: PartitionConfig
    actions: tuple[Action, ...]

    def __bool__(self) -> bool:
        return bool(self.actions)


def plan(
    config: PartitionConfig,
    partitions: Sequence[Partition],
    now: datetime,
    *,
    create: bool = True,
    retire: bool = True,
) -> Plan:
    """The actions that bring `partitions` to what `config` says at `now` (aware)."""
    raise NotImplementedError


def plan_span(
    config: PartitionConfig, partitions: Sequence[Partition], start: datetime, end: datetime
) -> Plan:
    """The actions that give each period touching ``[start, end]`` its partition."""
    raise NotImplementedError
