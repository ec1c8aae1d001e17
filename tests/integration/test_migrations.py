"""Plain `makemigrations` and `migrate` on partitioned models, as a project runs them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster
from tests.project import Project

NUMBERS = itertools.count()

ORDER = """
    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(PartitionedModel):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        total = models.IntegerField(default=0)
        placed_at = models.DateTimeField()

        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
            premake = 2
"""
PLACE = """
    from django.utils import timezone
    customer = Customer.objects.create(name="c")
    Order.objects.create(customer=customer, placed_at=timezone.now())
"""
PARTITIONS = (
    "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'shop_order'::regclass ORDER BY 1"
)


@pytest.fixture
def project(tmp_path: Path, server: Cluster) -> Project:
    return Project(tmp_path, server, f"project_{next(NUMBERS)}")


def migrate(project: Project, source: str | None = None) -> None:
    if source is not None:
        project.models(source)
        project.manage("makemigrations", "shop", stdin="y\n" * 3)
    project.manage("migrate", "-v", "0")
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")


def test_a_fresh_project_inserts_at_once_and_has_no_default_partition(project):
    migrate(project, ORDER)
    project.run(PLACE)
    names = [name for (name,) in project.query(PARTITIONS)]
    assert len(names) == 3
    assert not any("default" in name for name in names)
    assert project.query("SELECT count(*) FROM shop_order") == [(1,)]
    assert project.query("SELECT pg_get_partkeydef('shop_order'::regclass)") == [("RANGE (placed_at)",)]
    assert project.query("SELECT count(*) FROM pg_extension WHERE extname = 'hstore'") == [(0,)]


def test_sqlmigrate_shows_all_that_runs(project):
    project.models(ORDER)
    project.manage("makemigrations", "shop")
    printed = project.manage("sqlmigrate", "shop", "0001")
    assert 'PRIMARY KEY ("id", "placed_at")) PARTITION BY RANGE ("placed_at");' in printed
    assert printed.count('PARTITION OF "shop_order" FOR VALUES FROM') == 3


def test_only_the_key_is_required(project):
    migrate(
        project,
        """
        class Order(PartitionedModel):
            at = models.DateField()

            class PartitioningMeta:
                key = ["at"]
        """,
    )
    bounds = project.query(
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r'"
    )
    assert len(bounds) == 3
    assert all("-01-01') TO ('" in bound for (bound,) in bounds)


def test_a_default_partition_when_asked_for(project):
    migrate(project, ORDER.replace("premake = 2", "premake = 2\n            default_partition = True"))
    assert ("shop_order_default",) in project.query(PARTITIONS)


def test_later_changes_reach_every_partition(project):
    migrate(project, ORDER)
    project.run(PLACE)
    changed = (
        ORDER.replace("IntegerField(default=0)", "BigIntegerField(default=7, db_index=True)").replace(
            "placed_at = models.DateTimeField()",
            "placed_at = models.DateTimeField()\n        note = models.TextField(default='none')",
        )
        + """
        class Meta:
            indexes = [models.Index(fields=["note"], name="by_note")]
            constraints = [
                models.UniqueConstraint(fields=["note", "total", "placed_at"], name="order_once"),
                models.CheckConstraint(condition=models.Q(total__gte=0), name="order_positive"),
            ]
        """
    )
    migrate(project, changed)
    assert project.query("SELECT note, total FROM shop_order") == [("none", 0)]
    per_partition = project.query(
        "SELECT count(DISTINCT indrelid) FROM pg_index JOIN pg_class c ON c.oid = indrelid AND relkind = 'r' "
        "WHERE indrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'shop_order'::regclass) "
        "AND pg_get_indexdef(indexrelid) LIKE '%(note)%'"
    )
    assert per_partition == [(3,)]
    migrate(project, ORDER)
    assert project.query("SELECT total FROM shop_order") == [(0,)]


def test_a_renamed_key_and_a_renamed_model(project):
    migrate(project, ORDER)
    project.run(PLACE)
    project.models(ORDER.replace("placed_at", "bought_at"))
    project.manage("makemigrations", "shop", stdin="y\n" * 3)
    migrate(project)
    project.models(ORDER.replace("placed_at", "bought_at").replace("Order", "Purchase"))
    project.manage("makemigrations", "shop", stdin="y\n" * 3)
    migrate(project)
    assert project.query("SELECT count(bought_at) FROM shop_purchase") == [(1,)]
    project.run("purchase = Purchase.objects.get(); purchase.total = 9; purchase.save(); purchase.delete()")
    project.manage("migrate", "-v", "0", "shop", "0001")
    project.manage("migrate", "-v", "0")


@pytest.mark.slow
def test_squashing_keeps_the_table_partitioned(project, server):
    migrate(project, ORDER)
    project.models(ORDER.replace("placed_at", "bought_at"))
    project.manage("makemigrations", "shop", stdin="y\n" * 3)
    migrate(project, ORDER.replace("placed_at", "bought_at").replace("total =", "amount ="))
    project.manage("squashmigrations", "shop", "0001", "0003", "--noinput")
    squashed = next((project.folder / "shop" / "migrations").glob("*squashed*.py"))
    text = squashed.read_text()
    assert "CreatePartitionedModel" in text
    assert "'key': ['bought_at']" in text
    assert "AlterPartitioning" not in text, "it folds into the operation that creates the model"
    migrate(project)
    again = Project(project.folder / "again", server, f"{project.database}_again")
    again.models(ORDER.replace("placed_at", "bought_at").replace("total =", "amount ="))
    squashed.rename(again.folder / "shop" / "migrations" / "0001_initial.py")
    migration = again.folder / "shop" / "migrations" / "0001_initial.py"
    migration.write_text("\n".join(line for line in text.splitlines() if "replaces" not in line))
    migrate(again)
    assert again.query("SELECT pg_get_partkeydef('shop_order'::regclass)") == [("RANGE (bought_at)",)]


def test_historical_models_in_data_migrations(project):
    project.models(ORDER)
    project.manage("makemigrations", "shop")
    (project.folder / "shop" / "migrations" / "0002_data.py").write_text(
        """
from datetime import timedelta
from django.db import migrations
from django.utils import timezone

def forwards(apps, schema_editor):
    Order = apps.get_model("shop", "Order")
    customer = apps.get_model("shop", "Customer").objects.create(name="first")
    order = Order.objects.create(customer=customer, placed_at=timezone.now())
    order.placed_at += timedelta(days=28)
    order.save()
    assert Order.objects.count() == 1
    order.placed_at -= timedelta(days=28)
    assert order.delete()[0] == 1

class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = [migrations.RunPython(forwards, migrations.RunPython.noop)]
"""
    )
    migrate(project)
    project.manage("migrate", "-v", "0", "shop", "zero")
    assert project.query("SELECT count(*) FROM pg_class WHERE relname LIKE 'shop_%'") == [(0,)]


def test_the_interval_of_today_makes_the_first_partitions(project):
    project.models(ORDER)
    project.manage("makemigrations", "shop")
    project.models(ORDER.replace('"1 month"', '"1 day"').replace("premake = 2", "premake = 6"))
    migrate(project)
    assert len(project.query(PARTITIONS)) == 7


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("placed_at = models.DateTimeField()", "placed_at = models.DateField()"), "cannot change its type"),
        (("placed_at", "x_at"), "cannot drop it"),
    ],
)
def test_what_postgresql_cannot_do_to_a_key_is_refused_in_words(project, change, complaint):
    migrate(project, ORDER)
    project.models(ORDER.replace(*change))
    # --noinput: a rename that nobody confirms is a removal and an addition.
    project.manage("makemigrations", "shop", stdin="n\n1\ntimezone.now()\n")
    assert complaint in project.manage("migrate", fails=True)
    assert len(project.query(PARTITIONS)) == 3


def test_an_app_without_migrations(project):
    (project.folder / "shop" / "migrations" / "__init__.py").unlink()
    (project.folder / "shop" / "migrations").rmdir()
    project.models(ORDER)
    project.manage("migrate", "-v", "0", "--run-syncdb")
    project.run(PLACE)
    assert len(project.query(PARTITIONS)) == 3


def test_beside_django_postgres_extra(tmp_path, server):
    """In INSTALLED_APPS before or behind it, with its own models and its own makemigrations."""
    extra = 'INSTALLED_APPS = ["psqlextra", "django_scaledb", "shop"]'
    project = Project(tmp_path, server, f"project_{next(NUMBERS)}", extra)
    project.models(
        ORDER
        + """
    from psqlextra.models import PostgresModel

    class Setting(PostgresModel):
        name = models.TextField(unique=True)
    """
    )
    project.manage("pgmakemigrations", "shop")
    migrate(project)
    project.run(PLACE)
    project.run(
        "Setting.objects.on_conflict(['name'], __import__('psqlextra.query').query.ConflictAction.NOTHING)"
        ".insert(name='a')"
    )
    assert len(project.query(PARTITIONS)) == 3


def test_a_schema_on_the_search_path(tmp_path, server):
    extra = 'DATABASES["default"]["OPTIONS"] = {"options": "-c search_path=shop,public"}'
    project = Project(tmp_path, server, f"project_{next(NUMBERS)}", extra)
    project.models("")
    project.run("from django.db import connection; connection.cursor().execute('CREATE SCHEMA shop')")
    migrate(project, ORDER)
    project.run(PLACE)
    assert project.query(
        "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class WHERE relispartition"
    ) == [("shop",)]


TEST_OF_THE_SHOP = """
from datetime import UTC, datetime
from django.test import TestCase
from shop.models import Customer, Order

class AnyDate(TestCase):
    def test_it(self):
        customer = Customer.objects.create(name="c")
        for year in (1999, 2026, 2199):
            Order.objects.create(customer=customer, placed_at=datetime(year, 5, 17, tzinfo=UTC))
        self.assertEqual(Order.objects.count(), 3)
"""


def test_a_test_database_takes_rows_of_any_date_unless_told_otherwise(tmp_path, server):
    project = Project(tmp_path, server, f"project_{next(NUMBERS)}")
    project.models(ORDER)
    project.manage("makemigrations", "shop")
    (project.folder / "shop" / "tests.py").write_text(TEST_OF_THE_SHOP)
    assert "OK" in project.manage("test", "shop")
    settings = project.folder / "project_settings.py"
    settings.write_text(settings.read_text() + '\nSCALEDB = {"TEST_DEFAULT_PARTITION": False}\n')
    assert "NoPartitionError: no partition of shop.Order" in project.manage("test", "shop", fails=True)
