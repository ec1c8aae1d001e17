"""Recognises writes on a primary's connection, and learns the log position behind each.

The position must be taken AFTER the commit (replay passes one taken before it while the rows are not yet
visible), and from `pg_current_wal_insert_lsn()` (with ``synchronous_commit = off`` the written and the
flushed position are too low). It is asked for in the same message as the COMMIT, so that it costs no round
trip:

- the first statement of a transaction is sent with its BEGIN, for which psycopg makes a round trip: that is
  more than the position costs;
- a transaction that may have written ends with ``COMMIT; SELECT pg_current_wal_insert_lsn()``;
- one that may have, a function for instance, is also asked whether it has a transaction id;
- one whose statements only read, as far as their text tells, is asked for nothing else: a view or an operator
  that writes is not missed, and a transaction that only read is no write;
- a single statement in autocommit mode is sent as ``BEGIN; statement; COMMIT; SELECT ...``.

Should PostgreSQL find fault with the text of a statement that was sent behind a BEGIN, it is sent again by
itself, so that the error's position is right.

What must not stand in a transaction block (COPY, DO, CALL, DDL, several statements) is run as it is, and the
position fetched after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import TransactionStatus

from django_scaledb.routing import queries
from django_scaledb.routing.cursors import FATAL_ERROR, Around, receive
from django_scaledb.routing.state import current, outermost
from django_scaledb.routing.statements import Kind, classify
from django_scaledb.routing.token import Identity, Layout

if TYPE_CHECKING:
    from django_scaledb.routing.replicas import ReplicaSet

_POSITION = b"SELECT pg_current_wal_insert_lsn()"
_HAS_WRITTEN = b"SELECT pg_current_xact_id_if_assigned() IS NOT NULL"
_COMMIT = b"COMMIT;" + _POSITION
_ASK_AND_COMMIT = _HAS_WRITTEN + b";" + _COMMIT
_ASK_ONLY = _HAS_WRITTEN + b";COMMIT"
# A line of its own: the statement may end in a comment.
_SINGLE: Around = (b"BEGIN;", b"\n;" + _COMMIT, 1)
_SINGLE_IN_DOUBT: Around = (b"BEGIN;", b"\n;" + _ASK_AND_COMMIT, 1)
#: A process whose monitor does not run asks again whose log it writes to, at most so often, in seconds.
_IDENTITY_AGE = 1.0

_HARMLESS = frozenset([Kind.READ, Kind.NEUTRAL])
_MAY_FOLLOW_BEGIN = frozenset([Kind.READ, Kind.WRITE, Kind.MAYBE])
# As plain numbers: looking up a member of an Enum takes longer than all that is done with it.
_IDLE, _IN_TRANSACTION = int(TransactionStatus.IDLE), int(TransactionStatus.INTRANS)


class WriteTracker:
    """Of one primary's connection: whether its transaction may have written, and what follows from that."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        #: The open transaction ran something that is not plainly a read.
        self.in_doubt = False
        #: It certainly wrote.
        self.certain = False
        self._connected_at = 0.0
        #: The log that this connection is known to write to.
        self._log: Identity | None = None

    @property
    def members(self) -> ReplicaSet:
        found: ReplicaSet = self.wrapper.routing_set
        return found

    def connected(self) -> None:
        self._connected_at = time.monotonic()
        self._log = None
        self.forget()

    def forget(self) -> None:
        """The transaction is over."""
        self.in_doubt = self.certain = False

    # -- statements

    def execute(
        self, cursor: Any, run: Callable[..., Any], query: Any, params: Any, options: dict[str, Any]
    ) -> Any:
        """Run `query` on `cursor`, whose own method is `run`."""
        kind = classify(query if type(query) is str else _text(query, cursor))
        connection = cursor.connection
        if not self._is_autocommit(connection):
            try:
                if kind in _MAY_FOLLOW_BEGIN and not options and cursor.routing_can_begin():
                    return self._with_begin(cursor, run, query, params)
                return run(query, params, **options)
            finally:
                self._within_transaction(kind, connection)
        if kind is Kind.READ:
            return run(query, params, **options)
        if kind is Kind.WRITE or kind is Kind.MAYBE:
            if not options and cursor.routing_can_add():
                return self._in_one_message(cursor, run, query, params, ask=kind is Kind.MAYBE)
            result = run(query, params, **options)
            self._fetch_position(connection)
            return result
        result = run(query, params, **options)
        if kind is Kind.UNKNOWN:
            self._after_unknown(connection)
        elif kind is Kind.CONTROL:
            self._after_control(connection)
        return result

    def executemany(self, cursor: Any, run: Callable[..., Any], query: Any, params: Any, options: Any) -> Any:
        kind = classify(query if isinstance(query, str) else _text(query, cursor))
        result = run(query, params, **options)
        self.after(kind, cursor.connection)
        return result

    @contextmanager
    def around(self, cursor: Any, query: Any) -> Iterator[None]:
        """For what takes its time: COPY, a result that is streamed."""
        kind = classify(query if isinstance(query, str) else _text(query, cursor))
        try:
            yield
        finally:
            if not cursor.connection.closed:
                self.after(kind, cursor.connection)

    def after(self, kind: Kind, connection: Any) -> None:
        """A statement of this kind was run."""
        if not self._is_autocommit(connection):
            self._within_transaction(kind, connection)
        elif kind not in _HARMLESS:
            self._after_unknown(connection)

    def _is_autocommit(self, connection: Any) -> bool:
        return bool(connection.autocommit) and connection.pgconn.transaction_status == _IDLE

    def _within_transaction(self, kind: Kind, connection: Any) -> None:
        if kind is Kind.CONTROL:
            self._after_control(connection)
        elif kind not in _HARMLESS:
            self.in_doubt = True
            if kind is Kind.WRITE:
                self.certain = True
            elif kind is Kind.UNKNOWN:
                self._after_unknown(connection)

    def _after_unknown(self, connection: Any) -> None:
        """Something ran that may have written, and may have ended a transaction too."""
        self._follow_transaction(connection)
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            self._fetch_position(connection)

    def _after_control(self, connection: Any) -> None:
        """BEGIN, COMMIT and their kin, written by hand."""
        doubtful = self.in_doubt
        self._follow_transaction(connection)
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            if doubtful:
                self._fetch_position(connection)
            self.forget()

    def _follow_transaction(self, connection: Any) -> None:
        """Reads of this thread go to the primary while a transaction is open that was begun by hand."""
        self.wrapper.routing_transaction(
            not connection.autocommit or connection.pgconn.transaction_status != TransactionStatus.IDLE
        )

    # -- messages

    def commit(self, connection: Any) -> bool:
        """Commit and learn the position; False when there is nothing of ours to do, and nothing was done."""
        pgconn = connection.pgconn
        if pgconn.transaction_status != _IN_TRANSACTION or connection._num_transactions:
            self.forget()
            return False
        if pgconn.parameter_status(b"in_hot_standby") == b"on":
            return False
        certain, in_doubt = self.certain, self.in_doubt
        try:
            results = _run(connection, _COMMIT if certain else _ASK_AND_COMMIT if in_doubt else _ASK_ONLY)
        finally:
            self.in_doubt = self.certain = False
        if certain or results[0].get_value(0, 0) == b"t":
            if certain or in_doubt:
                self._arrived(connection, results[-1].get_value(0, 0))
            else:
                self._fetch_position(connection)
        return True

    def _with_begin(self, cursor: Any, run: Callable[..., Any], query: Any, params: Any) -> Any:
        connection = cursor.connection
        try:
            cursor.routing_run(query, params, (connection._get_tx_start_command() + b";", b"", 1))
        except psycopg.Error as error:
            if connection.closed or error.diag.statement_position is None:
                raise
            connection.rollback()
            return run(query, params)
        return cursor

    def _in_one_message(
        self, cursor: Any, run: Callable[..., Any], query: Any, params: Any, *, ask: bool
    ) -> Any:
        connection = cursor.connection
        try:
            results = cursor.routing_run(query, params, _SINGLE_IN_DOUBT if ask else _SINGLE)
        except psycopg.Error as error:
            if connection.closed:
                raise
            connection.rollback()
            if error.diag.statement_position is None:
                raise
            result = run(query, params)
            self._fetch_position(connection)
            return result
        if not ask or results[-3].get_value(0, 0) == b"t":
            self._arrived(connection, results[-1].get_value(0, 0))
        return cursor

    def _fetch_position(self, connection: Any) -> None:
        """Ask for the position by itself; a failure must not look like a failure of the write."""
        try:
            results = _run(connection, _POSITION)
        except psycopg.Error:
            self._arrived(connection, None)
        else:
            self._arrived(connection, results[0].get_value(0, 0))

    def _arrived(self, connection: Any, position: bytes | None) -> None:
        log = self.wrapper._routing_set.identity
        if log is not self._log:
            log = self._find_log(connection)
        (current.get() or outermost()).scope.wrote(log, position)

    def _find_log(self, connection: Any) -> Identity:
        members = self.members
        if not members.identity.timeline or (
            members.primary_seen_at < self._connected_at > members.identity_known_at + _IDENTITY_AGE
        ):
            self._learn_identity(connection)
        self._log = members.identity if members.identity.timeline else None
        return members.identity

    def _learn_identity(self, connection: Any) -> None:
        """Whose log this is. Once a second at most, and only where no monitor knows."""
        try:
            log = _run(connection, queries.PRIMARY_LOG.encode())[0]
            try:
                system = int(_run(connection, queries.SYSTEM.encode())[0].get_value(0, 0))
            except psycopg.errors.InsufficientPrivilege:
                system = 0
        except psycopg.Error:
            return
        timeline, page, segment = (int(log.get_value(0, column)) for column in range(3))
        if timeline:
            self.members.learn_identity(system, timeline, Layout(page, segment))


def _run(connection: Any, query: bytes) -> Any:
    """Send `query` as it is, with no transaction begun for it; its results. Raises what PostgreSQL
    reports."""
    pgconn = connection.pgconn
    with connection.lock:
        pgconn.send_query(query)
        results = connection.wait(receive(pgconn))
    # After an error PostgreSQL runs nothing that follows.
    if results[-1].status == FATAL_ERROR:
        raise psycopg.errors.error_from_result(results[-1])
    return results


def _text(query: Any, cursor: Any) -> str:
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode()
    text: str = query.as_string(cursor)
    return text
