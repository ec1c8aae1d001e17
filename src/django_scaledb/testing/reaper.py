"""Ends every server of a cluster and removes its files.

The owner of a cluster calls `destroy()`. For the day when the owner is killed before it can, this
file is also a program: it waits on its standard input, a pipe whose other end only the owner holds,
and does the same at end of file. It imports the standard library alone and runs under ``python -I -S``.

Servers are found by what the process table shows: a postmaster's command line names its data
directory, the title of each of its children names the cluster (``cluster_name``). Both can be read
without any privilege, also for processes whose parent has died.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

PREFIX = "scaledb-"
_PROGRAMS = {"postgres", "initdb", "pg_basebackup", "cp"}


def process_table() -> Iterator[tuple[int, list[str]]]:
    """Each process with its command line (zombies have none and are left out)."""
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/cmdline", "rb") as file:
                        raw = file.read()
                except OSError:
                    continue  # ended meanwhile
                # A postgres child overwrites its arguments with one title, padded with zeros.
                arguments = raw.rstrip(b"\0").decode("utf-8", "replace").split("\0")
                if arguments != [""]:
                    yield int(entry), arguments
    else:
        listing = subprocess.run(
            ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=False
        ).stdout
        for line in listing.splitlines():
            pid, _, command = line.strip().partition(" ")
            if pid.isdigit() and command:
                yield int(pid), [command] if command.startswith("postgres: ") else command.split()


def members(base: str, node: str | None = None) -> set[int]:
    """The processes of the cluster in ``base``, or of one of its nodes."""
    name = os.path.basename(base)
    title = f"postgres: {name}-{node}: " if node else f"postgres: {name}-"
    directory = os.path.join(base, node) if node else base + os.sep
    found = set()
    for pid, arguments in process_table():
        if arguments[0].startswith("postgres: "):
            mine = arguments[0].startswith(title)
        elif os.path.basename(arguments[0]) in _PROGRAMS:
            mine = any(a == directory if node else a.startswith(directory) for a in arguments[1:])
        else:
            mine = False
        if mine:
            found.add(pid)
    return found


def send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_members(base: str, node: str | None = None, *, timeout: float = 10.0) -> set[int]:
    """SIGKILL until no process is left; returns those that would not go."""
    deadline = time.monotonic() + timeout
    while pids := members(base, node):
        if time.monotonic() > deadline:
            return pids
        send(pids, signal.SIGKILL)
        time.sleep(0.01)
    return set()


def forget_postmaster(data: str) -> None:
    """Remove what a killed postmaster leaves behind: its lock file and its System V segment.

    The segment (a few bytes, the interlock on the data directory) would stay until the next boot,
    and their number is limited. No process of this data directory may be alive.
    """
    lock_file = os.path.join(data, "postmaster.pid")
    try:
        with open(lock_file, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    fields = lines[6].split() if len(lines) > 6 else []
    if len(fields) == 2 and fields[1].isdigit():
        with contextlib.suppress(Exception):
            import ctypes

            ctypes.CDLL(None).shmctl(int(fields[1]), 0, None)  # 0: IPC_RMID
    with contextlib.suppress(OSError):
        os.unlink(lock_file)


def destroy(base: str, *, timeout: float = 20.0) -> None:
    """Kill all servers of the cluster in ``base`` and remove the directory."""
    if not os.path.basename(base).startswith(PREFIX):
        raise ValueError(f"{base!r} is not the directory of a cluster")
    deadline = time.monotonic() + timeout
    while True:
        kill_members(base)
        with contextlib.suppress(OSError):
            for entry in os.listdir(base):
                forget_postmaster(os.path.join(base, entry))
        shutil.rmtree(base, ignore_errors=True)
        # What was being created while the owner died may reappear once.
        if not os.path.exists(base) or time.monotonic() > deadline:
            return
        time.sleep(0.05)


class Reaper:
    """A child process that cleans up when this process ends in whatever way.

    It runs Python with ``arguments``, and finds out by the end of file on its standard input.
    """

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        read_end, self._write_end = os.pipe()  # neither is inherited over exec
        try:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **(environment or {})},
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the owner
                cwd="/",
            )
        except BaseException:
            os.close(self._write_end)
            raise
        finally:
            os.close(read_end)

    @classmethod
    def of_directory(cls, base: str) -> Self:
        """One that calls `destroy()`."""
        return cls(["-I", "-S", str(Path(__file__).resolve()), base])

    def disown(self) -> None:
        """In a forked child: let go of the pipe, which belongs to the parent."""
        os.close(self._write_end)
        self._process.returncode = 0  # not our child: nothing to wait for, nothing to warn about

    def dismiss(self) -> None:
        """Let it go; it does what is left to do."""
        os.close(self._write_end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    destroy(sys.argv[1])


if __name__ == "__main__":
    main()
