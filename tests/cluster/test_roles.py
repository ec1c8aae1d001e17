"""The roles of docs/how-to/roles.md: with its very SQL the main paths run, and nothing more is possible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster
from tests.acceptance.test_docs import DOCS, blocks
from tests.project import Project

pytestmark = pytest.mark.cluster

PAGE = list(blocks((DOCS / "how-to" / "roles.md").read_text()))
MODELS = """
    from django.db.models import Count, Sum
    from django_scaledb.models import CounterModel

    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(PartitionedModel):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        total = models.IntegerField(default=0)
        placed_at = models.DateTimeField()

        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
            premake = 1
            retention = "2 months"
            retention_action = "drop"
            detached_for = "1 day"

    class Journal(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"
            premake = 1
            retention = "2 months"
            retention_action = "archive"
            detached_for = "1 day"

    class Reading(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            default_partition = True

    class BySignals(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["customer"]
            totals = {"count": Count("*"), "total": Sum("total")}

    class ByTrigger(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["customer"]
            totals = {"count": Count("*"), "total": Sum("total")}
            mechanism = "trigger"
"""
LATER = """
    class Note(%s):
        at = models.DateTimeField()
"""
PARTITIONED = LATER % "PartitionedModel" + '\n        class PartitioningMeta:\n            key = ["at"]\n'
SETTINGS = """
DATABASES["replica1"] = {{
    **DATABASES["default"], "HOST": {host!r}, "PORT": {port!r}, "TEST": {{"MIRROR": "default"}}
}}
SCALEDB = {{"REPLICAS": ["replica1"], "DDL_DEADLINE": 5}}
MEDIA_ROOT = "archive"
DATABASE_ROUTERS = ["django_scaledb.routing.ReplicaRouter"]
"""
HELPERS = """
from datetime import timedelta
from io import StringIO
from django.core.management import call_command
from django.db import connection, transaction
from django.utils import timezone

now = timezone.now()

def run(*args, code=0, **options):
    out = StringIO()
    try:
        call_command(*args, stdout=out, stderr=out, **options)
        status = 0
    except SystemExit as end:
        status = end.code
    assert status == code, (args, status, out.getvalue())
    return out.getvalue()

def refused(statement, reason="permission denied|must be owner"):
    import re
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(statement)
    except Exception as error:
        assert re.search(reason, str(error)), (statement, error)
    else:
        raise AssertionError(statement + " was possible")

def exact():
    for counter in (BySignals, ByTrigger):
        for customer in Customer.objects.all():
            mine = Order.objects.filter(customer=customer)
            row = counter.objects.for_key(customer=customer)
            assert (row.count, row.total) == (mine.count(), sum(mine.values_list("total", flat=True))), row
"""
APP = """
ann, bob = (Customer.objects.create(name=name) for name in ("ann", "bob"))
order = Order.objects.create(customer=ann, total=5, placed_at=now)
Order.objects.bulk_create([Order(customer=bob, total=n, placed_at=now) for n in range(10)])
order.placed_at = now + timedelta(days=31)
order.save()
Order.objects.filter(customer=bob, total__gt=7).update(total=1, customer=ann)
Order.objects.filter(customer=bob).first().delete()
with connection.cursor() as cursor:
    cursor.execute("UPDATE shop_bysignals SET total = total")
Reading.objects.create(at=now)
exact()
bob.delete()
exact()
assert Order.objects.select_related("customer").order_by("-placed_at").first() == order
"""
NO_DDL = """
with connection.cursor() as cursor:
    cursor.execute("SELECT relname FROM pg_class WHERE relispartition AND relname LIKE 'shop_order_y%'")
    (partition,) = cursor.fetchone()
for statement in (
    "CREATE TABLE mine ()", "DROP TABLE shop_order", "TRUNCATE shop_order", f"DROP TABLE {partition}",
    "CREATE INDEX ON shop_order (total)", "ALTER TABLE shop_order ADD mine int",
    f"ALTER TABLE shop_order DETACH PARTITION {partition}", "ALTER TABLE shop_order DISABLE TRIGGER ALL",
    "SET ROLE shop_owner", "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'", "SELECT scaledb_counted_book('x', 'y')",
):
    refused(statement)
said = run("rotate_partitions", now=(now + timedelta(days=400)).isoformat(), code=1)
assert "belongs to the role 'shop_owner'" in said and connection.settings_dict["USER"] in said, said
"""
ROUTED = """
import time
from django_scaledb.routing import use_replica
deadline = time.monotonic() + 20
while Order.objects.all().db != "replica1":
    assert time.monotonic() < deadline, "the replica is not read from"
    time.sleep(0.05)
assert Order.objects.count() >= 1
Customer.objects.create(name="read your writes")
assert Customer.objects.filter(name="read your writes").exists()
"""
ROTATION = """
later = now + timedelta(days=45)
assert "created" in run("rotate_partitions", now=later.isoformat())
assert "created" in run("create_partitions", "shop.Order", **{"from": "2024-01-01", "to": "2024-02-01"})
Order.objects.create(customer=Customer.objects.first(), placed_at="2024-01-05T00:00Z", total=3)
# Retention takes it off, and the counters with it.
assert "detached public.shop_order_y2024m01" in run("rotate_partitions", now=later.isoformat())
assert "dropped public.shop_order_y2024m01" in run(
    "rotate_partitions", now=(later + timedelta(days=2)).isoformat()
)
exact()
run("create_partitions", "shop.Journal", **{"from": "2024-01-01", "to": "2024-01-31"})
Journal.objects.create(at="2024-01-05T00:00Z")
assert "archived" in run("rotate_partitions", "shop.Journal", now=later.isoformat())
assert "dropped" in run("rotate_partitions", "shop.Journal", now=(later + timedelta(days=2)).isoformat())
assert not Journal.objects.exists()
run("restore_partition", "shop.Journal", "shop_journal_y2024m01")
assert Journal.objects.count() == 1
run("rotate_partitions")  # the months between
run("show_partitions", check=True)
with connection.cursor() as cursor:
    cursor.execute("UPDATE shop_bysignals SET total = total + 7")
    cursor.execute("UPDATE shop_bytrigger SET total = total + 7")
assert "drifted" in run("check_counters", code=1)
run("rebuild_counters")
assert "exact" in run("check_counters")
exact()
with connection.cursor() as cursor:
    cursor.execute(
        "SELECT count(*) FILTER (WHERE tableowner <> 'shop_owner'), count(*) FROM pg_tables "
        "WHERE schemaname = 'public'"
    )
    foreign, tables = cursor.fetchone()
    assert not foreign and tables > 10, (foreign, tables)
"""
CONVERSION = """
run("makemigrations", "shop", verbosity=0)
Note.objects.create(at=now)
run("convert_to_partitioned", "shop.Note")
run("migrate", verbosity=0)
assert Note.objects.count() == 1
"""
MONITOR = """
run("show_partitions", check=True)
shown = run("show_replicas", check=True)
assert shown.count("ok") == 2, shown
assert run("check_counters").count("exact") == 2
from django_scaledb.models import LastRun
noted = LastRun.objects.using("default")
assert noted.filter(kind="check_counters", ok=True, finished_at__gte=now).count() == 2
assert noted.filter(kind="rotate_partitions").exists()
said = run("check", databases=["default"])
assert "no issues" in said, said
for table in ("shop_order", "shop_customer", "shop_bysignals", "shop_bytrigger"):
    refused(f"DELETE FROM {table}")
    refused(f"UPDATE {table} SET id = id")
refused("INSERT INTO shop_customer (name) VALUES ('x')")
"""


BLIND = """
said = run("show_partitions", check=True, code=1)
assert "'shop_monitor' may not see whether rows lie in the default partition public.shop_reading" in said
assert "GRANT SELECT ON public.shop_reading_default TO shop_monitor" in said, said
assert "shop.Order" in said and said.count("!") == 1, said
run("show_partitions", "shop.Order", check=True)
run("show_replicas", check=True)
assert "permission denied for table shop_order" in run("check_counters", code=1)
said = run("check", databases=["default"])
assert "permission denied for table django_scaledb_conversion" in said, said
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(standbys=1) as cluster:
        yield cluster


class Shop(Project):
    """A project whose processes are one of the roles."""

    def __init__(self, folder: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        [settings] = [block.body for block in PAGE if block.caption == "settings.py"]
        standby = cluster.standbys[0]
        more = SETTINGS.format(host=standby.host, port=str(standby.port))
        super().__init__(folder, cluster, "shop", settings + more)
        self.cluster = cluster
        self.monkeypatch = monkeypatch

    def execute_as_superuser(self, script: str) -> None:
        conninfo = self.node.conninfo(superuser=True, dbname=self.database)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(script)

    def as_role(self, role: str, *codes: str) -> str:
        self.monkeypatch.setenv("DB_USER", role)
        self.cluster.wait_for_catchup()
        return self.run(HELPERS + "".join(codes))

    def manage_as(self, role: str, *args: str) -> str:
        self.monkeypatch.setenv("DB_USER", role)
        return self.manage(*args)


@pytest.fixture
def shop(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path, cluster, monkeypatch)
    *before, after = (block.body for block in PAGE if block.kind == "sql")
    for script in before:
        shop.execute_as_superuser(script)
    shop.models(MODELS + LATER % "models.Model")
    shop.manage_as("shop_rotation", "makemigrations", "shop", "-v", "0")
    shop.manage_as("shop_rotation", "migrate", "-v", "0")
    shop.execute_as_superuser(after)
    return shop


def test_each_role_does_its_work_and_nothing_else(shop: Shop) -> None:
    # What the page calls exact: nothing on partitions, and only to read what triggers write.
    shop.execute_as_superuser(
        "DO $$ DECLARE t regclass; BEGIN "
        "FOR t IN SELECT oid FROM pg_class WHERE relispartition AND relkind = 'r' LOOP "
        "EXECUTE format('REVOKE ALL ON %s FROM shop_app', t); END LOOP; END $$;"
        "REVOKE INSERT, UPDATE, DELETE ON shop_bytrigger FROM shop_app;"
        "REVOKE ALL ON django_scaledb_conversion, django_scaledb_archive, django_scaledb_last_run "
        "FROM shop_app"
    )
    denied = 'refused(f"SELECT * FROM {partition}")\nrefused("UPDATE shop_bytrigger SET total = 0")\n'
    shop.as_role("shop_app", APP, NO_DDL, denied, ROUTED)
    shop.as_role("shop_rotation", ROTATION)
    shop.as_role("shop_monitor", MONITOR, NO_DDL)
    shop.execute_as_superuser(
        "REVOKE SELECT ON ALL TABLES IN SCHEMA public FROM shop_monitor;"
        "GRANT SELECT ON django_scaledb_archive TO shop_monitor"
    )
    shop.as_role("shop_monitor", BLIND)
    shop.models(MODELS + PARTITIONED)
    shop.as_role("shop_rotation", CONVERSION)
