"""The querysets of partitioned models: a period of rows, asked for so that it prunes."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any, Self, TypeVar

from django.db import models

from django_scaledb.partitions import registry
from django_scaledb.partitions.config import KeyKind
from django_scaledb.partitions.uuid7 import uuid7_floor

_Model = TypeVar("_Model", bound=models.Model, covariant=True)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class PartitionedQuerySet(models.QuerySet[_Model]):
    """The querysets of a `PartitionedModel`, and a base for your own."""

    def in_period(self, start: date, end: date) -> Self:
        """The rows whose key lies in ``[start, end)``: `start` included, `end` not.

        `start` and `end` are aware datetimes for a `DateTimeField` key and for a `UUID7Field` key
        (whose time is in whole milliseconds), and dates for a `DateField` key. PostgreSQL reads
        the partitions of the period only.

        Raises `TypeError` for anything else, and `ValueError` for a datetime without a time zone
        and for a period that ends before it begins.
        """
        key = registry.key_field(self.model)
        kind = registry.key_kind(key)
        what = f"{self.model._meta.label}.objects.in_period()"
        for name, value in (("start", start), ("end", end)):
            _check(value, kind, f"{what}: {name}")
        if end < start:
            raise ValueError(f"{what}: the period ends ({end}) before it begins ({start})")
        lower, upper = as_key(start, kind), as_key(end, kind)
        return self.filter(**{f"{key.name}__gte": lower, f"{key.name}__lt": upper})


PartitionedManager = models.Manager.from_queryset(PartitionedQuerySet, "PartitionedManager")
"""The manager of a `PartitionedModel` that declares none, and a base for your own."""


def _check(value: object, kind: KeyKind, what: str) -> None:
    if kind is KeyKind.DATE:
        if not isinstance(value, date) or isinstance(value, datetime):
            raise TypeError(f"{what} is {value!r}; the key is a date, so give a datetime.date")
    elif not isinstance(value, datetime):
        raise TypeError(
            f"{what} is {value!r}; give an aware datetime: a day begins at another moment in every time zone"
        )
    elif value.tzinfo is None:
        raise ValueError(
            f"{what} is {value!r}, which has no time zone; give an aware datetime, "
            "such as datetime(2026, 11, 1, tzinfo=UTC)"
        )


def as_key(moment: date, kind: KeyKind) -> Any:
    """The lowest key at or after `moment`, which is of the kind's type."""
    if kind is not KeyKind.UUID7:
        return moment
    assert isinstance(moment, datetime)
    # A UUID has whole milliseconds: the first one that is not before `moment`.
    return uuid7_floor(max(moment + (_EPOCH - moment) % _MILLISECOND, _EPOCH))
