"""What the tests of routing share: a Django that is pointed at a cluster of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from django_scaledb.routing import registry, state
from django_scaledb.testing import Cluster

ROUTERS = ["django_scaledb.routing.ReplicaRouter"]


@contextmanager
def routed(
    cluster: Cluster,
    *,
    max_age: int | None = 600,
    more: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    extra: Mapping[str, Any] = MappingProxyType({}),
    **scaledb: object,
) -> Iterator[Cluster]:
    """Inside, ``default`` is the cluster's primary and ``replica1``, ... its standbys, for real.

    `more` are further aliases, or other entries for these; `extra` is for all entries.
    """
    databases = cluster.django_databases(mirror=False, CONN_MAX_AGE=max_age)
    replicas = [alias for alias in databases if alias != "default"]
    databases = {alias: {**entry, **extra} for alias, entry in {**databases, **more}.items()}
    connections.close_all()
    before = {alias: dict(connections.settings[alias]) for alias in connections.settings}
    aliases = [alias for alias in databases if alias != "default"]
    for alias, entry in databases.items():
        connections.settings.setdefault(alias, {}).clear()
        connections.settings[alias].update({**before["default"], **entry, "TEST": {"MIRROR": None}})
    connections.configure_settings(connections.settings)
    forget_connections(databases)
    values = {"PRIMARY": "default", "REPLICAS": replicas, **scaledb}
    try:
        with override_settings(SCALEDB=values, DATABASE_ROUTERS=ROUTERS):
            yield cluster
    finally:
        forget_connections(databases)
        # The thread that serves event loops outlives this cluster.
        asyncio.run(sync_to_async(forget_connections)(databases))
        for alias in aliases:
            del connections.settings[alias]
        connections.settings["default"].clear()
        connections.settings["default"].update(before["default"])
        registry.forget()
        state.current.set(None)


def forget_connections(aliases: object) -> None:
    for alias in list(aliases):  # type: ignore[call-overload]
        try:
            connection = getattr(connections._connections, alias)
        except AttributeError:
            continue
        connection.close()
        if connection.pool:
            connection.close_pool()
        delattr(connections._connections, alias)


def migrate(cluster: Cluster) -> None:
    with routed(cluster):
        call_command("migrate", verbosity=0)
    cluster.wait_for_catchup()


def eventually(condition: Callable[[], object], within: float, step: float = 0.01) -> float:
    """How many seconds it took until `condition()` held; fails when it did not."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within, f"not within {within} s"
        time.sleep(step)
    return time.monotonic() - begun
