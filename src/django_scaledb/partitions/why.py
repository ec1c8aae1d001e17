"""Why a query of the ORM does not prune, in the words in which it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.db import models
from django.db.models.expressions import Col
from django.db.models.lookups import Lookup
from django.db.models.sql import Query
from django.db.models.sql.where import OR, WhereNode

from django_scaledb.partitions import registry
from django_scaledb.partitions.config import KeyKind

_COMPARISONS = ("exact", "in", "range", "gt", "gte", "lt", "lte")


@dataclass(frozen=True)
class _Condition:
    """A lookup, or an expression that stands as a condition, and what it stands under."""

    lookup: Any
    is_negated: bool
    is_alternative: bool


def explain(model: type[models.Model], query: Query | None, key_condition: str | None) -> str:
    """What keeps a query from being pruned, and what to add; without a `query` (raw SQL) from what
    PostgreSQL says about the key, `key_condition`."""
    key = registry.key_field(model)
    reason = _in_sql(key, key_condition) if query is None else _in_query(key, query)
    return f"{reason}. {advice(key)}"


def advice(key: models.Field[Any, Any]) -> str:
    """Which filter would prune."""
    if registry.key_kind(key) is KeyKind.UUID7:
        return f"Filter by {key.name}, or by time with in_period(start, end)"
    return f"Add a span of the key: {key.name}__gte=.., {key.name}__lt=.., or in_period(start, end)"


def restricts(query: Query, key: models.Field[Any, Any]) -> bool:
    """Whether the query's own filters compare the bare key with a value, whatever else they say."""
    return any(
        not found.is_negated
        and not found.is_alternative
        and _is_key(getattr(found.lookup, "lhs", None), key)
        and found.lookup.lookup_name in _COMPARISONS
        and not _columns(found.lookup.rhs)
        for found in _conditions(query.where)
    )


def _in_sql(key: models.Field[Any, Any], key_condition: str | None) -> str:
    if key_condition is None:
        return f"nothing restricts {key.name}"
    return f"{key_condition} does not compare {key.name} itself with a value"


def _in_query(key: models.Field[Any, Any], query: Query) -> str:
    for part in query.combined_queries:  # of a UNION, the one that is to blame
        if not restricts(part, key):
            return _in_query(key, part)
    found = [c for c in _conditions(query.where) if key in {column.target for column in _columns(c.lookup)}]
    if found:
        return _reason(found[0], key)
    pk = key.model._meta.pk
    asked = {column.target for c in _conditions(query.where) for column in _columns(c.lookup)}
    if query.model is key.model and asked == {pk}:
        return f"it looks up by {pk.name} alone"
    if query.model is not key.model:
        return f"{key.model._meta.label} is joined, and nothing restricts its {key.name}"
    return f"nothing restricts {key.name}"


def _reason(found: _Condition, key: models.Field[Any, Any]) -> str:
    lookup = found.lookup
    lhs = getattr(lookup, "lhs", None)
    if not _is_key(lhs, key):
        return f"{_name(lhs, key)} is worked out from {key.name} in every row"
    name = f"{key.name}__{lookup.lookup_name}".removesuffix("__exact")
    if _columns(lookup.rhs):
        return f"{name} compares with another column, whose value differs from row to row"
    if found.is_alternative:
        return f"{name} is one side of an OR, and the other side does not restrict {key.name}"
    if found.is_negated:
        return f"{name} is negated, which leaves every partition in"
    return f"{name} is no comparison that prunes"


def _name(expression: Any, key: models.Field[Any, Any]) -> str:
    """``key__date`` for a transform of the key, ``TruncDay(key)`` for another function of it."""
    names: list[str] = []
    while not isinstance(expression, Col):
        name = getattr(expression, "lookup_name", None)
        sources = [s for s in _sources(expression) if any(c.target is key for c in _columns(s))]
        if not sources or not isinstance(name, str):
            return f"{type(expression).__name__}({key.name})" if sources else "a condition"
        names.append(name)
        expression = sources[0]
    return "__".join([key.name, *reversed(names)])


def _is_key(expression: Any, key: models.Field[Any, Any]) -> bool:
    return isinstance(expression, Col) and expression.target is key


def _conditions(node: Any, *, is_negated: bool = False, is_alternative: bool = False) -> Iterator[_Condition]:
    if isinstance(node, WhereNode):
        is_negated ^= node.negated
        # NOT (a AND b) is an OR, NOT (a OR b) is none.
        either = len(node.children) > 1 and (node.connector == OR) is not is_negated
        for child in node.children:
            yield from _conditions(child, is_negated=is_negated, is_alternative=is_alternative or either)
        return
    yield _Condition(node, is_negated, is_alternative)
    if isinstance(node, Lookup):
        inner = getattr(node.rhs, "query", node.rhs)
        if isinstance(inner, Query):
            yield from _conditions(inner.where)


def _sources(expression: Any) -> list[Any]:
    sources = getattr(expression, "get_source_expressions", None)
    return [source for source in (sources() if sources else ()) if source is not None]


def _columns(expression: Any) -> list[Col]:
    """The columns that an expression reads, those of its subqueries left out."""
    if isinstance(expression, Col):
        return [expression]
    return [column for source in _sources(expression) for column in _columns(source)]
