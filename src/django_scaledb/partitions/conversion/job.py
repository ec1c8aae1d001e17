"""One conversion under way: its table, its names, where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.partitions import catalog, registry
from django_scaledb.partitions.bounds import MINVALUE, Range
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.conversion import fingerprint, sync
from django_scaledb.partitions.conversion import inventory as inventories
from django_scaledb.partitions.conversion.errors import TableChanged
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.names import Names
from django_scaledb.partitions.conversion.state import Conversion, Phase
from django_scaledb.partitions.conversion.swap import BOUNDS_CHECK
from django_scaledb.postgres.executor import Guard
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement


@dataclass
class Job:
    """What the strategies work on.

    `inventory` is the table as it was before anything was done to it. A job that is not `kept` (a
    dry run; a small table in `migrate`'s own transaction) writes nothing down.
    """

    connection: BaseDatabaseWrapper
    model: type[models.Model]
    conversion: Conversion
    inventory: Inventory
    names: Names
    now: datetime
    dry_run: bool = False
    kept: bool = True
    batch: int = 2000
    throttle: float | None = None
    concurrently: bool = True
    config: PartitionConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = registry.config_for_migration(self.model)

    @property
    def table(self) -> TableName:
        return self.inventory.table

    @cached_property
    def pk_column(self) -> str:
        return str(self.model._meta.pk.column)

    @cached_property
    def pk_columns(self) -> tuple[str, ...]:
        """The primary key of the partitioned table: (id, key), or (id) when that is the key."""
        return tuple(dict.fromkeys((self.pk_column, self.config.column)))

    @property
    def bounds(self) -> Range:
        """Those of the first partition."""
        return Range(MINVALUE, datetime.fromisoformat(self.conversion.details["ceiling"]))

    def note(self, **values: Any) -> None:
        """Keep `values` (fields of the conversion, or entries of its details) at once."""
        conversion = self.conversion
        names = {f.name for f in conversion._meta.fields}
        details = {name: value for name, value in values.items() if name not in names}
        for name, value in values.items():
            if name in names:
                setattr(conversion, name, value)
        conversion.details.update(details)
        if self.kept:
            # Never phase and end: those are written by the steps that reach them.
            fields = [name for name in values if name in names] + ["changed_at"]
            conversion.save(
                using=self.connection.alias, update_fields=[*fields, *(["details"] if details else [])]
            )

    def refresh(self) -> None:
        if self.kept:
            self.conversion.refresh_from_db(using=self.connection.alias)

    def reach(self, phase: Phase, *, over: bool = False) -> tuple[Statement, ...]:
        """The statement with which a step writes down that `phase` is reached."""
        return (self.conversion.reach(phase, over=over),) if self.kept or self.dry_run else ()

    # -- looking

    def look(self, table: TableName) -> Inventory:
        with catalog.pinned(self.connection) as cursor:
            return inventories.read(cursor, table)

    def original(self, found: Inventory) -> Inventory:
        """`found` without what the conversion itself has added to it."""
        values = found.as_json()
        helpers = {self.names.key_index, self.names.back_index}
        values["indexes"] = [i for i in values["indexes"] if i["name"] not in helpers]
        values["constraints"] = [c for c in values["constraints"] if c["name"] != BOUNDS_CHECK]
        ours = {self.names.function, sync.truncate_trigger(self.names.function)}
        values["triggers"] = [t for t in values["triggers"] if t["name"] not in ours]
        return Inventory.from_json(values)

    def observe(self) -> tuple[Inventory, Guard]:
        """The table as it is now, and a guard that raises `TableChanged` when it is not so any more.

        The inventory takes tens of milliseconds to read, so it is read while nobody waits.
        """
        guard = self.unchanged(self.table)
        return self.original(self.look(self.table)), guard

    def unchanged(self, table: TableName) -> Guard:
        """A guard: nothing has altered `table` since now."""
        if self.dry_run:
            return lambda cursor: None
        with self.connection.cursor() as cursor:
            before = fingerprint.read(cursor, table)

        def guard(cursor: Any) -> None:
            if fingerprint.read(cursor, table) != before:
                raise TableChanged(f"{table} was altered meanwhile; run again")

        return guard

    def index_state(self, name: str) -> bool | None:
        """Whether the index is valid; None when there is none of that name."""
        return self._flag(
            "SELECT x.indisvalid FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
            "JOIN pg_namespace n ON n.oid = i.relnamespace WHERE n.nspname = %s AND i.relname = %s",
            [self.inventory.schema, name],
        )

    def constraint_state(self, table: TableName, name: str) -> bool | None:
        """Whether the constraint is validated; None when there is none of that name."""
        return self._flag(
            "SELECT k.convalidated FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid "
            "JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND k.conname = %s",
            [table.schema, table.name, name],
        )

    def exists(self, table: TableName) -> bool:
        query = (
            "SELECT true FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s"
        )
        return self._flag(query, [table.schema, table.name]) is True

    def has_rows(self, table: TableName) -> bool:
        row = self.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(table.sql))
        return bool(row[0])

    def _flag(self, query: str, parameters: list[str]) -> bool | None:
        with self.connection.cursor() as cursor:
            cursor.execute(query, parameters)
            row = cursor.fetchone()
        return None if row is None else bool(row[0])

    def execute(self, query: sql.Composable) -> Any:
        """Run a statement that is no DDL; its first row."""
        with self.connection.cursor() as cursor:
            cursor.execute(query.as_string(self.connection.connection))
            return cursor.fetchone() if cursor.description else None


def differences(before: Inventory, after: Inventory) -> Iterator[str]:
    """The properties in which two inventories differ."""
    first, second = before.shape(), after.shape()
    return (name for name in first if first[name] != second[name])


def utc_now() -> datetime:
    return datetime.now(UTC)
