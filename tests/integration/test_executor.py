"""The one door for DDL: what it locks, for whom it waits, what it leaves behind."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import pytest
from django.db import transaction
from django.test.utils import CaptureQueriesContext
from psycopg import sql

from django_scaledb.exceptions import AnotherRunInProgress, DDLError, LockNotAvailable
from django_scaledb.partitions import catalog, ddl, inspection, registry
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.marker import MarkState
from django_scaledb.postgres.executor import RUN_LOCK, Executor, Waiting, script
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.session import RunSession
from django_scaledb.postgres.statements import Statement, Step
from tests.lab import NOW, Account, Lab, Plain, Span, Trace, Traffic, Upload, eventually

JULY = Range(datetime(2026, 8, 1, tzinfo=UTC), datetime(2026, 9, 1, tzinfo=UTC))
SETTINGS = "application_name", "lock_timeout", "statement_timeout", "client_connection_check_interval"


def executor(lab: Lab, *, deadline: float = 5, lock_timeout: int = 200, **options: object) -> Executor:
    return Executor(lab.connection, command="test", lock_timeout=lock_timeout, deadline=deadline, **options)  # type: ignore[arg-type]


def step(text: str, *nowait: Lock, transactional: bool = True, locks: tuple[Lock, ...] = ()) -> Step:
    return Step(f"do {text}", (Statement(sql.SQL(text), locks),), transactional, nowait)


def settings(lab: Lab) -> list[str]:
    with lab.connection.cursor() as cursor:
        found = []
        for name in SETTINGS:
            cursor.execute(f"SHOW {name}")
            found.append(cursor.fetchone()[0])
        return found


def partition_set(lab: Lab, table: str) -> PartitionSet:
    (found,) = catalog.read(lab.connection, [table])
    assert found is not None
    return found


def public(name: str) -> TableName:
    return TableName("public", name)


# -- what is sent


def test_statements_that_go_together_are_one_message(lab: Lab) -> None:
    texts = (
        "CREATE TABLE one (i int)",
        "COMMENT ON TABLE one IS 'a; b %s {}'",
        "ALTER TABLE one RENAME TO two",
    )
    together = Step("do it", tuple(Statement(sql.SQL(text)) for text in texts), together=True)
    with executor(lab) as runs, CaptureQueriesContext(lab.connection) as seen:
        runs.run(together)
    assert [q["sql"] for q in seen if "TABLE" in q["sql"]] == [";\n".join(texts)]
    assert lab.comment("two") == "a; b %s {}"


# -- the session


def test_a_run_names_its_session_and_sets_everything_back(lab: Lab) -> None:
    with lab.connection.cursor() as cursor:
        cursor.execute("SET application_name = 'shop'; SET lock_timeout = '7s'; SET statement_timeout = '8s'")
    before = settings(lab)
    with executor(lab):
        assert settings(lab)[0] == "django_scaledb test"
        assert settings(lab)[2] == "0"
    assert settings(lab) == before


def test_settings_are_set_back_after_failures(lab: Lab) -> None:
    lab.create(Plain)
    before = settings(lab)
    with pytest.raises(DDLError), executor(lab) as door:
        door.run(step("CREATE TABLE lab_plain ()"))
    assert settings(lab) == before
    with pytest.raises(DDLError), executor(lab) as door:
        door.run(step("ALTER TABLE lab_plain DETACH PARTITION nothing CONCURRENTLY", transactional=False))
    assert settings(lab) == before
    with pytest.raises(KeyboardInterrupt), executor(lab):
        raise KeyboardInterrupt
    assert settings(lab) == before
    assert lab.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_a_second_run_names_the_first(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_scaledb.postgres.session.OTHER_RUN_SECONDS", 0.3)
    other = lab.session(autocommit=True, application_name="django_scaledb elsewhere")
    other.execute("SELECT pg_advisory_lock(%s, %s)", RUN_LOCK)
    pid = other.info.backend_pid
    before = settings(lab)
    with (
        pytest.raises(AnotherRunInProgress, match=f'pid {pid}, application_name "django_scaledb elsewhere"'),
        executor(lab),
    ):
        pass
    assert settings(lab) == before


def test_a_second_run_waits_a_little_for_the_first(lab: Lab) -> None:
    other = lab.session(autocommit=True)
    other.execute("SELECT pg_advisory_lock(%s, %s)", RUN_LOCK)
    threading.Timer(0.4, other.close).start()
    with executor(lab) as door:
        door.run(step("CREATE TABLE t ()"))
    assert "t" in lab.tables()


def test_another_database_has_its_own_lock(lab: Lab) -> None:
    with lab.cluster.primary.connect(dbname="app") as other:
        other.execute("SELECT pg_advisory_lock(%s, %s)", RUN_LOCK)
        with executor(lab, deadline=0.1):
            pass


def test_inside_a_transaction_of_the_caller(lab: Lab) -> None:
    lab.create(Plain)
    with transaction.atomic(using="lab"), lab.connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '7s'")
        with executor(lab) as door:
            door.run(step("CREATE TABLE t ()"))
            cursor.execute("SHOW lock_timeout")
            assert cursor.fetchone() == ("7s",)
            with pytest.raises(DDLError, match="inside a transaction; do it outside atomic"):
                door.run(step("ALTER TABLE x DETACH PARTITION y CONCURRENTLY", transactional=False))
            with pytest.raises(DDLError, match='relation "t" already exists'):
                door.run(step("CREATE TABLE t ()"))
        cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        assert cursor.fetchone() == (1,)  # until the caller's work can be seen
    assert "t" in lab.tables()
    assert lab.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_a_lost_connection_is_made_again(lab: Lab) -> None:
    lab.create(Plain)

    def kill(cursor: object) -> None:
        pid = lab.connection.connection.info.backend_pid
        lab.execute(f"SELECT pg_terminate_backend({pid})", superuser=True)

    with executor(lab) as door:
        with pytest.raises(DDLError, match=r"lost while trying to do CREATE TABLE t \(\).*run again"):
            door.run(step("CREATE TABLE t ()"), guard=kill)
        door.run(step("CREATE TABLE u ()"))
        assert settings(lab)[0] == "django_scaledb test"
        assert lab.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 1
    assert lab.tables() & {"t", "u"} == {"u"}
    assert settings(lab)[0] == ""


# -- locks


def strongest_locks(lab: Lab, parts: list[Statement]) -> dict[str, LockMode]:
    """What running the statements in one transaction locks, of the tables that were there before."""
    names = dict(
        lab.execute(
            "SELECT oid::int8, relname FROM pg_class WHERE relkind IN ('r', 'p') "
            "AND relnamespace = 'public'::regnamespace"
        )
    )
    session = lab.session()
    for part in parts:
        session.execute(part.query)
    rows = session.execute(
        "SELECT relation::int8, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
    ).fetchall()
    session.rollback()
    found: dict[str, LockMode] = {}
    for oid, mode in rows:
        if oid in names:
            found[names[oid]] = max(found.get(names[oid], LockMode.ACCESS_SHARE), LockMode(mode))
    return found


def declared(wanted: Step) -> dict[str, LockMode]:
    return {lock.table.name: lock.mode for lock in wanted.locks}


def test_declared_locks_are_what_postgres_takes(lab: Lab) -> None:
    """Foreign keys out and in, a default partition, each kind of step."""
    lab.create(Account, Upload, Trace, Span)
    uploads, config = partition_set(lab, "lab_upload"), registry.config_for(Upload)
    make = ddl.create(uploads, config, JULY, public("new"))
    assert strongest_locks(lab, list(make.statements)) == declared(make)
    assert declared(make) == {
        "lab_upload": LockMode.SHARE_UPDATE_EXCLUSIVE,
        "lab_account": LockMode.SHARE_ROW_EXCLUSIVE,
    }
    traces = partition_set(lab, "lab_trace")
    make = ddl.create(traces, registry.config_for(Trace), JULY, public("new"))
    assert strongest_locks(lab, list(make.statements)) == declared(make)
    assert declared(make)["lab_span"] is LockMode.SHARE_ROW_EXCLUSIVE

    make_default = ddl.create_default(uploads, public("lab_upload_default"))
    assert strongest_locks(lab, list(make_default.statements)) == declared(make_default)
    with executor(lab) as door:
        door.run(make_default)
    uploads = partition_set(lab, "lab_upload")
    make = ddl.create(uploads, config, JULY, public("new"))
    assert strongest_locks(lab, list(make.statements)) == declared(make)
    assert declared(make)["lab_upload_default"] is LockMode.ACCESS_EXCLUSIVE

    detach = ddl.detach(uploads, uploads.members[0], JULY)
    assert detach.transactional
    assert strongest_locks(lab, list(detach.statements)) == declared(detach)
    with executor(lab) as door:
        door.run(detach)
    keys = inspection.foreign_keys(lab.connection, uploads.members[0].oid)
    release = ddl.release(uploads.members[0], keys)
    assert strongest_locks(lab, list(release.statements)) == declared(release)
    assert declared(release)["lab_account"] is LockMode.ACCESS_EXCLUSIVE
    settle = ddl.settle(uploads, uploads.members[0], JULY, NOW)
    assert strongest_locks(lab, list(settle.statements)) == declared(settle)
    assert "lab_account" not in declared(settle)
    with executor(lab) as door:
        door.run(release)
        door.run(settle)
    drop = ddl.drop(uploads.members[0])
    assert strongest_locks(lab, list(drop.statements)) == declared(drop)


@pytest.mark.parametrize("with_keys", [False, True])
def test_declared_locks_of_a_concurrent_detach(lab: Lab, with_keys: bool) -> None:
    """Its last transaction is that of FINALIZE, which can be run and looked at in one of ours."""
    if with_keys:
        lab.create(Account, Upload)
    else:
        lab.create(Plain)
    parent = partition_set(lab, "lab_upload" if with_keys else "lab_plain")
    interrupt_detach(lab, parent, 0)
    finish = ddl.finalize(parent, parent.members[0])
    assert strongest_locks(lab, list(finish.statements)) == declared(finish)
    assert declared(finish) == declared(ddl.detach(parent, parent.members[0], JULY))


def test_declared_locks_of_a_detach_with_keys_to_it(lab: Lab) -> None:
    lab.create(Trace, Span)
    parent = partition_set(lab, "lab_trace")
    interrupt_detach(lab, parent, 0)
    finish = ddl.finalize(parent, parent.members[0])
    assert strongest_locks(lab, list(finish.statements)) == declared(finish)
    assert declared(finish)["lab_span"] is LockMode.ACCESS_EXCLUSIVE


def interrupt_detach(lab: Lab, parent: PartitionSet, number: int) -> None:
    """Leave a DETACH CONCURRENTLY pending, as a cancelled one does."""
    table, partition = parent.table, parent.members[number].table
    reader, worker = lab.session(), lab.session(autocommit=True)
    reader.execute(f"SELECT count(*) FROM {table}")  # type: ignore[arg-type]
    worker.execute("SET lock_timeout = '50ms'")
    with pytest.raises(Exception, match="lock timeout"):
        worker.execute(f"ALTER TABLE {table} DETACH PARTITION {partition} CONCURRENTLY")  # type: ignore[arg-type]
    reader.rollback()


def test_a_writer_of_the_target_is_waited_for_without_a_queue(lab: Lab) -> None:
    """ATTACH needs SHARE ROW EXCLUSIVE on what a foreign key points at; others must not feel it."""
    lab.create(Account, Upload)
    lab.execute("INSERT INTO lab_account DEFAULT VALUES", "INSERT INTO lab_account DEFAULT VALUES")
    writer = lab.session(application_name="batch job")
    writer.execute("UPDATE lab_account SET id = id WHERE id = 1")
    waits: list[Waiting] = []
    wanted = ddl.create(partition_set(lab, "lab_upload"), registry.config_for(Upload), JULY, public("new"))
    other = lab.session()
    with (
        lab.queue() as queue,
        Traffic(other, "UPDATE lab_account SET id = id WHERE id = 2") as traffic,
        executor(lab, deadline=1.5, on_wait=waits.append) as door,
    ):
        begun = time.monotonic()
        with pytest.raises(LockNotAvailable) as caught:
            door.run(wanted)
        assert time.monotonic() - begun < 3
        assert queue.longest < 0.1
        assert traffic.count > 50
    text = str(caught.value)
    assert text.startswith("cannot create partition public.new: gave up 1.")
    assert f'pid {writer.info.backend_pid} (application_name "batch job"' in text
    assert "holds ROW EXCLUSIVE on public.lab_account" in text
    assert f"pg_terminate_backend({writer.info.backend_pid})" in text
    assert waits
    assert "new" not in lab.tables()
    writer.rollback()
    with executor(lab) as door:
        door.run(wanted)
    assert "new" in lab.bounds("lab_upload")


def test_the_lock_of_a_busy_target_is_got_between_passers_by(lab: Lab) -> None:
    """Where somebody always writes NOWAIT would never succeed."""
    lab.create(Account, Upload)
    lab.execute("INSERT INTO lab_account SELECT generate_series(1, 4)")
    wanted = ddl.create(partition_set(lab, "lab_upload"), registry.config_for(Upload), JULY, public("new"))
    work = "UPDATE lab_account SET id = id WHERE id = {}; SELECT pg_sleep(0.02)"
    clients = [Traffic(lab.session(), work.format(n), pause=0) for n in range(1, 5)]
    for client in clients:
        client.__enter__()
    try:
        eventually(lambda: all(client.count > 2 for client in clients))
        with lab.queue() as queue, executor(lab, deadline=10) as door:
            door.run(wanted)
    finally:
        for client in clients:
            client.__exit__()
    assert "new" in lab.bounds("lab_upload")
    assert queue.longest < 0.2


def test_readers_and_writers_of_the_parent_are_not_felt(lab: Lab) -> None:
    lab.create(Account, Upload)
    reader, writer = lab.session(), lab.session()
    reader.execute("SELECT count(*) FROM lab_upload")
    writer.execute("INSERT INTO lab_upload (at, size) VALUES ('2026-05-02', 1)")
    wanted = ddl.create(partition_set(lab, "lab_upload"), registry.config_for(Upload), JULY, public("new"))
    with executor(lab, deadline=1) as door:
        door.run(wanted)
    assert "new" in lab.bounds("lab_upload")


def test_a_role_that_may_not_lock_the_target(lab: Lab) -> None:
    """LOCK TABLE wants more privileges than a foreign key; then the statement waits, but not long."""
    lab.create(Account, Upload)
    lab.execute(
        "ALTER TABLE lab_account OWNER TO postgres",
        "REVOKE ALL ON lab_account FROM app",
        "GRANT SELECT, INSERT, REFERENCES ON lab_account TO app",
        superuser=True,
    )
    wanted = ddl.create(partition_set(lab, "lab_upload"), registry.config_for(Upload), JULY, public("new"))
    writer = lab.session(superuser=True)
    writer.execute("INSERT INTO lab_account VALUES (7)")
    other = lab.session()
    with (
        lab.queue() as queue,
        Traffic(other, "INSERT INTO lab_account SELECT count(*) + 100 FROM lab_account") as traffic,
        executor(lab, deadline=1, lock_timeout=1000) as door,
        pytest.raises(LockNotAvailable, match=f"pid {writer.info.backend_pid}"),
    ):
        door.run(wanted)
    assert traffic.count > 20
    assert queue.longest < 0.2
    writer.rollback()
    with executor(lab) as door:
        door.run(wanted)


def test_the_deadline_still_gives_each_step_one_try(lab: Lab) -> None:
    with executor(lab, deadline=0.01) as door:
        time.sleep(0.02)
        assert door.is_over
        door.run(step("CREATE TABLE t ()"))
    assert "t" in lab.tables()


def test_a_missing_privilege_names_the_role(lab: Lab) -> None:
    lab.execute("CREATE TABLE theirs (id int)", superuser=True)
    with executor(lab) as door, pytest.raises(DDLError, match=r"must be owner .*connected as 'app'"):
        door.run(step("ALTER TABLE theirs ADD COLUMN x int"))


def test_work_in_a_transaction_is_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_scaledb.postgres.executor.WORK_SECONDS", 0.2)
    with executor(lab) as door:
        with pytest.raises(DDLError, match="statement timeout"):
            door.run(step("SELECT pg_sleep(5)"))
        door.run(step("SELECT pg_sleep(0.4)"), bounded=False)


# -- detaching while the table is in use


def test_a_detach_lets_readers_pass_first(lab: Lab) -> None:
    """As long as a reader is there nothing is begun, so nothing is left pending."""
    lab.create(Plain)
    parent = partition_set(lab, "lab_plain")
    wanted = ddl.detach(parent, parent.members[0], JULY)
    assert not wanted.transactional
    reader = lab.session(application_name="report")
    reader.execute("SELECT count(*) FROM lab_plain")
    with lab.queue() as queue, executor(lab, deadline=0.5) as door:
        with pytest.raises(LockNotAvailable, match=r'in the way: pid \d+ \(application_name "report"'):
            door.run(wanted)
        lab.execute("SELECT count(*) FROM lab_plain", "INSERT INTO lab_plain (at) VALUES ('2026-05-03')")
    assert queue.longest == 0
    assert len(lab.bounds("lab_plain")) == 2
    reader.rollback()
    with executor(lab) as door:
        door.run(wanted)
    assert len(lab.bounds("lab_plain")) == 1


def test_a_detach_does_not_wait_for_those_who_come_later(lab: Lab) -> None:
    lab.create(Plain)
    parent = partition_set(lab, "lab_plain")
    clients = [Traffic(lab.session(), "SELECT count(*), pg_sleep(0.05) FROM lab_plain", 0) for _ in range(4)]
    for client in clients:
        client.__enter__()
    try:
        with executor(lab, deadline=10) as door:
            door.run(ddl.detach(parent, parent.members[0], JULY))
    finally:
        for client in clients:
            client.__exit__()
    assert len(lab.bounds("lab_plain")) == 1


@pytest.mark.parametrize("model", [Upload, Trace])
def test_a_detach_never_stands_in_the_queue_of_another_table(lab: Lab, model: type) -> None:
    """It remakes foreign keys at its end, and NOWAIT cannot be said; the watcher ends it instead."""
    lab.create(Account, Upload, Trace, Span)
    target = "lab_account" if model is Upload else "lab_span"
    parent = partition_set(lab, model._meta.db_table)  # type: ignore[attr-defined]
    member = parent.members[0]

    def resume() -> Step | None:
        state = inspection.attachment(lab.connection, parent.oid, member.oid)
        assert state is not None
        return ddl.finalize(parent, member) if state.value == "detach pending" else wanted

    wanted = ddl.detach(parent, member, JULY)
    reader = lab.session()
    reader.execute(f"SELECT count(*) FROM {parent.table}")  # type: ignore[arg-type]
    writer = lab.session()

    def come_in_between() -> None:
        # After the reader, who keeps the statement waiting in its first half, there is the writer.
        eventually(lambda: lab.value("SELECT count(*) FROM pg_inherits WHERE inhdetachpending"))
        writer.execute(f"LOCK TABLE {target} IN ROW EXCLUSIVE MODE")  # type: ignore[arg-type]
        reader.rollback()
        time.sleep(1)
        writer.rollback()

    intruder = threading.Thread(target=come_in_between)
    lab.execute("INSERT INTO lab_account VALUES (1)")
    traffic = Traffic(lab.session(), f"LOCK TABLE {target} IN ROW EXCLUSIVE MODE")
    with lab.queue() as queue, traffic, executor(lab, deadline=10) as door:
        door._let_pass = lambda step, until: None  # type: ignore[method-assign]  # the reader came just then
        intruder.start()
        door.run(wanted, resume=resume)
        intruder.join()
    assert queue.longest < 0.2
    assert traffic.slowest < 0.5
    assert len(partition_set(lab, model._meta.db_table).members) == len(parent.members) - 1  # type: ignore[attr-defined]


def test_without_a_connection_to_spare_the_statement_waits_briefly(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Executor, "_get_watcher", lambda self: None)
    lab.create(Plain)
    parent = partition_set(lab, "lab_plain")
    with executor(lab) as door:
        door.run(ddl.detach(parent, parent.members[0], JULY))
    assert len(lab.bounds("lab_plain")) == 1


def test_a_cancel_by_somebody_else_is_not_tried_again(lab: Lab) -> None:
    lab.create(Plain)
    parent = partition_set(lab, "lab_plain")
    reader = lab.session()
    reader.execute("SELECT count(*) FROM lab_plain")

    def cancel() -> None:
        eventually(lambda: lab.value("SELECT count(*) FROM pg_inherits WHERE inhdetachpending"))
        lab.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'django_scaledb test'"
        )

    canceller = threading.Thread(target=cancel)
    with executor(lab) as door:
        door._let_pass = lambda step, until: None  # type: ignore[method-assign]
        canceller.start()
        with pytest.raises(DDLError, match="canceling statement due to user request"):
            door.run(ddl.detach(parent, parent.members[0], JULY))
        canceller.join()


def test_the_script_is_what_is_sent(lab: Lab) -> None:
    """The dry run's text, as it stands, makes the partition."""
    lab.create(Account, Upload)
    wanted = ddl.create(partition_set(lab, "lab_upload"), registry.config_for(Upload), JULY, public("new"))
    session = lab.session(autocommit=True)
    for statement in script(wanted, 1000):
        session.execute(statement.query)
    assert "new" in lab.bounds("lab_upload")
    found = partition_set(lab, "lab_upload").member(public("new"))
    assert found.marker is not None
    assert (found.marker.state, found.marker.range) == (MarkState.ATTACHED, JULY)


def test_an_orphaned_session_ends_by_itself(lab: Lab) -> None:
    """A killed client's statement that waits is ended by the server, and with it the run's lock."""
    with RunSession(lab.connection, "django_scaledb test", patience=1), lab.connection.cursor() as cursor:
        cursor.execute("SHOW client_connection_check_interval")
        assert cursor.fetchone() == ("500ms",)


@pytest.mark.parametrize("table", ["lab_upload", "lab_account", "lab_upload_y2026m05"])
def test_a_table_that_somebody_has_for_himself(lab: Lab, table: str) -> None:
    """Not even the look at who is in the way may wait for him."""
    lab.create(Account, Upload)
    parent = partition_set(lab, "lab_upload")
    other = lab.session()
    other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")  # type: ignore[arg-type]
    with executor(lab, deadline=0.5) as door:
        if table != "lab_upload_y2026m05":
            with pytest.raises(LockNotAvailable, match=f"pid {other.info.backend_pid} .*ACCESS EXCLUSIVE"):
                door.run(ddl.create(parent, registry.config_for(Upload), JULY, public("new")))
        with pytest.raises(LockNotAvailable, match=f"pid {other.info.backend_pid} .*ACCESS EXCLUSIVE"):
            door.run(ddl.detach(parent, parent.members[0], JULY))
