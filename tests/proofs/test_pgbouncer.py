"""PgBouncer in transaction mode, fewer sessions than clients: what docs/how-to/pgbouncer.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.acceptance.test_docs import DOCS, blocks, commands, matches
from tests.bouncer import PORT, pgbouncer
from tests.proofs.load import application, put_under_load, workers
from tests.proofs.site import Site
from tests.proofs.test_serve import serve

pytestmark = pytest.mark.cluster

PAGE = "how-to/pgbouncer.md"
MODELS = """
    from django.db.models import Count
    from django_scaledb.models import CounterModel

    class Order(models.Model):
        status = models.CharField(max_length=50)

    class OrdersPerStatus(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["status"]
            totals = {"total": Count("*")}

    class OrdersByTrigger(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["status"]
            totals = {"total": Count("*")}
            mechanism = "trigger"

    class Event(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"
"""


@pytest.fixture(scope="module")
def shop(site: Site) -> Iterator[Site]:
    """A project whose aliases go through PgBouncer, except ``direct``."""
    application(site, MODELS)
    (ini,) = [block.body for block in blocks((DOCS / PAGE).read_text()) if block.caption == "pgbouncer.ini"]
    options = ini.partition("[pgbouncer]\n")[2]
    nodes = {"shop_primary": site.node, "shop_replica1": site.standby}
    with pgbouncer({name: (node, site.database) for name, node in nodes.items()}, options) as home:
        site.take(PAGE)
        path = site.folder / "project_settings.py"
        path.write_text(path.read_text().replace("/run/pgbouncer", str(home)).replace("6432", PORT))
        yield site


@pytest.mark.slow
@pytest.mark.parametrize("binding", ["client", "server"])
def test_routing_and_counters(shop: Site, binding: str) -> None:
    environment = {"SERVER_SIDE_BINDING": "1"} if binding == "server" else {}
    _, port = serve(shop, "gunicorn shop.wsgi --workers 2 --worker-class gthread --threads 4", **environment)
    workers(port, 2)
    with shop.lag(1):
        load = put_under_load(port)
    assert (load.errors, load.stale) == ([], [])
    assert load.read_from["default"] > 0
    assert load.strangers[False] > 0, "who has no cookie sees the lag"
    load = put_under_load(port, rounds=4, at_half=shop.standby.kill)
    try:
        assert (load.errors, load.stale) == ([], [])
    finally:
        shop.standby.restart()
    counted = sorted(shop.query("SELECT status, count(*) FROM shop_order GROUP BY status"))
    assert sum(n for _, n in counted) >= 6 * 12
    for table in ("shop_ordersperstatus", "shop_ordersbytrigger"):
        assert sorted(shop.query(f"SELECT status, total FROM {table} WHERE total <> 0")) == counted
    assert "exact" in shop.manage("check_counters")
    shop.stop_programs()


FIRST = """
import time
from shop.models import Order

def read():
    begun = time.monotonic()
    Order.objects.using("replica1").count()
    return time.monotonic() - begun

while Order.objects.all().db != "replica1":
    time.sleep(0.05)
read()
print("ready", flush=True)
input()
print(read(), flush=True)
"""


def test_a_read_that_pgbouncer_keeps_waiting_goes_elsewhere(shop: Site) -> None:
    """PgBouncer refuses whoever comes when a server is known to be gone; who found that out waits."""
    process = subprocess.Popen(
        [sys.executable, "-m", "django", "shell", "-v", "0", "-c", FIRST],
        cwd=shop.folder, env=shop.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    shop.standby.kill()
    try:
        answer, _ = process.communicate("\n", timeout=30)
    finally:
        process.kill()
        shop.standby.restart()
    assert float(answer) < 10


def test_a_run_is_refused_and_goes_past_the_pool(shop: Site) -> None:
    refused, direct = [
        command
        for block in blocks((DOCS / PAGE).read_text())
        if block.kind == "console"
        for command in commands(block.body)
    ]
    argv = refused.text.removeprefix("python manage.py ").split()
    assert "nothing to do" in shop.manage(*argv)
    shop.execute("DROP TABLE " + shop.query("SELECT max(inhrelid::regclass::text) FROM pg_inherits "
                                            "WHERE inhparent = 'shop_event'::regclass")[0][0])  # fmt: skip
    said = shop.manage(*argv, fails=True)
    assert matches(refused.expected, said)
    assert "in transaction mode" in shop.manage("rebuild_counters", fails=True)
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert shop.query(locks) == [(0,)]
    assert matches(direct.expected, shop.manage(*direct.text.removeprefix("python manage.py ").split()))
    assert "nothing to do" in shop.manage(*argv)
    report = json.loads(shop.manage("show_partitions", "--format", "json"))
    assert report["ok"]
