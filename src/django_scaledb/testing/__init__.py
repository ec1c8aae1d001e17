"""What tests of an application on django_scaledb need: a real PostgreSQL cluster, and assertions.

The names are imported when they are first used, so that loading the pytest plugin costs nothing
and no Django setting is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster as Cluster
    from .counters import assert_same_totals as assert_same_totals
    from .ephemeral import ephemeral_databases as ephemeral_databases
    from .errors import ClusterError as ClusterError
    from .errors import PostgresNotFound as PostgresNotFound
    from .node import Node as Node

_HOMES = {
    "Cluster": "cluster",
    "ClusterError": "errors",
    "Node": "node",
    "PostgresNotFound": "errors",
    "assert_pruned": ".partitions.assertions",
    "assert_same_totals": "counters",
    "ephemeral_databases": "ephemeral",
    "simulated_lag": ".routing.simulation",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
