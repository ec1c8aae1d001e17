"""One primary with one standby for all proofs; every test leaves it running, replicating and without lag."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster
from tests.proofs.site import Site


@pytest.fixture(scope="package")
def pair() -> Iterator[Cluster]:
    with Cluster(1, settings={"max_connections": 200}) as cluster:
        yield cluster


@pytest.fixture
def site(pair: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(tmp_path / "site", pair, request.node.name) as site:
        yield site
