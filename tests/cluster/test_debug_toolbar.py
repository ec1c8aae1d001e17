"""The panel of django-debug-toolbar, in the toolbar itself, over a primary with a standby."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import pytest
from django.core.checks import registry as checks
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.test import Client, modify_settings, override_settings
from django.urls import include, path
from django.utils import timezone

from django_scaledb.testing import Cluster
from tests.routing import eventually, migrate, routed
from tests.testapp.models import Account, Event

pytestmark = pytest.mark.cluster

PANEL = "django_scaledb.contrib.debug_toolbar.PartitionsPanel"


def page(request: HttpRequest) -> HttpResponse:
    list(Event.objects.filter(size=4711))
    list(Event.objects.filter(happened_at=timezone.now()))
    list(Event.objects.using("default").filter(pk=1))
    Account.objects.create(name="by a request")
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM testapp_event WHERE size = %s", [12])
    return HttpResponse("<html><body>a page</body></html>")


def quiet(request: HttpRequest) -> HttpResponse:
    return HttpResponse("<html><body>a page</body></html>")


urlpatterns = [path("", page), path("quiet/", quiet)]


@pytest.fixture
def cluster(scaledb_cluster: Cluster, django_db_blocker: pytest.FixtureRequest) -> Iterator[Cluster]:
    with django_db_blocker.unblock():  # type: ignore[attr-defined]
        migrate(scaledb_cluster)
        with routed(scaledb_cluster):
            eventually(lambda: Account.objects.all().db == "replica1", 10)
            yield scaledb_cluster


@pytest.fixture
def client(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    # An application that comes and goes leaves its checks, which ask for its middleware.
    monkeypatch.setattr(checks.registry, "registered_checks", set(checks.registry.registered_checks))
    with (
        modify_settings(INSTALLED_APPS={"append": ["django.contrib.staticfiles", "debug_toolbar"]}),
        override_settings(
            DEBUG=True,
            MIDDLEWARE=["debug_toolbar.middleware.DebugToolbarMiddleware"],
            DEBUG_TOOLBAR_PANELS=["debug_toolbar.panels.sql.SQLPanel", PANEL],
            DEBUG_TOOLBAR_CONFIG={"SHOW_TOOLBAR_CALLBACK": show, "RENDER_PANELS": False},
            ROOT_URLCONF=__name__,
        ),
    ):
        # Its models cannot be imported before it is an installed application.
        urlpatterns[2:] = [path("__debug__/", include("debug_toolbar.urls"))]
        yield Client()


def show(request: HttpRequest) -> bool:
    return True


def panel(client: Client, url: str) -> tuple[str, str]:
    """The page with the toolbar in it, and what it shows when it is opened."""
    body = client.get(url).content.decode()
    request_id = re.search(r'data-request-id="(\w+)"', body)
    assert request_id, body
    answer = client.get(
        "/__debug__/render_panel/", {"request_id": request_id[1], "panel_id": "PartitionsPanel"}
    ).json()
    return body, html.unescape(answer["content"])


def test_partitions_server_and_reason_of_each_query(client: Client) -> None:
    wrappers = len(connections["default"].execute_wrappers)
    body, content = panel(client, "/")
    assert "3 not pruned, 5 queries" in body
    rows = [
        re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row))
        for row in re.findall(r"<tr>.*?</tr>", content, re.S)
    ]
    _, by_size, by_key, by_id, insert, raw = rows
    assert "4 of 4 testapp.Event" in by_size
    assert "nothing restricts happened_at. Add a span of the key" in by_size
    assert "replica1 a healthy replica has all that this context wrote or saw" in by_size
    assert "(page)" in by_size
    assert "test_debug_toolbar.py" in by_size
    assert "1 of 4 testapp.Event" in by_key
    assert "Add" not in by_key
    assert "4 of 4 testapp.Event it looks up by id alone" in by_id
    assert "default using('default')" in by_id
    assert "– default it writes INSERT" in insert
    assert "4 of 4 testapp.Event nothing restricts happened_at" in raw
    assert "default the code opened a cursor on it" in raw
    assert len(connections["default"].execute_wrappers) == wrappers


def test_a_request_without_queries(client: Client) -> None:
    body, content = panel(client, "/quiet/")
    assert "0 not pruned, 0 queries" in body
    assert "No queries" in content


def test_a_replica_that_cannot_answer(client: Client, cluster: Cluster) -> None:
    list(Event.objects.filter(happened_at=timezone.now()))
    cluster.standbys[0].kill()
    try:
        _, content = panel(client, "/")
        assert "replica1 could not answer" in content or "no replica is healthy" in content
        assert content.count("<td>default") == 5
    finally:
        cluster.standbys[0].restart()
        eventually(lambda: Account.objects.all().db == "replica1", 20)
