"""On a standby that is 3 s behind nothing written is read too early, and nothing is pinned in vain."""

from __future__ import annotations

import asyncio
import re
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections, transaction
from django.db.models import Value
from psycopg import IsolationLevel

from django_scaledb.routing import current_token, explain, registry, use_primary, use_replica, use_token
from django_scaledb.routing.policy import Reason
from django_scaledb.testing import Cluster
from tests.routing import eventually, migrate, routed
from tests.routing_operations import READS, SEEN, WRITES, atomic, old, prepare, raw, where
from tests.testapp.models import Account, Event

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def lagging(request: pytest.FixtureRequest, django_db_setup: None, django_db_blocker) -> Iterator[Cluster]:
    with Cluster(1) as cluster, django_db_blocker.unblock():
        migrate(cluster)
        prepare(cluster)
        cluster.standbys[0].set_lag(3)
        yield cluster


@pytest.fixture(autouse=True)
def _in_a_context_of_its_own(lagging: Cluster) -> Iterator[None]:
    """Each test begins as a process that has written nothing."""
    from django_scaledb.routing import state

    with routed(lagging, MAX_LAG=60):
        state.thread.frame = state.Frame(state.Scope())
        state.current.set(None)
        eventually(lambda: Account.objects.all().db == "replica1", 5)
        yield


@pytest.mark.parametrize("name", WRITES)
def test_what_was_written_is_not_read_from_a_replica_that_lacks_it(name: str) -> None:
    WRITES[name]()

    assert where() == "default", name
    assert current_token()


@pytest.mark.parametrize("name", SEEN)
def test_what_was_written_is_read(name: str) -> None:
    SEEN[name]()


@pytest.mark.parametrize("name", READS)
def test_what_wrote_nothing_pins_nothing(name: str) -> None:
    READS[name]()

    assert where() == "replica1", name


def test_an_error_in_autocommit_names_the_place_in_the_text_that_was_sent() -> None:
    with pytest.raises(Exception, match="does not exist") as caught:
        raw("UPDATE testapp_account SET nothing = 1")()

    assert "LINE 1: UPDATE testapp_account SET nothing" in str(caught.value)
    assert caught.value.__cause__.diag.statement_position == "28"


def test_an_error_of_a_transactions_first_statement_names_its_place_too() -> None:
    with pytest.raises(Exception, match="does not exist") as caught, transaction.atomic():
        raw("UPDATE testapp_account SET nothing = 1")()
    assert "LINE 1: UPDATE testapp_account SET nothing" in str(caught.value)
    with pytest.raises(Exception, match="value too long"), transaction.atomic():
        Account.objects.create(name="x" * 51)
    with transaction.atomic():
        with pytest.raises(Exception, match="syntax error"), transaction.atomic():
            raw("SELECT FROM FROM")()
        Account.objects.create(name="after a savepoint")
    assert where() == "default"


def _messages(operation: Callable[[], object]) -> list[str]:
    """The messages that `operation` sends to the primary, as libpq traces them."""
    connection.ensure_connection()
    pgconn = connection.connection.pgconn
    with tempfile.TemporaryFile("w+") as trace:
        pgconn.trace(trace.fileno())
        try:
            operation()
        finally:
            pgconn.untrace()
        trace.seek(0)
        lines = re.split(r"^\d[-\d]+ [\d:.]+\t", trace.read(), flags=re.M)
        return [line.split("\t", 3)[-1].strip(' "\n') for line in lines if line.startswith("F")]


def test_a_position_travels_with_its_commit() -> None:
    """Nothing makes a round trip of its own, neither the position nor BEGIN."""
    insert = "INSERT INTO testapp_account (name) VALUES ('raw')"
    position = "SELECT pg_current_wal_insert_lsn()"
    has_written = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL"
    write, read = raw(insert), raw("SELECT 1")
    write()

    assert _messages(write) == [f"BEGIN;{insert}\n;COMMIT;{position}"]
    assert _messages(atomic(write, write)) == [f"BEGIN;{insert}", insert, f"COMMIT;{position}"]
    assert _messages(atomic(read, write)) == ["BEGIN;SELECT 1", insert, f"COMMIT;{position}"]
    assert _messages(atomic(raw("SELECT writes()"))) == [
        "BEGIN;SELECT writes()",
        f"{has_written};COMMIT;{position}",
    ]
    assert _messages(atomic(read)) == ["BEGIN;SELECT 1", f"{has_written};COMMIT"]
    assert _messages(read) == ["SELECT 1"]
    assert _messages(atomic()) == []


def test_a_transaction_begins_as_it_was_told() -> None:
    connection.ensure_connection()
    connection.connection.isolation_level = IsolationLevel.REPEATABLE_READ
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('transaction_isolation')")
            assert cursor.fetchone() == ("repeatable read",)
    finally:
        connection.connection.isolation_level = None


def test_the_results_of_a_write_are_its_own() -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO testapp_account (name) VALUES (%s), (%s) RETURNING name", ["1;%", "2"])
        assert cursor.fetchall() == [("1;%",), ("2",)]
        assert cursor.nextset() is None
        cursor.execute("UPDATE testapp_account SET name = name")
        assert cursor.rowcount >= 2
        cursor.execute("SELECT 7 AS seven, writes()")
        assert cursor.description[0].name == "seven"
        assert cursor.fetchone() == (7, 1)


def test_reads_go_back_once_the_write_has_arrived() -> None:
    Account.objects.create(name="a")
    assert explain(Account).reason is Reason.NOT_REPLAYED
    assert eventually(lambda: where() == "replica1", 5) > 2


def test_a_transaction_reads_from_the_primary_and_its_hooks_see_the_write() -> None:
    seen = []
    with transaction.atomic():
        assert where() == "default"
        assert explain(Account).reason is Reason.TRANSACTION
        Account.objects.create(name="hooked")
        transaction.on_commit(lambda: seen.append((where(), Account.objects.filter(name="hooked").exists())))
    assert seen == [("default", True)]
    transaction.on_commit(lambda: seen.append(where()))
    assert seen[1:] == ["default"]


def test_a_transaction_begun_by_hand_reads_from_the_primary() -> None:
    raw("BEGIN")()
    assert explain(Account).reason is Reason.TRANSACTION
    raw("ROLLBACK")()
    assert where() == "replica1"


def test_locked_rows_come_from_the_primary() -> None:
    with transaction.atomic():
        assert Account.objects.select_for_update().db == "default"
    assert Account.objects.select_for_update().db == "default"


def test_an_instance_from_a_replica_is_saved_on_the_primary() -> None:
    found = Account.objects.get(pk=old().pk)
    assert found._state.db == "replica1"
    found.save()
    assert where() == "default"
    Event(account=found, happened_at="2026-11-01T00:00Z").save()
    assert found.event_set.get().account == found


def test_blocks() -> None:
    with use_primary():
        assert where() == "default"
        with use_replica():
            assert where() == "replica1"
        assert where() == "default"
    Account.objects.create(name="a")
    with use_replica():
        assert where() == "default"
        with use_replica(stale_ok=True):
            assert where() == "replica1"
    with transaction.atomic(), use_replica():
        assert where() == "default"  # the position of the write above


def test_use_replica_in_a_transaction_that_has_written_nothing() -> None:
    with transaction.atomic(), use_replica():
        assert where() == "replica1"
        Account.objects.create(name="a")
        assert where() == "default"


def test_a_thread_knows_nothing_of_another_and_takes_its_token() -> None:
    Account.objects.create(name="a")
    token, seen = current_token(), []

    def other() -> None:
        try:
            seen.append(where())
            with use_token(token):
                seen.append(where())
            seen.append(where())
        finally:
            connections.close_all()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["replica1", "default", "replica1"]


@pytest.mark.parametrize(
    "token", ["", None, 7, "x", "1-", "1-zz", "9-1.1.1", "1-1.1.ffffffff", "1-" + "f" * 3000, {"a": 1}]
)
def test_a_token_of_another_cluster_or_none_at_all_changes_nothing(token: object) -> None:
    with use_token(token):
        assert where() == "replica1"


def test_a_token_of_another_timeline_is_ignored() -> None:
    with use_primary():
        Account.objects.create(name="a")
    position = current_token().split(".")
    older = ".".join([position[0], "0", "ffffffff"])
    newer = ".".join([position[0], "63", "ffffffff"])
    seen = []

    def other() -> None:
        try:
            with use_token(older):
                seen.append(where())
            with use_token(newer):
                eventually(lambda: where() == "replica1", 1)
                seen.append(where())
        finally:
            connections.close_all()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["replica1", "replica1"]


def test_what_a_child_task_writes_its_parent_knows() -> None:
    async def parent() -> list[str]:
        async def child() -> None:
            await Account.objects.acreate(name="by child")

        # The thread of sync_to_async outlives the tests: it may hold a connection to a server of before.
        await sync_to_async(connections.close_all)()
        try:
            seen = [await sync_to_async(where)()]
            await asyncio.gather(*(asyncio.create_task(child()) for _ in range(3)))
            seen.append(await sync_to_async(where)())
            seen.append(str(bool(current_token())))
            return seen
        finally:
            await sync_to_async(connections.close_all)()

    assert asyncio.run(parent()) == ["replica1", "default", "True"]


def test_a_parent_that_did_nothing_itself_knows_what_its_children_wrote_in_threads() -> None:
    async def parent() -> str:
        def write() -> None:
            try:
                Account.objects.create(name="in a thread")
            finally:
                connections.close_all()

        await asyncio.gather(asyncio.to_thread(write), asyncio.to_thread(write))
        return await asyncio.to_thread(_where_and_close)

    assert asyncio.run(parent()) == "default"


def _where_and_close() -> str:
    try:
        return where()
    finally:
        connections.close_all()


def test_literal_value_is_no_write() -> None:
    list(Account.objects.annotate(n=Value(1)).values("n")[:1])
    assert where() == "replica1"


def test_a_process_that_begins_with_a_token_finds_its_replicas() -> None:
    Account.objects.create(name="a")
    token = current_token()
    registry.forget()

    with use_token(token):
        assert where() == "default"
        eventually(lambda: where() == "replica1", 5)
