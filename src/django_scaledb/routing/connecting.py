"""Connections to a replica that do not outwait a server which stands still.

libpq and psycopg wait for two seconds at least, whatever ``connect_timeout`` says. A read has somewhere else
to go, so it gives up after ``READ_DEADLINE``, or as soon as the monitor finds that the server is frozen. A
``connect_timeout`` of the settings' own is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import lru_cache
from typing import Any

import psycopg

from django_scaledb.routing import registry as registries


class _Connection(psycopg.Connection[Any]):
    """Of one alias: see `impatient`."""

    alias: str
    has_own_timeout: bool

    # An inner method: should psycopg not call it one day, its own two seconds are the limit.
    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        found = registries.registry().replicas.get(cls.alias)
        inner: Generator[Any, Any, Any] = super()._connect_gen(*args, **kwargs)
        if found is None:
            return (yield from inner)
        deadline = found[0].config.read_deadline
        give_up_at = time.monotonic() + (float("inf") if cls.has_own_timeout else deadline)
        try:
            waits_for = next(inner)
            while True:
                # Whoever runs this comes back ten times a second, whether there is an answer or not.
                if not (ready := (yield waits_for)) and (
                    found[1].is_frozen or time.monotonic() >= give_up_at
                ):
                    inner.close()
                    raise psycopg.errors.ConnectionTimeout(f"no connection within {deadline:g} s")
                waits_for = inner.send(ready)
        except StopIteration as end:
            return end.value


@lru_cache(maxsize=64)
def impatient(alias: str, has_own_timeout: bool) -> type[psycopg.Connection[Any]]:
    """The class of connections to the replica `alias`."""
    return type("Connection", (_Connection,), {"alias": alias, "has_own_timeout": has_own_timeout})


class Driver:
    """psycopg as Django sees it, with another `connect`."""

    def __init__(self, connection_class: type[psycopg.Connection[Any]]) -> None:
        self.connect = connection_class.connect

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg, name)
