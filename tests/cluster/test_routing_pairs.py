"""Random pairs of a write and a read, from many contexts at once, while the lag changes all the time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections, transaction

from django_scaledb.routing import current_token, registry, use_token
from django_scaledb.testing import Cluster
from tests.routing import eventually, migrate, routed
from tests.testapp.models import Account

pytestmark = pytest.mark.cluster

#: Of each process; a context has a row of its own.
THREADS, CONTEXTS, TASKS = 2, 40, 24
PROCESSES = 2


@pytest.fixture(scope="module")
def cluster(django_db_setup, django_db_blocker) -> Iterator[Cluster]:
    with Cluster(1) as cluster, django_db_blocker.unblock():
        migrate(cluster)
        yield cluster


def _update(pk: int, value: str) -> None:
    Account.objects.filter(pk=pk).update(name=value)


def _save(pk: int, value: str) -> None:
    Account(pk=pk, name=value).save(force_update=True)


def _atomic(pk: int, value: str) -> None:
    with transaction.atomic():
        _update(pk, value)


def _raw(pk: int, value: str) -> None:
    with connections["default"].cursor() as cursor:
        cursor.execute("UPDATE testapp_account SET name = %s WHERE id = %s", [value, pk])


WRITES: list[Callable[[int, str], None]] = [_update, _save, _atomic, _raw]


class Tally:
    """What one process saw."""

    def __init__(self) -> None:
        self.pairs = 0
        self.served: Counter[str] = Counter()
        self.stale: list[object] = []

    def write(self, rng: random.Random, pk: int) -> str:
        value = f"{rng.random()}"
        rng.choice(WRITES)(pk, value)
        return value

    def check(self, pk: int, value: str) -> None:
        self.see(Account.objects.get(pk=pk), value)

    def see(self, found: Account, value: str) -> None:
        self.served[found._state.db] += 1
        if found.name != value:
            self.stale.append([found.pk, value, found.name, current_token()])

    def in_contexts(self, rng: random.Random, pks: list[int], pairs: int) -> None:
        """One thread that goes from context to context: each reads at once, or when others have had a
        turn."""
        contexts = []
        for pk in pks:
            context = copy_context()
            context.run(use_token("").__enter__)
            contexts.append((context, pk))
        waiting: dict[int, str] = {}
        begun = 0
        try:
            while begun < pairs or waiting:
                which = rng.randrange(len(contexts)) if begun < pairs else next(iter(waiting))
                context, pk = contexts[which]
                if which not in waiting:
                    waiting[which] = context.run(self.write, rng, pk)
                    begun += 1
                    if rng.random() < 0.75:
                        continue
                context.run(self.check, pk, waiting[which])
                if rng.random() < 0.8:
                    del waiting[which]
                    self.pairs += 1
        finally:
            connections.close_all()

    async def in_tasks(self, rng: random.Random, pks: list[int], pairs: int) -> None:
        left = iter(range(pairs))

        async def task(pk: int) -> None:
            async with use_token(""):
                for _ in left:
                    value = await sync_to_async(self.write)(rng, pk)
                    for _ in range(rng.choice([0, 0, 1, 4, 16])):
                        await asyncio.sleep(0.001)
                    self.see(await Account.objects.aget(pk=pk), value)
                    self.pairs += 1

        await asyncio.gather(*(task(pk) for pk in pks))
        await sync_to_async(connections.close_all)()

    def run(self, seed: int, pks: list[int], pairs: int) -> None:
        """Four fifths of the pairs in contexts of threads, one fifth in tasks of an event loop."""
        share = 4 * pairs // (5 * THREADS)
        rest = pairs - share * THREADS
        threads = [
            threading.Thread(
                target=self.in_contexts,
                args=(random.Random(seed + n), pks[n * CONTEXTS : (n + 1) * CONTEXTS], share),
            )
            for n in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        asyncio.run(self.in_tasks(random.Random(seed - 1), pks[THREADS * CONTEXTS :], rest))
        for thread in threads:
            thread.join()


def _in_a_process(seed: int, pks: list[int], pairs: int) -> tuple[int, int]:
    """Fork; the child's id, and where it writes what it saw."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        return child, reader
    tally = Tally()
    # The parent's has a thread that was not forked.
    SyncToAsync.single_thread_executor = ThreadPoolExecutor(1)
    try:
        tally.run(seed, pks, pairs)
    except BaseException as error:
        tally.stale.append(repr(error))
    finally:
        with os.fdopen(writer, "w") as out:
            json.dump([tally.pairs, tally.served, tally.stale[:10]], out)
        os._exit(0)


@pytest.mark.parametrize(
    "pairs", [pytest.param(2_000, id="2,000"), pytest.param(100_000, id="100,000", marks=pytest.mark.slow)]
)
def test_no_read_is_older_than_what_its_context_wrote(cluster: Cluster, pairs: int) -> None:
    each = THREADS * CONTEXTS + TASKS
    standby, ended, lags = cluster.standbys[0], threading.Event(), Counter[float]()

    def vary() -> None:
        rng = random.Random(0)
        while not ended.wait(rng.uniform(0.2, 1.5)):
            lag = rng.choice([0, 0, 0.02, 0.1, 0.3, 1, 3])
            lags[lag] += 1
            standby.set_lag(lag)

    with routed(cluster, MAX_LAG=60):
        rows = Account.objects.bulk_create(Account(name="0") for _ in range(PROCESSES * each))
        pks = [row.pk for row in rows]
        eventually(lambda: Account.objects.all().db == "replica1", 5)
        connections.close_all()
        registry.forget()
        begun = time.monotonic()
        children = [
            _in_a_process(7 * n + 1, pks[n * each : (n + 1) * each], pairs // PROCESSES)
            for n in range(PROCESSES)
        ]
        varying = threading.Thread(target=vary)
        varying.start()
        done, served, stale = 0, Counter[str](), []
        try:
            for child, reader in children:
                with os.fdopen(reader) as answer:
                    text = answer.read()
                os.waitpid(child, 0)
                counted, aliases, wrong = json.loads(text)
                done += counted
                served.update(aliases)
                stale += wrong
        finally:
            ended.set()
            varying.join()
            standby.set_lag(0)
    took = time.monotonic() - begun
    print(f"\n{done} pairs in {took:.0f} s, read from {dict(served)}, lags {dict(lags)}, {len(stale)} stale")
    assert stale == []
    assert done == pairs
    assert served["replica1"] > pairs / 50
