"""Repairs and first back-fills beside writers that never stop, by processes that die on the way."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
from django.db import connection, transaction

from django_scaledb.counters import detach, rebuild, triggers
from django_scaledb.counters.registry import definition
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesPerProject,
    Delivery,
    Owner,
    Project,
    Upload,
    UploadsPerProject,
)

pytestmark = pytest.mark.django_db(transaction=True)
MECHANISMS = pytest.mark.parametrize(
    ("source", "counter"), [(Upload, UploadsPerProject), (Delivery, DeliveriesPerProject)]
)
SET_UP = """
    import random, sys, time
    from django.conf import settings
    import tests.settings as base
    conf = {k: getattr(base, k) for k in dir(base) if k.isupper()}
    conf["DATABASES"] = {"default": eval(sys.argv[1])}
    settings.configure(**conf)
    import django
    django.setup()
    from django.apps import apps
    from django.db import connection, transaction
    model = apps.get_model("counterapp", sys.argv[2])
"""
REPAIRER = f"""{SET_UP}
    from django_scaledb.counters import rebuild
    def tell(what, done, total):
        if what == "keys repaired":
            print(done, flush=True)
    rebuild.rebuild(model, "default", batch_keys=2, on_progress=tell)
"""
WRITER = f"""{SET_UP}
    # An older release of the application: its code declares no counter.
    connection.keeps_counters = sys.argv[3] == "new"
    chance = random.Random(sys.argv[4])
    projects = list(apps.get_model("counterapp", "Project").objects.values_list("pk", flat=True)[:20])
    print("ready", flush=True)
    mine = []
    while True:
        with transaction.atomic():
            row = model.objects.create(project_id=chance.choice(projects), size=chance.randrange(9))
            if chance.random() < 0.3:
                time.sleep(0.002)
            if chance.random() < 0.1:
                transaction.set_rollback(True)
            else:
                mine.append(row.pk)
        time.sleep(0.005)
        if len(mine) > 5:
            pk = mine.pop(chance.randrange(5))
            if chance.random() < 0.5:
                model.objects.filter(pk=pk).update(project_id=chance.choice(projects))
            else:
                model.objects.filter(pk=pk).delete()
"""


def process(code, *arguments):
    entry = {k: connection.settings_dict[k] for k in ("ENGINE", "HOST", "PORT", "USER", "PASSWORD", "NAME")}
    entry["TEST"] = {}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), repr(entry), *map(str, arguments)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


@contextmanager
def writers(model, number, kind="new"):
    """`number` processes that write `model` all the time, killed at the end."""
    started = [process(WRITER, model.__name__, kind, i) for i in range(number)]
    try:
        for one in started:
            assert one.stdout.readline() == b"ready\n"
        yield started
        assert all(one.poll() is None for one in started), "a writer has failed"
    finally:
        for one in started:
            one.send_signal(signal.SIGKILL)
        for one in started:
            one.wait()
            one.stdout.close()


def wait_until_alone():
    with connection.cursor() as cursor:
        for _ in range(200):
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()"
            )
            if not cursor.fetchone()[0]:
                return
            time.sleep(0.05)
    raise AssertionError("sessions of killed processes are still there")


def wrong_keys(counter):
    return len(rebuild.check(counter, "default").drifts)


@MECHANISMS
def test_a_rebuild_killed_in_the_middle_is_finished_by_the_next(source, counter):
    owner = Owner.objects.create(name="ann", country="NO")
    projects = Project.objects.bulk_create(Project(name=str(i), owner=owner) for i in range(300))
    source.objects.bulk_create(source(project=p, size=i) for i, p in enumerate(projects) for _ in range(2))
    counter.objects.filter(total__gt=0).update(total=7, bytes=7)
    with writers(source, 4):
        before = wrong_keys(counter)
        assert before >= 280
        for stop_after in (10, 30):
            repairer = process(REPAIRER, counter.__name__)
            while int(repairer.stdout.readline()) < stop_after:
                pass
            repairer.send_signal(signal.SIGKILL)
            repairer.wait()
            repairer.stdout.close()
            # It has repaired some keys and left the others; no key is wrong that was right.
            left = wrong_keys(counter)
            assert 0 < left <= before - stop_after
            before = left
        for attempt in range(100):
            try:
                assert rebuild.rebuild(counter, "default", batch_keys=20) > 0
            except rebuild.AnotherRepairInProgress:
                assert attempt < 99, "the killed repairer still holds its lock"
                time.sleep(0.05)  # the server has not noticed yet
            else:
                break
        assert rebuild.check(counter, "default").ok
    wait_until_alone()
    assert_same_totals(*detach.counters_of(source))


ROWS = int(os.environ.get("SCALEDB_TEST_ROWS", "100000"))


def fill(source):
    owner = Owner.objects.create(name="ann", country="NO")
    projects = Project.objects.bulk_create(Project(name=str(i), owner=owner) for i in range(200))
    with connection.cursor() as cursor:
        table = source._meta.db_table
        cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        cursor.execute(
            f"INSERT INTO {table} (project_id, size, kind) "
            "SELECT %s + mod(g, 200), mod(g, 1000), 'x' FROM generate_series(1, %s) g",
            [projects[0].pk, ROWS],
        )
        cursor.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
    return projects


def test_a_counter_by_signals_is_added_to_a_table_in_use():
    """As a release goes: processes that do not know the counter, then both, then those that do."""
    fill(Upload)
    with connection.schema_editor() as editor:
        editor.delete_model(UploadsPerProject)
    with writers(Upload, 2, "old"):
        time.sleep(0.2)
        with connection.schema_editor() as editor:
            editor.create_model(UploadsPerProject)
        new = writers(Upload, 2)
        new.__enter__()
        time.sleep(0.2)
    try:
        # Only processes that count are left: now, while they go on, the rest is counted.
        for counter in detach.counters_of(Upload):
            repaired = rebuild.rebuild(counter, "default")
            assert repaired >= 200 or counter is not UploadsPerProject
            assert rebuild.check(counter, "default").ok
    finally:
        new.__exit__(None, None, None)
    wait_until_alone()
    assert_same_totals(*detach.counters_of(Upload))
    assert UploadsPerProject.objects.count() == 200


def test_a_counter_by_trigger_is_added_to_a_table_in_use():
    fill(Delivery)
    found = definition(DeliveriesPerProject, connection)
    with connection.schema_editor() as editor:
        for statement in triggers.uninstall(found.identity):
            editor.execute(statement, params=None)
        editor.delete_model(DeliveriesPerProject)
    with writers(Delivery, 4):
        time.sleep(0.2)
        with connection.schema_editor() as editor:
            editor.create_model(DeliveriesPerProject)
            for statement in triggers.install(found):
                editor.execute(statement, params=None)
        for counter in detach.counters_of(Delivery):
            repaired = rebuild.rebuild(counter, "default")
            assert repaired >= 200 or counter is not DeliveriesPerProject
            assert rebuild.check(counter, "default").ok
    wait_until_alone()
    assert_same_totals(*detach.counters_of(Delivery))
    assert DeliveriesPerProject.objects.count() == 200


def together(*functions):
    """Run all at once, each in a session of its own; raises the first error."""
    errors = []
    gate = threading.Barrier(len(functions))

    def run(function):
        try:
            connection.ensure_connection()
            gate.wait(60)
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


@pytest.mark.parametrize("source", [Upload, Delivery])
def test_a_hundred_deletes_of_the_same_row_count_once(source):
    owner = Owner.objects.create(name="ann", country="NO")
    project = Project.objects.create(name="a", owner=owner)
    row = source.objects.create(project=project, size=5)
    source.objects.create(project=project, size=7)
    copies = [source.objects.get(pk=row.pk) for _ in range(100)]
    together(*[copy.delete for copy in copies])
    assert source.objects.count() == 1
    assert_same_totals(*detach.counters_of(source))


@pytest.mark.parametrize("source", [Upload, Delivery])
def test_a_hundred_stale_reparents_of_the_same_row(source):
    owners = [Owner.objects.create(name=n, country=n) for n in "xy"]
    projects = [Project.objects.create(name=str(i), owner=owners[i % 2]) for i in range(10)]
    row = source.objects.create(project=projects[0], size=5)
    copies = [source.objects.get(pk=row.pk) for _ in range(100)]
    for i, copy in enumerate(copies):
        copy.project, copy.size = projects[i % 10], i

    # Half of them in a transaction of their own, half in one that goes on after the write.
    def in_block(copy):
        def run():
            with transaction.atomic():
                copy.save()
                time.sleep(0.002)

        return run

    together(*[copy.save if i % 2 else in_block(copy) for i, copy in enumerate(copies)])
    assert_same_totals(*detach.counters_of(source))
    totals = [c for c in detach.counters_of(source) if c.__name__.endswith("PerProject")]
    assert [sum(c.objects.values_list("total", flat=True)) for c in totals] == [1]
