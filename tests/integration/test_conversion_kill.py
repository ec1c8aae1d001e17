"""kill -9 at any instant, then resume or abort: no row is lost, nothing is left over."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_conversion_traffic import check, prepare
from tests.project import Project
from tests.traffic import PARTITIONED_ORDERS, Traffic

ROWS = 20_000
COMMAND = ("convert_to_partitioned", "shop.Order")
EVERYTHING = """
    SELECT 'table ' || relname || ' ' || relkind::text FROM pg_class c WHERE relnamespace =
        'public'::regnamespace
        AND relname !~ '^django_' AND relkind IN ('r', 'p', 'i', 'I', 'S', 'v')
    UNION ALL SELECT 'constraint ' || conname || pg_get_constraintdef(oid) FROM pg_constraint
        WHERE conrelid = 'shop_order'::regclass
    UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgrelid = 'shop_order'::regclass AND NOT
        tgisinternal
    UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER
        BY 1
"""


def killed(project: Project, strategy: str, seconds: float, *more: str) -> bool:
    """Start a run and kill it after so many seconds; whether it was still running."""
    source = Path(__file__).parent.parent.parent / "src"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project_settings",
        "PYTHONPATH": f"{project.folder}{os.pathsep}{source}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "django", *COMMAND, *(more or ("--strategy", strategy))],
        cwd=project.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it has begun to work
        time.sleep(seconds)
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    return was_running


def go_through(project: Project, strategy: str, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    before = project.query(EVERYTHING)
    traffic = Traffic(project, 3, 1, 100, pause=0.01)
    longest = 4.0 if strategy == "copy" else 1.5
    for _ in range(kills):
        killed(project, strategy, chance.uniform(0, longest))
        project.manage(*COMMAND, "--dry-run")
        project.manage(*COMMAND, "--status")
        what = chance.random()
        if what < 0.3:
            killed(project, strategy, chance.uniform(0, 0.5), "--abort")
        if what < 0.6 and project.query(
            "SELECT ended_at IS NULL FROM django_scaledb_conversion ORDER BY id DESC LIMIT 1"
        ) == [(True,)]:
            project.manage(*COMMAND, "--abort", "--deadline", "60")
            assert project.query(EVERYTHING) == before
        if project.query("SELECT count(*) FROM django_scaledb_conversion WHERE phase = 'done'") != [(0,)]:
            break
    project.manage(*COMMAND, "--deadline", "60")
    project.manage("migrate", "-v", "0")
    if strategy == "copy":
        project.manage(*COMMAND, "--finish", "--deadline", "60")
    check(project, [traffic.stop()], ROWS)
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    project.manage("show_partitions", "--check")


@pytest.mark.parametrize(("strategy", "kills"), [("attach", 2), ("copy", 1)])
def test_a_few_kills(tmp_path, server, strategy, kills):
    go_through(prepare(tmp_path, server, ROWS, range(100, 103)), strategy, kills=kills, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "seed"), [*itertools.product(["attach", "copy"], range(12))])
def test_many_kills(tmp_path, server, strategy, seed):
    go_through(prepare(tmp_path, server, ROWS, range(100, 103)), strategy, kills=5, seed=seed)
