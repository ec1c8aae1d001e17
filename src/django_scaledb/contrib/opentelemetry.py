"""OpenTelemetry: each query's span says which server answered, and why that one.

Once per process, where the tracing is set up, before or after the instrumentation of psycopg::

    from django_scaledb.contrib import opentelemetry as scaledb_opentelemetry

    scaledb_opentelemetry.install()

The spans are those of ``opentelemetry-instrumentation-psycopg``; this module makes none. What it costs is
paid by queries, not by routing decisions: a context variable for each, a look at the state for those that are
recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from django_scaledb.routing import policy, registry, state
from django_scaledb.routing.policy import Facts, Mode, Reason, Transaction
from django_scaledb.routing.router import requirement
from django_scaledb.routing.statements import Kind, classify

PREFIX = "django_scaledb."


@dataclass(frozen=True)
class _Query:
    """A query under way; `outer` is the one that failed on a replica, and is run again by this one."""

    alias: str
    sql: object
    outer: _Query | None


_current: ContextVar[_Query | None] = ContextVar("django_scaledb.opentelemetry", default=None)
_providers: list[object] = []


def install(provider: Any = None) -> bool:
    """Let `provider` (the global one if it is None) put our attributes on the spans of queries.

    Calling it again changes nothing. Without OpenTelemetry's SDK nothing is done, and the answer is False;
    so it is where no SDK was set up as the global provider.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import SpanProcessor
    except ImportError:
        return False

    class Processor(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            query = _current.get()
            if query is not None and span.kind is trace.SpanKind.CLIENT:
                span.set_attributes(attributes(query))

    provider = provider or trace.get_tracer_provider()
    if provider in _providers:
        return True
    if not hasattr(provider, "add_span_processor"):
        return False
    provider.add_span_processor(Processor())
    _providers.append(provider)
    connection_created.connect(_connected, dispatch_uid="django_scaledb.contrib.opentelemetry")
    for connection in connections.all(initialized_only=True):
        _connected(connection)
    return True


def _connected(connection: BaseDatabaseWrapper, **_: Any) -> None:
    if _around not in connection.execute_wrappers:
        connection.execute_wrappers.append(_around)


def _around(execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
    token = _current.set(_Query(context["connection"].alias, sql, _current.get()))
    try:
        return execute(sql, params, many, context)
    finally:
        _current.reset(token)


def attributes(query: _Query) -> dict[str, str]:
    """What the span of a query says about its server."""
    found = {PREFIX + "alias": query.alias}
    members = registry.registry().set_with(query.alias)
    if members is not None:
        role = "primary" if query.alias == members.primary else "replica"
        found |= {PREFIX + "role": role, PREFIX + "reason": _reason(members, query)}
    if query.outer is not None and query.outer.alias != query.alias:
        found[PREFIX + "failed_over_from"] = query.outer.alias
    return found


def _reason(members: Any, query: _Query) -> str:
    """Why this server: `Reason`'s names in lower case, ``write``, or ``named``."""
    frame = state.frame()
    if query.alias != members.primary:
        reason = Reason.STALE_REPLICA if frame.mode is Mode.STALE_REPLICA else Reason.REPLICA
        return reason.name.lower()
    if not isinstance(query.sql, str) or classify(query.sql) not in (Kind.READ, Kind.NEUTRAL):
        return "write"
    required, timeline_unknown = requirement(members, frame)
    reason = policy.decide(
        Facts(
            mode=frame.mode,
            transaction=Transaction.CLEAN if query.alias in state.thread.open else Transaction.NONE,
            required=required,
            candidates=() if timeline_unknown else members.candidates,
            no_candidates=Reason.NOT_REPLAYED if timeline_unknown else members.no_candidates,
        )
    ).reason
    # A replica could have served it: `using()`, a lock, or READ_FROM_PRIMARY asked for the primary.
    return "named" if reason in (Reason.REPLICA, Reason.STALE_REPLICA) else reason.name.lower()
