"""Fixtures that start real PostgreSQL clusters; loaded by pytest wherever django_scaledb is installed.

``scaledb_cluster``          one primary and one standby, for the whole session
``scaledb_fresh_cluster``    one of its own for this test, which may destroy it; the marker
                             ``@pytest.mark.scaledb_cluster(standbys=2, settings={...})`` says more
``scaledb_lag``              replicas that stand still, without a standby: see `simulated_lag`
``scaledb_only_pruned``      the test fails when one of its queries reads every partition of a model
``scaledb_cluster_factory``  ``factory(standbys=2, ...)`` starts one more, for the whole session

Nothing is imported or started until a test asks for a fixture. Where no PostgreSQL is found these tests are
skipped, unless ``SCALEDB_POSTGRES`` asks for a certain one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .cluster import Cluster


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "scaledb_cluster(standbys=1, **options): what scaledb_fresh_cluster starts; options of Cluster",
    )


def pytest_report_header() -> str:
    from .postgres import describe

    return f"django_scaledb: {describe()}"


def _start(*arguments: Any, **options: Any) -> Cluster:
    from .cluster import Cluster
    from .errors import PostgresNotFound

    try:
        return Cluster(*arguments, **options).start()
    except PostgresNotFound as error:
        if os.environ.get("SCALEDB_POSTGRES", "container") != "container":
            raise
        pytest.skip(error.reason)


@pytest.fixture(scope="session")
def scaledb_cluster_factory() -> Iterator[Callable[..., Cluster]]:
    """Starts a `Cluster` with the given arguments; it is stopped at the end of the session."""
    started: list[Cluster] = []

    def factory(standbys: int = 1, **options: Any) -> Cluster:
        started.append(_start(standbys, **options))
        return started[-1]

    yield factory
    for cluster in started:
        cluster.stop()


@pytest.fixture(scope="session")
def scaledb_cluster(scaledb_cluster_factory: Callable[..., Cluster]) -> Cluster:
    """A primary and one standby for the whole session: leave it as you found it."""
    return scaledb_cluster_factory(1)


@pytest.fixture
def scaledb_fresh_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster for this test alone: kill, freeze and promote as you like."""
    marker = request.node.get_closest_marker("scaledb_cluster")
    arguments, options = (marker.args, marker.kwargs) if marker else ((), {})
    with _start(*arguments, **options) as cluster:
        yield cluster


@pytest.fixture
def scaledb_lag() -> Iterator[Any]:
    """The replicas of ``default`` stand still in this test; see `simulated_lag`."""
    simulated_lag = import_module("django_scaledb.testing").simulated_lag
    with simulated_lag() as lag:
        yield lag


@pytest.fixture
def scaledb_only_pruned() -> Iterator[list[str]]:
    """The test fails when one of its queries reads every partition, whatever became of its result.

    The value is the list of complaints so far. Queries inside ``allow_unpruned()`` do not count.
    """
    watched = import_module("django_scaledb.partitions.watching").watched
    complaints: list[str] = []
    with watched(lambda asked: complaints.extend(asked.unpruned())):
        yield complaints


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    complaints = getattr(item, "funcargs", {}).get("scaledb_only_pruned")
    if complaints:
        text = "\n".join(dict.fromkeys(complaints))
        pytest.fail(f"not pruned:\n{text}", pytrace=False)
