"""The admin's overview page: who may see it, what it says, and that nothing of it fails the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import include, path, reverse
from django.utils import timezone

from django_scaledb.admin import OverviewAdmin
from django_scaledb.models import Conversion, LastRun, Overview
from django_scaledb.overview import facts, page
from django_scaledb.partitions import maintenance
from django_scaledb.routing.lag import SLOTS, Slot
from django_scaledb.routing.status import Server
from django_scaledb.testing import Cluster
from tests.counterapp.models import Download, Shipment
from tests.testapp.models import Event, Long

pytestmark = pytest.mark.django_db(transaction=True)
URL = "/admin/django_scaledb/overview/"


class OwnSite(admin.AdminSite):
    site_header = "Own"


own_site = OwnSite(name="own")
own_site.register(Overview, OverviewAdmin)
urlpatterns = [
    path("admin/", admin.site.urls),
    path("own/", own_site.urls),
    path("nested/", include([path("accounts/", include("django.contrib.auth.urls"))])),
]


@pytest.fixture
def client() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def text_of(client: Client, url: str = URL) -> str:
    response = client.get(url)
    assert response.status_code == 200
    return response.content.decode()


def section(html: str, name: str) -> str:
    """The part of the page under one heading, without tags, in one line."""
    found = html.partition(f'<h2 id="scaledb-{name}">')[2].partition('<section class="module"')[0]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", found)))


# -- who may see it


def test_the_url_and_the_link_from_the_index(client: Client) -> None:
    assert reverse("admin:django_scaledb_overview") == URL
    index = client.get("/admin/").content.decode()
    assert f'href="{URL}"' in index
    assert "/django_scaledb/overview/add/" not in index


def test_staff_needs_the_permission() -> None:
    user = User.objects.create_user("ann", is_staff=True)
    client = Client()
    client.force_login(user)
    assert client.get(URL).status_code == 403
    assert URL not in client.get("/admin/").content.decode()
    user.user_permissions.add(Permission.objects.get(codename="view_overview"))
    assert client.get(URL).status_code == 200
    assert f'href="{URL}"' in client.get("/admin/").content.decode()


def test_others_are_asked_to_log_in() -> None:
    user = User.objects.create_user("bob")
    user.user_permissions.add(Permission.objects.get(codename="view_overview"))
    client = Client()
    client.force_login(user)
    assert client.get(URL).status_code == 302
    assert Client().get(URL).status_code == 302


def test_it_takes_nothing_but_get(client: Client) -> None:
    for method in ("post", "put", "delete", "patch"):
        assert getattr(client, method)(URL).status_code == 405
    assert client.head(URL).status_code == 200
    for rest in ("add/", "1/change/", "1/delete/", "1/history/"):
        assert client.get(URL + rest).status_code == 404


@override_settings(ROOT_URLCONF=__name__)
def test_an_own_admin_site_takes_one_line(client: Client) -> None:
    html = text_of(client, "/own/django_scaledb/overview/")
    assert "Own" in html
    assert 'href="/own/"' in html, "links stay in the site"
    assert 'href="/admin/' not in html
    assert "/own/django_scaledb/overview/" in client.get("/own/").content.decode()


def test_dumpdata_does_not_miss_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("dumpdata", "django_scaledb")
    assert capsys.readouterr().out.strip() == "[]"


# -- what it says


def set_of(html: str, label: str) -> str:
    """The part of the page about one model."""
    return html.partition(f'id="set-{label.lower().replace(".", "-")}"')[2].partition("</section>")[0]


def test_a_healthy_set(client: Client) -> None:
    event = set_of(text_of(client), "testapp.Event")
    assert re.findall(r'class="scaledb-bar scaledb-([\w-]+)"', event) == [
        "attached",
        *["premade"] * 3,
        "default",
    ]
    assert "3 of 3 periods ahead" in event
    assert "nothing to do" in event
    assert "none was written down" in event
    assert event.count("<tr><td>public.testapp_event_") == 5
    assert '<svg class="scaledb-timeline' in event
    assert 'role="img"' in event
    assert "<caption" in event


def test_a_gap_with_the_sql_that_fills_it(client: Client) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid "
            "WHERE inhparent = 'testapp_event'::regclass ORDER BY 1"
        )
        second = cursor.fetchall()[1][0]
        cursor.execute(f"DROP TABLE {second}")
    try:
        call_command("check_counters", verbosity=0)
        html = text_of(client)
        event = set_of(html, "testapp.Event")
        assert 'class="scaledb-strip scaledb-gap"' in event
        assert "no partition takes rows of" in event
        assert f"CREATE TABLE &quot;public&quot;.&quot;{second}&quot;" in event
        assert "-- locks: SHARE UPDATE EXCLUSIVE on public.testapp_event" in event
        assert "1 action" in event
    finally:
        call_command("rotate_partitions", "testapp.Event", verbosity=0)
    html = text_of(client)
    event = set_of(html, "testapp.Event")
    assert 'scaledb-gap"' not in event
    assert re.search(r"Last rotation</dt><dd><time [^>]*>[^<]*</time>, ok", event)


def test_counters_and_their_last_check(client: Client) -> None:
    assert "never manage.py check_counters counterapp.UploadsPerProject" in section(
        text_of(client), "counters"
    )
    now = timezone.now()
    LastRun.objects.create(
        kind="check_counters",
        subject="counterapp.UploadsPerProject",
        ok=True,
        finished_at=now,
        detail={"drifted_keys": 0, "reasons": []},
    )
    LastRun.objects.create(
        kind="check_counters",
        subject="counterapp.UploadsPerMonth",
        ok=False,
        finished_at=now - timedelta(hours=3),
        detail={"drifted_keys": 2, "reasons": ["it <has> no triggers"]},
    )
    html = text_of(client)
    said = section(html, "counters")
    assert re.search(
        r"counterapp\.UploadsPerProject counterapp\.Upload signals [\d-]+ [\d:]+ UTC , 0.minutes ago exact",
        said,
    )
    assert re.search(r"UploadsPerMonth .* 3.hours ago 2 keys drifted", said)
    assert "it &lt;has&gt; no triggers" in html
    assert "manage.py rebuild_counters counterapp.UploadsPerMonth" in said


def test_a_conversion_and_how_far_it_is(client: Client) -> None:
    common: dict[str, Any] = {"model": "testapp.Event", "table_schema": "public", "strategy": "copy"}
    Conversion.objects.create(
        table_name="testapp_event", phase="copying", rows_done=250, rows_total=1000, **common
    )
    Conversion.objects.create(table_name="other", phase="done", ended_at=timezone.now(), **common)
    html = text_of(client)
    assert '<progress value="250" max="1000"' in html
    said = section(html, "conversions")
    assert "250 of about 1,000 rows copied" in said
    assert "done" in said


def test_the_primary_alone(client: Client) -> None:
    assert re.search(r"default primary ok", section(text_of(client), "replicas"))


@override_settings(LANGUAGE_CODE="de", USE_THOUSAND_SEPARATOR=True)
def test_numbers_of_the_drawing_are_the_same_in_every_language(client: Client) -> None:
    html = text_of(client)
    places = re.findall(r'<rect [^>]*\b(?:x|y|width|height)="([^"]*)"', html)
    assert len(places) > 20
    assert all(re.fullmatch(r"\d+(\.\d+)?%?", place) for place in places)


def test_nothing_in_it_needs_an_exception_from_a_strict_policy(client: Client) -> None:
    html = text_of(client).partition('<div id="content"')[2]
    assert not re.search(r"\sstyle=|<style|<script|\son\w+=", html)


# -- what fails is a sentence


def broken(client: Client, name: str) -> str:
    html = text_of(client)
    assert '<h2 id="scaledb-replicas">' in html
    return section(html, name)


@pytest.fixture
def renamed() -> Iterator[Any]:
    moved: list[str] = []

    def rename(table: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f'ALTER TABLE "{table}" RENAME TO "{table}_away"')
        moved.append(table)

    yield rename
    with connection.cursor() as cursor:
        for table in moved:
            cursor.execute(f'ALTER TABLE "{table}_away" RENAME TO "{table}"')


@pytest.mark.parametrize("atomic", [False, True])
def test_a_model_that_was_not_migrated(client: Client, renamed: Any, atomic: bool) -> None:
    renamed("testapp_reading")
    connection.settings_dict["ATOMIC_REQUESTS"] = atomic
    try:
        said = broken(client, "sets")
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert "there is no table 'testapp_reading' in the database 'default'; run manage.py migrate" in said
    assert "testapp.Event ok" in said


@pytest.mark.parametrize("atomic", [False, True])
def test_bookkeeping_that_was_not_migrated(client: Client, renamed: Any, atomic: bool) -> None:
    renamed("django_scaledb_last_run")
    renamed("django_scaledb_conversion")
    connection.settings_dict["ATOMIC_REQUESTS"] = atomic
    try:
        html = text_of(client)
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert "Cannot show the last rotations" in section(html, "sets")
    assert "testapp.Event ok" in section(html, "sets")
    assert "Cannot show the last check" in section(html, "counters")
    assert "No table is being converted" in section(html, "conversions")


def test_a_role_that_may_only_read_the_catalog(server: Cluster) -> None:
    Event.objects.create(happened_at=datetime(2001, 1, 1, tzinfo=UTC))
    server.primary.execute("CREATE ROLE onlooker")
    server.primary.execute(f'GRANT onlooker TO "{connection.settings_dict["USER"]}"')
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET ROLE onlooker")
        built = page.build(timezone.now())
        later = page.build(timezone.now() + timedelta(days=60))
    finally:
        with connection.cursor() as cursor:
            cursor.execute("RESET ROLE")
        server.primary.execute("DROP ROLE onlooker")
    labels = {shown.label: shown for shown in built.summary}
    assert (labels["testapp.Event"].error, labels["testapp.Event"].problems) == ("", [])
    assert labels["testapp.Event"].picture is not None
    assert any("permission denied" in note for note in built.notes), "the last rotations cannot be read"
    due = next(shown for shown in later.summary if shown.label == "testapp.Event")
    assert due.next_problem == "", "who only looks need not own the table"
    assert "CREATE TABLE" in due.steps[0].sql or "permission denied" in due.steps[0].problem
    assert "permission denied" in (built.counters.content or [])[0].problem
    assert "permission denied" in built.conversions.problem


def test_rows_in_a_default_partition_are_noticed(client: Client) -> None:
    assert "rows lie in the default partition" not in section(text_of(client), "sets")
    Event.objects.create(happened_at=datetime(2001, 1, 1, tzinfo=UTC))
    said = section(text_of(client), "sets")
    assert "rows lie in the default partition public.testapp_event_default" in said
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE testapp_event CASCADE")


def test_a_replica_that_is_down(client: Client) -> None:
    down = {**connection.settings_dict, "HOST": "127.0.0.1", "PORT": "1", "TEST": {"MIRROR": None}}
    connections.settings["down"] = down
    try:
        with override_settings(SCALEDB={"REPLICAS": ["down"]}):
            said = section(text_of(client), "replicas")
    finally:
        del connections.settings["down"]
    assert re.search(r"default primary ok", said)
    assert re.search(r"down replica out connection .*refused", said)


def test_a_transaction_that_is_open_stays_usable(client: Client, renamed: Any) -> None:
    renamed("django_scaledb_last_run")
    with transaction.atomic():
        page.build(timezone.now())
        assert Event.objects.count() == 0


# -- how much it takes


def test_the_number_of_queries_does_not_grow_with_the_partitions(client: Client) -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            text_of(client)
        return len(captured)

    now = timezone.now()
    # Other tests have rotated into a distant future, and what is pending takes queries, too.
    maintenance.rotate([Download, Event, Shipment])
    text_of(client)
    before = queries()
    more = maintenance.create_span([Event, Long], now, now + timedelta(days=150))
    assert sum(len(model.results) for model in more.models) > 100
    try:
        assert queries() == before
    finally:
        with connection.cursor() as cursor:
            made = [str(result.partition.name) for model in more.models for result in model.results]
            for name in made:
                cursor.execute(f'DROP TABLE "{name}"')
    assert before < 60


def test_as_many_actions_as_there_may_be_take_a_bounded_number_of_queries(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = timezone.now() + timedelta(days=800)
    monkeypatch.setattr(timezone, "now", lambda: later)
    with CaptureQueriesContext(connection) as captured:
        built = page.build(later)
    (long,) = [shown for shown in built.summary if shown.label == "testapp.Long"]
    assert long.unseen + len(long.steps) > 700
    assert sum(len(shown.steps) for shown in built.summary) <= facts.SQL_SHOWN
    assert len(captured) < 200


# -- a replica's minutes


def replica(*past: Slot | None) -> facts.Replica:
    slots = [None] * (SLOTS - len(past)) + list(past)
    return facts.Replica("default", Server("replica1", "replica"), slots)


def test_the_worst_of_the_last_minutes() -> None:
    found = replica(Slot(1, 7.0), *[None] * 12, Slot(14, 0.5), Slot(15, None, out=True))
    assert (found.worst(60), found.worst(300)) == (0.5, 7.0)
    assert replica(Slot(1, None, out=True)).worst(300) is None
    assert not replica().is_watched


def test_the_minutes_as_columns() -> None:
    rects = list(page._spark(replica(Slot(1, 5.0), None, Slot(3, 99.0), Slot(4, 0.0, out=True)), 10.0))
    assert [(rect.slug, float(rect.height)) for rect in rects] == [
        ("lag", 10.0),
        ("lag", 20.0),
        ("out", 20.0),
    ]
