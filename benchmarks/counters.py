"""What counting costs: our two mechanisms beside the usual ones, in one run, as ratios to no counter.

    python benchmarks/counters.py [--rows 200000] [--rounds 5] [--writers 8] [--json FILE]

Arms: no counter; receivers of post_save and post_delete with F() + 1; django-computedfields; a row
trigger by django-pgtrigger; ours by signals; ours by trigger. Packages that are not installed are left
out. Arms take turns within each round, so that a busy machine slows all of them; the figure is the
median over rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

from django_scaledb.testing import Cluster

HAS_COMPUTED = find_spec("computedfields") is not None
HAS_PGTRIGGER = find_spec("pgtrigger") is not None
BULK = 10_000
FEW = 2


def configure(cluster: Cluster) -> None:
    import django
    from django.conf import settings

    settings.configure(
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        DATABASES={"default": cluster.primary.django_settings("django_scaledb.backend")},
        INSTALLED_APPS=[
            "django.contrib.contenttypes",
            *(["computedfields"] if HAS_COMPUTED else []),
            *(["pgtrigger"] if HAS_PGTRIGGER else []),
            "django_scaledb",
            "benchmarks.countersapp",
        ],
        SILENCED_SYSTEM_CHECKS=["*"],
        SECRET_KEY="benchmark",
    )
    django.setup()


def make_tables(rows: int, projects: int) -> None:
    from django.db import connection

    from benchmarks.countersapp import models as m
    from django_scaledb.counters import rebuild
    from django_scaledb.counters.registry import counters, definition
    from django_scaledb.counters.triggers import install

    with connection.schema_editor() as editor:
        for arm in m.ARMS.values():
            editor.create_model(arm.project)
            editor.create_model(arm.upload)
        for counter in counters():
            editor.create_model(counter)
            if counter._counter_meta.mechanism == "trigger":
                for statement in install(definition(counter, connection)):
                    editor.execute(statement, params=None)
    with connection.cursor() as cursor:
        for arm in m.ARMS.values():
            project, upload = arm.project._meta.db_table, arm.upload._meta.db_table
            arm.project.objects.bulk_create(arm.project(name=str(i)) for i in range(projects))
            # A row trigger would update each parent a thousand times in one transaction: minutes.
            cursor.execute(f"ALTER TABLE {upload} DISABLE TRIGGER USER")
            cursor.execute(
                f"INSERT INTO {upload} (project_id, size, name) SELECT 1 + mod(g, "
                f"{projects}), g, 'file ' || g "
                f"FROM generate_series(1, {rows}) g"
            )
            cursor.execute(f"ALTER TABLE {upload} ENABLE TRIGGER USER")
            cursor.execute(f"ANALYZE {project}, {upload}")
    if HAS_PGTRIGGER:
        import pgtrigger

        pgtrigger.install()
    for counter in counters():
        rebuild.rebuild(counter, "default")


# -- what is measured: each takes an arm and returns seconds


def single_inserts(arm, number: int = 200) -> float:
    projects = list(arm.project.objects.order_by("pk")[:20])
    begun = time.perf_counter()
    for i in range(number):
        arm.upload.objects.create(project=projects[i % 20], size=i, name="single")
    taken = time.perf_counter() - begun
    arm.upload.objects.filter(name="single")._raw_delete("default") if arm.is_ours else clean(arm, "single")
    return taken / number


def bulk_create(arm) -> float:
    projects = list(arm.project.objects.order_by("pk")[:200])
    rows = [arm.upload(project=projects[i % 200], size=i, name="bulk") for i in range(BULK)]
    begun = time.perf_counter()
    arm.upload.objects.bulk_create(rows)
    return time.perf_counter() - begun


def update_moving(arm) -> float:
    target = arm.project.objects.order_by("pk")[7]
    queryset = arm.upload.objects.filter(name="bulk")
    begun = time.perf_counter()
    if arm.name == "django-computedfields":
        from computedfields.models import update_dependent
        from computedfields.resolver import active_resolver

        old = active_resolver.preupdate_dependent(queryset)
        queryset.update(project=target)
        update_dependent(arm.upload.objects.filter(name="bulk"), old=old)
    else:
        queryset.update(project=target)
    return time.perf_counter() - begun


def delete(arm) -> float:
    begun = time.perf_counter()
    arm.upload.objects.filter(name="bulk").delete()
    return time.perf_counter() - begun


def clean(arm, name: str) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {arm.upload._meta.db_table} WHERE name = %s", [name])


def _writer(arm_name: str, key: int, seconds: float, gate, results) -> None:
    from django.db import connection, transaction

    from benchmarks.countersapp import models as m

    arm = m.ARMS[arm_name]
    connection.close()
    connection.ensure_connection()
    project = arm.project.objects.order_by("pk")[key]
    done, deadlocks = 0, 0
    gate.wait()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        try:
            with transaction.atomic():
                arm.upload.objects.create(project=project, size=1, name="hot")
                time.sleep(0.005)
            done += 1
        except Exception:
            deadlocks += 1
    results.put((done, deadlocks))
    connection.close()


def throughput(arm, writers: int, seconds: float, *, spread: bool = False) -> tuple[float, int]:
    """Transactions per second of `writers` processes that insert below one parent and work 5 ms on.

    With `spread` each has a parent of its own: the same work, and nobody to wait for.
    """
    from django.db import connection

    connection.close()
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(writers), context.SimpleQueue()
    processes = [
        context.Process(target=_writer, args=(arm.name, i if spread else 0, seconds, gate, results))
        for i in range(writers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    clean(arm, "hot")
    return sum(done for done, _ in found) / seconds, sum(errors for _, errors in found)


def read_times(rows: int) -> dict[str, float]:
    """Milliseconds for COUNT(*) over `rows` rows of one key, and for the row read instead."""
    from django.db import connection

    from benchmarks.countersapp import models as m

    arm = m.ARMS["scaledb signals"]
    one = arm.project.objects.create(name="large")
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {arm.upload._meta.db_table} (project_id, size, name) "
            f"SELECT {one.pk}, g, 'large' FROM generate_series(1, {rows}) g"
        )
        cursor.execute(f"VACUUM ANALYZE {arm.upload._meta.db_table}")
    from django_scaledb.counters import rebuild

    begun = time.perf_counter()
    rebuild.rebuild(m.SignalsUploads, "default")
    rebuilt = time.perf_counter() - begun

    def median(read: Callable[[], object], times: int) -> float:
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            assert read() == rows
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken) * 1000

    return {
        "rows": rows,
        "count_ms": median(lambda: arm.upload.objects.filter(project=one).count(), 5),
        "row_ms": median(lambda: m.SignalsUploads.objects.for_key(project=one).total, 50),
        "rebuild_ms": rebuilt * 1000,
    }


def _stalled(arm_name: str, key: int, gate, stop, results) -> None:
    from django.db import connection

    from benchmarks.countersapp import models as m

    arm = m.ARMS[arm_name]
    connection.close()
    connection.ensure_connection()
    project = arm.project.objects.order_by("pk")[key]
    longest = 0.0
    gate.wait()
    while not stop.is_set():
        begun = time.perf_counter()
        arm.upload.objects.create(project=project, size=1, name="hot")
        longest = max(longest, time.perf_counter() - begun)
    results.put(longest)
    connection.close()


def longest_stall(arm, counter, writers: int, *, repairing: bool) -> tuple[float, float]:
    """The longest single write while a counter whose keys are all wrong is rebuilt, and how long that took.

    Without `repairing` for half a second of nothing: what the machine does to a write by itself.
    """
    from django.db import connection
    from django.db.models import F

    from django_scaledb.counters import rebuild

    counter.objects.update(total=F("total") + 7)
    connection.close()
    context = multiprocessing.get_context("fork")
    gate, stop, results = context.Barrier(writers + 1), context.Event(), context.SimpleQueue()
    processes = [
        context.Process(target=_stalled, args=(arm.name, i, gate, stop, results)) for i in range(writers)
    ]
    for process in processes:
        process.start()
    gate.wait()
    time.sleep(0.1)
    begun = time.perf_counter()
    if repairing:
        assert rebuild.rebuild(counter, "default") > 0
    else:
        time.sleep(0.5)
    taken = time.perf_counter() - begun
    stop.set()
    longest = max(results.get() for _ in processes)
    for process in processes:
        process.join()
    rebuild.rebuild(counter, "default")
    assert rebuild.check(counter, "default").ok
    return longest, taken


def report_stalls(writers: int) -> None:
    from benchmarks.countersapp import models as m

    for name, counter in (("scaledb signals", m.SignalsUploads), ("scaledb trigger", m.TriggerUploads)):
        alone, _ = longest_stall(m.ARMS[name], counter, writers, repairing=False)
        stall, taken = longest_stall(m.ARMS[name], counter, writers, repairing=True)
        print(
            f"{name}: longest write of {writers} writers {stall * 1000:.1f} ms during a rebuild of "
            f"{taken * 1000:.0f} ms, {alone * 1000:.1f} ms without one",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--projects", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="per arm and round of the throughput")
    parser.add_argument(
        "--throughput-rounds", type=int, help="rounds of the throughput (default: half the others)"
    )
    parser.add_argument("--throughput-only", action="store_true", help="leave out everything else")
    parser.add_argument("--stalls-only", action="store_true", help="only the writers beside a rebuild")
    parser.add_argument("--read-rows", type=int, default=1_000_000)
    parser.add_argument("--only", action="append", help="measure only these arms, beside no counter")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with Cluster(
        standbys=0, settings={"shared_buffers": "256MB", "max_wal_size": "4GB", "autovacuum": False}
    ) as cluster:
        configure(cluster)
        from benchmarks.countersapp.models import ARMS

        make_tables(options.rows, options.projects)
        arms = [
            arm
            for name, arm in ARMS.items()
            if not options.only or name in options.only or name == "no counter"
        ]
        print(f"{cluster.postgres}, {options.rows} rows, {options.rounds} rounds", flush=True)
        report_stalls(4)
        if options.stalls_only:
            return 0
        measures: dict[str, dict[str, list[float]]] = {}
        for measure in (single_inserts, bulk_create, update_moving, delete):
            measures[measure.__name__] = {arm.name: [] for arm in arms}
        for number in range(0 if options.throughput_only else options.rounds + 1):
            for measure in (single_inserts, bulk_create, update_moving, delete):
                for arm in arms:
                    if measure is delete and arm.name == "django-computedfields":
                        clean(arm, "bulk")  # it takes half a minute (see the facts in the docs)
                        continue
                    taken = measure(arm)
                    if options.verbose:
                        print(f"{number} {measure.__name__} {arm.name}: {taken * 1000:.1f} ms", flush=True)
                    if number:  # the first round warms up
                        measures[measure.__name__][arm.name].append(taken)
        deadlocks = dict.fromkeys((arm.name for arm in arms), 0)
        # Where the writers alone keep all cores busy, a counter costs what it computes; with few it
        # shows how long they wait for each other.
        together = {
            "own keys": options.writers,
            "one key": options.writers,
            f"one key, {FEW}": FEW,
        }
        for name in together:
            measures[name] = {arm.name: [] for arm in arms}
        for number in range(options.throughput_rounds or max(1, options.rounds // 2)):
            # Every other round the other way round: who comes last is at no disadvantage.
            for arm in arms if number % 2 else reversed(arms):
                for name, writers in together.items():
                    per_second, errors = throughput(arm, writers, options.seconds, spread=name == "own keys")
                    if options.verbose:
                        print(f"{number} {arm.name}, {name}: {per_second:.0f} transactions/s", flush=True)
                    measures[name][arm.name].append(per_second)
                    deadlocks[arm.name] += errors
        reads = None if options.throughput_only else read_times(options.read_rows)
    report(arms, measures, deadlocks, reads)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"measures": measures, "errors": deadlocks, "reads": reads}, file, indent=2)
    return 0


def median_ratio(values: list[float], base: list[float]) -> str:
    if not values:
        return f"{'-':>16}"
    return f"{statistics.median(a / b for a, b in zip(values, base, strict=True)):16.2f}"


def report(arms, measures, deadlocks, reads) -> None:
    """Columns with keys are throughput, more is better; the last one by itself is what waiting costs."""
    base = {name: values["no counter"] for name, values in measures.items()}
    heads = [*measures, "one / own"]
    print(f"\n{'ratio to no counter':26}" + "".join(f"{name:>16}" for name in heads) + f"{'errors':>8}")
    for arm in arms:
        cells = [median_ratio(measures[name][arm.name], base[name]) for name in measures]
        cells.append(median_ratio(measures["one key"][arm.name], measures["own keys"][arm.name]))
        print(f"{arm.name:26}" + "".join(cells) + f"{deadlocks[arm.name]:8}")
    times = [name for name in measures if "key" not in name]
    rates = [name for name in measures if "key" in name]
    print(
        f"{'no counter, ms and tps':26}"
        + "".join(f"{statistics.median(base[n] or [0]) * 1000:16.2f}" for n in times)
        + "".join(f"{statistics.median(base[n]):16.0f}" for n in rates)
    )
    if reads is None:
        return
    print(
        f"\n{reads['rows']} rows: COUNT(*) {reads['count_ms']:.1f} ms, counter row {reads['row_ms']:.2f} ms "
        f"({reads['count_ms'] / reads['row_ms']:.0f} x); first back-fill {reads['rebuild_ms']:.0f} ms"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
    sys.exit(main())
