"""Partition bounds: PostgreSQL's text to values and back (pure).

Inside, a bound is an aware UTC datetime, `MINVALUE` or `MAXVALUE`, whatever the key's type: of a
date key it is midnight UTC of that calendar date, of a UUID key the time in its first 48 bits.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from enum import Enum
from typing import Final
from zoneinfo import ZoneInfo

from psycopg import sql

from django_scaledb.partitions.config import KeyKind
from django_scaledb.partitions.intervals import Interval, Unit
from django_scaledb.partitions.uuid7 import uuid7_floor


class Unbounded(Enum):
    """The two ends of a key's values, below and above every datetime."""

    MINVALUE = "MINVALUE"
    MAXVALUE = "MAXVALUE"

    def __lt__(self, other: object) -> bool:
        return self is Unbounded.MINVALUE and other is not self

    def __gt__(self, other: object) -> bool:
        return self is Unbounded.MAXVALUE and other is not self

    def __le__(self, other: object) -> bool:
        return not self > other

    def __ge__(self, other: object) -> bool:
        return not self < other

    def __str__(self) -> str:
        return self.value


MINVALUE: Final = Unbounded.MINVALUE
MAXVALUE: Final = Unbounded.MAXVALUE

Bound = datetime | Unbounded

# The ends of what a datetime can say. Bounds beyond them have no exact value here.
_FIRST = datetime.min.replace(tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Range:
    """The half-open range ``[lower, upper)`` of a partition; datetimes are kept in UTC.

    Raises `ValueError` for a range that is empty or inverted, and for naive datetimes.
    """

    lower: Bound
    upper: Bound

    def __post_init__(self) -> None:
        object.__setattr__(self, "lower", _in_utc(self.lower))
        object.__setattr__(self, "upper", _in_utc(self.upper))
        if not self.lower < self.upper:
            raise ValueError(f"a range must end after it begins: {self}")

    def __str__(self) -> str:
        return f"{show(self.lower)}..{show(self.upper)}"

    def overlaps(self, other: Range) -> bool:
        """Whether the two share a moment; ranges that only touch do not."""
        return self.lower < other.upper and other.lower < self.upper

    def contains(self, moment: datetime) -> bool:
        return self.lower <= moment < self.upper

    def covers(self, other: Range) -> bool:
        """Whether all of `other` lies inside."""
        return self.lower <= other.lower and other.upper <= self.upper

    def intersection(self, other: Range) -> Range | None:
        if not self.overlaps(other):
            return None
        return Range(_later(self.lower, other.lower), _earlier(self.upper, other.upper))

    def subtract(self, others: Iterable[Range]) -> list[Range]:
        """What `others` leave free of the range, in order."""
        free = []
        lower = self.lower
        for other in merge(others):
            if lower < other.lower and lower < self.upper:
                free.append(Range(lower, _earlier(other.lower, self.upper)))
            lower = _later(lower, other.upper)
        if lower < self.upper:
            free.append(Range(lower, self.upper))
        return free

    def for_values(self, kind: KeyKind) -> sql.Composed:
        """``FOR VALUES FROM (..) TO (..)``, for ATTACH PARTITION."""
        return sql.SQL("FOR VALUES FROM ({}) TO ({})").format(
            literal(self.lower, kind), literal(self.upper, kind)
        )

    def check(self, column: str, kind: KeyKind) -> sql.Composed:
        """The CHECK expression that proves the range.

        It is written the way PostgreSQL states a partition's constraint (key IS NOT NULL and
        within the bounds, compared with the key's own type), so that ATTACH PARTITION takes it as
        proof and does not scan the table.
        """
        name = sql.Identifier(column)
        parts = [sql.SQL("{} IS NOT NULL").format(name)]
        for operator, bound in ((_AT_LEAST, self.lower), (_BELOW, self.upper)):
            if not isinstance(bound, Unbounded):
                parts.append(operator.format(name, literal(bound, kind), _TYPES[kind]))
        return sql.SQL(" AND ").join(parts)


_AT_LEAST = sql.SQL("{} >= {}::{}")
_BELOW = sql.SQL("{} < {}::{}")
_TYPES = {
    KeyKind.TIMESTAMP: sql.SQL("timestamptz"),
    KeyKind.DATE: sql.SQL("date"),
    KeyKind.UUID7: sql.SQL("uuid"),
}


def sort_key(bound: Bound) -> tuple[int, datetime]:
    """For `sorted()` and `max()`, which cannot be told by type that sentinels and datetimes compare."""
    if isinstance(bound, Unbounded):
        return (0, _FIRST) if bound is MINVALUE else (2, _LAST)
    return (1, bound)


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same cover in as few ranges as possible, in order: what overlaps or touches becomes one."""
    merged: list[Range] = []
    for item in sorted(ranges, key=lambda r: sort_key(r.lower)):
        if merged and item.lower <= merged[-1].upper:
            merged[-1] = Range(merged[-1].lower, _later(merged[-1].upper, item.upper))
        else:
            merged.append(item)
    return merged


def literal(bound: Bound, kind: KeyKind) -> sql.Composable:
    """`bound` as FROM and TO take it: a quoted text, MINVALUE or MAXVALUE.

    Raises `PlanError` for a UUID key before 1970, and `ValueError` for a moment that the key's
    type cannot say exactly (a date key knows whole days, a UUID key whole milliseconds).
    """
    if isinstance(bound, Unbounded):
        return sql.SQL("MINVALUE") if bound is MINVALUE else sql.SQL("MAXVALUE")
    moment = bound.astimezone(UTC)
    if kind is KeyKind.TIMESTAMP:
        return sql.Literal(f"{moment.replace(tzinfo=None).isoformat(' ')}+00")
    if kind is KeyKind.DATE:
        if moment.time() != time():
            raise ValueError(f"{show(bound)} is not midnight UTC, and a date key knows whole days only")
        return sql.Literal(moment.date().isoformat())
    if moment.microsecond % 1000:
        raise ValueError(f"{show(bound)} is not a whole millisecond, which is as fine as UUID bounds are")
    return sql.Literal(str(uuid7_floor(moment)))


_VALUE = r"'(?:[^']|'')*'|MINVALUE|MAXVALUE"
_RANGE_BOUND = re.compile(rf"\s*FOR VALUES FROM \(({_VALUE})\) TO \(({_VALUE})\)\s*")
_MOMENT = re.compile(
    r"(?P<year>\d{4,})-(?P<month>\d\d)-(?P<day>\d\d)"
    r"(?: (?P<time>\d\d:\d\d:\d\d(?:\.\d{1,6})?)(?P<offset>[+-]\d\d(?::\d\d){0,2}))?"
    r"(?P<bc> BC)?",
    re.ASCII,
)


def parse(expr: str, kind: KeyKind) -> Range | None:
    """The range that ``pg_get_expr(relpartbound, ..)`` states; None for DEFAULT.

    `expr` is what PostgreSQL prints with DateStyle ISO (TimeZone UTC is not needed, offsets are
    read). Bounds outside the years 1 to 9999 (infinity, BC, the year 12000) become the end on
    their side; UUID bounds inside a millisecond are rounded outward, so that what is covered is
    never taken for free. Raises `ValueError` for anything else: list and hash partitions, several
    columns, keys of another type.
    """
    if expr.strip() == "DEFAULT":
        return None
    match = _RANGE_BOUND.fullmatch(expr)
    if match is None:
        raise ValueError(f"not a range partition by one {kind.value} column: {expr}")
    try:
        lower = _parse_value(match[1], kind, is_upper=False)
        upper = _parse_value(match[2], kind, is_upper=True)
    except ValueError as error:
        raise ValueError(f"not a range partition by one {kind.value} column: {expr} ({error})") from error
    # A range that lies wholly beyond the datetimes still needs a place at that end.
    if lower is MAXVALUE:
        lower = _LAST
    if upper is MINVALUE:
        upper = _FIRST
    return Range(lower, upper)


def show(bound: Bound) -> str:
    """`bound` for people: ``2024-01-01``, ``2024-01-01 10:30:00+00``, ``MAXVALUE``."""
    if isinstance(bound, Unbounded):
        return bound.value
    moment = bound.astimezone(UTC).replace(tzinfo=None)
    return moment.date().isoformat() if moment.time() == time() else f"{moment.isoformat(' ')}+00"


def label(lower: Bound, interval: Interval, zone: ZoneInfo) -> str:
    """A name's suffix for the partition that begins at `lower`: ``y2024``, ``y2024m05d07``, ``start``.

    `zone` is the one in which the periods are counted (`PartitionConfig.period_zone`). A period
    gets the digits of its unit; a fragment that begins inside one gets as many as tell it apart.
    Labels are for people: two partitions with the same beginning, one of them detached, have the
    same label, and the caller must see to a free name.
    """
    if isinstance(lower, Unbounded):
        return "start" if lower is MINVALUE else "end"
    try:
        local = lower.astimezone(zone)
    except OverflowError:
        local = lower
    day = f"y{local.year:04}m{local.month:02}d{local.day:02}"
    clock = f"{day}h{local.hour:02}"
    if local.minute or local.second or local.microsecond:
        clock += f"{local.minute:02}"
    if local.second or local.microsecond:
        clock += f"{local.second:02}"
    if local.microsecond:
        clock += f"_{local.microsecond:06}"
    if local.fold:
        clock += "b"  # the hour that comes twice when clocks are put back
    by_unit = {
        Unit.YEAR: f"y{local.year:04}",
        Unit.QUARTER: f"y{local.year:04}q{(local.month + 2) // 3}",
        Unit.MONTH: f"y{local.year:04}m{local.month:02}",
        Unit.WEEK: "y{:04}w{:02}".format(*local.isocalendar()[:2]),
        Unit.DAY: day,
        Unit.HOUR: clock,
    }
    for candidate in (interval, *_FRAGMENT_STEPS):
        if candidate.start_of(lower, zone) == lower:
            return by_unit[candidate.unit]
    return clock


_FRAGMENT_STEPS = (Interval(1, Unit.YEAR), Interval(1, Unit.MONTH), Interval(1, Unit.DAY))


def _parse_value(text: str, kind: KeyKind, *, is_upper: bool) -> Bound:
    if text in ("MINVALUE", "MAXVALUE"):
        return Unbounded(text)
    value = text[1:-1].replace("''", "'")
    if kind is KeyKind.UUID7:
        return _uuid_time(uuid.UUID(value), is_upper=is_upper)
    if value in ("infinity", "-infinity"):
        return MAXVALUE if value == "infinity" else MINVALUE
    match = _MOMENT.fullmatch(value)
    if match is None or (match["time"] is None) is not (kind is KeyKind.DATE):
        raise ValueError(f"{value!r} is not a {kind.value}")
    if match["bc"]:
        return MINVALUE
    if len(match["year"]) > 4:
        return MAXVALUE
    date = f"{match['year']}-{match['month']}-{match['day']}"
    if kind is KeyKind.DATE:
        return datetime.fromisoformat(date).replace(tzinfo=UTC)
    try:
        return datetime.fromisoformat(f"{date} {match['time']}{match['offset']}").astimezone(UTC)
    except OverflowError:
        return MINVALUE if match["year"] == "0001" else MAXVALUE


def _uuid_time(value: uuid.UUID, *, is_upper: bool) -> Bound:
    milliseconds, rest = divmod(value.int, 1 << 80)
    if is_upper and rest:
        milliseconds += 1
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return MAXVALUE


def _in_utc(bound: Bound) -> Bound:
    if isinstance(bound, Unbounded):
        return bound
    if bound.tzinfo is None:
        raise ValueError(f"{bound.isoformat(' ')} has no time zone; bounds must be aware")
    return bound.astimezone(UTC)


def _later(a: Bound, b: Bound) -> Bound:
    return b if a < b else a


def _earlier(a: Bound, b: Bound) -> Bound:
    return a if a < b else b
