"""What `makemigrations` and `migrate` do about a model that has become a PartitionedModel."""

from __future__ import annotations

import itertools
from pathlib import Path

import psycopg
import pytest

from django_scaledb.partitions.conversion.migrate import SMALL_ROWS
from django_scaledb.testing import Cluster
from tests.project import Project
from tests.traffic import FILL, ORDERS, PARTITIONED_ORDERS

NUMBERS = itertools.count()


@pytest.fixture
def project(tmp_path: Path, server: Cluster) -> Project:
    project = Project(tmp_path, server, f"converting_{next(NUMBERS)}")
    project.models(ORDERS)
    project.manage("makemigrations", "shop")
    return project


def kind(project: Project) -> str:
    return project.query("SELECT relkind::text FROM pg_class WHERE oid = 'shop_order'::regclass")[0][0]


def change_base(project: Project) -> str:
    project.models(PARTITIONED_ORDERS)
    out = project.manage("makemigrations", "shop", stdin="")
    migration = (project.folder / "shop/migrations/0002_convert_order_to_partitioned.py").read_text()
    assert migration.count("migrations.") + migration.count("Operation(") == 1, (
        migration
    )  # only the class' base
    assert "ConvertToPartitioned(" in migration
    return out


def test_a_small_table_is_converted_by_migrate(project):
    project.manage("migrate", "-v", "0")
    project.execute(FILL.format(rows=500))
    change_base(project)
    assert "convert_to_partitioned" in project.manage("sqlmigrate", "shop", "0002")
    project.manage("migrate", "-v", "0")
    assert kind(project) == "p"
    assert project.query("SELECT count(*) FROM shop_order") == [(500,)]
    assert project.query("SELECT count(*) FROM dear") == project.query(
        "SELECT count(*) FROM shop_order WHERE total > 90"
    )
    assert project.query("SELECT count(*) FROM django_scaledb_conversion") == [(0,)]
    assert project.query("SELECT count(*) FROM pg_constraint WHERE conname ~ 'scaledb_bounds'") == [(0,)]
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    project.manage("show_partitions", "--check")
    assert "partitioned already" in project.manage("convert_to_partitioned", "shop.Order")
    assert "nothing to do" in project.manage("convert_to_partitioned", "shop.Order", "--dry-run")


def test_a_fresh_database_goes_through_the_whole_history(project):
    change_base(project)
    project.manage("migrate", "-v", "0")
    assert kind(project) == "p"
    project.run(
        """
        from django.utils import timezone
        customer = Customer.objects.create(name="c")
        Order.objects.create(customer=customer, placed_at=timezone.now())
        """
    )
    # Back in the history the table stays as it is, and plain models work on it.
    project.manage("migrate", "-v", "0", "shop", "0001")
    assert kind(project) == "p"
    project.manage("migrate", "-v", "0")
    project.manage("migrate", "-v", "0", "shop", "zero")


def test_a_large_table_stops_migrate_before_it_touches_anything(project):
    project.manage("migrate", "-v", "0")
    project.execute(FILL.format(rows=SMALL_ROWS + 1))
    change_base(project)
    later = PARTITIONED_ORDERS.replace(
        "name = models.CharField(max_length=50)", "name = models.CharField(max_length=51)"
    )
    project.models(later)
    project.manage("makemigrations", "shop")
    out = project.manage("migrate", fails=True)
    assert "nothing was migrated" in out
    assert "manage.py convert_to_partitioned shop.Order" in out
    assert "Applying" not in out
    assert "Traceback" not in out
    assert project.query("SELECT count(*) FROM django_migrations WHERE app = 'shop'") == [(1,)]


def test_a_half_converted_table_stops_migrate_too(project):
    project.manage("migrate", "-v", "0")
    project.execute(FILL.format(rows=10))
    change_base(project)
    with psycopg.connect(project.node.conninfo(dbname=project.database)) as blocker:
        blocker.execute("LOCK TABLE shop_order IN ROW EXCLUSIVE MODE")
        project.manage("convert_to_partitioned", "shop.Order", "--deadline", "0.3", fails=True)
    assert "is under way" in project.manage("migrate", fails=True)
    assert "django_scaledb.W007" in project.manage("check", "--database", "default")
    assert kind(project) == "r"
    # The dry run shows what is left, whatever was reached.
    with psycopg.connect(project.node.conninfo(dbname=project.database), autocommit=True) as connection:
        connection.execute("CREATE UNIQUE INDEX shop_order_scaledb_key ON shop_order (id, placed_at)")
    left = project.manage("convert_to_partitioned", "shop.Order", "--dry-run")
    assert "CREATE UNIQUE INDEX" not in left
    assert "ATTACH PARTITION" in left
    project.manage("convert_to_partitioned", "shop.Order")
    project.manage("migrate", "-v", "0")
    assert kind(project) == "p"


def test_bookkeeping_that_is_missing_is_made_by_migrate(project):
    project.manage("migrate", "-v", "0", "shop")
    project.execute(FILL.format(rows=SMALL_ROWS + 1))
    change_base(project)
    project.manage("convert_to_partitioned", "shop.Order", "--dry-run")
    assert project.query("SELECT to_regclass('django_scaledb_conversion')::text") == [(None,)]
    project.manage("convert_to_partitioned", "shop.Order")
    assert kind(project) == "p"
    assert project.query("SELECT count(*) FROM django_migrations WHERE app = 'django_scaledb'")[0][0] >= 1
    project.manage("migrate", "-v", "0")


def test_a_refusal_touches_nothing(project):
    project.manage("migrate", "-v", "0")
    project.execute(
        FILL.format(rows=20) + "CREATE TABLE payment (order_id bigint REFERENCES shop_order (id))"
    )
    change_base(project)
    objects = "SELECT count(*) FROM pg_class UNION ALL SELECT count(*) FROM pg_constraint"
    before = project.query(objects)
    out = project.manage("convert_to_partitioned", "shop.Order", fails=True)
    assert "points at it; set db_constraint=False" in out
    assert "Traceback" not in out
    assert project.query(objects) == before
    assert project.query("SELECT count(*) FROM django_scaledb_conversion") == [(0,)]
