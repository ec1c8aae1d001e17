"""check_counters and rebuild_counters: what they find, say and repair, also under writers."""

import io
import json
import threading
import time
from datetime import UTC, datetime

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from django_scaledb.counters import detach, rebuild
from django_scaledb.counters.registry import counters
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesPerProject,
    Delivery,
    Download,
    DownloadsEver,
    DownloadsPerProject,
    Owner,
    Project,
    Shipment,
    ShipmentsPerProject,
    Upload,
    UploadsInAll,
    UploadsPerMonth,
    UploadsPerOwner,
    UploadsPerProject,
)

pytestmark = pytest.mark.django_db(transaction=True)


def call(name, *arguments):
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command(name, *arguments, stdout=out, stderr=err)
    except SystemExit as error:
        return error.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def at(year):
    return datetime(year, 5, 5, tzinfo=UTC)


@pytest.fixture
def projects():
    owner = Owner.objects.create(name="ann", country="NO")
    projects = [Project.objects.create(name=n, owner=owner) for n in "ab"]
    for model in (Upload, Delivery):
        model.objects.bulk_create(
            [model(project=[*projects, None][i % 3], size=i, at=[at(2026), None][i % 2]) for i in range(9)]
        )
    for model in (Download, Shipment):
        model.objects.bulk_create([model(project=projects[0], size=i, at=at(2026 + i % 2)) for i in range(6)])
    return projects


def test_exact_counters_pass(projects):
    code, out, err = call("check_counters")
    assert (code, err) == (0, "")
    assert "counterapp.UploadsPerProject: exact" in out
    assert json.loads(call("check_counters", "--format", "json")[1])["ok"] is True


def test_drift_is_listed_by_key_and_repaired(projects):
    UploadsPerProject.objects.filter(project=projects[0]).update(total=100)
    UploadsPerProject.objects.filter(project=None).delete()
    DeliveriesPerProject.objects.create(project_id=4711, total=3)
    UploadsInAll.objects.update(mean_sum=0)
    UploadsPerMonth.objects.filter(month=None).update(total=0)
    UploadsPerOwner.objects.update(total=5)
    DownloadsEver.objects.update(bytes=1)
    DownloadsPerProject.objects.all().delete()
    code, out, _ = call("check_counters")
    assert code == 1
    assert f"project_id={projects[0].pk}: total is 100 and should be 3" in out
    assert "project_id=NULL: total is 0 and should be 3" in out
    assert "project_id=4711: total is 3 and should be 0" in out
    code, out, _ = call("check_counters", "counterapp.UploadsPerProject", "--format", "json")
    assert code == 1
    (found,) = json.loads(out)["counters"]
    assert found["counter"] == "counterapp.UploadsPerProject"
    assert {
        "key": {"project_id": None},
        "expected": {"total": 3, "bytes": 15},
        "stored": {"total": 0, "bytes": 0},
    } in found["drift"]
    code, out, err = call("rebuild_counters")
    assert (code, err) == (0, "")
    assert "counterapp.UploadsPerProject: 2 keys repaired" in out
    assert_same_totals(*counters())
    assert call("check_counters")[0] == 0
    assert "counterapp.UploadsPerProject: exact already" in call("rebuild_counters")[1]


def test_repair_in_batches(projects):
    Delivery.objects.bulk_create([Delivery(kind=f"k{i}") for i in range(30)])
    connection.cursor().execute("TRUNCATE counterapp_deliveriesperkind")
    steps = []
    rebuild.rebuild(
        next(c for c in counters() if c.__name__ == "DeliveriesPerKind"),
        "default",
        batch_keys=7,
        on_progress=lambda *step: steps.append(step),
    )
    assert len([step for step in steps if step[0] == "keys repaired"]) > 3
    assert_same_totals(*counters())


def test_misuse():
    with pytest.raises(
        CommandError, match=r"there is no counter 'nope.Nope'; the counters are: counterapp\."
    ):
        call("check_counters", "nope.Nope")
    with pytest.raises(CommandError, match="no database 'mars'"):
        call("rebuild_counters", "--using", "mars")


def test_one_repairer_at_a_time(projects):
    started, done = threading.Event(), threading.Event()

    def hold():
        with connection.cursor() as cursor:
            key = rebuild.registry.definition(UploadsInAll, connection).lock_id ^ 1
            cursor.execute("SELECT pg_advisory_lock(%s)", [key])
            started.set()
            done.wait(10)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    started.wait(10)
    code, _, err = call("rebuild_counters", "counterapp.UploadsInAll")
    done.set()
    thread.join()
    assert code == 1
    assert "another rebuild_counters of it is running" in err


@pytest.mark.parametrize("source", [Upload, Delivery, Download, Shipment])
def test_repair_under_writers(projects, source):
    """Errors are injected and repaired again and again while four writers go on; the end is exact."""
    mine = detach.counters_of(source)
    stop = threading.Event()
    errors = []

    def write(number):
        try:
            i = (number + 1) * 1_000_000
            while not stop.is_set():
                i += 1
                with transaction.atomic():
                    source.objects.create(project=projects[(i + number) % 2], size=i, at=at(2026 + i % 2))
                    if i % 3 == 0:
                        source.objects.filter(size=i - 1).update(project=projects[i % 2])
                if i % 5 == 0:
                    source.objects.filter(size=i - 3).delete()
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        for counter in mine:
            with connection.cursor() as cursor:
                # One row: an UPDATE of many takes their locks in an order of its own.
                cursor.execute(
                    f"UPDATE {counter._meta.db_table} SET total = total + 7 "
                    f"WHERE id = (SELECT min(id) FROM {counter._meta.db_table})"
                )
            assert rebuild.rebuild(counter, "default") > 0
            assert rebuild.check(counter, "default").ok
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert_same_totals(*mine)


# -- partitions


def partitions_of(source):
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relid::regclass::text, c.reltuples FROM pg_partition_tree(%s) p JOIN "
            "pg_class c ON c.oid = p.relid "
            "WHERE isleaf",
            [source._meta.db_table],
        )
        return [row[0] for row in cursor.fetchall()]


def leaf_of(source):
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT tableoid::regclass::text FROM {source._meta.db_table} LIMIT 1")
        return cursor.fetchone()[0]


def run_all(statements):
    with transaction.atomic(), connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.mark.parametrize(
    ("source", "counter"), [(Download, DownloadsPerProject), (Shipment, ShipmentsPerProject)]
)
def test_a_detached_partition_is_subtracted_once(projects, source, counter):
    before = counter.objects.get(project=projects[0]).total
    leaf, table = leaf_of(source), source._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = '{leaf}'::regclass")
        bounds = cursor.fetchone()[0]
        cursor.execute(f"ALTER TABLE {table} DETACH PARTITION {leaf}")
    finding = rebuild.check(counter, "default", leaving=[leaf])
    assert finding.ok
    assert finding.detach_pending == [leaf]
    assert not rebuild.check(counter, "default").ok
    try:
        run_all(detach.on_settle(connection, source, leaf))
        assert counter.objects.get(project=projects[0]).total == before - 3 or bounds == "DEFAULT"
        assert rebuild.check(counter, "default").ok
        with connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {leaf} WHERE size = (SELECT min(size) FROM {leaf})")
        assert rebuild.check(counter, "default").ok
    finally:
        run_all(
            [
                *detach.on_restore(connection, source, leaf),
                f"ALTER TABLE {table} ATTACH PARTITION {leaf} {bounds}",
                *detach.on_restored(connection, source, leaf),
            ]
        )
    assert counter.objects.get(project=projects[0]).total == before - 1
    assert rebuild.check(counter, "default").ok


@pytest.mark.parametrize(
    ("source", "counter"), [(Download, DownloadsPerProject), (Shipment, ShipmentsPerProject)]
)
def test_a_partition_that_comes_back_during_a_rebuild_is_counted_once(projects, source, counter):
    """The rebuild's snapshot is older: for it the partition is not there, and its rows are no drift."""
    leaf, table = leaf_of(source), source._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = '{leaf}'::regclass")
        bounds = cursor.fetchone()[0]
        cursor.execute(f"ALTER TABLE {table} DETACH PARTITION {leaf}")
    run_all(detach.on_settle(connection, source, leaf))

    def attach():
        try:
            run_all(
                [
                    *detach.on_restore(connection, source, leaf),
                    f"ALTER TABLE {table} ATTACH PARTITION {leaf} {bounds}",
                    *detach.on_restored(connection, source, leaf),
                ]
            )
        finally:
            connection.close()

    def leaving(using):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")  # now there is a snapshot
        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()
        return ()

    assert rebuild.rebuild(counter, "default", leaving=leaving) == 0
    assert source.objects.count() == 6
    assert_same_totals(counter)


def test_a_kept_partition_stays_counted(projects):
    before = DownloadsEver.objects.get().total
    leaf, table = leaf_of(Download), Download._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = '{leaf}'::regclass")
        bounds = cursor.fetchone()[0]
        cursor.execute(f"ALTER TABLE {table} DETACH PARTITION {leaf}")
    try:
        assert rebuild.check(DownloadsEver, "default", leaving=[leaf]).ok
        run_all(detach.on_settle(connection, Download, leaf))
        assert DownloadsEver.objects.get().total == before
        assert DownloadsEver.objects.get().total_kept > 0
        assert rebuild.check(DownloadsEver, "default").ok
        assert rebuild.rebuild(DownloadsEver, "default") == 0
    finally:
        run_all(
            [
                *detach.on_restore(connection, Download, leaf),
                f"ALTER TABLE {table} ATTACH PARTITION {leaf} {bounds}",
                *detach.on_restored(connection, Download, leaf),
            ]
        )
    assert DownloadsEver.objects.get().total_kept == 0
    assert rebuild.check(DownloadsEver, "default").ok


def test_rotation_accounts_for_what_it_detaches_and_arms_what_it_makes(projects):
    from django_scaledb.counters import triggers
    from django_scaledb.partitions import maintenance

    ever = DownloadsEver.objects.get().total
    assert DownloadsPerProject.objects.get(project=projects[0]).total == 6
    report = maintenance.rotate([Download, Shipment], now=datetime(2040, 3, 3, tzinfo=UTC))
    assert report.ok, report.failures()
    assert DownloadsPerProject.objects.get(project=projects[0]).total == Download.objects.count() < 6
    assert ShipmentsPerProject.objects.get(project=projects[0]).total == Shipment.objects.count() < 6
    assert DownloadsEver.objects.get().total == ever
    assert call("check_counters", "counterapp.DownloadsEver", "counterapp.ShipmentsPerProject")[0] == 0
    assert call("check_counters", "counterapp.DownloadsPerProject")[0] == 0
    with connection.cursor() as cursor:
        cursor.execute(triggers.unarmed(rebuild.registry.definition(ShipmentsPerProject, connection)))
        assert cursor.fetchall() == []
    Shipment.objects.create(project=projects[0], size=1, at=at(2041))
    assert_same_totals(ShipmentsPerProject)


def test_a_partition_that_rotation_detached_counts_again_when_it_is_attached(projects):
    """By the hooks, in the transaction that attaches: subtracted totals come back once, kept ones stay."""
    from django_scaledb.partitions import catalog, hooks, maintenance
    from django_scaledb.partitions.registry import config_for

    sources = [Download, Shipment]
    assert maintenance.rotate(sources, now=datetime(2060, 3, 3, tzinfo=UTC)).ok
    for source in sources:
        source.objects.all().delete()
        source.objects.bulk_create(
            [source(project=projects[0], size=i, at=at(2060 + i % 2)) for i in range(6)]
        )
    ever = DownloadsEver.objects.get()
    assert maintenance.rotate(sources, now=datetime(2075, 3, 3, tzinfo=UTC)).ok
    for source, counter in [(Download, DownloadsPerProject), (Shipment, ShipmentsPerProject)]:
        assert counter.objects.get(project=projects[0]).total == source.objects.count() == 0
        config = config_for(source)
        (found,) = catalog.read(connection, [source._meta.db_table])
        tables = [p for p in found.partitions(config) if p.detached_at and p.range.lower.year in (2060, 2061)]
        assert len(tables) == 2
        for partition in tables:
            before = hooks.on_restore(connection, source, partition.table)
            behind = hooks.on_restored(connection, source, partition.table)
            bounds = partition.range.for_values(config.key_kind).as_string(None)
            name = partition.table.sql.as_string(None)
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT count(*) FROM {name}")
                rows = cursor.fetchone()[0]
            total = counter.objects.for_key(project=projects[0]).total
            run_all(
                [
                    *(statement.query.as_string(None) for statement in before),
                    f"ALTER TABLE {source._meta.db_table} ATTACH PARTITION {name} {bounds}",
                    f"COMMENT ON TABLE {name} IS NULL",
                    *(statement.query.as_string(None) for statement in behind),
                ]
            )
            assert counter.objects.for_key(project=projects[0]).total == total + rows
            assert_same_totals(counter)
            assert rows == 3
            if counter is ShipmentsPerProject:
                # Also where a statement names the partition: its triggers are back.
                with connection.cursor() as cursor:
                    cursor.execute(f"UPDATE {name} SET size = size + 1")
                assert_same_totals(counter)
        assert source.objects.count() == counter.objects.get(project=projects[0]).total == 6
    after = DownloadsEver.objects.get()
    assert (after.total, after.total_kept) == (ever.total, ever.total_kept)
    assert rebuild.check(ShipmentsPerProject, "default").ok


def test_restore_partition_counts_what_comes_back(projects):
    from django_scaledb.partitions import catalog, maintenance
    from django_scaledb.partitions.archive.restore import Wish, restore
    from django_scaledb.partitions.registry import config_for

    for source, counter in ((Download, DownloadsPerProject), (Shipment, ShipmentsPerProject)):
        assert maintenance.rotate([source], now=datetime(2080, 3, 3, tzinfo=UTC)).ok
        source.objects.all().delete()
        source.objects.bulk_create([source(project=projects[0], size=i, at=at(2080)) for i in range(4)])
        assert maintenance.rotate([source], now=datetime(2095, 3, 3, tzinfo=UTC)).ok
        assert counter.objects.for_key(project=projects[0]).total == 0
        (found,) = catalog.read(connection, [source._meta.db_table])
        detached = [p for p in found.partitions(config_for(source)) if p.detached_at]
        [partition] = [p for p in detached if p.range.lower.year == 2080]
        for _ in range(2):  # the second time there is nothing to do
            report = restore(source, Wish(partition.table.name), now=datetime(2095, 3, 3, tzinfo=UTC))
            assert report.ok, list(report.failures())
            assert counter.objects.for_key(project=projects[0]).total == 4 == source.objects.count()
        assert_same_totals(counter)
        source.objects.create(project=projects[0], size=9, at=at(2080))
        assert_same_totals(counter)
