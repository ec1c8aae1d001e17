"""A throw-away cluster behind a settings module."""

import atexit
import json
import os
from typing import Any

from .cluster import Cluster

#: Tells child processes (pytest-xdist's workers, runserver's reloader) of the cluster that is there already.
_VARIABLE = "SCALEDB_EPHEMERAL_CLUSTER"
_clusters: dict[int, Cluster] = {}


def ephemeral_databases(
    standbys: int = 0, *, engine: str = "django_scaledb.backend", share: bool = True, **options: Any
) -> dict[str, dict[str, Any]]:
    """``DATABASES`` of a cluster that lives as long as this process: ``default``, and ``replica1`` and so on.

    For settings modules of tests and demos. The first call starts the cluster, later calls of this process
    return the same. With ``share`` child processes use it as well, so that the workers of pytest-xdist and
    the reloader of ``runserver`` start none of their own. ``options`` are those of `Cluster`.
    """
    if standbys not in _clusters and share:
        inherited = _inherited(standbys)
        if inherited is not None:
            return _with_engine(inherited, engine)
    if standbys not in _clusters:
        _clusters[standbys] = Cluster(standbys, **options).start()
        if share:
            os.environ[_VARIABLE] = json.dumps(
                {
                    "owner": os.getpid(),
                    "standbys": standbys,
                    "databases": _clusters[standbys].django_databases(engine),
                }
            )
            atexit.register(os.environ.pop, _VARIABLE, None)
    return _clusters[standbys].django_databases(engine)


def _inherited(standbys: int) -> dict[str, dict[str, Any]] | None:
    try:
        offer = json.loads(os.environ[_VARIABLE])
        owner, found, databases = offer["owner"], offer["standbys"], offer["databases"]
    except (KeyError, ValueError):
        return None
    # After an exec the owner is this very process, and its cluster is on the way out.
    if found != standbys or owner == os.getpid():
        return None
    socket = f"{databases['default']['HOST']}/.s.PGSQL.{databases['default']['PORT']}"
    try:
        os.kill(owner, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    if databases["default"]["HOST"].startswith("/") and not os.path.exists(socket):
        return None
    return dict(databases)


def _with_engine(databases: dict[str, dict[str, Any]], engine: str) -> dict[str, dict[str, Any]]:
    return {alias: {**entry, "ENGINE": engine} for alias, entry in databases.items()}
