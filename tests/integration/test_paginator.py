"""Pages by (key, id): every row once, forward and backward, out of one partition where it can be."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from django.core.paginator import EmptyPage, InvalidPage
from django.db import connection
from django.http import Http404
from django.test import RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.views.generic import ListView

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.paginator import KeysetListMixin, KeysetPaginator
from django_scaledb.partitions.uuid7 import uuid7_floor
from django_scaledb.testing import assert_pruned
from tests.testapp.models import Account, Event, Odd, Reading, Trace

pytestmark = pytest.mark.django_db

START = datetime(2019, 1, 1, tzinfo=UTC)
YEARS = 6


@pytest.fixture
def months(db):
    """Six years of monthly partitions, an index to begin at, and a row in every day."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE INDEX ON testapp_event (happened_at, id)")
        for month in range(YEARS * 12):
            first, last = (START.replace(year=2019 + m // 12, month=m % 12 + 1) for m in (month, month + 1))
            cursor.execute(
                f"CREATE TABLE event_m{month} PARTITION OF testapp_event "
                f"FOR VALUES FROM ('{first.isoformat()}') TO ('{last.isoformat()}')"
            )
        cursor.execute(
            "INSERT INTO testapp_event (happened_at, size) SELECT day, 1 "
            "FROM generate_series('2019-01-01T00:00Z'::timestamptz, '2024-12-31T00:00Z', '1 day') day"
        )
        cursor.execute("ANALYZE testapp_event")


def forward(paginator: KeysetPaginator) -> list[list]:
    page = paginator.page()
    pages = [list(page)]
    while page.has_next():
        page = paginator.page(page.next_page_number())
        pages.append(list(page))
    with pytest.raises(EmptyPage):
        page.next_page_number()
    return pages


def backward(paginator: KeysetPaginator) -> list[list]:
    page = paginator.page()
    while page.has_next():
        page = paginator.page(page.next_page_number())
    pages = [list(page)]
    while page.has_previous():
        page = paginator.page(page.previous_page_number())
        pages.insert(0, list(page))
    return pages


def scattered_events() -> None:
    """Ties, microseconds, and gaps of years."""
    chance = random.Random(5)
    for moment in (START, START + timedelta(days=40, microseconds=1), datetime(1971, 5, 6, tzinfo=UTC)):
        for size in range(7):
            offset = timedelta(microseconds=chance.choice([0, 0, 1, 2]))
            Event.objects.create(happened_at=moment + offset, size=size)
    Event.objects.create(happened_at=datetime(2090, 1, 1, tzinfo=UTC))


def scattered_readings() -> None:
    for day in (date(2024, 2, 29), date(2024, 3, 1), date(1, 1, 2), date(9999, 12, 31)):
        for value in range(5):
            Reading.objects.create(day=day, value=value)


def scattered_traces() -> None:
    for n in range(9):
        moment = START + timedelta(days=n // 3 * 100)
        Trace.objects.create(pk=UUID(int=uuid7_floor(moment).int | 7 << 76 | 2 << 62 | n), name=str(n))


def scattered_odd() -> None:
    for n in range(9):
        Odd.objects.create(made_at=START + timedelta(days=n // 2 * 40), label=str(n))


MODELS = [
    (Event, "happened_at", scattered_events),
    (Reading, "day", scattered_readings),
    (Trace, "id", scattered_traces),
    (Odd, "made_at", scattered_odd),
]


@pytest.mark.parametrize("per_page", [1, 3, 4, 100])
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize(("model", "key", "fill"), MODELS)
def test_every_row_once_in_order(model, key, fill, sign, per_page):
    fill()
    order = [sign + key] if key == "id" else [sign + key, sign + "pk"]
    expected = list(model.objects.order_by(*order))
    paginator = KeysetPaginator(model.objects.order_by(sign + key), per_page)
    pages = forward(paginator)
    assert [row for page in pages for row in page] == expected
    assert {len(page) for page in pages[:-1]} <= {per_page}
    assert [row for page in backward(paginator) for row in page] == expected


def test_filters_joins_and_values_are_kept():
    account = Account.objects.create(name="a")
    scattered_events()
    Event.objects.filter(size__lt=5).update(account=account)
    ones = Event.objects.filter(account__name="a").select_related("account")
    found = [row for page in forward(KeysetPaginator(ones, 2)) for row in page]
    assert found == list(ones.order_by("-happened_at", "-pk"))
    values = Event.objects.values("id", "happened_at")
    assert sum(map(len, forward(KeysetPaginator(values, 4)))) == Event.objects.count()
    with pytest.raises(TypeError, match="happened_at and id"):
        KeysetPaginator(Event.objects.values("size"), 4).page()
    old = Event.objects.in_period(datetime(1971, 1, 1, tzinfo=UTC), datetime(1972, 1, 1, tzinfo=UTC))
    assert sum(map(len, forward(KeysetPaginator(old, 4)))) == 7


def test_rows_that_come_and_go_between_two_pages():
    events = [Event.objects.create(happened_at=START + timedelta(days=day)) for day in range(10)]
    paginator = KeysetPaginator(Event.objects.order_by("happened_at"), 3)
    page = paginator.page()
    Event.objects.create(happened_at=START - timedelta(days=1))
    events[2].delete()  # the row that the token stands at
    second = paginator.page(page.next_token)
    assert list(second) == events[3:6]
    assert list(paginator.page(second.previous_token))[1:] == events[:2]
    Event.objects.filter(happened_at__gt=events[5].happened_at).delete()
    empty = paginator.page(second.next_token)
    assert list(empty) == []
    assert not empty.has_next()
    assert list(paginator.page(empty.previous_page_number())) == events[3:6]
    Event.objects.all().delete()
    nothing = paginator.page(second.previous_token)
    assert not nothing.has_previous()
    assert list(paginator.page(nothing.next_token)) == []
    assert not KeysetPaginator(Event.objects.all(), 3).page().has_other_pages()


def test_a_page_touches_one_partition_however_deep_it_is(months):
    paginator = KeysetPaginator(Event.objects.in_period(START, START.replace(year=2025)), 10)
    deep = Event.objects.get(happened_at=START.replace(year=2020, month=2, day=25))
    token = paginator._encode("next", paginator._position(deep))
    with assert_pruned(at_most=1), CaptureQueriesContext(connection) as captured:
        page = paginator.page(token)
    assert len(captured) == 1
    assert [e.happened_at.day for e in page] == list(range(24, 14, -1))
    with assert_pruned(at_most=1):
        second = paginator.page(page.next_token)
        assert list(paginator.page(second.previous_token)) == list(page)
    with assert_pruned(at_most=2), CaptureQueriesContext(connection) as captured:
        third = paginator.page(second.next_token)  # reaches into the month before: two months more
    assert [e.happened_at.day for e in third] == [4, 3, 2, 1, 31, 30, 29, 28, 27, 26]
    assert len(captured) == 2


def test_the_first_page_begins_at_now_and_looks_further_only_when_it_must(months):
    with CaptureQueriesContext(connection) as captured:
        page = KeysetPaginator(Event.objects.all(), 10).page()
    assert [e.happened_at.day for e in page] == list(range(31, 21, -1))
    assert 2 <= len(captured) <= 7  # years without a row lie between: each step is twice as wide
    with CaptureQueriesContext(connection) as captured:
        assert len(KeysetPaginator(Event.objects.filter(size=2), 10).page()) == 0
    assert len(captured) == 7


def test_the_index_is_begun_at_the_row(months):
    paginator = KeysetPaginator(Event.objects.order_by("happened_at"), 10)
    event = Event.objects.get(happened_at=START.replace(year=2022, day=9))
    queryset = Event.objects.order_by("happened_at", "pk").filter(
        *paginator._beyond(paginator._position(event), False)
    )
    plan = queryset[:10].explain()
    assert "Index Cond" in plan
    assert "ROW(" in plan


def test_tokens_are_opaque_and_of_one_model():
    scattered_events()
    scattered_readings()
    token = KeysetPaginator(Event.objects.all(), 2).page().next_token
    for bad in ("x", token[:-1], "a" + token, "0", "last", token.partition(":")[0]):
        with pytest.raises(InvalidPage, match=r"leads to no page of testapp\.Event"):
            KeysetPaginator(Event.objects.all(), 2).page(bad)
    with pytest.raises(InvalidPage):
        KeysetPaginator(Reading.objects.all(), 2).page(token)
    with override_settings(SECRET_KEY="another", SECRET_KEY_FALLBACKS=["only for tests"]):
        assert KeysetPaginator(Event.objects.all(), 2).page(token)
    with override_settings(SECRET_KEY="another"), pytest.raises(InvalidPage):
        KeysetPaginator(Event.objects.all(), 2).page(token)


def test_a_project_without_time_zones():
    with override_settings(USE_TZ=False):
        moments = [datetime(2024, 1, 1, 0, 0, n) for n in range(5)]  # noqa: DTZ001
        for moment in moments:
            Event.objects.create(happened_at=moment)
        found = [e.happened_at for page in forward(KeysetPaginator(Event.objects.all(), 2)) for e in page]
        assert found == moments[::-1]


@pytest.mark.parametrize(
    ("queryset", "error", "text"),
    [
        (lambda: Account.objects.all(), (ConfigurationError, AssertionError), "Account"),
        (lambda: Event.objects.order_by("size"), ValueError, "ordered by size; pages by position"),
        (lambda: Event.objects.order_by("happened_at", "-pk"), ValueError, "ordered by happened_at, -pk"),
        (lambda: Event.objects.order_by("?"), ValueError, r"ordered by \?"),
        (lambda: Event.objects.order_by("happened_at", "size"), ValueError, "ordered by happened_at, size"),
        (lambda: Event.objects.all()[:5], ValueError, "a slice has no pages"),
    ],
)
def test_what_has_no_pages(queryset, error, text):
    with pytest.raises(error, match=text):
        KeysetPaginator(queryset(), 5)
    with pytest.raises(ValueError, match="a page of 0 rows"):
        KeysetPaginator(Event.objects.all(), 0)


class EventList(KeysetListMixin, ListView):
    model = Event
    paginate_by = 8


def test_a_list_view():
    scattered_events()
    requests = RequestFactory()
    view = EventList.as_view(template_name="unused.html")
    context = view(requests.get("/")).context_data
    assert context["is_paginated"]
    seen = list(context["object_list"])
    while context["page_obj"].has_next():
        token = context["page_obj"].next_page_number()
        context = view(requests.get("/", {"page": token})).context_data
        seen += context["object_list"]
    assert seen == list(Event.objects.order_by("-happened_at", "-pk"))
    for bad in ("7", "last", "nonsense"):
        with pytest.raises(Http404):
            view(requests.get("/", {"page": bad}))


def test_nothing_is_counted():
    scattered_events()
    with CaptureQueriesContext(connection) as captured:
        forward(KeysetPaginator(Event.objects.all(), 3))
    assert not [query for query in captured if "COUNT" in query["sql"] or "OFFSET" in query["sql"]]
