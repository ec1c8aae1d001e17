"""One PostgreSQL server of a cluster: how to reach it, and what can be done to it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from .errors import ClusterError

CONNECT_TIMEOUT = 5


@dataclass(frozen=True)
class Access:
    """Names and passwords; the same on every node of a cluster."""

    database: str
    user: str
    password: str
    superuser: str
    superuser_password: str


class Node(ABC):
    """A server. Obtained from a `Cluster`, never made by hand.

    Methods that wait take a ``timeout`` in seconds and raise `ClusterError` when it is over.
    """

    #: The name in the cluster: ``primary``, ``standby1``, ...
    name: str
    #: What clients connect to: the socket directory, or an address.
    host: str
    port: int

    def __init__(self, name: str, host: str, port: int, access: Access) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.access = access

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} at {self.host}:{self.port}>"

    # -- reaching it

    @property
    def dsn(self) -> str:
        """Connection string of the application's ordinary role, which owns the database."""
        return self.conninfo()

    @property
    def superuser_dsn(self) -> str:
        return self.conninfo(superuser=True)

    def conninfo(self, *, superuser: bool = False, dbname: str | None = None, **options: Any) -> str:
        access = self.access
        return make_conninfo(
            host=self.host,
            port=self.port,
            dbname=dbname or access.database,
            user=access.superuser if superuser else access.user,
            password=access.superuser_password if superuser else access.password,
            **options,
        )

    def django_settings(
        self, engine: str = "django_scaledb.backend", *, superuser: bool = False, **extra: Any
    ) -> dict[str, Any]:
        """An entry for Django's ``DATABASES``; ``extra`` adds or replaces keys."""
        access = self.access
        return {
            "ENGINE": engine,
            "NAME": access.database,
            "USER": access.superuser if superuser else access.user,
            "PASSWORD": access.superuser_password if superuser else access.password,
            "HOST": self.host,
            "PORT": str(self.port),
            **extra,
        }

    def connect(
        self,
        *,
        superuser: bool = False,
        dbname: str | None = None,
        autocommit: bool = True,
        connect_timeout: int = CONNECT_TIMEOUT,
        **options: Any,
    ) -> psycopg.Connection[TupleRow]:
        """A psycopg connection; `psycopg.OperationalError` if there is none in time (a frozen node)."""
        # Not to be led astray by the caller's PG* variables.
        steady = {"target_session_attrs": "any", "application_name": "", "options": ""}
        return psycopg.connect(
            self.conninfo(superuser=superuser, dbname=dbname, connect_timeout=connect_timeout),
            autocommit=autocommit,
            **{**steady, **options},
        )

    def execute(
        self,
        statement: LiteralString | sql.SQL | sql.Composed,
        *,
        dbname: str = "postgres",
        options: str = "",
    ) -> list[TupleRow]:
        """Run one statement as superuser, in autocommit; the rows it returned."""
        if not self.is_running:
            raise ClusterError(f"{self.name} is not running; restart() it first")
        if self.is_frozen:
            raise ClusterError(f"{self.name} is frozen and does not answer; thaw() it first")
        options = f"-c statement_timeout=60s {options}"
        with self.connect(superuser=True, dbname=dbname, options=options) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    # -- its state

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Whether the server's processes exist; also true when it is frozen."""

    @property
    @abstractmethod
    def is_frozen(self) -> bool: ...

    @abstractmethod
    def log(self) -> str:
        """What the server wrote to its log."""

    @abstractmethod
    def wait_until_ready(self, timeout: float = 30) -> None:
        """Wait until it accepts connections."""

    @property
    def in_recovery(self) -> bool:
        """Whether it is a standby now."""
        return bool(self.execute("SELECT pg_is_in_recovery()")[0][0])

    @property
    def is_replay_paused(self) -> bool:
        return bool(
            self.execute(
                "SELECT CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END"
            )[0][0]
        )

    def replay_lsn(self) -> str:
        """The position a standby has replayed, or a primary has flushed, as ``pg_lsn`` text."""
        return str(
            self.execute(
                "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() "
                "ELSE pg_current_wal_flush_lsn() END"
            )[0][0]
        )

    # -- replication

    def set_lag(self, seconds: float, *, timeout: float = 10) -> None:
        """Let this standby apply each commit ``seconds`` after the primary made it; 0 ends that."""
        value = f"{round(seconds * 1000)}ms"
        self.execute(
            sql.SQL("ALTER SYSTEM SET recovery_min_apply_delay = {}").format(sql.Literal(value))
            if seconds > 0
            else sql.SQL("ALTER SYSTEM RESET recovery_min_apply_delay")
        )
        self.execute("SELECT pg_reload_conf()")
        expected = round(seconds * 1000)

        def reloaded() -> bool:
            rows = self.execute(
                "SELECT setting::int FROM pg_settings WHERE name = 'recovery_min_apply_delay'"
            )
            return bool(rows[0][0] == expected)

        self._wait(reloaded, timeout, "did not take up recovery_min_apply_delay")

    def pause_replay(self, *, timeout: float = 10) -> None:
        """Stop applying; the standby goes on receiving and answers from what it has."""
        self.execute("SELECT pg_wal_replay_pause()")
        # While it waits for the end of a lag it applies nothing and confirms no pause.
        self._wait(
            lambda: bool(
                self.execute(
                    "SELECT pg_get_wal_replay_pause_state() = 'paused' OR EXISTS "
                    "(SELECT FROM pg_stat_activity WHERE wait_event = 'RecoveryApplyDelay')"
                )[0][0]
            ),
            timeout,
            "did not pause its replay",
        )

    def resume_replay(self) -> None:
        self.execute("SELECT pg_wal_replay_resume()")

    def promote(self, *, timeout: float = 30) -> None:
        """Make this standby a primary of its own, on a new timeline. Other standbys stay where they are."""
        if not self.execute(
            sql.SQL("SELECT pg_promote(true, {})").format(sql.Literal(max(1, round(timeout))))
        )[0][0]:
            raise ClusterError(f"{self.name} was not promoted within {timeout:g} s")
        self._wait(lambda: not self.in_recovery, timeout, "is still in recovery")

    # -- faults

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL all its processes at once, as when the machine is lost. The data stays."""

    @abstractmethod
    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open and nothing answers."""

    @abstractmethod
    def thaw(self) -> None:
        """Let a frozen server go on."""

    @abstractmethod
    def stop(self, *, timeout: float = 20) -> None:
        """Shut it down in order: clients are disconnected, the data is written."""

    @abstractmethod
    def restart(self, *, timeout: float = 30) -> None:
        """Start it again after `kill()` or `stop()`, or stop and start it; returns when it is ready."""

    # -- for subclasses

    def _wait(self, condition: Callable[[], bool], timeout: float, complaint: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.name} {complaint} within {timeout:g} s")
            time.sleep(0.01)
