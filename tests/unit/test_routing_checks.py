"""Each mistake in routing's settings has its check, and nothing is connected to before somebody reads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from django.test import override_settings

from django_scaledb.routing.checks import check_routing

OURS = {"ENGINE": "django_scaledb.backend", "NAME": "x"}
REPLICA = {**OURS, "TEST": {"MIRROR": "default"}}
GOOD: dict[str, Any] = {
    "DATABASES": {"default": OURS, "replica1": REPLICA, "orders": OURS},
    "SCALEDB": {"REPLICAS": ["replica1"]},
    "DATABASE_ROUTERS": ["django_scaledb.routing.ReplicaRouter"],
    "MIDDLEWARE": ["django_scaledb.routing.ReadYourWritesMiddleware"],
}


def found(**changes: Any) -> dict[str, str]:
    """What the checks say about `GOOD` with these changes, as {id: message}."""
    with override_settings(**{**GOOD, **changes}):
        messages = check_routing(None)
    assert all(message.hint for message in messages)
    return {message.id.partition(".")[2]: message.msg for message in messages}


@pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
@pytest.mark.parametrize(
    ("changes", "id", "text"),
    [
        ({"SCALEDB": {"REPLICAS": ["replica1", "other"]}}, "E021", "the replica 'other'"),
        ({"SCALEDB": {"PRIMARY": "main", "REPLICAS": ["replica1"]}}, "E021", "the primary 'main'"),
        (
            {"SCALEDB": {"REPLICAS": ["replica1"], "MORE_PRIMARIES": {"orders": {"REPLICAS": ["replica1"]}}}},
            "E022",
            "'replica1' twice",
        ),
        (
            {
                "DATABASES": {
                    "default": OURS,
                    "replica1": {**REPLICA, "ENGINE": "django.db.backends.postgresql"},
                }
            },
            "E023",
            "ENGINE of the replica 'replica1'",
        ),
        ({"DATABASES": {"default": OURS, "replica1": OURS}}, "W024", "the replica 'replica1'"),
        (
            {"SCALEDB": {"REPLICAS": ["replica1"], "READ_FROM_PRIMARY": ["testapp.Nothing"]}},
            "W025",
            "'testapp.Nothing'",
        ),
        ({"DATABASE_ROUTERS": []}, "W026", "no router"),
        ({"MIDDLEWARE": ["django.middleware.common.CommonMiddleware"]}, "W027", "to the next request"),
    ],
)
def test_each_mistake_has_its_check(changes: dict[str, Any], id: str, text: str) -> None:
    assert text in found(**changes)[id]


@pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
def test_good_settings_have_nothing_to_say() -> None:
    assert found() == {}
    assert found(SCALEDB={}, DATABASE_ROUTERS=[], MIDDLEWARE=["x.y"]) == {}


QUIET = """
import socket, sys, threading
import django
from django.conf import settings
database = {"ENGINE": "django_scaledb.backend", "NAME": "x", "HOST": "127.0.0.1", "PORT": 1}
settings.configure(
    DATABASES={"default": database, "replica1": {**database, "TEST": {"MIRROR": "default"}}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django_scaledb"],
    DATABASE_ROUTERS=["django_scaledb.routing.ReplicaRouter"],
    MIDDLEWARE=["django_scaledb.routing.ReadYourWritesMiddleware"],
    SCALEDB={"REPLICAS": ["replica1"]},
)
heard = []
sys.addaudithook(lambda event, arguments: heard.append(event) if event == "socket.connect" else None)
import psycopg
psycopg.Connection.connect = psycopg.AsyncConnection.connect = lambda *a, **k: heard.append("connect")
django.setup()
from django.core.management import call_command
from django_scaledb import routing
for name in dir(routing):
    getattr(routing, name)
call_command("check")
from django.contrib.contenttypes.models import ContentType
from django.test import RequestFactory
from django.http import HttpResponse
str(ContentType.objects.filter(pk=1).query)
routing.ReplicaRouter().db_for_write(ContentType)
middleware = routing.ReadYourWritesMiddleware(lambda request: HttpResponse())
assert middleware(RequestFactory().get("/")).status_code == 200
with routing.use_primary(), routing.use_token(routing.current_token()):
    ContentType.objects.all().db
print(heard, [thread.name for thread in threading.enumerate()])
"""


def test_importing_checking_and_not_reading_connects_to_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=60)
    assert done.stderr.replace("System check identified no issues (0 silenced).\n", "") == ""
    assert done.stdout.splitlines()[-1] == "[] ['MainThread']"
