"""The session of a run: its name, its timeouts, the lock that admits one run per database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import AnotherRunInProgress, DDLError
from django_scaledb.postgres.pooling import require_session

RUN_LOCK = (0x5CA1EDB, 1)
"""The advisory lock (two-key form, per database) that a run holds: pg_locks.classid and objid."""

MINIMUM_VERSION = 140000
"""DETACH PARTITION .. CONCURRENTLY came with PostgreSQL 14."""

OTHER_RUN_SECONDS = 5.0
"""How long a run waits for another one to end: long enough for what a killed run left behind."""

_OTHER_RUN_POLL_SECONDS = 0.1

_WANTED = {
    # Steps bound their own statements; a role's statement_timeout is meant for its queries.
    "statement_timeout": "0",
    # A session whose client was killed ends soon, even while it waits for a lock.
    "client_connection_check_interval": "500",
    # Only read, to be set back: steps set it.
    "lock_timeout": None,
}


class RunSession:
    """Prepares a Django connection for a run, and sets everything back (a context manager).

    With ``alone=False`` it does without the run's lock.

    Entering raises `AnotherRunInProgress` when another run does not end within
    `OTHER_RUN_SECONDS`. Inside a transaction of the caller the run's lock is kept until that ends.
    """

    def __init__(
        self, connection: BaseDatabaseWrapper, name: str, *, patience: float, alone: bool = True
    ) -> None:
        self._alone = alone
        self.connection = connection
        self._name = name
        self._patience = min(patience, OTHER_RUN_SECONDS)
        self._found: dict[str, str] | None = None

    @property
    def is_open(self) -> bool:
        return self._found is not None

    def __enter__(self) -> Self:
        self._refuse_unsuitable()
        with self.connection.cursor() as cursor:
            names = ["application_name", *_WANTED]
            cursor.execute("SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", [names])
            self._found = dict(cursor.fetchall())
        try:
            self._set({"application_name": self._name} | {k: v for k, v in _WANTED.items() if v is not None})
            if self._alone:
                self._take_run_lock()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        found, self._found = self._found, None
        if found is None or self.connection.connection is None:
            return
        # A connection that died has taken all of it along, and so has a transaction of the caller.
        with suppress(DatabaseError, InterfaceError):
            if self._alone and not self.connection.in_atomic_block:
                with self.connection.cursor() as cursor:
                    cursor.execute("SELECT pg_advisory_unlock(%s, %s)", RUN_LOCK)
            self._set(found)

    def abandon(self) -> None:
        """Close the connection, which was lost, so that Django makes a new one when asked to."""
        self._found = None
        self.connection.close()

    def _refuse_unsuitable(self) -> None:
        connection = self.connection
        if connection.vendor != "postgresql":
            raise DDLError(f"the database {connection.alias!r} is not PostgreSQL")
        connection.ensure_connection()
        version: int = connection.pg_version  # type: ignore[attr-defined]  # PostgreSQL's wrapper has it
        if version < MINIMUM_VERSION:
            raise DDLError(
                f"the database {connection.alias!r} is PostgreSQL {version // 10000}; 14 or later is needed"
            )
        if not connection.in_atomic_block and not connection.get_autocommit():
            raise DDLError(f"the connection {connection.alias!r} is not in autocommit mode")
        if not connection.in_atomic_block:
            require_session(connection)

    def _set(self, values: dict[str, str]) -> None:
        with self.connection.cursor() as cursor:
            for name, value in values.items():
                cursor.execute("SELECT set_config(%s, %s, false)", [name, value])

    def _take_run_lock(self) -> None:
        # The transaction's form is set free with the caller's COMMIT, when others can see the work.
        function = "pg_try_advisory_lock"
        if self.connection.in_atomic_block:
            function = "pg_try_advisory_xact_lock"
        until = time.monotonic() + self._patience
        while True:
            with self.connection.cursor() as cursor:
                cursor.execute(f"SELECT {function}(%s, %s)", RUN_LOCK)
                if cursor.fetchone()[0]:
                    return
            if time.monotonic() >= until:
                raise AnotherRunInProgress(
                    f"another django_scaledb run is changing this database's schema ({self._other_run()}); "
                    "run again when it has ended"
                )
            time.sleep(_OTHER_RUN_POLL_SECONDS)

    def _other_run(self) -> str:
        with self.connection.cursor() as cursor:
            cursor.execute(
                "SELECT l.pid, a.application_name, extract(epoch FROM clock_timestamp() - a.backend_start)"
                "::float8 FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid) "
                "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 "
                "AND l.classid = %s AND l.objid = %s "
                "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                RUN_LOCK,
            )
            row = cursor.fetchone()
        if row is None:
            return "it ended just now"
        pid, name, seconds = row
        since = f", connected for {seconds:.0f} s" if seconds is not None else ""
        return f'pid {pid}, application_name "{name or ""}"{since}'


@contextmanager
def only_one(connection: BaseDatabaseWrapper, key: tuple[int, int], what: str) -> Iterator[None]:
    """Hold the advisory lock `key` while the block runs; it goes with the session of a killed run.

    Raises `AnotherRunInProgress`, which says `what` the other one is doing, when it is not set free
    within `OTHER_RUN_SECONDS`.
    """

    def ask(function: str) -> bool:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {function}(%s, %s)", key)
            return bool(cursor.fetchone()[0])

    until = time.monotonic() + OTHER_RUN_SECONDS
    while not ask("pg_try_advisory_lock"):
        if time.monotonic() >= until:
            raise AnotherRunInProgress(f"another session is {what}; run again when it has ended")
        time.sleep(_OTHER_RUN_POLL_SECONDS)
    try:
        yield
    finally:
        raw = connection.connection
        if raw is not None and not raw.closed:
            with suppress(DatabaseError, InterfaceError):  # a session that died has set it free
                ask("pg_advisory_unlock")
