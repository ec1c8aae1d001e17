"""What can be done to the nodes of a running cluster."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster, ClusterError, Node

from .conftest import eventually, processes_naming

pytestmark = pytest.mark.cluster

numbers = itertools.count(1)


def write(cluster: Cluster) -> int:
    number = next(numbers)
    with cluster.primary.connect() as connection:
        connection.execute("INSERT INTO entries VALUES (%s)", [number])
    return number


def sees(node: Node, number: int) -> bool:
    with node.connect() as connection:
        row = connection.execute("SELECT count(*) FROM entries WHERE n = %s", [number]).fetchone()
        assert row is not None
        return bool(row[0])


def test_standbys_stream_from_the_primary(pair: Cluster) -> None:
    assert not pair.primary.in_recovery
    assert [node.in_recovery for node in pair.standbys] == [True, True]
    rows = pair.primary.execute("SELECT state FROM pg_stat_replication")
    assert rows == [("streaming",), ("streaming",)]
    number = write(pair)
    pair.wait_for_catchup()
    assert [sees(node, number) for node in pair.nodes] == [True, True, True]


def test_the_default_role_is_an_ordinary_one_that_owns_the_database(pair: Cluster) -> None:
    with pair.primary.connect() as connection:
        row = connection.execute(
            "SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, d.datname"
            " FROM pg_roles r JOIN pg_database d ON d.datdba = r.oid AND d.datname = current_database()"
            " WHERE rolname = current_user"
        ).fetchone()
        assert row == (False, True, False, False, False, "app")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("ALTER SYSTEM SET work_mem = '8MB'")
    with psycopg.connect(pair.primary.superuser_dsn) as connection:
        assert connection.execute("SHOW is_superuser").fetchone() == ("on",)


def test_django_settings_lead_to_the_node(pair: Cluster) -> None:
    settings = pair.standbys[1].django_settings(CONN_MAX_AGE=5)
    assert settings["ENGINE"] == "django_scaledb.backend"
    assert settings["CONN_MAX_AGE"] == 5
    with psycopg.connect(
        host=settings["HOST"],
        port=settings["PORT"],
        user=settings["USER"],
        password=settings["PASSWORD"],
        dbname=settings["NAME"],
    ) as connection:
        assert connection.execute("SHOW cluster_name").fetchone() == (
            f"{Path(settings['HOST']).name}-standby2",
        )
    databases = pair.django_databases("some.engine")
    assert list(databases) == ["default", "replica1", "replica2"]
    assert databases["replica1"]["TEST"] == {"MIRROR": "default"}
    assert "TEST" not in databases["default"]


def test_the_callers_variables_lead_nowhere_else(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_read_only=nonsense")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGDATABASE", "other")
    assert pair.standbys[0].in_recovery


def test_text_is_utf8_whatever_the_locale(pair: Cluster) -> None:
    with pair.primary.connect() as connection:
        assert connection.execute("SELECT upper('é'), getdatabaseencoding()").fetchone() == ("É", "UTF8")


def test_lag_delays_one_standby(pair: Cluster) -> None:
    slow, quick = pair.standbys
    slow.set_lag(1.5)
    try:
        begun = time.monotonic()
        number = write(pair)
        eventually(lambda: sees(quick, number), 1.2)
        assert not sees(slow, number)
        eventually(lambda: sees(slow, number), 5)
        assert 1.4 < time.monotonic() - begun < 4
        slow.set_lag(60)
        number = write(pair)
        time.sleep(0.2)
        assert not sees(slow, number)
    finally:
        slow.set_lag(0)
    pair.wait_for_catchup(2)
    assert sees(slow, number)


def test_a_paused_standby_stays_where_it_is(pair: Cluster) -> None:
    paused, other = pair.standbys
    paused.pause_replay()
    position = paused.replay_lsn()
    number = write(pair)
    pair.wait_for_catchup(5)  # does not wait for the paused one
    assert sees(other, number)
    assert not sees(paused, number)
    assert paused.replay_lsn() == position
    assert paused.is_replay_paused
    paused.resume_replay()
    pair.wait_for_catchup(5)
    assert sees(paused, number)


def test_a_lagging_standby_can_be_paused(pair: Cluster) -> None:
    standby = pair.standbys[0]
    standby.set_lag(30)
    number = write(pair)
    begun = time.monotonic()
    standby.pause_replay(timeout=5)
    assert time.monotonic() - begun < 2
    standby.set_lag(0)
    time.sleep(0.2)
    assert not sees(standby, number)
    standby.resume_replay()
    pair.wait_for_catchup(5)


def test_wait_for_catchup_says_who_is_behind(pair: Cluster) -> None:
    standby = pair.standbys[1]
    standby.set_lag(30)
    try:
        write(pair)
        with pytest.raises(ClusterError, match=r"standby2 has replayed \w+/\w+, not yet \w+/\w+"):
            pair.wait_for_catchup(0.3)
    finally:
        standby.set_lag(0)


@pytest.mark.parametrize("which", [0, 1], ids=["primary", "standby"])
def test_a_killed_node_is_dead_at_once_and_comes_back(pair: Cluster, which: int) -> None:
    node = pair.nodes[which]
    before = write(pair)
    pair.wait_for_catchup()
    with node.connect() as connection:
        node.kill()
        assert not node.is_running
        assert not [line for line in processes_naming(node.host) if f"-{node.name}: " in line]
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        node.connect()
    with pytest.raises(ClusterError, match=r"is not running; restart\(\) it first"):
        node.replay_lsn()
    node.kill()  # again: nothing
    if which:
        missed = write(pair)
        pair.wait_for_catchup(5)
    node.restart()
    if not which:
        missed = write(pair)
    pair.wait_for_catchup(10)
    for other in pair.nodes:
        assert sees(other, before)
        assert sees(other, missed)


def test_stop_and_restart_of_a_running_node(pair: Cluster) -> None:
    standby = pair.standbys[0]
    standby.stop()
    assert not standby.is_running
    standby.stop()
    standby.restart()
    standby.restart()
    pair.wait_for_catchup()


def test_a_lock_file_that_names_a_living_process_is_no_hindrance(pair: Cluster) -> None:
    standby = pair.standbys[0]
    lock_file = Path(standby.host, standby.name, "postmaster.pid")
    socket_lock = Path(standby.host, f".s.PGSQL.{standby.port}.lock")
    standby.kill()
    # The number was given to another server of the same user meanwhile.
    for file in (lock_file, socket_lock):
        _, *lines = file.read_text().splitlines()
        file.write_text("\n".join([str(pair.primary.pid), *lines, ""]))  # type: ignore[attr-defined]
    standby.restart()
    pair.wait_for_catchup()


@pytest.mark.parametrize("which", [0, 1], ids=["primary", "standby"])
def test_a_frozen_node_hangs_and_thaws(pair: Cluster, which: int) -> None:
    node = pair.nodes[which]
    with node.connect() as connection:
        node.freeze()
        begun = time.monotonic()
        try:
            assert node.is_running
            assert node.is_frozen
            states = [
                Path("/proc", line.split()[0], "stat").read_text().rsplit(")", 1)[1].split()[0]
                for line in processes_naming(node.host)
                if f"-{node.name}: " in line
            ]
            assert len(states) > 3
            assert set(states) == {"T"}
            if which:
                with pytest.raises(psycopg.errors.ConnectionTimeout):
                    node.connect(connect_timeout=2)
                assert 1.5 < time.monotonic() - begun < 4
            with pytest.raises(ClusterError, match=r"is frozen and does not answer; thaw\(\) it first"):
                node.set_lag(1)
            if which:
                pair.wait_for_catchup(2)
        finally:
            node.thaw()
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not node.is_frozen
    pair.wait_for_catchup(10)


def test_a_frozen_node_can_be_killed_and_restarted(pair: Cluster) -> None:
    node = pair.standbys[0]
    node.freeze()
    node.kill()
    assert not node.is_frozen
    assert not [line for line in processes_naming(node.host) if f"-{node.name}: " in line]
    node.restart()
    node.freeze()
    node.restart()
    pair.wait_for_catchup()


def test_create_database_for_the_application(pair: Cluster) -> None:
    pair.create_database('strange "name"')
    pair.wait_for_catchup()
    with pair.standbys[0].connect(dbname='strange "name"') as connection:
        assert connection.execute("SELECT current_database()").fetchone() == ('strange "name"',)


# -- from here on the pair is changed for good; keep this order


def test_add_standby(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c no_such_setting=1")
    node = pair.add_standby()
    assert node is pair.standbys[2]
    assert node.name == "standby3"
    number = write(pair)
    pair.wait_for_catchup()
    assert sees(node, number)


def test_promote(pair: Cluster) -> None:
    promoted = pair.standbys[0]
    promoted.set_lag(30)
    promoted.pause_replay()
    promoted.promote()
    assert not promoted.in_recovery
    with promoted.connect() as connection:
        connection.execute("INSERT INTO entries VALUES (-1)")
        assert connection.execute("SELECT count(*) FROM entries WHERE n = -1").fetchone() == (1,)
    assert promoted.execute("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)") == [("00000002",)]
    assert not sees(pair.primary, -1)
    assert not promoted.is_replay_paused
    number = write(pair)
    pair.wait_for_catchup(5)  # leaves the promoted one out
    assert sees(pair.standbys[1], number)
    promoted.restart()
    assert not promoted.in_recovery
