"""Counters go on counting while their source becomes partitioned."""

from __future__ import annotations

import itertools

import psycopg
import pytest

from tests.project import Project

NUMBERS = itertools.count()
PLAIN = """
    from django.db.models import Count, Sum
    from django_scaledb.models import CounterModel

    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(models.Model):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        total = models.IntegerField(default=0)
        placed_at = models.DateTimeField()

    class Totals(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["customer"]
            totals = {"count": Count("*"), "sum": Sum("total")}
            mechanism = "MECHANISM"
"""
META = """
        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"

    class Totals"""
WRITE = """
    from datetime import timedelta
    from django.utils import timezone
    Order.objects.create(customer_id=1, total=7, placed_at=timezone.now())
    Order.objects.filter(customer_id=2).update(total=5)
    Order.objects.filter(total=13).delete()
"""


@pytest.mark.parametrize(
    ("mechanism", "strategy"),
    [
        pytest.param("trigger", "attach", marks=pytest.mark.slow),
        pytest.param("trigger", "copy", marks=pytest.mark.slow),
        pytest.param("signals", "attach", marks=pytest.mark.slow),
        ("signals", "copy"),
    ],
)
def test_no_drift_at_any_point(tmp_path, server, mechanism, strategy):
    project = Project(tmp_path, server, f"counted_{next(NUMBERS)}")
    plain = PLAIN.replace("MECHANISM", mechanism)
    project.models(plain)
    project.manage("makemigrations", "shop")
    project.manage("migrate", "-v", "0")
    project.execute(
        "INSERT INTO shop_customer (name) VALUES ('a'), ('b'); INSERT INTO shop_order (customer_id, "
        "total, placed_at) "
        "SELECT 1 + i % 2, i % 20, now() - i * interval '1 hour' FROM generate_series(1, 200) i"
    )
    if mechanism == "signals":
        project.manage("rebuild_counters")
    project.models(
        plain.replace("Order(models.Model)", "Order(PartitionedModel)").replace("\n    class Totals", META)
    )
    project.manage("makemigrations", "shop")
    convert = ("convert_to_partitioned", "shop.Order")
    with psycopg.connect(project.node.conninfo(dbname=project.database)) as blocker:
        blocker.execute("LOCK TABLE shop_customer IN ROW EXCLUSIVE MODE")
        project.manage(*convert, "--strategy", strategy, "--deadline", "0.3", fails=True)
    project.run(WRITE)
    project.manage("check_counters")
    project.manage(*convert, "--abort")
    project.run(WRITE)
    project.manage("check_counters")
    project.manage(*convert, "--strategy", strategy)
    project.run(WRITE)
    project.manage("check_counters")
    if strategy == "copy":
        project.manage(*convert, "--finish")
    project.manage("migrate", "-v", "0")
    project.run(WRITE)
    if mechanism == "trigger":
        project.execute("UPDATE shop_order SET total = 3 WHERE total = 4")
    project.manage("check_counters")
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
