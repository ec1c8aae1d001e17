"""Counters by trigger: exact after whatever writes the source, ORM or not."""

from datetime import UTC, datetime

import pytest
from django.db import connection, transaction
from django.db.models import F

from django_scaledb.counters import triggers
from django_scaledb.counters.registry import counters, definition
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesInAll,
    DeliveriesPerProject,
    Delivery,
    Owner,
    Project,
    Shipment,
    ShipmentsPerProject,
)

pytestmark = pytest.mark.django_db(transaction=True)


def assert_exact():
    assert_same_totals(*[c for c in counters() if c._counter_meta.mechanism == "trigger"])


def day(month, year=2026):
    return datetime(year, month, 15, 12, 30, tzinfo=UTC)


def run(text, *params):
    with connection.cursor() as cursor:
        cursor.execute(text, params or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def world():
    owners = [Owner.objects.create(name=n, country=c) for n, c in [("ann", "NO"), ("bob", "SE")]]
    projects = [
        Project.objects.create(name=n, owner=o) for n, o in [("a", owners[0]), ("b", owners[1]), ("c", None)]
    ]
    Delivery.objects.bulk_create(
        Delivery(
            project=[*projects, None][i % 4],
            size=[None, 10, 200][i % 3],
            kind=["sdist", "100% \\ 'hidden'"][i % 2],
            yanked=[False, True, None][i % 3],
            at=[day(1), day(2), None][i % 3],
            filename=f"f{i}",
        )
        for i in range(12)
    )
    assert_exact()
    assert DeliveriesInAll.objects.get().total == 12
    assert DeliveriesPerProject.objects.get(project=projects[0]).total == 3
    return owners, projects


def orm(project):
    delivery = Delivery.objects.create(project=project, size=7)
    delivery.size = F("size") + 1
    delivery.save()
    Delivery.objects.filter(size=10).update(project=project, yanked=False)
    Delivery.objects.filter(size=200)[0].delete()
    Delivery.objects.bulk_create(
        [Delivery(size=1000 + i, filename=f"f{i}") for i in range(8, 16)],
        update_conflicts=True,
        unique_fields=["filename"],
        update_fields=["size"],
    )
    Project.objects.exclude(pk=project.pk).first().delete()


def raw_sql(project):
    run(
        "INSERT INTO counterapp_delivery (project_id, size, kind) SELECT %s, g, 'x' FROM "
        "generate_series(1, 50) g",
        project.pk,
    )
    run("UPDATE counterapp_delivery SET size = size + 1, yanked = false WHERE mod(id, 2) = 0")
    run("UPDATE counterapp_delivery SET filename = filename")
    run("DELETE FROM counterapp_delivery WHERE size < 10")
    run("DELETE FROM counterapp_delivery WHERE false")
    run(
        "INSERT INTO counterapp_delivery (filename, size, kind) VALUES ('f3', 1, 'y'), ('new', 2, 'y') "
        "ON CONFLICT (filename) DO UPDATE SET size = EXCLUDED.size, kind = 'z'"
    )
    run("WITH gone AS (DELETE FROM counterapp_delivery WHERE filename = 'f4' RETURNING *) SELECT * FROM gone")


def copy(project):
    with (
        connection.cursor() as cursor,
        cursor.copy("COPY counterapp_delivery (project_id, size, kind) FROM STDIN") as stream,
    ):
        for i in range(100):
            stream.write_row((project.pk if i % 2 else None, i, "copied"))


def truncate(project):
    run("TRUNCATE counterapp_delivery")
    assert not any(row.total for row in DeliveriesPerProject.objects.all())
    Delivery.objects.create(project=project, size=5)


def parents_change_hands(project):
    ann, bob = Owner.objects.order_by("name")
    run("UPDATE counterapp_project SET owner_id = %s WHERE name = 'a'", bob.pk)
    with transaction.atomic():
        Delivery.objects.create(project=project, size=50)
        run("UPDATE counterapp_project SET owner_id = %s", ann.pk)
        run("UPDATE counterapp_owner SET country = 'FI'")
        run("UPDATE counterapp_project SET owner_id = %s WHERE name = 'b'", bob.pk)
        Delivery.objects.create(project=project, size=60)
        Project.objects.get(name="c").delete()
    Owner.objects.get(name="bob").delete()


def many_statements_in_one_transaction(project):
    with transaction.atomic():
        for i in range(300):
            run(
                "INSERT INTO counterapp_delivery (project_id, size, kind) VALUES (%s, %s, %s)",
                project.pk,
                i,
                f"kind{i % 7}" * 4,
            )


WRITES = [orm, raw_sql, copy, truncate, parents_change_hands, many_statements_in_one_transaction]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_exact_after(world, write):
    write(world[1][0])
    assert_exact()


@pytest.mark.parametrize("write", [w for w in WRITES if w not in (truncate,)], ids=lambda f: f.__name__)
def test_exact_after_in_one_transaction_with_savepoints(world, write):
    with transaction.atomic():
        with transaction.atomic():
            write(world[1][0])
            transaction.set_rollback(True)
        run("SAVEPOINT by_hand")
        Delivery.objects.create(size=4)
        run("ROLLBACK TO by_hand")
        with transaction.atomic():
            write(world[1][0])
    assert_exact()


def test_immediate_constraints_fold_at_once(world):
    with transaction.atomic():
        Delivery.objects.create(project=world[1][0], size=4)
        run("SET CONSTRAINTS ALL IMMEDIATE")
        assert_exact()
        Delivery.objects.create(project=world[1][0], size=5)
        Delivery.objects.filter(size=5).update(size=6)
        assert_exact()
        run("SET CONSTRAINTS ALL DEFERRED")
        Delivery.objects.filter(size=6).delete()
    assert_exact()


def arming_rows():
    return run("SELECT count(*) FROM scaledb_counted_arms")[0][0]


def test_a_delete_is_folded_at_commit_and_leaves_nothing(world):
    a = world[1][0]
    before = DeliveriesPerProject.objects.get(project=a).total
    seen = f"SELECT total FROM {DeliveriesPerProject._meta.db_table} WHERE project_id = {a.pk}"
    with transaction.atomic():
        run("SAVEPOINT first")
        Delivery.objects.filter(project=a).delete()
        run("ROLLBACK TO first")
        assert arming_rows() == 0
        assert Delivery.objects.filter(project=a)[:1].get().delete()[0] == 1
        assert Delivery.objects.filter(project=a)[:1].get().delete()[0] == 1
        assert arming_rows() == 1
        assert run(seen) == [(before,)], "the counter's row is not locked yet"
    assert run(seen) == [(before - 2,)]
    assert arming_rows() == 0
    Delivery.objects.filter(pk=-1).delete()
    assert_exact()


def test_deletes_with_immediate_constraints(world):
    with transaction.atomic():
        run("SET CONSTRAINTS ALL IMMEDIATE")
        for delivery in Delivery.objects.all()[:2]:
            delivery.delete()
            assert_exact()
            assert arming_rows() == 0
        run("SET CONSTRAINTS ALL DEFERRED")
        Delivery.objects.all()[:1].get().delete()
        run("SET CONSTRAINTS ALL IMMEDIATE")
        assert_exact()
        assert arming_rows() == 0
        Delivery.objects.all()[:1].get().delete()
    assert_exact()
    assert arming_rows() == 0


def test_partitions_count_whatever_table_a_statement_names(world):
    a = world[1][0]
    for i in range(6):
        Shipment.objects.create(project=a, size=i, at=day(3, 2026 + i % 2))
    assert_exact()
    leaf = run("SELECT tableoid::regclass::text FROM counterapp_shipment LIMIT 1")[0][0]
    run(
        f"INSERT INTO {leaf} (id, project_id, size, at) SELECT id + 1000, project_id, "
        f"100, at FROM {leaf} LIMIT 1"
    )
    run(f"UPDATE {leaf} SET size = 7 WHERE size = 100")
    run(f"DELETE FROM {leaf} WHERE size = 0")
    assert_exact()
    run("UPDATE counterapp_shipment SET at = at + interval '1 year' WHERE at < '2027-01-01'")
    assert_exact()
    run(f"TRUNCATE {leaf}")
    assert_exact()
    run("TRUNCATE counterapp_shipment")
    assert_exact()
    assert ShipmentsPerProject.objects.get(project=a).total == 0


def test_everything_is_armed_and_up_to_date():
    for counter in counters():
        if counter._counter_meta.mechanism != "trigger":
            continue
        found = definition(counter, connection)
        assert run(triggers.unarmed(found)) == []
        name = f"{triggers.prefix(found)}_fold()"
        assert run("SELECT obj_description(%s::regprocedure)", name) == [(triggers.comment(found),)]
