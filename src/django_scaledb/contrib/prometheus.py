"""Prometheus: runway and state of the partitions, health of the servers, routing decisions, drift.

``urlpatterns = [path("metrics", django_scaledb.contrib.prometheus.metrics)]``, or `install()` and any way of
prometheus_client's to serve its default registry.

A scrape sends each primary the same few queries, however many models and partitions there are; servers and
decisions are in memory. Whatever fails is left out, and said by ``django_scaledb_scrape_ok``.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from django.core.signals import request_finished
from django.db import connections, router, transaction
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from django_scaledb import runs
from django_scaledb.partitions import overview, registry
from django_scaledb.partitions.bounds import Unbounded
from django_scaledb.partitions.overview import ModelOverview, Row
from django_scaledb.partitions.plan import State
from django_scaledb.routing import decisions
from django_scaledb.routing import registry as routing
from django_scaledb.routing.policy import Reason

logger = logging.getLogger("django_scaledb.prometheus")

STATES = ("attached", "premade", "default", "detach_pending", "detached", "restoring", "archived")
PROBLEMS = ("runway", "gap", "default rows", "detach pending", "unfinished", "error")
#: Seconds between two times that a worker hands on its decisions, where several share their metrics.
_HAND_ON_EVERY = 1.0

# Not in the default registry: the collector brings it, so that it is exact at each scrape; where several
# processes share their metrics it is prometheus_client's files that do.
_decisions = Counter(
    "django_scaledb_routing_decisions",
    "Reads by where the router sent them, and why.",
    ["primary", "reason"],
    registry=None,
)


def is_multiprocess() -> bool:
    """Whether prometheus_client was told to share metrics between processes."""
    return bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))


class ScaleDBCollector(Collector):
    """All metrics of django_scaledb, as they are at the time of a scrape.

    `databases` are the aliases whose partitions are looked at; all primaries if there are none.
    """

    def __init__(self, databases: Sequence[str] = ()) -> None:
        self._databases = databases

    def describe(self) -> list[Metric]:
        """Nothing: being registered must not ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        ok = _gauge("scrape_ok", "1 when this part of the metrics could be collected.", "part")
        seconds = _gauge("scrape_duration_seconds", "How long collecting this part took.", "part")
        for part, collect in _parts(self._databases):
            begun = time.monotonic()
            try:
                found = list(collect())
            except Exception:
                logger.exception("the metrics of %s cannot be collected", part, extra={"part": part})
                ok.add_metric([part], 0)
            else:
                ok.add_metric([part], 1)
                yield from found
            seconds.add_metric([part], time.monotonic() - begun)
        yield ok
        yield seconds


Part = tuple[str, Callable[[], Iterable[Metric]]]


def _parts(databases: Sequence[str]) -> Iterator[Part]:
    yield "servers", _servers
    yield "decisions", _all_decisions
    yield "partitions", lambda: _partitions(databases or list(routing.registry().sets))
    yield "runs", lambda: _runs(databases or list(routing.registry().sets))


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"django_scaledb_{name}", text, labels=labels)


# -- routing


def _servers() -> Iterator[Metric]:
    primary_up = _gauge("primary_up", "1 when the primary tells its position.", "primary")
    up = _gauge("replica_up", "1 when the replica may serve reads.", "primary", "replica")
    lag = _gauge("replica_lag_seconds", "How far the replica is behind, where known.", "primary", "replica")
    for primary, members in routing.registry().sets.items():
        members.start()  # a process that serves nothing but metrics has never read
        if not members.replicas:
            continue
        primary_up.add_metric([primary], not members.primary_problem)
        for replica in members.replicas.values():
            up.add_metric([primary, replica.alias], not replica.why_out)
            if replica.lag is not None:
                lag.add_metric([primary, replica.alias], replica.lag)
    yield from (primary_up, up, lag)


def _all_decisions() -> Iterable[Metric]:
    hand_on()
    return [] if is_multiprocess() else _decisions.collect()


_lock = threading.Lock()
_handed_on: dict[tuple[str, str], int] = {}
_handed_on_at = 0.0


def hand_on() -> None:
    """Bring the counter of decisions up to what this process has decided."""
    with _lock:
        for primary, reasons in decisions().items():
            for reason in (reason.name.lower() for reason in Reason):
                count, before = reasons.get(reason, 0), _handed_on.get((primary, reason), 0)
                # Less than before: the sets were made anew, and count from 0.
                _decisions.labels(primary, reason).inc(count - before if count >= before else count)
                _handed_on[primary, reason] = count


def _request_finished(**_: object) -> None:
    global _handed_on_at
    now = time.monotonic()
    if now - _handed_on_at >= _HAND_ON_EVERY:
        _handed_on_at = now
        hand_on()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _handed_on.clear()


# -- partitions


def _partitions(databases: Iterable[str]) -> Iterator[Metric]:
    runway = _gauge("partition_runway_seconds", "How far ahead rows have a partition.", "database", "model")
    count = _gauge("partitions", "Partitions by state.", "database", "model", "state")
    size = _gauge(
        "partition_bytes", "Bytes of partitions with indexes and TOAST.", "database", "model", "state"
    )
    problem = _gauge(
        "partition_problems", "What show_partitions --check finds.", "database", "model", "problem"
    )
    now = timezone.now()
    for database in databases:
        wanted = [m for m in registry.partitioned_models() if router.allow_migrate_model(database, m)]
        if not wanted:
            continue
        with _borrowed(database):
            found = overview.survey(wanted, using=database, now=now, closely=False)
        if found.error is not None:
            raise found.error
        for model in found.models:
            labels = [database, model.label]
            problems = Tally(each.problem for each in model.problems)
            problems["error"] = int(model.error is not None)
            for name in PROBLEMS:
                problem.add_metric([*labels, name.replace(" ", "_")], problems[name])
            if model.error is not None:
                continue
            runway.add_metric(labels, _runway_seconds(model, now))
            states = [_state(row, model, now) for row in model.rows]
            for state in STATES:
                rows = [row for row, its in zip(model.rows, states, strict=True) if its == state]
                count.add_metric([*labels, state], len(rows))
                size.add_metric([*labels, state], sum(row.size.bytes or 0 for row in rows))
    yield from (runway, count, size, problem)


def _runway_seconds(model: ModelOverview, now: datetime) -> float:
    assert model.config is not None
    assert model.runway is not None
    end = model.runway[1]
    if isinstance(end, Unbounded):
        return math.inf
    return max(0.0, (end - model.config.on_key_axis(now)).total_seconds())


def _state(row: Row, model: ModelOverview, now: datetime) -> str:
    assert model.config is not None
    partition = row.partition
    if partition.state is not State.ATTACHED:
        return str(partition.state.value).replace(" ", "_")
    if partition.range is None:
        return "default"
    return "premade" if partition.range.lower > model.config.on_key_axis(now) else "attached"


# -- what the last runs have written down


def _runs(databases: Iterable[str]) -> Iterator[Metric]:
    rotation = ("database", "model")
    ok = _gauge("last_rotation_ok", "1 when the last rotation did all it should.", *rotation)
    success = _gauge(
        "last_rotation_success_timestamp_seconds", "When a rotation last did all it should.", *rotation
    )
    check = ("database", "counter")
    drift = _gauge("counter_drifted_keys", "Wrong keys when check_counters last looked.", *check)
    checked = _gauge("counter_check_timestamp_seconds", "When check_counters last looked.", *check)
    for database in databases:
        if not router.allow_migrate_model(database, runs.LastRun):
            continue  # a further primary, whose tables are those of its own models
        with _borrowed(database):
            rotations = runs.last_runs(database, runs.ROTATE)
            checks = runs.last_runs(database, runs.CHECK_COUNTERS)
        for model, run in rotations.items():
            ok.add_metric([database, model], run.ok)
            if run.succeeded_at is not None:
                success.add_metric([database, model], run.succeeded_at.timestamp())
        for counter, run in checks.items():
            checked.add_metric([database, counter], run.finished_at.timestamp())
            if "drifted_keys" in run.detail:
                drift.add_metric([database, counter], run.detail["drifted_keys"])
    yield from (ok, success, drift, checked)


@contextmanager
def _borrowed(alias: str) -> Iterator[None]:
    """A connection that was opened for a scrape ends with it: prometheus_client's server makes a thread for
    each."""
    connection = connections[alias]
    was_open = connection.connection is not None
    try:
        yield
    finally:
        if not was_open:
            connection.close()


# -- serving


_installed: set[CollectorRegistry] = set()


def install(registry: CollectorRegistry = REGISTRY, *, databases: Sequence[str] = ()) -> CollectorRegistry:
    """Register the collector with `registry`, once; returns `registry`.

    Under ``PROMETHEUS_MULTIPROC_DIR`` each process that has imported this module hands on its decisions after
    requests, once a second at most.
    """
    if registry not in _installed:
        _installed.add(registry)
        registry.register(ScaleDBCollector(databases))
    return registry


@transaction.non_atomic_requests
def metrics(request: HttpRequest) -> HttpResponse:
    """A view with everything that the process knows, ours included; protect it as you do others.

    Under ``PROMETHEUS_MULTIPROC_DIR`` with what all processes have counted.
    """
    if is_multiprocess():
        found = CollectorRegistry()
        found.register(ScaleDBCollector())  # first: it hands on what the other one reads
        MultiProcessCollector(found)  # type: ignore[no-untyped-call]
    else:
        found = install()
    return HttpResponse(generate_latest(found), content_type=CONTENT_TYPE_LATEST)


os.register_at_fork(after_in_child=_after_fork_in_child)
if is_multiprocess():
    request_finished.connect(_request_finished, dispatch_uid="django_scaledb.contrib.prometheus")
    atexit.register(hand_on)

__all__ = ["ScaleDBCollector", "install", "metrics"]
