"""Old code and new code work on the table before, during and after the swap, and nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster
from tests.project import Project
from tests.traffic import ADOPTED, FILL, MORE, ORDERS, PARTITIONED_ORDERS, Traffic

NUMBERS = itertools.count()


def prepare(
    folder: Path, server: Cluster, rows: int, owners: Iterable[int], *, routed: bool = False
) -> Project:
    """A project with so many rows that nobody writes, and a hundred for each of the writers `owners`."""
    project = Project(folder, server, f"traffic_{next(NUMBERS)}", routed=routed)
    project.models(ORDERS)
    project.manage("makemigrations", "shop")
    project.manage("migrate", "-v", "0")
    # Those of the writers in the middle: copied while they are written.
    project.execute(FILL.format(rows=rows - rows // 2))
    project.execute("".join(ADOPTED.format(owner=owner) for owner in owners) + MORE.format(rows=rows // 2))
    return project


def report(seen: list[dict]) -> None:
    for one in seen:
        print({k: v for k, v in one.items() if k not in ("errors", "wrong")})


def check(project: Project, seen: list[dict], rows: int) -> None:
    report(seen)
    for one in seen:
        assert one["errors"] == []
        assert one["wrong"] == []
        assert one["stuck"] == 0
    assert project.query("SELECT count(*) FROM shop_order WHERE owner = 0") == [(rows,)]
    assert project.query("SELECT count(*) FROM shop_order") == [(rows + sum(one["rows"] for one in seen),)]
    assert project.query("SELECT relkind::text FROM pg_class WHERE oid = 'shop_order'::regclass") == [("p",)]
    assert project.query("SELECT count(*) FROM pg_class WHERE relname ~ 'shop_order_(new|old|scaledb)'") == [
        (0,)
    ]
    assert project.query("SELECT count(*) FROM pg_trigger WHERE tgname ~ 'scaledb'") == [(0,)]


def convert(project: Project, strategy: str, seconds: float = 1.0) -> list[dict]:
    """Old clients all the time, new ones from the change of the base on."""
    old = Traffic(project, 4, 2, 100)
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    new = Traffic(project, 4, 2, 200)
    time.sleep(seconds)
    print(project.manage("convert_to_partitioned", "shop.Order", "--strategy", strategy))
    time.sleep(seconds)
    project.manage("migrate", "-v", "0")
    if strategy == "copy":
        project.manage("convert_to_partitioned", "shop.Order", "--finish")
    time.sleep(seconds)
    seen = [old.stop(), new.stop()]
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    project.manage("show_partitions", "--check")
    return seen


@pytest.mark.slow  # the quick one is beside a standby, in tests/cluster
@pytest.mark.parametrize("strategy", ["attach", "copy"])
def test_clients_of_both_kinds_notice_nothing(tmp_path, server, strategy):
    rows = 30_000
    project = prepare(tmp_path, server, rows, (*range(100, 104), *range(200, 204)))
    seen = convert(project, strategy)
    check(project, seen, rows)
    # The machine that runs this may be busy with something else; the benchmark measures the stall.
    assert max(one["longest"] for one in seen) < 2


def test_an_attached_partition_is_split_by_period_while_clients_go_on(tmp_path, server):
    rows = 20_000
    project = prepare(tmp_path, server, rows, range(100, 104))
    project.execute("ALTER TABLE shop_order SET (fillfactor = 90)")
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    project.manage("convert_to_partitioned", "shop.Order")
    project.manage("migrate", "-v", "0")
    traffic = Traffic(project, 4, 2, 100)
    assert "DETACH" not in project.manage("create_partitions", "shop.Order", "--split", "--dry-run")
    # Somebody is in the way behind the copying; then it is taken back, and done again.
    with psycopg.connect(project.node.conninfo(dbname=project.database)) as blocker:
        blocker.execute("LOCK TABLE shop_customer IN ROW EXCLUSIVE MODE")
        project.manage("create_partitions", "shop.Order", "--split", "--deadline", "0.3", fails=True)
    project.manage("convert_to_partitioned", "shop.Order", "--abort", "--deadline", "60")
    assert project.query("SELECT count(*) FROM pg_class WHERE relname ~ 'shop_order_(new|y2024)'") == [(0,)]
    assert "is split" in project.manage("create_partitions", "shop.Order", "--split", "--deadline", "60")
    check(project, [traffic.stop()], rows)
    assert project.query("SELECT to_regclass('shop_order_start')::text") == [(None,)]
    bounds = project.query(
        "SELECT pg_get_expr(relpartbound, oid), reloptions FROM pg_class WHERE relispartition AND "
        "relkind = 'r'"
    )
    assert not any("MINVALUE" in bound for bound, _ in bounds)
    assert len(bounds) > 10
    assert all(options == ["fillfactor=90"] for _, options in bounds)
    assert project.query(
        "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND convalidated AND conrelid IN "
        "(SELECT inhrelid FROM pg_inherits WHERE inhparent = 'shop_order'::regclass)"
    ) == [(len(bounds),)]
    assert "nothing to split" in project.manage("create_partitions", "shop.Order", "--split")
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    project.manage("show_partitions", "--check")
