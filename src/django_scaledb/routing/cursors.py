"""Cursors of routed connections: psycopg's with the position of what they did, Django's with a way out."""

from __future__ import annotations

from collections.abc import Iterator
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

_REPLAYED = ";SELECT pg_last_wal_replay_lsn()"


class TrackingCursorMixin(_Cursor):
    """On a primary: tells the connection's tracker what it runs."""

    routing_tracker: WriteTracker | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        if self.routing_tracker is None:
            return super().execute(query, params, **options)
        return self.routing_tracker.execute(self, super().execute, query, params, options)

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


class PositionCursorMixin(_Cursor):
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
            or not isinstance(self, psycopg.ClientCursor)
            or classify(query) not in (Kind.READ, Kind.MAYBE)
        ):
            return super().execute(query, params, **options)
        text = query if params is None else self.mogrify(query, params)
        result = super().execute(f"{text.rstrip().rstrip(';')}\n{_REPLAYED}".encode())
        position = self._results.pop().get_value(0, 0)
        if position is not None:  # None on a primary
            wrapper.routing_read_at(parse_lsn(position.decode()))
        return result


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
