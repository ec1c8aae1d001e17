"""Many sessions at once: exact, and no deadlock, in both mechanisms."""

import random
import threading
import time

import pytest
from django.db import IntegrityError, NotSupportedError, OperationalError, connection, transaction

from django_scaledb.counters import compiler, detach
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesPerProject,
    Delivery,
    Owner,
    Parcel,
    Project,
    Upload,
    UploadsPerOwner,
    UploadsPerProject,
)

pytestmark = pytest.mark.django_db(transaction=True)
SOURCES = pytest.mark.parametrize("source", [Upload, Delivery])


def in_threads(*functions):
    """Run all at once; raises the first error."""
    errors = []
    gate = threading.Barrier(len(functions))

    def run(function):
        try:
            connection.ensure_connection()
            gate.wait(30)
            function()
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def projects():
    owners = [Owner.objects.create(name=n, country=n) for n in "xy"]
    return [Project.objects.create(name=str(i), owner=owners[i % 2]) for i in range(8)]


@SOURCES
def test_concurrent_deletes_of_one_row_count_once(projects, source):
    rows = [source.objects.create(project=projects[0], size=5) for _ in range(100)]

    def delete_after_loading():
        copies = list(source.objects.filter(pk__in=[row.pk for row in rows]))
        for copy in copies:
            copy.delete()

    in_threads(delete_after_loading, delete_after_loading, delete_after_loading, delete_after_loading)
    assert_same_totals(*detach.counters_of(source))
    assert source.objects.count() == 0


@SOURCES
def test_stale_reparents_are_exact(projects, source):
    rows = [source.objects.create(project=projects[0], size=5) for _ in range(50)]

    def reparent(number):
        def run():
            copies = list(source.objects.filter(pk__in=[row.pk for row in rows]))
            for copy in copies:
                copy.project = projects[number]
                copy.size = number
                copy.save()

        return run

    in_threads(*[reparent(n) for n in range(1, 5)])
    assert_same_totals(*detach.counters_of(source))


@SOURCES
def test_an_update_waits_for_the_value_that_it_replaces(projects, source):
    """The old value is what the other one committed, not what the statement's snapshot had."""
    row = source.objects.create(project=projects[0], size=5)
    holds = threading.Event()

    def first():
        with transaction.atomic():
            source.objects.filter(pk=row.pk).update(project=projects[1], size=10)
            holds.set()
            time.sleep(0.3)

    def second():
        holds.wait(10)
        source.objects.filter(pk=row.pk).update(project=projects[2])

    in_threads(first, second)
    assert_same_totals(*detach.counters_of(source))


@SOURCES
def test_upserts_of_the_same_rows(projects, source):
    def upsert(number):
        def run():
            for i in range(25):
                names = sorted({f"f{(i * 7 + k) % 40}" for k in range(5)})
                source.objects.bulk_create(
                    [source(filename=n, size=number, project=projects[number]) for n in names],
                    update_conflicts=True,
                    unique_fields=["filename"],
                    update_fields=["size", "project"],
                )

        return run

    in_threads(*[upsert(n) for n in range(4)])
    assert_same_totals(*detach.counters_of(source))


@SOURCES
def test_parents_change_hands_under_writers(projects, source):
    """A row that is being written and its parent that is being moved cannot miss each other."""
    owners = list(Owner.objects.all())
    stop = threading.Event()

    def write(number):
        def run():
            i = 0
            while not stop.is_set():
                i += 1
                row = source.objects.create(project=projects[(i + number) % 8], size=i)
                if i % 2:
                    row.delete()

        return run

    def move():
        try:
            for i in range(60):
                Project.objects.filter(pk=projects[i % 8].pk).update(owner=owners[i // 8 % 2])
        finally:
            stop.set()

    in_threads(write(0), write(1), write(2), move)
    assert_same_totals(*detach.counters_of(source))


def mixed(source, projects, seconds, number):
    """Transactions over many keys in random order, with savepoints and rollbacks."""
    chance = random.Random(number)

    def one():
        pick = chance.choice(projects)
        what = chance.random()
        if what < 0.5:
            source.objects.create(project=pick, size=chance.randrange(100), kind=chance.choice("abc"))
        elif what < 0.7:
            mine = source.objects.filter(filename=None, size=chance.randrange(100)).first()
            if mine is not None:
                mine.project = pick
                mine.save()
        elif what < 0.8:
            found = source.objects.order_by("?").first()
            if found is not None:
                found.delete()
        else:
            source.objects.bulk_create([source(project=chance.choice(projects), size=3) for _ in range(5)])

    def run():
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                with transaction.atomic():
                    for _ in range(chance.randrange(1, 4)):
                        with transaction.atomic():
                            one()
                            if chance.random() < 0.2:
                                transaction.set_rollback(True)
                    if chance.random() < 0.1:
                        transaction.set_rollback(True)
            except OperationalError as error:
                # Two transactions that update the same two source rows the other way round: not ours.
                if 'counterapp_upload"' not in str(error) and 'counterapp_delivery"' not in str(error):
                    raise
            except IntegrityError as error:
                # Two that save the same deleted row: Django inserts it again for each of them.
                if "_pkey" not in str(error):
                    raise

    return run


@SOURCES
def test_mixed_writers_never_deadlock(projects, source):
    in_threads(*[mixed(source, projects, 3, n) for n in range(8)])
    assert_same_totals(*detach.counters_of(source))
    assert source.objects.exists()


@pytest.mark.slow
@SOURCES
def test_thirty_two_mixed_writers_for_a_minute(projects, source):
    in_threads(*[mixed(source, projects, 60, n) for n in range(32)])
    assert_same_totals(*detach.counters_of(source))


def test_a_hot_row_is_locked_at_the_end_only(projects):
    """While one transaction goes on after its write, others of the same key come and go."""
    for source, counter in [(Upload, UploadsPerProject), (Delivery, DeliveriesPerProject)]:
        with transaction.atomic():
            source.objects.create(project=projects[0], size=1)

            def other(source=source):
                with connection.cursor() as cursor:
                    cursor.execute("SET lock_timeout = '2s'")
                source.objects.create(project=projects[0], size=2)

            in_threads(other)
        assert counter.objects.get(project=projects[0]).total == 2


@pytest.mark.parametrize("source", [Upload, Parcel])
def test_autocommit_writes_survive_repeatable_read(projects, source, monkeypatch):
    """A single statement on a hot key is run again instead of failing with 40001, and waits then."""
    monkeypatch.setattr(compiler, "ATTEMPTS", 2)

    def write():
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_isolation = 'repeatable read'")
        for _ in range(20):
            source.objects.create(project=projects[0], size=1)

    in_threads(*[write] * 5)
    assert source.objects.count() == 100
    assert_same_totals(*detach.counters_of(source))


def test_autocommit_writes_survive_serializable(projects):
    """There it stays what it is, and is run again until it gets through."""

    def write():
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_isolation = 'serializable'")
        for _ in range(5):
            Parcel.objects.create(project=projects[0], size=1)

    in_threads(write, write)
    assert_same_totals(*detach.counters_of(Parcel))


# -- snapshots that last for a transaction


def in_snapshot(function):
    """Run `function` in a REPEATABLE READ transaction whose snapshot is taken, and then others act."""

    def run(*others):
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT 1")
            for other in others:
                in_threads(other)
            function()

    return run


@SOURCES
def test_a_row_below_a_parent_that_has_moved_since_is_not_booked_on_its_former_owner(projects, source):
    other = Owner.objects.exclude(pk=projects[0].owner_id).get()

    def write():
        source.objects.create(project=projects[0], size=3)

    def move():
        Project.objects.filter(pk=projects[0].pk).update(owner=other)

    def promote():
        Owner.objects.filter(pk=other.pk).update(country="elsewhere")

    for change in (move, promote):
        with pytest.raises(OperationalError, match="could not serialize access"):
            in_snapshot(write)(change)
        assert_same_totals(*detach.counters_of(source))
    in_snapshot(write)()
    assert source.objects.count() == 1
    assert_same_totals(*detach.counters_of(source))


@pytest.mark.parametrize("mechanism", ["signals", "trigger"])
def test_a_parent_is_not_moved_where_rows_below_may_be_unseen(projects, mechanism, monkeypatch):
    """By its own statement, yes; in a transaction whose snapshot may be too old, no."""
    source = Upload if mechanism == "signals" else Delivery
    other = Owner.objects.exclude(pk=projects[0].owner_id).get()

    def move():
        project = Project.objects.get(pk=projects[0].pk)
        project.owner = other
        project.save()

    def add():
        source.objects.create(project=projects[0], size=3)

    def act():
        # One of the two at a time: either would refuse.
        if mechanism == "trigger":
            monkeypatch.setattr(connection, "keeps_counters", False)
        with pytest.raises(NotSupportedError, match=r"cannot change counterapp_project\.owner_id"):
            in_snapshot(move)(add)
        monkeypatch.undo()

    with connection.cursor() as cursor:
        if mechanism == "signals":
            cursor.execute("ALTER TABLE counterapp_project DISABLE TRIGGER USER")
        try:
            act()
        finally:
            cursor.execute("ALTER TABLE counterapp_project ENABLE TRIGGER USER")
    assert_same_totals(*detach.counters_of(source))
    # What concerns no counter is as free as ever, and so is a parent without rows.
    in_snapshot(lambda: Project.objects.filter(pk=projects[0].pk).update(name="b"))()
    in_snapshot(lambda: Project.objects.create(name="new", owner=other))()
    in_snapshot(projects[5].delete)()
    assert_same_totals(*detach.counters_of(source))


def test_a_statement_of_its_own_moves_a_parent_whatever_the_default_is(projects):
    """By signals: the statement's transaction is ours to begin."""
    Upload.objects.create(project=projects[0], size=3)
    other = Owner.objects.exclude(pk=projects[0].owner_id).get()
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE counterapp_project DISABLE TRIGGER USER")
        cursor.execute("SET default_transaction_isolation = 'repeatable read'")
    try:
        Project.objects.filter(pk=projects[0].pk).update(owner=other)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("RESET default_transaction_isolation")
            cursor.execute("ALTER TABLE counterapp_project ENABLE TRIGGER USER")
    assert UploadsPerOwner.objects.get(owner=other).total == 1
    assert_same_totals(*detach.counters_of(Upload))
