"""Rotation end to end: what it makes, takes off, drops, leaves alone, and whom it tells."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from django.db import connections, transaction
from psycopg import sql

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import catalog, hooks, maintenance, registry, work
from django_scaledb.partitions.bounds import sort_key
from django_scaledb.partitions.plan import Drop, Settle
from django_scaledb.partitions.report import Report, Status
from django_scaledb.partitions.work import Worker
from django_scaledb.postgres.executor import Executor
from django_scaledb.postgres.statements import Statement
from tests.lab import NOW, Account, Lab, Plain, Span, Trace, Traffic, Upload


def rotate(lab: Lab, *models: type, now: datetime = NOW, **options: Any) -> Report:
    options = {"lock_timeout": 200, "deadline": 5.0} | options
    return maintenance.rotate(models, using="lab", now=now, **options)


def done(report: Report) -> list[str]:
    """``create lab_plain_y2026m05``, in the order in which it was done; all must have been."""
    assert report.ok, list(report.failures()) or report.error
    results = [result for model in report.models for result in model.results]
    assert {result.status for result in results} <= {Status.DONE}
    return [f"{result.action} {result.partition.name}" for result in results if result.partition]


def foreign_keys_of(lab: Lab, table: str) -> int:
    count: int = lab.value(
        f"SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = '{table}'::regclass"
    )
    return count


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Changes a model's PartitioningMeta for one test: ``meta(Upload, retention="1 month")``."""

    def change(model: Any, **attrs: Any) -> None:
        for name, value in attrs.items():
            monkeypatch.setitem(model._partitioning_meta.attrs, name, value)

    return change


# -- creating


def test_an_empty_set_gets_the_current_period_and_premake_more(lab: Lab) -> None:
    lab.create(Plain)
    lab.execute("DROP TABLE lab_plain_y2026m05, lab_plain_y2026m06")
    assert done(rotate(lab, Plain)) == ["create lab_plain_y2026m05", "create lab_plain_y2026m06"]
    assert lab.bounds("lab_plain") == {
        "lab_plain_y2026m05": "FOR VALUES FROM ('2026-05-01 00:00:00+00') TO ('2026-06-01 00:00:00+00')",
        "lab_plain_y2026m06": "FOR VALUES FROM ('2026-06-01 00:00:00+00') TO ('2026-07-01 00:00:00+00')",
    }
    assert rotate(lab, Plain).is_empty


def test_bounds_do_not_depend_on_the_connections_time_zone(lab: Lab) -> None:
    lab.create(Plain)
    with lab.connection.cursor() as cursor:
        cursor.execute("SET timezone = 'America/St_Johns'; SET datestyle = 'SQL, DMY'")
    rotate(lab, Plain, now=datetime(2026, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
    bounds = lab.bounds("lab_plain")
    assert bounds["lab_plain_y2027m01"] == (
        "FOR VALUES FROM ('2027-01-01 00:00:00+00') TO ('2027-02-01 00:00:00+00')"
    )
    assert len(bounds) == 9
    with lab.connection.cursor() as cursor:
        cursor.execute("SHOW timezone")
        assert cursor.fetchone() == ("America/St_Johns",)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
@pytest.mark.parametrize(
    ("interval", "moments"),
    [
        ("1 hour", ["2024-03-30T11:07:00Z", "2024-03-31T00:30:00Z", "2024-03-31T23:59:59Z"]),
        ("6 hours", ["2026-10-24T22:13:07Z", "2026-10-25T00:30:00Z", "2026-10-31T23:59:59Z"]),
        ("1 day", ["2024-02-29T23:59:59Z", "2024-03-31T00:07:00Z", "2024-04-01T11:59:59Z"]),
        ("5 days", ["2024-02-29T23:59:59Z", "2024-03-31T01:07:00Z", "2024-12-31T23:59:59Z"]),
        ("1 week", ["2026-03-29T01:30:00Z", "2026-12-31T23:59:59Z", "2027-03-28T01:30:00Z"]),
        ("1 month", ["2024-02-29T23:59:59Z", "2026-12-31T23:59:59Z", "2028-02-29T03:01:00Z"]),
        ("3 months", ["2024-02-29T23:59:59Z", "2026-12-31T23:59:59Z", "2035-07-01T03:01:00Z"]),
        ("1 quarter", ["2024-02-29T23:59:59Z", "2026-12-31T23:59:59Z", "2035-07-01T03:01:00Z"]),
        ("1 year", ["2024-02-29T23:59:59Z", "2026-12-31T23:59:59Z", "2052-02-29T12:01:00Z"]),
        ("2 years", ["2023-02-28T23:59:59Z", "2026-12-31T23:59:59Z", "2051-07-01T03:01:00Z"]),
    ],
)
def test_runs_years_apart_leave_neither_gap_nor_overlap(
    lab: Lab, meta: Any, interval: str, moments: list[str], zone: str
) -> None:
    """PostgreSQL itself refuses overlaps; gaps are looked for, in another time zone than the run's."""
    meta(Plain, interval=interval, time_zone=zone)
    times = [datetime.fromisoformat(moment) for moment in moments]
    lab.create(Plain, now=times[0])
    for position, now in enumerate(times):
        with lab.connection.cursor() as cursor:
            cursor.execute("SELECT set_config('TimeZone', %s, false)", [f"Etc/GMT-{position * 5}"])
        assert rotate(lab, Plain, now=now).ok
        assert rotate(lab, Plain, now=now).is_empty
        config = registry.config_for(Plain)
        [found] = catalog.read(lab.connection, ["lab_plain"])
        assert found is not None
        ranges = [p.range for p in found.partitions(config) if p.range]
        ranges.sort(key=lambda r: sort_key(r.lower))
        assert all(left.upper == right.lower for left, right in itertools.pairwise(ranges))
        assert ranges[0].lower <= times[0]
        ahead = [r for r in ranges if r.lower > now]
        assert len(ahead) == config.premake
        starts = [config.interval.start_of(r.lower, config.zone) for r in ranges]
        assert starts == [r.lower for r in ranges], "each begins where the calendar says"


def test_gaps_are_filled(lab: Lab) -> None:
    lab.create(Plain, now=datetime(2026, 1, 1, tzinfo=UTC))
    rotate(lab, Plain)
    lab.execute("DROP TABLE lab_plain_y2026m03")
    assert done(rotate(lab, Plain)) == ["create lab_plain_y2026m03"]


def test_a_new_partition_is_like_its_siblings(lab: Lab) -> None:
    """Defaults, checks, indexes, keys, comments, owner; no identity of its own."""
    lab.create(Account, Upload)
    lab.execute(
        "ALTER TABLE lab_upload ADD CONSTRAINT size_positive CHECK (size >= 0)",
        "ALTER TABLE lab_upload ALTER COLUMN size SET DEFAULT 7, ALTER COLUMN size SET STATISTICS 50",
        "COMMENT ON COLUMN lab_upload.size IS 'in bytes'",
        "CREATE STATISTICS size_at ON size, at FROM lab_upload",
        "ALTER TABLE lab_upload ADD COLUMN doubled bigint GENERATED ALWAYS AS (size * 2) STORED",
    )
    rotate(lab, Upload, now=NOW + timedelta(days=31))
    lab.execute("INSERT INTO lab_account VALUES (1)")
    lab.execute("INSERT INTO lab_upload (at, account_id) VALUES ('2026-08-03', 1)")
    assert lab.execute("SELECT tableoid::regclass::text, size, doubled FROM lab_upload") == [
        ("lab_upload_y2026m08", 7, 14)
    ]
    with pytest.raises(psycopg.errors.CheckViolation, match="size_positive"):
        lab.execute("INSERT INTO lab_upload (at, size) VALUES ('2026-08-03', -1)")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        lab.execute("INSERT INTO lab_upload (at, account_id) VALUES ('2026-08-03', 99)")
    made, sibling = (
        lab.execute(
            "SELECT array_agg(contype::text || convalidated ORDER BY contype, conname) FROM pg_constraint "
            f"WHERE conrelid = '{name}'::regclass"
        )
        for name in ("lab_upload_y2026m08", "lab_upload_y2026m05")
    )
    assert made == sibling
    assert lab.value("SELECT col_description('lab_upload_y2026m08'::regclass, 4)") == "in bytes"
    assert lab.value(
        "SELECT count(*) FROM pg_index WHERE indrelid = 'lab_upload_y2026m08'::regclass"
    ) == lab.value("SELECT count(*) FROM pg_index WHERE indrelid = 'lab_upload_y2026m05'::regclass")


def test_the_owner_is_the_parents(lab: Lab) -> None:
    """Somebody with the owner's rights rotates: the partition is the owner's nevertheless."""
    lab.create(Plain)
    lab.execute("CREATE ROLE lab_owner", "GRANT lab_owner TO app", superuser=True)
    try:
        lab.execute(
            "ALTER TABLE lab_plain OWNER TO lab_owner",
            "GRANT ALL ON SCHEMA public TO lab_owner",
            superuser=True,
        )
        assert done(rotate(lab, Plain, now=NOW + timedelta(days=31))) == ["create lab_plain_y2026m07"]
        assert (
            lab.value("SELECT tableowner FROM pg_tables WHERE tablename = 'lab_plain_y2026m07'")
            == "lab_owner"
        )
    finally:
        lab.execute("DROP OWNED BY lab_owner", "DROP ROLE lab_owner", superuser=True)


def test_a_table_of_somebody_else_is_refused_with_what_to_do(lab: Lab) -> None:
    lab.create(Plain)
    lab.execute("ALTER TABLE lab_plain OWNER TO postgres", superuser=True)
    report = rotate(lab, Plain, now=NOW + timedelta(days=31))
    ((label, reason),) = report.failures()
    assert label == "lab.Plain"
    assert "public.lab_plain belongs to the role 'postgres'" in reason
    assert "connect as 'postgres', or GRANT that role to 'app'" in reason
    assert rotate(lab, Plain).is_empty  # nothing to do is no failure


def test_a_name_that_is_taken_is_numbered(lab: Lab) -> None:
    lab.create(Plain)
    lab.execute("CREATE TABLE lab_plain_y2026m07 ()", "CREATE TYPE lab_plain_y2026m07_2 AS ENUM ()")
    assert done(rotate(lab, Plain, now=NOW + timedelta(days=31))) == ["create lab_plain_y2026m07_3"]


def test_a_hand_made_partition_counts(lab: Lab) -> None:
    lab.create(Plain)
    lab.execute(
        "CREATE TABLE mine PARTITION OF lab_plain FOR VALUES FROM ('2026-07-01+00') TO ('2026-08-01+00')"
    )
    assert rotate(lab, Plain, now=NOW + timedelta(days=31)).is_empty


def test_a_span_is_created_and_nothing_else(lab: Lab) -> None:
    lab.create(Plain)

    def span() -> Report:
        return maintenance.create_span(
            [Plain], datetime(2020, 2, 29, tzinfo=UTC), datetime(2020, 4, 1, tzinfo=UTC), using="lab", now=NOW
        )

    assert done(span()) == ["create lab_plain_y2020m02", "create lab_plain_y2020m03"]
    assert span().is_empty


# -- retention


def test_retention_detaches_settles_and_later_drops(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, now=datetime(2026, 1, 9, tzinfo=UTC))
    lab.execute(
        "INSERT INTO lab_account VALUES (1)",
        "INSERT INTO lab_upload (at, account_id) VALUES ('2026-01-03', 1), ('2026-03-05', 1)",
    )
    meta(Upload, retention="3 months", retention_action="drop", detached_for="10 days")
    first = done(rotate(lab, Upload))
    assert first[-1] == "detach lab_upload_y2026m01"
    assert [line for line in first if "detach" in line] == ["detach lab_upload_y2026m01"]
    assert "lab_upload_y2026m01" not in lab.bounds("lab_upload")
    assert lab.value("SELECT count(*) FROM lab_upload_y2026m01") == 1
    comment = lab.comment("lab_upload_y2026m01") or ""
    assert '"state":"detached"' in comment
    assert '"detached_at":"2026-05-17T13:07:11+00:00"' in comment
    # What it pointed at can be deleted: no foreign key is left of a table that nobody sees.
    assert foreign_keys_of(lab, "lab_upload_y2026m01") == 0
    lab.execute("DELETE FROM lab_upload", "DELETE FROM lab_account")

    assert rotate(lab, Upload, now=NOW + timedelta(days=9, hours=23)).is_empty
    assert done(rotate(lab, Upload, now=NOW + timedelta(days=10))) == ["drop lab_upload_y2026m01"]
    assert "lab_upload_y2026m01" not in lab.tables()
    assert rotate(lab, Upload, now=NOW + timedelta(days=10)).is_empty


def test_detach_keeps_the_table(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    meta(Plain, retention="3 months")
    assert "detach lab_plain_y2026m01" in done(rotate(lab, Plain))
    assert rotate(lab, Plain, now=NOW + timedelta(days=10)).is_empty
    assert "lab_plain_y2026m01" in lab.tables()


def test_hand_made_partitions_and_the_last_one_stay(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    lab.execute("COMMENT ON TABLE lab_plain_y2026m01 IS NULL")
    meta(Plain, retention="1 month")
    report = rotate(lab, Plain, now=datetime(2027, 1, 1, tzinfo=UTC), create=False)
    assert report.is_empty
    assert len(lab.bounds("lab_plain")) == 2


def test_the_last_one_stays_as_long_as_no_newer_one_could_be_made(
    lab: Lab, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    lab.execute(
        "CREATE TABLE lab_plain_default PARTITION OF lab_plain DEFAULT",
        *(f"INSERT INTO lab_plain (at) VALUES ('2026-{month}-17')" for month in range(3, 8)),
    )
    monkeypatch.setattr(work, "MOVED_ROWS", 0)  # so that no partition can be made
    meta(Plain, retention="1 month")
    report = rotate(lab, Plain, now=datetime(2026, 6, 17, tzinfo=UTC))
    assert [r.status for r in report.models[0].results if r.action == "detach"] == [
        Status.DONE,
        Status.SKIPPED,
    ]
    assert set(lab.bounds("lab_plain")) == {"lab_plain_y2026m02", "lab_plain_default"}


def test_what_was_put_back_by_hand_stays(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    meta(Plain, retention="3 months", retention_action="drop", detached_for="1 day")
    rotate(lab, Plain)
    lab.execute(
        "ALTER TABLE lab_plain ATTACH PARTITION lab_plain_y2026m01 "
        "FOR VALUES FROM ('2026-01-01+00') TO ('2026-02-01+00')"
    )
    assert rotate(lab, Plain, now=NOW + timedelta(days=5)).is_empty
    assert "lab_plain_y2026m01" in lab.bounds("lab_plain")


def test_what_was_detached_by_hand_is_nobodys(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    rotate(lab, Plain)
    lab.execute("ALTER TABLE lab_plain DETACH PARTITION lab_plain_y2026m01")
    meta(Plain, retention="2 months", retention_action="drop", detached_for="1 day")
    assert "lab_plain_y2026m01" not in " ".join(done(rotate(lab, Plain, now=NOW + timedelta(days=5))))
    assert "lab_plain_y2026m01" in lab.tables()


@pytest.mark.parametrize(
    "meanwhile",
    [
        "ALTER TABLE lab_plain ATTACH PARTITION lab_plain_y2026m01 "
        "FOR VALUES FROM ('2026-01-01+00') TO ('2026-02-01+00')",
        "COMMENT ON TABLE lab_plain_y2026m01 IS 'precious'",
        "ALTER TABLE lab_plain_y2026m01 RENAME TO precious",
        "DROP TABLE lab_plain_y2026m01",
    ],
)
@pytest.mark.parametrize("kind", ["drop", "settle"])
def test_the_mark_is_read_again_under_the_lock(lab: Lab, meta: Any, meanwhile: str, kind: str) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    meta(Plain, retention="3 months", retention_action="drop", detached_for="1 day")
    rotate(lab, Plain)
    if kind == "settle":
        lab.execute(
            "DO $$ BEGIN EXECUTE format('COMMENT ON TABLE lab_plain_y2026m01 IS %L', replace("
            "obj_description('lab_plain_y2026m01'::regclass), '\"detached\"', '\"retiring\"')); END $$"
        )
    (found,) = catalog.read(lab.connection, ["lab_plain"])
    assert found is not None
    config = registry.config_for(Plain)
    (partition,) = (p for p in found.partitions(config) if p.table.name == "lab_plain_y2026m01")
    worker = Worker(lab.connection, Plain, config, found, NOW, drain_default=False)
    with Executor(lab.connection, command="test", lock_timeout=200, deadline=1) as door:
        (task,) = worker.tasks(Drop(partition) if kind == "drop" else Settle(partition))
        lab.execute(meanwhile)
        before = lab.tables()
        with pytest.raises(DDLError):
            door.run(task.step, guard=task.guard)
    assert lab.tables() == before


def test_rows_that_are_referenced_keep_their_partition(lab: Lab, meta: Any) -> None:
    lab.create(Trace, Span, now=datetime(2026, 1, 9, tzinfo=UTC))
    january = "019bb000-0000-7000-8000-000000000000"
    lab.execute(
        f"INSERT INTO lab_trace VALUES ('{january}')", f"INSERT INTO lab_span (trace_id) VALUES ('{january}')"
    )
    meta(Trace, retention="2 months")
    report = rotate(lab, Trace)
    assert not report.ok
    ((_, reason),) = report.failures()
    assert 'still referenced from table "lab_span"' in reason
    assert "delete or re-point the rows that reference it, or lengthen the retention" in reason
    by_action = {r.partition.name: r.status for r in report.models[0].results if r.action == "detach"}
    assert by_action == {"lab_trace_y2026m01": Status.FAILED, "lab_trace_y2026m02": Status.DONE}
    assert lab.value("SELECT count(*) FROM lab_trace") == 1
    lab.execute("DELETE FROM lab_span")
    assert done(rotate(lab, Trace)) == ["detach lab_trace_y2026m01"]


# -- default partitions


def with_default(lab: Lab, rows: int) -> None:
    lab.create(Account, Upload)
    lab.execute(
        "CREATE TABLE lab_upload_rest PARTITION OF lab_upload DEFAULT",
        "INSERT INTO lab_account VALUES (1)",
        "INSERT INTO lab_upload (account_id, at, size) SELECT 1, timestamptz '2026-08-01 00:00+00' + "
        f"n * interval '1 second', n FROM generate_series(0, {rows - 1}) n",
        "INSERT INTO lab_upload (account_id, at) VALUES (1, '2030-01-01')",
    )


def test_rows_are_moved_out_of_the_default_partition(lab: Lab) -> None:
    with_default(lab, 500)
    lab.execute(
        "CREATE TABLE seen (op text)",
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO seen VALUES (tg_op); RETURN NULL; END $$",
        "CREATE TRIGGER by_row AFTER INSERT OR DELETE ON lab_upload FOR EACH ROW EXECUTE FUNCTION see()",
        "CREATE TRIGGER by_statement AFTER DELETE ON lab_upload_rest EXECUTE FUNCTION see()",
        "CREATE TRIGGER off AFTER DELETE ON lab_upload_rest EXECUTE FUNCTION see()",
        "ALTER TABLE lab_upload_rest DISABLE TRIGGER off",
    )
    assert "create lab_upload_y2026m08" in done(rotate(lab, Upload, now=NOW + timedelta(days=31)))
    assert lab.execute(
        "SELECT tableoid::regclass::text, count(*), sum(size) FROM lab_upload GROUP BY 1 ORDER BY 1"
    ) == [("lab_upload_rest", 1, 0), ("lab_upload_y2026m08", 500, 499 * 250)]
    assert lab.value("SELECT count(*) FROM seen") == 0
    assert lab.execute(
        "SELECT tgname, tgenabled FROM pg_trigger WHERE tgrelid = 'lab_upload_rest'::regclass "
        "AND NOT tgisinternal ORDER BY 1"
    ) == [("by_row", "O"), ("by_statement", "O"), ("off", "D")]
    assert rotate(lab, Upload, now=NOW + timedelta(days=31)).is_empty


def test_many_rows_are_moved_only_when_asked_to(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MOVED_ROWS", 100)
    with_default(lab, 101)
    now = NOW + timedelta(days=31)
    report = rotate(lab, Upload, now=now)
    ((_, reason),) = report.failures()
    assert "lab_upload_rest holds more than 100 of its rows" in reason
    assert "manage.py create_partitions lab.Upload --drain-default" in reason
    assert done(rotate(lab, Upload, now=now, drain_default=True)) == ["create lab_upload_y2026m08"]
    assert lab.value("SELECT count(*) FROM lab_upload_y2026m08") == 101


def test_a_default_partition_is_made_where_the_model_wants_one(lab: Lab, meta: Any) -> None:
    lab.create(Plain)
    meta(Plain, default_partition=True)
    assert done(rotate(lab, Plain)) == ["create default lab_plain_default"]
    assert rotate(lab, Plain).is_empty


def test_beside_a_default_partition_a_detach_is_plain(lab: Lab, meta: Any) -> None:
    """It needs the whole set for a moment, and asks for it without a queue."""
    lab.create(Account, Upload, now=datetime(2026, 1, 9, tzinfo=UTC))
    lab.execute("CREATE TABLE lab_upload_rest PARTITION OF lab_upload DEFAULT")
    rotate(lab, Upload)
    meta(Upload, retention="3 months")
    reader = lab.session()
    reader.execute("SELECT count(*) FROM lab_upload")
    with lab.queue() as queue, Traffic(lab.session(), "SELECT count(*) FROM lab_upload") as traffic:
        report = rotate(lab, Upload, deadline=1.0)
        assert [r.status for r in report.models[0].results] == [Status.FAILED]
    assert traffic.count > 20
    assert queue.longest < 0.1
    assert "lab_upload_y2026m01" in lab.bounds("lab_upload")
    reader.rollback()
    assert done(rotate(lab, Upload)) == ["detach lab_upload_y2026m01"]
    assert '"state":"detached"' in (lab.comment("lab_upload_y2026m01") or "")


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL"])
def test_rows_under_an_acting_foreign_key_are_not_moved(lab: Lab, action: str) -> None:
    lab.create(Trace)
    august = "019fbbbb-0000-7000-8000-000000000000"
    lab.execute(
        "CREATE TABLE rest PARTITION OF lab_trace DEFAULT",
        f"CREATE TABLE child (trace_id uuid REFERENCES lab_trace ON DELETE {action})",
        f"INSERT INTO lab_trace VALUES ('{august}')",
        f"INSERT INTO child VALUES ('{august}')",
    )
    report = rotate(lab, Trace, now=NOW + timedelta(days=70))
    assert any("ON DELETE CASCADE or SET" in reason for _, reason in report.failures())
    assert lab.execute("SELECT trace_id IS NOT NULL FROM child") == [(True,)]


def test_referenced_rows_of_a_default_partition_are_not_moved(lab: Lab) -> None:
    lab.create(Trace, Span)
    august = "019fbbbb-0000-7000-8000-000000000000"
    lab.execute(
        "CREATE TABLE rest PARTITION OF lab_trace DEFAULT",
        f"INSERT INTO lab_trace VALUES ('{august}')",
        f"INSERT INTO lab_span (trace_id) VALUES ('{august}')",
    )
    report = rotate(lab, Trace, now=NOW + timedelta(days=70))
    assert any("cannot move a row out of the default partition" in reason for _, reason in report.failures())
    assert lab.value("SELECT count(*) FROM lab_trace") == 1
    lab.execute("DELETE FROM lab_span")
    rotate(lab, Trace, now=NOW + timedelta(days=70))
    assert lab.value("SELECT tableoid::regclass::text FROM lab_trace") == "lab_trace_y2026m08"


# -- what earlier runs left


def interrupt(lab: Lab, table: str, partition: str) -> None:
    """Leave a DETACH CONCURRENTLY pending, as a cancelled one does."""
    reader, worker = lab.session(), lab.session(autocommit=True)
    reader.execute(f"SELECT count(*) FROM {table}")  # type: ignore[arg-type]
    worker.execute("SET lock_timeout = '50ms'")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        worker.execute(f"ALTER TABLE {table} DETACH PARTITION {partition} CONCURRENTLY")  # type: ignore[arg-type]
    reader.rollback()


def test_an_interrupted_detach_of_ours_is_finished_and_settled(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, now=datetime(2026, 1, 9, tzinfo=UTC))
    rotate(lab, Upload)
    lab.execute(
        'COMMENT ON TABLE lab_upload_y2026m01 IS \'django_scaledb:{"v":1,"state":"retiring",'
        '"parent":["public","lab_upload"]}\''
    )
    interrupt(lab, "lab_upload", "lab_upload_y2026m01")
    meta(Upload, retention="2 months")
    assert done(rotate(lab, Upload)) == [
        "finalize lab_upload_y2026m01",
        "settle lab_upload_y2026m01",
        "detach lab_upload_y2026m02",
    ]
    assert '"state":"detached"' in (lab.comment("lab_upload_y2026m01") or "")
    assert rotate(lab, Upload).is_empty


def test_an_interrupted_detach_of_somebody_else_is_finished(lab: Lab) -> None:
    lab.create(Plain)
    interrupt(lab, "lab_plain", "lab_plain_y2026m06")
    # The range refused inserts; it is free again in the same run.
    assert done(rotate(lab, Plain)) == ["finalize lab_plain_y2026m06", "create lab_plain_y2026m06_2"]
    assert "lab_plain_y2026m06" in lab.tables()


def test_a_detach_that_is_left_pending_holds_up_the_other_detaches(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    rotate(lab, Plain)
    interrupt(lab, "lab_plain", "lab_plain_y2026m01")
    reader = lab.session()
    reader.execute("SELECT count(*) FROM lab_plain_y2026m01")
    meta(Plain, retention="2 months")
    report = rotate(lab, Plain, deadline=1.0)
    assert [(r.action, r.status) for r in report.models[0].results] == [
        ("finalize", Status.FAILED),
        ("detach", Status.SKIPPED),
    ]
    assert "lab_plain_y2026m02" in lab.bounds("lab_plain")
    reader.rollback()
    assert done(rotate(lab, Plain)) == ["finalize lab_plain_y2026m01", "detach lab_plain_y2026m02"]


def test_a_detached_table_that_was_not_settled_is(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, now=datetime(2026, 1, 9, tzinfo=UTC))
    rotate(lab, Upload)
    lab.execute(
        'COMMENT ON TABLE lab_upload_y2026m01 IS \'django_scaledb:{"v":1,"state":"retiring",'
        '"parent":["public","lab_upload"]}\'',
        "ALTER TABLE lab_upload DETACH PARTITION lab_upload_y2026m01",
    )
    assert done(rotate(lab, Upload)) == ["settle lab_upload_y2026m01"]
    assert foreign_keys_of(lab, "lab_upload_y2026m01") == 0


# -- several models, several runs


def test_what_fails_or_is_blocked_stays_with_its_model(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, Plain)  # Trace has no table
    writer = lab.session(application_name="batch job")
    writer.execute("LOCK TABLE lab_account IN ROW EXCLUSIVE MODE")
    begun = time.monotonic()
    report = rotate(lab, Trace, Upload, Plain, now=NOW + timedelta(days=31), deadline=1.5)
    assert time.monotonic() - begun < 4
    reasons = dict(report.failures())
    assert set(reasons) == {"lab.Trace", "lab.Upload"}
    assert "run manage.py migrate" in reasons["lab.Trace"]
    assert f"pid {writer.info.backend_pid}" in reasons["lab.Upload"]
    assert [r.status for r in report.models[2].results] == [Status.DONE]
    assert not any(name.startswith("lab_upload_y2026m08") for name in lab.tables())


@pytest.mark.parametrize("table", ["lab_upload", "lab_upload_rest"])
def test_a_table_that_somebody_has_for_himself_stops_its_model_alone(lab: Lab, table: str) -> None:
    """With PostgreSQL 17 and later pg_get_expr would wait for him, as pg_partition_tree always did."""
    lab.create(Account, Upload, Plain)
    lab.execute("CREATE TABLE lab_upload_rest PARTITION OF lab_upload DEFAULT")
    other = lab.session()
    other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")  # type: ignore[arg-type]
    begun = time.monotonic()
    report = rotate(lab, Upload, Plain, now=NOW + timedelta(days=31), deadline=1.5)
    assert time.monotonic() - begun < 4
    ((label, reason),) = report.failures()
    assert label == "lab.Upload"
    assert f"pid {other.info.backend_pid}" in reason
    assert [r.status for r in report.models[1].results] == [Status.DONE]
    other.rollback()
    assert done(rotate(lab, Upload, now=NOW + timedelta(days=31))) == ["create lab_upload_y2026m08"]


def test_a_blocked_model_does_not_use_up_the_time_of_the_others(lab: Lab) -> None:
    lab.create(Account, Upload, Plain)
    writer = lab.session()
    writer.execute("LOCK TABLE lab_account IN ROW EXCLUSIVE MODE")
    made: dict[str, float] = {}
    begun = time.monotonic()

    class Clock(maintenance.Listener):
        def on_result(self, model: Any, result: Any) -> None:
            made[model.label] = time.monotonic() - begun
            if model.label == "lab.Plain":
                threading.Timer(0.5, writer.rollback).start()

    report = rotate(lab, Upload, Plain, now=NOW + timedelta(days=31), deadline=20.0, listener=Clock())
    assert done(report) == ["create lab_upload_y2026m08", "create lab_plain_y2026m07"]
    assert made["lab.Plain"] < 3
    assert made["lab.Plain"] < made["lab.Upload"] < 8


def test_all_models_are_given_partitions_before_any_loses_one(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    order: list[str] = []

    class Order(maintenance.Listener):
        def on_result(self, model: Any, result: Any) -> None:
            order.append(result.action)

    meta(Upload, retention="3 months")
    meta(Plain, retention="3 months")
    rotate(lab, Upload, Plain, listener=Order())
    assert order == sorted(order)
    assert set(order) == {"create", "detach"}


def test_of_two_runs_at_once_both_come_to_a_good_end(lab: Lab, meta: Any) -> None:
    lab.create(Plain, now=datetime(2025, 1, 9, tzinfo=UTC))
    meta(Plain, retention="3 months")
    reports: list[Report] = []

    def run() -> None:
        try:
            reports.append(rotate(lab, Plain))
        finally:
            connections["lab"].close()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.ok for report in reports] == [True] * 3
    assert sum(bool(report.models[0].results) for report in reports) == 1
    assert rotate(lab, Plain).is_empty


def test_nothing_to_do_is_found_out_while_another_run_works(lab: Lab) -> None:
    lab.create(Plain)
    with Executor(lab.connection, command="test", lock_timeout=200, deadline=1):
        reports: list[Report] = []
        thread = threading.Thread(target=lambda: reports.append(rotate(lab, Plain)))
        thread.start()
        thread.join()
    assert reports[0].is_empty


def test_a_dry_run_changes_nothing_and_shows_all(lab: Lab, meta: Any) -> None:
    lab.create(Account, Upload, now=datetime(2026, 1, 9, tzinfo=UTC))
    meta(Upload, retention="3 months")
    before, bounds = lab.tables(), lab.bounds("lab_upload")
    report = rotate(lab, Upload, dry_run=True)
    assert report.ok
    assert (lab.tables(), lab.bounds("lab_upload")) == (before, bounds)
    *creates, detach = report.models[0].results
    assert {result.status for result in report.models[0].results} == {Status.PLANNED}
    assert [r.partition.name for r in creates if r.partition] == [
        "lab_upload_y2026m04",
        "lab_upload_y2026m05",
        "lab_upload_y2026m06",
        "lab_upload_y2026m07",
    ]
    texts = [sent.sql for sent in detach.sent]
    assert (
        'ALTER TABLE "public"."lab_upload" DETACH PARTITION "public"."lab_upload_y2026m01" CONCURRENTLY'
        in texts
    )
    assert any("DROP CONSTRAINT" in text for text in texts)


def test_inside_a_transaction_partitions_can_be_made(lab: Lab) -> None:
    """A test or a data migration may want some; it sees them, and nobody else until it commits."""
    lab.create(Plain)
    with transaction.atomic(using="lab"):
        assert done(rotate(lab, Plain, now=NOW + timedelta(days=31))) == ["create lab_plain_y2026m07"]
    assert "lab_plain_y2026m07" in lab.bounds("lab_plain")


def test_an_unreachable_database_is_one_failure(lab: Lab) -> None:
    lab.create(Plain)
    lab.connection.close()
    connections["lab"].settings_dict["PORT"] = "1"
    report = rotate(lab, Plain)
    assert not report.ok
    assert report.error is not None
    assert report.as_json()["error"]["type"] == "OperationalError"


# -- other features


def test_hooks_take_part_once_and_in_the_same_transaction(lab: Lab, meta: Any) -> None:
    """What a hook writes when a partition leaves is there exactly once, also after a failure in between."""
    lab.create(Plain, now=datetime(2026, 1, 9, tzinfo=UTC))
    lab.execute("CREATE TABLE ledger (what text)", "ALTER TABLE ledger OWNER TO app", superuser=False)
    meta(Plain, retention="3 months")

    def note(what: str) -> Any:
        def build(connection: Any, model: Any, table: Any) -> list[Statement]:
            assert model is Plain
            text = sql.SQL("INSERT INTO ledger VALUES ({})").format(sql.Literal(f"{what} {table.name}"))
            return [Statement(text)]

        return build

    hook = hooks.Hook(on_create=note("create"), on_settle=note("settle"))
    hooks.register(hook)
    try:
        lab.execute("ALTER TABLE ledger ADD CHECK (what NOT LIKE 'settle%')")
        report = rotate(lab, Plain)
        assert not report.ok
        assert lab.value("SELECT count(*) FROM ledger WHERE what LIKE 'settle%'") == 0
        assert '"state":"retiring"' in (lab.comment("lab_plain_y2026m01") or "")
        lab.execute("ALTER TABLE ledger DROP CONSTRAINT ledger_what_check")
        assert rotate(lab, Plain).ok
        assert rotate(lab, Plain).is_empty
    finally:
        hooks.unregister(hook)
    written = [what for (what,) in lab.execute("SELECT what FROM ledger ORDER BY what")]
    assert written == [
        *(f"create lab_plain_y2026m0{month}" for month in (3, 4, 5, 6)),
        "settle lab_plain_y2026m01",
    ]
