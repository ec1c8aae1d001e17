"""Cursors of routed connections: psycopg's with the position of what they did, Django's with a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psycopg
from django.db import connections
from django.db.backends.postgresql.base import CursorDebugWrapper
from django.db.backends.utils import CursorWrapper
from django.db.utils import Error

from django_scaledb.routing.statements import Kind, classify
from django_scaledb.routing.token import parse_lsn

if TYPE_CHECKING:
    from django_scaledb.routing.writes import WriteTracker

    _Cursor = psycopg.Cursor[Any]
    _Wrapper = CursorWrapper
else:
    _Cursor = _Wrapper = object

#: What goes before a statement in its message, what behind it, and which of the results is the statement's.
Around = tuple[bytes, bytes, int]

_REPLAYED: Around = (b"", b"\n;SELECT pg_last_wal_replay_lsn()", 0)


class _AroundMixin(_Cursor):
    """Sends more than a statement in its message, and keeps the other results from the caller.

    psycopg has no way to ask for this: two of its inner methods are extended. Should it not call them one
    day, there are no other results, and whoever wants them asks separately.
    """

    routing_around: Around | None = None
    _routing_results: list[Any] | None = None

    def routing_run(self, run: Callable[..., Any], query: Any, params: Any, around: Around) -> Any:
        """`run` is this cursor's own `execute`; returns all results of the message, or None."""
        self.routing_around = around
        try:
            run(query, params)
        finally:
            self.routing_around = None
        return self.__dict__.pop("_routing_results", None)

    def _execute_send(self, query: Any, **options: Any) -> None:
        if self.routing_around is None:
            super()._execute_send(query, **options)
        else:
            before, behind, _ = self.routing_around
            self._query = query
            self._pgconn.send_query(before + query.query + behind)

    def _set_results(self, results: list[Any]) -> None:
        if self.routing_around is not None:
            self._routing_results = results
            which = self.routing_around[2]
            results = results[which : which + 1]
        super()._set_results(results)

    def routing_can_add(self) -> bool:
        """Whether statements go to the server as one text, which takes more of them."""
        return isinstance(self, psycopg.ClientCursor) and not self._conn._pipeline


class TrackingCursorMixin(_AroundMixin):
    """On a primary: tells the connection's tracker what it runs."""

    routing_tracker: WriteTracker | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        tracker = self.routing_tracker
        if tracker is None or (type(query) is str and classify(query) is Kind.READ):
            return super().execute(query, params, **options)
        return tracker.execute(self, super().execute, query, params, options)

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> Any:
        if self.routing_tracker is None:
            return super().executemany(query, params_seq, **options)
        return self.routing_tracker.executemany(self, super().executemany, query, params_seq, options)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        if self.routing_tracker is None:
            yield from super().stream(query, params, **options)
        else:
            with self.routing_tracker.around(self, query):
                yield from super().stream(query, params, **options)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        if self.routing_tracker is None:
            with super().copy(statement, params, **options) as copy:
                yield copy
        else:
            with (
                self.routing_tracker.around(self, statement),
                super().copy(statement, params, **options) as copy,
            ):
                yield copy


class PositionCursorMixin(_AroundMixin):
    """On one of several replicas: learns, in the same message, how much a read can have seen.

    A context that has read here must not read before that elsewhere.
    """

    routing_wrapper: Any = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        wrapper = self.routing_wrapper
        if (
            wrapper is None
            or options
            or not isinstance(query, str)
            or classify(query) not in (Kind.READ, Kind.MAYBE)
            or not self.routing_can_add()
        ):
            return super().execute(query, params, **options)
        results = self.routing_run(super().execute, query, params, _REPLAYED)
        position = results[-1].get_value(0, 0) if results else None
        if position is not None:  # None on a primary
            wrapper.routing_read_at(parse_lsn(position))
        return self


@lru_cache(maxsize=32)
def with_mixin(mixin: type, factory: type) -> type:
    """A cursor class of psycopg's, or one that settings name, that does more."""
    return factory if issubclass(factory, mixin) else type(factory.__name__, (mixin, factory), {})


class FailoverMixin(_Wrapper):
    """On a replica: a read that fails because of the server is run again elsewhere."""

    db: Any

    def _execute(self, sql: Any, params: Any, *ignored: Any) -> Any:
        try:
            result = super()._execute(sql, params, *ignored)  # type: ignore[misc]
        except Error as error:
            if (why := self.db.routing_why_elsewhere(error, sql)) is None:
                raise
            return self._execute_elsewhere(why, sql, params, error)
        if self.db.routing_is_promoted():
            return self._execute_elsewhere("it was promoted: it is a primary now", sql, params, None)
        return result

    def _execute_elsewhere(self, why: str, sql: Any, params: Any, error: Error | None) -> Any:
        name = getattr(self.cursor, "name", None)
        alias = self.db.routing_leave(why)
        try:
            # The other connection's cursor has its own way out, so this ends at the primary.
            other = connections[alias].chunked_cursor() if name else connections[alias].cursor()
        except Error as second:
            raise second from error
        self.cursor = other
        return other.execute(sql, params)


class FailoverCursorWrapper(FailoverMixin, CursorWrapper):
    pass


class FailoverCursorDebugWrapper(FailoverMixin, CursorDebugWrapper):
    pass
