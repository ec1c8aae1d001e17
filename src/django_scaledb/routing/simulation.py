"""A replica that is behind, without a standby: for tests of an application.

::

    class ReviewTests(TransactionTestCase):
        databases = {"default", "replica1"}

        def test_a_review_is_shown_at_once(self):
            with simulated_lag():
                self.client.post("/reviews/", {...})
                self.assertContains(self.client.get("/reviews/"), "...")   # fails when it is read too early

Inside, the replicas answer from a snapshot of the test database as it was when the block began, and routing
treats them as standbys that have replayed just that: a read that routing lets through too early, or that
bypasses it, sees old data. Rows must be committed to be seen at all, which is what `TransactionTestCase`
(pytest-django: ``django_db(transaction=True, databases=[...])``) is for; in a `TestCase` everything is one
transaction, and all reads go to the primary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db import connections
from psycopg.pq import TransactionStatus

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.routing import monitor, queries, state
from django_scaledb.routing import registry as registries
from django_scaledb.routing.replicas import UNKNOWN, ReplicaSet
from django_scaledb.routing.token import Layout, parse_lsn


class SimulatedLag:
    """Replicas that stand still: `catch_up()` lets them have what is committed by now."""

    def __init__(self, members: ReplicaSet, seconds: float | None) -> None:
        self.members = members
        self.seconds = seconds
        self.snapshot = ""
        self._taken_at = 0.0
        self._lock = threading.Lock()
        self._holder: psycopg.Connection[Any] | None = None

    def catch_up(self) -> None:
        """From now on the replicas answer with everything that is committed now."""
        with self._lock:
            if self._holder is not None:
                self._holder.rollback()
            else:
                self._holder = psycopg.connect(**monitor.parameters(self.members.primary))
                timeline, page, segment = self._row(queries.PRIMARY_LOG)
                (system,) = self._row(queries.SYSTEM)
                self.members.learn_identity(int(system), timeline, Layout(page, segment))
            # The position first: what is committed between the two is in the snapshot, and no harm.
            (lsn,) = self._row("SELECT pg_current_wal_insert_lsn()::text")
            self._holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            (self.snapshot,) = self._row("SELECT pg_export_snapshot()")
            self._taken_at = time.monotonic()
        for replica in self.members.replicas.values():
            self.members.replica_at(replica, parse_lsn(lsn), own_lag=0.0, latency=0.001)

    def _row(self, query: str) -> Any:
        assert self._holder is not None
        return self._holder.execute(query.encode()).fetchone()

    def look(self) -> None:
        """Catch up when it is time; called when a read found the replicas too old."""
        if self.seconds is not None and time.monotonic() - self._taken_at >= self.seconds:
            self.catch_up()

    def enter(self, wrapper: Any) -> None:
        """Let the connection of a replica answer from the snapshot."""
        self.look()
        wrapper.ensure_connection()
        connection = wrapper.connection
        status = connection.pgconn.transaction_status
        if status == TransactionStatus.INTRANS and wrapper.routing_snapshot == self.snapshot:
            return
        if status != TransactionStatus.IDLE:
            connection.rollback()
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute(f"SET TRANSACTION SNAPSHOT '{self.snapshot}'")
        wrapper.routing_snapshot = self.snapshot

    def end(self) -> None:
        if self._holder is not None:
            self._holder.close()


@contextmanager
def simulated_lag(seconds: float | None = None, *, primary: str = "default") -> Iterator[SimulatedLag]:
    """The replicas of `primary` stand still inside; with `seconds` they catch up each time that has passed.

    Raises `ConfigurationError` when `primary` has no replica. Connections of other threads to the replicas
    must be closed before the block ends.
    """
    members = registries.registry().sets.get(primary)
    if members is None or not members.replicas:
        raise ConfigurationError(f"SCALEDB gives {primary!r} no replica whose lag could be simulated")
    was_mirror, was_started, was_ready = members.is_test_mirror, members.started, members.ready.is_set()
    lag = SimulatedLag(members, seconds)
    members.is_test_mirror, members.started = False, True
    members.simulation = lag
    members.wake, wake = lambda _: lag.look(), members.wake
    members.ready.set()
    registries.changed()
    outer = state.frame()
    state.current.set(state.Frame(state.Scope(), None, outer, owner=lag))
    try:
        lag.catch_up()
        yield lag
    finally:
        state.leave(lag)
        for alias in members.replicas:
            connections[alias].close()
        members.simulation = None
        members.is_test_mirror, members.started, members.wake = was_mirror, was_started, wake
        if not was_ready:
            members.ready.clear()
        for replica in members.replicas.values():
            replica.why_out, replica.floor = UNKNOWN, 0
        members.publish()
        registries.changed()
        lag.end()
