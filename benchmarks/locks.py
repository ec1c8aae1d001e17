"""What other clients feel while partitions are made and retired.

Somebody has a SELECT on the partitioned table open, somebody else an UPDATE on the table that its
foreign key points at, as reports and slow requests do. Meanwhile two clients go on reading and
inserting, and the partition tool runs. Printed is the longest time that one SELECT and one INSERT
of theirs took: without any tool, with `rotate_partitions`, and with django-postgres-extra's
`pgpartition` (its manager's plan and apply, which is what the command calls).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import django
import psycopg
from django.conf import settings

from django_scaledb.testing import Cluster, Node


@dataclass
class Felt:
    """Latencies of one kind of statement, in milliseconds."""

    name: str
    milliseconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        worst, median = max(self.milliseconds), statistics.median(self.milliseconds)
        return f"{self.name} worst {worst:8.1f} ms, median {median:5.2f} ms, n={len(self.milliseconds)}"


def client(node: Node, felt: Felt, statement: str, stop: threading.Event) -> None:
    with node.connect() as connection:
        while not stop.is_set():
            begun = time.perf_counter()
            connection.execute(statement)
            felt.milliseconds.append((time.perf_counter() - begun) * 1000)
            time.sleep(0.002)


def under_load(node: Node, table: str, hold: float, tool: Callable[[], object]) -> list[Felt]:
    """Run `tool` one second after the long transactions have begun; they last for `hold` seconds."""
    stop = threading.Event()
    read, write = Felt("SELECT"), Felt("INSERT")
    statements = {
        "SELECT": f"SELECT count(*) FROM {table} WHERE happened_at >= now() - interval '1 hour'",
        "INSERT": f"INSERT INTO {table} (account_id, happened_at) VALUES (1, now())",
    }
    threads = [
        threading.Thread(target=client, args=(node, felt, statements[felt.name], stop))
        for felt in (read, write)
    ]
    with ExitStack() as stack:
        reader, updater = (stack.enter_context(psycopg.connect(node.dsn)) for _ in range(2))
        reader.execute(f"SELECT count(*) FROM {table}")
        updater.execute("UPDATE account SET name = name WHERE id = 2")
        for thread in threads:
            thread.start()
        time.sleep(1)
        runner = threading.Thread(target=tool)
        begun = time.monotonic()
        runner.start()
        time.sleep(max(hold - 1, 0))
        reader.rollback()
        updater.rollback()
        runner.join()
        took = time.monotonic() - begun
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
    print(f"       the tool was done after {took:.1f} s", flush=True)
    return [read, write]


def nothing() -> None:
    time.sleep(0.5)


def configure(node: Node) -> None:
    settings.configure(
        INSTALLED_APPS=["psqlextra", "django_scaledb"],
        DATABASES={"default": node.django_settings()},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        LOGGING_CONFIG=None,
    )
    logging.disable(logging.WARNING)
    django.setup()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hold", type=float, default=6, help="seconds that the long transactions last")
    hold = parser.parse_args().hold
    with Cluster(standbys=0) as cluster:
        configure(cluster.primary)
        run(cluster.primary, hold)


def run(node: Node, hold: float) -> None:
    from dateutil.relativedelta import relativedelta
    from django.db import connection, connections, models
    from psqlextra.models import PostgresPartitionedModel
    from psqlextra.partitioning import (
        PostgresCurrentTimePartitioningStrategy,
        PostgresPartitioningManager,
        PostgresTimePartitionSize,
    )
    from psqlextra.partitioning.config import PostgresPartitioningConfig
    from psqlextra.partitioning.constants import AUTO_PARTITIONED_COMMENT
    from psqlextra.types import PostgresPartitioningMethod

    from django_scaledb.models import PartitionedModel
    from django_scaledb.partitions.maintenance import create_span, rotate

    class Account(models.Model):
        name = models.TextField()

        class Meta:
            app_label, db_table = "bench", "account"

    class Ours(PartitionedModel):
        account = models.ForeignKey(Account, models.CASCADE)
        happened_at = models.DateTimeField()

        class Meta:
            app_label, db_table = "bench", "ours"

        class PartitioningMeta:
            key = ["happened_at"]
            interval = "1 month"
            premake = 2
            retention = "2 months"
            retention_action = "drop"

    class Theirs(PostgresPartitionedModel):
        account = models.ForeignKey(Account, models.CASCADE)
        happened_at = models.DateTimeField()

        class Meta:
            app_label, db_table = "bench", "theirs"

        class PartitioningMeta:
            method = PostgresPartitioningMethod.RANGE
            key = ["happened_at"]

    this_month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)

    def their_manager(count: int) -> PostgresPartitioningManager:
        size = PostgresTimePartitionSize(months=1)
        strategy = PostgresCurrentTimePartitioningStrategy(
            size=size, count=count, max_age=relativedelta(months=2)
        )
        return PostgresPartitioningManager([PostgresPartitioningConfig(model=Theirs, strategy=strategy)])

    with connection.schema_editor() as editor:
        editor.create_model(Account)
        editor.create_model(Ours)
        editor.create_partitioned_model(Theirs)
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO account (id, name) VALUES (1, 'one'), (2, 'two')")
    their_manager(3).plan().apply()
    for table in ("ours", "theirs"):
        with connection.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {table} (account_id, happened_at) "
                "SELECT 1, now() FROM generate_series(1, 20000)"
            )

    def ours(later: timedelta) -> Callable[[], None]:
        def tool() -> None:
            try:
                report = rotate([Ours], now=datetime.now(UTC) + later)
                assert report.ok, report
            finally:
                connections.close_all()

        return tool

    def theirs(count: int) -> Callable[[], None]:
        def tool() -> None:
            try:
                their_manager(count).plan().apply()
            finally:
                connections.close_all()

        return tool

    def age() -> None:
        """Give either table a partition that its retention of two months has to remove."""
        create_span([Ours], this_month - relativedelta(months=4), this_month - relativedelta(months=3))
        old = this_month - relativedelta(months=2)
        with connection.schema_editor() as editor:
            editor.add_range_partition(
                Theirs,
                old.strftime("%Y_%b").lower(),
                old,
                old + relativedelta(months=1),
                comment=AUTO_PARTITIONED_COMMENT,
            )

    print(f"long transactions for {hold:g} s; {this_month:%Y-%m} is the current month\n")
    for title, table, tool in (
        ("no tool", "ours", nothing),
        ("create: rotate_partitions", "ours", ours(timedelta(days=32))),
        ("create: pgpartition", "theirs", theirs(4)),
        ("retire: rotate_partitions", "ours", ours(timedelta(0))),
        ("retire: pgpartition", "theirs", theirs(4)),
    ):
        print(title)
        if title == "retire: rotate_partitions":
            age()
        for felt in under_load(node, table, hold, tool):
            print("      ", felt, flush=True)


if __name__ == "__main__":
    main()
