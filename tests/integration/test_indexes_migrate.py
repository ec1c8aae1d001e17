"""The operations as a project runs them: `makemigrations`, `sqlmigrate`, `check`, `migrate`, and back."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster
from tests.project import Project

NUMBERS = itertools.count()
ORDER = """
    class Order(PartitionedModel):
        number = models.IntegerField(default=0)
        total = models.IntegerField(default=0)
        placed_at = models.DateTimeField()

        class Meta:
            indexes = [{indexes}]
            constraints = [{constraints}]

        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
            premake = 1
"""
INDEX = 'models.Index(fields=["total"], name="order_total")'
CONSTRAINT = 'models.UniqueConstraint(fields=["number", "placed_at"], name="order_once")'
FILL = """
    INSERT INTO shop_order (number, total, placed_at)
    SELECT i, i, now() + i * interval '1 second' FROM generate_series(1, {rows}) i;
    ANALYZE shop_order;
"""
VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{}')"


@pytest.fixture
def project(tmp_path: Path, server: Cluster) -> Project:
    project = Project(tmp_path, server, f"indexes_{next(NUMBERS)}")
    begin(project)
    return project


def begin(project: Project) -> None:
    project.models(ORDER.format(indexes="", constraints=""))
    run(project, "call('makemigrations', 'shop', verbosity=0)", "invalidate_caches()", "call('migrate')")


def run(project: Project, *code: str) -> str:
    """Several commands in one process, which saves most of the time; what they print."""
    lines = (
        "from importlib import invalidate_caches",
        "from django.db import connection",
        "from django.core.management import call_command",
        "def call(*args, verbosity=0, **options): call_command(*args, verbosity=verbosity, **options)",
        f"def valid(name):\n    cursor = connection.cursor()\n    cursor.execute({VALID!r}.format(name))\n"
        "    return [row[0] for row in cursor.fetchall()]",
    )
    return project.run("\n".join((*lines, *code)))


def write(project: Project, name: str, *operations: str, atomic: bool = False) -> None:
    """A migration behind the last one."""
    folder = project.folder / "shop" / "migrations"
    last = sorted(path.stem for path in folder.glob("0*.py") if path.stem < name)[-1]
    body = ",\n        ".join(operations)
    (folder / f"{name}.py").write_text(
        "from django.db import migrations, models\n"
        "from django.contrib.postgres import operations as postgres\n"
        "from django_scaledb import operations\n\nclass Migration(migrations.Migration):\n"
        f"    atomic = {atomic}\n    dependencies = [('shop', '{last}')]\n    operations = [{body}]\n"
    )


def valid(project: Project, name: str) -> bool | None:
    rows = project.query(VALID.format(name))
    return rows[0][0] if rows else None


BOTH = (
    f"operations.AddIndexConcurrently('order', {INDEX})",
    f"operations.AddConstraintConcurrently('order', {CONSTRAINT})",
)
THERE = "assert valid('order_total') == valid('order_once') == [True]"
GONE = "assert valid('order_total') == valid('order_once') == []"


def test_there_and_back(project: Project) -> None:
    project.execute(FILL.format(rows=1000))
    write(project, "0002_both", *BOTH)
    write(
        project,
        "0003_neither",
        "operations.RemoveIndexConcurrently('order', 'order_total')",
        "operations.RemoveConstraintConcurrently('order', 'order_once')",
    )
    run(
        project,
        "call('migrate', 'shop', '0002')",
        THERE,
        "call('migrate', 'shop')",
        GONE,
        "call('migrate', 'shop', '0002')",
        THERE,
        "call('migrate', 'shop', '0001')",
        GONE,
    )
    shown = run(project, "call('sqlmigrate', 'shop', '0002')")
    assert shown.count("CREATE INDEX CONCURRENTLY") == 2
    assert shown.count("CREATE UNIQUE INDEX CONCURRENTLY") == 2
    assert shown.count("ATTACH PARTITION") == 4
    shown = run(project, "call('sqlmigrate', 'shop', '0003')")
    assert 'DROP INDEX "public"."order_total"' in shown
    assert 'DROP CONSTRAINT "order_once"' in shown
    write(project, "0004_atomic", BOTH[1], atomic=True)
    assert "set atomic = False on the migration" in project.manage("migrate", fails=True)


def test_other_constraints_are_refused() -> None:
    from django.db import models

    from django_scaledb.operations import AddConstraintConcurrently

    with pytest.raises(TypeError, match="must be a UniqueConstraint"):
        AddConstraintConcurrently("order", models.CheckConstraint(condition=models.Q(a=1), name="c"))


def test_djangos_own_operation_and_a_plain_table(project: Project) -> None:
    project.models(
        ORDER.format(indexes=INDEX, constraints="")
        + "\n    class Note(models.Model):\n        total = models.IntegerField()\n"
        + '\n        class Meta:\n            indexes = [models.Index(fields=["total"], name="note_total")]\n'
    )
    write(
        project,
        "0002_index",
        f"postgres.AddIndexConcurrently('order', {INDEX})",
        "migrations.CreateModel('Note', [('id', models.BigAutoField(auto_created=True, primary_key=True, "
        "serialize=False, verbose_name='ID')), ('total', models.IntegerField())])",
        "operations.AddIndexConcurrently('note', models.Index(fields=['total'], name='note_total'))",
    )
    run(
        project,
        "call('makemigrations', check_changes=True)",
        "call('migrate')",
        "assert valid('order_total') == valid('note_total') == [True]",
    )


def test_only_where_the_router_says(tmp_path: Path, server: Cluster) -> None:
    extra = "DATABASES['other'] = {**DATABASES['default']}\nDATABASE_ROUTERS = ['router.Router']"
    (tmp_path / "router.py").write_text(
        "class Router:\n    def allow_migrate(self, db, app_label, **hints):\n"
        "        return db == 'default'\n"
    )
    project = Project(tmp_path, server, f"indexes_{next(NUMBERS)}", extra)
    begin(project)
    write(project, "0002_both", *BOTH)
    # The same server under another alias, as a replica would be; nothing happens there.
    run(project, "call('migrate', 'shop', database='other')", GONE)


def test_migrate_that_was_killed_is_run_again(project: Project) -> None:
    """Somebody keeps the second partition from being built, not a rotation; what is there by then stays."""
    project.execute(FILL.format(rows=1000))
    write(project, "0002_index", f"operations.AddIndexConcurrently('order', {INDEX})")
    (first,), (second,) = project.query(
        "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid "
        "WHERE inhparent = 'shop_order'::regclass ORDER BY c.oid"
    )
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project_settings",
        "PYTHONPATH": f"{project.folder}{os.pathsep}{Path(__file__).parent.parent.parent / 'src'}",
    }
    with psycopg.connect(project.node.conninfo(dbname=project.database)) as holder:
        holder.execute(f"LOCK TABLE {second} IN ROW EXCLUSIVE MODE")
        process = subprocess.Popen(
            [sys.executable, "-m", "django", "migrate"],
            cwd=project.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 30
        while not valid(project, f"{first}_order_total_idx"):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        later = (datetime.now(UTC) + timedelta(days=62)).date().isoformat()
        assert "created" in project.manage("rotate_partitions", "--now", later)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = project.query(f"SELECT '{first}_order_total_idx'::regclass::oid::int8")
    assert valid(project, "order_total") is False
    project.manage("migrate", "-v", "0")
    assert valid(project, "order_total")
    assert project.query(f"SELECT '{first}_order_total_idx'::regclass::oid::int8") == kept


CHECK = "models.CheckConstraint(condition=models.Q(total__gte=0), name='c')"
INDEXED = "models.IntegerField(default=0, db_index=True)"
WARNED = {
    f"migrations.AddIndex('order', {INDEX})": "Use AddIndexConcurrently",
    f"migrations.AddConstraint('order', {CONSTRAINT})": "Use AddConstraintConcurrently",
    f"migrations.AddConstraint('order', {CHECK})": "ValidateConstraint",
    f"migrations.AddField('order', 'code', {INDEXED})": "db_index=False",
    f"migrations.AlterField('order', 'total', {INDEXED})": "db_index=False",
    "migrations.AlterUniqueTogether('order', {('number', 'placed_at')})": "Write a UniqueConstraint",
    f"migrations.SeparateDatabaseAndState([migrations.AddIndex('order', {INDEX})], [])": (
        "Use AddIndexConcurrently"
    ),
    f"operations.AddIndexConcurrently('order', {INDEX})": None,
    f"operations.AddConstraintConcurrently('order', {CONSTRAINT})": None,
    f"postgres.AddConstraintNotValid('order', {CHECK})": None,
    "migrations.AddField('order', 'code', models.IntegerField(null=True))": None,
    f"migrations.CreateModel('N', [('id', models.BigAutoField(primary_key=True)), ('n', {INDEXED})])": None,
}


def test_the_check_of_what_is_pending(project: Project) -> None:
    check = ("check", "--database", "default")
    write(project, "0002_some", *WARNED)
    assert "W060" not in project.manage(*check), "the table is small"
    project.execute(FILL.format(rows=100_000))
    said = [line for line in project.manage(*check).splitlines() if "W060" in line or "HINT" in line]
    hints = [hint for hint in WARNED.values() if hint]
    assert len(said) == 2 * len(hints), said
    for hint in set(hints):
        assert sum(hint in line for line in said) == hints.count(hint), hint
    assert all("shop_order is partitioned and has about 100,000 rows" in text for text in said[::2])
    # Those that remove: of what is there by then.
    write(
        project,
        "0002_some",
        f"operations.AddIndexConcurrently('order', {INDEX})",
        f"operations.AddConstraintConcurrently('order', {CONSTRAINT})",
    )
    write(
        project,
        "0003_less",
        "migrations.RemoveIndex('order', 'order_total')",
        "migrations.RemoveConstraint('order', 'order_once')",
        "operations.RemoveIndexConcurrently('order', 'order_total')",
    )
    said = project.manage(*check)
    assert said.count("W060") == 2
    assert "RemoveIndexConcurrently" in said
    assert "RemoveConstraintConcurrently" in said
    assert "W060" in project.manage("migrate", "shop", "0002")
