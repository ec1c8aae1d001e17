"""create_partitions and rotate_partitions as they are typed: arguments, output, exit codes."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_scaledb.management._command import end_moment, moment
from django_scaledb.postgres.session import RUN_LOCK
from tests.lab import NOW, Lab
from tests.testapp.models import Account, Event, Reading, Trace

AT = NOW.isoformat()


@pytest.fixture
def site(lab: Lab) -> Lab:
    lab.create(Account, Event, Reading)
    return lab


def run(command: str, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        call_command(command, *args, "--using", "lab", stdout=out, stderr=err, no_color=True)
    except SystemExit as error:
        code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_missing_partitions_are_created_once(site: Lab) -> None:
    site.execute("DROP TABLE testapp_event_y2026m06")
    code, out, err = run("create_partitions", "testapp.Event", "--now", AT)
    assert (code, err) == (0, "")
    assert out == "testapp.Event: created public.testapp_event_y2026m06 (2026-06-01..2026-07-01)\n"
    assert run("create_partitions", "testapp.Event", "--now", AT) == (0, "nothing to do\n", "")


@pytest.mark.parametrize(
    ("first", "last", "made"),
    [
        ("2020-02-29", "2020-02-29", ["y2020m02"]),
        ("2020-02-01", "2020-03-31", ["y2020m02", "y2020m03"]),
        ("2020-02-01", "2020-04-01", ["y2020m02", "y2020m03", "y2020m04"]),
        ("2020-02-29T23:30:00-01:00", "2020-03-01T00:59:59Z", ["y2020m03"]),
        ("2020-02-01T00:00:00Z", "2020-03-01T00:00:00Z", ["y2020m02", "y2020m03"]),
    ],
)
def test_a_span_takes_in_both_its_days(site: Lab, first: str, last: str, made: list[str]) -> None:
    before = set(site.bounds("testapp_event"))
    code, _, err = run("create_partitions", "testapp.Event", "--from", first, "--to", last)
    assert (code, err) == (0, "")
    assert set(site.bounds("testapp_event")) - before == {f"testapp_event_{suffix}" for suffix in made}
    assert run("create_partitions", "testapp.Event", "--from", first, "--to", last)[1] == "nothing to do\n"


def test_models_are_named_without_regard_to_case_or_by_app(site: Lab) -> None:
    site.execute("DROP TABLE testapp_event_y2026m06")
    assert run("create_partitions", "testapp.eVENT", "--now", AT)[0] == 0
    assert "testapp_event_y2026m06" in site.tables()
    code, _, err = run("create_partitions", "testapp", "--now", AT)
    assert code == 1  # not all of its tables are there
    assert "testapp.Trace: there is no table 'testapp_trace'" in err
    assert "run manage.py migrate" in err


@pytest.mark.parametrize("command", ["create_partitions", "rotate_partitions", "show_partitions"])
@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("testapp.Evnt", "there is no model 'testapp.Evnt'; did you mean testapp.Event"),
        ("nonsense.Model", "there is no model 'nonsense.Model'; "),
        ("testapp.Account", "testapp.Account is not a PartitionedModel; "),
        ("auth", "'auth' is no app with partitioned models; "),
        ("", "'' is no app with partitioned models; "),
    ],
)
def test_an_unknown_model_is_misuse(site: Lab, command: str, label: str, complaint: str) -> None:
    with pytest.raises(CommandError) as caught:
        run(command, "testapp.Event", label)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--from", "2020-01-01"], "--from and --to go together"),
        (["--to", "2020-01-01"], "--from and --to go together"),
        (["--from", "2020-01-02", "--to", "2020-01-01"], "--from is after --to"),
        (["--from", "2020-01-01T10:00Z", "--to", "2020-01-01T09:00Z"], "--from is after --to"),
        (["--from", "2020-02-30", "--to", "2020-03-01"], "--from: '2020-02-30' is no date or time"),
        (["--from", "soon", "--to", "2020-03-01"], "--from: 'soon' is no date or time"),
        (["--from", "2020-01-01", "--to", "9999-12-31"], "--to: '9999-12-31' is too far in the future"),
        (["--now", "yesterday"], "--now: 'yesterday' is no date or time"),
        (["--lock-timeout", "0"], "Error: argument --lock-timeout: '0' is not above 0"),
        (["--deadline", "x"], "Error: argument --deadline: 'x' is not a number"),
    ],
)
def test_bad_arguments_are_misuse(site: Lab, arguments: list[str], complaint: str) -> None:
    before = site.tables()
    with pytest.raises(CommandError) as caught:
        run("create_partitions", "testapp.Event", *arguments)
    assert str(caught.value).startswith(complaint)
    assert site.tables() == before


def test_an_unknown_database_is_misuse() -> None:
    with pytest.raises(CommandError, match="there is no database 'nowhere' in DATABASES; there is default"):
        call_command("rotate_partitions", "--using", "nowhere")


def test_more_than_can_be_made_is_the_models_failure(site: Lab) -> None:
    code, _, err = run("create_partitions", "testapp.Event", "--from", "1000-01-01", "--to", "2000-01-01")
    assert code == 1
    assert err.startswith("testapp.Event: ")
    assert "partitions of 1 month are missing" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC)),
        ("2026-12-31T23:59:59", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-12-31T23:59:59Z", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2027-01-01T01:59:59+02:00", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-12-31 13:00+05:45", datetime(2026, 12, 31, 7, 15, tzinfo=UTC)),
    ],
)
def test_times_are_read_as_utc_unless_they_say_otherwise(text: str, expected: datetime) -> None:
    assert moment("--now", text) == expected


def test_an_end_is_still_meant() -> None:
    assert end_moment("--to", "20261231") == datetime(2027, 1, 1, tzinfo=UTC)
    assert end_moment("--to", "2026-12-31T00:00Z") == datetime(2026, 12, 31, 0, 0, 0, 1, tzinfo=UTC)


# -- rotate_partitions


def test_now_moves_the_clock(site: Lab) -> None:
    assert run("rotate_partitions", "testapp.Event", "--now", "2026-06-30T23:30:00Z")[0] == 0
    assert "testapp_event_y2026m09" in site.tables()
    assert "testapp_event_y2026m10" not in site.tables()
    assert run("rotate_partitions", "testapp.Event", "--now", "2026-07-01T01:30:00+02:00")[0] == 0
    assert "testapp_event_y2026m10" not in site.tables()


def test_either_half_can_be_left_out(site: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Event._partitioning_meta.attrs, "retention", "1 month")
    later = "2026-08-01"
    code, out, _ = run("rotate_partitions", "testapp.Event", "--now", later, "--no-create")
    assert (code, out) == (
        0,
        "testapp.Event: detached public.testapp_event_y2026m05 (2026-05-01..2026-06-01)\n"
        "testapp.Event: detached public.testapp_event_y2026m06 (2026-06-01..2026-07-01)\n",
    )
    assert "testapp_event_y2026m09" not in site.tables()
    later = "2026-10-15"
    code, out, _ = run("rotate_partitions", "testapp.Event", "--now", later, "--no-retention")
    assert code == 0
    assert "detached" not in out
    assert "created public.testapp_event_y2027m01" in out


def test_a_dry_run_prints_sql_and_locks_and_does_nothing(site: Lab) -> None:
    before = site.tables()
    code, out, err = run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "--dry-run")
    assert (code, err) == (0, "")
    assert site.tables() == before
    lines = out.splitlines()
    assert lines[0] == "-- testapp.Event: create public.testapp_event_y2026m09 (2026-09-01..2026-10-01)"
    attach = next(number for number, line in enumerate(lines) if "ATTACH PARTITION" in line)
    assert lines[attach - 1] == (
        "-- locks: SHARE UPDATE EXCLUSIVE on public.testapp_event; "
        "SHARE ROW EXCLUSIVE on public.testapp_account"
    )
    # What is printed is what psql takes, and does the same.
    site.execute(
        *(text for text in out.split(";\n") if text.strip() and text.strip() not in {"BEGIN", "COMMIT"})
    )
    assert run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "--dry-run") == (
        0,
        "nothing to do\n",
        "",
    )


def test_json_of_a_run(site: Lab) -> None:
    code, out, err = run(
        "rotate_partitions", "testapp.Event", "testapp.Trace", "--now", "2026-06-17", "--format", "json"
    )
    assert (code, err) == (1, "")
    content = json.loads(out)
    assert {name: content[name] for name in ("version", "command", "database", "now", "dry_run", "ok")} == {
        "version": 1,
        "command": "rotate_partitions",
        "database": "lab",
        "now": "2026-06-17T00:00:00+00:00",
        "dry_run": False,
        "ok": False,
    }
    event, trace = content["models"]
    assert (event["model"], event["table"], event["error"]) == ("testapp.Event", "public.testapp_event", None)
    (action,) = event["actions"]
    statements = action.pop("sql")
    assert action == {
        "action": "create",
        "partition": "public.testapp_event_y2026m09",
        "from": "2026-09-01T00:00:00+00:00",
        "to": "2026-10-01T00:00:00+00:00",
        "status": "done",
        "reason": None,
    }
    (attach,) = (entry for entry in statements if "ATTACH PARTITION" in entry["sql"])
    assert attach["locks"] == [
        {"table": "public.testapp_event", "mode": "SHARE UPDATE EXCLUSIVE"},
        {"table": "public.testapp_account", "mode": "SHARE ROW EXCLUSIVE"},
    ]
    assert trace["table"] is None
    assert trace["error"]["type"] == "PlanError"


def test_json_of_a_dry_run_says_planned(site: Lab) -> None:
    code, out, _ = run(
        "rotate_partitions", "testapp.Event", "--now", "2026-06-17", "--dry-run", "--format", "json"
    )
    content = json.loads(out)
    assert (code, content["ok"], content["dry_run"]) == (0, True, True)
    assert [action["status"] for action in content["models"][0]["actions"]] == ["planned"]


def test_a_blocked_run_names_the_pid_and_exits_with_1(site: Lab) -> None:
    writer = site.session(application_name="batch job")
    writer.execute("LOCK TABLE testapp_account IN ROW EXCLUSIVE MODE")
    code, out, err = run(
        "rotate_partitions",
        *("testapp.Event", "testapp.Reading"),
        *("--now", "2026-06-17", "--lock-timeout", "100", "--deadline", "2.5"),
    )
    assert code == 1
    assert "testapp.Reading: created" in out
    lines = err.splitlines()
    assert lines[-1].startswith(
        "testapp.Event: cannot create partition public.testapp_event_y2026m09: gave up"
    )
    assert f"pg_terminate_backend({writer.info.backend_pid})" in lines[-1]
    assert "Traceback" not in err


def test_another_run_is_named(site: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_scaledb.postgres.session.OTHER_RUN_SECONDS", 0.2)
    other = site.session(autocommit=True, application_name="django_scaledb rotate_partitions")
    other.execute("SELECT pg_advisory_lock(%s, %s)", RUN_LOCK)
    code, out, err = run("rotate_partitions", "testapp.Event", "--now", "2026-06-17")
    assert (code, out) == (1, "")
    assert err.startswith("another django_scaledb run is changing this database's schema (pid ")
    code, out, _ = run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "--format", "json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "AnotherRunInProgress"
    assert run("rotate_partitions", "testapp.Event", "--now", AT) == (0, "nothing to do\n", "")


def test_a_misdeclared_model_does_not_stop_the_others(site: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Event._partitioning_meta.attrs, "interval", "1 fortnight")
    code, out, err = run("rotate_partitions", "testapp.Event", "testapp.Reading", "--now", "2026-06-17")
    assert code == 1
    assert "testapp.Reading: created" in out
    assert err.startswith("testapp.Event: ")
    assert "1 fortnight" in err


def test_quiet(site: Lab) -> None:
    assert run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "-v", "0") == (0, "", "")
    assert run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "-v", "0") == (0, "", "")


def test_settings_give_the_defaults(site: Lab, settings: Any) -> None:
    settings.SCALEDB = {"LOCK_TIMEOUT": 123, "DDL_DEADLINE": 0.2}
    _, out, _ = run("rotate_partitions", "testapp.Event", "--now", "2026-06-17", "--dry-run")
    assert "SET LOCAL \"lock_timeout\" = '123ms'" in out
    settings.SCALEDB = {"LOCK_TIMEOUT": -1}
    with pytest.raises(CommandError, match="SCALEDB"):
        run("rotate_partitions", "testapp.Event", "--now", "2026-06-17")


def test_trace_models_are_created_for_uuid_keys(lab: Lab) -> None:
    lab.create(Trace)
    code, _, err = run("create_partitions", "testapp.Trace", "--from", "2024-02-28", "--to", "2024-03-01")
    assert (code, err) == (0, "")
    assert {f"testapp_trace_y2024m02d{day}" for day in (28, 29)} <= lab.tables()
    assert lab.bounds("testapp_trace")["testapp_trace_y2024m02d29"] == (
        "FOR VALUES FROM ('018df229-2800-0000-0000-000000000000') TO ('018df74f-8400-0000-0000-000000000000')"
    )
