"""Clusters to look at, each of two kinds of installation, where they are there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster, PostgresNotFound


def eventually(condition: Callable[[], object], timeout: float = 10, every: float = 0.02) -> float:
    """Wait until it holds; how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout, f"not so after {timeout} s"
        time.sleep(every)
    return time.monotonic() - begun


def processes_naming(base: str | Path) -> list[str]:
    """Command lines that mention a cluster's directory or name, by a plain look at the process table."""
    name = Path(base).name
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if name in line:
                found.append(f"{entry.name} {line}")
    return found


def gone(base: str | Path) -> bool:
    return not Path(base).exists() and not processes_naming(base)


def start(standbys: int, postgres: str) -> Cluster:
    try:
        return Cluster(standbys, postgres=postgres).start()
    except PostgresNotFound as error:
        pytest.skip(error.reason)


CHOICE = os.environ.get("SCALEDB_POSTGRES", "")


@pytest.fixture(
    scope="module", params=[CHOICE] if CHOICE not in ("", "container") else ["embedded", "system"]
)
def pair(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A primary and two standbys for a module; every test leaves them running and replicating."""
    with start(2, request.param) as cluster:
        with cluster.primary.connect() as connection:
            connection.execute("CREATE TABLE entries (n int)")
        cluster.wait_for_catchup()
        yield cluster
