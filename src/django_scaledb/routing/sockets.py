"""The sockets of this process's connections to replicas, so that another thread can end a read that hangs.

`tcp_user_timeout` and its kin notice a dead network, not a server that is stopped, and do nothing for a Unix
socket. shutdown(2) works on both: the reader wakes, libpq reports a lost connection, and the read is run
elsewhere.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from contextlib import suppress
from typing import Any

import psycopg

_lock = threading.Lock()
_sockets: dict[str, dict[int, socket.socket]] = {}
_inherited: list[object] = []


def register(alias: str, connection: Any) -> None:
    """Remember the socket of the psycopg connection `connection`, until `release()` or its end.

    A duplicate of the descriptor is kept: the number of the original may be another file's by the time it is
    needed.
    """
    key = id(connection)
    with _lock:
        if key in _sockets.setdefault(alias, {}):  # a pool gives the same one again and again
            return
        try:
            _sockets[alias][key] = socket.socket(fileno=os.dup(connection.fileno()))
        except (OSError, psycopg.Error):  # it has ended already
            return
    weakref.finalize(connection, _release, alias, key)


def release(alias: str, connection: Any) -> None:
    """Forget `connection`, which is about to be closed."""
    _release(alias, id(connection))


def _release(alias: str, key: int) -> None:
    with _lock:
        found = _sockets.get(alias, {}).pop(key, None)
    if found is not None:
        found.close()


def shut_down(alias: str) -> int:
    """End all connections of this process to `alias`, whatever they wait for; how many there were."""
    with _lock:
        found = list(_sockets.get(alias, {}).values())
        for each in found:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
    return len(found)


def abandon() -> None:
    """In a forked child: these sockets are the parent's, and must not be touched."""
    global _lock, _sockets
    _lock = threading.Lock()
    _inherited.append(_sockets)
    _sockets = {}
