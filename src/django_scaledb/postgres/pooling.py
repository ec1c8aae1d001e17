"""Whether a pooler stands between us and the server, and gives each transaction another session.

A session's lock or setting that is made through such a pool (PgBouncer's ``pool_mode = transaction``) stays
with a server session that somebody else gets next.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import DDLError

_LOOKS = 3
_PROTOCOL_VIOLATION = "08P01"
#: Seconds that a second session may take; where the pool has none to give, nothing is proven.
_PATIENCE = 2.0


def require_session(connection: BaseDatabaseWrapper) -> None:
    """Raise `DDLError` when `connection`, on which no transaction is open, has no session of its own."""
    if is_shared_by_transactions(connection):
        raise DDLError(
            f"the connection {connection.alias!r} goes through a pool in transaction mode (PgBouncer's "
            "pool_mode), where locks and timeouts of this run would be left with somebody else; add an alias "
            "to DATABASES that goes to the server itself, and name it: --using ALIAS"
        )


def is_shared_by_transactions(connection: BaseDatabaseWrapper) -> bool:
    """Whether two transactions of `connection` may be run by two sessions of the server.

    A server names its process when a connection is made; a pooler makes up a number. Only then is a second
    connection opened: the session that it gets cannot be ours, unless the pool gives ours away between
    two transactions.
    """
    raw = connection.connection
    assert raw is not None
    ours = _pid(raw)
    if ours == raw.info.backend_pid:
        return False
    parameters = {"connect_timeout": 2, **connection.get_connection_params(), "autocommit": True}
    for name in ("cursor_factory", "context", "prepare_threshold"):
        parameters.pop(name, None)
    try:
        with psycopg.connect(**parameters) as other, _at_most(_PATIENCE, other):
            return any(_gives_away(raw, ours, other) for _ in range(_LOOKS))
    except psycopg.Error as error:
        # In statement mode a transaction is refused.
        return error.sqlstate == _PROTOCOL_VIOLATION


def _gives_away(raw: Any, ours: int, other: psycopg.Connection[Any]) -> bool:
    with other.transaction():
        return _pid(other) == ours or _pid(raw) != ours


@contextmanager
def _at_most(seconds: float, connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Cut `connection` off after `seconds`: a pool with nothing left lets its clients wait for minutes."""

    def cut() -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    alarm = threading.Timer(seconds, cut)
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _pid(raw: Any) -> int:
    row = psycopg.ClientCursor(raw).execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])
