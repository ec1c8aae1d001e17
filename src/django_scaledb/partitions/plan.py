"""From what is there and what should be there to what is to be done (pure).

`plan()` never reads a clock, a setting or a database: the moment is an argument, the partition
set is the catalog's, the wishes are the model's. Partitions are known by their bounds; a name is
a label for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import Bound, Range, Unbounded, merge, show, sort_key
from django_scaledb.partitions.config import KeyKind, PartitionConfig, RetentionAction
from django_scaledb.postgres.identifiers import TableName

MAX_CREATES = 5000
"""More partitions than this in one plan mean a mistake: each one costs every query's planning."""


_UUID_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class State(Enum):
    """Where a partition stands in its life; the value is what the commands print."""

    ATTACHED = "attached"
    DETACH_PENDING = "detach pending"
    """An interrupted DETACH CONCURRENTLY: rows are out of the parent, the range refuses inserts."""
    DETACHED = "detached"
    """An ordinary table again, kept for its grace period."""
    RESTORING = "restoring"
    """On its way back, by a restore that is under way or was interrupted. Never planned for."""
    ARCHIVED = "archived"
    """In the archive alone. Never planned for."""


@dataclass(frozen=True)
class Partition:
    """One partition as the catalog has it.

    `range` is None for the default partition. `managed` says that django_scaledb (or
    django-postgres-extra) made it: only those are ever retired. `retiring` says that a rotation
    had begun to take it off the set. `detached_at` is set once the rotation has finished that,
    `archived_at` once a verified copy of it lies in the archive. `held_since` says that it was
    restored, and that retention leaves it alone until it is released.
    """

    table: TableName
    range: Range | None
    state: State
    managed: bool
    retiring: bool = False
    detached_at: datetime | None = None
    archived_at: datetime | None = None
    held_since: datetime | None = None

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
    """Take a partition that is past retention off the set; its table and rows stay.

    Whoever applies it marks the partition as retiring before, and settles it after.
    """

    partition: Partition


@dataclass(frozen=True)
class Settle:
    """Write down that a partition has left the set, and when: its grace period begins."""

    partition: Partition


@dataclass(frozen=True)
class Archive:
    """Write a partition that has left the set to the archive, and verify what was written."""

    partition: Partition


@dataclass(frozen=True)
class Drop:
    """Drop a detached partition whose grace period is over."""

    partition: Partition


Action = Create | CreateDefault | Finalize | Detach | Settle | Archive | Drop


@dataclass(frozen=True)
class Plan:
    """The actions for one model, in the order in which they are to run."""

    config: PartitionConfig
    actions: tuple[Action, ...]

    def __bool__(self) -> bool:
        return bool(self.actions)


@dataclass(frozen=True)
class Shortfall:
    """What a partition set lacks; each range is as long as the hole is.

    `gaps` lie before the end of the newest attached partition, `runway` at or behind it (the
    current period included, when even that is missing).
    """

    gaps: tuple[Range, ...]
    runway: tuple[Range, ...]

    def __bool__(self) -> bool:
        return bool(self.gaps or self.runway)


def plan(
    config: PartitionConfig,
    partitions: Sequence[Partition],
    now: datetime,
    *,
    create: bool = True,
    retire: bool = True,
) -> Plan:
    """The actions that bring `partitions` to what `config` says at `now` (aware).

    `create` makes the current period and `premake` more, and fills holes inside the set and
    between its newest partition and now, except what ends before retention begins. `retire`
    applies retention. Either finishes an interrupted detach. Creations come before retirements,
    and a plan that was applied leaves an empty one.

    Raises `PlanError` when more than `MAX_CREATES` partitions are missing, or when one would have
    to lie outside the years 1 to 9999 (of a UUID key, before 1970).
    """
    holes = _holes(config, partitions, now) if create else []
    creates = _creates(config, holes)
    early, late = _around_pending(creates, partitions)
    actions: list[Action] = [*early]
    if create and config.default_partition and not any(p.is_default for p in _attached(partitions)):
        actions.append(CreateDefault())
    if create or retire:
        actions += _finish_detaches(p for p in partitions if p.state is State.DETACH_PENDING)
        actions += late
        actions += [
            Settle(p)
            for p in partitions
            if p.state is State.DETACHED and p.retiring and p.detached_at is None
        ]
    if retire and config.retention is not None:
        cutoff = config.retention.subtract(config.on_key_axis(now), config.period_zone)
        settled = [action.partition for action in actions if isinstance(action, Settle)]
        leaving = _past_retention(partitions, creates, cutoff)
        actions += [Detach(p) for p in leaving]
        if config.retention_action is RetentionAction.ARCHIVE:
            off = [p for p in partitions if p.state is State.DETACHED and p.detached_at is not None]
            actions += [Archive(p) for p in (*off, *settled, *leaving) if _is_archivable(p, cutoff)]
        if config.retention_action is not RetentionAction.DETACH:
            actions += [Drop(p) for p in partitions if _is_droppable(config, p, cutoff, now)]
    return Plan(config, tuple(actions))


def plan_span(
    config: PartitionConfig, partitions: Sequence[Partition], start: datetime, end: datetime
) -> Plan:
    """The actions that give each period touching ``[start, end)`` its partition.

    `start` and `end` are aware; for a date key their UTC dates count. When both are the same
    moment, its period is made. Retention does not matter, nothing outside those periods is made,
    and an interrupted detach is finished only where it stands in the way.

    Raises `PlanError` when `start` is after `end`, and as `plan()` does.
    """
    if start > end:
        raise PlanError(f"{config.label}: the span begins at {show(start)}, after its end at {show(end)}")
    zone = config.period_zone
    lower = config.interval.start_of(start, zone)
    upper = config.interval.next(lower, zone)
    if end > upper:
        upper = config.interval.start_of(end, zone)
        if upper < end:
            upper = config.interval.next(upper, zone)
    holes = Range(lower, upper).subtract(_coverage(partitions))
    creates = _creates(config, holes)
    early, late = _around_pending(creates, partitions)
    in_the_way = [
        p
        for p in partitions
        if p.state is State.DETACH_PENDING and any(_touches(p, create.range) for create in late)
    ]
    return Plan(config, (*early, *_finish_detaches(in_the_way), *late))


def missing(config: PartitionConfig, partitions: Sequence[Partition], now: datetime) -> Shortfall:
    """Where `plan()` would create partitions at `now` (aware), as whole holes.

    Raises `PlanError` when a period that is wanted lies outside the years 1 to 9999.
    """
    holes = _holes(config, partitions, now)
    coverage = _coverage(partitions)
    gaps = tuple(hole for hole in holes if coverage and hole.lower < coverage[-1].upper)
    return Shortfall(gaps, tuple(hole for hole in holes if hole not in gaps))


def grace_ends(config: PartitionConfig, partition: Partition) -> datetime | None:
    """Until when (aware) a table that left its set is kept at least; None as long as it is kept anyway.

    What goes into the archive stays for as long beside its copy. Raises `PlanError` for a moment
    beyond the calendar.
    """
    begins = partition.detached_at
    if begins is not None and config.retention_action is RetentionAction.ARCHIVE:
        begins = None if partition.archived_at is None else max(begins, partition.archived_at)
    if begins is None or config.retention_action is RetentionAction.DETACH:
        return None
    return config.detached_for.add(begins, config.zone)


def runway(config: PartitionConfig, partitions: Sequence[Partition], now: datetime) -> tuple[int, Bound]:
    """How far inserts are safe: whole future periods without a hole from `now` on, and their end.

    The end is `now` itself (as it stands among the bounds) when not even that has a partition.
    Up to a MAXVALUE partition the count is `premake`.
    """
    zone = config.period_zone
    moment = config.on_key_axis(now)
    end: Bound = next((cover.upper for cover in _coverage(partitions) if cover.contains(moment)), moment)
    if isinstance(end, Unbounded):
        return config.premake, end
    start = config.interval.start_of(moment, zone)
    count = -1  # the current period is no future one
    try:
        while count < MAX_CREATES and (start := config.interval.next(start, zone)) <= end:
            count += 1
    except PlanError:
        pass  # the calendar ends before the coverage does
    return max(count, 0), end


def _attached(partitions: Iterable[Partition]) -> list[Partition]:
    return [p for p in partitions if p.state is State.ATTACHED]


def _coverage(partitions: Iterable[Partition]) -> list[Range]:
    """What attached partitions take, in order; whoever made them, by whichever interval."""
    return merge(p.range for p in _attached(partitions) if p.range is not None)


def _holes(config: PartitionConfig, partitions: Sequence[Partition], now: datetime) -> list[Range]:
    """What the set lacks at `now`, in order; each hole may span many periods."""
    zone, interval = config.period_zone, config.interval
    moment = config.on_key_axis(now)
    current = interval.start_of(moment, zone)
    horizon = interval.next(current, zone)
    for _ in range(config.premake):
        horizon = interval.next(horizon, zone)
    coverage = _coverage(partitions)
    first: Bound = current
    if coverage and coverage[0].lower < current:
        first = coverage[0].lower
    holes = Range(first, horizon).subtract(coverage)
    if config.retention is not None:
        cutoff = config.retention.subtract(moment, zone)
        keep_from = interval.start_of(cutoff, zone)
        # Inside the period that contains the cutoff, a fragment may still end before it: made now,
        # the next run would retire it, and the one after that make it again.
        holes = [
            Range(max(_moment(hole.lower), keep_from), hole.upper) for hole in holes if cutoff < hole.upper
        ]
    return merge([*holes, *_distant_holes(config, coverage, horizon)])


def _distant_holes(config: PartitionConfig, coverage: Sequence[Range], horizon: datetime) -> list[Range]:
    """The holes between the premade periods and partitions farther in the future.

    When these need more partitions than a plan may hold, or reach the calendar's end, what lies
    behind them is a catch-all (for "forever" dates such as 9999-12-31) rather than the end of the
    set: they are left open, or nothing could be made for such a set at all.
    """
    if not coverage or coverage[-1].upper <= horizon:
        return []
    holes = Range(horizon, coverage[-1].upper).subtract(coverage)
    if _estimate(config, holes) > MAX_CREATES:
        return []
    try:
        for hole in holes[-1:]:
            config.interval.next(_moment(hole.upper) - datetime.resolution, config.period_zone)
    except PlanError:
        return []
    return holes


def _creates(config: PartitionConfig, holes: Sequence[Range]) -> list[Create]:
    """One Create for each part of a period that a hole leaves free."""
    count = _estimate(config, holes)
    if count > MAX_CREATES:
        raise PlanError(
            f"{config.label}: {count} partitions of {config.interval} are missing between "
            f"{show(holes[0].lower)} and {show(holes[-1].upper)}, and one plan makes {MAX_CREATES} at most; "
            "choose a larger PartitioningMeta.interval, or make them in several spans: "
            f"manage.py create_partitions {config.label} --from DATE --to DATE"
        )
    if holes and config.key_kind is KeyKind.UUID7 and holes[0].lower < _UUID_EPOCH:
        raise PlanError(
            f"{config.label}: a partition from {show(holes[0].lower)} on would begin before 1970, where "
            "version 7 UUIDs begin; no row of it can lie there"
        )
    return [
        Create(fragment)
        for hole in holes
        for period in config.interval.periods(_moment(hole.lower), _moment(hole.upper), config.period_zone)
        if (fragment := Range(*period).intersection(hole)) is not None
    ]


def _estimate(config: PartitionConfig, holes: Iterable[Range]) -> int:
    return sum(
        config.interval.estimate(_moment(hole.lower), _moment(hole.upper), config.period_zone)
        for hole in holes
    )


def _around_pending(
    creates: Iterable[Create], partitions: Iterable[Partition]
) -> tuple[list[Create], list[Create]]:
    """The Creates that can be done at once, and those that an interrupted detach is in the way of."""
    pending = [p for p in partitions if p.state is State.DETACH_PENDING]
    early: list[Create] = []
    late: list[Create] = []
    for create in creates:
        (late if any(_touches(p, create.range) for p in pending) else early).append(create)
    return early, late


def _touches(partition: Partition, wanted: Range) -> bool:
    return partition.range is not None and partition.range.overlaps(wanted)


def _finish_detaches(pending: Iterable[Partition]) -> list[Action]:
    """Finish each one; settle those that a rotation had begun (somebody else's are not ours to mark)."""
    actions: list[Action] = []
    for partition in pending:
        actions.append(Finalize(partition))
        if partition.retiring:
            actions.append(Settle(partition))
    return actions


def _past_retention(
    partitions: Iterable[Partition], creates: Iterable[Create], cutoff: datetime
) -> list[Partition]:
    """The attached partitions to retire, oldest first."""
    ranges = [(p.range, p) for p in _attached(partitions) if p.range is not None]
    if not ranges:
        return []
    # The partition that reaches farthest stays, whatever its age: a set is never left empty. By
    # the time of the detaches the set has what this plan creates.
    newest = max(ranges, key=lambda item: (sort_key(item[0].upper), sort_key(item[0].lower), item[1].table))
    spare = None if any(create.range.upper > newest[0].upper for create in creates) else newest[1]
    old = [
        (r, p)
        for r, p in ranges
        if p.managed and p.held_since is None and p is not spare and r.upper <= cutoff
    ]
    return [p for _, p in sorted(old, key=lambda item: (sort_key(item[0].lower), item[1].table))]


def _is_archivable(partition: Partition, cutoff: datetime) -> bool:
    """Whether a partition that is off the set, or will be by then, lacks a copy in the archive."""
    return (
        partition.managed
        and partition.archived_at is None
        and partition.held_since is None
        and partition.range is not None
        and partition.range.upper <= cutoff
    )


def _is_droppable(config: PartitionConfig, partition: Partition, cutoff: datetime, now: datetime) -> bool:
    """Whether its grace period is over; retention that was lengthened since takes it back."""
    ends = grace_ends(config, partition)
    return (
        partition.state is State.DETACHED
        and partition.managed
        and ends is not None
        and ends <= now
        and partition.held_since is None
        and partition.range is not None
        and partition.range.upper <= cutoff
    )


def _moment(bound: Bound) -> datetime:
    if isinstance(bound, Unbounded):
        raise TypeError("a hole ends at a period or a partition; an open end is always covered")
    return bound
