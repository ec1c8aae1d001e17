"""Whether counters say what their sources say, asked in the plainest way there is."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.db import models

Totals = dict[tuple[Any, ...], tuple[Any, ...]]


def counted(counter: Any, using: str | None = None) -> Totals:
    """What `counter` should hold: a GROUP BY of its source by the ORM; groups of zeros are left out."""
    options = counter._counter_meta
    queryset = options.source_model(counter._meta.apps)._base_manager.using(using)
    if options.where:
        queryset = queryset.filter(options.where)
    keys: dict[str, Any] = {}
    for i, (_, item) in enumerate(options.names()):
        keys[f"scaledb_k{i}"] = models.F(item) if isinstance(item, str) else item
    totals = {f"scaledb_t{i}": total for i, total in enumerate(options.totals.values())}
    if keys:
        rows = list(queryset.annotate(**keys).values(*keys).annotate(**totals).values_list(*keys, *totals))
    else:
        rows = [tuple(queryset.aggregate(**totals)[name] for name in totals)]
    return {tuple(row[: len(keys)]): values for row in rows if any(values := _numbers(row[len(keys) :]))}


def stored(counter: Any, using: str | None = None) -> Totals:
    """What `counter` holds; rows of zeros are left out."""
    options = counter._counter_meta
    keys = [counter._meta.get_field(group.name).attname for group in options.groups]
    rows = counter._base_manager.using(using).values_list(*keys, *options.totals)
    return {tuple(row[: len(keys)]): values for row in rows if any(values := _numbers(row[len(keys) :]))}


def _numbers(values: Any) -> tuple[Any, ...]:
    return tuple(
        round(float(value), 4) if isinstance(value, float | Decimal) else value or 0 for value in values
    )


def assert_same_totals(*counters: Any, using: str | None = None) -> None:
    """Raise `AssertionError`, with the keys that differ, unless each counter equals its GROUP BY.

    For tests; call it where no other session is writing, or inside one snapshot.
    """
    for counter in counters:
        expected, found = counted(counter, using), stored(counter, using)
        if expected != found:
            differences = [
                f"{key}: the source gives {expected.get(key, 'no row')}, the counter "
                f"{found.get(key, 'no row')}"
                for key in sorted({*expected, *found}, key=repr)
                if expected.get(key) != found.get(key)
            ]
            raise AssertionError(f"{counter._meta.label} has drifted:\n  " + "\n  ".join(differences[:20]))
