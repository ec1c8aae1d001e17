"""Queries that read every partition, found while they are asked: for development and tests.

A watcher stands around each statement of a connection (Django's ``execute_wrappers``). It has
PostgreSQL plan a SELECT, UPDATE or DELETE of a partitioned model before that runs, and reports what is
not pruned with the line that asked. Where nobody watches, no connection has a wrapper, and
queries cost what they always did.
"""

from __future__ import annotations

import logging
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import django
import psycopg
from django.core.signals import setting_changed
from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.sql import Query
from django.db.models.sql.compiler import SQLCompiler
from psycopg import sql

from django_scaledb.conf import SETTING, settings
from django_scaledb.exceptions import ConfigurationError, UnprunedQueryError
from django_scaledb.partitions import registry, why
from django_scaledb.partitions.allowance import is_allowed
from django_scaledb.partitions.reading import Reading, read_by

logger = logging.getLogger("django_scaledb.pruning")

MOST_KNOWN = 10_000
"""Statements whose plan is remembered, so that each is explained once."""


@dataclass(frozen=True)
class Asked:
    """A statement that reads partitions: who asked for it, and what it reads."""

    alias: str
    statement: str
    line: str
    query: Query | None
    readings: Sequence[Reading]

    def unpruned(self) -> list[str]:
        """A sentence or two for each table of which every partition is read."""
        return [self.complaint(reading) for reading in self.readings if reading.is_unpruned]

    def reason(self, reading: Reading) -> str:
        """Why these partitions are read, and what would prune."""
        if not reading.is_unpruned:
            return f"the span of {reading.column} that it asks for lies in that many"
        model = model_of(reading)
        if model is None:
            return f"nothing restricts {reading.column}"
        return why.explain(model, self.query, reading.key_condition)

    def complaint(self, reading: Reading, wanted: str = "") -> str:
        names = ", ".join(reading.partitions[:5]) + (", .." if len(reading.partitions) > 5 else "")
        statement = self.statement if len(self.statement) < 1000 else self.statement[:1000] + " .."
        return (
            f"{label_of(reading)}: {self.line} reads {len(reading.partitions)} of {reading.total} "
            f"partitions{wanted} ({names}): {self.reason(reading)}.\n  {statement}"
        )


def model_of(reading: Reading) -> type[models.Model] | None:
    """The partitioned model whose table is read, if one is."""
    for model in registry.partitioned_models():
        if model._meta.db_table.rpartition('"."')[2] == reading.table.name:
            return model
    return None


def label_of(reading: Reading) -> str:
    """``app.Model``, or the table's name where no model has it."""
    model = model_of(reading)
    return model._meta.label if model else str(reading.table)


class Watcher:
    """Calls `report` for each statement that reads partitions; what `report` raises, the asker gets.

    With `remember` each statement is explained once, whatever its parameters are.
    """

    def __init__(self, report: Callable[[Asked], None], *, remember: bool = False) -> None:
        self.report = report
        self.known: dict[tuple[str, str, str], list[Reading]] | None = {} if remember else None

    def __call__(self, execute: Any, statement: Any, params: Any, many: bool, context: Any) -> Any:
        # Another thread's connection may still have it when it is over.
        if self in _watchers and not is_allowed.get():
            self.look(context["connection"], statement, params, many)
        return execute(statement, params, many, context)

    def look(self, connection: Any, statement: Any, params: Any, many: bool) -> None:
        if isinstance(statement, sql.Composable):
            statement = statement.as_string(connection.connection)
        if not isinstance(statement, str) or not concerns_partitions(statement):
            return
        if many:
            params = next(iter(params), None)
        origin = asked_by()
        if origin is None:
            return
        # Whether the key is restricted is up to the statement, whatever its parameters are.
        key = (connection.alias, str(connection.settings_dict["NAME"]), statement)
        readings = self.known.get(key) if self.known is not None else None
        if readings is None:
            try:
                readings = read_by(connection, statement, params)
            except psycopg.Error:
                return  # it will fail by itself, or cannot be explained
            if self.known is not None and any(reading.total > 1 for reading in readings):
                if len(self.known) >= MOST_KNOWN:
                    self.known.clear()
                self.known[key] = readings
        self.report(Asked(connection.alias, statement, *origin, readings))


_watchers: list[Any] = []


def watchers() -> tuple[Any, ...]:
    return tuple(_watchers)


def join(connection: BaseDatabaseWrapper) -> None:
    """Have a connection that was just made watched by all who watch this thread."""
    here = threading.get_ident()
    connection.execute_wrappers.extend(w for w in _watchers if getattr(w, "thread", None) in (None, here))


def begin(watcher: Any) -> None:
    """Put an execute wrapper around this thread's connections, and around all that are made from now on.

    One with an attribute `thread` is put around those of that thread only.
    """
    _watchers.append(watcher)
    for connection in _connections():
        connection.execute_wrappers.append(watcher)


def end(watcher: Any) -> None:
    _watchers.remove(watcher)
    for connection in _connections():
        if watcher in connection.execute_wrappers:
            connection.execute_wrappers.remove(watcher)


@contextmanager
def watched(report: Callable[[Asked], None]) -> Iterator[None]:
    watcher = Watcher(report)
    begin(watcher)
    try:
        yield
    finally:
        end(watcher)


def _connections() -> Iterator[Any]:
    # One object stands for several aliases where test mirrors are.
    found = {id(c): c for c in connections.all(initialized_only=True) if hasattr(c, "accepts_any_period")}
    yield from found.values()


# -- what the setting asks for

_by_setting: list[Watcher] = []


def install() -> None:
    """Begin, or end, what ``SCALEDB["UNPRUNED_QUERIES"]`` says; a change in a test is followed."""
    setting_changed.connect(_on_setting_changed, dispatch_uid="django_scaledb.unpruned_queries")
    try:
        mode = settings.UNPRUNED_QUERIES
    except ConfigurationError:
        mode = "ignore"  # django_scaledb.E011 says what is wrong
    while _by_setting:
        end(_by_setting.pop())
    if mode != "ignore":
        _by_setting.append(Watcher(_log if mode == "log" else _raise, remember=True))
        begin(_by_setting[0])


def _on_setting_changed(setting: str, **kwargs: Any) -> None:
    if setting == SETTING:
        install()


def _log(asked: Asked) -> None:
    for complaint in asked.unpruned():
        logger.warning("%s", complaint, extra={"alias": asked.alias, "asked_by": asked.line})


def _raise(asked: Asked) -> None:
    if complaints := asked.unpruned():
        raise UnprunedQueryError("\n".join(complaints))


# -- which statements, and who asks

_READS = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*(?:SELECT|UPDATE|DELETE|WITH|MERGE)\b", re.I | re.S)


@cache
def _tables() -> tuple[str, ...]:
    return tuple(model._meta.db_table for model in registry.partitioned_models())


def concerns_partitions(statement: str) -> bool:
    """Whether a statement reads or changes rows, and names the table of a partitioned model."""
    return any(table in statement for table in _tables()) and _READS.match(statement) is not None


_PACKAGE = str(Path(__file__).parent.parent)
_DJANGO = str(Path(django.__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_ORM = (_PACKAGE, f"{_DJANGO}/db/models", f"{_DJANGO}/db/backends")
_COMMANDS = (
    f"{_PACKAGE}/management",
    f"{_PACKAGE}/testing",
    f"{_DJANGO}/core/management",
    f"{_DJANGO}/db/migrations",
)


def asked_by() -> tuple[str, Query | None] | None:
    """The line of the application that asks for the statement now being run, and the ORM's query.

    Where no line of the application does (a view of Django's own), the one next to the ORM. None
    for what commands of Django and of this package, and migrations, ask for.
    """
    query: Query | None = None
    beside: Any = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_COMMANDS):
            return None
        if path.startswith(_ORM):
            beside = None
            if query is None and isinstance(compiler := frame.f_locals.get("self"), SQLCompiler):
                query = compiler.query
        elif path.startswith((_DJANGO, *_INSTALLED)):
            beside = beside or frame
        elif not path.startswith((_STANDARD, "<frozen")):
            return _line(frame), query
        frame = frame.f_back
    return (_line(beside) if beside is not None else "an unknown line"), query


def _line(frame: Any) -> str:
    path = Path(frame.f_code.co_filename)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{frame.f_lineno} ({frame.f_code.co_name})"
