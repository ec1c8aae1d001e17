"""Killed with -9 at any instant, a rotation is finished, or cleaned up, by the next one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connections

from django_scaledb.management._command import terminating
from django_scaledb.partitions import maintenance
from django_scaledb.partitions.report import Report
from django_scaledb.postgres.executor import Executor
from tests.lab import Account, Lab, Traffic, Upload, eventually

STEP = 3
"""Months from one run to the next: so many partitions are made, taken off, settled and dropped by each."""
KEPT = 6


def moment(month: int) -> datetime:
    """An odd moment of the month that is `month` after January 2020."""
    return datetime(2020 + month // 12, month % 12 + 1, 17, 13, 7, 11, tzinfo=UTC)


def rotate(month: int) -> Report:
    return maintenance.rotate([Upload], using="lab", now=moment(month), lock_timeout=500, deadline=20)


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a child with a session of its own; its pid."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            connections["lab"].connection = None  # the parent's session is the parent's
            work()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    return child


def rotate_and_die(month: int, after: float) -> bool:
    """Rotate in a child and kill it `after` seconds; whether it was still at work."""
    child = fork(lambda: rotate(month))
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def add_rows(lab: Lab, first: int, last: int) -> None:
    for month in range(first, last + 1):
        lab.execute(f"INSERT INTO lab_upload (account_id, at, size) VALUES (1, '{moment(month)}', {month})")


def check(lab: Lab, month: int) -> None:
    """The set is right, no row is lost, and nothing is left lying about."""
    assert rotate(month).is_empty
    attached = set(lab.bounds("lab_upload"))
    assert len(attached) == KEPT + 1 + 2  # the months of retention, the current one, premake
    detached = {name for name in lab.tables() if '"state":"detached"' in (lab.comment(name) or "")}
    assert {name for name in lab.tables() if name.startswith("lab_upload")} == {
        "lab_upload",
        *attached,
        *detached,
    }
    assert lab.value("SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == 0
    assert lab.value("SELECT count(*) FROM pg_constraint WHERE conname = 'django_scaledb_bounds'") == 0
    stored = {size for (size,) in lab.execute("SELECT size FROM lab_upload")}
    assert stored == set(range(month - KEPT, month - STEP + 1))


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_the_next_run_mends_what_a_killed_one_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    attrs: dict[str, Any] = Upload._partitioning_meta.attrs
    for name, value in {
        "retention": f"{KEPT} months",
        "retention_action": "drop",
        "detached_for": "1 day",
    }.items():
        monkeypatch.setitem(attrs, name, value)
    lab.create(Account, Upload, now=moment(0))
    lab.execute("INSERT INTO lab_account VALUES (1)")
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    month = 2 * KEPT
    for warm_up in (month - STEP, month):
        begun = time.monotonic()
        with Traffic(lab.session(), "SELECT count(*), pg_sleep(0.1) FROM lab_upload"):
            assert rotate(warm_up).ok
        duration = time.monotonic() - begun
    add_rows(lab, month - KEPT, month)

    killed = 0
    for number in range(kills):
        month += STEP
        # A reader is what DETACH CONCURRENTLY waits for, so that it can be left pending.
        with Traffic(lab.session(), "SELECT count(*), pg_sleep(0.1) FROM lab_upload"):
            killed += rotate_and_die(month, chance.uniform(0, duration * 1.2))
        report = rotate(month)
        assert report.ok, (seed, number, report.error, list(report.failures()))
        check(lab, month)
        add_rows(lab, month - STEP + 1, month)
    assert killed >= kills / 2, "the kills came too late to show anything"


@pytest.fixture
def waiting(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A set with one old partition, whose detach will be kept waiting halfway."""
    monkeypatch.setitem(Upload._partitioning_meta.attrs, "retention", f"{KEPT} months")
    # The reader whom it waits for came after everybody was let pass.
    monkeypatch.setattr(Executor, "_let_pass", lambda *args: None)
    lab.create(Account, Upload, now=moment(0))
    lab.session().execute("SELECT count(*) FROM lab_upload")
    return lab


def is_pending(lab: Lab) -> bool:
    return bool(lab.value("SELECT count(*) FROM pg_inherits WHERE inhdetachpending"))


def run_locks(lab: Lab) -> int:
    count: int = lab.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    return count


def test_the_session_of_a_killed_run_ends_soon(waiting: Lab) -> None:
    """Though it waits for a lock: else it would keep other runs out until it gets it."""
    lab = waiting
    child = fork(lambda: rotate(KEPT + 1))
    eventually(lambda: is_pending(lab))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    eventually(lambda: run_locks(lab) == 0, seconds=3)
    assert is_pending(lab)
    lab.close()
    assert rotate(KEPT + 1).ok
    assert not is_pending(lab)
    assert '"state":"detached"' in (lab.comment("lab_upload_y2020m01") or "")


def test_sigterm_cancels_the_statement_under_way(waiting: Lab) -> None:
    lab = waiting

    def work() -> None:
        with terminating():
            rotate(KEPT + 1)

    child = fork(work)
    eventually(lambda: is_pending(lab))
    begun = time.monotonic()
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert time.monotonic() - begun < 2
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    eventually(lambda: run_locks(lab) == 0, seconds=0.5)
    lab.close()
    assert rotate(KEPT + 1).ok
