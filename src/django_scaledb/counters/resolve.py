"""From a CounterModel and a connection to the SQL of its `Definition`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.expressions import Col, Star
from django.db.models.sql import Query
from django.db.models.sql.compiler import SQLCompiler
from django.utils import timezone
from psycopg import sql

from django_scaledb.counters.definition import Definition, Hop, Key, Total, quote
from django_scaledb.counters.options import CounterOptions, Group
from django_scaledb.exceptions import ConfigurationError


def define(
    counter: type[models.Model],
    connection: BaseDatabaseWrapper,
    *,
    options: CounterOptions | None = None,
    source: type[models.Model] | None = None,
) -> Definition:
    """The counter's definition for `connection`; parameters are written into the SQL.

    `options` and `source` stand in for the counter's own in migrations, whose models are those of
    their time. Raises `ConfigurationError` when the declaration is not valid.
    """
    options = options or counter._counter_meta  # type: ignore[attr-defined]
    if options.problem is not None:
        raise options.problem
    source = source or options.source_model(counter._meta.apps)
    return _Resolver(counter, source, options, connection).definition()


class _Resolver:
    def __init__(
        self,
        counter: type[models.Model],
        source: type[models.Model],
        options: CounterOptions,
        connection: BaseDatabaseWrapper,
    ) -> None:
        self.counter, self.source, self.options, self.connection = counter, source, options, connection
        self.query = Query(source)
        self.query.get_initial_alias()
        self.compiler: SQLCompiler = self.query.get_compiler(connection=connection)
        self.columns: dict[str, None] = {}

    def definition(self) -> Definition:
        # A bucket's time zone is the project's, whichever one is active while somebody writes.
        with timezone.override(timezone.get_default_timezone()):
            keys = tuple(self._key(group) for group in self.options.groups)
            totals = tuple(
                t for name, total in self.options.totals.items() for t in self._totals(name, total)
            )
            where = self._condition(self.options.where)
        return Definition(
            label=self.options.label,
            table=self.counter._meta.db_table,
            source_label=self.source._meta.label_lower,
            source_table=self.source._meta.db_table,
            columns=tuple(self.columns),
            keys=keys,
            totals=totals,
            where=where,
        )

    # -- fragments

    def _key(self, group: Group) -> Key:
        field = self.counter._meta.get_field(group.name)
        assert isinstance(field, models.Field)
        if group.expression is not None:
            raw = self._sql(group.expression)
            return Key(str(field.column), self._type(field), raw, self._type(field))
        first, *rest = group.path
        hops, before = [], first
        for step in rest:
            target = before.target_field  # type: ignore[attr-defined]
            hops.append(
                Hop(
                    label=target.model._meta.label_lower,
                    table=target.model._meta.db_table,
                    pk=target.column,
                    pk_type=self._type(target),
                    value=str(step.column),
                    value_type=self._type(step),
                    is_constrained=before.db_constraint,  # type: ignore[attr-defined]
                )
            )
            before = step
        self.columns[str(first.column)] = None
        raw = f"{quote(self.source._meta.db_table)}.{quote(str(first.column))}"
        return Key(str(field.column), self._type(field), raw, self._type(first), tuple(hops))

    def _totals(self, name: str, total: Any) -> list[Total]:
        condition = self._condition(total.filter) if total.filter is not None else None
        expression = total.get_source_expressions()[0]
        if isinstance(total, models.Count):
            return [self._count(name, expression, condition)]
        if isinstance(total, models.Avg):
            return [
                self._sum(f"{name}_sum", expression, condition),
                self._count(f"{name}_count", expression, condition),
            ]
        return [self._sum(name, expression, condition)]

    def _count(self, name: str, expression: Any, condition: str | None) -> Total:
        if not _is_never_null(expression.resolve_expression(self.query, allow_joins=False)):
            condition = " AND ".join(
                f"({part})" for part in (condition, f"{self._resolved(expression)} IS NOT NULL") if part
            )
        amount = f"CASE WHEN {condition} THEN 1 ELSE 0 END" if condition else "1"
        aggregate = f"COUNT(*) FILTER (WHERE {condition})" if condition else "COUNT(*)"
        return Total(self._column(name), self._column_type(name), amount, aggregate)

    def _sum(self, name: str, expression: Any, condition: str | None) -> Total:
        amount = f"COALESCE({self._resolved(expression)}, 0)"
        if condition:
            amount = f"CASE WHEN {condition} THEN {amount} ELSE 0 END"
        return Total(self._column(name), self._column_type(name), amount, f"COALESCE(SUM({amount}), 0)")

    def _column(self, name: str) -> str:
        field = self.counter._meta.get_field(name)
        assert isinstance(field, models.Field)
        return str(field.column)

    def _column_type(self, name: str) -> str:
        field = self.counter._meta.get_field(name)
        assert isinstance(field, models.Field)
        return self._type(field)

    def _type(self, field: models.Field[Any, Any]) -> str:
        found = (
            field.rel_db_type(self.connection) if not field.is_relation else field.db_type(self.connection)
        )
        assert found is not None
        return found

    def _resolved(self, expression: Any) -> str:
        return self._sql(expression.resolve_expression(self.query, allow_joins=False))

    def _condition(self, condition: Any) -> str | None:
        if condition is not None and not isinstance(condition, models.Q):
            # From Django 6.1 on an aggregate keeps its filter in a wrapper of its own.
            wrapped: list[Any] = getattr(condition, "get_source_expressions", list)()
            condition = wrapped[0] if len(wrapped) == 1 else condition
        if not condition:
            return None
        if not isinstance(condition, models.Q):
            raise ConfigurationError(
                f"{self.options.label}: CounterMeta.where must be a Q, not {condition!r}"
            )
        return self._sql(self.query.build_where(condition))

    def _sql(self, expression: Any) -> str:
        """`expression` with its parameters written into it."""
        self._collect(expression)
        text, params = self.compiler.compile(expression)
        with self.connection.cursor() as cursor:
            context = cursor.connection
            return text % tuple(sql.Literal(param).as_string(context) for param in params)

    def _collect(self, expression: Any) -> None:
        if isinstance(expression, Col):
            self.columns[str(expression.target.column)] = None
        children: Sequence[Any] = getattr(expression, "children", None) or ()
        if hasattr(expression, "get_source_expressions"):
            children = [*children, *expression.get_source_expressions()]
        for child in children:
            if child is not None:
                self._collect(child)


def _is_never_null(expression: Any) -> bool:
    """Whether counting `expression` is counting rows: ``*``, or a column without NULL."""
    if isinstance(expression, Col):
        return not expression.target.null
    return isinstance(expression, Star)
