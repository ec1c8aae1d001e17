"""Queries that do not prune: assert_pruned, SCALEDB["UNPRUNED_QUERIES"], in_period, the pytest fixture."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from django.db import connection, models, transaction
from django.db.models import Count, F, Q, Subquery
from django.db.models.functions import Now, TruncMonth
from django.test import override_settings
from django.utils import timezone

from django_scaledb.exceptions import UnprunedQueryError
from django_scaledb.models import PartitionedManager, PartitionedQuerySet
from django_scaledb.partitions.allowance import allow_unpruned
from django_scaledb.partitions.uuid7 import timestamp_of, uuid7_floor
from django_scaledb.testing import assert_pruned
from tests.testapp.models import Account, Comment, Event, Odd, Reading, Trace

pytestmark = pytest.mark.django_db

DAY = timedelta(days=1)
LOG = override_settings(SCALEDB={"UNPRUNED_QUERIES": "log"})
RAISE = override_settings(SCALEDB={"UNPRUNED_QUERIES": "raise"})


def today() -> datetime:
    return timezone.now().replace(hour=0, minute=0, second=0, microsecond=0)


def run(statement: str, params: list[object] | None = None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)


# -- assert_pruned

PRUNED = {
    "span": lambda: Event.objects.filter(happened_at__gte=today(), happened_at__lt=today() + DAY / 24),
    "exact": lambda: Event.objects.filter(pk=1, happened_at=today()),
    "in": lambda: Event.objects.filter(happened_at__in=[today(), today() + DAY / 24]),
    "range": lambda: Event.objects.filter(happened_at__range=(today(), today() + DAY / 24)),
    "negated": lambda: Event.objects.exclude(happened_at__lt=today()).filter(
        happened_at__lt=today() + DAY / 24
    ),
    "now": lambda: Event.objects.filter(happened_at__gte=Now(), happened_at__lt=Now() + timedelta(seconds=1)),
    "nothing": lambda: Event.objects.none(),
    "or": lambda: Event.objects.filter(Q(happened_at=today()) | Q(happened_at=today() + DAY / 24)),
    "date key": lambda: Reading.objects.filter(day=date(2024, 3, 5)),
    "uuid key": lambda: Trace.objects.filter(pk=UUID("018e0000-0000-7000-8000-000000000000")),
    "count": lambda: Event.objects.filter(happened_at=today()).annotate(n=Count("tags")),
    "odd names": lambda: Odd.objects.filter(made_at=today()),
}
NOT_PRUNED = {
    "all": (lambda: Event.objects.all(), "nothing restricts happened_at"),
    "id": (lambda: Event.objects.filter(pk=1), "it looks up by id alone"),
    "ids": (lambda: Event.objects.filter(pk__in=[1, 2]), "it looks up by id alone"),
    "other": (lambda: Event.objects.filter(size=1, account=2), "nothing restricts happened_at"),
    "date": (lambda: Event.objects.filter(happened_at__date=today()), "happened_at__date is worked out"),
    "month": (lambda: Event.objects.filter(happened_at__month=3), "happened_at__month is worked out"),
    "hour": (
        lambda: Event.objects.filter(happened_at__time__hour__gt=3),
        "happened_at__time__hour is worked out",
    ),
    "function": (
        lambda: Event.objects.annotate(m=TruncMonth("happened_at")).filter(m=today()),
        "TruncMonth(happened_at) is worked out",
    ),
    "negated": (lambda: Event.objects.exclude(happened_at=today()), "happened_at is negated"),
    "or": (
        lambda: Event.objects.filter(Q(happened_at__gte=today()) | Q(size=1)),
        "happened_at__gte is one side of an OR",
    ),
    "not and": (
        lambda: Event.objects.exclude(happened_at__lt=today(), size=1),
        "happened_at__lt is one side of an OR",
    ),
    "column": (
        lambda: Event.objects.filter(happened_at__gte=F("happened_at") - DAY),
        "happened_at__gte compares with another column",
    ),
    "union": (
        lambda: Event.objects.filter(happened_at=today()).union(Event.objects.filter(size=1), all=True),
        "nothing restricts happened_at",
    ),
    "joined": (
        lambda: Comment.objects.filter(event__size=3),
        "testapp.Event is joined, and nothing restricts",
    ),
    "date key": (
        lambda: Reading.objects.filter(value=3),
        "nothing restricts day. Add a span of the key: day__gte",
    ),
    "uuid key": (
        lambda: Trace.objects.filter(name="x"),
        "Filter by id, or by time with in_period(start, end)",
    ),
    "odd names": (lambda: Odd.objects.filter(label="x"), "nothing restricts made_at"),
}


@pytest.mark.parametrize("name", PRUNED)
def test_what_prunes(name):
    assert_pruned(PRUNED[name]())


@pytest.mark.parametrize("name", NOT_PRUNED)
def test_what_does_not_prune_and_why(name):
    make, reason = NOT_PRUNED[name]
    with pytest.raises(AssertionError) as caught:
        assert_pruned(make())
    assert reason in str(caught.value)


def test_the_message_names_model_partitions_and_query():
    with pytest.raises(AssertionError) as caught:
        assert_pruned(Event.objects.filter(size=4711))
    text = str(caught.value)
    assert text.startswith(
        "testapp.Event: this query reads 5 of 5 partitions, and not 1 at most (testapp_event_"
    )
    assert "Add a span of the key: happened_at__gte=.., happened_at__lt=.., or in_period(start, end)" in text
    assert 'FROM "testapp_event"' in text
    assert "4711" in text


def test_at_most_counts_partitions_and_a_wide_span_says_so():
    wide = Event.objects.filter(happened_at__gte=today())
    with pytest.raises(AssertionError, match="the span of happened_at that it asks for lies in that many"):
        assert_pruned(wide)
    assert_pruned(wide, at_most=5)  # this month, three ahead, the default partition
    assert_pruned(Event.objects.all(), at_most=5)


def test_what_prunes_while_it_runs():
    Account.objects.create(name="a")
    moment = Subquery(Account.objects.values(m=Now())[:1])
    queryset = Event.objects.filter(happened_at=moment)
    with pytest.raises(AssertionError):
        assert_pruned(queryset)
    assert_pruned(queryset, run=True)


def test_ordinary_tables_are_a_mistake():
    with pytest.raises(ValueError, match=r"testapp\.Account is not partitioned"):
        assert_pruned(Account.objects.all())
    with pytest.raises(AssertionError):
        assert_pruned(Account.objects.filter(event__size=1))


def test_a_block_and_its_line(client):
    with assert_pruned():
        Event.objects.filter(happened_at=today()).update(size=1)
        Account.objects.count()
    with (
        pytest.raises(
            AssertionError, match=r"testapp\.Event: tests/integration/test_pruning\.py:\d+ \(test_a_block"
        ),
        assert_pruned(),
    ):
        Event.objects.filter(size=2).update(size=1)
    with pytest.raises(AssertionError, match="reads 5 of 5 partitions"), assert_pruned():
        run("DELETE FROM testapp_event WHERE size = %s", [3])
    Event.objects.count()  # watched no longer


# -- the setting


def found(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "django_scaledb.pruning"]


@LOG
def test_log_names_the_line_each_time(caplog, django_assert_num_queries):
    with django_assert_num_queries(2):
        for _ in range(2):
            list(Event.objects.filter(happened_at__date=today()))
    first, second = found(caplog)
    assert first == second
    assert first.startswith("testapp.Event: tests/integration/test_pruning.py:")
    assert "(test_log_names_the_line_each_time)" in first
    assert "happened_at__date is worked out from happened_at in every row" in first
    assert caplog.records[0].levelno == logging.WARNING


@LOG
def test_what_is_restricted_is_not_logged(caplog):
    for make in PRUNED.values():
        list(make())
    list(
        Event.objects.filter(happened_at__gte=datetime(1999, 1, 1, tzinfo=UTC))
    )  # every partition, and asked for
    list(Event.objects.filter(happened_at=Subquery(Account.objects.values(m=Now())[:1])))
    list(Account.objects.all())
    run("SELECT count(*) FROM testapp_event WHERE happened_at > now() - interval '1 day'")
    run("SELECT relname FROM pg_class WHERE relname = 'testapp_event'")
    event = Event.objects.create(happened_at=today())
    event.size = 3
    event.save()
    event.refresh_from_db()
    event.happened_at = today() + DAY
    event.save()
    Event.objects.filter(happened_at=event.happened_at).update(happened_at=today())
    event.save()  # it was moved meanwhile: found by its id, as a last resort
    event.delete()
    assert found(caplog) == []


@LOG
@pytest.mark.parametrize("name", NOT_PRUNED)
def test_what_is_not_restricted_is_logged(name, caplog):
    make, reason = NOT_PRUNED[name]
    list(make())
    assert len(found(caplog)) == 1
    assert reason in found(caplog)[0]


@RAISE
def test_raise_comes_before_the_query_runs():
    event = Event.objects.create(happened_at=today(), size=1)
    with pytest.raises(UnprunedQueryError, match="it looks up by id alone"), transaction.atomic():
        Event.objects.filter(pk=event.pk).update(size=2)
    with pytest.raises(UnprunedQueryError, match="nothing restricts happened_at"):
        run("UPDATE testapp_event SET size = 2")
    with pytest.raises(UnprunedQueryError, match=r"does not compare happened_at itself with a value"):
        run("SELECT 1 FROM testapp_event WHERE happened_at::date = '2024-03-01'")
    event.refresh_from_db()
    assert event.size == 1
    with allow_unpruned():
        assert Event.objects.count() == 1
    with pytest.raises(UnprunedQueryError):
        next(Event.objects.iterator())


@RAISE
def test_a_statement_that_fails_fails_by_itself():
    with pytest.raises(Exception, match="no_such_column"), transaction.atomic():
        run("SELECT no_such_column FROM testapp_event")
    assert Event.objects.filter(happened_at=today()).count() == 0


@RAISE
def test_relations_that_look_up_by_id():
    event = Event.objects.create(happened_at=today())
    comment = Comment.objects.create(event=event)
    with pytest.raises(UnprunedQueryError, match="it looks up by id alone"):
        Comment.objects.get(pk=comment.pk).event  # noqa: B018


def test_ignore_watches_nothing():
    assert not [w for w in connection.execute_wrappers if "django_scaledb" in type(w).__module__]
    with LOG:
        assert [w for w in connection.execute_wrappers if "django_scaledb" in type(w).__module__]
    assert not [w for w in connection.execute_wrappers if "django_scaledb" in type(w).__module__]


# -- in_period


def test_in_period_of_a_timestamp_key():
    inside = [Event.objects.create(happened_at=today() + d) for d in (0 * DAY, DAY / 2, DAY - DAY.resolution)]
    for outside in (-DAY.resolution, DAY):
        Event.objects.create(happened_at=today() + outside)
    assert list(Event.objects.in_period(today(), today() + DAY).order_by("pk")) == inside
    assert not Event.objects.in_period(today(), today()).exists()
    account = Account.objects.create(name="a")
    inside[0].account = account
    inside[0].save()
    assert account.event_set.in_period(today(), today() + DAY).get() == inside[0]
    assert_pruned(Event.objects.in_period(today(), today() + DAY / 24))


def test_in_period_of_a_date_key():
    days = [Reading.objects.create(day=date(2024, 3, d), value=1).day for d in (1, 2, 3)]
    found = Reading.objects.in_period(date(2024, 3, 1), date(2024, 3, 3)).values_list("day", flat=True)
    assert sorted(found) == days[:2]


def test_in_period_of_a_uuid_key_takes_whole_milliseconds():
    start = datetime(2024, 3, 1, 12, 0, 0, 500_001, tzinfo=UTC)
    end = start + timedelta(milliseconds=2)
    moments = [start.replace(microsecond=ms * 1000) for ms in range(499, 505)]
    for moment in moments:
        Trace.objects.create(pk=UUID(int=uuid7_floor(moment).int | 7 << 76 | 2 << 62 | 1))
    found = sorted(timestamp_of(trace.pk) for trace in Trace.objects.in_period(start, end))
    assert found == [moment for moment in moments if start <= moment < end]
    assert len(found) == 2
    assert not Trace.objects.in_period(
        datetime(1960, 1, 1, tzinfo=UTC), datetime(1965, 1, 1, tzinfo=UTC)
    ).exists()


MOMENT = datetime(2024, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("model", "start", "end", "error", "text"),
    [
        (Event, MOMENT.replace(tzinfo=None), MOMENT, ValueError, r"start is datetime.* has no time zone"),
        (Event, MOMENT, MOMENT.replace(tzinfo=None), ValueError, r"end is datetime.* has no time zone"),
        (Event, MOMENT, MOMENT.date(), TypeError, "end is datetime.date.*give an aware datetime"),
        (Event, MOMENT + DAY, MOMENT, ValueError, r"ends .* before it begins"),
        (Event, "2024-03-01", MOMENT, TypeError, "start is '2024-03-01'"),
        (Event, MOMENT, None, TypeError, "end is None"),
        (Reading, MOMENT, MOMENT.date(), TypeError, "the key is a date, so give a datetime.date"),
        (Trace, MOMENT.date(), MOMENT.date(), TypeError, "give an aware datetime"),
    ],
)
def test_in_period_refuses(model, start, end, error, text):
    with pytest.raises(error, match=text) as caught:
        model.objects.in_period(start, end)
    assert str(caught.value).startswith(f"{model._meta.label}.objects.in_period()")


def test_the_manager_is_there_unless_the_model_has_one():
    assert isinstance(Event.objects, PartitionedManager)
    assert isinstance(Event.objects.all(), PartitionedQuerySet)
    assert type(Comment.objects) is models.Manager


# -- the pytest fixture


def test_the_fixture_fails_the_test_that_asked(tmp_path, server):
    (tmp_path / "inner_settings.py").write_text(
        "from tests.settings import *\n"
        f"DATABASES = {{'default': { ({**server.primary.django_settings(), 'TEST': {'NAME': 'inner'}})!r}}}\n"
        "MIGRATION_MODULES = {'counterapp': None}\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """
            import pytest
            from django.utils import timezone
            from django_scaledb.partitions.allowance import allow_unpruned
            from tests.testapp.models import Event

            pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("scaledb_only_pruned")]

            def test_pruned():
                Event.objects.filter(happened_at=timezone.now()).exists()
                with allow_unpruned():
                    Event.objects.count()

            def test_unpruned():
                try:
                    Event.objects.filter(pk=1).exists()
                    1 / 0
                except Exception:
                    pass
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ds", "inner_settings"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert re.search(
        r"testapp\.Event: test_it\.py:1\d \(test_unpruned\) reads 5 of 5 partitions", done.stdout
    )
    assert "it looks up by id alone" in done.stdout
