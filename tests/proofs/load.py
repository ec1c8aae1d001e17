"""Browsers that write and read what they wrote, many at once and for a bounded number of requests."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.proofs.site import ORDER, Client, Site

URLS = """
from django.urls import path
from shop import views

urlpatterns = [
    path("new", views.new), path("pay/<int:pk>/<status>", views.pay), path("read/<int:pk>", views.read),
    path("where", views.where),
    path("anew", views.anew), path("apay/<int:pk>/<status>", views.apay), path("aread/<int:pk>", views.aread),
]
"""
VIEWS = """
import os, threading
from django.db import transaction
from django.http import JsonResponse
from shop.models import Order

def new(request):
    with transaction.atomic():
        order = Order.objects.create(status="new")
    return JsonResponse({"pk": order.pk})

def pay(request, pk, status):
    return JsonResponse({"rows": Order.objects.filter(pk=pk).update(status=status)})

def seen(order):
    return JsonResponse({"status": order and order.status, "db": order and order._state.db})

def read(request, pk):
    return seen(Order.objects.filter(pk=pk).first())

def where(request):
    list(Order.objects.all()[:1])
    threads = [thread.name for thread in threading.enumerate()]
    return JsonResponse({"pid": os.getpid(), "db": Order.objects.all().db,
                         "monitors": threads.count("django_scaledb-monitor")})

async def anew(request):
    return JsonResponse({"pk": (await Order.objects.acreate(status="new")).pk})

async def apay(request, pk, status):
    return JsonResponse({"rows": await Order.objects.filter(pk=pk).aupdate(status=status)})

async def aread(request, pk):
    return seen(await Order.objects.filter(pk=pk).afirst())
"""
# A read while the application is loaded starts a monitor: under preload_app that is one of the parent.
WSGI = """
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()

from django.db import connections
from shop.models import Order

{before_the_fork}
connections.close_all()
"""
ASGI = """
from django.core.asgi import get_asgi_application

application = get_asgi_application()
"""


def application(site: Site, models: str = ORDER, *, read_before_the_fork: bool = True) -> None:
    """Fill the project with an application to put under load."""
    site.models(models)
    site.write("shop/urls.py", URLS)
    site.write("shop/views.py", VIEWS)
    before = "Order.objects.exists()" if read_before_the_fork else ""
    site.write("shop/wsgi.py", WSGI.format(before_the_fork=before))
    site.write("shop/asgi.py", ASGI)
    site.migrate()


@dataclass
class Load:
    """What all browsers saw; `strangers` is where somebody else found the newest row, or did not."""

    requests: int = 0
    stale: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    read_from: Counter[str] = field(default_factory=Counter)
    strangers: Counter[bool] = field(default_factory=Counter)
    slowest: float = 0.0


def put_under_load(
    port: int,
    *,
    browsers: int = 6,
    rounds: int = 8,
    prefix: str = "",
    at_half: Callable[[], None] | None = None,
) -> Load:
    """Let `browsers` do `rounds` of five requests each; `at_half` is called when half of them are done."""
    load, lock = Load(), threading.Lock()
    half = threading.Event()

    def get(client: Client, path: str) -> dict:
        begun = time.monotonic()
        try:
            return json.loads(client.get(f"/{path}"))
        finally:
            with lock:
                load.requests += 1
                load.slowest = max(load.slowest, time.monotonic() - begun)
                if load.requests * 2 >= browsers * rounds * 5:
                    half.set()

    def browse() -> None:
        client, stranger = Client(port), Client(port)
        for number in range(rounds):
            try:
                pk = get(client, f"{prefix}new")["pk"]
                found = [get(client, f"{prefix}read/{pk}")]
                met = get(stranger, f"{prefix}read/{pk}")
                get(client, f"{prefix}pay/{pk}/paid{number}")
                found.append(get(client, f"{prefix}read/{pk}"))
            except (OSError, ValueError) as error:
                load.errors.append(repr(error))
                continue
            with lock:
                for seen, expected in zip(found, ("new", f"paid{number}"), strict=True):
                    load.read_from[seen["db"]] += 1
                    if seen["status"] != expected:
                        load.stale.append(f"{seen} is not {expected}")
                load.strangers[met["status"] is not None] += 1

    threads = [threading.Thread(target=browse) for _ in range(browsers)]
    for thread in threads:
        thread.start()
    if at_half is not None:
        assert half.wait(60)
        at_half()
    for thread in threads:
        thread.join(120)
    return load


def workers(port: int, wanted: int, within: float = 30) -> dict[int, dict]:
    """What each of `wanted` worker processes says of itself, once its reads come from the replica."""
    found: dict[int, dict] = {}
    deadline = time.monotonic() + within

    def ask() -> None:
        while len(found) < wanted and time.monotonic() < deadline:
            said = json.loads(Client(port).get("/where"))
            if said["db"] == "replica1":
                found[said["pid"]] = said

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == wanted, found
    return found
