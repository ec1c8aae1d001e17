"""Replicas in ordinary test suites: mirrors of the primary, or standing still where a test asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from django.db import connections
from django.test import override_settings

from django_scaledb.routing import explain, registry, state, use_replica
from django_scaledb.routing.policy import Reason
from django_scaledb.testing import simulated_lag
from tests.routing import eventually
from tests.testapp.models import Account

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture(scope="module", autouse=True)
def _alias(django_db_setup: None) -> Iterator[None]:
    default = connections["default"].settings_dict
    connections.settings["mirror"] = {**default, "TEST": {**default["TEST"], "MIRROR": "default"}}
    yield
    del connections["mirror"]
    del connections.settings["mirror"]


@pytest.fixture(autouse=True)
def _mirror(transactional_db: None) -> Iterator[None]:
    """What a test runner makes of ``TEST: {"MIRROR": "default"}``."""
    routers = ["django_scaledb.routing.ReplicaRouter"]
    with override_settings(SCALEDB={"REPLICAS": ["mirror"]}, DATABASE_ROUTERS=routers):
        state.current.set(None)
        state.thread.frame = state.Frame(state.Scope())
        connections["mirror"].creation.set_as_test_mirror(connections["default"].settings_dict)
        yield
        connections["mirror"].close()
        registry.unmirror("mirror")


def where() -> str:
    return Account.objects.all().db


def test_a_mirror_is_read_through_the_primary() -> None:
    assert where() == "default"
    assert explain(Account).reason is Reason.TEST_MIRROR
    Account.objects.create(name="a")
    assert Account.objects.get(name="a")
    assert not any("monitor" in thread.name for thread in threading.enumerate())


def test_a_replica_that_stands_still_shows_a_read_that_comes_too_early() -> None:
    Account.objects.create(name="before")
    with simulated_lag() as lag:
        assert where() == "mirror"
        assert Account.objects.get().name == "before"
        made = Account.objects.create(name="after")
        assert where() == "default"
        assert Account.objects.filter(pk=made.pk).exists()
        with use_replica(stale_ok=True):
            assert not Account.objects.filter(pk=made.pk).exists()
        assert not Account.objects.using("mirror").filter(pk=made.pk).exists()
        lag.catch_up()
        assert where() == "mirror"
        assert Account.objects.get(pk=made.pk)._state.db == "mirror"
        with pytest.raises(Exception, match="read-only"):
            Account.objects.using("mirror").create(name="no")
        assert Account.objects.using("mirror").count() == 2
    assert where() == "default"


def test_it_catches_up_by_itself() -> None:
    with simulated_lag(0.3):
        Account.objects.create(name="a")
        assert where() == "default"
        eventually(lambda: where() == "mirror", 2)
        assert Account.objects.using("mirror").get(name="a")
