"""The monitor: one thread of each process that reads, which asks every server of a set how it is.

It holds one connection to each server, and asks every ``POLL_INTERVAL`` seconds, and at once when its
connection ends or a read failed. While somebody waits for a replica to replay something, the replicas
are asked after one millisecond, then less and less often, and a hundred times a second at most on average. A
server that does not answer within ``READ_DEADLINE`` seconds is frozen: the sockets of its connections are
shut down, so that reads in flight fail, and go elsewhere.

The thread starts with the first routed read and ends with the process; a forked child starts its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from django_scaledb.routing import queries, sockets
from django_scaledb.routing.replicas import Replica, ReplicaSet
from django_scaledb.routing.token import Layout, parse_lsn

logger = logging.getLogger("django_scaledb.routing")
_Connection = psycopg.AsyncConnection[TupleRow]

#: At most so often a server is asked on average, in seconds, however many wait.
_FASTEST = 0.01
#: A replay that somebody waits for is mostly a matter of a millisecond: so soon a replica is asked again, and
#: each time half as long again after that.
_SOONEST = 0.001
_SLOWER = 1.5
#: So many questions a replica may be asked sooner than `_FASTEST`, if it was left in peace before.
_BURST = 16
#: So long somebody who waited for a replica is taken to be waiting still.
_DEMAND = 0.1
_CONNECT_DEADLINE = 2.0


class _Unusable(Exception):
    """A server answered, and is not what it should be; the text says how."""


class Monitor:
    """The thread and its event loop; looks after any number of sets."""

    def __init__(self) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run, name="django_scaledb-monitor", daemon=True)
        self._watches: dict[_Watch, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._thread.start()

    def watch(self, members: ReplicaSet) -> None:
        self._loop.call_soon_threadsafe(self._begin, members)

    def stop(self) -> None:
        """End the thread; its connections are closed."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._thread.join(5)

    async def _end(self) -> None:
        for watch in self._watches:
            watch.stop()
        if self._watches:
            await asyncio.wait(self._watches.values(), timeout=3)
        self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _begin(self, members: ReplicaSet) -> None:
        primary = _PrimaryWatch(members)
        replicas = [_ReplicaWatch(members, replica, primary) for replica in members.replicas.values()]
        for watch in (primary, *replicas):
            self._watches[watch] = self._loop.create_task(watch.run())
        last = {True: 0.0, False: 0.0}

        def wake(all_servers: bool) -> None:
            # Called by threads that read: not more often than it helps.
            now = time.monotonic()
            if all_servers:
                if now - last[True] < _FASTEST:
                    return
                wakers = [primary.wake, *(each.wake for each in replicas)]
            else:
                if now - last[False] < _SOONEST or all(each.hurries for each in replicas):
                    return
                wakers = [each.hurry for each in replicas]
            last[all_servers] = now
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(lambda: [each() for each in wakers])

        members.wake = wake


class _Watch:
    """Asks one server, over and over."""

    def __init__(self, members: ReplicaSet, alias: str) -> None:
        self.members = members
        self.alias = alias
        self.connection: _Connection | None = None
        self._woken = asyncio.Event()
        self._demand_until = 0.0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        self._stopped.set()
        self._cut()
        self._woken.set()

    def _cut(self) -> None:
        """End what the connection waits for. Cancelling it would make psycopg ask the server to cancel, and
        wait."""
        if self.connection is not None and not self.connection.closed:
            with socket.socket(fileno=os.dup(self.connection.fileno())) as duplicate, suppress(OSError):
                duplicate.shutdown(socket.SHUT_RDWR)

    async def _within(self, answer: Coroutine[Any, Any, None], deadline: float) -> None:
        task = asyncio.ensure_future(answer)
        done, _ = await asyncio.wait([task], timeout=deadline)
        if not done:
            self._cut()
            with suppress(Exception):
                await task
            raise TimeoutError
        await task

    def wake(self) -> None:
        self._demand_until = time.monotonic() + _DEMAND
        self._woken.set()

    async def run(self) -> None:
        try:
            while not self._stopped.is_set():
                begun = time.monotonic()
                try:
                    await self._round()
                except (TimeoutError, psycopg.errors.ConnectionTimeout):
                    await self._disconnect()
                    self.frozen()
                except _Unusable as error:
                    await self._disconnect()
                    self.failed(str(error))
                except Exception as error:
                    await self._disconnect()
                    if self._stopped.is_set():
                        break
                    if not isinstance(error, psycopg.Error | OSError):
                        logger.exception(
                            "the monitor stumbled over %s", self.alias, extra={"alias": self.alias}
                        )
                    self.failed(_first_line(error))
                await self._pause(time.monotonic() - begun)
        finally:
            await self._disconnect()

    async def _round(self) -> None:
        deadline = self.members.config.read_deadline
        connection: Any = self.connection
        if connection is None:
            found = await asyncio.to_thread(parameters, self.alias)
            # psycopg waits two seconds at least, for each address.
            self.connection = connection = await asyncio.wait_for(
                psycopg.AsyncConnection.connect(**found), max(deadline, _CONNECT_DEADLINE)
            )
            # Not what instruments psycopg may have put there: several looks a second are no use in a trace.
            connection.cursor_factory = psycopg.AsyncCursor
            await self._within(self.connected(connection), deadline)
        await self._within(self.ask(connection), deadline)

    async def _pause(self, spent: float) -> None:
        """Until the next round is due; less when it is wanted, or when the connection ends."""
        connection = self.connection
        loop = asyncio.get_running_loop()
        hurry = self._hurry()
        wait = self.members.config.poll_interval
        if time.monotonic() < self._demand_until:
            wait = _FASTEST
        descriptor = -1
        if connection is not None and not connection.closed:
            descriptor = connection.fileno()
            loop.add_reader(descriptor, self._woken.set)
        try:
            if hurry is None and wait > _FASTEST:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), wait)
                hurry = self._hurry()
            # Also after a call: not too often.
            rest = _FASTEST - spent if hurry is None else hurry
            if rest > 0:
                await asyncio.sleep(rest)
        finally:
            if descriptor >= 0:
                loop.remove_reader(descriptor)
            self._woken.clear()

    def _hurry(self) -> float | None:
        """In how many seconds somebody who waits wants the next look; None when nobody waits."""
        return None

    async def _disconnect(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with suppress(Exception):
                await connection.close()

    async def _rows(self, connection: _Connection, query: str) -> TupleRow:
        cursor = await connection.execute(query.encode())
        row = await cursor.fetchone()
        if row is None:
            raise _Unusable("it gave no answer")
        return row

    async def _system(self, connection: _Connection) -> int:
        try:
            return int((await self._rows(connection, queries.SYSTEM))[0])
        except psycopg.errors.InsufficientPrivilege:
            return 0

    async def connected(self, connection: _Connection) -> None: ...

    async def ask(self, connection: _Connection) -> None: ...

    def failed(self, why: str) -> None: ...

    def frozen(self) -> None: ...


class _PrimaryWatch(_Watch):
    def __init__(self, members: ReplicaSet) -> None:
        super().__init__(members, members.primary)
        self.first_look = asyncio.Event()
        self._system_identifier = 0

    async def connected(self, connection: _Connection) -> None:
        self._system_identifier = await self._system(connection)
        timeline, page, segment = await self._rows(connection, queries.PRIMARY_LOG)
        if not timeline:
            raise _Unusable("it is a standby")
        known = self.members.identity
        if known.system == self._system_identifier and timeline < known.timeline:
            raise _Unusable(f"it is on timeline {timeline}, which ended when timeline {known.timeline} began")
        self.members.learn_identity(self._system_identifier, timeline, Layout(page, segment))

    async def ask(self, connection: _Connection) -> None:
        floors = {replica.alias: replica.floor for replica in self.members.replicas.values()}
        when = time.monotonic()
        in_recovery, lsn = await self._rows(connection, queries.PRIMARY_STATE)
        if in_recovery:
            raise _Unusable("it is a standby")
        self.members.primary_at(parse_lsn(lsn), when, floors)
        self.first_look.set()

    def failed(self, why: str) -> None:
        self.members.primary_failed(why)
        self.first_look.set()

    def frozen(self) -> None:
        self.failed(f"it did not answer within {self.members.config.read_deadline:g} s")


class _ReplicaWatch(_Watch):
    def __init__(self, members: ReplicaSet, replica: Replica, primary: _PrimaryWatch) -> None:
        super().__init__(members, replica.alias)
        self.replica = replica
        self.primary = primary
        #: Somebody waits for a replay, and it is looked for.
        self.hurries = False
        self._was_away = False
        self._away_since = 0.0
        self._step = 0.0
        self._credit = float(_BURST)
        self._credit_at = 0.0

    def hurry(self) -> None:
        self._woken.set()

    def _hurry(self) -> float | None:
        members, now = self.members, time.monotonic()
        began = not self.hurries
        self.hurries = (
            self.connection is not None
            and self.replica.floor < members.wanted
            and now < members.wanted_at + _DEMAND
        )
        if not self.hurries:
            return None
        self._credit = min(_BURST, self._credit + (now - self._credit_at) / _FASTEST)
        self._credit_at = now
        if began:
            self._step = 0.0
        else:
            self._step = min(_FASTEST, self._step * _SLOWER or _SOONEST)
        if self._credit < 1:
            return _FASTEST
        self._credit -= 1
        return self._step

    async def run(self) -> None:
        # A replica is judged by the primary's position: that one first, unless it does not answer.
        with suppress(TimeoutError):
            await asyncio.wait_for(self.primary.first_look.wait(), self.members.config.read_deadline)
        await super().run()

    async def connected(self, connection: _Connection) -> None:
        system = await self._system(connection)
        # After an answer: a pooler lets clients in while its server is gone.
        if self._was_away:
            self.replica.up_since = time.monotonic()
            self._was_away = False
        known = self.members.identity
        if not known.timeline:  # the primary was never seen: its replica knows as much
            row = await self._rows(connection, "SELECT timeline_id FROM pg_control_checkpoint()")
            self.members.learn_identity(system, row[0], Layout())
        elif system and known.system and system != known.system:
            raise _Unusable(f"it belongs to cluster {system}, its primary to cluster {known.system}")

    async def ask(self, connection: _Connection) -> None:
        begun = time.monotonic()
        in_recovery, lsn, own_lag, age = await self._rows(connection, queries.REPLICA_STATE)
        if not in_recovery:
            raise _Unusable("it was promoted: it is a primary now")
        latency = time.monotonic() - begun
        self.replica.is_frozen = False
        self.members.replica_at(self.replica, parse_lsn(lsn), own_lag=own_lag, age=age, latency=latency)
        self._looked()

    def failed(self, why: str) -> None:
        now = time.monotonic()
        if not self._was_away:
            self._away_since = now
        elif now - self._away_since >= self.members.config.read_deadline:
            # A pooler refuses new clients at once, and lets a read wait that came just before.
            sockets.shut_down(self.alias)
        self._was_away = True
        self.members.replica_out(self.replica, why, forget=True)
        self._looked()

    def frozen(self) -> None:
        self.replica.is_frozen = True
        self.failed(f"it did not answer within {self.members.config.read_deadline:g} s")
        sockets.shut_down(self.alias)

    def _looked(self) -> None:
        from django_scaledb.routing.replicas import UNKNOWN

        if all(r.why_out != UNKNOWN for r in self.members.replicas.values()):
            self.members.ready.set()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def parameters(alias: str) -> dict[str, Any]:
    """How Django connects to `alias`, less what is only for its own connections."""
    from django.db import connections

    wrapper = connections.create_connection(alias)
    found = wrapper.get_connection_params()
    for name in ("cursor_factory", "context", "prepare_threshold"):
        found.pop(name, None)
    found.update(
        autocommit=True,
        prepare_threshold=None,
        connect_timeout=2,
        application_name="django_scaledb monitor",
    )
    return found


_monitor: Monitor | None = None
_lock = threading.Lock()
#: What a child inherited from its parent, never used nor closed: the sockets are the parent's.
_inherited: list[object] = []


def watch(members: ReplicaSet) -> None:
    """Look after `members` from now on, in a thread that all sets of this process share."""
    global _monitor
    with _lock:
        if _monitor is None:
            _monitor = Monitor()
            _monitor.start()
        _monitor.watch(members)


def stop() -> None:
    """End the thread, if there is one; the next routed read starts another."""
    global _monitor
    with _lock:
        running, _monitor = _monitor, None
    if running is not None:
        running.stop()


def abandon() -> None:
    """In a forked child: the thread stayed with the parent."""
    global _lock, _monitor
    _lock = threading.Lock()
    _inherited.append(_monitor)
    _monitor = None
    sockets.abandon()


def is_running() -> bool:
    return _monitor is not None
