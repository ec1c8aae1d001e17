"""kill -9 at any instant of building an index: running again goes on, and nothing is left over."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from django.db import models

from django_scaledb.partitions import maintenance
from tests.integration.test_indexes import INDEX, UNIQUE, add, parts, remove, whole
from tests.integration.test_kill import fork
from tests.lab import ALIAS, NOW, Account, Lab, Traffic, Upload

WRITE = (
    "INSERT INTO lab_upload (account_id, at, size) "
    "VALUES (1, '2025-03-01'::timestamptz + random() * interval '1 year', 1)"
)


@pytest.fixture
def year(lab: Lab) -> Lab:
    lab.create(Account, Upload)
    months = [datetime(2024 + number // 12, number % 12 + 1, 1, tzinfo=UTC) for number in range(5, 29)]
    lab.execute(
        *(
            f"CREATE TABLE old{number} PARTITION OF lab_upload FOR VALUES FROM ('{first}') TO ('{last}')"
            for number, (first, last) in enumerate(itertools.pairwise(months))
        )
    )
    lab.execute(
        "INSERT INTO lab_account SELECT generate_series(1, 10)",
        "INSERT INTO lab_upload (account_id, at, size) "
        "SELECT 1 + i % 10, '2024-06-01'::timestamptz + i * interval '7 minutes', i "
        "FROM generate_series(1, 100000) i",
    )
    assert len(lab.bounds("lab_upload")) == 26
    return lab


def die(lab: Lab, work: Callable[[], object], seconds: float) -> bool:
    """Have a child do `work`, and kill it after so many seconds; whether it was still at it."""
    lab.connection.close()  # a child must not use its parent's session
    child = fork(work)
    time.sleep(seconds)
    ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return not ended


def indexes(lab: Lab) -> list[str]:
    return [
        name
        for (name,) in lab.execute(
            "SELECT i.relname FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
            "WHERE indrelid IN (SELECT relid FROM pg_partition_tree('lab_upload')) ORDER BY 1"
        )
    ]


@pytest.mark.parametrize("wanted", [INDEX, UNIQUE], ids=["index", "constraint"])
def test_a_few_kills(year: Lab, wanted: models.Index | models.UniqueConstraint) -> None:
    go_through(year, wanted, kills=5, seed=random.randrange(10**6))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [INDEX, UNIQUE], ids=["index", "constraint"])
@pytest.mark.parametrize("seed", range(10))
def test_many_kills(year: Lab, wanted: models.Index | models.UniqueConstraint, seed: int) -> None:
    go_through(year, wanted, kills=8, seed=seed)


def go_through(lab: Lab, wanted: models.Index | models.UniqueConstraint, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    before = indexes(lab)
    begun = time.monotonic()
    add(lab, wanted)
    duration = time.monotonic() - begun
    remove(lab, wanted)
    assert indexes(lab) == before
    killed = 0
    with Traffic(lab.session(), WRITE) as traffic:
        for number in range(kills):
            # The later ones go on from where the earlier ones were killed.
            killed += die(lab, lambda: add(lab, wanted), chance.uniform(0.1, 0.9) * duration / 2)
            if number == kills - 2:
                assert maintenance.rotate([Upload], using=ALIAS, now=NOW.replace(month=6)).ok
        add(lab, wanted)
    assert traffic.count
    assert whole(lab, wanted.name), (seed, parts(lab, wanted.name))
    assert len(indexes(lab)) == len(before) + 28 + 3, seed  # a partition with its own two came meanwhile
    assert killed >= 2, "the kills came too late to show anything"
    killed = die(lab, lambda: remove(lab, wanted), chance.uniform(0, 0.1))
    remove(lab, wanted)
    assert parts(lab, wanted.name) == {}
