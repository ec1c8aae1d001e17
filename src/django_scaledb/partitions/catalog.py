"""Partition sets as PostgreSQL's catalog has them: all models in one query.

Tables are found as the connection would find them (search_path), and known by schema and name from
then on. Bounds are read with TimeZone UTC and DateStyle ISO, whatever the session has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import parse
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.marker import PREFIX, Marker, MarkState
from django_scaledb.partitions.plan import Partition, State
from django_scaledb.postgres.identifiers import TableName

_RANGE = "r"
_STRATEGIES = {"r": "range", "l": "list", "h": "hash"}
_KINDS = {"r": "an ordinary table", "v": "a view", "m": "a materialized view", "f": "a foreign table"}


@dataclass(frozen=True)
class Member:
    """A table of a partition set: attached (`bound` is its pg_get_expr text), or taken off by us."""

    table: TableName
    oid: int
    bound: str | None
    is_pending: bool
    marker: Marker | None


@dataclass(frozen=True)
class PartitionSet:
    """A table and its partitions.

    `references` are the targets of its foreign keys, `referenced_by` the tables with foreign keys
    to it. `detached` are the tables whose mark says that we took them off this set, `returning` those
    that a restore is bringing back; `orphans` were detached by somebody else and are nobody's to
    drop. `may_alter` says whether the connected role has the owner's rights.
    """

    table: TableName
    oid: int
    kind: str
    owner: str
    role: str
    may_alter: bool
    strategy: str | None
    key_columns: tuple[str | None, ...]
    tablespace: str | None
    access_method: str | None
    references: tuple[TableName, ...]
    referenced_by: tuple[TableName, ...]
    members: tuple[Member, ...]
    detached: tuple[Member, ...]
    returning: tuple[Member, ...]
    orphans: tuple[Member, ...]

    @property
    def is_partitioned(self) -> bool:
        return self.strategy is not None

    @property
    def default(self) -> Member | None:
        """The default partition."""
        return next((member for member in self.members if member.bound == "DEFAULT"), None)

    def member(self, table: TableName) -> Member:
        return next(m for m in (*self.members, *self.detached) if m.table == table)

    def partitions(self, config: PartitionConfig) -> tuple[Partition, ...]:
        """The set in the planner's words.

        Raises `PlanError` when the table is not partitioned the way `config` says.
        """
        self._check(config)
        return (
            *(self._attached(member, config) for member in self.members),
            *(_detached(member) for member in self.detached),
        )

    def _check(self, config: PartitionConfig) -> None:
        if self.strategy is None:
            what = _KINDS.get(self.kind, "something else")
            raise PlanError(
                f"{config.label}: {self.table} is {what} in the database and not a partitioned table"
            )
        if self.strategy != _RANGE or self.key_columns != (config.column,):
            strategy = _STRATEGIES.get(self.strategy, self.strategy)
            key = ", ".join(column or "an expression" for column in self.key_columns)
            raise PlanError(
                f"{config.label}: {self.table} is partitioned by {strategy} ({key}) in the database, and by "
                f"range ({config.column}) in its PartitioningMeta; PostgreSQL cannot change that in place"
            )

    def _attached(self, member: Member, config: PartitionConfig) -> Partition:
        try:
            bounds = parse(member.bound or "", config.key_kind)
        except ValueError as error:
            raise PlanError(f"{config.label}: cannot read the bounds of {member.table}: {error}") from error
        state = member.marker.state if member.marker else None
        return Partition(
            table=member.table,
            range=bounds,
            state=State.DETACH_PENDING if member.is_pending else State.ATTACHED,
            # What was once taken off and is there again was put back by somebody: theirs now.
            managed=state in (MarkState.ATTACHED, MarkState.RETIRING),
            retiring=state is MarkState.RETIRING,
            held_since=member.marker.held_since if member.marker else None,
        )


def _detached(member: Member) -> Partition:
    marker = member.marker
    assert marker is not None
    return Partition(
        table=member.table,
        range=marker.range,
        state=State.DETACHED,
        managed=True,
        retiring=marker.state is MarkState.RETIRING,
        detached_at=marker.detached_at,
        archived_at=marker.archived_at,
        held_since=marker.held_since,
    )


# -- reading

# `incoming` is worked out once for all sets: pg_constraint has no index on confrelid. A bound is an
# expression without columns: read for relation 0, pg_get_expr locks no table and waits for nobody.
_SETS = """
WITH wanted AS (
    SELECT ord, to_regclass(name) AS oid FROM unnest(%s::text[]) WITH ORDINALITY AS t (name, ord)
), incoming AS MATERIALIZED (
    SELECT DISTINCT f.confrelid, n.nspname, c.relname
    FROM pg_constraint f
    JOIN pg_class c ON c.oid = f.conrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE f.contype = 'f' AND f.conparentid = 0 AND f.confrelid IN (SELECT oid FROM wanted)
)
SELECT w.ord, json_build_object(
    'table', json_build_array(n.nspname, c.relname),
    'oid', c.oid::int8,
    'kind', c.relkind,
    'owner', pg_get_userbyid(c.relowner),
    'role', current_user,
    'may_alter', pg_has_role(c.relowner, 'USAGE'),
    'strategy', p.partstrat,
    'key_columns', (
        SELECT json_agg(a.attname ORDER BY k.ord)
        FROM unnest(p.partattrs::int2[]) WITH ORDINALITY AS k (attnum, ord)
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
    ),
    'tablespace', (SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace),
    'access_method', (SELECT amname FROM pg_am WHERE oid = c.relam),
    'references', (
        SELECT json_agg(DISTINCT jsonb_build_array(tn.nspname, t.relname))
        FROM pg_constraint f
        JOIN pg_class t ON t.oid = f.confrelid
        JOIN pg_namespace tn ON tn.oid = t.relnamespace
        WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.conparentid = 0
    ),
    'referenced_by', (
        SELECT json_agg(json_build_array(i.nspname, i.relname)) FROM incoming i WHERE i.confrelid = c.oid
    ),
    'members', (
        SELECT json_agg(json_build_array(
            mn.nspname, m.relname, m.oid::int8, pg_get_expr(m.relpartbound, 0),
            h.inhdetachpending, d.description
        ) ORDER BY m.oid)
        FROM pg_inherits h
        JOIN pg_class m ON m.oid = h.inhrelid
        JOIN pg_namespace mn ON mn.oid = m.relnamespace
        LEFT JOIN pg_description d
            ON d.objoid = m.oid AND d.classoid = 'pg_catalog.pg_class'::regclass AND d.objsubid = 0
        WHERE h.inhparent = c.oid AND m.relispartition
    )
)::text
FROM wanted w
JOIN pg_class c ON c.oid = w.oid
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_partitioned_table p ON p.partrelid = c.oid
UNION ALL
SELECT 0, json_build_array(n.nspname, c.relname, c.oid::int8, NULL, false, d.description)::text
FROM pg_description d
JOIN pg_class c ON c.oid = d.objoid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE d.classoid = 'pg_catalog.pg_class'::regclass AND d.objsubid = 0
    AND NOT c.relispartition AND c.relkind IN ('r', 'p') AND starts_with(d.description, %s)
ORDER BY 1
"""


def read(connection: BaseDatabaseWrapper, db_tables: Sequence[str]) -> list[PartitionSet | None]:
    """The partition set of each of `db_tables` (as in ``Meta.db_table``); None where no table is.

    One query, however many tables and partitions there are, and no lock on any of them.
    """
    names = [connection.ops.quote_name(name) for name in db_tables]
    with pinned(connection) as cursor:
        cursor.execute(_SETS, [names, PREFIX])
        rows = cursor.fetchall()
    loose = [_member(json.loads(text)) for position, text in rows if position == 0]
    sets = {position: _partition_set(json.loads(text), loose) for position, text in rows if position}
    return [sets.get(position) for position in range(1, len(names) + 1)]


@contextmanager
def pinned(connection: BaseDatabaseWrapper, timeout: int = 0) -> Iterator[Any]:
    """A cursor that reads timestamps in UTC; `timeout` in milliseconds bounds each statement.

    The transaction, or savepoint, is rolled back, and that takes the settings along.
    """
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), "
            "set_config('statement_timeout', coalesce(nullif(%s, '0'), "
            "current_setting('statement_timeout')), true)",
            [str(timeout)],
        )
        yield cursor
        transaction.set_rollback(True, using=connection.alias)


def _partition_set(found: Mapping[str, Any], loose: Sequence[Member]) -> PartitionSet:
    table = TableName(*found["table"])
    once_ours = [m for m in loose if m.marker is not None and m.marker.parent == table]
    off = (MarkState.RETIRING, MarkState.DETACHED)
    returning = (MarkState.LOADING, MarkState.RESTORING)
    return PartitionSet(
        table=table,
        oid=found["oid"],
        kind=found["kind"],
        owner=found["owner"],
        role=found["role"],
        may_alter=found["may_alter"],
        strategy=found["strategy"],
        key_columns=tuple(found["key_columns"] or ()),
        tablespace=found["tablespace"],
        access_method=found["access_method"],
        references=_tables(found["references"]),
        referenced_by=_tables(found["referenced_by"]),
        members=tuple(_member(values) for values in found["members"] or ()),
        detached=tuple(m for m in once_ours if m.marker and m.marker.state in off),
        returning=tuple(m for m in once_ours if m.marker and m.marker.state in returning),
        orphans=tuple(m for m in once_ours if m.marker and m.marker.state not in off + returning),
    )


def _tables(names: Sequence[Sequence[str]] | None) -> tuple[TableName, ...]:
    return tuple(sorted(TableName(*name) for name in names or ()))


def _member(values: Sequence[Any]) -> Member:
    schema, name, oid, bound, is_pending, comment = values
    return Member(TableName(schema, name), oid, bound, is_pending, Marker.parse(comment))
