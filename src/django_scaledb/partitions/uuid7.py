"""Version 7 UUIDs (RFC 9562): identifiers that begin with their time."""

from __future__ import annotations

import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

from django_scaledb.exceptions import PlanError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_VERSION = 7 << 76
_VARIANT = 0b10 << 62
_RANDOM = (1 << 62) - 1

# 1/4096 ms: the 48 bits of milliseconds and the 12 bits behind the version, read as one number
# (RFC 9562, 6.2 method 3; PostgreSQL 18's uuidv7() does the same).
_last_tick = 0
_lock = threading.Lock()


def _after_fork_in_child() -> None:
    # Another thread of the parent may have held it at the moment of the fork.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def uuid7() -> uuid.UUID:
    """A new version 7 UUID, greater than every one made before in this process.

    48 bits of Unix milliseconds, 12 bits of fractions of one, 62 random bits. When the clock
    stands still or is put back, the fraction counts on from the last value (threads included).
    """
    global _last_tick
    tick = (time.time_ns() << 12) // 1_000_000
    with _lock:
        tick = max(tick, _last_tick + 1)
        _last_tick = tick
    milliseconds, fraction = tick >> 12, tick & 0xFFF
    random = int.from_bytes(os.urandom(8)) & _RANDOM
    return uuid.UUID(int=milliseconds << 80 | _VERSION | fraction << 64 | _VARIANT | random)


def uuid7_floor(moment: datetime) -> uuid.UUID:
    """The lowest UUID of `moment`'s millisecond: the time, and zeros.

    It is a bound, not an identifier: the zeros stand for version and variant too, so that every
    UUID of that millisecond is at or above it. Raises `PlanError` before 1970 and `ValueError`
    for a moment without a time zone.
    """
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat(' ')} has no time zone; moments must be aware")
    milliseconds = (moment - _EPOCH) // _MILLISECOND
    if milliseconds < 0:
        raise PlanError(
            f"{moment.isoformat(' ')} is before 1970, where version 7 UUIDs begin; "
            "no row with a UUID7Field key can lie there"
        )
    return uuid.UUID(int=milliseconds << 80)


def timestamp_of(value: uuid.UUID) -> datetime:
    """The time in the first 48 bits of `value`, in UTC, to the millisecond.

    Of another version than 7 the answer means nothing. Raises `ValueError` after the year 9999.
    """
    milliseconds = value.int >> 80
    try:
        return _EPOCH + milliseconds * _MILLISECOND
    except OverflowError as error:
        raise ValueError(f"the time of {value} is after the year 9999") from error
