"""What an index on a partitioned table costs those who write to it.

A table of 24 monthly partitions has 8 writers, each of which inserts, updates and reads one row after
another. Meanwhile an index is built and removed, by what Django's `AddIndex` and `RemoveIndex` run and
by `AddIndexConcurrently` and `RemoveIndexConcurrently` of `django_scaledb.operations`. Then the same
again while somebody, who had written one row, leaves a transaction open for some seconds.

Printed: seconds, the longest that one statement of a writer took, and how much they got done.
"""

from __future__ import annotations

import argparse
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime

import django
import psycopg
from django.conf import settings

from django_scaledb.testing import Cluster, Node

MONTHS = [(year, month) for year in (2024, 2025) for month in range(1, 13)]
FILL = """
INSERT INTO bench_order (customer, total, note, placed_at)
SELECT i % 1000, i % 100, md5(i::text), '2024-01-01+00'::timestamptz + i * (interval '730 days' / {rows})
FROM generate_series(0, {rows} - 1) i
"""


class Writer(threading.Thread):
    def __init__(self, node: Node, stop: threading.Event, number: int) -> None:
        super().__init__(daemon=True)
        self.node, self.over, self.number = node, stop, number
        self.longest = 0.0
        self.count = 0

    def run(self) -> None:
        chance = random.Random(self.number)
        with self.node.connect() as connection:
            while not self.over.is_set():
                year, month = chance.choice(MONTHS)
                moment = datetime(year, month, 1 + chance.randrange(28), microsecond=self.count, tzinfo=UTC)
                for statement in (
                    "INSERT INTO bench_order (customer, total, note, placed_at) VALUES (1, 1, 'x', %s)",
                    "UPDATE bench_order SET total = total + 1 WHERE placed_at = %s",
                    "SELECT total FROM bench_order WHERE placed_at = %s",
                ):
                    begun = time.perf_counter()
                    connection.execute(statement, [moment])
                    self.longest = max(self.longest, time.perf_counter() - begun)
                    self.count += 1
                    time.sleep(0.002)


def measure(node: Node, name: str, tool: Callable[[], object], hold: float) -> float:
    """The longest statement of 8 writers, in milliseconds, while `tool` runs."""
    stop = threading.Event()
    writers = [Writer(node, stop, number) for number in range(8)]
    with ExitStack() as stack:
        if hold:
            sleeper = stack.enter_context(psycopg.connect(node.dsn))
            sleeper.execute("UPDATE bench_order SET total = 0 WHERE placed_at = '2025-06-01+00'")
            timer = threading.Timer(hold, sleeper.rollback)
            timer.start()
        for writer in writers:
            writer.start()
        time.sleep(1)
        begun = time.perf_counter()
        tool()
        seconds = time.perf_counter() - begun
        if hold:
            timer.join()
        time.sleep(0.5)
        stop.set()
        for writer in writers:
            writer.join()
    longest = max(writer.longest for writer in writers) * 1000
    rate = sum(writer.count for writer in writers) / (seconds + 1.5)
    print(f"{name:42} {seconds:7.1f} s   longest {longest:8.0f} ms   {rate:6.0f} statements/s", flush=True)
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_400_000)
    parser.add_argument("--hold", type=float, default=6, help="seconds that a transaction is left open")
    arguments = parser.parse_args()
    with Cluster(standbys=0, settings={"shared_buffers": "256MB", "max_wal_size": "4GB"}) as cluster:
        settings.configure(
            INSTALLED_APPS=["django_scaledb"],
            DATABASES={"default": cluster.primary.django_settings()},
            SCALEDB={"DDL_DEADLINE": 120},
            USE_TZ=True,
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            LOGGING_CONFIG=None,
        )
        logging.disable(logging.WARNING)
        django.setup()
        run(cluster.primary, arguments.rows, arguments.hold)


def run(node: Node, rows: int, hold: float) -> None:
    from django.db import connection, models

    from django_scaledb.models import PartitionedModel
    from django_scaledb.partitions.maintenance import create_span

    class Order(PartitionedModel):
        customer = models.IntegerField()
        total = models.IntegerField()
        note = models.TextField()
        placed_at = models.DateTimeField()

        class Meta:
            app_label = "bench"
            indexes = [models.Index(fields=["placed_at"], name="bench_placed")]

        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
            premake = 0

    with connection.schema_editor() as editor:
        editor.create_model(Order)
    with connection.cursor() as cursor:  # the partition of today
        cursor.execute("SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'bench_order'::regclass")
        for (partition,) in cursor.fetchall():
            cursor.execute(f"DROP TABLE {partition}")
    first, last = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
    assert create_span([Order], first, last).ok
    with connection.cursor() as cursor:
        cursor.execute(FILL.format(rows=rows))
        cursor.execute("ANALYZE bench_order")
        cursor.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'bench_order'::regclass")
        partitions = cursor.fetchone()[0]
        version = connection.pg_version // 10000  # type: ignore[attr-defined]
    print(f"{rows:,} rows in {partitions} partitions, 8 writers, PostgreSQL {version}")
    index = models.Index(fields=["customer", "total"], name="bench_index")

    def change(what: str, concurrently: bool) -> Callable[[], None]:
        def tool() -> None:
            with connection.schema_editor(atomic=not concurrently) as editor:
                getattr(editor, what)(Order, index, concurrently=concurrently)

        return tool

    for seconds in (0.0, hold):
        if seconds:
            print(f"while a transaction that wrote one row is left open for {seconds:g} s:")
        measure(node, "nothing", lambda: time.sleep(3), seconds)
        stalls = {}
        for kind, suffix in ((False, ""), (True, "Concurrently")):
            for what, name in (("add_index", "AddIndex"), ("remove_index", "RemoveIndex")):
                stalls[name + suffix] = measure(node, name + suffix, change(what, kind), seconds)
        for name in ("AddIndex", "RemoveIndex"):
            ratio = stalls[name] / stalls[name + "Concurrently"]
            print(f"longest stall, {name} / {name}Concurrently: {ratio:.1f}")


if __name__ == "__main__":
    main()
