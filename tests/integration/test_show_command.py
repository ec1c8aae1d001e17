"""show_partitions: what it shows, and what it calls wrong."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.core.management import call_command

from tests.lab import NOW, Lab
from tests.testapp.models import Account, Event, Odd, Reading, Trace

AT = NOW.isoformat()


def show(*args: str, now: str = AT) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        call_command(
            "show_partitions", *args, "--using", "lab", "--now", now, stdout=out, stderr=err, no_color=True
        )
    except SystemExit as error:
        code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def show_json(*args: str, now: str = AT) -> tuple[int, dict[str, Any]]:
    code, out, err = show(*args, "--format", "json", now=now)
    assert err == ""
    content = json.loads(out)
    assert content["version"] == 1
    return code, content


def problems(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["problem"], p["command"]) for model in content["models"] for p in model["problems"]]


def test_the_set_as_text(lab: Lab) -> None:
    lab.create(Account, Event)
    lab.execute(
        "INSERT INTO testapp_event (size, happened_at) SELECT 1, '2026-05-03' FROM generate_series(1, 1234)",
        "ANALYZE testapp_event",
    )
    code, out, err = show("testapp.Event", "--check")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "testapp.Event: public.testapp_event by happened_at, 1 month"
    assert lines[1].split() == ["partition", "from", "to", "rows", "size", "state"]
    assert lines[2].split()[:4] == ["public.testapp_event_y2026m05", "2026-05-01", "2026-06-01", "~1,234"]
    assert lines[2].endswith("attached")
    assert lines[3].split()[3] == "~0"
    assert lines[6] == "  runway: 3 whole periods ahead, to 2026-09-01 (premake 3)"


def test_the_set_as_json(lab: Lab) -> None:
    lab.create(Trace)
    lab.execute("INSERT INTO testapp_trace VALUES ('019e3605-a480-7000-8000-000000000000', 'x')")
    code, content = show_json("testapp.Trace", "--check")
    assert (code, content["ok"], content["database"]) == (0, True, "lab")
    (model,) = content["models"]
    partitions = model.pop("partitions")
    assert model == {
        "model": "testapp.Trace",
        "table": "public.testapp_trace",
        "error": None,
        "key": "id",
        "interval": "1 day",
        "retention": None,
        "runway": {"periods": 2, "premake": 2, "until": "2026-05-20T00:00:00+00:00"},
        "problems": [],
    }
    assert partitions[0]["bytes"] > 0
    assert {**partitions[0], "bytes": 0} == {
        "partition": "public.testapp_trace_y2026m05d17",
        "from": "2026-05-17T00:00:00+00:00",
        "to": "2026-05-18T00:00:00+00:00",
        "state": "attached",
        "managed": True,
        "default": False,
        "detached_at": None,
        "archived_at": None,
        "held_since": None,
        "manifest": None,
        "rows": None,
        "bytes": 0,
    }


def test_a_short_runway(lab: Lab) -> None:
    lab.create(Account, Event)
    code, content = show_json("testapp.Event", "--check", now="2026-06-01T00:00:00Z")
    assert code == 1
    assert problems(content) == [("runway", "manage.py rotate_partitions testapp.Event")]
    assert content["models"][0]["runway"]["periods"] == 2
    assert show("testapp.Event", now="2026-06-01T00:00:00Z")[0] == 0  # only --check judges
    text = show("testapp.Event", now="2026-06-01T00:00:00Z")[1]
    assert (
        "! no partition takes rows from 2026-09-01 on; wanted are the current period of 1 month and 3 more; "
        "mend it with: manage.py rotate_partitions testapp.Event"
    ) in text


def test_a_gap(lab: Lab) -> None:
    lab.create(Account, Event)
    lab.execute("DROP TABLE testapp_event_y2026m06")
    code, content = show_json("testapp.Event", "--check")
    assert code == 1
    assert problems(content) == [("gap", "manage.py rotate_partitions testapp.Event")]
    assert "2026-06-01..2026-07-01" in content["models"][0]["problems"][0]["message"]


def test_a_first_partition_from_minvalue_is_no_fault(lab: Lab) -> None:
    lab.create(Account, Event)
    lab.execute(
        "CREATE TABLE old PARTITION OF testapp_event FOR VALUES FROM (MINVALUE) TO ('2026-05-01 00:00+00')"
    )
    code, content = show_json("testapp.Event", "--check")
    assert code == 0
    assert content["models"][0]["partitions"][0]["from"] == "MINVALUE"
    assert content["models"][0]["partitions"][0]["managed"] is False
    assert "hand-made" in show("testapp.Event")[1]


@pytest.mark.parametrize(
    ("model", "insert", "days"),
    [
        (
            Event,
            "INSERT INTO testapp_event (size, happened_at) VALUES (1, '2027-03-05 23:30-05'), "
            "(1, '2029-01-01Z')",
            "--from 2027-03-06 --to 2029-01-01",
        ),
        (Reading, "INSERT INTO testapp_reading (day, value) VALUES ('2027-03-05', 1)", "2027-03-05"),
        (
            Trace,
            "INSERT INTO testapp_trace VALUES ('018df22b-6400-0000-0000-000000000000', 'x')",
            "2024-02-29",
        ),
        (Event, "INSERT INTO testapp_event (size, happened_at) VALUES (1, 'infinity')", ""),
    ],
)
def test_rows_in_a_default_partition(lab: Lab, model: Any, insert: str, days: str) -> None:
    lab.create(Account, model)
    table = model._meta.db_table
    lab.execute(f"CREATE TABLE rest PARTITION OF {table} DEFAULT")
    assert show(model._meta.label, "--check")[0] == 0
    lab.execute(insert)
    with lab.connection.cursor() as cursor:
        cursor.execute("SET timezone = 'America/New_York'; SET datestyle = 'SQL, DMY'")
    code, content = show_json(model._meta.label, "--check")
    assert code == 1
    ((problem, command),) = problems(content)
    assert problem == "default rows"
    assert command.startswith(f"manage.py create_partitions {model._meta.label}")
    assert days in command
    if days:
        call_command(*command.removeprefix("manage.py ").split(), "--using", "lab", stdout=io.StringIO())
        _, content = show_json(model._meta.label, "--check")
        assert "default rows" not in dict(problems(content)), "what is left are gaps, for rotation"


def test_a_pending_detach(lab: Lab) -> None:
    lab.create(Account, Event)
    reader, worker = lab.session(), lab.session(autocommit=True)
    reader.execute("SELECT count(*) FROM testapp_event")
    worker.execute("SET lock_timeout = '50ms'")
    with pytest.raises(Exception, match="lock timeout"):
        worker.execute("ALTER TABLE testapp_event DETACH PARTITION testapp_event_y2026m05 CONCURRENTLY")
    code, content = show_json("testapp.Event", "--check")
    assert code == 1
    assert ("detach pending", "manage.py rotate_partitions testapp.Event") in problems(content)
    assert "detach pending" in show("testapp.Event")[1]


def test_detached_tables_are_listed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.create(Account, Event)
    call_command("rotate_partitions", "testapp.Event", using="lab", now="2026-07-05", verbosity=0)
    monkeypatch.setitem(Event._partitioning_meta.attrs, "retention", "1 month")
    call_command("rotate_partitions", "testapp.Event", using="lab", now="2026-07-05", verbosity=0)
    lab.execute("ALTER TABLE testapp_event DETACH PARTITION testapp_event_y2026m10")
    _, content = show_json("testapp.Event", now="2026-07-05")
    by_name = {
        p["partition"].removeprefix("public.testapp_event_"): p for p in content["models"][0]["partitions"]
    }
    assert by_name["y2026m05"]["state"] == "detached"
    assert by_name["y2026m05"]["managed"] is True
    assert by_name["y2026m05"]["detached_at"] == "2026-07-05T00:00:00+00:00"
    assert by_name["y2026m10"]["state"] == "detached"
    assert by_name["y2026m10"]["managed"] is False
    out = show("testapp.Event", now="2026-07-05")[1]
    assert "detached 2026-07-05" in out
    assert "detached by hand" in out


def test_a_model_that_cannot_be_shown_fails_alone(lab: Lab) -> None:
    lab.create(Account, Event)
    lab.execute("CREATE TABLE testapp_reading (day date)")
    code, out, err = show("testapp.Reading", "testapp.Event", "testapp.Trace")
    assert code == 1
    assert "testapp.Event: public.testapp_event" in out
    assert "testapp.Reading: public.testapp_reading is an ordinary table in the database" in err
    assert (
        "testapp.Trace: there is no table 'testapp_trace' in the database 'lab'; run manage.py migrate" in err
    )


def test_odd_names_are_shown(lab: Lab) -> None:
    lab.create(Odd)
    code, content = show_json("testapp.Odd", "--check")
    assert code == 0
    assert content["models"][0]["partitions"][0]["partition"] == "public.Odd Table_y2026m05"


def test_a_lock_costs_the_size_of_that_table_alone(lab: Lab) -> None:
    lab.create(Account, Event)
    other = lab.session()
    other.execute("LOCK TABLE testapp_event_y2026m06 IN ACCESS EXCLUSIVE MODE")
    code, content = show_json("testapp.Event", "--check")
    assert code == 0
    assert [p["bytes"] is None for p in content["models"][0]["partitions"]] == [False, True, False, False]


def test_a_default_partition_that_is_locked_is_named(lab: Lab) -> None:
    lab.create(Account, Event, Reading)
    lab.execute("CREATE TABLE rest PARTITION OF testapp_event DEFAULT")
    other = lab.session()
    other.execute("LOCK TABLE rest IN ACCESS EXCLUSIVE MODE")
    code, content = show_json("testapp.Event", "testapp.Reading", "--check")
    assert code == 1
    assert [problem for problem, _ in problems(content)] == ["default rows"]
    assert f"pid {other.info.backend_pid}" in content["models"][0]["problems"][0]["message"]


def test_an_unreachable_database(lab: Lab) -> None:
    lab.connection.settings_dict["PORT"] = "1"
    code, out, err = show("testapp.Event")
    assert (code, out) == (1, "")
    assert "connection" in err
    assert "Traceback" not in err
