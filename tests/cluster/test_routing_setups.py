"""Routing in the surroundings that it promises to work in: several primaries, pools, PgBouncer, Celery."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.db import connection, connections, router, transaction

from django_scaledb.routing import current_token, explain, registry, use_token
from django_scaledb.routing.policy import Reason
from django_scaledb.routing.token import decode, format_lsn, parse_lsn, reachable
from django_scaledb.testing import Cluster
from tests.bouncer import pgbouncer
from tests.routing import eventually, migrate, routed
from tests.testapp.models import Account, Tag

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(django_db_setup, django_db_blocker) -> Iterator[Cluster]:
    with Cluster(1) as cluster, django_db_blocker.unblock():
        migrate(cluster)
        yield cluster


@pytest.fixture(autouse=True)
def _in_a_context_of_its_own() -> None:
    from django_scaledb.routing import state

    state.thread.frame = state.Frame(state.Scope())
    state.current.set(None)


def where(model=Account) -> str:
    return model.objects.all().db


@contextmanager
def lagging(cluster: Cluster, seconds: float) -> Iterator[None]:
    cluster.wait_for_catchup()
    cluster.standbys[0].set_lag(seconds)
    try:
        yield
    finally:
        cluster.standbys[0].set_lag(0)


# An idle primary


@contextmanager
def idle(cluster: Cluster) -> Iterator[None]:
    """Inside, the primary writes nothing of its own accord: what might is stopped."""
    rows = cluster.primary.execute(
        "SELECT pid FROM pg_stat_activity WHERE backend_type IN "
        "('background writer', 'checkpointer', 'autovacuum launcher', 'autovacuum worker')"
    )
    try:
        for (pid,) in rows:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for (pid,) in rows:
            os.kill(pid, signal.SIGCONT)


def _insert_lsn(cluster: Cluster) -> int:
    return parse_lsn(cluster.primary.execute("SELECT pg_current_wal_insert_lsn()::text", dbname="app")[0][0])


def _write(size: int) -> int:
    """One transaction with `size` bytes of payload; the position that this context remembers of it."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', %s))", [size])
    (position,) = decode(current_token())
    return position.lsn


PAGE, SEGMENT = 8192, 16 << 20


@pytest.mark.parametrize(("unit", "header"), [(PAGE, 24), (SEGMENT, 40)], ids=["page", "segment"])
def test_a_write_that_ends_with_its_page_is_replayed_all_the_same(
    cluster: Cluster, unit: int, header: int
) -> None:
    """The insert position then stands behind the next page's header, which replicas do not reach while the
    primary is idle."""
    standby = cluster.standbys[0]
    with routed(cluster), idle(cluster):
        eventually(lambda: where() == "replica1", 5)
        overhead = position = 0
        for _ in range(200):
            here = _insert_lsn(cluster)
            if position and here % unit == header:
                break
            room = unit - here % unit
            if room > 4 * PAGE:  # most of a segment: nearly to its end, past the header of each page
                position = _write(room - room // PAGE * 24 - 2 * PAGE)
            elif overhead and room % PAGE > overhead + 300:
                position = _write(room % PAGE - overhead)
                overhead = 0  # measured again after a miss: hint bits may have been logged beside it
            else:
                position = _write(1000)
                if position // PAGE == here // PAGE:
                    overhead = position - here - 1000
        else:
            pytest.fail("no write ended with its page")
        assert position % unit == 0
        eventually(lambda: where() == "replica1", 3)
        assert standby.execute("SELECT pg_last_wal_replay_lsn()::text") == [(format_lsn(position),)]
        assert _insert_lsn(cluster) == position + header, "the primary was idle"


def test_a_position_is_behind_its_commit_although_that_is_not_on_disk(cluster: Cluster) -> None:
    with routed(cluster), idle(cluster):
        _write(1000)
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL synchronous_commit = off")
            Account.objects.create(name="soon on disk")
        (position,) = decode(current_token())
        assert position.lsn == reachable(_insert_lsn(cluster))


# Several primaries


def test_each_primary_has_its_replicas(cluster: Cluster, django_db_blocker) -> None:
    with Cluster(1) as other, django_db_blocker.unblock():
        migrate(other)
        more = {
            "orders": other.primary.django_settings(CONN_MAX_AGE=600),
            "orders1": other.standbys[0].django_settings(CONN_MAX_AGE=600),
        }
        sets = {"orders": {"REPLICAS": ["orders1"], "MODELS": ["testapp.Tag"]}}
        with routed(cluster, more=more, MORE_PRIMARIES=sets, MAX_LAG=60):
            eventually(lambda: (where(Account), where(Tag)) == ("replica1", "orders1"), 5)
            with lagging(other, 3):
                tag = Tag.objects.create(name="a")
                assert tag._state.db == "orders"
                assert (where(Account), where(Tag)) == ("replica1", "orders")
                assert Tag.objects.get(pk=tag.pk) == tag
                Account.objects.create(name="a")
                assert len(decode(current_token())) == 2
                eventually(lambda: where(Account) == "replica1", 1)
                assert where(Tag) == "orders"
            eventually(lambda: where(Tag) == "orders1", 5)
            with transaction.atomic(using="orders"):
                assert explain(Tag).reason is Reason.TRANSACTION
                assert where(Account) == "replica1"
            assert not router.allow_relation(Account(), tag)
            assert router.allow_relation(Tag.objects.using("orders1").get(), tag)
            assert router.allow_migrate("orders", "testapp", model_name="tag")
            assert not router.allow_migrate("default", "testapp", model_name="tag")
            assert not router.allow_migrate("orders", "testapp", model_name="account")
            assert not router.allow_migrate("orders1", "testapp", model_name="tag")
            other.standbys[0].kill()
            assert Tag.objects.get(pk=tag.pk)
            assert where(Account) == "replica1"


# psycopg's pool


@pytest.mark.slow  # tests/proofs has the short one
def test_a_pool_of_connections(cluster: Cluster) -> None:
    pytest.importorskip("psycopg_pool")
    standby = cluster.standbys[0]
    pooled = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 4}}}
    with routed(cluster, max_age=0, extra=pooled, MAX_LAG=60):
        eventually(lambda: where() == "replica1", 5)
        with lagging(cluster, 2):
            made = Account.objects.create(name="pooled")
            assert where() == "default"
            with transaction.atomic():
                Account.objects.filter(pk=made.pk).update(name="pooled twice")
            assert Account.objects.get(pk=made.pk).name == "pooled twice"
            eventually(lambda: where() == "replica1", 5)
        assert Account.objects.get(pk=made.pk)._state.db == "replica1"
        _survives(standby.kill, standby.restart, made.pk)
        _survives(standby.freeze, standby.thaw, made.pk)


def _survives(strike, repair, pk: int) -> None:
    """Reads go on through what `strike` does, and the replica is used again after `repair`."""
    failures, longest, stopped = [], 0.0, threading.Event()

    def read() -> None:
        nonlocal longest
        while not stopped.is_set():
            begun = time.monotonic()
            try:
                Account.objects.get(pk=pk)
            except Exception as error:
                failures.append(error)
            longest = max(longest, time.monotonic() - begun)
            connections.close_all()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        strike()
        eventually(lambda: where() == "default", 3)
        time.sleep(0.5)
        repair()
        eventually(lambda: where() == "replica1", 15)
        time.sleep(0.3)
    finally:
        stopped.set()
        for thread in threads:
            thread.join(10)
    assert not failures
    assert longest < 2


# PgBouncer


@pytest.fixture
def bouncer(cluster: Cluster) -> Iterator[Path]:
    """PgBouncer in transaction mode in front of both servers; the directory of its socket."""
    nodes = {"primary": cluster.primary, "replica": cluster.standbys[0]}
    with pgbouncer({name: (node, node.access.database) for name, node in nodes.items()}) as home:
        yield home


@pytest.mark.slow  # tests/proofs has the short one
def test_pgbouncer_in_transaction_mode(cluster: Cluster, bouncer: Path) -> None:
    standby = cluster.standbys[0]
    common = {"HOST": str(bouncer), "PORT": "6432", "DISABLE_SERVER_SIDE_CURSORS": True}
    more = {
        alias: {**entry, **common, "NAME": name}
        for (alias, entry), name in zip(
            cluster.django_databases(mirror=False, CONN_MAX_AGE=0).items(),
            ("primary", "replica"),
            strict=True,
        )
    }
    with routed(cluster, more=more, MAX_LAG=60):
        eventually(lambda: where() == "replica1", 5)
        with lagging(cluster, 2):
            made = Account.objects.create(name="bounced")
            assert where() == "default"
            assert Account.objects.get(pk=made.pk) == made
            with transaction.atomic():
                Account.objects.filter(pk=made.pk).update(name="bounced twice")
                assert explain(Account).reason is Reason.TRANSACTION
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM testapp_account WHERE upper(name) = 'X'")
                with cursor.copy("COPY testapp_account (name) FROM STDIN") as copy:
                    copy.write_row(["copied"])
            assert where() == "default"
            assert Account.objects.filter(name="copied").exists()
            eventually(lambda: where() == "replica1", 5)
        assert Account.objects.get(pk=made.pk).name == "bounced twice"
        assert [account.pk for account in Account.objects.filter(pk=made.pk).iterator()] == [made.pk]
        _survives(standby.kill, standby.restart, made.pk)
        _survives(standby.freeze, standby.thaw, made.pk)


# Celery


@pytest.mark.slow  # tests/proofs has the short one
@pytest.mark.filterwarnings("default")
def test_celery_carries_the_position(cluster: Cluster) -> None:
    pytest.importorskip("celery")
    from celery import Celery
    from celery.contrib.testing.worker import start_worker

    from django_scaledb.contrib import celery as scaledb_celery

    app = Celery("tests", broker="memory://", backend="cache+memory://", set_as_current=False)
    scaledb_celery.install()
    scaledb_celery.install()

    @app.task(name="look")
    def look() -> list[str]:
        try:
            return [where(), current_token()]
        finally:
            connections.close_all()

    @app.task(name="write")
    def write() -> str:
        try:
            Account.objects.create(name="by a task")
            return look.delay().id
        finally:
            connections.close_all()

    def told(result) -> list[str]:
        return result.get(timeout=20, disable_sync_subtasks=False)

    with (
        routed(cluster, MAX_LAG=60),
        start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=20),
    ):
        eventually(lambda: where() == "replica1", 5)
        with lagging(cluster, 60):
            assert told(look.delay())[0] == "replica1"
            follower = app.AsyncResult(told(write.delay()))
            assert told(follower)[0] == "default", "it was sent by a task that had written"
            assert told(look.delay())[0] == "replica1", "what a task wrote does not stay with the worker"
            with use_token(""):
                Account.objects.create(name="by the sender")
                first = look.delay()
            assert told(first) == ["default", current_token()]
        registry.forget()
