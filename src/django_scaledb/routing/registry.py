"""The sets of this process, made from the settings when they are first needed."""

from __future__ import annotations

import os
import threading
from typing import Any

from django.core.signals import setting_changed

from django_scaledb.conf import settings
from django_scaledb.routing import config as configuration
from django_scaledb.routing.replicas import Replica, ReplicaSet

KEYS = (
    "PRIMARY",
    "REPLICAS",
    "MORE_PRIMARIES",
    "READ_FROM_PRIMARY",
    "MAX_LAG",
    "POLL_INTERVAL",
    "READ_DEADLINE",
)


class Registry:
    """All sets, and what each alias of ``DATABASES`` is in them."""

    def __init__(self) -> None:
        from django_scaledb.routing import monitor

        self.config = configuration.build({key: getattr(settings, key) for key in KEYS})
        self.sets = {c.primary: ReplicaSet(c, monitor.watch) for c in self.config.sets}
        for members in self.sets.values():
            members.is_test_mirror = not _mirrors.isdisjoint(members.replicas)
        self.replicas: dict[str, tuple[ReplicaSet, Replica]] = {
            alias: (found, replica)
            for found in self.sets.values()
            for alias, replica in found.replicas.items()
        }

    def set_of(self, app_label: str, model_name: str | None) -> ReplicaSet:
        return self.sets[self.config.set_of(app_label, model_name).primary]

    def set_with(self, alias: str) -> ReplicaSet | None:
        """The set that `alias` belongs to, as its primary or as a replica."""
        if alias in self.sets:
            return self.sets[alias]
        return self.replicas[alias][0] if alias in self.replicas else None


_lock = threading.Lock()
_registry: Registry | None = None
#: The aliases that a test runner made mirrors of their primaries.
_mirrors: set[str] = set()
by_model: dict[Any, ReplicaSet] = {}
"""The set of each model that replicas may serve, as far as the router has met it."""
generation = 0
"""Changes when the sets were made anew."""


def registry() -> Registry:
    """The sets; raises `ConfigurationError` when ``settings.SCALEDB`` is not valid."""
    global _registry
    found = _registry
    if found is None:
        with _lock:
            if _registry is None:
                _registry = Registry()
            found = _registry
    return found


def forget() -> None:
    """Make the sets anew at the next use, and stop looking after the present ones."""
    global _registry
    from django_scaledb.routing import monitor

    with _lock:
        _registry = None
        changed()
    monitor.stop()


def changed() -> None:
    """Whoever keeps what it knows of the sets must ask again."""
    global generation
    generation += 1
    by_model.clear()


def mirror(alias: str) -> None:
    """The replica `alias` is another name of its primary in this test run: read from the primary."""
    found = registry().replicas.get(alias)
    if found is not None:
        _mirrors.add(alias)
        found[0].is_test_mirror = True
        changed()


def unmirror(alias: str) -> None:
    """`alias` is a replica again."""
    _mirrors.discard(alias)
    forget()


def _forget_when_changed(*, setting: str, **_: Any) -> None:
    if setting in ("SCALEDB", "DATABASES"):
        forget()


def _after_fork_in_child() -> None:
    """The child looks for itself: threads are not inherited, and the parent's sockets are the parent's."""
    global _lock, _registry
    from django_scaledb.routing import monitor

    _lock = threading.Lock()
    _registry = None
    changed()
    monitor.abandon()


setting_changed.connect(_forget_when_changed, dispatch_uid="django_scaledb.routing.registry")
os.register_at_fork(after_in_child=_after_fork_in_child)
