"""The part of the database wrapper that knows replication: writes on a primary, failures of a replica."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import psycopg
from django.db import connections
from django.db.backends.utils import debug_transaction
from django.db.utils import Error, InterfaceError, OperationalError

from django_scaledb.routing import policy, sockets, state
from django_scaledb.routing import registry as registries
from django_scaledb.routing.connecting import Driver, impatient
from django_scaledb.routing.cursors import (
    FailoverCursorDebugWrapper,
    FailoverCursorWrapper,
    PositionCursorMixin,
    TrackingCursorMixin,
    with_mixin,
)
from django_scaledb.routing.replicas import Replica, ReplicaSet
from django_scaledb.routing.router import requirement
from django_scaledb.routing.statements import Kind, classify
from django_scaledb.routing.writes import WriteTracker

if TYPE_CHECKING:
    # django-stubs do not know the methods that a backend overrides.
    _DatabaseWrapper = Any
else:
    _DatabaseWrapper = object

_NOTHING = nullcontext()
#: Seconds; libpq waits two at least.
_CONNECT_TIMEOUT = 2
#: Seconds that a replica's pool has for finding a connection.
_POOL_TIMEOUT = 1.0
# The server went away, or says so: not what was asked for is the reason.
_SERVER_FAULTS = frozenset(["57P01", "57P02", "57P03", "53300", "58000", "58030", "XX000", "25006"])
# A standby gave up a query so that it can go on replaying.
_RECOVERY_CONFLICTS = frozenset(["40001", "40P01"])


class RoutedConnectionMixin(_DatabaseWrapper):  # type: ignore[misc]  # Any
    """What a connection does for routing depends on what ``settings.SCALEDB`` says of its alias.

    A primary with replicas recognises writes and remembers the position behind each. A replica refuses to
    hang, and sends what failed on it elsewhere, unless a transaction is open on it. Any other alias,
    and a primary without replicas, is left as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routing_generation = -1
        self._routing_replica: tuple[ReplicaSet, Replica] | None = None
        self._routing_set: ReplicaSet | None = None
        self._routing_connected_at = 0.0
        #: Of a simulated replica.
        self.routing_snapshot = ""
        self.routing_writes = WriteTracker(self)

    # -- what this connection is

    def _routing_look_up(self) -> None:
        if self._routing_generation != registries.generation:
            registry = registries.registry()
            self._routing_generation = registries.generation
            replica = registry.replicas.get(self.alias)
            self._routing_replica = replica if replica is not None and not replica[0].is_test_mirror else None
            members = registry.sets.get(self.alias)
            has_replicas = members is not None and members.replicas and not members.is_test_mirror
            self._routing_set = members if has_replicas else None

    @property
    def routing_set(self) -> ReplicaSet | None:
        """The set whose primary this is, if it has replicas."""
        self._routing_look_up()
        return self._routing_set

    @property
    def routing_replica(self) -> tuple[ReplicaSet, Replica] | None:
        """The set that this is a replica of, and what is known of it."""
        self._routing_look_up()
        return self._routing_replica

    # -- connecting

    def get_connection_params(self) -> dict[str, Any]:
        params: dict[str, Any] = super().get_connection_params()
        if self.routing_replica is not None:
            params.setdefault("connect_timeout", _CONNECT_TIMEOUT)
            # Where the network drops packets; for a host that stands still the monitor looks.
            params.setdefault("tcp_user_timeout", _CONNECT_TIMEOUT * 1000)
        if (mixin := self._routing_cursor_mixin()) is not None:
            # Below what instruments psycopg, which puts its own class on top of this one.
            params["cursor_factory"] = with_mixin(mixin, params["cursor_factory"])
        return params

    def _routing_cursor_mixin(self) -> type | None:
        if self.routing_set is not None:
            return TrackingCursorMixin
        return PositionCursorMixin if self.routing_replica is not None else None

    @property
    def pool(self) -> Any:
        options = self.settings_dict["OPTIONS"].get("pool")
        if options and self.alias not in self._connection_pools and self.routing_replica is not None:
            # A pool waits for half a minute for a server that is down.
            options = {} if options is True else options
            defaults = {"timeout": _POOL_TIMEOUT, "connection_class": self._routing_connection_class()}
            self.settings_dict["OPTIONS"]["pool"] = {**defaults, **options}
        return super().pool

    def _routing_connection_class(self) -> type[psycopg.Connection[Any]]:
        return impatient(self.alias, "connect_timeout" in self.settings_dict["OPTIONS"])

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        if self.routing_replica is None:
            connection = super().get_new_connection(conn_params)
        else:
            attributes = self.__dict__
            attributes["Database"] = Driver(self._routing_connection_class())
            try:
                connection = super().get_new_connection(conn_params)
            finally:
                del attributes["Database"]
        if self.routing_set is not None:
            self.routing_writes.connected()
        elif self.routing_replica is not None:
            sockets.register(self.alias, connection)
            self._routing_connected_at = time.monotonic()
        return connection

    def _close(self) -> None:
        if self.connection is not None and self.routing_replica is not None and not self.pool:
            sockets.release(self.alias, self.connection)
        super()._close()
        self.routing_transaction(False)
        self.routing_writes.forget()

    # -- transactions of a primary

    def routing_transaction(self, is_open: bool) -> None:
        """Whether this thread's reads must see what this connection's transaction sees."""
        if is_open and self.routing_set is not None:
            state.thread.open[self.alias] = self
            state.open_anywhere.add(id(self))
        else:
            state.open_anywhere.discard(id(self))
            state.thread.open.pop(self.alias, None)

    def _set_autocommit(self, autocommit: bool) -> None:
        super()._set_autocommit(autocommit)
        self.routing_transaction(not autocommit)

    def _commit(self) -> None:
        if self.routing_set is None or self.connection is None:
            super()._commit()
            return
        with (
            debug_transaction(self, "COMMIT") if self.queries_logged else _NOTHING,
            self.wrap_database_errors,
        ):
            done = self.routing_writes.commit(self.connection)
        if not done:
            super()._commit()

    def _rollback(self) -> None:
        super()._rollback()
        self.routing_writes.forget()

    # -- cursors

    def create_cursor(self, name: str | None = None) -> Any:
        members, replica = self.routing_set, self.routing_replica
        if name or (members is None and replica is None):
            return super().create_cursor(name)
        # Again: routing may have been told of the connection since it was made.
        mixin = TrackingCursorMixin if members is not None else PositionCursorMixin
        self.connection.cursor_factory = with_mixin(mixin, self.connection.cursor_factory)
        cursor = super().create_cursor(name)
        if members is not None:
            cursor.routing_tracker = self.routing_writes
        elif replica is not None and len(replica[0].replicas) > 1:
            cursor.routing_wrapper = self
        return cursor

    def make_cursor(self, cursor: Any) -> Any:
        return (
            super().make_cursor(cursor)
            if self.routing_replica is None
            else FailoverCursorWrapper(cursor, self)
        )

    def make_debug_cursor(self, cursor: Any) -> Any:
        if self.routing_replica is None:
            return super().make_debug_cursor(cursor)
        return FailoverCursorDebugWrapper(cursor, self)

    def _cursor(self, name: str | None = None) -> Any:
        replica = self.routing_replica
        if replica is not None and replica[0].simulation is not None:
            replica[0].simulation.enter(self)
            return super()._cursor(name)
        if replica is None or not self._routing_may_leave():
            return super()._cursor(name)
        cause: BaseException | None = None
        try:
            if self.connection is not None and self._routing_is_outdated():
                self.close()
            cursor = super()._cursor(name)
        except (Error, psycopg.Error) as error:
            if not isinstance(error, OperationalError | InterfaceError | psycopg.OperationalError):
                raise
            why, cause = _first_line(error), error
        else:
            if not self.routing_is_promoted():
                return cursor
            why = "it was promoted: it is a primary now"
        alias = self.routing_leave(why)
        other = connections[alias]
        try:
            return other.chunked_cursor() if name else other.cursor()
        except Error as second:
            raise second from cause

    # -- leaving a replica

    def _routing_may_leave(self) -> bool:
        return not self.in_atomic_block and (self.connection is None or self.autocommit)

    def _routing_is_outdated(self) -> bool:
        """Whether the server has been away since this connection was made."""
        replica = self.routing_replica
        return replica is not None and self._routing_connected_at < replica[1].up_since

    def routing_is_promoted(self) -> bool:
        """Whether the server that has just answered is no standby (PostgreSQL reports it unasked, since 14).

        Behind a pooler that does not pass this on, only the monitor knows.
        """
        connection = self.connection
        return (
            connection is not None
            and self.routing_replica is not None
            and self.routing_replica[0].simulation is None
            and connection.pgconn.parameter_status(b"in_hot_standby") == b"off"
            and self._routing_may_leave()
        )

    def routing_why_elsewhere(self, error: BaseException, sql: Any) -> str | None:
        """Why what failed with `error` may succeed on another server; None when it would not."""
        if not self._routing_may_leave():
            return None
        cause = error.__cause__
        if not isinstance(cause, psycopg.Error):
            return None
        if self.connection is None or self.connection.closed:
            return _first_line(cause)
        if cause.sqlstate in _RECOVERY_CONFLICTS:
            return ""
        if cause.sqlstate == "25006":  # a function that writes: a read by its looks
            return "" if isinstance(sql, str) and classify(sql) in (Kind.READ, Kind.MAYBE) else None
        return _first_line(cause) if cause.sqlstate in _SERVER_FAULTS else None

    def routing_leave(self, why: str) -> str:
        """Give up this connection; the alias to go to. `why` is empty when the server is not at fault."""
        replica = self.routing_replica
        if replica is None:
            raise RuntimeError(f"{self.alias} is no replica")
        members = replica[0]
        if why:
            members.read_failed(self.alias, why)
            with self.wrap_database_errors:
                self.close()
        frame = state.frame()
        required, unknown = requirement(members, frame)
        if unknown or not why:
            return members.primary
        others = [
            c
            for c in members.candidates
            if c.alias != self.alias and (required is None or c.floor >= required)
        ]
        return policy.choose(others, members.rng) if others else members.primary

    def routing_read_at(self, lsn: int) -> None:
        """A read on this replica saw no more than `lsn`."""
        if self.routing_replica is None or not self._routing_may_leave():
            return
        position = self.routing_replica[0].read_at(self.alias, lsn)
        if position is not None:
            state.frame().scope.advance(position)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
