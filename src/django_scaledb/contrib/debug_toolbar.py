"""django-debug-toolbar: which partitions a request's queries read, which server answered, and why that one.

Needs ``django-scaledb[toolbar]``. In the settings, beside what the toolbar itself asks for::

    DEBUG_TOOLBAR_PANELS = [..., "django_scaledb.contrib.debug_toolbar.PartitionsPanel"]

The queries are planned again (EXPLAIN) when the response is made; their own times are not touched.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import psycopg
from debug_toolbar.panels import Panel
from django.db import DatabaseError, InterfaceError, connections, router
from django.db.models.sql import Query
from django.db.models.sql.subqueries import DeleteQuery, InsertQuery, UpdateQuery

from django_scaledb.partitions import watching
from django_scaledb.partitions.reading import Reading, read_by
from django_scaledb.routing.explanation import explain
from django_scaledb.routing.router import ReplicaRouter


@dataclass
class Recorded:
    """A statement that was run: where, why there, and who asked."""

    alias: str
    reason: str
    line: str
    statement: str
    params: Any
    query: Query | None


class Recorder:
    """Keeps what this thread's connections run, in order."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.found: list[Recorded] = []

    def __call__(self, execute: Any, statement: Any, params: Any, many: bool, context: Any) -> Any:
        if threading.get_ident() != self.thread:
            return execute(statement, params, many, context)
        alias = context["connection"].alias
        line, query = watching.asked_by() or ("a command", None)
        text = statement if isinstance(statement, str) else str(statement)
        mine = Recorded(
            alias, _reason(alias, query), line, text, next(iter(params), None) if many else params, query
        )
        self.found.append(mine)
        begin = len(self.found)
        try:
            return execute(statement, params, many, context)
        finally:
            elsewhere = [other for other in self.found[begin:] if other.statement == text]
            if elsewhere:  # a replica that could not answer: another connection ran it in our place
                self.found.remove(mine)
                elsewhere[-1].reason = f"{alias} could not answer"


def _reason(alias: str, query: Query | None) -> str:
    if query is None:
        return "the code opened a cursor on it"
    if isinstance(query, InsertQuery | UpdateQuery | DeleteQuery):
        return "it writes"
    if query.select_for_update:
        return "it locks rows"
    if query.model is None or not any(isinstance(one, ReplicaRouter) for one in router.routers):
        return ""
    explanation = explain(query.model)
    if alias in explanation.aliases and explanation.reason is not None:
        return str(explanation.reason)
    return f"using({alias!r}), or a related object read there"


class PartitionsPanel(Panel):
    """Partitions read of how many, server and routing reason of each query; not for ASGI requests."""

    title = "Partitions and servers"
    nav_title = "Partitions"
    template = "django_scaledb/debug_toolbar.html"
    recorder: Recorder | None = None

    @property
    def nav_subtitle(self) -> str:
        panel: Any = self  # the toolbar's methods have no types
        stats = panel.get_stats()
        return f"{stats.get('unpruned', 0)} not pruned, {len(stats.get('queries', ()))} queries"

    def enable_instrumentation(self) -> None:
        if self.recorder is None:
            self.recorder = Recorder()
            watching.begin(self.recorder)

    def disable_instrumentation(self) -> None:
        if self.recorder is not None and self.recorder in watching.watchers():
            watching.end(self.recorder)

    def generate_stats(self, request: Any, response: Any) -> None:
        found = self.recorder.found if self.recorder is not None else []
        known: dict[tuple[str, str, str], list[Reading]] = {}
        queries: list[dict[str, Any]] = []
        for one in found:
            key = (one.alias, one.statement, repr(one.params))
            if key not in known:
                known[key] = _readings(one)
            asked = watching.Asked(one.alias, "", one.line, one.query, known[key])
            queries.append(
                {
                    "alias": one.alias,
                    "reason": one.reason,
                    "line": one.line,
                    "statement": one.statement,
                    "tables": [_shown(asked, reading) for reading in known[key]],
                }
            )
        unpruned = sum(any(table["unpruned"] for table in query["tables"]) for query in queries)
        panel: Any = self
        panel.record_stats({"queries": queries, "unpruned": unpruned})


def _readings(one: Recorded) -> list[Reading]:
    if not watching.concerns_partitions(one.statement):
        return []
    try:
        return read_by(connections[one.alias], one.statement, one.params)
    except (psycopg.Error, DatabaseError, InterfaceError):
        return []  # it failed when it was run, or its server is gone by now


def _shown(asked: watching.Asked, reading: Reading) -> dict[str, Any]:
    return {
        "label": watching.label_of(reading),
        "read": len(reading.partitions),
        "total": reading.total,
        "partitions": ", ".join(reading.partitions[:20]) + (", .." if len(reading.partitions) > 20 else ""),
        "unpruned": reading.is_unpruned,
        "why": asked.reason(reading) if reading.is_unpruned else "",
    }
