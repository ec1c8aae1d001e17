"""Prometheus, JSON logs and OpenTelemetry, from running servers: what docs/how-to/monitor.md says."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.test_docs import DOCS
from tests.proofs.load import URLS, application, put_under_load, workers
from tests.proofs.site import Client, Program, Site, free_port
from tests.proofs.test_serve import serve
from tests.routing import eventually

pytestmark = pytest.mark.cluster

PAGE = "how-to/monitor.md"
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

    class Event(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"
            premake = 2
"""
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def shop(site: Site) -> Site:
    site.take(PAGE)
    page_urls = (site.folder / "shop" / "urls.py").read_text()
    application(site, MODELS, read_before_the_fork=False)
    site.write("shop/urls.py", URLS + page_urls.replace("urlpatterns =", "urlpatterns +="))
    return site


@pytest.fixture(scope="module")
def served(shop: Site) -> tuple[Program, int]:
    """The project behind one worker whose reads come from the replica."""
    program, port = serve(shop, "gunicorn shop.wsgi --workers 1 --worker-class gthread --threads 4")
    workers(port, 1)
    return program, port


def scrape(port: int) -> Samples:
    found = {}
    for family in text_string_to_metric_families(Client(port).get("/metrics")):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert (sample.name, labels) not in found, sample
            found[sample.name, labels] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["django_scaledb_" + name, tuple(sorted(labels.items()))]


def records(output: str) -> list[dict]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"')]
    return [line for line in lines if line["name"].startswith("django_scaledb")]


def test_metrics_and_logs_of_a_running_server(shop: Site, served: tuple[Program, int]) -> None:
    program, port = served
    where, event = (
        {"primary": "default", "replica": "replica1"},
        {"database": "default", "model": "shop.Event"},
    )
    before = scrape(port)
    assert value(before, "replica_up", **where) == 1
    assert value(before, "primary_up", primary="default") == 1
    assert value(before, "replica_lag_seconds", **where) < 60
    assert 28 * 86400 * 2 < value(before, "partition_runway_seconds", **event) < 93 * 86400
    states = {s: value(before, "partitions", **event, state=s) for s in ("attached", "premade", "detached")}
    assert states == {"attached": 1, "premade": 2, "detached": 0}
    assert value(before, "partition_bytes", **event, state="premade") >= 2 * 8192
    for part in ("servers", "decisions", "partitions", "runs"):
        assert value(before, "scrape_ok", part=part) == 1

    load = put_under_load(port, browsers=2, rounds=5)
    assert not load.errors
    after = scrape(port)

    def routed(reason: str) -> float:
        name = "routing_decisions_total"
        return value(after, name, primary="default", reason=reason) - value(
            before, name, primary="default", reason=reason
        )

    reads = load.read_from.total() + load.strangers.total()
    assert routed("replica") + routed("not_replayed") >= reads
    assert routed("replica") > 0

    # Something is wrong: it is said, and the rest is still there.
    (oldest,) = shop.query("SELECT min(inhrelid::regclass::text) FROM pg_inherits "
                           "WHERE inhparent = 'shop_event'::regclass")[0]  # fmt: skip
    shop.execute(f"ALTER TABLE shop_event DETACH PARTITION {oldest}")
    shop.standby.kill()
    eventually(lambda: value(scrape(port), "replica_up", **where) == 0, 5)
    broken = scrape(port)
    assert value(broken, "partition_problems", **event, problem="gap") + value(
        broken, "partition_problems", **event, problem="runway") > 0  # fmt: skip
    assert value(broken, "partition_runway_seconds", **event) == 0
    assert ("django_scaledb_replica_lag_seconds", tuple(where.items())) not in broken
    shop.standby.restart()
    eventually(lambda: value(scrape(port), "replica_up", **where) == 1, 20)

    shop.execute("ALTER TABLE shop_event RENAME TO shop_event_away")
    broken = scrape(port)
    shop.execute(f"ALTER TABLE shop_event_away RENAME TO shop_event; DROP TABLE {oldest}")
    assert value(broken, "partition_problems", **event, problem="error") == 1
    assert value(broken, "replica_up", **where) == 1
    shop.manage("rotate_partitions")

    said = records(program.output)
    out = next(r for r in said if r.get("state") == "out")
    assert (out["levelname"], out["alias"], out["role"], out["primary"]) == (
        "WARNING", "replica1", "replica", "default",
    )  # fmt: skip
    assert out["reason"]
    assert out["message"].endswith(out["reason"])
    assert said[-1] | {"state": "ok", "alias": "replica1", "levelname": "INFO"} == said[-1]


def test_several_workers_are_added_up(shop: Site) -> None:
    (shop.folder / "shared").mkdir()
    program = "gunicorn shop.wsgi --workers 2 --worker-class sync"
    _, port = serve(shop, f"env PROMETHEUS_MULTIPROC_DIR={shop.folder / 'shared'} {program}")
    workers(port, 2)

    def reads() -> float:
        found = scrape(port)
        assert value(found, "replica_up", primary="default", replica="replica1") == 1
        return sum(v for (name, _), v in found.items() if name == "django_scaledb_routing_decisions_total")

    before = reads()
    load = put_under_load(port, browsers=4, rounds=5)
    assert not load.errors
    wanted = load.read_from.total() + load.strangers.total()

    # Each worker hands on with a request, a second after the last time; one scrape reaches one of them.
    time.sleep(1.1)
    workers(port, 2)
    assert reads() - before >= wanted
    shop.programs.pop().stop()


CLIENTS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = ''
"""


def test_a_process_of_its_own(shop: Site) -> None:
    port, before = free_port(), shop.query(CLIENTS)
    program = shop.start(f"{sys.executable} exporter.py {port}")

    def answers() -> bool:
        try:
            return value(scrape(port), "replica_up", primary="default", replica="replica1") == 1
        except OSError:
            return False

    program.wait_for(answers)
    for _ in range(5):
        scrape(port)
    # Each scrape has a thread, which must leave no connection behind.
    eventually(lambda: shop.query(CLIENTS) <= before, 5)


def test_every_metric_is_documented_and_has_an_alert(shop: Site, served: tuple[Program, int]) -> None:
    begun = time.time()
    shop.execute("INSERT INTO shop_ordersperstatus (status, total) VALUES ('lost', 7)")
    shop.run(
        "from django.core.management import call_command\n"
        "from contextlib import suppress\n"
        "call_command('rotate_partitions')\n"
        "with suppress(SystemExit): call_command('check_counters')"
    )
    found = scrape(served[1])
    event = {"database": "default", "model": "shop.Event"}
    counter = {"database": "default", "counter": "shop.OrdersPerStatus"}
    assert value(found, "last_rotation_ok", **event) == 1
    assert begun < value(found, "last_rotation_success_timestamp_seconds", **event) < time.time()
    assert value(found, "counter_drifted_keys", **counter) == 1
    assert begun < value(found, "counter_check_timestamp_seconds", **counter) < time.time()
    there = {name for name, _ in found if name.startswith("django_scaledb_")}
    there = {name for name in there if not name.endswith("_created")}
    text = (DOCS / PAGE).read_text()
    table, alerts = text.partition("### Alerts")[0], text.partition("```yaml")[2].partition("```")[0]
    pattern = r"\bdjango_scaledb_\w+"
    assert set(re.findall(pattern, table)) == there
    assert set(re.findall(pattern, alerts)) == there


@pytest.mark.django_db
def test_a_scrape_has_a_bound_and_survives_what_fails(monkeypatch, caplog) -> None:
    from django_scaledb.contrib import prometheus
    from django_scaledb.partitions import registry

    models = registry.partitioned_models()
    with CaptureQueriesContext(connection) as few:
        monkeypatch.setattr(registry, "partitioned_models", lambda: models[:1])
        list(prometheus.ScaleDBCollector().collect())
    with CaptureQueriesContext(connection) as many:
        monkeypatch.setattr(registry, "partitioned_models", lambda: models)
        found = {metric.name: metric for metric in prometheus.ScaleDBCollector().collect()}
    asked = [sum("BEGIN" not in q["sql"] for q in queries) for queries in (few, many)]
    assert asked[0] <= asked[1] <= 20, "however many models there are"
    assert {s.value for s in found["django_scaledb_scrape_ok"].samples} == {1}

    monkeypatch.setattr(prometheus, "_runway_seconds", lambda model, now: 1 / 0)
    with caplog.at_level(logging.ERROR, "django_scaledb.prometheus"):
        found = {metric.name: metric for metric in prometheus.ScaleDBCollector().collect()}
    ok = {s.labels["part"]: s.value for s in found["django_scaledb_scrape_ok"].samples}
    assert ok == ok | {"partitions": 0, "servers": 1, "decisions": 1, "runs": 1}
    assert "django_scaledb_partitions" not in found
    assert [record.part for record in caplog.records] == ["partitions"]


def test_a_run_says_what_it_did(shop: Site) -> None:
    shop.execute("DROP TABLE " + shop.query("SELECT max(inhrelid::regclass::text) FROM pg_inherits "
                                            "WHERE inhparent = 'shop_event'::regclass")[0][0])  # fmt: skip
    (done,) = records(shop.manage("rotate_partitions"))
    assert done == done | {
        "name": "django_scaledb.partitions", "levelname": "INFO", "command": "rotate_partitions",
        "database": "default", "model": "shop.Event", "action": "create", "state": "done",
    }  # fmt: skip
    assert done["partition"].startswith("public.shop_event_y")
    assert ".." in done["range"]
    shop.execute("ALTER TABLE shop_event RENAME TO shop_event_away")
    (failed,) = records(shop.manage("rotate_partitions", fails=True))
    shop.execute("ALTER TABLE shop_event_away RENAME TO shop_event")
    assert failed == failed | {"levelname": "WARNING", "model": "shop.Event", "error": "PlanError"}
    assert "no table" in failed["reason"]


TRACE = """
import json, time
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import tracing
from django.db import connection, transaction
from django_scaledb.contrib import opentelemetry as ours
from django_scaledb.routing import use_primary

spans = InMemorySpanExporter()
tracing.provider.add_span_processor(SimpleSpanProcessor(spans))
assert ours.install() and ours.install()
said = []

def see(name, what):
    spans.clear()
    what()
    said.append([name, [ours_of(span.attributes) for span in spans.get_finished_spans()]])

def ours_of(attributes):
    ours = {k.removeprefix("django_scaledb."): v for k, v in attributes.items() if "scaledb" in k}
    return ours | {"sql": attributes["db.statement"].split()[0]}

def first():
    return Order.objects.first()

def eventually(alias):
    until = time.monotonic() + 10
    while Order.objects.all().db != alias:
        assert time.monotonic() < until
        time.sleep(0.02)

def atomic():
    with transaction.atomic():
        first()

def primary():
    with use_primary():
        first()

eventually("replica1")
first()
see("read", first)
see("named", lambda: Order.objects.using("default").first())
see("transaction", atomic)
see("use_primary", primary)
see("write", lambda: Order.objects.create(status="new"))
see("after", first)
eventually("replica1")
see("later", first)
see("idle", lambda: time.sleep(1))
print(json.dumps(said), flush=True)
input()
see("killed", lambda: Order.objects.using("replica1").first())
print(json.dumps(said[-1:]), flush=True)
"""


def test_spans_say_which_server_and_why(shop: Site) -> None:
    code = "from shop.models import *\n" + TRACE
    with shop.lag(1):
        process = subprocess.Popen(
            [sys.executable, "-m", "django", "shell", "-v", "0", "-c", code],
            cwd=shop.folder,
            env=shop.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = dict(json.loads(process.stdout.readline()))
        shop.standby.kill()
        try:
            answer, _ = process.communicate("\n", timeout=30)
        finally:
            shop.standby.restart()
    replica = {"alias": "replica1", "role": "replica", "reason": "replica", "sql": "SELECT"}
    primary = {"alias": "default", "role": "primary", "sql": "SELECT"}
    assert said == {
        "read": [replica],
        "named": [primary | {"reason": "named"}],
        "transaction": [primary | {"reason": "transaction"}],
        "use_primary": [primary | {"reason": "use_primary"}],
        "write": [primary | {"reason": "write", "sql": "WITH"}],
        "after": [primary | {"reason": "not_replayed"}],
        "later": [replica],
        "idle": [],
    }
    killed = dict(json.loads(answer))["killed"]
    assert killed[-1] | {"alias": "default", "failed_over_from": "replica1"} == killed[-1]


def test_without_opentelemetry_nothing_happens(monkeypatch) -> None:
    from django_scaledb.contrib import opentelemetry as ours

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert ours.install() is False
