"""Pages and admin lists whose count is a row read where a counter covers the filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db import models
from django.db.models.lookups import Exact, IsNull
from django.db.models.sql.where import AND
from django.utils.functional import cached_property

from django_scaledb.counters import detach
from django_scaledb.counters.models import CounterModel, CounterQuerySet

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[Any]
else:
    _Admin = admin.ModelAdmin


@dataclass(frozen=True)
class Cover:
    """A counter that answers a queryset's count: its `total` column, in the rows that match `key`."""

    counter: type[CounterModel]
    total: str
    key: dict[str, Any]

    def __str__(self) -> str:
        key = ", ".join(f"{name}={value!r}" for name, value in self.key.items()) or "all rows"
        return f"count: {self.counter._meta.label}.{self.total} ({key})"

    def count(self, using: str) -> int:
        """The number of rows; sums over the groups that the filter leaves open."""
        options = self.counter._counter_meta
        if len(self.key) == len(options.groups):
            rows: Any = CounterQuerySet(self.counter, using=using)
            return int(getattr(rows.for_key(**self.key), self.total))
        lookups = {f"{n}__isnull" if v is None else n: True if v is None else v for n, v in self.key.items()}
        open_rows: Any = CounterQuerySet(self.counter, using=using).filter(**lookups)
        return int(open_rows.aggregate(sum=models.Sum(self.total))["sum"] or 0)


def cover(queryset: models.QuerySet[Any]) -> Cover | None:
    """The counter that answers ``queryset.count()``, or None.

    A filter is covered when it is made of ``field=value`` and ``field__isnull=True`` on a counter's
    own group columns, and nothing else: no joins, no annotations, no slices, no distinct. Counters
    with a ``where``, of all time (``on_detach = "keep"``) or without ``Count("*")`` do not cover.
    """
    query = queryset.query
    if (
        query.is_sliced
        or query.distinct
        or query.combinator
        or query.annotations
        or query.extra
        or query.is_empty()
        or query.where.negated
        or query.where.connector != AND
    ):
        return None
    wanted: dict[str, Any] = {}
    for child in query.where.children:
        value: Any
        if isinstance(child, Exact) and not hasattr(child.rhs, "resolve_expression"):
            value = child.rhs
        elif isinstance(child, IsNull) and child.rhs is True:
            value = None
        else:
            return None
        target = getattr(child.lhs, "target", None)
        if (
            target is None
            or getattr(child.lhs, "alias", None) != query.get_initial_alias()
            or target.name in wanted
        ):
            return None
        wanted[target.name] = value
    candidates = []
    for counter in detach.counters_of(queryset.model):
        options = counter._counter_meta
        total = next((n for n, t in options.totals.items() if _counts_rows(t)), None)
        groups = {group.path[0].name: group.name for group in options.groups if len(group.path) == 1}
        if (
            total is None
            or options.where
            or options.on_detach == "keep"
            or not wanted.keys() <= groups.keys()
        ):
            continue
        candidates.append((len(options.groups), counter, total, groups))
    if not candidates:
        return None
    _, counter, total, groups = min(candidates, key=lambda candidate: candidate[0])
    return Cover(counter, total, {groups[name]: value for name, value in wanted.items()})


def _counts_rows(total: Any) -> bool:
    return (
        isinstance(total, models.Count)
        and total.filter is None
        and type(total.get_source_expressions()[0]).__name__ == "Star"
    )


def found_in(queryset: Any) -> str:
    """The alias that `queryset` reads from."""
    return str(queryset.db)


class CounterPaginator(Paginator):  # type: ignore[type-arg]
    """A paginator that reads the count from a counter where one covers the filter."""

    @cached_property
    def count(self) -> int:
        queryset = self.object_list
        found = cover(queryset) if isinstance(queryset, models.QuerySet) else None
        return super().count if found is None else found.count(found_in(queryset))

    def explain(self) -> str:
        """Where the count comes from: the counter and its key, or COUNT(*) over the table."""
        queryset = self.object_list
        found = cover(queryset) if isinstance(queryset, models.QuerySet) else None
        if found is not None:
            return str(found)
        table = (
            queryset.model._meta.db_table
            if isinstance(queryset, models.QuerySet)
            else type(queryset).__name__
        )
        return f"count: COUNT(*) over {table}; no counter covers this filter"


class CountedModelAdmin(_Admin):
    """A ModelAdmin whose lists are counted by a counter where one covers the filter."""

    paginator = CounterPaginator
    show_full_result_count = False


class CounterAdmin(_Admin):
    """A read-only admin of a counter: what writes it is its source."""

    def has_add_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def has_change_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def has_delete_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def get_list_display(self, request: Any) -> Any:
        if tuple(self.list_display) != ("__str__",):
            return list(self.list_display)
        options = self.model._counter_meta
        # A foreign key's own column: the row of a deleted parent is still there, with zeros.
        keys = [self.model._meta.get_field(group.name).attname for group in options.groups]
        return [*(keys or ["__str__"]), *options.totals]
