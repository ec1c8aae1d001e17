"""One primary with one standby for all proofs; every test leaves it running, replicating and without lag."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from django_scaledb.testing import Cluster
from tests.proofs.site import Site


@pytest.fixture(scope="package")
def pair() -> Iterator[Cluster]:
    with Cluster(1, settings={"max_connections": 200}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(
    pair: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Site]:
    """A project that the tests of a module share."""
    name = request.module.__name__.rpartition(".")[2]
    with Site(tmp_path_factory.mktemp(name) / "site", pair, name) as site:
        yield site
