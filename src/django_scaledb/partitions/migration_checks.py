"""The check of migrations that are about to be run: those that would lock a large partitioned table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.apps import AppConfig
from django.contrib.postgres import operations as postgres
from django.core.checks import CheckMessage, Warning  # Django's own name
from django.db import DatabaseError, connections, models, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import truncate_name
from django.db.migrations import Migration, operations
from django.db.migrations.exceptions import (
    AmbiguityError,
    BadMigrationError,
    CircularDependencyError,
    InconsistentMigrationHistory,
    NodeNotFoundError,
)
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ModelState, ProjectState
from django.template.defaultfilters import filesizeformat

from django_scaledb.partitions import inspection
from django_scaledb.partitions.inspection import Size

LARGE_ROWS = 100_000
LARGE_BYTES = 64 * 2**20
"""From either on a table is large: building an index on it stops writers for longer than a moment."""

_WRONG_MIGRATIONS = (
    AmbiguityError,
    BadMigrationError,
    CircularDependencyError,
    InconsistentMigrationHistory,
    NodeNotFoundError,
)

_PARTITIONED = """
    SELECT c.relname, c.oid::int8 FROM pg_class c
    WHERE c.relkind = 'p' AND NOT c.relispartition AND pg_table_is_visible(c.oid)
"""
_CONCURRENTLY = "Use {} of django_scaledb.operations in its place, and atomic = False in the migration."
_BUILDS = "writers wait until it is built, on every partition"
_BUILDS_FOR_ALL = "readers and writers wait until its index is built, on every partition"
_NOT_TOGETHER = (
    "Write a UniqueConstraint instead of unique_together, and make it with AddConstraintConcurrently of "
    "django_scaledb.operations."
)
_WAITS = "it waits for everybody who uses the table, and all others wait behind it"


def check_migrations(
    app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Pending migrations that would lock a large partitioned table (``migrate`` and ``check --database``)."""
    found: list[CheckMessage] = []
    for alias in databases or ():
        connection = connections[alias]
        if not hasattr(connection, "accepts_any_period"):  # not our ENGINE
            continue
        try:
            large = _large_tables(connection)
            # Migrations are read only where there is something to lose.
            if large:
                found += _check(connection, large)
        except (DatabaseError, *_WRONG_MIGRATIONS):
            continue  # W001 and `migrate` itself say so
    return found


def _large_tables(connection: BaseDatabaseWrapper) -> dict[str, Size]:
    with connection.cursor() as cursor:
        cursor.execute(_PARTITIONED)
        names = {oid: name for name, oid in cursor.fetchall()}
    sizes = inspection.sizes(connection, list(names)) if names else {}
    return {names[oid]: size for oid, size in sizes.items() if _is_large(size)}


def _is_large(size: Size) -> bool:
    return (size.rows or 0) >= LARGE_ROWS or (size.bytes or 0) >= LARGE_BYTES


def _check(connection: BaseDatabaseWrapper, large: dict[str, Size]) -> Iterator[CheckMessage]:
    executor = MigrationExecutor(connection)
    leaves = executor.loader.graph.leaf_nodes()
    pending = {migration for migration, _ in executor.migration_plan(leaves)}
    if not pending:
        return
    state = ProjectState(real_apps=executor.loader.unmigrated_apps)
    for migration, _ in executor.migration_plan(leaves, clean_start=True):
        if migration not in pending:
            state = migration.mutate_state(state, preserve=False)
            continue
        for operation in migration.operations:
            for inner in _in_database(operation):
                model = _model(migration, inner, state)
                table = _table(connection, model)
                if model is not None and table in large and _is_run(connection, model):
                    yield from _warn(migration, inner, model, table, large[table])
            operation.state_forwards(migration.app_label, state)


def _in_database(operation: Operation) -> Iterable[Operation]:
    if isinstance(operation, operations.SeparateDatabaseAndState):
        return operation.database_operations
    return [operation]


def _model(migration: Migration, operation: Any, state: ProjectState) -> ModelState | None:
    name = getattr(operation, "model_name", None) or getattr(operation, "name", None)
    if not isinstance(name, str):
        return None
    return state.models.get((migration.app_label, name.lower()))


def _is_run(connection: BaseDatabaseWrapper, model: ModelState) -> bool:
    """Nothing is run where the router says so, on a replica above all."""
    return router.allow_migrate(connection.alias, model.app_label, model_name=model.name_lower)


def _table(connection: BaseDatabaseWrapper, model: ModelState | None) -> str:
    """The model's table as the catalog has it."""
    if model is None:
        return ""
    name: str = model.options.get("db_table") or f"{model.app_label}_{model.name_lower}"
    return truncate_name(name.rpartition('"."')[2], connection.ops.max_name_length())


def _warn(
    migration: Migration, operation: Operation, model: ModelState, table: str, size: Size
) -> Iterator[CheckMessage]:
    reason = _reason(operation, model)
    if reason is None:
        return
    what, hint = reason
    rows = f"about {size.rows:,} rows" if size.rows else str(filesizeformat(size.bytes or 0))
    yield Warning(
        f"{migration}: {operation.describe()}: {table} is partitioned and has "
        f"{rows.replace(chr(0xA0), ' ')}; {what}.",
        hint=hint,
        id="django_scaledb.W060",
    )


def _reason(operation: Operation, model: ModelState) -> tuple[str, str] | None:
    """Why `operation` should not be run on a table in use, and what to do."""
    # All that run CONCURRENTLY, Django's and ours, have the mixin.
    if isinstance(operation, postgres.NotInTransactionMixin | postgres.AddConstraintNotValid):
        return None
    if isinstance(operation, operations.AddIndex):
        return _BUILDS, _CONCURRENTLY.format("AddIndexConcurrently")
    if isinstance(operation, operations.RemoveIndex):
        return _WAITS, _CONCURRENTLY.format("RemoveIndexConcurrently")
    if isinstance(operation, operations.AddConstraint):
        if isinstance(operation.constraint, models.UniqueConstraint):
            return _BUILDS_FOR_ALL, _CONCURRENTLY.format("AddConstraintConcurrently")
        if isinstance(operation.constraint, models.CheckConstraint):
            return (
                "readers and writers wait until all rows are checked",
                "Use AddConstraintNotValid and, in a migration behind it, ValidateConstraint of "
                "django.contrib.postgres.operations.",
            )
        return "readers and writers wait until it is built", "Run it when nobody uses the table."
    if isinstance(operation, operations.RemoveConstraint):
        constraint = next((c for c in model.options.get("constraints", ()) if c.name == operation.name), None)
        if isinstance(constraint, models.UniqueConstraint):
            return _WAITS, _CONCURRENTLY.format("RemoveConstraintConcurrently")
        return None
    if isinstance(operation, operations.AlterUniqueTogether):
        added = (operation.option_value or set()) - set(model.options.get("unique_together") or ())
        return (_BUILDS_FOR_ALL, _NOT_TOGETHER) if added else None
    return _reason_of_field(operation, model)


def _reason_of_field(operation: Operation, model: ModelState) -> tuple[str, str] | None:
    if not isinstance(operation, operations.AddField | operations.AlterField):
        return None
    before = model.fields.get(operation.name) if isinstance(operation, operations.AlterField) else None
    if _has_index(before) or not _has_index(operation.field):
        return None
    return (
        f"it makes an index, and {_BUILDS}",
        "Set db_index=False on the field, add an Index to Meta.indexes, and make that with "
        "AddIndexConcurrently of django_scaledb.operations.",
    )


def _has_index(field: Any) -> bool:
    return field is not None and (field.db_index or field.unique)
