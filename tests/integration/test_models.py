"""Partitioned models behave like ordinary models, one partition at a time."""

from __future__ import annotations

import copy
import pickle
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core import serializers
from django.db import IntegrityError, connection, connections, transaction
from django.db.models import Count, F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from django_scaledb.partitions.uuid7 import uuid7_floor
from tests.testapp.models import Account, Comment, Event, Odd, Reading, Span, Tag, Trace

pytestmark = pytest.mark.django_db

MARCH = datetime(2024, 3, 5, 13, 7, 11, 123456, tzinfo=UTC)
MAY = datetime(2024, 5, 17, 23, 59, 59, 999999, tzinfo=UTC)


def months(model: type = Event, year: int = 2024) -> None:
    """Give the model a partition per month of a year; its default partition takes all else."""
    table = model._meta.db_table
    with connection.cursor() as cursor:
        for month in range(1, 13):
            upper = f"{year + month // 12}-{month % 12 + 1:02}-01"
            cursor.execute(
                f'CREATE TABLE IF NOT EXISTS "{table}_{year}_{month}" PARTITION OF "{table}" '
                f"FOR VALUES FROM ('{year}-{month:02}-01 00:00:00+00') TO ('{upper} 00:00:00+00')"
            )


def partition_of(event: Event) -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT tableoid::regclass::text FROM testapp_event WHERE id = %s", [event.pk])
        rows = cursor.fetchall()
    assert len(rows) == 1, f"{len(rows)} rows with id {event.pk}"
    return rows[0][0]


def rows_planned(run) -> list[int]:
    """For each statement that `run` sends to the event table: the number of partitions in its plan."""
    with CaptureQueriesContext(
        connection,
    ) as captured:
        run()
    counts = []
    for query in captured.captured_queries:
        sql = query["sql"]
        if "testapp_event" in sql and sql.split()[0] in {"SELECT", "UPDATE", "DELETE"}:
            with connection.cursor() as cursor:
                cursor.execute("EXPLAIN " + sql)
                plan = "\n".join(line for (line,) in cursor.fetchall())
            counts.append(plan.count("Scan on") + plan.count("Scan using"))
    return counts


@pytest.fixture
def event() -> Iterator[Event]:
    months()
    yield Event.objects.create(happened_at=MARCH, size=1)
    if not connection.in_atomic_block:  # nothing else takes back what a transactional test has made
        with connection.cursor() as cursor:
            for month in range(1, 13):
                cursor.execute(f"DROP TABLE testapp_event_2024_{month}")


def test_pk_is_scalar_and_the_database_key_is_id_then_key():
    assert Event._meta.pk.name == "id"
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE contype = 'p' AND conrelid = ANY (%s::regclass[]) ORDER BY conrelid::regclass::text",
            [["testapp_event", "testapp_trace"]],
        )
        assert cursor.fetchall() == [("PRIMARY KEY (id, happened_at)",), ("PRIMARY KEY (id)",)]


def test_save_delete_and_refresh_touch_one_partition(event):
    assert partition_of(event) == "testapp_event_2024_3"
    assert rows_planned(event.save) == [1]
    assert rows_planned(event.refresh_from_db) == [1]
    fresh = Event.objects.get(pk=event.pk)
    fresh.size = 7
    assert rows_planned(fresh.save) == [1]
    assert rows_planned(lambda: fresh.save(update_fields=["size"])) == [1]
    deletes = rows_planned(lambda: Event.objects.get(pk=event.pk, happened_at=MARCH).delete())
    assert deletes[-1] == 1


def test_uuid7_look_up_by_primary_key_touches_one_partition():
    trace = Trace.objects.create(name="one")
    explained = Trace.objects.filter(pk=trace.pk).explain()
    assert explained.count("Scan") == 1
    span = Span.objects.create(trace=trace, name="child")
    assert span.trace.name == "one"
    with pytest.raises(IntegrityError), transaction.atomic():
        Span.objects.create(trace_id=Trace().pk, name="orphan")
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    trace.delete()
    assert not Span.objects.exists()


def test_a_changed_key_moves_the_row(event):
    event.happened_at = MAY
    event.save()
    assert partition_of(event) == "testapp_event_2024_5"
    assert rows_planned(event.save) == [1]


def test_update_fields_without_the_key_leave_the_row_where_it_is(event):
    event.happened_at = MAY
    event.size = 9
    event.save(update_fields=["size"])
    assert partition_of(event) == "testapp_event_2024_3"
    event.save(update_fields=["happened_at"])
    assert partition_of(event) == "testapp_event_2024_5"


def test_delete_after_a_change_in_memory_removes_the_stored_row(event):
    event.happened_at = MAY
    assert event.delete() == (1, {"testapp.Event": 1})
    assert event.pk is None
    assert not Event.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_rollback_forgets_the_move(event):
    event.happened_at = MAY
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        event.save()
        assert partition_of(event) == "testapp_event_2024_5"
        raise ZeroDivisionError
    assert partition_of(event) == "testapp_event_2024_3"
    event.size = 3
    event.save(update_fields=["size"])
    event.refresh_from_db(fields=["size"])
    assert event.size == 3
    event.save()
    assert partition_of(event) == "testapp_event_2024_5"


def test_a_rollback_then_delete_and_refresh(event):
    for act in (Event.refresh_from_db, Event.delete):
        event.happened_at = MAY
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            event.save()
            raise ZeroDivisionError
        result = act(event)
        assert event.happened_at == MARCH or result == (1, {"testapp.Event": 1})
    assert not Event.objects.exists()


def test_a_stale_instance_never_doubles_the_row(event):
    stale = Event.objects.get(pk=event.pk)
    event.happened_at = MAY
    event.save()
    stale.size = 5
    stale.save()
    assert partition_of(event) == "testapp_event_2024_3", "the last writer wins, key included"
    event.size = 6
    event.save(update_fields=["size"])
    assert Event.objects.get().size == 6
    assert stale.delete()[0] == 1


def test_a_deferred_key(event):
    for partial in (Event.objects.only("size").get(), Event.objects.defer("happened_at").get()):
        partial.size += 1
        partial.save()
        assert partition_of(partial) == "testapp_event_2024_3"
    partial = Event.objects.only("size").get()
    partial.happened_at = MAY
    partial.save()
    assert partition_of(partial) == "testapp_event_2024_5"
    partial = Event.objects.only("size").get()
    assert partial.happened_at == MAY
    partial = Event.objects.only("size").get()
    assert partial.delete()[0] == 1


def test_an_expression_as_key(event):
    event.happened_at = F("happened_at") + timedelta(days=31)
    event.save()
    assert partition_of(event) == "testapp_event_2024_4"
    event.refresh_from_db()
    assert event.happened_at == MARCH + timedelta(days=31)
    event.happened_at = Now()
    event.save()
    assert Event.objects.count() == 1


def test_copies_and_pickles_remember_the_key(event):
    for clone in (copy.copy(event), pickle.loads(pickle.dumps(event)), copy.deepcopy(event)):
        clone.size += 1
        assert rows_planned(clone.save) == [1]
    clone = copy.copy(event)
    clone.pk, clone._state.adding, clone.happened_at = None, True, MAY
    clone.save()
    assert Event.objects.count() == 2


def test_loaddata_over_an_existing_row_does_not_double_it(event):
    Event.objects.filter(pk=event.pk).update(happened_at=MARCH)
    for fmt in ("json", "jsonl", "xml"):
        dumped = serializers.serialize(fmt, Event.objects.all())
        for deserialized in serializers.deserialize(fmt, dumped):
            deserialized.save()
        assert Event.objects.count() == 1, fmt
    assert Event.objects.get().happened_at.replace(microsecond=0) == MARCH.replace(microsecond=0)


def test_explicit_primary_key_updates_or_inserts(event):
    Event(pk=event.pk, happened_at=MAY, size=8).save()
    assert partition_of(event) == "testapp_event_2024_5"
    Event(pk=10_000, happened_at=MAY).save()
    assert Event.objects.count() == 2


def test_save_inside_post_save_and_signals_on_delete(event):
    from django.db.models import signals

    seen = []

    def again(sender, instance, created, **kwargs):
        if not seen:
            seen.append("save")
            instance.size = 44
            instance.save()

    def gone(sender, instance, **kwargs):
        seen.append((kwargs["signal"] is signals.pre_delete, instance.pk is not None))

    signals.post_save.connect(again, sender=Event)
    signals.pre_delete.connect(gone, sender=Event)
    signals.post_delete.connect(gone, sender=Event)
    try:
        event.happened_at = MAY
        event.save()
        assert partition_of(event) == "testapp_event_2024_5"
        assert event.delete() == (1, {"testapp.Event": 1})
    finally:
        signals.post_save.disconnect(again, sender=Event)
        signals.pre_delete.disconnect(gone, sender=Event)
        signals.post_delete.disconnect(gone, sender=Event)
    assert seen == ["save", (True, True), (False, True)]


def test_delete_cascades_through_an_unconstrained_key(event):
    Comment.objects.create(event=event, text="first")
    event.tags.add(Tag.objects.create(name="red"))
    assert event.delete() == (
        3,
        {"testapp.Event": 1, "testapp.Comment": 1, "testapp.Event_tags": 1},
    )


def test_deleting_a_foreign_key_target_cascades_into_the_partitions():
    months()
    account = Account.objects.create(name="a")
    Event.objects.bulk_create(
        [Event(account=account, size=i, happened_at=MARCH + timedelta(days=31 * (i % 5))) for i in range(20)]
    )
    assert account.delete()[1]["testapp.Event"] == 20


def test_bulk_operations_and_upserts(event):
    events = Event.objects.bulk_create([Event(size=i, happened_at=MARCH) for i in range(10)])
    assert all(e.pk for e in events)
    for e in events:
        e.happened_at = MAY
    assert Event.objects.bulk_update(events, ["happened_at"]) == 10
    events[0].size = 77
    events[0].save()
    assert Event.objects.filter(happened_at__month=5).count() == 10
    Event.objects.bulk_create(
        [Event(pk=events[1].pk, happened_at=MAY, size=500)],
        update_conflicts=True,
        unique_fields=["id", "happened_at"],
        update_fields=["size"],
    )
    assert Event.objects.get(pk=events[1].pk).size == 500
    Event.objects.bulk_create([Event(pk=events[1].pk, happened_at=MAY, size=9)], ignore_conflicts=True)
    assert Event.objects.count() == 11
    assert Event.objects.update(happened_at=F("happened_at") + timedelta(days=30)) == 11
    found, created = Event.objects.update_or_create(pk=event.pk, defaults={"happened_at": MAY})
    assert not created
    assert partition_of(found) == "testapp_event_2024_5"
    assert Event.objects.get_or_create(pk=event.pk)[1] is False


def test_select_for_update_and_row_locks(event):
    locked = Event.objects.select_for_update().get(pk=event.pk, happened_at=MARCH)
    locked.size = 2
    locked.save()
    assert Event.objects.values_list("size", flat=True).get() == 2


async def _async_round_trip() -> Event:
    event = await Event.objects.acreate(happened_at=MARCH)
    event.happened_at = MAY
    await event.asave()
    await event.arefresh_from_db()
    return event


@pytest.mark.django_db(transaction=True)
def test_groups_by_instance(event):
    """The other columns depend on (id, key) in the database, so GROUP BY must name them."""
    event.tags.set([Tag.objects.create(name=name) for name in "ab"])
    assert [e.n for e in Event.objects.annotate(n=Count("tags"))] == [2]
    Comment.objects.create(event=event)
    assert Event.objects.annotate(n=Count("comment")).filter(n=1).get() == event


def test_async_methods():
    # async_to_sync keeps the ORM's work in this thread, whose connection the fixture knows.
    async def run():
        event = await _async_round_trip()
        assert event.happened_at == MAY
        assert (await event.adelete())[0] == 1

    async_to_sync(run)()


@pytest.mark.django_db(transaction=True)
def test_a_save_follows_a_row_that_is_moved_while_it_waits(event):
    """PostgreSQL raises a serialization failure here; outside a transaction nobody should see it."""
    stale = Event.objects.get(pk=event.pk)
    stale.size = 99
    done = threading.Event()

    def save_stale() -> None:
        try:
            stale.save(update_fields=["size"])
        finally:
            connections.close_all()
            done.set()

    saver = threading.Thread(target=save_stale)
    with transaction.atomic():
        event.happened_at = MAY
        event.save()
        saver.start()
        assert not done.wait(0.5), "the saver must be waiting for the row's lock"
    saver.join(10)
    assert partition_of(event) == "testapp_event_2024_5"
    assert Event.objects.get().size == 99


def test_date_keys_and_odd_names():
    reading = Reading.objects.create(day=date(1999, 12, 31), value=1.5)
    reading.day = "2031-01-01"
    reading.save()
    reading.refresh_from_db()
    assert reading.day == date(2031, 1, 1)
    odd = Odd.objects.create(label="100%")
    odd.refresh_from_db()
    odd.made_at = MARCH
    odd.save()
    assert Odd.objects.get().made_at == MARCH
    assert odd.delete()[0] == 1


def test_uuid7_refuses_other_versions():
    from django.core.exceptions import ValidationError

    with pytest.raises(ValidationError, match="version 7"):
        Trace.objects.create(id=uuid.uuid4(), name="x")


def test_abstract_bases_merge_their_partitioning_meta():
    attrs = Odd._partitioning_meta.attrs
    assert (attrs["key"], attrs["interval"], attrs["premake"]) == (["made_at"], "1 month", 0)
    assert Odd._meta.get_field("id").primary_key


class TestWithoutDefaultPartition:
    """The production case: a row of no period is refused in words that help."""

    @pytest.fixture(autouse=True)
    def no_default(self):
        months()
        with connection.cursor() as cursor:
            for table in ("testapp_event", "testapp_reading", "testapp_trace"):
                cursor.execute(f"ALTER TABLE {table} DETACH PARTITION {table}_default")

    def test_the_error_names_model_value_and_command(self):
        from django_scaledb.exceptions import NoPartitionError

        moment = datetime(2031, 5, 1, 0, 30, tzinfo=UTC)
        saves = (
            lambda: Event(happened_at=moment).save(),
            lambda: Event.objects.bulk_create([Event(happened_at=moment)]),
        )
        for save in saves:
            with pytest.raises(IntegrityError) as caught, transaction.atomic():
                save()
            assert isinstance(caught.value, NoPartitionError)
            text = str(caught.value)
            assert "testapp.Event" in text
            assert "happened_at = 2031-05-01 00:30:00+00" in text
            assert "manage.py create_partitions testapp.Event --from 2031-05-01 --to 2031-05-01" in text
            assert caught.value.model is Event
            assert caught.value.__cause__.sqlstate == "23514"

    def test_it_speaks_for_dates_uuids_updates_and_raw_sql(self):
        from django_scaledb.exceptions import NoPartitionError

        with pytest.raises(NoPartitionError, match="--from 1999-12-31 --to"), transaction.atomic():
            Reading.objects.create(day=date(1999, 12, 31), value=1)
        first = uuid7_floor(datetime(2031, 5, 1, tzinfo=UTC))
        future = uuid.UUID(int=first.int | 7 << 76 | 2 << 62)
        with pytest.raises(NoPartitionError, match="--from 2031-05-01 --to"), transaction.atomic():
            Trace.objects.create(id=future)
        event = Event.objects.create(happened_at=MARCH)
        with pytest.raises(NoPartitionError), transaction.atomic():
            Event.objects.update(happened_at=datetime(2031, 5, 1, tzinfo=UTC))
        with pytest.raises(NoPartitionError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("UPDATE testapp_event SET happened_at = '2031-05-01'")
        event.refresh_from_db()

    def test_an_ordinary_check_violation_stays_what_it_is(self):
        from django_scaledb.exceptions import NoPartitionError

        with pytest.raises(IntegrityError) as caught, transaction.atomic():
            Event.objects.create(happened_at=MARCH, size=-1)
        assert not isinstance(caught.value, NoPartitionError)
        named = "DO $$ BEGIN RAISE check_violation USING TABLE = 'testapp_event', CONSTRAINT = 'mine'; END $$"
        with pytest.raises(IntegrityError) as caught, transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(named)
        assert not isinstance(caught.value, NoPartitionError)


def locked_partitions(table: str) -> set[str]:
    """Partitions on which this transaction holds a lock (each statement's stay until its end)."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT l.relation::regclass::text FROM pg_locks l JOIN pg_inherits i ON i.inhrelid = l.relation "
            "WHERE l.pid = pg_backend_pid() AND i.inhparent = %s::regclass",
            [table],
        )
        return {name for (name,) in cursor.fetchall()}


FIRST = datetime(2001, 1, 1, tzinfo=UTC)


@pytest.fixture
def two_hundred(transactional_db):
    """Partitions of a day each, committed, so that the locks of making them are gone."""
    with connection.cursor() as cursor:
        for number in range(200):
            lower, upper = (FIRST + timedelta(days=n) for n in (number, number + 1))
            cursor.execute(
                f"CREATE TABLE event_{number} PARTITION OF testapp_event "
                f"FOR VALUES FROM ('{lower}') TO ('{upper}')"
            )
            cursor.execute(
                f"CREATE TABLE trace_{number} PARTITION OF testapp_trace "
                f"FOR VALUES FROM ('{uuid7_floor(lower)}') TO ('{uuid7_floor(upper)}')"
            )
    yield
    with connection.cursor() as cursor:
        for number in range(200):
            cursor.execute(f"ALTER TABLE testapp_trace DETACH PARTITION trace_{number}")
            cursor.execute(f"DROP TABLE event_{number}, trace_{number}")


def move(event: Event) -> None:
    event.happened_at += timedelta(days=1)
    event.save()


def test_of_two_hundred_partitions_an_instance_locks_its_own(two_hundred):
    moment = FIRST + timedelta(days=77)
    acts = {
        "save": Event.save,
        "save_update_fields": lambda event: event.save(update_fields=["size"]),
        "refresh": Event.refresh_from_db,
        "deferred field": lambda event: event.happened_at and event.size,
        "move": move,
        "delete": Event.delete,
    }
    event = Event.objects.create(happened_at=moment, size=1)
    for name, act in acts.items():
        instance = Event.objects.defer("size").get(pk=event.pk, happened_at=moment)
        with transaction.atomic():
            act(instance)
            locked = locked_partitions("testapp_event")
        moment = instance.happened_at
        own = f"event_{(moment - FIRST).days}"
        assert locked == ({"event_77", own} if name == "move" else {own}), name


def test_of_two_hundred_partitions_a_uuid7_locks_its_own(two_hundred):
    first = uuid7_floor(FIRST + timedelta(days=77))
    trace = Trace.objects.create(id=uuid.UUID(int=first.int | 7 << 76 | 2 << 62), name="x")
    for act in (lambda: Trace.objects.get(pk=trace.pk), trace.save, trace.refresh_from_db, trace.delete):
        with transaction.atomic():
            act()
            assert locked_partitions("testapp_trace") == {"trace_77"}
