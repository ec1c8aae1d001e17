"""The one door for DDL: nothing else in the package changes a table that is in use.

What it promises about every step it runs:

* Nobody stands behind us. Locks that stop readers or writers are asked for with NOWAIT before
  anything else in the transaction is done; weaker ones may wait `lock_timeout`, because a wait for
  them makes nobody queue. Where everybody who blocks is a passer-by (a table that is never quiet)
  we queue, for `QUEUE_MS` at most, and then let them catch up.
* A lock that is not granted is asked for again, after a pause with full jitter, until the deadline
  of the run; then `LockNotAvailable` names who held it.
* One run per database at a time (`RUN_LOCK`), and what is set on the connection is set back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from django.db import Error as DjangoDatabaseError
from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.exceptions import DDLError, LockNotAvailable, ScaleDBError
from django_scaledb.postgres.blockers import Blocker, conflicting, describe, holders
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.session import RUN_LOCK, RunSession
from django_scaledb.postgres.statements import Statement, Step
from django_scaledb.postgres.watch import QUEUE_MS, Watcher

__all__ = ["QUEUE_MS", "RUN_LOCK", "WORK_SECONDS", "Executor", "Waiting", "script"]

WORK_SECONDS = 10
"""How long each statement of a transaction may work; only scans of a default partition take long."""

_LATE_LOCK_TIMEOUT_MS = 100
_PAUSES = (0.05, 1.0)
_PAUSE_AFTER_QUEUE = 0.2

_LOCK_FAILURES = {"55P03", "40P01"}  # lock_not_available, deadlock_detected
_QUERY_CANCELED = "57014"
_INSUFFICIENT_PRIVILEGE = "42501"
_SESSION_ENDED = {"57P01", "57P02", "57P03", "57P05"}

Guard = Callable[[Any], None]
"""Looks again, with a cursor inside the step's transaction and under its locks; raises to stop it."""


@dataclass(frozen=True)
class Waiting:
    """Told to `on_wait` before each pause: what for, since when (seconds), and who is in the way."""

    summary: str
    seconds: float
    blockers: tuple[Blocker, ...]


class _InTheWay(Exception):
    """Somebody holds a lock for which the step must not wait."""


class _CutShort(Exception):
    """Our own watcher or timeout ended a statement."""


class Executor:
    """Runs steps on one connection, as a context manager that lasts as long as the run.

    `lock_timeout` is in milliseconds, `deadline` in seconds from entering; each step is tried once
    even behind the deadline. Entering raises `AnotherRunInProgress`. Inside a transaction of the
    caller transactional steps run in a savepoint, others are refused.

    With ``alone=False`` other runs go on meanwhile: for a step of hours behind which nobody queues
    (CREATE INDEX CONCURRENTLY). Steps with locks that stop others are refused then.
    """

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        *,
        command: str,
        lock_timeout: int,
        deadline: float,
        on_wait: Callable[[Waiting], None] = lambda waiting: None,
        alone: bool = True,
    ) -> None:
        self.connection = connection
        self._alone = alone
        self._lock_timeout = lock_timeout
        self._deadline = deadline
        self._begun = self._ends = 0.0
        self._on_wait = on_wait
        self._session = RunSession(connection, f"django_scaledb {command}", patience=deadline, alone=alone)
        self._watcher: Watcher | None = None

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        self._ends = self._begun + self._deadline
        self._session.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._session.__exit__()

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._ends

    def run(
        self,
        step: Step,
        *,
        patience: float | None = None,
        guard: Guard | None = None,
        resume: Callable[[], Step | None] | None = None,
        bounded: bool = True,
    ) -> None:
        """Do `step`, trying until the deadline, or for `patience` seconds if that is sooner.

        A step outside a transaction may have got halfway when a try failed: `resume` answers with
        the step to go on with, or None when all is done. With ``bounded=False`` a statement may
        work for longer than `WORK_SECONDS`.

        Raises `LockNotAvailable`, or `DDLError` for whatever else PostgreSQL refused.
        """
        if not step.transactional and self.connection.in_atomic_block:
            raise DDLError(f"cannot {step.summary} inside a transaction; do it outside atomic()")
        if not self._alone and any(lock.mode >= LockMode.SHARE for lock in step.locks):
            raise DDLError(f"cannot {step.summary} beside other runs: it takes a lock that stops others")
        begun = time.monotonic()
        until = self._ends if patience is None else min(self._ends, begun + patience)
        pause = _PAUSES[0]
        passing = False
        last_seen: frozenset[str] | None = None
        while True:
            blockers = self._try(step, until, guard, passing=passing, bounded=bounded)
            if blockers is None:
                return
            now = time.monotonic()
            if now >= until:
                raise LockNotAvailable(_gave_up(step, blockers, now - self._begun))
            seen = frozenset(blocker.transaction for blocker in blockers)
            passing = last_seen is not None and not seen & last_seen
            last_seen = seen
            self._on_wait(Waiting(step.summary, now - begun, tuple(blockers)))
            time.sleep(min(random.uniform(0, pause), max(until - now, 0.01)))  # noqa: S311  # no secret
            pause = _PAUSE_AFTER_QUEUE if passing else min(pause * 2, _PAUSES[1])
            following = resume() if resume else step
            if following is None:
                return
            step = following

    def recover(self) -> None:
        """After an error elsewhere on the connection: give it up if it is dead; `run` makes a new one."""
        if self._is_lost():
            self._session.abandon()

    # -- one try

    def _try(
        self, step: Step, until: float, guard: Guard | None, *, passing: bool, bounded: bool
    ) -> list[Blocker] | None:
        """None when the step is done, else who was in the way; raises `DDLError` for other failures."""
        try:
            if not self._session.is_open:  # lost with the step before
                self._session.__enter__()
            try:
                if step.transactional:
                    self._run_in_transaction(step, guard, queue=passing, bounded=bounded)
                else:
                    self._run_watched(step, until)
            except (_InTheWay, _CutShort):
                return self._look(step)
            except DjangoDatabaseError as error:
                if sqlstate(error) not in _LOCK_FAILURES:
                    raise
                return self._look(step)
        except DjangoDatabaseError as error:
            raise self._translate(step, error) from error
        return None

    def _look(self, step: Step) -> list[Blocker]:
        found = conflicting(self.connection, step.locks)
        if not step.transactional:
            # What PostgreSQL waits for before it looks at any lock: whoever uses the table now.
            found += [b for b in holders(self.connection, _altered(step)) if not b.on_partition]
        return found

    def _run_in_transaction(self, step: Step, guard: Guard | None, *, queue: bool, bounded: bool) -> None:
        nested = self.connection.in_atomic_block
        with transaction.atomic(using=self.connection.alias), self.connection.cursor() as cursor:
            before = _timeouts(cursor) if nested else {}
            sought = [lock for statement in step.ahead for lock in statement.locks]
            if sought and not queue and conflicting(self.connection, sought):
                raise _InTheWay
            for statement in self._prelude(step, queue=queue, bounded=bounded, cursor=cursor):
                cursor.execute(self._text(statement.query))
            unasked = [lock for lock in step.nowait if not lock.in_advance]
            if not queue and conflicting(self.connection, unasked):
                raise _InTheWay
            if guard is not None:
                guard(cursor)
            texts = [self._text(statement.query) for statement in step.statements]
            for text in [";\n".join(texts)] if step.together else texts:
                cursor.execute(text)
            for name, value in before.items():  # SET LOCAL would last until the caller's COMMIT
                cursor.execute("SELECT set_config(%s, %s, true)", [name, value])

    def _prelude(self, step: Step, *, queue: bool, bounded: bool, cursor: Any) -> Iterator[Statement]:
        timeout = min(self._lock_timeout, _LATE_LOCK_TIMEOUT_MS) if self.is_over else self._lock_timeout
        allowed = _lockable(cursor, [lock.table for lock in _strong(step)])
        return prelude(step, timeout, nowait=not queue, bounded=bounded, allowed=allowed)

    def _text(self, query: sql.Composable) -> str:
        return query.as_string(self.connection.connection)

    # -- outside a transaction

    def _run_watched(self, step: Step, until: float) -> None:
        """Run a statement that waits for others by itself, once those who are there have gone.

        Waiting beforehand costs nothing and can be given up; a DETACH CONCURRENTLY that is given up
        stays pending.
        """
        self._let_pass(step, until)
        patience = max(round((self._ends - time.monotonic()) * 1000), self._lock_timeout)
        watcher = self._get_watcher()
        with self._timeouts(patience if watcher else QUEUE_MS, patience), self.connection.cursor() as cursor:
            query = self._text(step.statements[0].query)
            if watcher is None:
                cursor.execute(query)
                return
            ends = time.monotonic() + patience / 1000
            with watcher.watch(self._pid) as watch:
                try:
                    cursor.execute(query)
                except DjangoDatabaseError as error:
                    ours = watch.cancelled or time.monotonic() >= ends
                    if sqlstate(error) == _QUERY_CANCELED and ours:
                        raise _CutShort from error
                    raise

    def _let_pass(self, step: Step, until: float) -> None:
        """Wait until nobody who is in the way now is still there; those who come later do not count."""
        begun = time.monotonic()
        first = {blocker.transaction for blocker in self._look(step)}
        pause = 0.01
        while first:
            time.sleep(pause)
            there = [blocker for blocker in self._look(step) if blocker.transaction in first]
            first = {blocker.transaction for blocker in there}
            if there:
                self._on_wait(Waiting(step.summary, time.monotonic() - begun, tuple(there)))
            if first and time.monotonic() + pause >= until:
                raise _InTheWay
            pause = min(pause * 2, 0.2)

    @contextmanager
    def _timeouts(self, lock_timeout: int, statement_timeout: int) -> Iterator[None]:
        with self.connection.cursor() as cursor:
            before = _timeouts(cursor)
        wanted = {"lock_timeout": f"{lock_timeout}ms", "statement_timeout": f"{statement_timeout}ms"}
        try:
            self._set(wanted)
            yield
        finally:
            if not self._is_lost():
                self._set(before)

    def _set(self, values: dict[str, str]) -> None:
        with self.connection.cursor() as cursor:
            for name, value in values.items():
                cursor.execute("SELECT set_config(%s, %s, false)", [name, value])

    @property
    def _pid(self) -> int:
        # Not what the driver was told when it connected: a pooler makes that up.
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    def _get_watcher(self) -> Watcher | None:
        if self._watcher is None or self._watcher.is_closed:
            try:
                self._watcher = Watcher(self.connection)
            except psycopg.Error:  # no connection to spare: then a short lock_timeout must do
                self._watcher = None
        return self._watcher

    # -- what went wrong

    def _is_lost(self) -> bool:
        raw = self.connection.connection
        return raw is None or bool(raw.closed)

    def _translate(self, step: Step, error: DjangoDatabaseError) -> ScaleDBError:
        state = sqlstate(error)
        if self._is_lost() or state in _SESSION_ENDED or (state or "").startswith("08"):
            self._session.abandon()
            return DDLError(
                f"the connection to the database was lost while trying to {step.summary} ({message(error)}); "
                "what was under way is undone or will be finished: run again"
            )
        if state == _INSUFFICIENT_PRIVILEGE:
            return DDLError(
                f"cannot {step.summary}: {message(error)} (connected as {self._role()!r}); this takes the "
                "rights of the table's owner, CREATE on its schema and TEMPORARY on the database: connect as "
                "the owner, or GRANT them"
            )
        if state == _QUERY_CANCELED and step.transactional:
            return DDLError(
                f"cannot {step.summary}: {message(error)}, after {WORK_SECONDS} s at most; "
                "nothing was changed by this step"
            )
        return DDLError(f"cannot {step.summary}: {message(error)}")

    def _role(self) -> str:
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT current_user")
            return str(cursor.fetchone()[0])


# -- what is sent


def prelude(
    step: Step,
    lock_timeout: int,
    *,
    nowait: bool = True,
    bounded: bool = True,
    allowed: set[TableName] | None = None,
) -> Iterator[Statement]:
    """What goes before the statements of a transactional step: the timeouts and the locks.

    `allowed` are the tables on which the role may LOCK TABLE at all (None: all). On the others the
    statements take the locks themselves, which they may queue for no longer than `QUEUE_MS`.
    """
    strong = _strong(step)
    tables = {lock.table for lock in strong}
    yield Statement(_set_local("statement_timeout", WORK_SECONDS * 1000 if bounded else 0))
    yield Statement(_set_local("lock_timeout", lock_timeout))
    for lock in sorted(step.locks, key=lambda lock: lock.table):
        weak = lock.in_advance and lock.mode is LockMode.SHARE_UPDATE_EXCLUSIVE
        if weak and lock.table not in tables:
            yield Statement(_LOCK_ONLY.format(lock.table.sql, sql.SQL(lock.mode.sql)), (lock,))
    yield Statement(_set_local("lock_timeout", min(QUEUE_MS, lock_timeout)))
    yield from step.ahead
    for lock in strong:
        if allowed is None or lock.table in allowed:
            only, suffix = sql.SQL("ONLY " if lock.only else ""), sql.SQL(" NOWAIT" if nowait else "")
            yield Statement(_LOCK.format(only, lock.table.sql, sql.SQL(lock.mode.sql), suffix), (lock,))


# A lock on the table that is altered must not go down to its partitions; one on either end of a
# foreign key does go down with the statements that follow.
_LOCK_ONLY = sql.SQL("LOCK TABLE ONLY {} IN {} MODE")
_LOCK = sql.SQL("LOCK TABLE {}{} IN {} MODE{}")


def script(step: Step, lock_timeout: int) -> Iterator[Statement]:
    """All that `Executor.run` sends for `step`, in order; for ``--dry-run``."""
    if not step.transactional:
        yield Statement(sql.SQL("SET lock_timeout = {}").format(sql.Literal(f"{lock_timeout}ms")))
        yield from step.statements
        return
    yield Statement(sql.SQL("BEGIN"))
    yield from prelude(step, lock_timeout)
    yield from step.statements
    yield Statement(sql.SQL("COMMIT"))


def _set_local(name: str, milliseconds: int) -> sql.Composed:
    value = sql.Literal(f"{milliseconds}ms")
    return sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), value)


def _strong(step: Step) -> list[Lock]:
    """The locks for which others would queue behind us, one for each table, in a fixed order."""
    declared = {lock.table for lock in step.nowait}
    return sorted(
        (
            lock
            for lock in step.locks
            if lock.in_advance and (lock.table in declared or lock.mode >= LockMode.SHARE)
        ),
        key=lambda lock: lock.table,
    )


def _altered(step: Step) -> list[TableName]:
    return [lock.table for lock in step.locks if lock.mode is LockMode.SHARE_UPDATE_EXCLUSIVE]


def _lockable(cursor: Any, tables: list[TableName]) -> set[TableName]:
    """Those of `tables` that this role may lock in a strong mode (LOCK, "Notes")."""
    if not tables:
        return set()
    privileges = "UPDATE, DELETE, TRUNCATE"
    if cursor.db.pg_version >= 170000:
        privileges += ", MAINTAIN"
    cursor.execute(
        "SELECT n.nspname, c.relname FROM unnest(%s::text[], %s::text[]) AS t (nspname, relname) "
        "JOIN pg_namespace n ON n.nspname = t.nspname "
        "JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.relname "
        "WHERE has_table_privilege(c.oid, %s)",
        [[t.schema for t in tables], [t.name for t in tables], privileges],
    )
    return {TableName(*row) for row in cursor.fetchall()}


def _timeouts(cursor: Any) -> dict[str, str]:
    cursor.execute("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
    lock_timeout, statement_timeout = cursor.fetchone()
    return {"lock_timeout": lock_timeout, "statement_timeout": statement_timeout}


# -- words


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a driver error, also when Django has wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, psycopg.Error):
            return cause.sqlstate
        cause = cause.__cause__
    return None


def message(error: BaseException) -> str:
    """PostgreSQL's sentence and detail on one line, without the statement's text."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, psycopg.Error):
        cause = cause.__cause__
    if isinstance(cause, psycopg.Error) and cause.diag.message_primary:
        parts = [cause.diag.message_primary, cause.diag.message_detail]
        return ". ".join(part.strip().rstrip(".") for part in parts if part)
    return " ".join(str(error).split()) or type(error).__name__


def _gave_up(step: Step, blockers: list[Blocker], seconds: float) -> str:
    text = f"cannot {step.summary}: gave up {seconds:.1f} s into the run; "
    if not blockers:
        return text + "whoever was in the way has just gone: run again"
    text += f"in the way: {describe(blockers)}. Run again later"
    pids = [blocker.pid for blocker in blockers if blocker.pid is not None]
    return text + (f", or end it: SELECT pg_terminate_backend({pids[0]})" if pids else "")
