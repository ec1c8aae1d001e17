"""One PostgreSQL server for the whole run, started when the first test asks for a database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from django_scaledb.testing import Cluster


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    with Cluster(standbys=0, settings={"max_connections": 200}) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def django_db_modify_db_settings(server: Cluster) -> None:
    """pytest-django's place to say where the test database is to be made."""
    from django.db import connections

    connections["default"].settings_dict.update(server.primary.django_settings())
