"""`convert_to_partitioned` by attaching, as a project goes through it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster
from tests.project import Project

NUMBERS = itertools.count()

PLAIN = """
    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(models.Model):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        total = models.IntegerField(default=0)
        placed_at = models.DateTimeField(db_index=True)

        class Meta:
            indexes = [models.Index(fields=["total"], name="order_total", condition=models.Q(total__gt=5))]
            constraints = [models.CheckConstraint(condition=models.Q(total__gte=0), name="order_positive")]
"""
PARTITIONED = (
    PLAIN.replace("class Order(models.Model)", "class Order(PartitionedModel)")
    + """
        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
            premake = 2
"""
)
FILL = """
INSERT INTO shop_customer (name) SELECT 'c' || i FROM generate_series(1, 10) i;
INSERT INTO shop_order (customer_id, total, placed_at)
SELECT 1 + i % 10, i % 50, now() - i * interval '1 hour' FROM generate_series(1, {rows}) i;
"""
ORDER = "shop.Order"


@pytest.fixture
def project(tmp_path: Path, server: Cluster) -> Project:
    project = Project(tmp_path, server, f"conversion_{next(NUMBERS)}")
    project.models(PLAIN)
    project.manage("makemigrations", "shop")
    project.manage("migrate", "-v", "0")
    return project


def change_base(project: Project) -> None:
    project.models(PARTITIONED)
    assert "Convert Order to a partitioned model" in project.manage("makemigrations", "shop")


def kind(project: Project, table: str = "shop_order") -> str:
    return project.query(f"SELECT relkind::text FROM pg_class WHERE oid = '{table}'::regclass")[0][0]


def leftovers(project: Project) -> list[str]:
    """Everything in the database that a conversion might have forgotten."""
    return [
        row[0]
        for row in project.query(
            "SELECT 'relation ' || relname FROM pg_class WHERE relname ~ '_scaledb_|_new|_old' "
            "AND relname !~ '^django_scaledb_' "
            "UNION ALL SELECT 'constraint ' || conname FROM pg_constraint WHERE conname ~ "
            "'scaledb_(bounds|sync)' "
            "UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname ~ 'scaledb' "
            "UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE proname ~ 'scaledb'"
        )
    ]


def test_the_way_a_user_goes(project):
    project.execute(FILL.format(rows=20000))
    change_base(project)
    stopped = project.manage("migrate", fails=True)
    assert "nothing was migrated" in stopped
    assert "manage.py convert_to_partitioned shop.Order" in stopped
    assert kind(project) == "r"

    out = project.manage("convert_to_partitioned", ORDER)
    assert "is partitioned now" in out
    assert kind(project) == "p"
    project.manage("migrate", "-v", "0")
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    assert project.query("SELECT count(*), count(DISTINCT id) FROM shop_order") == [(20000, 20000)]
    assert leftovers(project) == []
    assert "partitioned already" in project.manage("convert_to_partitioned", ORDER)
    assert "done" in project.manage("convert_to_partitioned", ORDER, "--status")
    project.manage("show_partitions", "--check")
    project.run(
        """
        from django.utils import timezone
        order = Order.objects.create(customer_id=1, placed_at=timezone.now())
        assert order.id == 20001, order.id
        """
    )
    assert (
        project.query("SELECT count(*) FROM pg_inherits WHERE inhparent = 'shop_order'::regclass")[0][0] > 1
    )
