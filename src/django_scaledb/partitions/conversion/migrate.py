"""What `migrate` does about a model that has become a PartitionedModel.

A small table (tests, development, a fresh database) is converted in the migration's own
transaction. A large one that is in use is left to `convert_to_partitioned`: `migrate` stops before
it has run anything, and says so. A table that is partitioned already is only recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.apps.registry import Apps
from django.core.management.base import CommandError
from django.db import connections, models, router
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.conf import settings
from django_scaledb.exceptions import DDLError, ScaleDBError
from django_scaledb.partitions import catalog, ddl, inspection, registry
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.conversion import attach, names, preflight, runner, state
from django_scaledb.partitions.conversion import inventory as inventories
from django_scaledb.partitions.conversion.job import Job, utc_now
from django_scaledb.partitions.conversion.stages import Stage
from django_scaledb.partitions.conversion.state import Conversion, Strategy
from django_scaledb.postgres.executor import Executor
from django_scaledb.postgres.identifiers import fit

SMALL_ROWS = 10_000
"""A table of at most so many rows is converted by `migrate` itself: that takes well under a second."""


def stop_before_large(connection: BaseDatabaseWrapper, apps: Apps, plan: Iterable[tuple[Any, bool]]) -> None:
    """Raises `CommandError` when the plan would have to convert a large table, or one that is half done.

    `apps` are the models as they stand before the plan; a table that the plan itself makes is small.
    """
    from django_scaledb.partitions.operations import ConvertToPartitioned

    for migration, backwards in plan:
        for operation in migration.operations:
            if backwards or not isinstance(operation, ConvertToPartitioned):
                continue
            try:
                model = apps.get_model(migration.app_label, operation.name)
            except LookupError:
                continue
            if not router.allow_migrate_model(connection.alias, model):
                continue
            try:
                refuse_large(connection, model)
            except ScaleDBError as error:
                raise CommandError(f"nothing was migrated: {error}") from error


def refuse_large(connection: BaseDatabaseWrapper, model: type[models.Model]) -> None:
    """Raises `DDLError` when `convert_to_partitioned` has to go first."""
    [found] = catalog.read(connection, [model._meta.db_table])
    if found is None:
        return
    command = f"manage.py convert_to_partitioned {model._meta.label}"
    if connection.alias != "default":
        command += f" --using {connection.alias}"
    conversion = state.current(connection, found.table)
    settled = conversion is None or (found.is_partitioned and conversion.strategy != Strategy.ATTACH)
    if conversion is not None and not settled:
        raise DDLError(
            f"the conversion of {found.table} is under way ({conversion.phase}); finish it first: {command}"
        )
    if not found.is_partitioned and not is_small(connection, found):
        raise DDLError(
            f"{found.table} has more than {SMALL_ROWS:,} rows and is to be partitioned; convert it "
            "while it is in "
            f"use, then migrate again: {command}"
        )


def is_small(connection: BaseDatabaseWrapper, found: PartitionSet) -> bool:
    query = sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS t").format(
        found.table.sql, sql.Literal(SMALL_ROWS + 1)
    )
    with connection.cursor() as cursor:
        cursor.execute(query.as_string(connection.connection))
        return bool(cursor.fetchone()[0] <= SMALL_ROWS)


def convert(connection: BaseDatabaseWrapper, model: type[models.Model]) -> None:
    """Convert the table of `model`, a historical model, if that is not done and it is small.

    Raises `DDLError` where `convert_to_partitioned` has to go first, and `ConversionRefused`.
    """
    refuse_large(connection, model)
    [found] = catalog.read(connection, [model._meta.db_table])
    if found is None:
        raise DDLError(f"there is no table {model._meta.db_table}")
    config = registry.config_for_migration(model)
    if found.is_partitioned:
        found.partitions(config)  # raises where it is partitioned by something else
        return
    with catalog.pinned(connection) as cursor:
        inventory = inventories.read(cursor, found.table)
    runner.refuse(inventory, preflight.obstacles(inventory, config, str(model._meta.pk.column)))
    end = runner.first_end(connection, config, found, utc_now(), None)
    job = Job(
        connection=connection,
        model=model,
        conversion=Conversion(strategy=Strategy.ATTACH, details={"ceiling": end.isoformat()}),
        inventory=inventory,
        names=names.choose(connection, inventory, aside="_start"),
        now=utc_now(),
        kept=False,
        concurrently=False,
    )
    with connection.cursor() as cursor:
        # A check that is still deferred keeps a table from being altered.
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    with Executor(
        connection,
        command="migrate",
        lock_timeout=settings.LOCK_TIMEOUT,
        deadline=settings.DDL_DEADLINE,
    ) as executor:
        for stage in attach.stages(job):
            _do(executor, stage)
        _make_partitions(job, executor)
        _do(executor, runner.analyze(job, job.table))


def _do(executor: Executor, stage: Stage) -> None:
    if stage.step is not None:
        executor.run(stage.step, guard=stage.guard, bounded=stage.bounded)


def _make_partitions(job: Job, executor: Executor) -> None:
    """Those of the periods ahead, and in test databases one for rows of any date."""
    [parent] = catalog.read(job.connection, [job.model._meta.db_table])
    assert parent is not None
    for step in maintenance_steps(job, parent):
        executor.run(step)


def maintenance_steps(job: Job, parent: PartitionSet) -> Iterable[Any]:
    from django_scaledb.partitions.plan import plan
    from django_scaledb.partitions.work import Worker

    worker = Worker(job.connection, job.model, job.config, parent, job.now, drain_default=False)
    wanted = plan(job.config, parent.partitions(job.config), job.now, retire=False)
    for action in wanted.actions:
        for task in worker.tasks(action):
            yield task.step
    if (
        getattr(job.connection, "accepts_any_period", False)
        and not job.config.default_partition
        and parent.default is None
    ):
        name = fit(parent.table.name, "_default")
        if not inspection.taken_names(job.connection, parent.table.schema, [name]):
            yield ddl.create_default(parent, parent.table.sibling(name))


def on_pre_migrate(sender: Any, **kwargs: Any) -> None:
    """Receiver of `pre_migrate`, which comes before the first migration is run."""
    connection = connections[kwargs["using"]]
    if connection.vendor == "postgresql" and kwargs.get("plan"):
        stop_before_large(connection, kwargs["apps"], kwargs["plan"])
