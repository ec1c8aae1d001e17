"""The partition sets as they are, and what is wrong with them.

The JSON that ``show_partitions --format json`` prints (version 1; keys may be added, none is taken
away)::

    {
      "version": 1,
      "database": "default",
      "now": "2027-01-01T03:00:00+00:00",
      "ok": true,                         // nothing under "problems" or "error" anywhere
      "error": null,                      // the database could not be read: {"type": .., "message": ..}
      "models": [
        {
          "model": "pypi.Upload",
          "table": "public.pypi_upload",      // null when there is no such table
          "error": null,                      // {"type": .., "message": ..}
          "key": "uploaded_at",               // the column
          "interval": "1 year",
          "retention": "7 years",             // null keeps everything
          "runway": {"periods": 2, "premake": 2, "until": "2030-01-01T00:00:00+00:00"},
          "partitions": [
            {
              "partition": "public.pypi_upload_y2027",
              "from": "2027-01-01T00:00:00+00:00",  // or "MINVALUE"; null for a default partition
              "to": "2028-01-01T00:00:00+00:00",    // or "MAXVALUE"; null for a default partition
              "state": "attached",            // attached, detach pending, detached, restoring, archived
              "managed": true,                // false: made (or detached) by hand, never dropped
              "default": false,
              "detached_at": null,            // when its grace period began
              "archived_at": null,            // when a verified copy of it was stored
              "held_since": null,             // when it was restored; retention leaves it alone
              "manifest": null,               // of what is archived: its name in the storage
              "rows": 152580,                 // an estimate; null before the first ANALYZE
              "bytes": 33554432               // with indexes and TOAST; null when a lock was in the way;
                                              // of an archive its file's
            }
          ],
          "problems": [
            {"problem": "runway", "message": "..", "command": "manage.py rotate_partitions pypi.Upload"}
          ]                                   // runway, gap, default rows, detach pending, unfinished
        }
      ]
    }
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

from django.db import DatabaseError, InterfaceError, connections, models, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import LockNotAvailable, PlanError, ScaleDBError
from django_scaledb.partitions import catalog, inspection, registry
from django_scaledb.partitions.archive import state
from django_scaledb.partitions.archive.state import Archive
from django_scaledb.partitions.bounds import Bound, Range, show, sort_key
from django_scaledb.partitions.catalog import Member, PartitionSet
from django_scaledb.partitions.config import KeyKind, PartitionConfig
from django_scaledb.partitions.inspection import Size
from django_scaledb.partitions.marker import iso
from django_scaledb.partitions.plan import Partition, State, missing, runway
from django_scaledb.partitions.report import error_as_json
from django_scaledb.partitions.uuid7 import timestamp_of
from django_scaledb.postgres.executor import sqlstate

_INSUFFICIENT_PRIVILEGE = "42501"
VERSION = 1
_UNKNOWN = Size(None, None)


@dataclass(frozen=True)
class Row:
    """One table of a set."""

    partition: Partition
    size: Size
    manifest: str | None = None

    def as_json(self) -> dict[str, Any]:
        partition = self.partition
        bounds = partition.range
        return {
            "partition": str(partition.table),
            "from": iso(bounds.lower) if bounds else None,
            "to": iso(bounds.upper) if bounds else None,
            "state": partition.state.value,
            "managed": partition.managed,
            "default": partition.is_default,
            "detached_at": iso(partition.detached_at) if partition.detached_at else None,
            "archived_at": iso(partition.archived_at) if partition.archived_at else None,
            "held_since": iso(partition.held_since) if partition.held_since else None,
            "manifest": self.manifest,
            "rows": self.size.rows,
            "bytes": self.size.bytes,
        }


@dataclass(frozen=True)
class Problem:
    """What is wrong with a set, and the command that mends it."""

    problem: str
    message: str
    command: str


@dataclass
class ModelOverview:
    """One model's set; `config` and what follows from it is None where `error` stands."""

    label: str
    table: str | None = None
    error: Exception | None = None
    config: PartitionConfig | None = None
    rows: list[Row] = field(default_factory=list)
    runway: tuple[int, Bound] | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.error is None and not self.problems

    def as_json(self) -> dict[str, Any]:
        config = self.config
        content: dict[str, Any] = {
            "model": self.label,
            "table": self.table,
            "error": error_as_json(self.error),
            "key": config.column if config else None,
            "interval": str(config.interval) if config else None,
            "retention": str(config.retention) if config and config.retention else None,
            "runway": None,
            "partitions": [row.as_json() for row in self.rows],
            "problems": [vars(problem) for problem in self.problems],
        }
        if config and self.runway:
            periods, until = self.runway
            content["runway"] = {"periods": periods, "premake": config.premake, "until": iso(until)}
        return content


@dataclass
class Overview:
    """All sets of one database."""

    database: str
    now: datetime
    models: list[ModelOverview] = field(default_factory=list)
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(model.ok for model in self.models)

    @property
    def is_readable(self) -> bool:
        """Whether every model that was asked for could be shown."""
        return self.error is None and all(model.error is None for model in self.models)

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "database": self.database,
            "now": iso(self.now),
            "ok": self.ok,
            "error": error_as_json(self.error),
            "models": [model.as_json() for model in self.models],
        }


def survey(
    partitioned: Sequence[type[models.Model]], *, using: str, now: datetime, closely: bool = True
) -> Overview:
    """What the catalog of `using` says about `partitioned` at `now` (aware).

    Four queries for all models, and one for each default partition; not `closely`, two for all default
    partitions together, which tells that rows lie in one and not of which days. Takes no lock that anybody
    could notice, and gives the sizes up rather than wait for one.
    """
    connection: BaseDatabaseWrapper = connections[using]
    overview = Overview(using, now.astimezone(UTC))
    try:
        sets = catalog.read(connection, [model._meta.db_table for model in partitioned])
        overview.models = [
            _survey_model(connection, model, found, overview.now, closely=closely)
            for model, found in zip(partitioned, sets, strict=True)
        ]
        if not closely:
            _glance_at_defaults(connection, overview.models, sets)
        _measure(connection, overview.models, [found for found in sets if found is not None])
        # Last: who may not read the archive's table sees the rest, and an open transaction stays usable.
        with transaction.atomic(using=using):
            archives = state.of_tables(connection, [found.table for found in sets if found is not None])
        for one, found in zip(overview.models, sets, strict=True):
            if one.config is not None and found is not None:
                _add_archives(one, found, [archive for archive in archives if archive.table == found.table])
    except (DatabaseError, InterfaceError) as error:
        overview.error = error
    return overview


def _survey_model(
    connection: BaseDatabaseWrapper,
    model: type[models.Model],
    found: PartitionSet | None,
    now: datetime,
    *,
    closely: bool,
) -> ModelOverview:
    overview = ModelOverview(model._meta.label, str(found.table) if found else None)
    try:
        config = registry.config_for(model)
        if found is None:
            raise PlanError(no_table(model, connection.alias))
        partitions = found.partitions(config)
        overview.problems = list(problems(config, partitions, now))
        overview.runway = runway(config, partitions, now)
    except (ScaleDBError, ValueError) as error:
        overview.error = error
        return overview
    overview.config = config
    by_hand = (Partition(m.table, _range_of(m), State.DETACHED, managed=False) for m in found.orphans)
    back = [Partition(m.table, _range_of(m), State.RESTORING, managed=True) for m in found.returning]
    for partition in back:
        overview.problems.append(
            Problem(
                "unfinished",
                f"the restore of {partition.table} is under way, or was interrupted",
                f"manage.py restore_partition {config.label} {partition.table.name}",
            )
        )
    overview.rows = [Row(partition, _UNKNOWN) for partition in _in_order((*partitions, *by_hand, *back))]
    if found.default is not None and closely:
        overview.problems += _rows_in_default(connection, found.default, config, found.role)
    return overview


def _add_archives(overview: ModelOverview, found: PartitionSet, archives: Iterable[Archive]) -> None:
    """Name the archives of tables that are there still, and list those whose tables are gone."""
    by_table = {archive.partition: archive for archive in archives}
    overview.rows = [
        replace(row, manifest=archive.manifest)
        if row.partition.archived_at and (archive := by_table.get(row.partition.table))
        else row
        for row in overview.rows
    ]
    there = {m.table for m in (*found.members, *found.detached, *found.returning)}
    gone = [archive for table, archive in by_table.items() if table not in there]
    for archive in sorted(gone, key=lambda archive: sort_key(archive.range.lower)):
        partition = Partition(
            archive.partition, archive.range, State.ARCHIVED, managed=True, archived_at=archive.archived_at
        )
        overview.rows.append(Row(partition, Size(archive.rows, archive.bytes), archive.manifest))


def no_table(model: type[models.Model], using: str) -> str:
    """The sentence for a model whose table does not exist."""
    return (
        f"{model._meta.label}: there is no table {model._meta.db_table!r} in the database {using!r}; "
        "run manage.py migrate"
    )


def problems(config: PartitionConfig, partitions: Sequence[Partition], now: datetime) -> Iterator[Problem]:
    """What a rotation at `now` would have to mend (pure)."""
    rotate = f"manage.py rotate_partitions {config.label}"
    shortfall = missing(config, partitions, now)
    for gap in shortfall.gaps:
        yield Problem("gap", f"no partition takes rows of {gap}", rotate)
    if shortfall.runway:
        first = show(shortfall.runway[0].lower)
        wanted = f"the current period of {config.interval} and {config.premake} more"
        yield Problem("runway", f"no partition takes rows from {first} on; wanted are {wanted}", rotate)
    for partition in partitions:
        if partition.state is State.DETACH_PENDING:
            text = f"the detach of {partition.table} was interrupted; its range takes no rows"
            yield Problem("detach pending", text, rotate)
        elif partition.state is State.DETACHED and partition.retiring:
            text = f"{partition.table} is detached and was not settled; it may hold foreign keys"
            yield Problem("unfinished", text, rotate)


def _rows_in_default(
    connection: BaseDatabaseWrapper, default: Member, config: PartitionConfig, role: str
) -> Iterator[Problem]:
    command = f"manage.py create_partitions {config.label}"
    try:
        ends = inspection.ends_of_key(connection, default.table, config.column)
    except LockNotAvailable as error:
        yield Problem("default rows", str(error), command)
        return
    except DatabaseError as error:
        if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
            raise
        text = f"the role {role!r} may not see whether rows lie in the default partition {default.table}"
        yield Problem("default rows", text, f"GRANT SELECT ON {default.table} TO {role}")
        return
    if ends is None:
        return
    first, last = (_day(end, config.key_kind) for end in ends)
    if first is not None and last is not None:
        command += f" --from {first} --to {last}"
    yield Problem("default rows", f"rows lie in the default partition {default.table}", command)


def _glance_at_defaults(
    connection: BaseDatabaseWrapper, overviews: Sequence[ModelOverview], sets: Sequence[PartitionSet | None]
) -> None:
    defaults = {
        found.default.table: (overview, found.default.oid)
        for overview, found in zip(overviews, sets, strict=True)
        if overview.error is None and found is not None and found.default is not None
    }
    if not defaults:
        return
    try:
        filled = inspection.not_empty(connection, [oid for _, oid in defaults.values()])
    except LockNotAvailable:
        return  # somebody works on one of them; the next look will tell
    for table in filled:
        overview = defaults[table][0]
        overview.problems.append(
            Problem(
                "default rows",
                f"rows lie in the default partition {table}",
                f"manage.py show_partitions {overview.label}",
            )
        )


def _day(key: str | None, kind: KeyKind) -> str | None:
    """The UTC day of a key as PostgreSQL prints it; None for what is no date (infinity, BC)."""
    if key is None:
        return None
    try:
        if kind is KeyKind.UUID7:
            return timestamp_of(UUID(key)).date().isoformat()
        return date.fromisoformat(key[:10]).isoformat() if not key.endswith("BC") else None
    except ValueError:
        return None


def _range_of(member: Member) -> Range | None:
    return member.marker.range if member.marker else None


def _in_order(partitions: Iterable[Partition]) -> list[Partition]:
    """Attached ones by their beginning, the default one, then the detached ones."""

    def key(partition: Partition) -> tuple[Any, ...]:
        bounds = partition.range
        off = partition.state in (State.DETACHED, State.RESTORING)
        return (off, bounds is None, sort_key(bounds.lower) if bounds else (), partition.table)

    return sorted(partitions, key=key)


def _measure(
    connection: BaseDatabaseWrapper, overviews: Iterable[ModelOverview], sets: Iterable[PartitionSet]
) -> None:
    oids = {
        m.table: m.oid
        for found in sets
        for m in (*found.members, *found.detached, *found.returning, *found.orphans)
    }
    sizes = inspection.sizes(connection, list(oids.values()))
    for overview in overviews:
        overview.rows = [
            Row(row.partition, sizes.get(oids[row.partition.table], _UNKNOWN)) for row in overview.rows
        ]
