"""A standby follows through a conversion, and what is read by way of the router is never stale."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster
from tests.integration.test_conversion_traffic import check, convert, prepare
from tests.project import Project
from tests.traffic import PARTITIONED_ORDERS

pytestmark = pytest.mark.cluster
COMMAND = ("convert_to_partitioned", "shop.Order")


@pytest.fixture(scope="module")
def followed() -> Iterator[Cluster]:
    with Cluster(1, settings={"max_connections": 60}) as cluster:
        yield cluster


@pytest.mark.parametrize("strategy", ["attach", pytest.param("copy", marks=pytest.mark.slow)])
def test_reads_by_way_of_the_router_are_never_stale_and_never_fail(tmp_path, followed, strategy):
    rows = 4_000
    project = prepare(tmp_path, followed, rows, (*range(100, 104), *range(200, 204)), routed=True)
    followed.wait_for_catchup()
    seen = convert(project, strategy, 0.5)
    check(project, seen, rows)
    assert all(one["on_replica"] > 10 for one in seen)
    # And the standby has what the primary has.
    followed.wait_for_catchup()
    standby = psycopg.connect(followed.standbys[0].conninfo(dbname=project.database))
    with standby:
        everything = "SELECT count(*), sum(hashtextextended(o::text, 0)) FROM shop_order o"
        assert standby.execute(everything).fetchall() == project.query(everything)


@contextmanager
def running(project: Project, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    source = Path(__file__).parent.parent.parent / "src"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project_settings",
        "PYTHONPATH": f"{project.folder}{os.pathsep}{source}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "django", *COMMAND, *arguments],
        cwd=project.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def until(project: Project, condition: str, seconds: float = 60) -> None:
    """Wait until the conversion's row is so."""
    ends = time.monotonic() + seconds
    while not project.query(f"SELECT count(*) FROM django_scaledb_conversion WHERE {condition}")[0][0]:
        assert time.monotonic() < ends, project.query(
            "SELECT phase, step, rows_done FROM django_scaledb_conversion"
        )
        time.sleep(0.05)


def rows_done(project: Project) -> int:
    return project.query("SELECT rows_done FROM django_scaledb_conversion ORDER BY id DESC")[0][0]


@pytest.mark.slow
def test_copying_waits_for_a_standby_that_lags_and_for_rows_that_are_locked(tmp_path, followed):
    rows = 4_000
    project = prepare(tmp_path, followed, rows, (), routed=True)
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    standby = followed.standbys[0]
    followed.wait_for_catchup()
    standby.pause_replay()
    try:
        # Slow enough that the lag shows before all is copied.
        with running(project, "--strategy", "copy", "--throttle", "1000") as process:
            until(project, "step LIKE 'waiting for a standby%'")
            done = rows_done(project)
            assert 0 < done < rows
            assert "last step: waiting for a standby that is" in project.manage(*COMMAND, "--status")
            time.sleep(1.5)
            assert rows_done(project) == done
            with psycopg.connect(project.node.conninfo(dbname=project.database)) as holder:
                locked = holder.execute(
                    "SELECT id FROM shop_order ORDER BY id DESC LIMIT 1 FOR UPDATE"
                ).fetchone()
                standby.resume_replay()
                until(project, f"rows_done > {done}")
                time.sleep(1)
                # The last batch asks for ever fewer rows; nobody else waits for those it has asked for.
                with psycopg.connect(project.node.conninfo(dbname=project.database)) as other:
                    other.execute("SET lock_timeout = '5s'")
                    other.execute("UPDATE shop_order SET total = 1 WHERE id = %s", [locked[0] - 1])
                assert process.poll() is None
                assert rows_done(project) < rows
                assert project.query("SELECT phase FROM django_scaledb_conversion") == [("copying",)]
                holder.execute("UPDATE shop_order SET note = 'held' WHERE id = %s", locked)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0, out
    finally:
        standby.resume_replay()
    assert project.query("SELECT count(*), count(*) FILTER (WHERE note = 'held') FROM shop_order") == [
        (rows, 1)
    ]


@pytest.mark.slow
def test_throttle_bounds_the_rows_a_second(tmp_path, followed):
    project = prepare(tmp_path, followed, 3_000, ())
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    begun = time.monotonic()
    project.manage(*COMMAND, "--strategy", "copy", "--throttle", "1000")
    assert time.monotonic() - begun > 2.5
