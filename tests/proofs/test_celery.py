"""Celery's own worker and beat against a standby that lags: what docs/how-to/celery.md says."""

from __future__ import annotations

import json

import pytest

from tests.proofs.site import ORDER, Site

pytestmark = pytest.mark.cluster

PAGE = "how-to/celery.md"
BROKER = """
CELERY_BROKER_URL = "filesystem://"
CELERY_BROKER_TRANSPORT_OPTIONS = {{
    "data_folder_in": "{0}/queue", "data_folder_out": "{0}/queue", "control_folder": "{0}/control",
    "polling_interval": 0.05,
}}
CELERY_RESULT_BACKEND = "file://{0}/results"
SCALEDB["DDL_DEADLINE"] = 1
"""
EVENT = """
    class Event(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"
            premake = 2
"""
SEND = """
import json
from django.db import transaction
from shop.tasks import confirm

pending, unmarked = [], []
for number in range(12):
    with transaction.atomic():
        order = Order.objects.create(status="new")
    with transaction.atomic():
        Order.objects.filter(pk=order.pk).update(status=f"paid {number}")
        transaction.on_commit(lambda: pending.append(confirm.delay(order.pk)))
    unmarked.append(confirm.apply_async([order.pk], headers={"scaledb_position": ""}))
print(json.dumps([[r.get(timeout=30) for r in pending],
                  [r.get(timeout=30, propagate=False).__class__.__name__ for r in unmarked]]))
"""
ROTATE = """
import json
from django_scaledb.contrib.celery import rotate_partitions
try:
    print(json.dumps(rotate_partitions.delay({labels}).get(timeout=30)))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
PARTITIONS = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'shop_event'::regclass"


SOON = """
from django_scaledb.contrib.celery import rotate_partitions

rotate_partitions.max_retries = 1
rotate_partitions.default_retry_delay = 1
"""


@pytest.fixture(scope="module")
def shop(site: Site) -> Site:
    """The page's project, with a worker."""
    site.settings(BROKER.format(site.folder))
    for name in ("queue", "control", "results"):
        (site.folder / name).mkdir()
    site.models(ORDER + EVENT)
    (site.worker, site.beat) = site.take(PAGE)
    site.settings('CELERY_BEAT_SCHEDULE["rotate-partitions"]["schedule"] = 1.0\n')
    site.write("shop/tasks.py", (site.folder / "shop/tasks.py").read_text() + SOON)
    site.migrate()
    program = site.start(f"{site.worker} --concurrency 2")
    program.wait_for(lambda: "ready." in program.output)
    return site


def drop(site: Site, which: str) -> None:
    """Drop partitions of Event: ``max(name)`` is the last one."""
    (name,) = site.query(f"SELECT {which} FROM (SELECT inhrelid::regclass::text AS name FROM pg_inherits "
                         "WHERE inhparent = 'shop_event'::regclass) p")[0]  # fmt: skip
    site.execute(f"DROP TABLE {name}")


def answer(site: Site, code: str) -> object:
    return json.loads(site.run(code).splitlines()[-1])


def test_a_task_reads_what_its_sender_wrote(shop: Site) -> None:
    # The workers' monitors start with a first read; from then on a replica is read.
    shop.run("from shop.tasks import confirm\nfor _ in range(4): confirm.delay(0)")
    with shop.lag(3):
        seen, unmarked = answer(shop, SEND)
    assert [status for status, _ in seen] == [f"paid {number}" for number in range(12)]
    assert {alias for _, alias in seen} == {"default"}
    assert "DoesNotExist" in unmarked, "without the position the same task asks the replica too early"


def test_the_rotation_is_a_task(shop: Site) -> None:
    drop(shop, "string_agg(name, ',')")
    first, second = (answer(shop, ROTATE.format(labels=labels)) for labels in ("", '"shop.Event"'))
    assert [first["ok"], second["ok"]] == [True, True]
    assert [a["status"] for a in first["models"][0]["actions"]] == ["done"] * 3
    assert second["models"][0]["actions"] == []
    assert shop.query(PARTITIONS) == [(3,)]
    name, text = answer(shop, ROTATE.format(labels='"nothing"'))
    assert name == "CommandError"
    assert "'nothing' is no app with partitioned models" in text


def test_a_model_that_fails_fails_the_task_which_is_tried_again(shop: Site) -> None:
    drop(shop, "max(name)")
    with shop.node.connect(dbname=shop.database, autocommit=False) as holder:
        holder.execute("LOCK TABLE shop_event IN ACCESS EXCLUSIVE MODE")
        name, text = answer(shop, ROTATE.format(labels=""))
    assert name == "RotationFailed"
    assert "shop.Event: " in text
    assert "in the way: pid" in text
    log = shop.programs[0].output
    assert log.count("Retry in 1s") == 1
    assert "raised unexpected: RotationFailed" in log
    assert answer(shop, ROTATE.format(labels=""))["ok"]


def test_beat_sends_it(shop: Site) -> None:
    drop(shop, "max(name)")
    beat = shop.start(f"{shop.beat} --max-interval 1")
    beat.wait_for(lambda: shop.query(PARTITIONS) == [(3,)])
