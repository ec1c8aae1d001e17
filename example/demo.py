"""Partitioned tables at work: a real upload history, on a primary with a streaming standby.

Starts its own PostgreSQL servers, tells what it does and why, and removes them again. Needs no
server, no settings and no privileges. ``--keep`` leaves the servers up to look around.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import fill

import django
import psycopg
from django.core.management import call_command

from django_scaledb.testing import Cluster

WIDTH = 100
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the servers up until Ctrl-C")
    options = parser.parse_args()
    logging.getLogger("django_scaledb").addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers go, too
    began = time.monotonic()
    try:
        with start_servers() as cluster:
            for section in (
                make_tables,
                make_partitions,
                load,
                show_partition_set,
                ask_twice,
                count_without_counting,
                read_from_standby,
                read_own_writes,
                lose_the_replica,
                rotate,
                retire,
                insert_without_partition,
            ):
                section(cluster)
            if options.keep:
                keep(cluster)
            heading("Cleaning up")
        say("Both servers are stopped and their files removed.")
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped and their files removed.")
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"\nThe demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    say(f"The whole demo took {time.monotonic() - began:.0f} s.")
    return 0


# The sections, in order -----------------------------------------------------------------------


@contextmanager
def start_servers() -> Iterator[Cluster]:
    heading("Two PostgreSQL servers")
    began = time.monotonic()
    with Cluster(standbys=1) as cluster:
        os.environ["DJANGO_SETTINGS_MODULE"] = "pypi_mirror.settings"
        os.environ.update(connection_variables(cluster))
        django.setup()
        version = cluster.primary.execute("SHOW server_version")[0][0]
        say(
            f"PostgreSQL {version}: a primary, and a standby that follows it by streaming replication, up in "
            f"{time.monotonic() - began:.1f} s. Django knows them as the databases default and replica1."
        )
        yield cluster


def make_tables(cluster: Cluster) -> None:
    heading("A model becomes a partitioned table")
    say(
        "pypi.Upload is a file in a package index. It is a PartitionedModel: uploaded_at is its key, a "
        "partition holds one year, two years are made ahead, and after seven years a partition leaves the "
        "table. The migration is an ordinary one."
    )
    manage("migrate", verbosity=0)
    key, primary_key = query(
        "SELECT pg_get_partkeydef('pypi_upload'::regclass), pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = 'pypi_upload'::regclass AND contype = 'p'"
    )[0]
    show(f"pypi_upload: PARTITION BY {key}, {primary_key}")
    say(
        "For Django the primary key is id alone, so the admin and foreign keys work as ever. "
        f"The migration has made {', '.join(attached())}: an insert works at once."
    )


def make_partitions(cluster: Cluster) -> None:
    heading("Partitions for the past")
    say("The history begins in 2005, so it needs partitions for the years since then. Once, by hand:")
    manage("create_partitions", "--from", "2005-01-01", "--to", "2026-12-31", lines=3)


def load(cluster: Cluster) -> None:
    heading("152,580 real rows")
    say(
        "The files that 202 projects uploaded to the Python package index from 2005 to 2026. The rows go "
        "into pypi_upload like into any table; PostgreSQL sends each one to its year."
    )
    began = time.monotonic()
    manage("load_uploads")
    say(f"That took {time.monotonic() - began:.1f} s.")


def show_partition_set(cluster: Cluster) -> None:
    heading("The partition set")
    manage("show_partitions")


def ask_twice(cluster: Cluster) -> None:
    from django.db.models import Count
    from django.db.models.functions import TruncMonth

    from pypi.models import Upload

    heading("The same question, asked twice")
    say("How many files were uploaded in each month of 2019? First with a condition on the key itself:")
    by_month = Upload.objects.annotate(month=TruncMonth("uploaded_at")).values("month")
    by_month = by_month.annotate(files=Count("*")).order_by("month")
    pruned = by_month.filter(uploaded_at__year=2019)
    show(".filter(uploaded_at__year=2019)")
    pruned_tables, pruned_ms = explain(pruned)
    say("Then with a condition on the key's date, which PostgreSQL cannot match to the partitions' bounds:")
    unpruned = by_month.filter(uploaded_at__date__range=(date(2019, 1, 1), date(2019, 12, 31)))
    show(".filter(uploaded_at__date__range=(date(2019, 1, 1), date(2019, 12, 31)))")
    unpruned_tables, unpruned_ms = explain(unpruned)
    if list(pruned) != list(unpruned):
        raise AssertionError("the two questions were answered differently")
    busiest = max(pruned, key=lambda row: row["files"])
    say(
        f"The answer is the same (the busiest month was {busiest['month']:%B}, with {busiest['files']:,} "
        f"files). The first way reads {pruned_tables} partition in {pruned_ms:.1f} ms, the second "
        f"{unpruned_tables} in {unpruned_ms:.1f} ms: {unpruned_ms / pruned_ms:.0f} times as long. The first "
        "way's price stays that of one year, however many years there are; the second one's grows with the "
        "table."
    )


def count_without_counting(cluster: Cluster) -> None:
    import counters_demo

    heading("Counts that are read, not counted")
    counters_demo.show_counters(say, show)


def read_from_standby(cluster: Cluster) -> None:
    from pypi.models import Upload

    heading("The standby has it all")
    say("Partitions are tables, and replicate like all tables, with nothing to set up:")
    began = time.monotonic()
    cluster.wait_for_catchup()
    waited = time.monotonic() - began
    counts = {alias: Upload.objects.using(alias).count() for alias in ("default", "replica1")}
    for alias, count in counts.items():
        show(f'Upload.objects.using("{alias}").count()  ->  {count:,}')
    if len(set(counts.values())) != 1:
        raise AssertionError("the standby has other rows than the primary")
    say(
        f"Equal, after waiting {waited * 1000:.0f} ms for the standby to replay what the primary had written."
    )


def read_own_writes(cluster: Cluster) -> None:
    import replicas_demo
    from pypi.models import Project

    heading("Read your own writes")
    say(
        "DATABASE_ROUTERS has the ReplicaRouter, so reads go to the standby. It is made to lag two seconds "
        "behind now. Whoever has written reads from it only once it has replayed what was written:"
    )
    make = partial(Project.objects.create, name="new")
    if not replicas_demo.read_your_writes(cluster, Project, make, show_text):
        raise AssertionError("a read was stale")
    say("A reader who has written nothing is served by the standby all the time.")


def lose_the_replica(cluster: Cluster) -> None:
    import replicas_demo
    from pypi.models import Project

    heading("The replica dies while a loop reads")
    log = LogLines()
    logging.getLogger("django_scaledb.routing").addHandler(log)
    try:
        reads = replicas_demo.lose_a_replica(cluster, Project, show_text)
    finally:
        logging.getLogger("django_scaledb.routing").removeHandler(log)
    if reads.failures:
        raise AssertionError(f"{len(reads.failures)} reads failed: {reads.failures[0]}")
    say(
        "No read failed: the ones that were under way were run again on the primary, the next ones went "
        "there at once, and when the replica was well it was used again."
    )
    Project.objects.filter(name="new").delete()


def rotate(cluster: Cluster) -> None:
    heading("A year later: rotation")
    later = f"{a_year_from_now():%Y-%m-%d}"
    say(
        f"rotate_partitions is what cron runs. With the clock at {later} it finds that fewer than two years "
        "are made ahead. What it would do, each statement with the strongest lock on each table:"
    )
    manage("rotate_partitions", "--no-retention", "--now", later, "--dry-run")
    say(
        "No lock on pypi_upload here stops a SELECT, INSERT, UPDATE or DELETE. The one on pypi_project, the "
        "foreign key's target, stops writes to that table while it is held, which is milliseconds; it is "
        "asked for with NOWAIT, so that nobody ever queues behind a request for it. To see it: one client "
        "now keeps a transaction open in which it has read the table, a second one reads and updates rows "
        "all the time, and the rotation runs."
    )
    with bystanders(cluster, open_transaction=True) as latencies:
        manage("rotate_partitions", "--no-retention", "--now", later)
    say(
        f"The second client had {len(latencies)} answers meanwhile, the slowest after "
        f"{slowest(latencies)}. A plain CREATE TABLE .. PARTITION OF waits for the open transaction, and "
        "every other client behind it."
    )


def retire(cluster: Cluster) -> None:
    from pypi.models import Upload

    heading("A year later: retention")
    later = f"{a_year_from_now():%Y-%m-%d}"
    say("The same command applies retention: partitions whose last day is more than seven years ago.")
    before, were_attached = Upload.objects.count(), attached()
    manage("rotate_partitions", "--now", later, "--dry-run", lines=26)
    with bystanders(cluster) as latencies:
        manage("rotate_partitions", "--now", later)
    detached = sorted(set(were_attached) - set(attached()))
    after = Upload.objects.count()
    rows = sum(query(f'SELECT count(*) FROM "{name}"')[0][0] for name in detached)
    if not detached or before - after != rows:
        raise AssertionError(f"{before - after} rows left the table and {rows} are in {detached}")
    say(
        f"{len(detached)} partitions are detached. The table went from {before:,} to {after:,} rows without "
        "one DELETE, so there is nothing to vacuum, and the second client's slowest answer took "
        f"{slowest(latencies)}. Nothing is lost: {detached[0]} to {detached[-1]} are ordinary tables now, "
        f"still with their {rows:,} rows. To have them dropped, a model says "
        'retention_action = "drop"; that happens days later, in a later run.'
    )
    say("The counter followed, in the transaction that marked each partition as detached:")
    manage("check_counters")


def insert_without_partition(cluster: Cluster) -> None:
    from django.db import IntegrityError

    from pypi.models import Project, Upload

    heading("When a partition is missing")
    say("No default partition swallows rows that fit nowhere. An insert dated 1999 says what is wrong:")
    try:
        Upload.objects.create(
            project=Project.objects.get(name="django"),
            version="0.1",
            filename="django-0.1.tar.gz",
            packagetype="sdist",
            python_version="source",
            size=1,
            uploaded_at=datetime(1999, 12, 31, tzinfo=UTC),
        )
    except IntegrityError as error:
        show(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError("the row of 1999 was taken")
    say("It is an IntegrityError to code that knows nothing of partitions.")


def keep(cluster: Cluster) -> None:
    heading("The servers stay up until you press Ctrl-C")
    for name, dsn in connection_variables(cluster).items():
        print(f"    export {name}={shlex.quote(dsn)}")
    print(f"    {shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'manage.py'))} show_partitions")
    print('    psql "$PYPI_MIRROR_PRIMARY"')
    sys.stdout.flush()
    while True:
        signal.pause()


# What they stand on ---------------------------------------------------------------------------


def connection_variables(cluster: Cluster) -> dict[str, str]:
    return {"PYPI_MIRROR_PRIMARY": cluster.primary.dsn, "PYPI_MIRROR_REPLICA": cluster.standbys[0].dsn}


def a_year_from_now() -> datetime:
    now = datetime.now(UTC).replace(microsecond=0)
    return now.replace(year=now.year + 1, day=min(now.day, 28))


def query(sql: str) -> list[tuple]:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def attached() -> list[str]:
    """Names of the partitions, oldest first."""
    return [
        row[0]
        for row in query(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'pypi_upload'::regclass ORDER BY 1"
        )
    ]


def manage(command: str, *arguments: str, lines: int | None = None, **options: object) -> None:
    """Run a management command and show it with what it prints; of long output the first `lines`."""
    show(f"$ manage.py {shlex.join((command, *arguments))}")
    output, errors = StringIO(), StringIO()
    try:
        # Not the terminal: there, many partitions at once are a progress bar instead of a line each.
        call_command(command, *arguments, stdout=output, stderr=errors, no_color=True, **options)
    except SystemExit as end:
        raise RuntimeError(f"manage.py {command} ended with exit code {end.code}") from None
    finally:
        printed = output.getvalue().rstrip().splitlines()
        show(*printed[:lines])
        if lines is not None and len(printed) > lines:
            show(f".. and {len(printed) - lines} lines more like these")
        show(*errors.getvalue().splitlines())


def explain(queryset) -> tuple[int, float]:
    """Show the plan's nodes; how many partitions it reads, and the best time of five in ms."""
    plan = queryset.explain(analyze=True, costs=False, timing=False, summary=False).splitlines()
    nodes = [line for line in plan if "(actual " in line]
    scans = [line for line in nodes if re.search(r"Scan.* on pypi_upload", line)]
    show(*(node for node in nodes if node not in scans[2:]))
    if len(scans) > 2:
        show(f".. and {len(scans) - 2} scans more, one for each partition")
    best = min(timed(lambda: list(queryset.all())) for _ in range(5))
    return len(scans), best * 1000


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def bystanders(cluster: Cluster, *, open_transaction: bool = False) -> Iterator[list[float]]:
    """A client that reads and updates the table all the time, and how long it waited for each answer.

    With `open_transaction` there is another one, idle in a transaction that has read the table.
    """
    latencies: list[float] = []
    stop = threading.Event()

    def work(connection: psycopg.Connection) -> None:
        row = "id, uploaded_at FROM pypi_upload WHERE uploaded_at >= '2026-06-01' ORDER BY id LIMIT 1"
        key = connection.execute(f"SELECT {row}").fetchone()
        while not stop.is_set():
            for statement in ("SELECT * FROM pypi_upload", "UPDATE pypi_upload SET yanked = yanked"):
                statement += " WHERE id = %s AND uploaded_at = %s"
                latencies.append(timed(lambda sql=statement: connection.execute(sql, key)))

    with cluster.primary.connect(autocommit=False) as idle, cluster.primary.connect() as busy:
        if open_transaction:
            idle.execute("SELECT count(*) FROM pypi_upload")
        worker = threading.Thread(target=work, args=(busy,))
        worker.start()
        try:
            time.sleep(0.2)
            yield latencies
            time.sleep(0.2)
        finally:
            stop.set()
            worker.join()


def slowest(latencies: list[float]) -> str:
    return f"{max(latencies) * 1000:.0f} ms"


_headings = iter(range(1, 100))


def heading(text: str) -> None:
    print(f"\n{next(_headings)}. {text}\n", flush=True)


def say(text: str) -> None:
    """What we say."""
    print(fill(text, WIDTH), flush=True)


class LogLines(logging.Handler):
    """What the package logs, among what the demo shows."""

    def emit(self, record: logging.LogRecord) -> None:
        show(f"log: {record.getMessage().splitlines()[0]}")


def show_text(text: str) -> None:
    show(*text.splitlines())


def show(*lines: str) -> None:
    """What a program said, set apart; long lines are continued, deeper."""
    for line in lines:
        margin = " " * (4 + len(line) - len(line.lstrip()))
        wrapped = fill(
            line.strip(),
            WIDTH + 20,
            initial_indent=margin,
            subsequent_indent=margin + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        print(wrapped, flush=True)


if __name__ == "__main__":
    sys.exit(main())
