"""Replicas that die, freeze, fall behind, are promoted and come back, while somebody reads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.core.management import call_command
from django.db import connections, transaction

from django_scaledb.routing import decisions, explain, registry
from django_scaledb.testing import Cluster
from tests.routing import eventually, migrate, routed
from tests.testapp.models import Account

pytestmark = pytest.mark.cluster


@contextmanager
def _cluster(blocker) -> Iterator[Cluster]:
    with Cluster(2) as cluster, blocker.unblock():
        migrate(cluster)
        cluster.primary.execute("INSERT INTO testapp_account (name) VALUES ('first')", dbname="app")
        cluster.wait_for_catchup()
        yield cluster


@pytest.fixture
def cluster(django_db_setup, django_db_blocker) -> Iterator[Cluster]:
    """One primary with two standbys, for this test alone."""
    with _cluster(django_db_blocker) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(django_db_setup, django_db_blocker) -> Iterator[Cluster]:
    """The same for all tests that leave it as they found it."""
    with _cluster(django_db_blocker) as cluster:
        yield cluster


def where() -> str:
    return Account.objects.all().db


def in_use() -> set[str]:
    return {c.alias for c in registry.registry().sets["default"].candidates}


class Readers:
    """Threads that read without a pause: what failed, how long the longest took, and who answered."""

    def __init__(self, threads: int = 4, *, max_age: int | None) -> None:
        self.failures: list[BaseException] = []
        self.longest = 0.0
        self.count = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.max_age = max_age
        self.threads = [threading.Thread(target=self.read) for _ in range(threads)]

    def read(self) -> None:
        while not self.stopped.is_set():
            begun = time.monotonic()
            try:
                Account.objects.get(name="first")
            except Exception as error:
                self.failures.append(error)
            took = time.monotonic() - begun
            with self.lock:
                self.longest = max(self.longest, took)
                self.count += 1
            if not self.max_age:
                connections.close_all()
            time.sleep(0.002)
        connections.close_all()


@contextmanager
def reading(max_age: int | None) -> Iterator[Readers]:
    readers = Readers(max_age=max_age)
    for thread in readers.threads:
        thread.start()
    eventually(lambda: readers.count > 50, 5)
    try:
        yield readers
    finally:
        readers.stopped.set()
        for thread in readers.threads:
            thread.join(10)


FAULTS = ["kill", "freeze", "restart", "promote", "lag", "all killed", "all frozen"]
QUICK = [("kill", 600), ("freeze", 0), ("promote", 600)]


@pytest.mark.parametrize(
    ("fault", "max_age"),
    [
        pytest.param(f, a, marks=() if (f, a) in QUICK else pytest.mark.slow, id=f"{f} CONN_MAX_AGE={a}")
        for f in FAULTS
        for a in (0, 600)
    ],
)
def test_no_read_fails_and_none_waits_long(cluster: Cluster, fault: str, max_age: int) -> None:
    with routed(cluster, max_age=max_age, MAX_LAG=2):
        where()
        eventually(lambda: in_use() == {"replica1", "replica2"}, 5)
        with reading(max_age) as readers:
            within, gone = _strike(cluster, fault)
            left = eventually(lambda: not (in_use() & gone), within)
            time.sleep(1.5)
            assert not in_use() & gone
            if fault != "promote":
                back_within = _repair(cluster, fault)
                back = eventually(lambda: in_use() >= gone, back_within)
                time.sleep(0.3)
            else:
                back = 0
        print(
            f"\n{fault}, CONN_MAX_AGE {max_age}: {readers.count} reads, {len(readers.failures)} failed, "
            f"longest {readers.longest:.2f} s, left after {left:.2f} s, back after {back:.2f} s"
        )
        assert not readers.failures
        assert readers.longest < 2


def _strike(cluster: Cluster, fault: str) -> tuple[float, set[str]]:
    one, two = cluster.standbys
    if fault == "kill":
        one.kill()
        return 0.5, {"replica1"}
    if fault == "freeze":
        one.freeze()
        return 3, {"replica1"}
    if fault == "restart":
        one.stop()
        return 0.5, {"replica1"}
    if fault == "promote":
        one.promote()
        return 2, {"replica1"}
    if fault == "lag":
        one.pause_replay()
        cluster.primary.execute("INSERT INTO testapp_account (name) VALUES ('later')", dbname="app")
        return 2 + 2, {"replica1"}
    for standby in (one, two):
        standby.kill() if fault == "all killed" else standby.freeze()
    return 0.5 if fault == "all killed" else 3, {"replica1", "replica2"}


def _repair(cluster: Cluster, fault: str) -> float:
    one, two = cluster.standbys
    if fault in ("kill", "restart"):
        one.restart()
    elif fault == "freeze":
        one.thaw()
    elif fault == "lag":
        one.resume_replay()
        return 1
    else:
        for standby in (one, two):
            standby.restart() if fault == "all killed" else standby.thaw()
    return 15


def test_a_promoted_standby_is_left_with_its_first_answer(cluster: Cluster) -> None:
    """Before the monitor looks again: the answer itself says that it comes from a primary."""
    promoted = cluster.standbys[0]
    with routed(cluster, POLL_INTERVAL=30):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        assert Account.objects.using("replica1").count() == 1
        promoted.promote()
        promoted.execute("INSERT INTO testapp_account (name) VALUES ('of another history')", dbname="app")
        assert Account.objects.using("replica1").count() == 1
        assert in_use() == {"replica2"}


@pytest.mark.parametrize("max_age", [pytest.param(0, marks=pytest.mark.slow), 600])
def test_a_standby_takes_over_from_a_dead_primary(cluster: Cluster, max_age: int) -> None:
    """Reads do not notice; once ``default`` is the new primary, what is written there is read there."""
    with routed(cluster, max_age=max_age, MAX_LAG=2):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        Account.objects.create(name="before")
        with reading(max_age) as readers:
            cluster.primary.kill()
            time.sleep(1.5)
            assert in_use() == {"replica1", "replica2"}
            cluster.standbys[0].promote()
            eventually(lambda: in_use() == {"replica2"}, 2)
            # As an address that moves to the new primary.
            connections.settings["default"].update(connections.settings["replica1"])
            connections["default"].close()
            members = registry.registry().sets["default"]
            eventually(lambda: members.identity.timeline == 2, 5)
            Account.objects.create(name="after")
            assert where() == "default"
            assert Account.objects.get(name="after")._state.db == "default"
            # It follows nobody any more.
            left = eventually(lambda: not in_use(), 2 + 2)
            time.sleep(0.5)
            assert not in_use()
        print(
            f"\nprimary dead, standby promoted, CONN_MAX_AGE {max_age}: {readers.count} reads, "
            f"{len(readers.failures)} failed, longest {readers.longest:.2f} s, "
            f"the other standby left {left:.2f} s after the first write"
        )
        assert not readers.failures
        assert readers.longest < 2


def test_an_idle_primary_is_no_lag(calm: Cluster) -> None:
    with routed(calm, MAX_LAG=0.5):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        time.sleep(1.5)
        assert len(in_use()) == 2


def test_a_read_in_flight_on_a_frozen_replica_is_run_elsewhere(calm: Cluster) -> None:
    with routed(calm):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        Account.objects.using("replica1").get(name="first")
        calm.standbys[0].freeze()
        begun = time.monotonic()
        assert Account.objects.using("replica1").get(name="first").name == "first"
        assert time.monotonic() - begun < 2
        assert in_use() == {"replica2"}
        calm.standbys[0].thaw()


def test_a_replica_that_receives_nothing_is_left(cluster: Cluster, capsys) -> None:
    """It has replayed all that it got, and so believes itself that it is not behind; also when that began
    before this process."""
    deaf = cluster.standbys[0]
    deaf.execute("ALTER SYSTEM SET primary_conninfo = ''")
    deaf.execute("SELECT pg_reload_conf()")
    eventually(lambda: not deaf.execute("SELECT 1 FROM pg_stat_wal_receiver"), 5)
    cluster.primary.execute("INSERT INTO testapp_account (name) VALUES ('missing')", dbname="app")
    with routed(cluster, MAX_LAG=1):
        where()
        eventually(lambda: in_use() == {"replica2"}, 1 + 2)
        time.sleep(1)
        assert in_use() == {"replica2"}
        with pytest.raises(SystemExit):
            call_command("show_replicas", check=True)
        assert "MAX_LAG is 1 s" in capsys.readouterr().out


def test_a_recovery_conflict_is_not_seen(calm: Cluster) -> None:
    with routed(calm):
        where()
        calm.standbys[0].execute("ALTER SYSTEM SET max_standby_streaming_delay = '100ms'")
        calm.standbys[0].execute("SELECT pg_reload_conf()")
        time.sleep(0.2)
        rows = []

        def read() -> None:
            try:
                sql = "SELECT 1 AS id, 'x' AS name FROM testapp_account, pg_sleep(1.5)"
                rows.append(len(list(Account.objects.using("replica1").raw(sql))))
            finally:
                connections.close_all()

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.5)
        calm.primary.execute("BEGIN; LOCK TABLE testapp_account; COMMIT", dbname="app")
        thread.join(10)
        assert rows == [1]
        assert "conflict" in calm.standbys[0].log()
        assert "replica1" in in_use()


def test_a_transaction_on_a_replica_is_not_moved(cluster: Cluster) -> None:
    lost = pytest.raises(Exception, match=r"connection|terminat")
    with routed(cluster), lost, transaction.atomic(using="replica1"):
        Account.objects.using("replica1").count()
        cluster.standbys[0].kill()
        Account.objects.using("replica1").count()


def test_a_function_that_writes_moves_to_the_primary(calm: Cluster) -> None:
    calm.primary.execute(
        "CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS "
        "$$ INSERT INTO testapp_account (name) VALUES ('by function') RETURNING 1 $$",
        dbname="app",
    )
    calm.wait_for_catchup()
    with routed(calm):
        where()
        with connections["replica1"].cursor() as cursor:
            cursor.execute("SELECT writes()")
            assert cursor.fetchone() == (1,)
        assert Account.objects.filter(name="by function").exists()
        with pytest.raises(Exception, match="read-only"):
            Account.objects.using("replica1").create(name="no")


def test_a_context_never_goes_back_in_time(calm: Cluster) -> None:
    with routed(calm):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        calm.standbys[1].set_lag(1)
        calm.primary.execute("INSERT INTO testapp_account (name) VALUES ('news')", dbname="app")
        seen = []
        for _ in range(400):
            seen.append(Account.objects.filter(name="news").exists())
            time.sleep(0.001)
        calm.standbys[1].set_lag(0)
        assert seen == sorted(seen)
        assert seen[-1]


def test_replicas_share_the_load_in_every_process(calm: Cluster) -> None:
    with routed(calm, max_age=0):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        assert {where() for _ in range(64)} == {"replica1", "replica2"}
        connections.close_all()
        reader, writer = os.pipe()
        if not (child := os.fork()):
            try:
                eventually(lambda: {where() for _ in range(64)} == {"replica1", "replica2"}, 3)
                Account.objects.get(name="first")
                os.write(writer, b"both")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.set_blocking(reader, False)
        assert os.read(reader, 10) == b"both"
        assert Account.objects.get(name="first")


def test_weights(calm: Cluster) -> None:
    with routed(calm, REPLICAS={"replica1": 9, "replica2": 1}):
        where()
        eventually(lambda: len(in_use()) == 2, 5)
        members = registry.registry().sets["default"]
        for replica in members.replicas.values():
            replica.latency = 0.001
        counts = {"replica1": 0, "replica2": 0}
        for _ in range(20):
            members.publish()
            for alias in members.choices[0]:
                counts[alias] += 1
        assert counts["replica1"] > 4 * counts["replica2"] > 0


def test_everything_but_reading_works_with_every_replica_down(cluster: Cluster, capsys) -> None:
    for standby in cluster.standbys:
        standby.kill()
    with routed(cluster, max_age=0):
        call_command("check")
        call_command("check", databases=["default"])
        call_command("migrate", verbosity=0)
        assert not registry.registry().sets["default"].started
        assert Account.objects.get(name="first")
        assert "no replica is healthy" in str(explain(Account))
        assert decisions()["default"]["no_replica"] >= 1
        with pytest.raises(SystemExit):
            call_command("show_replicas", check=True)
        out = capsys.readouterr().out
        assert "replica1" in out
        assert "primary" in out


def test_show_replicas(calm: Cluster, capsys) -> None:
    with routed(calm, MAX_LAG=1):
        call_command("show_replicas", check=True)
        calm.standbys[0].pause_replay()
        calm.primary.execute("INSERT INTO testapp_account (name) VALUES ('later')", dbname="app")
        time.sleep(1.2)
        call_command("show_replicas", format="json")
        calm.primary.execute("INSERT INTO testapp_account (name) VALUES ('later')", dbname="app")
        with pytest.raises(SystemExit):
            call_command("show_replicas", check=True)
        calm.standbys[0].resume_replay()
        assert "MAX_LAG is 1 s" in capsys.readouterr().out


def test_no_monitor_for_a_process_that_does_not_read(calm: Cluster) -> None:
    with routed(calm):
        call_command("check")
        call_command("migrate", verbosity=0)
        Account.objects.create(name="a")
        with transaction.atomic():
            list(Account.objects.all())
        assert not registry.registry().sets["default"].started
        assert not any("monitor" in t.name for t in threading.enumerate())
        assert all(connections[alias].connection is None for alias in ("replica1", "replica2"))
        clients = "SELECT 1 FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename = 'app'"
        assert not any(standby.execute(clients) for standby in calm.standbys)
