"""What a model's PartitioningMeta says, checked and as values (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import Enum
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from django_scaledb.exceptions import ConfigurationError, PlanError
from django_scaledb.partitions.intervals import Interval, Unit

MAX_PREMAKE = 1000
"""Partitions that exist cost every query's planning; more than this ahead is a typing mistake."""


class KeyKind(Enum):
    """How bounds of the partition key are written."""

    TIMESTAMP = "timestamptz"
    DATE = "date"
    UUID7 = "uuid"


class RetentionAction(Enum):
    """What becomes of a partition whose end is past retention."""

    DETACH = "detach"
    ARCHIVE = "archive"
    DROP = "drop"


_UTC = ZoneInfo("UTC")


@dataclass(frozen=True)
class PartitionConfig:
    """One model's partitioning, ready for the planner.

    `label` is ``app_label.ModelName``; `column` the partition key's column; `zone` the time zone
    in which calendar units are counted (UTC unless the model declares one).
    """

    label: str
    column: str
    key_kind: KeyKind
    interval: Interval
    premake: int
    retention: Interval | None
    retention_action: RetentionAction
    detached_for: Interval
    zone: ZoneInfo
    default_partition: bool

    @property
    def period_zone(self) -> ZoneInfo:
        """The zone whose midnights are the bounds.

        `zone`, except for a date key: its bounds are calendar dates, held as midnight UTC.
        """
        return _UTC if self.key_kind is KeyKind.DATE else self.zone

    def on_key_axis(self, now: datetime) -> datetime:
        """`now` (aware) where it stands among the bounds, in UTC.

        For a date key that is what clocks in `zone` show, because the zone decides what day it
        is; for the others the moment itself. Raises `PlanError` outside the years 1 to 9999.
        """
        if now.tzinfo is None:
            raise ValueError(f"{now.isoformat(' ')} has no time zone; moments must be aware")
        try:
            if self.key_kind is KeyKind.DATE:
                return now.astimezone(self.zone).replace(tzinfo=UTC, fold=0)
            return now.astimezone(UTC)
        except OverflowError as error:
            raise PlanError(f"{self.label}: {now.isoformat(' ')} is outside the years 1 to 9999") from error


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a PartitioningMeta: where, what, and what to do about it."""

    attribute: str
    message: str
    hint: str


def make_config(label: str, column: str, key_kind: KeyKind, attrs: Mapping[str, object]) -> PartitionConfig:
    """The configuration that the attributes of a PartitioningMeta stand for, defaults filled in.

    Raises `ConfigurationError` naming the model and every problem that `problems()` finds.
    """
    found = problems(label, key_kind, attrs)
    if found:
        raise ConfigurationError(
            "; ".join(f"{label}: PartitioningMeta.{p.attribute}: {p.message} ({p.hint})" for p in found)
        )
    values: dict[str, Any] = {
        known.field: known.read(attrs.get(name, known.default)) for name, known in _KNOWN.items()
    }
    return PartitionConfig(label=label, column=column, key_kind=key_kind, **values)


def problems(label: str, key_kind: KeyKind, attrs: Mapping[str, object]) -> list[Problem]:
    """Everything that is wrong with the attributes of `label`'s PartitioningMeta.

    `attrs` are the raw values, inherited ones included; names with a leading underscore do not
    count. Whether ``key`` names a suitable field is for the caller to find out: `key_kind` is
    the answer.
    """
    found = []
    for name, value in attrs.items():
        if name.startswith("_") or name == "key":
            continue
        if name == "method":
            if value != "range":
                message = f"{value!r} is not supported, periods of time are ranges"
                found.append(Problem(name, message, 'Leave it out, or write "range".'))
        elif name not in _KNOWN:
            found.append(_unknown(name))
        else:
            try:
                _KNOWN[name].read(value)
            except _Refused as refused:
                found.append(Problem(name, refused.message, refused.hint))
    if key_kind is KeyKind.DATE and not any(p.attribute == "interval" for p in found):
        interval = _read_interval(attrs.get("interval", _KNOWN["interval"].default))
        if interval.unit is Unit.HOUR:
            found.append(
                Problem(
                    "interval",
                    f"{str(interval)!r} is finer than {label}'s partition key, which is a date",
                    'Use "1 day" or more, or partition by a DateTimeField.',
                )
            )
    return found


class _Refused(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def _read_interval(value: object) -> Interval:
    try:
        return Interval.parse(value)
    except ConfigurationError as error:
        raise _Refused(str(error), 'For example "1 month".') from error


def _read_retention(value: object) -> Interval | None:
    return None if value is None else _read_interval(value)


def _read_premake(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PREMAKE:
        raise _Refused(
            f"{value!r} is not a whole number from 0 to {MAX_PREMAKE}",
            "Say how many whole future periods must exist besides the current one, for example 2.",
        )
    return value


def _read_action(value: object) -> RetentionAction:
    try:
        return RetentionAction(value)
    except ValueError:
        raise _Refused(f"{value!r} is not a retention action", 'Use "detach", "archive" or "drop".') from None


def _read_zone(value: object) -> ZoneInfo:
    hint = 'Use a name of the IANA time zone database, such as "UTC" or "Europe/Berlin".'
    if not isinstance(value, str):
        raise _Refused(f"{value!r} is not the name of a time zone", hint)
    try:
        return ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        # OSError: "Europe" is a directory of the database.
        raise _Refused(
            f"there is no time zone {value!r}", _did_you_mean(value, available_timezones()) or hint
        ) from None


def _read_default_partition(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Refused(f"{value!r} is neither True nor False", "Use True or False.")
    return value


class _Attribute(NamedTuple):
    field: str
    read: Callable[[object], object]
    default: object


_KNOWN = {
    "interval": _Attribute("interval", _read_interval, "1 year"),
    "premake": _Attribute("premake", _read_premake, 2),
    "retention": _Attribute("retention", _read_retention, None),
    "retention_action": _Attribute("retention_action", _read_action, "detach"),
    "detached_for": _Attribute("detached_for", _read_interval, "7 days"),
    "time_zone": _Attribute("zone", _read_zone, "UTC"),
    "default_partition": _Attribute("default_partition", _read_default_partition, False),
}


def _unknown(name: str) -> Problem:
    names = ["key", *_KNOWN]
    hint = _did_you_mean(name, names) or f"Known are {', '.join(names)}."
    return Problem(name, "there is no such attribute", hint)


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    close = get_close_matches(word, sorted(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else None
