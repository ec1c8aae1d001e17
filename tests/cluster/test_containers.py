"""The same nodes as containers. Skipped where no engine answers, or the image cannot be had."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import psycopg
import pytest

from django_scaledb.testing import Cluster, ClusterError, PostgresNotFound

from .conftest import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.container]


def of_cluster(token: str) -> list[str]:
    import docker

    client = docker.from_env()
    try:
        chosen = {"label": f"org.django_scaledb.cluster={token}"}
        objects = [*client.containers.list(all=True, filters=chosen), *client.networks.list(filters=chosen)]
        return [item.name for item in objects]
    finally:
        client.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    try:
        cluster = Cluster(1, postgres="container", settings={"max_connections": 50}).start()
    except PostgresNotFound as error:
        pytest.skip(error.reason)
    with cluster:
        yield cluster
        token = cluster.primary.execute("SHOW cluster_name")[0][0].rsplit("-", 1)[0]
        assert len(of_cluster(token)) == len(cluster.nodes) + 1
    assert of_cluster(token) == []


def count(pair: Cluster) -> list[int]:
    found = []
    for node in pair.nodes:
        with node.connect() as connection:
            row = connection.execute("SELECT count(*) FROM entries").fetchone()
            found.append(row[0] if row else -1)
    return found


def write(pair: Cluster) -> None:
    with pair.primary.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS entries (n int)")
        connection.execute("INSERT INTO entries VALUES (1)")


def test_replication_lag_and_pause(pair: Cluster) -> None:
    write(pair)
    pair.wait_for_catchup()
    assert count(pair) == [1, 1]
    with psycopg.connect(pair.standbys[0].dsn) as connection:
        assert connection.execute(
            "SELECT current_setting('is_superuser'), pg_is_in_recovery()"
        ).fetchone() == (
            "off",
            True,
        )
    pair.standbys[0].set_lag(30)
    write(pair)
    time.sleep(0.2)
    assert count(pair) == [2, 1]
    pair.standbys[0].set_lag(0)
    pair.wait_for_catchup()
    pair.standbys[0].pause_replay()
    write(pair)
    pair.wait_for_catchup()
    assert count(pair) == [3, 2]
    pair.standbys[0].resume_replay()
    pair.wait_for_catchup()
    assert count(pair) == [3, 3]


@pytest.mark.parametrize("which", [0, 1], ids=["primary", "standby"])
def test_faults(pair: Cluster, which: int) -> None:
    node = pair.nodes[which]
    address = (node.host, node.port)
    with node.connect() as connection:
        node.freeze()
        assert node.is_running
        assert node.is_frozen
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            node.connect(connect_timeout=2)
        with pytest.raises(ClusterError, match="is frozen"):
            node.replay_lsn()
        node.thaw()
        assert connection.execute("SELECT 1").fetchone() == (1,)
        node.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not node.is_running
    with pytest.raises(ClusterError, match="is not running"):
        node.replay_lsn()
    node.restart()
    node.freeze()
    node.kill()
    assert not node.is_running
    node.restart()
    node.stop()
    node.restart()
    assert (node.host, node.port) == address
    write(pair)
    pair.wait_for_catchup()
    assert len(set(count(pair))) == 1


def test_add_standby_and_promote(pair: Cluster) -> None:
    pair.add_standby()
    write(pair)
    pair.wait_for_catchup()
    assert len(set(count(pair))) == 1
    pair.standbys[0].promote()
    assert not pair.standbys[0].in_recovery
    assert "ready to accept connections" in pair.standbys[0].log()


def test_nothing_is_left_when_the_owner_is_killed(pair: Cluster) -> None:
    code = """
        import os
        from django_scaledb.testing import Cluster
        cluster = Cluster(0, postgres="container").start()
        print(cluster.primary.execute("SHOW cluster_name")[0][0], flush=True)
        os.kill(os.getpid(), 9)
        """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    token = result.stdout.strip().removesuffix("-primary")
    assert token
    eventually(lambda: not of_cluster(token), 60, every=0.5)


def test_an_image_that_cannot_be_had_is_said() -> None:
    code = """
        from django_scaledb.testing import Cluster, PostgresNotFound
        try:
            Cluster(0, postgres="container").start()
        except PostgresNotFound as error:
            print(error.reason)
        """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"SCALEDB_POSTGRES_IMAGE": "localhost:9/no-such-image:1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "no container engine answers" in result.stdout or "not installed" in result.stdout:
        pytest.skip(result.stdout)
    assert "the image localhost:9/no-such-image:1 cannot be" in result.stdout
