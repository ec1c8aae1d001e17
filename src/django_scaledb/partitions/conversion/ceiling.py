"""Where the first partition ends (pure).

Until the swap no row may lie at or above that moment, and after it none beyond the partitions
made ahead. So the end leaves room: for what applications write ahead of time, and for a
conversion that takes days.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import Bound, Range, Unbounded, parse, show
from django_scaledb.partitions.config import KeyKind, PartitionConfig

ROOM = timedelta(days=7)
"""At least as long before the end, whatever the interval."""


def first_end(config: PartitionConfig, now: datetime, greatest: Bound | None) -> datetime:
    """The end of a period: a whole period and `ROOM` ahead of `now`, and above the `greatest` key.

    Raises `PlanError` when a row lies where no period ends.
    """
    if isinstance(greatest, Unbounded):
        raise PlanError(
            f"{config.label}: a row's {config.column} is infinity or beyond the year 9999; no period "
            "ends behind "
            "it. Give such rows a date, or NULL in another column"
        )
    zone = config.period_zone
    moment = config.on_key_axis(now)
    wanted = max(config.interval.next(config.interval.next(moment, zone), zone), moment + ROOM)
    if greatest is not None and greatest >= wanted:
        wanted = greatest + _step(config)
    end = config.interval.start_of(wanted, zone)
    return end if end == wanted else config.interval.next(end, zone)


def chosen_end(config: PartitionConfig, now: datetime, greatest: Bound | None, until: datetime) -> datetime:
    """`until`, as somebody asked for it; raises `PlanError` when rows lie, or soon would, above it."""
    if until <= config.on_key_axis(now) or (greatest is not None and greatest >= until):
        raise PlanError(
            f"{config.label}: the first partition cannot end at {show(until)}, because rows lie above "
            "that, or "
            f"the time has come; leave --until out, or choose {show(first_end(config, now, greatest))}"
        )
    return until


def _step(config: PartitionConfig) -> timedelta:
    """The smallest distance between two keys, as bounds know them."""
    if config.key_kind is KeyKind.DATE:
        return timedelta(days=1)
    return timedelta(milliseconds=1) if config.key_kind is KeyKind.UUID7 else timedelta(microseconds=1)


def moment_of(text: str, kind: KeyKind) -> Bound:
    """A key as PostgreSQL prints it (in UTC), as a bound."""
    found = parse(f"FOR VALUES FROM (MINVALUE) TO ('{text}')", kind)
    assert isinstance(found, Range)
    return found.upper
