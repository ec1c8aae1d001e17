"""The demo's part about replicas: reading one's own writes, and a replica that dies while a loop reads.

`run(cluster, model, make, say)` needs Django set up on `cluster` with its first standby as ``replica1``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django.db import connections, models

from django_scaledb.routing import decisions, explain
from django_scaledb.testing import Cluster

Say = Callable[[str], None]


def run(
    cluster: Cluster, model: type[models.Model], make: Callable[[], models.Model], say: Say = print
) -> bool:
    """All of it; `make` saves an instance of `model`. True when no read failed and none was stale."""
    found = read_your_writes(cluster, model, make, say)
    reads = lose_a_replica(cluster, model, say)
    say(f"reads by reason: {decisions()['default']}")
    return found and not reads.failures


def read_your_writes(
    cluster: Cluster, model: type[models.Model], make: Callable[[], models.Model], say: Say = print
) -> bool:
    """Write, read at once, read a moment later, on a standby that is two seconds behind."""
    _until(lambda: _serves(model) != "default", 10)
    cluster.standbys[0].set_lag(2)
    try:
        made = make()
        seen = model._default_manager.get(pk=made.pk)
        say(f"written, and read at once from {seen._state.db}: {explain(model)}")
        waited = _until(lambda: _serves(model) != "default", 10)
        again = model._default_manager.get(pk=made.pk)
        say(f"{waited:.1f} s later, read from {again._state.db}: {explain(model)}")
        return seen == again == made
    finally:
        cluster.standbys[0].set_lag(0)


@dataclass
class Reads:
    """What a loop of reads met."""

    by_alias: dict[str, int] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    longest: float = 0.0

    def __str__(self) -> str:
        shares = ", ".join(f"{n} from {alias}" for alias, n in sorted(self.by_alias.items()))
        return f"{shares}; {len(self.failures)} failed; the longest took {self.longest * 1000:.0f} ms"


def lose_a_replica(cluster: Cluster, model: type[models.Model], say: Say = print) -> Reads:
    """Kill the replica while a loop reads, and bring it back."""
    reads, ended = Reads(), threading.Event()

    def loop() -> None:
        try:
            while not ended.is_set():
                begun = time.perf_counter()
                try:
                    found: Any = model._default_manager.first()
                    alias = found._state.db
                    reads.by_alias[alias] = reads.by_alias.get(alias, 0) + 1
                except Exception as error:
                    reads.failures.append(error)
                reads.longest = max(reads.longest, time.perf_counter() - begun)
                time.sleep(0.002)
        finally:
            connections.close_all()

    _until(lambda: _serves(model) != "default", 10)
    thread = threading.Thread(target=loop)
    thread.start()
    try:
        time.sleep(0.5)
        cluster.standbys[0].kill()
        time.sleep(1)
        say(f"the replica was killed: {reads}")
        cluster.standbys[0].restart()
        took = _until(lambda: _serves(model) != "default", 15)
        time.sleep(0.5)
    finally:
        ended.set()
        thread.join()
    say(f"it is back, and was used again after {took:.1f} s: {reads}")
    return reads


def _serves(model: type[models.Model]) -> str:
    return model._default_manager.all().db


def _until(condition: Callable[[], bool], seconds: float) -> float:
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - begun
