"""What routing costs, beside django-multidb-router, django-replicated and the router of Django's docs.

Printed are nanoseconds per routing decision, microseconds that a write pays for its position, and the
share of reads that stay on the replica while somebody writes all the time. Everything is measured in
one run, in turns, so that a busy machine slows all of them down; compare the ratios.

The others must be importable: ``pip install django-multidb-router django-replicated``; those that are
not are left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import django
from django.conf import settings
from django.utils.module_loading import import_string

from django_scaledb.testing import Cluster


class RandomReplicaRouter:
    """The idea of the documentation's primary/replica router: any replica for any read."""

    replicas = ["replica1"]

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return random.choice(self.replicas)

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool | None:
        known = {"default", *self.replicas}
        return True if one._state.db in known and other._state.db in known else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return True


OTHERS = {
    "documentation": "__main__.RandomReplicaRouter",
    "multidb-router": "multidb.ReplicaRouter",
    "multidb-router pinning": "multidb.PinningReplicaRouter",
    "django-replicated": "django_replicated.router.ReplicationRouter",
}


def configure(cluster: Cluster) -> None:
    databases = cluster.django_databases(mirror=False, CONN_MAX_AGE=600)
    databases["django"] = {**databases["default"], "ENGINE": "django.db.backends.postgresql"}
    settings.configure(
        DATABASES=databases,
        INSTALLED_APPS=["django.contrib.contenttypes", "psqlextra", "django_scaledb"],
        DATABASE_ROUTERS=["django_scaledb.routing.ReplicaRouter"],
        SCALEDB={"PRIMARY": "default", "REPLICAS": ["replica1"]},
        REPLICA_DATABASES=["replica1"],
        REPLICATED_DATABASE_SLAVES=["replica1"],
        REPLICATED_DATABASE_DOWNTIME=60,
        REPLICATED_CHECK_STATE_ON_WRITE=True,
        REPLICATED_READ_ONLY_DOWNTIME=20,
        REPLICATED_READ_ONLY_TRIES=1,
        USE_TZ=True,
    )
    django.setup()


def in_turns(
    functions: dict[str, Callable[..., object]],
    *arguments: object,
    rounds: int,
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
    pick: Callable[[list[float]], float] = min,
) -> dict[str, float]:
    """Seconds per call of each: the best of `rounds` (the machine does other things), or what `pick` says."""
    call = f"f({', '.join(f'a{n}' for n in range(len(arguments)))})"
    names = {f"a{n}": value for n, value in enumerate(arguments)}
    timers = {n: timeit.Timer(call, timer=clock, globals={**names, "f": f}) for n, f in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.timeit(calls) / calls)
    return {name: pick(seconds) for name, seconds in found.items()}


def decisions(model: Any, rounds: int) -> None:
    from django.db import connections

    from django_scaledb.routing import ReplicaRouter

    ours = ReplicaRouter()
    routers: dict[str, Any] = {"django_scaledb": ours}
    for name, path in OTHERS.items():
        try:
            routers[name] = RandomReplicaRouter() if path.startswith("__main__") else import_string(path)()
        except Exception as error:
            print(f"  {name} is left out: {type(error).__name__}: {error}")
    functions = {name: router.db_for_read for name, router in routers.items()}
    # Processor time of this thread: decisions wait for nothing.
    timing: dict[str, Any] = {"rounds": rounds, "calls": 500, "clock": time.thread_time}

    def settled() -> None:
        while ours.db_for_read(model) != "replica1":
            time.sleep(0.01)

    def reading() -> dict[str, float]:
        settled()
        return in_turns(functions, model, **timing)

    def having_written() -> dict[str, float]:
        model.objects.create(app_label="bench", model="written")
        settled()
        return in_turns({"django_scaledb, after a write": ours.db_for_read}, model, **timing)

    # Each in a thread of its own, which has written nothing so far.
    found: dict[str, float] = {}
    for measure in (reading, having_written):
        with ThreadPoolExecutor(1) as thread:
            found |= thread.submit(measure).result()
            thread.submit(connections.close_all).result()
    base = found.get("multidb-router pinning")
    print("\nnanoseconds per decision")
    for name, seconds in found.items():
        ratio = f"   {seconds / base:5.2f} of multidb-router's pinning router" if base else ""
        print(f"  {name:<30} {seconds * 1e9:8.0f}{ratio}")


def writes(rounds: int) -> None:
    """The same statement through Django's own backend, through ours, and with a second round trip."""
    from django.db import connections, transaction

    def insert(alias: str) -> Callable[[], None]:
        connection = connections[alias]

        def run() -> None:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO bench (n) VALUES (1)")

        return run

    def in_transaction(alias: str) -> Callable[[], None]:
        statement = insert(alias)

        def run() -> None:
            with transaction.atomic(using=alias):
                statement()

        return run

    def read_only(alias: str) -> Callable[[], None]:
        connection = connections[alias]

        def run() -> None:
            with transaction.atomic(using=alias), connection.cursor() as cursor:
                cursor.execute("SELECT 1")

        return run

    def and_ask(function: Callable[[], None]) -> Callable[[], None]:
        connection = connections["django"]

        def run() -> None:
            function()
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_current_wal_insert_lsn()")

        return run

    def message(text: bytes) -> Callable[[], None]:
        connection = connections["default"]
        connection.ensure_connection()
        send = connection.connection.pgconn.exec_
        return lambda: send(text)

    statement = b"INSERT INTO bench (n) VALUES (1)"
    bare = {
        "statement": message(statement),
        "and position": message(b"BEGIN;" + statement + b";COMMIT;SELECT pg_current_wal_insert_lsn()"),
    }
    found = {}
    for name, make in (("autocommit", insert), ("transaction", in_transaction), ("only reading", read_only)):
        functions = {"Django": make("django"), "django_scaledb": make("default")}
        if make is not read_only:
            functions["Django, and asked"] = and_ask(make("django"))
        for function in functions.values():
            function()
        # Not the best of them: that two processes take turns is part of the price.
        found[name] = in_turns(functions, rounds=rounds * 20, calls=5, pick=statistics.median)
    found["libpq alone"] = in_turns(bare, rounds=rounds * 20, calls=5, pick=statistics.median)
    print("\nmicroseconds per write, in autocommit and in a transaction, and per transaction that only reads")
    for name, seconds in found.items():
        plain = next(iter(seconds.values()))
        for how, value in seconds.items():
            more = "" if value == plain else f"   {(value - plain) * 1e6:+6.1f}"
            print(f"  {name:<12} {how:<18} {value * 1e6:8.1f}{more}")


def share(model: Any, seconds: float) -> None:
    """One context writes ten times a second and reads all the time, another only reads."""
    from django.db import connections

    counts = {"writer": [0, 0], "reader": [0, 0]}
    stop = time.monotonic() + seconds

    def run(name: str, every: float) -> None:
        due = 0.0
        try:
            while (now := time.monotonic()) < stop:
                if every and now >= due:
                    due = now + every
                    model.objects.filter(model="written").update(app_label="bench")
                found = model.objects.filter(model="written").first()
                counts[name][found._state.db == "replica1"] += 1
                time.sleep(0.001)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=a) for a in (("writer", 0.1), ("reader", 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\nreads that stay on the replica while somebody writes ten times a second")
    for name, (primary, replica) in counts.items():
        print(f"  {name:<12} {replica / (primary + replica):7.1%} of {primary + replica}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    with Cluster(1) as cluster:
        configure(cluster)
        from django.contrib.contenttypes.models import ContentType
        from django.core.management import call_command
        from django.db import connection, connections

        call_command("migrate", verbosity=0)
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE bench (n int)")
        cluster.wait_for_catchup()
        decisions(ContentType, options.rounds)
        writes(options.rounds)
        share(ContentType, options.seconds)
        connections.close_all()


if __name__ == "__main__":
    main()
