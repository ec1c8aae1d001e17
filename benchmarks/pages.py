"""What a deep page costs: by OFFSET with a COUNT, by OFFSET alone, and by position.

A table of monthly partitions with an index on (at, id); the first page, one in the middle and one
near the end, newest rows first. Printed is the median of several runs, Django's part included.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import django
from django.conf import settings

from django_scaledb.testing import Cluster

MONTHS = 60
PER_PAGE = 50


def milliseconds(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        found.append((time.perf_counter() - begun) * 1000)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    with Cluster(standbys=0) as cluster:
        settings.configure(
            INSTALLED_APPS=["psqlextra", "django_scaledb"],
            DATABASES={"default": cluster.primary.django_settings()},
            SECRET_KEY="benchmark",
            USE_TZ=True,
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            LOGGING_CONFIG=None,
        )
        logging.disable(logging.WARNING)
        django.setup()
        compare(options.rows, options.times)


def compare(rows: int, times: int) -> None:
    from django.core.paginator import Paginator
    from django.db import connection, models

    from django_scaledb.models import PartitionedModel
    from django_scaledb.partitions.paginator import KeysetPaginator, Position

    class Entry(PartitionedModel):
        at = models.DateTimeField()

        class Meta:
            app_label = "pages"
            indexes = [models.Index(fields=["at", "id"], name="entry_by_time")]

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"

    now = datetime.now(UTC)
    first = now.year * 12 + now.month - MONTHS
    with connection.schema_editor() as editor:
        editor.create_model(Entry)
    with connection.cursor() as cursor:
        for month in range(first, first + MONTHS + 1):
            lower, upper = (datetime(m // 12, m % 12 + 1, 1, tzinfo=UTC) for m in (month, month + 1))
            cursor.execute(
                f"CREATE TABLE IF NOT EXISTS entry_{month} PARTITION OF pages_entry "
                f"FOR VALUES FROM ('{lower}') TO ('{upper}')"
                if month < now.year * 12 + now.month - 1
                else "SELECT 1"
            )
        cursor.execute(
            "INSERT INTO pages_entry (at) SELECT %s::timestamptz - n * interval '1 minute' * %s "
            "FROM generate_series(1, %s) n",
            [now, (MONTHS - 2) * 30 * 24 * 60 / rows, rows],
        )
        cursor.execute("VACUUM ANALYZE pages_entry")
    newest = Entry.objects.order_by("-at", "-pk")
    print(f"{rows:,} rows in {MONTHS} monthly partitions, pages of {PER_PAGE}, median of {times} runs\n")
    print(f"{'page':>8}  {'OFFSET + COUNT':>15}  {'OFFSET':>10}  {'by position':>12}")
    keyset = KeysetPaginator(newest, PER_PAGE)
    last = rows // PER_PAGE
    for number in (1, last // 2, last - 1):
        begin = (number - 1) * PER_PAGE
        token = None
        if begin:
            before = newest[begin - 1]
            token = keyset._encode("next", Position(before.at, before.pk))
        expected = [entry.pk for entry in newest[begin : begin + PER_PAGE]]
        assert [entry.pk for entry in keyset.page(token)] == expected
        counted = milliseconds(lambda n=number: list(Paginator(newest, PER_PAGE).page(n)), times)
        offset = milliseconds(lambda b=begin: list(newest[b : b + PER_PAGE]), times)
        position = milliseconds(lambda t=token: list(keyset.page(t)), times)
        print(f"{number:>8,}  {counted:>12.1f} ms  {offset:>7.1f} ms  {position:>9.1f} ms", flush=True)


if __name__ == "__main__":
    main()
