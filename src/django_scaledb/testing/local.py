"""Servers as processes of this machine."""

import contextlib
import os
import random
import secrets
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import reaper
from .errors import ClusterError
from .node import Access, Node
from .postgres import Account, Installation, run_as, server_account

# A socket's path is limited to 107 bytes; the directory's is followed by "/.s.PGSQL.65535".
_LONGEST_DIRECTORY = 85
_FIRST_PORT = 5432
# A node takes 50 MB when it is empty, and keeps half a gigabyte of WAL when it is not.
_PLENTY = 6 * 2**30
# A standby must not have less of these than its primary had.
_REPORTED = {
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
}


def _environment() -> dict[str, str]:
    """The caller's, without what would steer the programs: PG*, the locale, the zone, the home."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_")) and name not in ("LANG", "LANGUAGE", "HOME")
    }
    return {**kept, "LC_ALL": "C", "TZ": "UTC", "HOME": "/"}


class LocalNode(Node):
    """A server whose processes run on this machine."""

    def __init__(self, backend: "LocalBackend", name: str, host: str, port: int, access: Access) -> None:
        super().__init__(name, host, port, access)
        self._backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    @property
    def data_directory(self) -> Path:
        return self._backend.base / self.name

    @property
    def pid(self) -> int | None:
        """The postmaster's process id."""
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        if self._process is None:
            return False
        if self._backend.is_owner:
            return self._process.poll() is None
        try:  # in a forked child: the postmaster is a child of the parent
            os.kill(self._process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @property
    def is_frozen(self) -> bool:
        return self._frozen and self.is_running

    @property
    def _log_file(self) -> Path:
        return self._backend.base / f"{self.name}.log"

    def log(self) -> str:
        try:
            return self._log_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # -- starting and stopping

    def _spawn(self) -> None:
        self._backend.require_owner()
        self._forget()
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1" if self._backend.tcp else "",
            "unix_socket_directories": self._backend.base,
            # Shown in the title of every process; this is how the reaper finds them.
            "cluster_name": f"{self._backend.base.name}-{self.name}",
        }
        arguments = [f"-c{name}={value}" for name, value in settings.items()]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self._backend.program("postgres"), "-D", str(self.data_directory), *arguments],
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
                **run_as(self._backend.account),  # type: ignore[call-overload]
            )
        self._frozen = False

    def _forget(self) -> None:
        """Remove the traces of a killed server, whose process id may be somebody else's by now."""
        reaper.forget_postmaster(str(self.data_directory))
        for name in (f".s.PGSQL.{self.port}", f".s.PGSQL.{self.port}.lock"):
            with contextlib.suppress(FileNotFoundError):
                (self._backend.base / name).unlink()

    def wait_until_ready(self, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        status = self.data_directory / "postmaster.pid"
        while True:
            if not self.is_running:
                raise ClusterError(f"{self.name} did not start:\n{self._log_tail()}")
            # The eighth line says "starting", "stopping", "standby" or "ready".
            with contextlib.suppress(OSError, IndexError):
                lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
                if lines[7].strip() == "ready" and lines[0].strip() == str(self.pid):
                    break
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.name} was not ready within {timeout:g} s:\n{self._log_tail()}")
            time.sleep(0.005)
        self.execute("SELECT 1")

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-20:])

    def stop(self, *, timeout: float = 20) -> None:
        self._backend.require_owner()
        if self._process is None or not self.is_running:
            return
        self.thaw()
        # fast, then immediate: a primary would wait for ever for a standby that does not listen
        for number in (signal.SIGINT, signal.SIGQUIT):
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
                return
        self.kill()

    def restart(self, *, timeout: float = 30) -> None:
        self.stop()
        self._spawn()
        self.wait_until_ready(timeout)

    # -- faults

    def kill(self) -> None:
        self._backend.require_owner()
        if self._process is None:
            return
        if self.is_running:
            # Stopped first, so that it starts no child between the look at the process table and the end.
            self._process.send_signal(signal.SIGSTOP)
        left = reaper.kill_members(str(self._backend.base), self.name)
        if left:
            raise ClusterError(f"processes {sorted(left)} of {self.name} outlived SIGKILL")
        self._process.wait(10)
        self._frozen = False

    def freeze(self) -> None:
        self._backend.require_owner()
        if self._process is None or not self.is_running:
            raise ClusterError(f"{self.name} is not running; there is nothing to freeze")
        self._frozen = True
        self._process.send_signal(signal.SIGSTOP)  # from here on it starts no children
        stopped: set[int] = set()
        while new := reaper.members(str(self._backend.base), self.name) - stopped:
            reaper.send(new, signal.SIGSTOP)
            stopped |= new

    def thaw(self) -> None:
        self._backend.require_owner()
        if self._process is not None and self._frozen:
            reaper.send(reaper.members(str(self._backend.base), self.name), signal.SIGCONT)
        self._frozen = False


class LocalBackend:
    """The directory of a cluster, and the nodes in it."""

    def __init__(
        self,
        postgres: Installation,
        access: Access,
        *,
        settings: Mapping[str, object],
        tcp: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.postgres = postgres
        self.access = access
        self.tcp = tcp
        self.settings = settings
        self.account = server_account()
        self.base = _free_directory(self.account, directory)
        self.nodes: list[LocalNode] = []
        self._reaper: reaper.Reaper | None = reaper.Reaper.of_directory(str(self.base))
        self._owner = os.getpid()
        try:
            self.base.mkdir(mode=0o700)
            if self.account is not None:
                os.chown(self.base, self.account.uid, self.account.gid)
        except BaseException:
            self.destroy()
            raise

    @property
    def is_owner(self) -> bool:
        return self._owner == os.getpid()

    def require_owner(self) -> None:
        if not self.is_owner:
            raise ClusterError(
                f"this cluster belongs to process {self._owner}; a forked child can only connect"
            )

    def program(self, name: str) -> str:
        return self.postgres.program(name)

    def start(self, standbys: int, timeout: float) -> None:
        """Make the primary and its standbys, and start them side by side.

        The standbys are copies of a data directory that was never started, which is as good as a base
        backup and takes no checkpoint.
        """
        primary = self._new_node()
        self._initdb(primary)
        if standbys and _REPORTED & self.settings.keys():
            # Recorded in the data directory at the first start; before that it holds the defaults.
            primary._spawn()
            primary.wait_until_ready(timeout)
            primary.stop()
        for _ in range(standbys):
            standby = self._new_node()
            self._run(["cp", "-Rp", str(primary.data_directory), str(standby.data_directory)])
            self._follow(standby, primary)
        for node in self.nodes:
            node._spawn()
        for node in self.nodes:
            node.wait_until_ready(timeout)

    def add_standby(self, timeout: float) -> LocalNode:
        """A standby from a base backup of the running primary."""
        self.require_owner()
        primary = self.nodes[0]
        node = self._new_node()
        try:
            self._run(
                [
                    self.program("pg_basebackup"),
                    *("-d", f"host={self.base} port={primary.port} user={self.access.superuser}"),
                    *("-D", str(node.data_directory)),
                    *("-c", "fast", "-X", "stream", "-R", "--no-sync"),
                ],
                timeout=timeout,
            )
            node._spawn()
            node.wait_until_ready(timeout)
        except BaseException:
            node.kill()
            self.nodes.remove(node)
            raise
        return node

    def destroy(self) -> None:
        """End everything and remove the directory. In a forked child: nothing."""
        if not self.is_owner or self._reaper is None:
            return
        reaper.destroy(str(self.base))
        for node in self.nodes:
            if node._process is not None:
                node._process.wait(10)
                node._frozen = False
        self._reaper.dismiss()
        self._reaper = None

    def disown(self) -> None:
        if self._reaper is not None:
            self._reaper.disown()
            self._reaper = None
        for node in self.nodes:
            if node._process is not None and node._process.returncode is None:
                node._process.returncode = 0  # not this process's child: nothing to wait for or to warn about

    # -- data directories

    def _new_node(self) -> LocalNode:
        number = len(self.nodes)
        used = {node.name for node in self.nodes}
        while (name := f"standby{number}" if number else "primary") in used:
            number += 1
        port = free_port({node.port for node in self.nodes}) if self.tcp else _FIRST_PORT + number
        node = LocalNode(self, name, "127.0.0.1" if self.tcp else str(self.base), port, self.access)
        self.nodes.append(node)
        return node

    def _initdb(self, node: LocalNode) -> None:
        password_file = self.base / "password"
        password_file.write_text(self.access.superuser_password + "\n", encoding="utf-8")
        if self.account is not None:
            os.chown(password_file, self.account.uid, self.account.gid)
        command = [
            self.program("initdb"),
            *("-D", str(node.data_directory), "-U", self.access.superuser, f"--pwfile={password_file}"),
            # The directory of the sockets is the cluster owner's alone; TCP is open to every local user.
            *("--auth-local=trust", "--auth-host=scram-sha-256"),
            *("-E", "UTF8", "--no-sync", "--no-instructions"),
        ]
        try:
            if self.postgres.major >= 17:
                self._run([*command, "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"])
            else:
                try:
                    self._run([*command, "--locale=C.UTF-8"])
                except ClusterError as error:
                    if "locale" not in str(error):
                        raise
                    self._run([*command, "--locale=C"])
        finally:
            password_file.unlink()
        lines = [f"{name} = {_quoted(value)}" for name, value in self.settings.items()]
        with (node.data_directory / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))

    def _follow(self, standby: LocalNode, primary: LocalNode) -> None:
        """What ``pg_basebackup -R`` writes."""
        conninfo = f"host={self.base} port={primary.port} user={self.access.superuser}"
        with (standby.data_directory / "postgresql.auto.conf").open("a", encoding="utf-8") as file:
            file.write(f"primary_conninfo = {_quoted(conninfo)}\n")
        signal_file = standby.data_directory / "standby.signal"
        signal_file.touch(mode=0o600)
        if self.account is not None:
            os.chown(signal_file, self.account.uid, self.account.gid)

    def _run(self, command: Sequence[str], *, timeout: float = 120) -> None:
        try:
            subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=True,
                timeout=timeout,
                env=_environment(),
                **run_as(self.account),  # type: ignore[call-overload]
            )
        except subprocess.CalledProcessError as error:
            output = error.stdout.decode("utf-8", "replace").strip()
            raise ClusterError(f"{command[0]} failed with exit code {error.returncode}:\n{output}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{command[0]} could not be run: {error}") from error


def _quoted(value: object) -> str:
    text = {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return "'" + text.replace("'", "''") + "'"


def _free_directory(account: Account | None, wanted: str | os.PathLike[str] | None) -> Path:
    """A path for a new cluster: short enough for sockets, reachable by the servers' user."""
    name = reaper.PREFIX + secrets.token_hex(4)
    refused = []
    parents = [wanted] if wanted is not None else _temporary_directories()
    for parent in parents:
        path = Path(parent).resolve() / name
        if len(os.fsencode(path)) > _LONGEST_DIRECTORY:
            refused.append(f"{parent}: too long a path for a socket")
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            refused.append(f"{parent}: not writable")
        elif account is not None and not _can_enter(path.parent, account):
            refused.append(f"{parent}: uid {account.uid} cannot enter it")
        else:
            return path
    raise ClusterError("no directory for the cluster: " + "; ".join(refused))


def _temporary_directories() -> list[str]:
    """In order of preference. With thousands of small files, memory is several times as fast as a disk."""
    directories = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108
    if not os.environ.get("TMPDIR") and _free_memory() >= _PLENTY:
        directories.insert(0, "/dev/shm")  # noqa: S108
    return list(dict.fromkeys(directories))


def _free_memory() -> int:
    """Bytes that files in ``/dev/shm`` may take; 0 where that is not in memory, or not known."""
    try:
        if " /dev/shm tmpfs " not in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace"):
            return 0
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in meminfo if line.startswith("MemAvailable:"))
        volume = os.statvfs("/dev/shm")  # noqa: S108
    except (OSError, StopIteration):
        return 0
    return min(int(available.split()[1]) * 1024, volume.f_bavail * volume.f_frsize)


def _can_enter(path: Path, account: Account) -> bool:
    for directory in (path, *path.parents):
        status = directory.stat()
        if status.st_uid == account.uid:
            needed = stat.S_IXUSR
        elif status.st_gid == account.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return False
    return True


def free_port(taken: set[int]) -> int:
    """A port below the range that the system hands out to outgoing connections, so that it stays free."""
    for _ in range(200):
        port = random.randint(15000, 32000)  # noqa: S311
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ClusterError("no free TCP port was found on 127.0.0.1")


__all__ = ["LocalBackend", "LocalNode"]
