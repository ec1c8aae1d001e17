"""A primary and its streaming standbys, started in seconds, for tests, demos and experiments.

::

    with Cluster(standbys=1) as cluster:
        with cluster.primary.connect() as connection:
            connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        cluster.wait_for_catchup()
        cluster.standbys[0].set_lag(5)

or, on the command line, until Ctrl-C: ``python -m django_scaledb.testing.cluster --standbys 2``.

Neither Django's models nor its settings are needed.
"""

import argparse
import atexit
import os
import pprint
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import psycopg
from psycopg import sql

from .errors import ClusterError
from .node import Access, Node
from .postgres import ContainerImage, Installation, find_postgres

#: Made for speed on data that nobody will miss; what replication and visibility mean is untouched.
FAST_SETTINGS: Mapping[str, object] = {
    "fsync": False,
    "full_page_writes": False,
    "shared_buffers": "32MB",
    "wal_level": "replica",
    "hot_standby": True,
    # A killed standby finds what it missed.
    "wal_keep_size": "512MB",
    "wal_retrieve_retry_interval": "100ms",
    "min_wal_size": "32MB",
    # Files in the data directory instead of /dev/shm, where a killed server would leave them.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class Backend(Protocol):
    """What runs the servers: processes of this machine, or containers."""

    @property
    def nodes(self) -> Sequence[Node]: ...

    def start(self, standbys: int, timeout: float) -> None: ...

    def add_standby(self, timeout: float) -> Node: ...

    def destroy(self) -> None: ...

    def disown(self) -> None: ...


class Cluster:
    """A primary with ``standbys`` streaming standbys.

    ``settings`` are server settings for all nodes, on top of `FAST_SETTINGS`. ``database`` belongs to
    ``user``, an ordinary role that may create databases; it is what nodes connect as by default.
    ``postgres`` stands in for the variable ``SCALEDB_POSTGRES``. With ``tcp`` the servers listen on free
    ports of 127.0.0.1, else on sockets that only this user can reach. The files go below ``directory``; if
    that is None, below ``TMPDIR``, or in memory (``/dev/shm``) where plenty is free, or below ``/tmp``.

    The servers and their files are gone when the cluster is stopped, when the interpreter ends, and soon
    after the process was killed. A forked child may connect; its end does not touch the cluster.
    """

    def __init__(
        self,
        standbys: int = 1,
        *,
        settings: Mapping[str, object] | None = None,
        database: str = "app",
        user: str = "app",
        password: str | None = None,
        superuser: str = "postgres",
        superuser_password: str | None = None,
        postgres: Installation | ContainerImage | str | None = None,
        tcp: bool = False,
        directory: str | os.PathLike[str] | None = None,
        start_timeout: float = 60,
    ) -> None:
        self._standbys = standbys
        self._settings = {**FAST_SETTINGS, **(settings or {})}
        self._access = Access(
            database=database,
            user=user,
            password=password or secrets.token_urlsafe(12),
            superuser=superuser,
            superuser_password=superuser_password or secrets.token_urlsafe(12),
        )
        self._postgres = postgres
        self._tcp = tcp
        self._directory = directory
        self._start_timeout = start_timeout
        self._backend: Backend | None = None

    def __repr__(self) -> str:
        return f"<Cluster {list(self._backend.nodes) if self._backend else 'not started'}>"

    # -- life

    def start(self) -> Self:
        """Start all nodes; returns when the standbys have the database. Leaves nothing if it fails."""
        if self._backend is not None:
            raise ClusterError("the cluster is running already")
        postgres = self._postgres
        if postgres is None or isinstance(postgres, str):
            postgres = find_postgres(postgres)
        _running.add(self)
        try:
            if isinstance(postgres, ContainerImage):
                from .containers import ContainerBackend

                self._backend = ContainerBackend(postgres, self._access, settings=self._settings)
            else:
                from .local import LocalBackend

                self._backend = LocalBackend(
                    postgres, self._access, settings=self._settings, tcp=self._tcp, directory=self._directory
                )
            self.postgres: Installation | ContainerImage = postgres
            self._backend.start(self._standbys, self._start_timeout)
            self._create_role()
            self.create_database(self._access.database)
            self.wait_for_catchup(self._start_timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all servers and remove their files; may be called again. In a forked child: nothing."""
        _running.discard(self)
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.destroy()

    def __enter__(self) -> Self:
        return self if self._backend is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self._backend is not None

    # -- nodes

    @property
    def nodes(self) -> list[Node]:
        """The primary and the standbys, as they were started; a promotion changes no place."""
        if self._backend is None:
            raise ClusterError("the cluster is not running; start() it first")
        return list(self._backend.nodes)

    @property
    def primary(self) -> Node:
        return self.nodes[0]

    @property
    def standbys(self) -> list[Node]:
        return self.nodes[1:]

    def add_standby(self, *, timeout: float = 60) -> Node:
        """One more standby, from a base backup of the running primary."""
        if self._backend is None:
            raise ClusterError("the cluster is not running; start() it first")
        node = self._backend.add_standby(timeout)
        self.wait_for_catchup(timeout)
        return node

    def django_databases(
        self, engine: str = "django_scaledb.backend", *, mirror: bool = True, **extra: Any
    ) -> dict[str, dict[str, Any]]:
        """``DATABASES``: ``default`` is the primary, ``replica1`` and so on are the standbys.

        With ``mirror`` the test runner treats each replica as a mirror of ``default``, which means that tests
        read from the primary under the replica's name.
        """
        databases = {"default": self.primary.django_settings(engine, **extra)}
        for number, standby in enumerate(self.standbys, 1):
            entry = standby.django_settings(engine, **extra)
            databases[f"replica{number}"] = {**entry, "TEST": {"MIRROR": "default"}} if mirror else entry
        return databases

    # -- content

    def _create_role(self) -> None:
        user, password = sql.Identifier(self._access.user), sql.Literal(self._access.password)
        # CREATEDB, as Django's documentation asks of whoever runs tests.
        self.primary.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB PASSWORD {}").format(user, password))

    def create_database(self, name: str, *, owner: str | None = None) -> None:
        """Create a database on the primary, owned by the application's role."""
        statement = sql.SQL("CREATE DATABASE {} OWNER {}").format(
            sql.Identifier(name), sql.Identifier(owner or self._access.user)
        )
        self.primary.execute(statement)

    def wait_for_catchup(self, timeout: float = 10) -> None:
        """Wait until every standby has replayed what was committed on the primary before this call.

        Standbys that are down, frozen, paused or promoted are left out.
        """
        # The end of a record of our own, flushed by its commit: all that came before is below. The positions
        # that the server reports may lie within a record, or behind a page header: no replay stops there.
        target = str(
            self.primary.execute(
                "SELECT pg_logical_emit_message(true, 'django_scaledb', 'catch up')",
                options="-c synchronous_commit=local",
            )[0][0]
        )
        done = sql.SQL(
            "SELECT CASE WHEN NOT pg_is_in_recovery() THEN true WHEN pg_is_wal_replay_paused() THEN true "
            "ELSE pg_last_wal_replay_lsn() >= {}::pg_lsn END"
        ).format(sql.Literal(target))
        deadline = time.monotonic() + timeout
        for standby in self.standbys:
            while standby.is_running and not standby.is_frozen and not standby.execute(done)[0][0]:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"after {timeout:g} s {standby.name} has replayed {standby.replay_lsn()}, "
                        f"not yet {target} of the primary"
                    )
                time.sleep(0.01)


# -- the end of the process

# Holds them, too: a settings module may keep nothing but the addresses.
_running: set[Cluster] = set()


def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()


def _after_fork_in_child() -> None:
    for cluster in list(_running):
        if cluster._backend is not None:
            cluster._backend.disown()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_after_fork_in_child)


# -- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m django_scaledb.testing.cluster",
        description="Start a PostgreSQL primary with streaming standbys; Ctrl-C ends and removes them.",
    )
    parser.add_argument("--standbys", type=int, default=1, metavar="N", help="how many standbys (default: 1)")
    parser.add_argument("--tcp", action="store_true", help="listen on free ports of 127.0.0.1, too")
    parser.add_argument("--directory", metavar="PATH", help="where its files go (default: memory, or TMPDIR)")
    parser.add_argument("--database", default="app", metavar="NAME", help="database to create (default: app)")
    parser.add_argument("--user", default="app", metavar="NAME", help="its owner (default: app)")
    parser.add_argument(
        "--postgres", metavar="WHAT", help="embedded, system, container or a directory of programs"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a server setting, for all nodes"
    )
    options = parser.parse_args(arguments)
    settings = {}
    for item in options.set:
        name, separator, value = item.partition("=")
        if not separator:
            parser.error(f"--set needs NAME=VALUE, not {item!r}")
        settings[name] = value

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    cluster = Cluster(
        options.standbys,
        settings=settings,
        database=options.database,
        user=options.user,
        postgres=options.postgres,
        tcp=options.tcp,
        directory=options.directory,
    )
    out = sys.stdout
    try:
        begun = time.monotonic()
        with cluster:
            out.write(
                f"{cluster.postgres}, {len(cluster.nodes)} server(s) in {time.monotonic() - begun:.1f} s\n\n"
            )
            for node in cluster.nodes:
                out.write(f"{node.name}\n    {node.dsn}\n    superuser: {node.superuser_dsn}\n")
            out.write(f"\nDATABASES = {pprint.pformat(cluster.django_databases(), sort_dicts=False)}\n")
            out.write("\nCtrl-C ends it.\n")
            out.flush()
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except (ClusterError, psycopg.Error) as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
