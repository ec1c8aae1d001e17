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
from psycopg import generators
from psycopg.adapt import Transformer
from psycopg.pq import ExecStatus, TransactionStatus

from django_scaledb.routing.statements import Kind, classify
from django_scaledb.routing.token import parse_lsn

if TYPE_CHECKING:
    from django_scaledb.routing.writes import WriteTracker

    _Cursor = psycopg.Cursor[Any]
    _Wrapper = CursorWrapper
else:
    _Cursor = _Wrapper = object

FATAL_ERROR = int(ExecStatus.FATAL_ERROR)
_IDLE = int(TransactionStatus.IDLE)
_CAN_BEGIN = hasattr(psycopg.Connection, "_get_tx_start_command")
_KNOWN = all(hasattr(psycopg.Cursor, name) for name in ("_reset", "_convert_query", "_set_results"))
#: What goes before a statement in its message, what behind it, and which of the results is the statement's.
Around = tuple[bytes, bytes, int]

_REPLAYED: Around = (b"", b"\n;SELECT pg_last_wal_replay_lsn()", 0)


def receive(pgconn: Any) -> Any:
    """What psycopg waits for after a query: nearly always all of it is sent by now."""
    return generators.execute(pgconn) if pgconn.flush() else generators.fetch_many(pgconn)


class _AroundMixin(_Cursor):
    """Sends more than a statement in its message, and keeps the other results from the caller.

    psycopg has no way to ask for this, so its inner methods are used. Where it does not have them, the others
    are sent separately.
    """

    def routing_run(self, query: Any, params: Any, around: Around) -> list[Any]:
        """What `execute` does, in one message with what goes around it; returns all results of the
        message."""
        before, behind, which = around
        connection, pgconn = self._conn, self._pgconn
        if self.closed:
            raise psycopg.InterfaceError("the cursor is closed")
        with connection.lock:
            self._reset()
            if self._last_query is not query:
                self._last_query = None
                self._tx = Transformer(self)
            composed = self._query = self._convert_query(query, params)
            pgconn.send_query(before + composed.query + behind)
            results: list[Any] = connection.wait(receive(pgconn))
        # After an error PostgreSQL runs nothing that follows.
        if (last := results[-1]).status == FATAL_ERROR:
            raise psycopg.errors.error_from_result(last, encoding=self._encoding).with_traceback(None)
        self._set_results(results[which : which + 1])
        self._last_query = query
        return results

    def routing_can_add(self) -> bool:
        """Whether statements go to the server as one text, which takes more of them."""
        return _KNOWN and isinstance(self, psycopg.ClientCursor) and not self._conn._pipeline

    def routing_can_begin(self) -> bool:
        """Whether psycopg would send a BEGIN before the next statement, and it can be sent with that."""
        connection: Any = self._conn
        return (
            _CAN_BEGIN
            and not connection.autocommit
            and self._pgconn.transaction_status == _IDLE
            and not connection._tpc
            and self.routing_can_add()
        )


class TrackingCursorMixin(_AroundMixin):
    """On a primary: tells the connection's tracker what it runs."""

    routing_tracker: WriteTracker | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        tracker = self.routing_tracker
        if tracker is None or (
            type(query) is str
            and classify(query) is Kind.READ
            and (self._conn.autocommit or self._pgconn.transaction_status != _IDLE)
        ):
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
        position = self.routing_run(query, params, _REPLAYED)[-1].get_value(0, 0)
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
