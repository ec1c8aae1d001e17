"""Killed with -9 at any instant, archiving and restoring lose nothing, double nothing, and are finished.

Thirty kills of each: ``python3 run.py test-slow -k archive_kill``.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from django_scaledb.partitions.archive.restore import Restorer, Wish, restore
from django_scaledb.partitions.archive.writer import Archiver
from tests import archives
from tests.archives import File, Rows, bring_back, done, rotate, utc
from tests.lab import Lab

NOW = utc(2026, 5, 17, 13, 7, 11)
TABLE = "lab_file_y2018"


def leave() -> None:
    """Off the set, into the archive, and gone."""
    done(rotate(File, now=NOW))
    done(rotate(File, now=NOW + timedelta(days=2)))


def come_back() -> None:
    """Out of the archive, onto the set, and left to retention again."""
    done(bring_back(File, TABLE, now=NOW))
    done(restore(File, Wish(TABLE), using="lab", now=NOW, release=True))


def killed_in(work: Callable[[], None], after: float) -> bool:
    """Start `work` in a child and kill it `after` seconds; whether it was still at work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            connections["lab"].connection = None  # the parent's session is the parent's
            work()
            code = 0
        finally:
            os._exit(code)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def is_archived(lab: Lab, folder: Path) -> None:
    """In the archive and nowhere else; no file that the database does not know of."""
    assert not [name for name in lab.tables() if name.startswith(TABLE)]
    assert lab.value("SELECT count(*) FROM lab_file") == 0
    known = lab.execute("SELECT unnest(ARRAY[manifest, file]) FROM django_scaledb_archive")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        name for (name,) in known
    }
    assert lab.value("SELECT count(*) FROM django_scaledb_archive WHERE archived_at IS NULL") == 0


def is_back(lab: Lab, rows: Rows) -> None:
    """On the set, each row once, and nothing beside it."""
    assert rows.differences() == []
    assert TABLE in lab.bounds("lab_file")
    assert {name for name in lab.tables() if name.startswith("lab_file")} == {
        "lab_file",
        *lab.bounds("lab_file"),
    }
    assert lab.value("SELECT count(*) FROM pg_constraint WHERE conname = 'django_scaledb_bounds'") == 0
    waiting = "SELECT count(*) FROM django_scaledb_archive WHERE restored_at IS NULL"
    assert lab.value(waiting) == 0


class Killed(BaseException):
    """What nobody catches, and nothing is tidied up for."""


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


@pytest.fixture
def files(lab: Lab, tmp_path: Path, settings: Any) -> tuple[Rows, Path]:
    folder = tmp_path / "archive"
    archives.use_storage(settings, folder)
    archives.load_files(lab, 2018, NOW, limit=100)
    return Rows(lab, "lab_file"), folder


@pytest.mark.parametrize("where", ["_verified", "run"])
def test_what_was_stored_and_not_verified_is_removed(lab: Lab, files: tuple[Rows, Path], where: str) -> None:
    """Before it is read back, and when only the mark is missing."""
    _, folder = files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Archiver, where, die)
        with pytest.raises(Killed):
            rotate(File, now=NOW)
    assert len(list(folder.rglob("*.parquet"))) == 1
    assert lab.value("SELECT count(*) FROM django_scaledb_archive WHERE archived_at IS NULL") == 1
    leave()
    is_archived(lab, folder)
    assert len(list(folder.rglob("*.parquet"))) == 1


def test_what_was_not_loaded_to_the_end_is_loaded_anew(lab: Lab, files: tuple[Rows, Path]) -> None:
    leave()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "_load", die)
        patch.setattr(Restorer, "_drop", lambda *args: None)
        with pytest.raises(Killed):
            come_back()
    assert lab.value(f"SELECT count(*) FROM {TABLE}") == 0
    assert rotate(File, now=NOW).is_empty  # it is no business of a rotation's
    come_back()
    is_back(lab, files[0])


def test_what_was_loaded_is_not_loaded_again(lab: Lab, files: tuple[Rows, Path]) -> None:
    leave()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "_attach", die)
        with pytest.raises(Killed):
            come_back()
    assert lab.value("SELECT count(*) FROM lab_file") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "_load", die)
        come_back()
    is_back(lab, files[0])


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_next_run_finishes_what_a_killed_one_began(
    lab: Lab, tmp_path: Path, settings: Any, kills: int
) -> None:
    folder = tmp_path / "archive"
    archives.use_storage(settings, folder)
    archives.load_files(lab, 2018, NOW)
    rows = Rows(lab, "lab_file")
    assert rows.count > 1000
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    ways = ((leave, lambda: is_archived(lab, folder)), (come_back, lambda: is_back(lab, rows)))
    seconds = []
    for work, check in ways:
        begun = time.monotonic()
        work()
        seconds.append(time.monotonic() - begun)
        check()
    killed = 0
    for number in range(kills):
        for (work, check), duration in zip(ways, seconds, strict=True):
            killed += killed_in(work, chance.uniform(0, duration * 1.1))
            try:
                work()
                check()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, number {number}, {work.__name__}") from error
    assert killed >= kills, "the kills came too late to show anything"
