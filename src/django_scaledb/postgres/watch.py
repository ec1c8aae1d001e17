"""A second connection that cuts short what lock_timeout cannot tell apart.

``DETACH PARTITION .. CONCURRENTLY`` waits for old transactions to end, which may take long and
harms nobody, and then for locks on the partition and on both ends of foreign keys, behind which
other clients queue. PostgreSQL has one lock_timeout for both and allows no NOWAIT. So the
statement runs with a long timeout, and a watcher cancels it as soon as it stands in the queue of a
table.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper

QUEUE_MS = 40
"""How long at most, in milliseconds, other clients may stand behind a lock we wait for."""

_POLL_SECONDS = 0.01

# Modes that stop writers or readers; a wait for a weaker one makes nobody queue.
_STANDS_IN_THE_WAY = """
    SELECT EXISTS (
        SELECT FROM pg_locks WHERE pid = %s AND NOT granted AND locktype = 'relation' AND mode IN
            ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    )
"""


class Watcher:
    """Cancels the statement of one session when it waits for a lock that makes others queue."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        parameters = {**connection.get_connection_params(), "application_name": "django_scaledb watch"}
        for name in ("cursor_factory", "context", "prepare_threshold"):
            parameters.pop(name, None)
        self._session = psycopg.connect(**parameters, autocommit=True)
        # Not what instruments psycopg may have put there: a hundred looks a second are no use in a trace.
        self._session.cursor_factory = psycopg.Cursor

    @contextmanager
    def watch(self, pid: int) -> Iterator[Watch]:
        """Watches the session `pid` while the block runs."""
        watch = Watch(self._session, pid)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()

    @property
    def is_closed(self) -> bool:
        return self._session.closed

    def close(self) -> None:
        with suppress(psycopg.Error):
            self._session.close()


class Watch(threading.Thread):
    """One watched statement; `cancelled` says that we ended it."""

    def __init__(self, session: psycopg.Connection[tuple[object, ...]], pid: int) -> None:
        super().__init__(daemon=True, name=f"django_scaledb watch of {pid}")
        self._session = session
        self._pid = pid
        self._over = threading.Event()
        self.cancelled = False

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        # A watcher that lost its connection ends quietly: the statement's own timeouts remain.
        with suppress(psycopg.Error):
            queued = 0
            while not self._over.wait(_POLL_SECONDS):
                # wait_event is one look at one session; pg_locks is asked only when it waits.
                queued = queued + 1 if self._waits_for_table() and self._is_in_the_way() else 0
                if queued * _POLL_SECONDS * 1000 >= QUEUE_MS / 2 and not self._over.is_set():
                    self.cancelled = True
                    self._session.execute("SELECT pg_cancel_backend(%s)", [self._pid])
                    return

    def _waits_for_table(self) -> bool:
        row = self._session.execute(
            "SELECT wait_event = 'relation' FROM pg_stat_get_activity(%s)", [self._pid]
        ).fetchone()
        return bool(row and row[0])

    def _is_in_the_way(self) -> bool:
        row = self._session.execute(_STANDS_IN_THE_WAY, [self._pid]).fetchone()
        return bool(row and row[0])
