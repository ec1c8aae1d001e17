"""Indexes that are built and removed while a partitioned table is in use."""

from __future__ import annotations

import threading
import time

import pytest
from django.db import models
from django.db.models.functions import Lower

from django_scaledb.exceptions import AnotherRunInProgress, DDLError, LockNotAvailable
from django_scaledb.partitions import maintenance
from django_scaledb.partitions.indexes import builder, tree
from django_scaledb.partitions.indexes.builder import Builder
from django_scaledb.partitions.indexes.definition import Definition
from django_scaledb.postgres.locks import LockMode
from tests.lab import ALIAS, NOW, Account, Lab, Traffic, Upload

INDEX = models.Index(fields=["size", "-at"], name="by_size")
UNIQUE = models.UniqueConstraint(fields=["account", "at"], name="once")
PARTS = """
    SELECT c.relname, p.relname, x.indisvalid, pg_get_indexdef(i.oid) FROM pg_class i
    JOIN pg_index x ON x.indexrelid = i.oid JOIN pg_class c ON c.oid = x.indrelid
    LEFT JOIN pg_inherits h ON h.inhrelid = i.oid LEFT JOIN pg_class p ON p.oid = h.inhparent
    WHERE x.indrelid IN (SELECT relid FROM pg_partition_tree('{}'))
        AND (i.relname LIKE '%{}%' OR p.relname = '{}') ORDER BY 1
"""


def add(
    lab: Lab, wanted: models.Index | models.UniqueConstraint = INDEX, model: type[models.Model] = Upload
) -> None:
    with lab.connection.schema_editor(atomic=False) as editor:
        if isinstance(wanted, models.Index):
            editor.add_index(model, wanted, concurrently=True)
        else:
            editor.add_constraint_concurrently(model, wanted)


def remove(
    lab: Lab, wanted: models.Index | models.UniqueConstraint = INDEX, model: type[models.Model] = Upload
) -> None:
    with lab.connection.schema_editor(atomic=False) as editor:
        if isinstance(wanted, models.Index):
            editor.remove_index(model, wanted, concurrently=True)
        else:
            editor.remove_constraint_concurrently(model, wanted)


def parts(lab: Lab, name: str = "by_size", table: str = "lab_upload") -> dict[str, tuple[str | None, bool]]:
    """The index's parts: {table: (attached to, valid)}."""
    return {on: (part_of, valid) for on, part_of, valid, _ in lab.execute(PARTS.format(table, name, name))}


@pytest.fixture
def uploads(lab: Lab) -> Lab:
    lab.create(Account, Upload)
    lab.execute(
        "INSERT INTO lab_account SELECT generate_series(1, 10)",
        "INSERT INTO lab_upload (account_id, at, size) "
        "SELECT 1 + i % 10, '2026-05-02'::timestamptz + i * interval '1 hour', i "
        "FROM generate_series(1, 2000) i",
    )
    return lab


def whole(lab: Lab, name: str = "by_size") -> bool:
    found = parts(lab, name)
    return set(found) == {"lab_upload", *lab.bounds("lab_upload")} and all(
        valid and part_of == (None if on == "lab_upload" else name) for on, (part_of, valid) in found.items()
    )


@pytest.mark.parametrize(
    "index",
    [
        INDEX,
        models.Index(fields=["size"], include=["account"], condition=models.Q(size__gt=5), name="by_size"),
        models.Index(models.F("size") % 7, models.F("at").desc(nulls_last=True), name="by_size"),
        models.Index(Lower(models.Value("{a} %s %%")), name="by_size"),
    ],
)
def test_an_index_is_built_and_removed(uploads: Lab, index: models.Index) -> None:
    add(uploads, index)
    assert whole(uploads)
    definitions = {
        d.partition(" USING ")[2]
        for *_, d in uploads.execute(PARTS.format("lab_upload", "by_size", "by_size"))
    }
    assert len(definitions) == 1
    add(uploads, index)  # nothing left to do
    remove(uploads, index)
    assert parts(uploads) == {}
    remove(uploads, index)


@pytest.mark.parametrize(
    ("constraint", "is_constraint"),
    [
        (UNIQUE, True),
        (
            models.UniqueConstraint(
                fields=["account", "at"], name="once", deferrable=models.Deferrable.DEFERRED
            ),
            True,
        ),
        (models.UniqueConstraint(fields=["account", "at"], name="once", nulls_distinct=False), True),
        (models.UniqueConstraint(fields=["account", "at"], name="once", include=["size"]), False),
        (
            models.UniqueConstraint(fields=["account", "at"], name="once", condition=models.Q(size__gt=5)),
            False,
        ),
    ],
)
def test_a_unique_constraint(uploads: Lab, constraint: models.UniqueConstraint, is_constraint: bool) -> None:
    add(uploads, constraint)
    assert whole(uploads, "once")
    count = uploads.value("SELECT count(*) FROM pg_constraint WHERE conname LIKE '%once%' AND contype = 'u'")
    assert count == (len(uploads.bounds("lab_upload")) + 1 if is_constraint else 0)
    assert uploads.value(
        "SELECT bool_and(indisunique) FROM pg_index WHERE indexrelid::regclass::text LIKE '%once%'"
    )
    add(uploads, constraint)
    remove(uploads, constraint)
    assert parts(uploads, "once") == {}


def build_only(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    wanted: models.Index | models.UniqueConstraint = INDEX,
    model: type[models.Model] = Upload,
) -> None:
    """As if a run had been killed before anything was attached."""

    def die(self: Builder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Builder, "_attach", die)
        add(lab, wanted, model)


def test_rows_that_are_there_twice_leave_nothing_that_refuses_rows(uploads: Lab) -> None:
    uploads.execute("INSERT INTO lab_upload (account_id, at) VALUES (1, '2026-06-02'), (1, '2026-06-02')")
    with pytest.raises(DDLError, match=r"build .* on public.lab_upload_y2026m06.*is duplicated"):
        add(uploads, UNIQUE)
    assert all(valid for on, (_, valid) in parts(uploads, "once").items() if on != "lab_upload")
    uploads.execute("DELETE FROM lab_upload WHERE at = '2026-06-02' AND account_id = 1")
    add(uploads, UNIQUE)
    assert whole(uploads, "once")


def test_what_an_earlier_run_left_is_gone_on_with(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid one is kept, an invalid one is built again, and those attached stay so."""
    build_only(uploads, monkeypatch)
    kept = uploads.value("SELECT 'lab_upload_y2026m05_by_size_idx'::regclass::oid::int8")
    uploads.execute(
        "UPDATE pg_index SET indisvalid = false "
        "WHERE indexrelid = 'lab_upload_y2026m06_by_size_idx'::regclass RETURNING 1",
        superuser=True,
    )
    broken = uploads.value("SELECT 'lab_upload_y2026m06_by_size_idx'::regclass::oid::int8")
    uploads.execute("ALTER INDEX by_size ATTACH PARTITION lab_upload_y2026m07_by_size_idx")
    monkeypatch.undo()
    add(uploads)
    assert whole(uploads)
    assert uploads.value("SELECT 'lab_upload_y2026m05_by_size_idx'::regclass::oid::int8") == kept
    assert uploads.value("SELECT 'lab_upload_y2026m06_by_size_idx'::regclass::oid::int8") != broken


def test_an_index_that_was_built_by_hand_is_taken(uploads: Lab) -> None:
    uploads.execute("CREATE INDEX mine ON lab_upload_y2026m05 (size, at DESC)")
    add(uploads)
    assert whole(uploads)
    assert uploads.value("SELECT to_regclass('lab_upload_y2026m05_by_size_idx')") is None


def test_a_rotation_goes_on_meanwhile(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an index is built a partition comes and the one that lacks it goes."""
    build_on = Builder._build_on

    def rotate(self: Builder, node: tree.Node, *, is_root: bool) -> None:
        if node.table.name == "lab_upload_y2026m06":
            monkeypatch.setattr(Builder, "_build_on", build_on)
            report = maintenance.rotate([Upload], using=ALIAS, now=NOW.replace(month=7))
            assert report.ok, list(report.failures())
            uploads.execute(
                f"ALTER TABLE lab_upload DETACH PARTITION {node.table.name}", f"DROP TABLE {node.table.name}"
            )
        build_on(self, node, is_root=is_root)

    monkeypatch.setattr(Builder, "_build_on", rotate)
    add(uploads)
    assert "lab_upload_y2026m09" in uploads.bounds("lab_upload")
    assert "lab_upload_y2026m06" not in uploads.bounds("lab_upload")
    assert whole(uploads)


def test_the_last_one_to_be_attached_goes_away(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL counts only when one is attached."""
    attach = Builder._attach_in_turns

    def detach(self: Builder, steps: list) -> object:
        monkeypatch.undo()
        done = attach(self, steps[1:])
        uploads.execute("ALTER TABLE lab_upload DETACH PARTITION lab_upload_y2026m07")
        return done

    monkeypatch.setattr(Builder, "_attach_in_turns", detach)
    add(uploads)
    assert whole(uploads)


def test_a_second_run_waits_for_the_first_and_gives_up(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_scaledb.postgres.session.OTHER_RUN_SECONDS", 0.2)
    oid = uploads.value("SELECT 'lab_upload'::regclass::oid::int8")
    uploads.session(autocommit=True).execute("SELECT pg_advisory_lock(%s, %s)", [builder.BUILDING_LOCK, oid])
    with pytest.raises(AnotherRunInProgress, match=r"removing an index of public\.lab_upload"):
        add(uploads)


def test_nobody_waits_behind_an_index_that_is_blocked(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has a transaction open that uses a partition: others do not notice that we wait for it."""
    monkeypatch.setattr("django.conf.settings.SCALEDB", {"DDL_DEADLINE": 1.5}, raising=False)
    holder = uploads.session()
    attach = Builder._attach

    sent: list[str] = []

    def listen(execute, query, *rest):
        sent.append(query)
        return execute(query, *rest)

    def hold(self: Builder) -> None:
        holder.execute("SELECT * FROM lab_upload WHERE at = '2026-06-02' AND size = 1")
        attach(self)

    write = "INSERT INTO lab_upload (account_id, at) VALUES (1, '2026-06-03')"
    with Traffic(uploads.session(), write) as traffic, uploads.queue() as queue:
        blocked_by = rf"attach .*pid {holder.info.backend_pid}"
        with monkeypatch.context() as patched, pytest.raises(LockNotAvailable, match=blocked_by):
            patched.setattr(Builder, "_attach", hold)
            with uploads.connection.execute_wrapper(listen):
                add(uploads)
    assert traffic.count > 100
    assert queue.longest < 0.5
    attached = [query for query in sent if "ATTACH PARTITION" in query]
    assert len(attached) == 2, "what is held by somebody is not even asked for"
    blocked = [on for on, (part_of, _) in parts(uploads).items() if part_of is None]
    assert sorted(blocked) == ["lab_upload", "lab_upload_y2026m06"]
    holder.rollback()
    add(uploads)
    assert whole(uploads)


def test_removal_waits_for_a_reader_without_a_queue(uploads: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    add(uploads)
    reader = uploads.session()
    reader.execute("SELECT * FROM lab_upload WHERE at = '2026-06-02'")
    remover = threading.Thread(target=lambda: (remove(uploads), uploads.connection.close()))
    with Traffic(uploads.session(), "SELECT count(*) FROM lab_upload") as traffic, uploads.queue() as queue:
        remover.start()
        time.sleep(1)
        assert whole(uploads)
        reader.rollback()
        remover.join(10)
    assert parts(uploads) == {}
    assert traffic.count > 50
    assert queue.longest < 0.5


def test_an_unfinished_one_is_removed_with_what_was_built(
    uploads: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_only(uploads, monkeypatch)
    assert len(parts(uploads)) == 4
    remove(uploads)
    assert parts(uploads) == {}


def test_an_index_of_the_same_name_is_not_taken_for_ours(uploads: Lab) -> None:
    uploads.execute("CREATE INDEX by_size ON lab_upload (at)")
    with pytest.raises(DDLError, match=r"has an index by_size already.*\(at\).*--fake"):
        add(uploads)
    remove(uploads)  # as Django would
    assert uploads.value("SELECT to_regclass('by_size')") is None


def test_partitions_of_partitions_and_names_that_are_taken_or_long(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:

    lab.execute(
        "CREATE TABLE wide (at timestamptz NOT NULL, size int) PARTITION BY RANGE (at)",
        f"CREATE TABLE \"{'p' * 50}_1\" PARTITION OF wide FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
        f"CREATE TABLE \"{'p' * 50}_2\" PARTITION OF wide FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')",
        "CREATE TABLE deep PARTITION OF wide FOR VALUES FROM ('2026-03-01') TO ('2026-05-01') "
        "PARTITION BY RANGE (at)",
        "CREATE TABLE deep_1 PARTITION OF deep FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')",
        "CREATE TABLE \"Deep 2\" PARTITION OF deep FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')",
        "CREATE TABLE deep_1_by_size_idx ()",
        "CREATE INDEX other ON wide (size)",
    )
    wide = models_for("wide")
    add(lab, INDEX, wide)
    found = lab.execute(
        "SELECT i.relname, x.indisvalid, h.inhparent::regclass::text FROM pg_class i "
        "JOIN pg_index x ON x.indexrelid = i.oid LEFT JOIN pg_inherits h ON h.inhrelid = i.oid "
        "WHERE i.relname LIKE '%by_size%' OR i.relname LIKE 'pppp%idx' AND i.relname NOT LIKE '%size_idx'"
    )
    names = {name for name, *_ in found}
    assert {"by_size", "deep_by_size_idx", "deep_1_by_size_idx2", "Deep 2_by_size_idx"} <= names
    assert all(valid for _, valid, _ in found)
    assert all(len(name.encode()) < 63 for name in names)
    remove(lab, INDEX, wide)
    once = models.UniqueConstraint(fields=["size", "at"], name="once")
    add(lab, once, wide)
    assert lab.value("SELECT count(*) FROM pg_constraint WHERE conname LIKE '%once%'") == 6
    remove(lab, once, wide)
    for wanted in (INDEX, once):  # neither of which comes to its end
        build_only(lab, monkeypatch, wanted, wide)
        remove(lab, wanted, wide)
    left = "SELECT string_agg(indexrelid::regclass::text, ' ') FROM pg_index WHERE indrelid = '{}'::regclass"
    assert lab.value(left.format("wide")) == "other"
    assert lab.value(left.format("deep")) == "deep_size_idx"
    assert lab.value(left.format('"Deep 2"')) == '"Deep 2_size_idx"'


def models_for(table: str) -> type[models.Model]:
    from django.apps.registry import Apps

    class Wide(models.Model):
        at = models.DateTimeField()
        size = models.IntegerField()

        class Meta:
            app_label = "lab"
            apps = Apps()
            db_table = table

    return Wide


def test_a_plain_table(lab: Lab) -> None:
    lab.execute("CREATE TABLE plain (id int, at timestamptz, size int)")
    plain = models_for("plain")
    add(lab, INDEX, plain)
    assert lab.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_size'::regclass")
    remove(lab, INDEX, plain)
    constraint = models.UniqueConstraint(fields=["size", "at"], name="once")
    for _ in range(2):
        add(lab, constraint, plain)
        assert lab.value("SELECT contype::text FROM pg_constraint WHERE conname = 'once'") == "u"
    remove(lab, constraint, plain)
    assert lab.value("SELECT to_regclass('once')") is None


def test_the_locks_are_those_that_postgresql_takes(uploads: Lab) -> None:
    """Each step as it would be run, in a transaction that is looked at and rolled back."""
    with uploads.connection.schema_editor() as editor:
        definitions = [Definition.of(wanted, Upload, editor) for wanted in (INDEX, UNIQUE)]
    for definition in definitions:
        session = uploads.session()
        session.execute("SELECT pg_backend_pid()")
        steps = list(Builder(uploads.connection, "lab_upload", definition).steps_to_add())
        assert [step.transactional for step in steps] == [True, False, False, False, True, True, True]
        for step in steps:
            session.execute("SAVEPOINT step")
            before = locks_of(session)
            for statement in step.statements:
                text = statement.query.as_string(session).replace(" CONCURRENTLY", "")
                session.execute(text)  # type: ignore[arg-type]
            taken = {table: mode for table, mode in locks_of(session).items() if before.get(table) != mode}
            declared = {str(lock.table): lock.mode.value for lock in step.locks}
            weak = ("AccessShareLock", "ShareUpdateExclusiveLock")
            assert {table: mode for table, mode in taken.items() if mode not in weak} == {
                table: mode
                for table, mode in declared.items()
                if mode not in weak and not table.endswith("_idx")
            } or not step.transactional, step.summary
        session.rollback()


def locks_of(session) -> dict[str, str]:
    order = [mode.value for mode in LockMode]
    found: dict[str, str] = {}
    for name, mode in session.execute(
        "SELECT n.nspname || '.' || c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
        "JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE l.pid = pg_backend_pid() AND c.relkind IN ('r', 'p') AND n.nspname = 'public'"
    ):
        if order.index(mode) >= order.index(found.get(name, order[0])):
            found[name] = mode
    return found
