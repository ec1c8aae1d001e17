"""Servers as containers, through ``testcontainers``.

A node is a container of an image that works like the official ``postgres`` one; `kill()`, `freeze()` and
`thaw()` are the engine's kill, pause and unpause. Every object carries a label by which a child process
removes it when the owner is gone, so the garbage collector container of ``testcontainers`` is not needed.
"""

import contextlib
import os
import secrets
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg

from . import reaper
from .errors import ClusterError, PostgresNotFound
from .local import free_port
from .node import Access, Node
from .postgres import IMAGE_VARIABLE, ContainerImage

LABEL = "org.django_scaledb.cluster"
_PORT = 5432


class ContainerNode(Node):
    """A server in a container."""

    def __init__(self, backend: "ContainerBackend", name: str, access: Access) -> None:
        super().__init__(name, "127.0.0.1", 0, access)
        self._backend = backend
        #: The container, an object of the ``docker`` package.
        self.container: Any = None

    def _status(self) -> str:
        """What the engine says: created, running, paused, exited."""
        if self.container is None:
            return "none"
        self.container.reload()
        return str(self.container.status)

    @property
    def is_running(self) -> bool:
        return self._status() in ("running", "paused")

    @property
    def is_frozen(self) -> bool:
        return self._status() == "paused"

    def log(self) -> str:
        return "" if self.container is None else str(self.container.logs().decode("utf-8", "replace"))

    def wait_until_ready(self, timeout: float = 30) -> None:
        # While it is being made, the server listens on a socket inside the container alone.
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError as error:
                problem: Exception = error
            except ClusterError as error:
                raise ClusterError(f"{self.name} did not start:\n{self._log_tail()}") from error
            else:
                return
            if time.monotonic() > deadline:
                tail = self._log_tail()
                raise ClusterError(f"{self.name} was not ready within {timeout:g} s: {problem}\n{tail}")
            time.sleep(0.05)

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-20:])

    def kill(self) -> None:
        self._backend.require_owner()
        if not self.is_running:
            return
        self.container.kill()
        if self._status() == "paused":
            self.container.unpause()  # a process that does not run does not die either
        self.container.wait(timeout=30)

    def freeze(self) -> None:
        self._backend.require_owner()
        if not self.is_running:
            raise ClusterError(f"{self.name} is not running; there is nothing to freeze")
        if not self.is_frozen:
            self.container.pause()

    def thaw(self) -> None:
        self._backend.require_owner()
        if self.is_frozen:
            self.container.unpause()

    def stop(self, *, timeout: float = 20) -> None:
        self._backend.require_owner()
        if not self.is_running:
            return
        self.thaw()
        for name in ("SIGINT", "SIGQUIT"):  # fast, then immediate
            self.container.kill(signal=name)
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                if self._status() == "exited":
                    return
                time.sleep(0.05)
        self.kill()

    def restart(self, *, timeout: float = 30) -> None:
        self.stop()
        self.container.start()
        self.wait_until_ready(timeout)


class ContainerBackend:
    """The containers of a cluster and the network between them."""

    def __init__(self, image: ContainerImage, access: Access, *, settings: Mapping[str, object]) -> None:
        self.image = image
        self.access = access
        self.settings = settings
        self.nodes: list[ContainerNode] = []
        self.token = reaper.PREFIX + secrets.token_hex(4)
        self._owner = os.getpid()
        self._network: Any = None
        self._clients: list[Any] = []
        self._reaper: reaper.Reaper | None = reaper.Reaper(
            ["-m", __name__, self.token], environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        )

    @property
    def is_owner(self) -> bool:
        return self._owner == os.getpid()

    def require_owner(self) -> None:
        if not self.is_owner:
            raise ClusterError(
                f"this cluster belongs to process {self._owner}; a forked child can only connect"
            )

    def start(self, standbys: int, timeout: float) -> None:
        with _quiet():
            from testcontainers.core.network import Network

            self._network = Network(docker_network_kw={"labels": {LABEL: self.token}}).create()
        primary = self._new_node()
        self._run(
            primary,
            ["postgres", *self._options(primary)],
            {
                "POSTGRES_USER": self.access.superuser,
                "POSTGRES_PASSWORD": self.access.superuser_password,
                "POSTGRES_DB": "postgres",
                "POSTGRES_INITDB_ARGS": "-E UTF8 --no-sync --auth-host=scram-sha-256",
            },
        )
        primary.wait_until_ready(timeout)
        # The image opens all databases to its network; replication is not one of them.
        result = primary.container.exec_run(
            ["sh", "-c", "echo 'host replication all all scram-sha-256' >> \"$PGDATA/pg_hba.conf\""]
        )
        if result.exit_code != 0:
            raise ClusterError(f"pg_hba.conf of {primary.name} was not changed: {result.output!r}")
        primary.execute("SELECT pg_reload_conf()")
        for _ in range(standbys):
            self._start_standby()
        for node in self.nodes[1:]:
            node.wait_until_ready(timeout)

    def add_standby(self, timeout: float) -> ContainerNode:
        self.require_owner()
        node = self._start_standby()
        try:
            node.wait_until_ready(timeout)
        except BaseException:
            node.container.remove(force=True, v=True)
            self.nodes.remove(node)
            raise
        return node

    def destroy(self) -> None:
        if not self.is_owner or self._reaper is None:
            return
        try:
            remove(self.token)
        finally:
            for node in self.nodes:
                node.container = None
            for client in self._clients:
                client.close()
            if self._network is not None:
                self._network._docker.client.close()
            self._reaper.dismiss()
            self._reaper = None

    def disown(self) -> None:
        if self._reaper is not None:
            self._reaper.disown()
            self._reaper = None

    # -- containers

    def _new_node(self) -> ContainerNode:
        number = len(self.nodes)
        used = {node.name for node in self.nodes}
        while (name := f"standby{number}" if number else "primary") in used:
            number += 1
        node = ContainerNode(self, name, self.access)
        self.nodes.append(node)
        return node

    def _start_standby(self) -> ContainerNode:
        node = self._new_node()
        conninfo = psycopg.conninfo.make_conninfo(
            host=self.nodes[0].name,
            port=_PORT,
            user=self.access.superuser,
            password=self.access.superuser_password,
        )
        # The image's own program makes no database where there is one, and gives the files to the right user.
        script = (
            'set -e; if [ ! -s "$PGDATA/PG_VERSION" ]; then mkdir -p "$PGDATA"; '
            f'pg_basebackup -D "$PGDATA" -d {shlex.quote(conninfo)} -c fast -X stream -R --no-sync; fi; '
            f"exec docker-entrypoint.sh postgres {shlex.join(self._options(node))}"
        )
        self._run(node, ["sh", "-c", script], {})
        return node

    def _options(self, node: ContainerNode) -> list[str]:
        settings = {**self.settings, "listen_addresses": "*", "cluster_name": f"{self.token}-{node.name}"}
        return [
            item
            for name, value in settings.items()
            for item in ("-c", f"{name}={('off', 'on')[value] if isinstance(value, bool) else value}")
        ]

    def _run(self, node: ContainerNode, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with _quiet():
            import docker.errors
            from testcontainers.core.container import DockerContainer

            container = DockerContainer(self.image.image)
            self._clients.append(container.get_docker_client().client)
            container.with_envs(**environment).with_command(list(command))
            container.with_network(self._network).with_network_aliases(node.name)
            container.with_kwargs(labels={LABEL: self.token})
            # A port that the engine chooses would be another one after a restart.
            port = free_port({other.port for other in self.nodes})
            ports: dict[str, Any] = container.ports
            ports[f"{_PORT}/tcp"] = ("127.0.0.1", port) if _is_local(container.get_docker_client()) else port
            try:
                container.start()
            except (docker.errors.ImageNotFound, docker.errors.NotFound) as error:
                raise PostgresNotFound(
                    f"the image {self.image.image} cannot be had: {error}; {IMAGE_VARIABLE} names another one"
                ) from error
            except docker.errors.APIError as error:
                if "pull" in str(error) or "registry" in str(error) or "dial tcp" in str(error):
                    raise PostgresNotFound(
                        f"the image {self.image.image} cannot be pulled: {error}"
                    ) from error
                raise ClusterError(f"the container of {node.name} was not started: {error}") from error
            node.container = container.get_wrapped_container()
            node.host = container.get_container_host_ip().replace("localhost", "127.0.0.1")
            node.port = int(container.get_exposed_port(_PORT))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of ``testcontainers`` while it loads, and without its garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.core.config import testcontainers_config as config

        before = config.ryuk_disabled
        config.ryuk_disabled = True
        try:
            yield
        finally:
            config.ryuk_disabled = before


def _is_local(client: Any) -> bool:
    """Whether the engine's ports are those of this machine's 127.0.0.1."""
    return client.get_connection_mode().name == "docker_host" and client.host() in ("localhost", "127.0.0.1")


def remove(token: str) -> None:
    """Remove every container, volume and network of a cluster."""
    import docker
    import docker.errors

    client = docker.from_env(timeout=60)
    try:
        for _ in range(3):  # one more may have been on its way
            chosen = {"label": f"{LABEL}={token}"}
            containers = client.containers.list(all=True, filters=chosen, ignore_removed=True)
            networks = client.networks.list(filters=chosen)
            if not containers and not networks:
                break
            for container in containers:
                with contextlib.suppress(docker.errors.NotFound):
                    container.remove(force=True, v=True)
            for network in networks:
                with contextlib.suppress(docker.errors.APIError):
                    network.remove()
    finally:
        client.close()


def main() -> None:
    """The child process that cleans up; see `reaper`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    remove(sys.argv[1])


if __name__ == "__main__":
    main()
