"""What the overview page shows, collected part by part: what fails is a sentence in its place.

The number of queries does not depend on how many models, partitions or counters there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Generic, TypeVar

from django.apps import apps
from django.db import DEFAULT_DB_ALIAS, connections, models, router, transaction

from django_scaledb import runs
from django_scaledb.conf import settings
from django_scaledb.counters import registry as counter_registry
from django_scaledb.exceptions import PlanError
from django_scaledb.overview import timeline
from django_scaledb.overview.timeline import Drawing, Piece, Table
from django_scaledb.partitions import maintenance
from django_scaledb.partitions import registry as partition_registry
from django_scaledb.partitions.conversion import state as conversion_state
from django_scaledb.partitions.conversion.runner import Options, Runner
from django_scaledb.partitions.conversion.state import Conversion
from django_scaledb.partitions.conversion.status import look
from django_scaledb.partitions.overview import ModelOverview, survey
from django_scaledb.partitions.report import ModelReport, Report
from django_scaledb.routing import registry as routing_registry
from django_scaledb.routing import status as routing_status
from django_scaledb.routing.lag import SLOT_SECONDS, Slot
from django_scaledb.routing.status import Server
from django_scaledb.runs import LastRun

logger = logging.getLogger("django_scaledb.overview")

SQL_SHOWN = 20
"""As many actions of the next rotation are shown with their SQL: each one takes a few queries."""
CONVERSIONS_WATCHED = 3
"""As many conversions are asked for their progress; more at once would be a surprise."""
CONVERSIONS_PAST = 5

T = TypeVar("T")


@dataclass
class Part(Generic[T]):
    """A part of the page: its content, or the sentence that stands in its place."""

    content: T | None = None
    problem: str = ""


@dataclass
class SetFacts:
    """One model's partition set."""

    using: str
    found: ModelOverview
    pieces: list[Piece] = field(default_factory=list)
    drawing: Drawing | None = None
    next: ModelReport | None = None
    last_rotation: LastRun | None = None

    @property
    def error(self) -> str:
        error = self.found.error
        return "" if error is None else str(error)

    @property
    def bytes(self) -> int:
        return sum(row.size.bytes or 0 for row in self.found.rows)


@dataclass
class Database:
    """The partition sets of one database; `problem` stands for what could not be read of all of them."""

    using: str
    sets: list[SetFacts] = field(default_factory=list)
    problem: str = ""
    rotation_problem: str = ""
    runs_problem: str = ""


@dataclass
class Replica:
    """One server: as it answers now, and as this process saw it in the last minutes."""

    primary: str
    server: Server
    past: list[Slot | None] = field(default_factory=list)

    @property
    def is_watched(self) -> bool:
        return any(slot is not None for slot in self.past)

    def worst(self, seconds: float) -> float | None:
        """The greatest lag seen in the last `seconds`; None when none is known."""
        slots = self.past[-round(seconds / SLOT_SECONDS) :]
        return max((slot.lag for slot in slots if slot is not None and slot.lag is not None), default=None)


@dataclass
class CounterFacts:
    """One counter and its last check."""

    label: str
    source: str
    mechanism: str
    last_check: LastRun | None = None
    problem: str = ""


@dataclass
class ConversionFacts:
    """One conversion; `progress` says how far it is."""

    using: str
    conversion: Conversion
    progress: str = ""
    eta: float | None = None
    blockers: str = ""


def attempt(what: str, read: Callable[[], T], *, using: str | None = None) -> Part[T]:
    """What `read` returns, or why it could not; a transaction that is open on `using` stays usable."""
    try:
        guarded = using is not None and connections[using].in_atomic_block
        with transaction.atomic(using=using) if guarded else nullcontext():
            return Part(read())
    except Exception as error:
        logger.warning("the overview cannot show %s", what, exc_info=True)
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return Part(problem=f"Cannot show {what}: {said}")


def home_of(model: type[models.Model]) -> str:
    """The database in which the application writes `model`."""
    return router.db_for_write(model) or DEFAULT_DB_ALIAS


def by_home(wanted: Iterable[type[models.Model]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for model in wanted:
        found.setdefault(home_of(model), []).append(model)
    return found


# -- partition sets


def partition_sets(now: datetime, *, in_full: Collection[str]) -> list[Database]:
    """All partition sets, by database.

    The models whose labels are `in_full` are drawn, and are the first whose next rotation is shown as SQL.
    """
    groups = by_home(partition_registry.partitioned_models())
    return [_database(using, found, now, in_full) for using, found in groups.items()]


def _database(
    using: str, partitioned: list[type[models.Model]], now: datetime, in_full: Collection[str]
) -> Database:
    database = Database(using)
    overview = attempt(
        "the partition sets", lambda: survey(partitioned, using=using, now=now, closely=False), using=using
    )
    if overview.content is None:
        database.problem = overview.problem
        return database
    if overview.content.error is not None:
        database.problem = f"Cannot show all of the partition sets: {overview.content.error}"
    database.sets = [SetFacts(using, found) for found in overview.content.models]
    for facts in database.sets:
        if facts.found.label in in_full:
            _draw(facts, now)
    if not database.sets:
        return database
    in_order = sorted(partitioned, key=lambda model: model._meta.label not in in_full)
    planned = attempt(
        "what the next rotation would do",
        lambda: maintenance.preview(in_order, using=using, now=now, limit=SQL_SHOWN),
        using=using,
    )
    database.rotation_problem = planned.problem or _stopped(planned.content)
    written = attempt("the last rotations", lambda: runs.last_runs(using, runs.ROTATE), using=using)
    database.runs_problem = written.problem
    reports = {report.label: report for report in planned.content.models} if planned.content else {}
    for facts in database.sets:
        facts.next = reports.get(facts.found.label)
        facts.last_rotation = (written.content or {}).get(facts.found.label)
    return database


def _stopped(report: Report | None) -> str:
    if report is None or report.error is None:
        return ""
    return f"Cannot show what the next rotation would do: {report.error}"


def _draw(facts: SetFacts, now: datetime) -> None:
    config = facts.found.config
    if config is None:
        return
    tables = [Table(row.partition, row.size.rows, row.size.bytes) for row in facts.found.rows]
    try:
        facts.pieces = timeline.pieces(config, tables, now)
        moment = config.on_key_axis(now)
        cutoff = config.retention.subtract(moment, config.period_zone) if config.retention else None
        facts.drawing = timeline.draw(facts.pieces, now=moment, cutoff=cutoff)
    except PlanError as error:
        facts.found.error = error


# -- replicas


def replicas() -> list[Replica]:
    """Every server of every set; takes some seconds when one does not answer."""
    known = routing_registry.registry().replicas
    now = time.monotonic()
    return [
        Replica(each.primary, server, known[server.alias][1].past.slots(now) if server.alias in known else [])
        for each in routing_status.survey().sets
        for server in each.servers
    ]


def max_lag() -> float:
    return float(settings.MAX_LAG)


# -- counters


def counters() -> list[CounterFacts]:
    """Every counter, in the order of the apps; one query for each database."""
    found = []
    for using, group in by_home(counter_registry.counters()).items():
        checks = attempt("the last check", partial(runs.last_runs, using, runs.CHECK_COUNTERS), using=using)
        for counter in group:
            options = counter._counter_meta
            source = counter.source()._meta.label if options.problem is None else "?"
            last = (checks.content or {}).get(counter._meta.label)
            found.append(CounterFacts(counter._meta.label, source, options.mechanism, last, checks.problem))
    return found


# -- conversions


def conversions() -> list[ConversionFacts]:
    """Those under way, with their progress, and the last ones that ended."""
    homes = [home_of(Conversion), *by_home(partition_registry.partitioned_models())]
    return [facts for using in dict.fromkeys(homes) for facts in _conversions_in(using)]


def _conversions_in(using: str) -> Iterable[ConversionFacts]:
    if not conversion_state.is_installed(connections[using]):
        return
    known = Conversion.objects.using(using)
    for number, conversion in enumerate(known.filter(ended_at=None).order_by("-id")[:50]):
        yield (
            _watched(using, conversion)
            if number < CONVERSIONS_WATCHED
            else ConversionFacts(using, conversion)
        )
    for conversion in known.exclude(ended_at=None).order_by("-id")[:CONVERSIONS_PAST]:
        yield ConversionFacts(using, conversion)


def _watched(using: str, conversion: Conversion) -> ConversionFacts:
    def ask() -> ConversionFacts:
        status = look(Runner(apps.get_model(conversion.model), Options(using)))
        return ConversionFacts(using, conversion, status.progress, status.eta, status.blockers or "")

    part = attempt("its progress", ask, using=using)
    return part.content or ConversionFacts(using, conversion, part.problem)
