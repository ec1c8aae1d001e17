"""A partition set as a drawing: width is time, height is bytes (pure).

Horizontal places are per cent of the drawing's width, so that it fits whatever column it is put into;
vertical ones are pixels, counted from the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import Bound, Range, Unbounded, sort_key
from django_scaledb.partitions.config import PartitionConfig, RetentionAction
from django_scaledb.partitions.plan import Partition, State, grace_ends, missing
from django_scaledb.postgres.identifiers import TableName

TOP = 18.0
"""Pixels above the bars, for the words at the vertical lines."""
HEIGHT = 120.0
"""Pixels of the greatest table."""
LANE = 12.0
"""Pixels of a strip that shows the states, below the bars: a table without bytes has a place there."""
AXIS = 20.0
"""Pixels for the dates below."""
DRAWN = 400
"""As many tables are drawn, the newest ones; more of them could not be told apart."""

_TICKS = 8
_BESIDE = 7.0  # per cent for each table that has no place in time
_BESIDE_AT_MOST = 3
_STUB = 0.05  # of the span, for what has no end
_OUT_OF_SCALE = 4.0  # so many times the rest: an end as good as open


class Look(Enum):
    """What is drawn in one colour and pattern; the value is the word for it."""

    ATTACHED = "attached"
    PREMADE = "premade"
    HAND_MADE = "hand-made"
    PENDING = "detach pending"
    DEFAULT = "default"
    DETACHED = "detached"
    RESTORING = "restoring"
    ARCHIVED = "archived"
    GAP = "gap"

    @property
    def slug(self) -> str:
        return self.value.replace(" ", "-")


_OFF = (Look.DETACHED, Look.RESTORING, Look.ARCHIVED)
_BY_STATE = {State(look.value): look for look in (Look.PENDING, *_OFF)}


@dataclass(frozen=True)
class Table:
    """One table of the set as it was found; `bytes` and `rows` are None where they are not known."""

    partition: Partition
    rows: int | None
    bytes: int | None


@dataclass(frozen=True)
class Piece:
    """One table of a set, or one hole in it. `range` is None for what has no place in time."""

    table: TableName | None
    range: Range | None
    look: Look
    rows: int | None = None
    bytes: int | None = None
    note: str = ""
    """When it was detached and when it will be dropped, or what else there is to know."""


@dataclass(frozen=True)
class Bar:
    """A piece in its place. `strip` is the vertical place of its state; `is_cut`: wider than drawn."""

    piece: Piece
    left: float
    width: float
    height: float
    strip: float
    is_cut: bool = False

    @property
    def top(self) -> float:
        return TOP + HEIGHT - self.height


@dataclass(frozen=True)
class Tick:
    """A vertical line: per cent, and its words."""

    left: float
    label: str


@dataclass(frozen=True)
class Level:
    """A horizontal line: pixels, and the bytes it stands for."""

    top: float
    bytes: int


@dataclass(frozen=True)
class Drawing:
    """All that is to be drawn; `omitted` older tables are not."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    levels: tuple[Level, ...]
    now: Tick | None
    cutoff: Tick | None
    height: float
    omitted: int

    @property
    def looks(self) -> list[Look]:
        """Those that occur, for the legend."""
        there = {bar.piece.look for bar in self.bars}
        return [look for look in Look if look in there]


# -- what there is to draw


def pieces(config: PartitionConfig, tables: Sequence[Table], now: datetime) -> list[Piece]:
    """The tables of a set, each with its look, and the holes in it at `now` (aware).

    Raises `PlanError` when a wanted period lies outside the years 1 to 9999.
    """
    moment = config.on_key_axis(now)
    found = [
        Piece(
            table.partition.table,
            table.partition.range,
            look_of(table.partition, moment),
            table.rows,
            table.bytes,
            note_of(config, table.partition, now),
        )
        for table in tables
    ]
    shortfall = missing(config, [table.partition for table in tables], now)
    found += [
        Piece(None, hole, Look.GAP, note="no partition takes its rows")
        for hole in (*shortfall.gaps, *shortfall.runway)
    ]
    return sorted(found, key=_by_time)


def look_of(partition: Partition, moment: datetime) -> Look:
    """The look of a table at `moment` (on the key's axis)."""
    if partition.state is not State.ATTACHED:
        return _BY_STATE[partition.state]
    if partition.range is None:
        return Look.DEFAULT
    if not partition.managed:
        return Look.HAND_MADE
    return Look.PREMADE if partition.range.lower > moment else Look.ATTACHED


def note_of(config: PartitionConfig, partition: Partition, now: datetime) -> str:
    """Since when a table is off the set, and what will become of it."""
    if partition.state is State.DETACH_PENDING:
        return "the detach was interrupted; the next rotation finishes it"
    if partition.state is State.RESTORING:
        return "restoring, or the restore was interrupted"
    if partition.state is State.ARCHIVED:
        return f"archived {_day(partition.archived_at)}" if partition.archived_at else ""
    if partition.state is State.ATTACHED:
        held = partition.held_since
        return f"restored {_day(held)}; retention leaves it alone" if held else ""
    if not partition.managed:
        return "detached by hand, never dropped"
    if partition.detached_at is None:
        return "detached, not settled; the next rotation goes on"
    since = f"detached {_day(partition.detached_at)}"
    if partition.archived_at is not None:
        since += f", archived {_day(partition.archived_at)}"
    drop = dropped_at(config, partition)
    if drop is None:
        if config.retention_action is RetentionAction.ARCHIVE and partition.archived_at is None:
            return f"{since}, not archived yet"
        return f"{since}, kept until somebody drops it"
    if drop <= now:
        return f"{since}, dropped by the next rotation"
    return f"{since}, will be dropped after {_day(drop)}"


def dropped_at(config: PartitionConfig, partition: Partition) -> datetime | None:
    """From when on a rotation drops a detached table; None where none will."""
    if (
        config.retention is None
        or partition.state is not State.DETACHED
        or not partition.managed
        or partition.held_since is not None
        or partition.range is None
        or isinstance(partition.range.upper, Unbounded)
    ):
        return None
    try:
        ends = grace_ends(config, partition)
        # Retention that was lengthened since takes the table back until it is past it again.
        return ends and max(ends, config.retention.add(partition.range.upper, config.period_zone))
    except PlanError:  # beyond the calendar
        return None


def _by_time(piece: Piece) -> tuple[object, ...]:
    if piece.range is None:
        return (1, (), str(piece.table))
    return (0, sort_key(piece.range.lower), piece.look in _OFF, str(piece.table or ""))


# -- where it goes


def draw(found: Sequence[Piece], *, now: datetime | None = None, cutoff: datetime | None = None) -> Drawing:
    """`found` in its places; `now` and `cutoff` (where retention begins) on the key's axis."""
    timed = [(piece.range, piece) for piece in found if piece.range is not None]
    beside = [piece for piece in found if piece.range is None]
    omitted = max(0, len(timed) - DRAWN) + max(0, len(beside) - _BESIDE_AT_MOST)
    timed, beside = timed[-DRAWN:], beside[:_BESIDE_AT_MOST]
    axis = _Axis([bounds for bounds, _ in timed], now, 100.0 - _BESIDE * len(beside))
    shown = [piece for _, piece in timed] + beside
    peak = max((piece.bytes or 0 for piece in shown), default=0)
    strips = 2 if any(piece.look in _OFF for piece in shown) else 1

    def bar(piece: Piece, left: float, width: float, *, is_cut: bool = False) -> Bar:
        height = HEIGHT * (piece.bytes or 0) / peak if peak else 0.0
        strip = TOP + HEIGHT + 3 + (LANE + 2 if piece.look in _OFF else 0)
        return Bar(piece, left, width, height, strip, is_cut)

    bars = [
        bar(
            piece,
            axis.at(bounds.lower),
            axis.at(bounds.upper) - axis.at(bounds.lower),
            is_cut=axis.cuts(bounds),
        )
        for bounds, piece in timed
    ]
    bars += [
        bar(piece, axis.width + _BESIDE * place + 1.5, _BESIDE - 1.5) for place, piece in enumerate(beside)
    ]
    return Drawing(
        tuple(bars),
        tuple(axis.ticks()),
        tuple(_levels(peak)),
        axis.line(now, "now"),
        axis.line(cutoff, "kept from here"),
        TOP + HEIGHT + 3 + strips * (LANE + 2) + AXIS,
        omitted,
    )


class _Axis:
    """Time from left to right, in per cent; `width` is what it may take."""

    def __init__(self, ranges: Sequence[Range], now: datetime | None, width: float) -> None:
        self.width = width
        ends = _closed_ends(ranges)
        if not ends and now is not None:  # nothing but open ends
            ends = [now - timedelta(days=1), now + timedelta(days=1)]
        self.first: datetime | None = min(ends, default=None)
        self.last: datetime | None = max(ends, default=None)
        if self.first is None or self.last is None:
            return
        stub = (self.last - self.first) * _STUB or timedelta(days=1)
        self.start, self.end = self.first, self.last
        if any(bounds.lower < self.first for bounds in ranges):
            self.start = _earlier(self.first, stub)
        if any(bounds.upper > self.last for bounds in ranges):
            self.end = _later(self.last, stub)

    def at(self, bound: Bound) -> float:
        if self.first is None:
            return 0.0
        if isinstance(bound, Unbounded):
            return 0.0 if bound is Unbounded.MINVALUE else self.width
        share = (bound - self.start) / (self.end - self.start)
        return min(max(share, 0.0), 1.0) * self.width

    def cuts(self, bounds: Range) -> bool:
        """Whether `bounds` reach farther than what is drawn of them."""
        return self.first is not None and (bounds.lower < self.start or bounds.upper > self.end)

    def line(self, moment: datetime | None, label: str) -> Tick | None:
        if moment is None or self.first is None or not self.start <= moment <= self.end:
            return None
        return Tick(self.at(moment), label)

    def ticks(self) -> Iterable[Tick]:
        if self.first is None or self.last is None:
            return
        for moment, label in calendar(self.first, self.last):
            # The words stand to the right of the line.
            if (left := self.at(moment)) < self.width - 6:
                yield Tick(left, label)


def _closed_ends(ranges: Sequence[Range]) -> list[datetime]:
    """The moments that decide what is drawn, in order.

    Not an outermost one that is many times as far off as all others are from each other (a first
    partition "since 1970", a last one "to 9999"): next to it the rest would be a line.
    """
    bounds = {bound for each in ranges for bound in (each.lower, each.upper)}
    ends = sorted(bound for bound in bounds if not isinstance(bound, Unbounded))
    for _ in range(2):  # without one of them the other may be far off as well
        if len(ends) > 2 and ends[1] - ends[0] > _OUT_OF_SCALE * (ends[-1] - ends[1]):
            del ends[0]
        if len(ends) > 2 and ends[-1] - ends[-2] > _OUT_OF_SCALE * (ends[-2] - ends[0]):
            del ends[-1]
    return ends


def calendar(first: datetime, last: datetime, at_most: int = _TICKS) -> list[tuple[datetime, str]]:
    """Round moments of the calendar between two (UTC), with their labels; seldom more than `at_most`."""
    for step in _STEPS:
        if (last - first) / step.length <= at_most:
            break
    moments = []
    moment = step.floor(first.astimezone(UTC))
    while moment <= last:
        if moment >= first:
            moments.append((moment, step.label.format(moment)))
        try:
            moment = step.next(moment)
        except (OverflowError, ValueError):
            break
    return moments


@dataclass(frozen=True)
class _Step:
    length: timedelta
    floor: Callable[[datetime], datetime]
    next: Callable[[datetime], datetime]
    label: str


def _hours(count: int) -> _Step:
    length = timedelta(hours=count)
    return _Step(
        length,
        lambda at: at.replace(hour=at.hour // count * count, minute=0, second=0, microsecond=0),
        lambda at: at + length,
        "{:%m-%d %H:%M}",
    )


def _days(count: int) -> _Step:
    length = timedelta(days=count)
    epoch = datetime(2000, 1, 3, tzinfo=UTC)  # a Monday
    return _Step(
        length, lambda at: epoch + (at - epoch) // length * length, lambda at: at + length, "{:%Y-%m-%d}"
    )


def _months(count: int) -> _Step:
    def of(number: int) -> datetime:
        return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)

    def number(at: datetime) -> int:
        return at.year * 12 + at.month - 1

    return _Step(
        timedelta(days=30.4 * count),
        lambda at: of(max(12, number(at) // count * count)),
        lambda at: of(number(at) + count),
        "{:%Y}" if count % 12 == 0 else "{:%Y-%m}",
    )


_STEPS = (
    *map(_hours, (1, 3, 6, 12)),
    *map(_days, (1, 2, 7, 14)),
    *map(_months, (1, 2, 3, 6)),
    *(_months(12 * years) for years in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)),
)


def _levels(peak: int) -> list[Level]:
    """The greatest round number of bytes below `peak`, and half of it."""
    if peak < 2:
        return []
    unit = 1
    while peak >= unit * 1024:
        unit *= 1024
    most = max(number * unit for number in _ROUND if number * unit <= peak)
    return [Level(TOP + HEIGHT * (1 - value / peak), value) for value in (most, most // 2)]


_ROUND = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def _earlier(moment: datetime, by: timedelta) -> datetime:
    try:
        return moment - by
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _later(moment: datetime, by: timedelta) -> datetime:
    try:
        return moment + by
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d}"
