"""What commands write down about how they ended, and that they end well where they cannot."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from django.contrib.auth.models import Permission
from django.core.management import call_command
from django.db import connection, connections
from django.utils import timezone

from django_scaledb import runs
from django_scaledb.runs import CHECK_COUNTERS, ROTATE, LastRun, Outcome, last_runs, write_down
from tests.counterapp.models import Owner, Project, Upload, UploadsPerProject
from tests.lab import Lab
from tests.testapp.models import Account, Event, Reading

AT = "2026-05-17T13:07:11+00:00"


def run(*command: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    out = io.StringIO()
    try:
        call_command(*command, stdout=out, stderr=out, no_color=True)
    except SystemExit as error:
        return int(error.code or 0), out.getvalue()
    return 0, out.getvalue()


def rotate(*more: str) -> tuple[int, str]:
    return run("rotate_partitions", "testapp.Event", "testapp.Reading", "--using", "lab", "--now", AT, *more)


def make_table(lab: Lab) -> None:
    with lab.connection.schema_editor() as editor:
        editor.create_model(LastRun)


def test_a_rotation_is_written_down_by_model(lab: Lab) -> None:
    make_table(lab)
    lab.create(Account, Event)
    lab.execute("DROP TABLE testapp_event_y2026m07")
    began = timezone.now()
    assert rotate("--dry-run")[0] == 1
    assert last_runs("lab", ROTATE) == {}, "a dry run is no run"
    assert rotate()[0] == 1  # there is no table of readings
    found = last_runs("lab", ROTATE)
    event, reading = found["testapp.Event"], found["testapp.Reading"]
    assert (event.ok, event.detail) == (True, {"done": {"create": 1}, "reasons": []})
    assert event.succeeded_at == event.finished_at
    assert began <= event.finished_at <= timezone.now()
    assert (reading.ok, reading.succeeded_at, reading.detail["done"]) == (False, None, {})
    assert "there is no table 'testapp_reading'" in reading.detail["reasons"][0]


def test_a_failure_leaves_the_time_of_the_last_success(lab: Lab) -> None:
    make_table(lab)
    lab.create(Reading)
    rotate()
    first = last_runs("lab", ROTATE)["testapp.Reading"]
    lab.execute("ALTER TABLE testapp_reading RENAME TO away")
    rotate()
    second = last_runs("lab", ROTATE)["testapp.Reading"]
    assert (second.ok, second.succeeded_at) == (False, first.finished_at)
    assert second.finished_at > first.finished_at
    assert LastRun.objects.using("lab").count() == 2, "one row for each model, however often it is run"


def test_a_run_that_another_one_stops_is_written_down_for_its_models(lab: Lab) -> None:
    make_table(lab)
    lab.create(Account, Event)
    lab.execute("DROP TABLE testapp_event_y2026m07")
    with lab.session().cursor() as cursor:
        from django_scaledb.postgres.session import RUN_LOCK

        cursor.execute("SELECT pg_advisory_lock(%s, %s)", RUN_LOCK)
        assert rotate("--deadline", "1")[0] == 1
    found = last_runs("lab", ROTATE)
    assert set(found) == {"testapp.Event", "testapp.Reading"}
    assert not found["testapp.Event"].ok
    assert "another" in found["testapp.Event"].detail["reasons"][0].lower()


def test_no_table_no_note_and_no_failure(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.create(Account, Event, Reading)
    lab.execute("DROP TABLE testapp_event_y2026m07")
    with caplog.at_level("INFO", logger="django_scaledb.runs"):
        code, printed = rotate()
    assert (code, "created public.testapp_event_y2026m07" in printed) == (0, True)
    assert "django_scaledb_last_run" in caplog.text


def test_no_privilege_no_note_and_no_failure(lab: Lab) -> None:
    lab.create(Account, Event, Reading)
    make_table(lab)
    lab.execute("ALTER TABLE django_scaledb_last_run OWNER TO CURRENT_USER", superuser=True)
    lab.execute("DROP TABLE testapp_event_y2026m07")
    code, printed = rotate()
    assert (code, "created public.testapp_event_y2026m07" in printed) == (0, True)
    assert lab.execute("SELECT count(*) FROM django_scaledb_last_run", superuser=True) == [(0,)]


def test_a_lock_on_the_table_ends_the_note_and_not_the_run(lab: Lab) -> None:
    make_table(lab)
    with lab.session() as other:
        other.execute("LOCK TABLE django_scaledb_last_run")
        began = timezone.now()
        assert write_down("lab", ROTATE, [Outcome("a.B", True)]) is False
        assert timezone.now() - began < timedelta(seconds=20)
    assert write_down("lab", ROTATE, [Outcome("a.B", True)]) is True
    assert lab.connection.in_atomic_block is False
    with lab.connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("0",), "the limit was the note's alone"


@pytest.mark.django_db(transaction=True)
def test_a_check_of_counters_is_written_down() -> None:
    project = Project.objects.create(name="a", owner=Owner.objects.create(name="ann", country="NO"))
    Upload.objects.create(project=project, size=1, at=datetime(2026, 5, 5, tzinfo=UTC))
    name = "counterapp.UploadsPerProject"
    assert run("check_counters", name, "-v", "0") == (0, "")
    assert last_runs("default", CHECK_COUNTERS)[name].detail == {"drifted_keys": 0, "reasons": []}
    UploadsPerProject.objects.update(total=100)
    code, printed = run("check_counters", name, "--format", "json")
    assert (code, json.loads(printed)["ok"]) == (1, False)
    found = last_runs("default", CHECK_COUNTERS)[name]
    assert (found.ok, found.detail["drifted_keys"]) == (False, 1)
    assert found.succeeded_at < found.finished_at
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE counterapp_uploadsperproject RENAME TO away")
        try:
            assert run("check_counters", name)[0] == 1
        finally:
            cursor.execute("ALTER TABLE away RENAME TO counterapp_uploadsperproject")
    found = last_runs("default", CHECK_COUNTERS)[name]
    assert "drifted_keys" not in found.detail
    assert "counterapp_uploadsperproject" in found.detail["reasons"][0]


@pytest.mark.django_db
def test_a_failed_note_leaves_the_callers_transaction_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LastRun._meta, "db_table", "no_such_table")
    assert write_down("default", ROTATE, [Outcome("a.B", True)]) is False
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


@pytest.mark.django_db
def test_the_page_has_one_permission_and_the_table_none() -> None:
    found = Permission.objects.filter(content_type__app_label="django_scaledb")
    assert "view_overview" in set(found.values_list("codename", flat=True))
    assert not found.filter(content_type__model="lastrun").exists()
    assert runs.LastRun._meta.db_table == "django_scaledb_last_run"
