"""One model's archive work: alone with its set, its steps through the executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import DatabaseError, InterfaceError, models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import AnotherRunInProgress, DDLError
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.postgres.executor import Executor, Guard, Waiting
from django_scaledb.postgres.session import OTHER_RUN_SECONDS, RUN_LOCK
from django_scaledb.postgres.statements import Step

ARCHIVE_LOCK = RUN_LOCK[0] + 1
"""The first key of the advisory lock of a set's archive work; the second is the table's oid."""

_STEP_SECONDS = 7 * 86400.0
OnProgress = Callable[[str, int, int], None]
"""What is being done, how many rows of it are done, of how many."""


@dataclass(frozen=True)
class Options:
    """`lock_timeout` in milliseconds; `deadline` in seconds, for each step that is blocked."""

    command: str
    now: datetime
    lock_timeout: int
    deadline: float
    on_wait: Callable[[Waiting], None] = lambda waiting: None
    on_progress: OnProgress = lambda what, done, total: None
    on_step: Callable[[Step], None] = lambda step: None


@dataclass
class Session:
    """What archiving and restoring share. Long work is done outside the run's lock, steps under it."""

    connection: BaseDatabaseWrapper
    model: type[models.Model]
    config: PartitionConfig
    parent: PartitionSet
    options: Options

    def run(self, step: Step, *, guard: Guard | None = None, bounded: bool = True, **how: Any) -> None:
        """Do `step`; other runs, which change other tables meanwhile, are waited for."""
        self.options.on_step(step)
        until = time.monotonic() + self.options.deadline
        while True:
            try:
                with Executor(
                    self.connection,
                    command=self.options.command,
                    lock_timeout=self.options.lock_timeout,
                    deadline=_STEP_SECONDS,
                    on_wait=self.options.on_wait,
                ) as executor:
                    executor.run(step, patience=self.options.deadline, guard=guard, bounded=bounded, **how)
            except AnotherRunInProgress:
                if time.monotonic() >= until:
                    raise
            else:
                return

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One run of this kind for each set at a time; a killed one's lock goes with its session.

        Raises `AnotherRunInProgress`.
        """
        if self.connection.in_atomic_block:
            raise DDLError("cannot archive or restore inside a transaction; do it outside atomic()")
        self.connection.ensure_connection()
        key = [ARCHIVE_LOCK, self.parent.oid - ((self.parent.oid >> 31) << 32)]
        settings = {
            "application_name": f"django_scaledb {self.options.command}",
            # A session whose client was killed ends soon, also in the middle of a long scan.
            "client_connection_check_interval": "500",
        }
        before = {name: self._ask("SELECT current_setting(%s)", [name]) for name in settings}
        until = time.monotonic() + OTHER_RUN_SECONDS
        while not self._ask("SELECT pg_try_advisory_lock(%s, %s)", key):
            if time.monotonic() >= until:
                raise AnotherRunInProgress(
                    f"another run is archiving or restoring a partition of {self.parent.table}; "
                    "run again when it has ended"
                )
            time.sleep(0.1)
        try:
            self._set(settings)
            yield
        finally:
            raw = self.connection.connection
            if raw is not None and not raw.closed:
                with suppress(DatabaseError, InterfaceError):
                    self._set(before)
                    self._ask("SELECT pg_advisory_unlock(%s, %s)", key)

    def _set(self, values: dict[str, str]) -> None:
        for name, value in values.items():
            self._ask("SELECT set_config(%s, %s, false)", [name, value])

    def _ask(self, query: str, parameters: list[Any]) -> Any:
        with self.connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchone()[0]
