"""A database of its own for a test that changes tables: models, sessions beside Django's, a look at locks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
from django.apps.registry import Apps
from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.models import PartitionedModel, UUID7Field
from django_scaledb.partitions import registry
from django_scaledb.partitions.first import first_partitions
from django_scaledb.testing import Cluster

ALIAS = "lab"
NOW = datetime(2026, 5, 17, 13, 7, 11, tzinfo=UTC)
"""An odd moment of an ordinary day."""

lab_apps = Apps()


class Account(models.Model):
    class Meta:
        apps = lab_apps
        app_label = "lab"


class Upload(PartitionedModel):
    """By month, with a foreign key out."""

    account = models.ForeignKey(Account, on_delete=models.CASCADE, null=True)
    at = models.DateTimeField()
    size = models.BigIntegerField(db_default=0)

    class Meta:
        apps = lab_apps
        app_label = "lab"
        indexes = [models.Index(fields=["size"], name="lab_upload_size")]

    class PartitioningMeta:
        key = ["at"]
        interval = "1 month"
        premake = 2


class Plain(PartitionedModel):
    """By month, with no foreign keys."""

    at = models.DateTimeField()

    class Meta:
        apps = lab_apps
        app_label = "lab"

    class PartitioningMeta:
        key = ["at"]
        interval = "1 month"
        premake = 1


class Trace(PartitionedModel):
    """By the month in its UUID, with a foreign key in."""

    id = UUID7Field(primary_key=True)

    class Meta:
        apps = lab_apps
        app_label = "lab"

    class PartitioningMeta:
        key = ["id"]
        interval = "1 month"
        premake = 1


class Span(models.Model):
    trace = models.ForeignKey(Trace, on_delete=models.CASCADE)

    class Meta:
        apps = lab_apps
        app_label = "lab"


class Lab:
    """The alias ``lab``, connected to a fresh database as the ordinary role that owns it."""

    def __init__(self, cluster: Cluster, database: str) -> None:
        self.cluster = cluster
        self.database = database
        self._sessions: list[psycopg.Connection[Any]] = []

    @property
    def connection(self) -> BaseDatabaseWrapper:
        return connections[ALIAS]

    def session(self, *, autocommit: bool = False, **options: Any) -> psycopg.Connection[Any]:
        """Another client's session; closed at the end of the test."""
        session = self.cluster.primary.connect(dbname=self.database, autocommit=autocommit, **options)
        self._sessions.append(session)
        return session

    def execute(self, *statements: str, superuser: bool = False) -> list[tuple[Any, ...]]:
        """Run statements in a session of their own; the rows of the last one."""
        rows: list[tuple[Any, ...]] = []
        with self.cluster.primary.connect(dbname=self.database, superuser=superuser) as session:
            for statement in statements:
                cursor = session.execute(statement)  # type: ignore[arg-type]
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def value(self, statement: str) -> Any:
        return self.execute(statement)[0][0]

    def create(self, *wanted: type[models.Model], now: datetime = NOW) -> None:
        """Make the tables as `migrate` does, with the partitions that they would get at `now`."""
        for model in wanted:
            with self.connection.schema_editor() as editor:
                editor.create_model(model)
            if not issubclass(model, PartitionedModel):
                continue
            table, config = model._meta.db_table, registry.config_for(model)
            self.execute(*(f'DROP TABLE "{name}"' for name in self.bounds(table)))
            statements = first_partitions(table, config, now, with_default=config.default_partition)
            self.execute(*(statement.as_string(None) for statement in statements))

    def bounds(self, table: str) -> dict[str, str]:
        """The attached partitions and their bounds, in UTC."""
        return {
            name: bound
            for name, bound, pending in self.execute(
                "SET timezone = 'UTC'",
                "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid), h.inhdetachpending "
                "FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid "
                f"WHERE h.inhparent = '\"{table}\"'::regclass ORDER BY pg_get_expr(c.relpartbound, c.oid)",
            )
            if not pending
        }

    def tables(self) -> set[str]:
        return {
            name for (name,) in self.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        }

    def comment(self, table: str) -> str | None:
        comment: str | None = self.value(f"SELECT obj_description('\"{table}\"'::regclass, 'pg_class')")
        return comment

    @contextmanager
    def queue(self) -> Iterator[Queue]:
        """Watches for clients other than ours that stand in a queue for a table, while the block runs."""
        queue = Queue(self.session(autocommit=True))
        queue.start()
        try:
            yield queue
        finally:
            queue.stop()

    def close(self) -> None:
        for session in self._sessions:
            with suppress(psycopg.Error):
                session.close()
        self.connection.close()


class Queue(threading.Thread):
    """Samples pg_locks: `longest` is how many seconds a client of the application waited for a table."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        super().__init__(daemon=True)
        self._session = session
        self._over = threading.Event()
        self.samples = 0
        self.longest = 0.0

    def run(self) -> None:
        since: dict[int, float] = {}
        while not self._over.is_set():
            rows = self._session.execute(
                "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted "
                "AND l.locktype = 'relation' AND a.application_name NOT LIKE 'django_scaledb%'"
            ).fetchall()
            now = time.monotonic()
            since = {pid: since.get(pid, now) for (pid,) in rows}
            self.longest = max([self.longest, *(now - begun for begun in since.values())])
            self.samples += 1
            time.sleep(0.003)

    def stop(self) -> None:
        self._over.set()
        self.join()


class Traffic(threading.Thread):
    """A client that runs `work` again and again; `slowest` is the longest that one took, in seconds."""

    def __init__(self, session: psycopg.Connection[Any], work: str, pause: float = 0.002) -> None:
        super().__init__(daemon=True)
        self._session = session
        self._work = work
        self._pause = pause
        self._over = threading.Event()
        self.count = 0
        self.slowest = 0.0

    def __enter__(self) -> Traffic:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.is_set():
            begun = time.monotonic()
            self._session.execute(self._work)  # type: ignore[arg-type]
            self._session.commit()
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.count += 1
            time.sleep(self._pause)


def eventually(condition: Callable[[], Any], seconds: float = 5) -> Any:
    """The first true answer of `condition`; an AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)
