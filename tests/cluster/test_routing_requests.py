"""Between requests: what a browser wrote it reads, whoever serves it; the others read replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import authenticate, get_user_model, login
from django.contrib.sessions.models import Session
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import redirect
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from django_scaledb.routing import state
from django_scaledb.routing.middleware import COOKIE, HEADER
from django_scaledb.testing import Cluster
from tests.routing import eventually, migrate, routed
from tests.routing_operations import READS, SEEN, WRITES, prepare, where
from tests.testapp.models import Account

pytestmark = pytest.mark.cluster

MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_scaledb.routing.ReadYourWritesMiddleware",
]


def write(request: HttpRequest) -> HttpResponse:
    found = Account.objects.create(name="by a request")
    return JsonResponse({"pk": found.pk, "db": where(), "seen": Account.objects.filter(pk=found.pk).exists()})


def read(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"db": where()})


def session(request: HttpRequest) -> HttpResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    return JsonResponse({"db": where()})


def enter(request: HttpRequest) -> HttpResponse:
    login(request, authenticate(request, username="ann", password="x"))
    return redirect("/who/")


def who(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"user": request.user.get_username(), "db": where()})


def order(request: HttpRequest) -> HttpResponse:
    return redirect(f"/ordered/?pk={Account.objects.create(name='ordered').pk}")


def ordered(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"seen": Account.objects.filter(pk=request.GET["pk"]).exists(), "db": where()})


def perform(request: HttpRequest) -> HttpResponse:
    """Do one of the operations, in a request that begins on the replica."""
    before = where()
    {"WRITES": WRITES, "READS": READS, "SEEN": SEEN}[request.GET["kind"]][request.GET["name"]]()
    return JsonResponse({"before": before, "after": where()})


def stream(request: HttpRequest) -> HttpResponse:
    Account.objects.create(name="before the stream")
    return StreamingHttpResponse(where() + " " for _ in range(3))


async def awrite(request: HttpRequest) -> HttpResponse:
    async def child() -> None:
        await Account.objects.acreate(name="by a child task")

    await asyncio.gather(*(asyncio.create_task(child()) for _ in range(2)))
    return JsonResponse({"db": await sync_to_async(where)()})


async def astream(request: HttpRequest) -> HttpResponse:
    await Account.objects.acreate(name="before the stream")

    async def pieces():
        for _ in range(3):
            yield (await sync_to_async(where)()) + " "

    return StreamingHttpResponse(pieces())


views = [write, read, session, enter, who, order, ordered, perform, stream, awrite, astream]
urlpatterns = [path(f"{view.__name__}/", view) for view in views]


@pytest.fixture(scope="module")
def cluster(django_db_setup, django_db_blocker) -> Iterator[Cluster]:
    with Cluster(1) as cluster, django_db_blocker.unblock():
        migrate(cluster)
        with routed(cluster):
            get_user_model().objects.create_user("ann", password="x")
        prepare(cluster)
        cluster.standbys[0].set_lag(3)
        yield cluster


@pytest.fixture(autouse=True)
def _project(cluster: Cluster) -> Iterator[None]:
    with (
        routed(cluster, MAX_LAG=60),
        override_settings(
            ROOT_URLCONF=__name__,
            MIDDLEWARE=MIDDLEWARE,
            SESSION_ENGINE="django.contrib.sessions.backends.db",
            ALLOWED_HOSTS=["*"],
        ),
    ):
        state.thread.frame = state.Frame(state.Scope())
        state.current.set(None)
        eventually(lambda: where() == "replica1", 5)
        yield


def get(client: Client, name: str, **headers: str) -> dict:
    return json.loads(client.get(f"/{name}/", headers=headers).content)


def test_the_writer_reads_the_primary_until_the_write_has_arrived_and_others_the_replica() -> None:
    browser, another = Client(), Client()

    assert get(browser, "write") | {"pk": 0} == {"pk": 0, "db": "default", "seen": True}
    assert get(browser, "read") == {"db": "default"}
    assert get(another, "read") == {"db": "replica1"}
    assert get(browser, "read") == {"db": "default"}
    assert where() == "replica1", "this thread, outside of any request"
    eventually(lambda: get(browser, "read") == {"db": "replica1"}, 5)


def test_post_redirect_get() -> None:
    browser = Client()
    response = browser.post("/order/", follow=True)
    assert json.loads(response.content) == {"seen": True, "db": "default"}
    again, _ = response.redirect_chain[-1]
    assert json.loads(browser.get(again).content) == {"seen": True, "db": "default"}
    assert json.loads(Client().get(again).content)["db"] == "replica1", "another browser waits for nobody"
    eventually(lambda: json.loads(browser.get(again).content) == {"seen": True, "db": "replica1"}, 5)


def _performed(kind: str, name: str, method: str) -> tuple[Client, dict]:
    browser = Client()
    response = browser.generic(method, "/perform/", QUERY_STRING=urlencode({"kind": kind, "name": name}))
    return browser, json.loads(response.content)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_a_view_wrote_it_reads_and_so_does_the_next(method: str) -> None:
    for kind, name in [*(("WRITES", name) for name in WRITES), *(("SEEN", name) for name in SEEN)]:
        browser, seen = _performed(kind, name, method)
        assert seen == {"before": "replica1", "after": "default"}, name
        assert get(browser, "read") == {"db": "default"}, name


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_view_that_wrote_nothing_pins_nobody(method: str) -> None:
    for name in READS:
        browser, seen = _performed("READS", name, method)
        assert seen == {"before": "replica1", "after": "replica1"}, name
        assert COOKIE not in browser.cookies, name


def test_one_cookie_and_only_after_a_write() -> None:
    browser = Client()
    assert COOKIE not in browser.get("/read/").cookies
    cookie = browser.get("/write/").cookies[COOKIE]
    assert cookie["httponly"]
    assert cookie["samesite"] == "Lax"
    assert 0 < cookie["max-age"] <= 3600
    assert COOKIE not in browser.get("/read/").cookies


def test_a_forged_cookie_is_ignored() -> None:
    browser = Client()
    browser.get("/write/")
    signed = browser.cookies[COOKIE].value
    for forged in ("1-ff.1.ffffffff", signed[:-1] + "x", signed.replace(":", "0:", 1), "x" * 5000):
        browser.cookies[COOKIE] = forged
        assert get(browser, "read") == {"db": "replica1"}


def test_a_client_without_cookies_sends_the_header() -> None:
    token = Client().get("/write/").headers[HEADER]
    assert get(Client(), "read") == {"db": "replica1"}
    assert get(Client(), "read", **{HEADER: token}) == {"db": "default"}


def test_a_login_is_seen_at_once() -> None:
    browser = Client()
    assert json.loads(browser.post("/enter/", follow=True).content)["user"] == "ann"
    assert get(browser, "who")["user"] == "ann"
    assert Session.objects.all().db == "default"


def test_a_session_saved_after_the_middleware_pins_nobody() -> None:
    browser = Client()
    assert get(browser, "session") == {"db": "replica1"}
    assert COOKIE not in browser.cookies
    assert where() == "replica1"
    assert get(browser, "session") == {"db": "replica1"}


def test_a_stream_is_made_after_what_its_request_wrote() -> None:
    assert b"".join(Client().get("/stream/").streaming_content).split() == [b"default"] * 3
    assert where() == "replica1"


def test_asynchronous_views_and_streams() -> None:
    async def run() -> list[object]:
        client = AsyncClient()
        first = await client.get("/awrite/")
        second = await client.get("/read/")
        other = await AsyncClient().get("/read/")
        streamed = await AsyncClient().get("/astream/")
        pieces = [piece async for piece in streamed.streaming_content]
        return [json.loads(r.content)["db"] for r in (first, second, other)] + [b"".join(pieces).split()]

    assert asyncio.run(run()) == ["default", "default", "replica1", [b"default"] * 3]
