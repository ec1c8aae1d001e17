"""How much memory and time it takes to archive a large partition, and to bring it back.

One partition of ``--rows`` rows (an order with numbers, a moment, a text and a document). Each direction
runs in a process of its own, as cron would start it, so that its peak memory is its alone. Printed: seconds,
rows a second, the greatest resident size of the process, and the sizes of table and file. With
``--at-most MB`` the exit code is 1 when a process needed more.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from django_scaledb.testing import Cluster

NOW = datetime(2026, 5, 17, 13, 7, 11, tzinfo=UTC)
TABLE = "bench_order_y2020"
FILL = """
    INSERT INTO bench_order (customer_id, total, paid, note, document, placed_at)
    SELECT i % 100000, i % 10000 / 100.0, i % 3 = 0, md5(i::text) || md5((i + 1)::text),
        CASE WHEN i % 5 > 0 THEN jsonb_build_object('items', i % 7, 'code', md5(i::text)) END,
        '2020-01-01'::timestamptz + i * interval '6 seconds'
    FROM generate_series(1, {rows}) i
"""


def setup(database: dict[str, Any], folder: str) -> Any:
    """Django on this database; the model."""
    settings.configure(
        INSTALLED_APPS=["django_scaledb"],
        DATABASES={"default": database},
        STORAGES={
            "archive": {
                "BACKEND": "django.core.files.storage.FileSystemStorage",
                "OPTIONS": {"location": folder},
            }
        },
        SCALEDB={"ARCHIVE_STORAGE": "archive"},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        LOGGING_CONFIG=None,
    )
    logging.disable(logging.WARNING)
    django.setup()
    from django.db import models

    from django_scaledb.models import PartitionedModel

    class Order(PartitionedModel):
        customer_id = models.BigIntegerField()
        total = models.DecimalField(max_digits=12, decimal_places=2)
        paid = models.BooleanField()
        note = models.TextField()
        document = models.JSONField(null=True)
        placed_at = models.DateTimeField()

        class Meta:
            app_label = "bench"

        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 year"
            retention = "5 years"
            retention_action = "archive"
            detached_for = "1 hour"

    return Order


def make(model: Any, rows: int) -> None:
    from django.core.management import call_command
    from django.db import connection

    from django_scaledb.partitions import maintenance

    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        editor.create_model(model)
    maintenance.create_span([model], NOW.replace(year=2020), NOW.replace(year=2020), now=NOW)
    maintenance.rotate([model], now=NOW, retire=False)
    with connection.cursor() as cursor:
        cursor.execute(FILL.format(rows=rows))
        cursor.execute(f"ANALYZE {TABLE}")


def archive(model: Any) -> None:
    from django_scaledb.partitions import maintenance

    report = maintenance.rotate([model], now=NOW)
    assert report.ok, list(report.failures())


def drop(model: Any) -> None:
    from django_scaledb.partitions import maintenance

    report = maintenance.rotate([model], now=NOW + timedelta(hours=2))
    assert report.ok, list(report.failures())


def restore(model: Any) -> None:
    from django_scaledb.partitions.archive.restore import Wish, restore

    report = restore(model, Wish(TABLE), now=NOW)
    assert report.ok, list(report.failures())


def work(way: str, database: dict[str, Any], folder: str) -> None:
    """What a child does; it prints seconds and its greatest resident size in bytes."""
    model = setup(database, folder)
    begun = time.monotonic()
    {"archive": archive, "drop": drop, "restore": restore}[way](model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(time.monotonic() - begun, peak)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--at-most", type=float, metavar="MB", help="fail when a process needs more memory")
    arguments = parser.parse_args()
    peaks = []
    with Cluster(standbys=0) as cluster, tempfile.TemporaryDirectory() as folder:
        database = {**cluster.primary.django_settings(), "ENGINE": "django_scaledb.backend"}
        model = setup(database, folder)
        make(model, arguments.rows)
        with cluster.primary.connect() as session:
            [(size,)] = session.execute(f"SELECT pg_total_relation_size('{TABLE}')").fetchall()
            [before] = session.execute(f"SELECT count(*), sum(hashtext(t::text)) FROM {TABLE} t").fetchall()
        print(f"{arguments.rows:,} rows, {size / 1e6:,.0f} MB with indexes\n")
        print(f"{'':10}{'seconds':>10}{'rows/s':>12}{'peak MB':>10}")
        for way in ("archive", "drop", "restore"):
            command = [sys.executable, __file__, "--child", way, repr(database), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
                return 1
            seconds, peak = map(float, done.stdout.split())
            peaks.append(peak / 1e6)
            print(f"{way:10}{seconds:10.1f}{arguments.rows / seconds:12,.0f}{peak / 1e6:10.0f}", flush=True)
        [path] = Path(folder).rglob("*.parquet")
        with cluster.primary.connect() as session:
            [after] = session.execute(f"SELECT count(*), sum(hashtext(t::text)) FROM {TABLE} t").fetchall()
        outcome = "the same" if after == before else "OTHERS"
        print(f"\nfile: {path.stat().st_size / 1e6:,.0f} MB; the rows are {outcome}")
    too_much = arguments.at_most is not None and max(peaks) > arguments.at_most
    return 1 if too_much or after != before else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        import ast

        work(sys.argv[2], ast.literal_eval(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
