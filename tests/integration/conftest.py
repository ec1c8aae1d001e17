"""The lab: a fresh database for tests that change tables for good."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from django.db import connections

from django_scaledb.testing import Cluster
from tests.lab import ALIAS, Lab

_numbers = itertools.count(1)


@pytest.fixture
def lab(server: Cluster, django_db_blocker: pytest.FixtureRequest) -> Iterator[Lab]:
    database = f"lab{next(_numbers)}"
    server.create_database(database)
    entry = {**connections["default"].settings_dict, **server.primary.django_settings(), "NAME": database}
    connections.settings[ALIAS] = entry
    lab = Lab(server, database)
    with django_db_blocker.unblock():  # type: ignore[attr-defined]
        try:
            yield lab
        finally:
            lab.close()
            del connections[ALIAS], connections.settings[ALIAS]
            server.primary.execute(f"DROP DATABASE {database} WITH (FORCE)")  # type: ignore[arg-type]
