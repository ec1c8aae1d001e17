"""Calendar intervals and the anchored periods they cut time into (pure).

A period is a half-open span ``[start, end)`` of aware UTC datetimes. Where a period begins depends
on its interval and its zone alone, never on the moment of a run: multiples are counted from
2000-01-01 (weeks from Monday 2000-01-03).
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum
from zoneinfo import ZoneInfo

from django_scaledb.exceptions import ConfigurationError, PlanError

_ANCHOR = date(2000, 1, 1)
_FIRST_MONDAY = date(2000, 1, 3)


class Unit(Enum):
    """A calendar unit; the value is its singular."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    QUARTER = "quarter"
    YEAR = "year"


# A millennium of each. More is a typing mistake, and would leave the calendar (years 1 to 9999)
# as soon as it is added to a date.
_LARGEST = {
    Unit.HOUR: 8_766_000,
    Unit.DAY: 365_250,
    Unit.WEEK: 52_178,
    Unit.MONTH: 12_000,
    Unit.QUARTER: 4_000,
    Unit.YEAR: 1_000,
}
_MONTHS = {Unit.MONTH: 1, Unit.QUARTER: 3, Unit.YEAR: 12}
_DAYS = {Unit.DAY: 1, Unit.WEEK: 7}

_UNITS = {name: unit for unit in Unit for name in (unit.value, f"{unit.value}s")}
_TEXT = re.compile(r"\s*([+-]?[0-9][0-9.,_]*)?\s*(\w*)\s*", re.ASCII)
_ACCEPTED = (
    'write a whole number and a unit (hour, day, week, month, quarter, year), such as "1 year" or "3 months"'
)


@dataclass(frozen=True)
class Interval:
    """`count` calendar units, such as 3 months.

    Raises `ConfigurationError` for a count that is not a whole number from 1 to a millennium's worth.
    """

    count: int
    unit: Unit

    def __post_init__(self) -> None:
        _check_count(self.count, self.unit, f"{self.count!r} {self.unit.value}s")

    def __str__(self) -> str:
        return f"{self.count} {self.unit.value}{'' if self.count == 1 else 's'}"

    @classmethod
    def parse(cls, text: object) -> Interval:
        """The interval that `text` says: ``"1 year"``, ``"18 months"``, ``"6 hours"``.

        Case, plural and spaces do not matter. Raises `ConfigurationError`, naming the text, what
        is wrong with it and what is accepted.
        """
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{text!r} is not an interval: it is a {type(text).__name__}, not a text; {_ACCEPTED}"
            )
        match = _TEXT.fullmatch(text)
        number, word = match.groups() if match else (None, None)
        if number is None or not word:
            raise ConfigurationError(f"{text!r} is not an interval; {_ACCEPTED}")
        unit = _UNITS.get(word.lower())
        if unit is None:
            raise ConfigurationError(f"{text!r} is not an interval: there is no unit {word!r}; {_ACCEPTED}")
        if not re.fullmatch(r"[+-]?[0-9]+", number):
            raise ConfigurationError(
                f"{text!r} is not an interval: {number!r} is not a whole number; {_ACCEPTED}"
            )
        # Python refuses to convert thousands of digits; twenty are absurd already.
        count = int(number) if len(number) < 20 else 10**20
        _check_count(count, unit, repr(text))
        return cls(count, unit)

    def start_of(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """The start, in UTC, of the period that contains `moment` (aware).

        Raises `PlanError` when that lies outside the years 1 to 9999.
        """
        return self._boundary(self._index(moment, zone), zone)

    def next(self, start: datetime, zone: ZoneInfo) -> datetime:
        """The end of the period that contains `start`, which is the start of the one after it.

        Raises `PlanError` when that lies outside the years 1 to 9999.
        """
        return self._boundary(self._index(start, zone) + 1, zone)

    def periods(self, start: datetime, end: datetime, zone: ZoneInfo) -> Iterator[tuple[datetime, datetime]]:
        """Each whole period that shares a moment with ``[start, end)``, in order.

        The periods tile: each begins where the one before it ended, and none is empty.
        """
        if start >= end:
            return
        index = self._index(start, zone)
        lower = self._boundary(index, zone)
        while lower < end:
            index += 1
            upper = self._boundary(index, zone)
            # A zone that changed sides of the date line skipped a day: that day is no period.
            if lower < upper:
                yield lower, upper
            lower = upper

    def estimate(self, start: datetime, end: datetime, zone: ZoneInfo) -> int:
        """How many periods `periods()` would give, without making them.

        Days that a zone skipped are counted.
        """
        if start >= end:
            return 0
        return self._index(end - timedelta.resolution, zone) - self._index(start, zone) + 1

    def add(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """`moment` (aware) moved forward by the interval, in UTC; see `subtract`."""
        return self._move(moment, zone, 1)

    def subtract(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """`moment` (aware) moved back by the interval, in UTC.

        Exact by the calendar of `zone`: the wall clock's time is kept, and a day that the month
        does not have becomes its last (31 March - 1 month is 28 or 29 February). Hours are
        elapsed hours. Raises `PlanError` when that lies outside the years 1 to 9999.
        """
        return self._move(moment, zone, -1)

    def _move(self, moment: datetime, zone: ZoneInfo, sign: int) -> datetime:
        _check_aware(moment)
        count = sign * self.count
        try:
            if self.unit is Unit.HOUR:
                return moment.astimezone(UTC) + timedelta(hours=count)
            local = moment.astimezone(zone)
            if self.unit in _DAYS:
                day = local.date() + timedelta(days=count * _DAYS[self.unit])
            else:
                months = local.year * 12 + local.month - 1 + count * _MONTHS[self.unit]
                year, month = divmod(months, 12)
                day = date(year, month + 1, min(local.day, _length(year, month + 1)))
            return datetime.combine(day, local.time().replace(fold=0), tzinfo=zone).astimezone(UTC)
        except (OverflowError, ValueError) as error:
            direction = "after" if sign > 0 else "before"
            raise PlanError(
                f"{self} {direction} {moment.isoformat(' ')} is outside the years 1 to 9999, "
                "which is as far as dates reach here"
            ) from error

    def _index(self, moment: datetime, zone: ZoneInfo) -> int:
        """Which period, counted from the anchor, contains `moment`."""
        _check_aware(moment)
        if self.unit is Unit.HOUR:
            elapsed = moment.astimezone(UTC) - _midnight(_ANCHOR, zone)
            return elapsed // timedelta(hours=self.count)
        try:
            local = moment.astimezone(zone).date()
        except OverflowError as error:
            raise _outside(str(self), moment) from error
        if self.unit in _DAYS:
            anchor = _FIRST_MONDAY if self.unit is Unit.WEEK else _ANCHOR
            index = (local - anchor).days // (self.count * _DAYS[self.unit])
        else:
            months = (local.year - _ANCHOR.year) * 12 + local.month - 1
            index = months // (self.count * _MONTHS[self.unit])
        # A date is never shown before its midnight, but once more after the next one: where clocks
        # were put back over midnight. The calendar date is a first guess then.
        try:
            while self._boundary(index + 1, zone) <= moment:
                index += 1
        except PlanError:
            pass  # the calendar's last period has no representable end, but it does have a start
        return index

    def _boundary(self, index: int, zone: ZoneInfo) -> datetime:
        """Where period `index` begins, in UTC."""
        steps = index * self.count
        try:
            if self.unit is Unit.HOUR:
                return _midnight(_ANCHOR, zone) + timedelta(hours=steps)
            if self.unit is Unit.WEEK:
                return _midnight(_FIRST_MONDAY + timedelta(weeks=steps), zone)
            if self.unit is Unit.DAY:
                return _midnight(_ANCHOR + timedelta(days=steps), zone)
            years, month = divmod(steps * _MONTHS[self.unit], 12)
            return _midnight(date(_ANCHOR.year + years, month + 1, 1), zone)
        except (OverflowError, ValueError) as error:
            raise PlanError(
                f"a period of {self} would {'end' if index > 0 else 'start'} outside the years 1 to 9999, "
                "which is as far as dates reach here"
            ) from error


def _check_count(count: int, unit: Unit, text: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        reason = "the number is not a whole number"
    elif count < 1:
        reason = "the number must be 1 or more"
    elif count > _LARGEST[unit]:
        reason = f"at most {_LARGEST[unit]} {unit.value}s are accepted"
    else:
        return
    raise ConfigurationError(f"{text} is not an interval: {reason}; {_ACCEPTED}")


def _check_aware(moment: datetime) -> None:
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ValueError(f"{moment.isoformat(' ')} has no time zone; moments must be aware")


def _outside(what: str, moment: datetime) -> PlanError:
    return PlanError(
        f"the period of {what} around {moment.isoformat(' ')} reaches outside the years 1 to 9999, "
        "which is as far as dates reach here"
    )


def _length(year: int, month: int) -> int:
    # `monthrange` knows no year 0; `date` refuses it with the error that the caller expects.
    return monthrange(year, month)[1] if 1 <= year <= 9999 else 1


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    """The first instant, in UTC, at which clocks in `zone` show `day` 00:00 or later.

    Defined so, it never runs backwards from one day to the next, whatever a zone does: of a
    midnight that came twice it is the first, and for one that was skipped it is the moment of
    the jump.
    """
    wall = datetime.combine(day, time())
    first = wall.replace(tzinfo=zone).astimezone(UTC)
    if first.astimezone(zone).replace(tzinfo=None) == wall:
        return first
    # Skipped. Reading it with the offset of either side gives an instant on the other side of the
    # jump; jumps happen on whole seconds.
    before = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    low, high = 0, int((first - before).total_seconds())
    while high - low > 1:
        middle = (low + high) // 2
        shown = (before + timedelta(seconds=middle)).astimezone(zone).replace(tzinfo=None)
        low, high = (low, middle) if shown >= wall else (middle, high)
    return before + timedelta(seconds=high)
