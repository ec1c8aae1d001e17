"""System checks for partitioned models: one id, one mistake, one hint.

E-ids stop commands that run checks; the database checks are warnings, because a deployment must be
able to `migrate` and rotate its way out of what they report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from django.apps import AppConfig, apps
from django.core.checks import CheckMessage, Error, Warning  # Django's own names
from django.db import DatabaseError, connections, models, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.constraints import UniqueConstraint

from django_scaledb.conf import settings
from django_scaledb.exceptions import ConfigurationError, ScaleDBError
from django_scaledb.partitions import catalog, registry
from django_scaledb.partitions.archive import columns, parquet, storage
from django_scaledb.partitions.config import KeyKind, RetentionAction, problems
from django_scaledb.partitions.conversion import state as conversions
from django_scaledb.partitions.models import PartitionedModel
from django_scaledb.partitions.options import is_partitioned
from django_scaledb.partitions.plan import State, missing

MINIMUM_POSTGRES = 140000


def check_models(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """What one can get wrong in a model's own declaration."""
    found: list[CheckMessage] = []
    for model in _partitioned_in(app_configs):
        found += _check_declaration(model)
    return found


def _partitioned_in(app_configs: Sequence[AppConfig] | None) -> list[type[PartitionedModel]]:
    labels = {config.label for config in (app_configs or apps.get_app_configs())}
    return [m for m in registry.partitioned_models() if m._meta.app_label in labels]


def _check_declaration(model: type[PartitionedModel]) -> Iterator[CheckMessage]:
    if isinstance(model._meta.pk, models.CompositePrimaryKey):
        yield Error(
            f"{model._meta.label} has a composite primary key.",
            hint="Leave `pk` scalar: the table's primary key is made of id and partition key by itself.",
            obj=model,
            id="django_scaledb.E001",
        )
        return
    parents = [parent for parent in model._meta.get_parent_list() if not parent._meta.abstract]
    if parents:
        yield Error(
            f"{model._meta.label} inherits the table of {parents[0]._meta.label}.",
            hint="A row of a partitioned model lives in one table: inherit from abstract models only.",
            obj=model,
            id="django_scaledb.E002",
        )
        return
    try:
        key = registry.key_field(model)
        kind = registry.key_kind(key)
    except ConfigurationError as error:
        yield Error(
            str(error),
            hint="Set PartitioningMeta.key to a list with the name of a DateTimeField, a DateField or a "
            "UUID7Field primary key.",
            obj=model,
            id="django_scaledb.E003",
        )
        return
    if key.null:
        yield Error(
            f"{model._meta.label}.{key.name} is the partition key and allows NULL.",
            hint="Remove null=True: a row without a time belongs to no period.",
            obj=model,
            id="django_scaledb.E004",
        )
    if kind is KeyKind.UUID7 and not key.primary_key:
        yield Error(
            f"{model._meta.label}.{key.name} is a UUID7Field but not the primary key.",
            hint="Set primary_key=True, or partition by a DateTimeField.",
            obj=model,
            id="django_scaledb.E005",
        )
    for problem in problems(model._meta.label, kind, model._partitioning_meta.attrs):
        yield Error(
            f"{model._meta.label}: PartitioningMeta.{problem.attribute}: {problem.message}",
            hint=problem.hint,
            obj=model,
            id="django_scaledb.E006",
        )
    yield from _check_uniqueness(model, key)


def check_archives(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """What stands in the way of archiving, before the first partition is due."""
    found: list[CheckMessage] = []
    wanting = [model for model in _partitioned_in(app_configs) if _archives(model)]
    for model in wanting:
        found += _check_columns(model)
    if not wanting:
        return found
    try:
        parquet.require()
        storage.find()
    except ConfigurationError as error:
        found.append(
            Error(
                f"{wanting[0]._meta.label} is to be archived, and cannot be: {error}.",
                hint="Until then partitions past retention stay where they are.",
                id="django_scaledb.E013",
            )
        )
    if settings.ARCHIVE_STORAGE == "default":
        found.append(
            Warning(
                f"{wanting[0]._meta.label} is archived among uploaded files, which are often public.",
                hint='Give archives a storage of their own: SCALEDB = {"ARCHIVE_STORAGE": "archive"} and an '
                'entry "archive" in STORAGES.',
                id="django_scaledb.W008",
            )
        )
    return found


def _archives(model: type[PartitionedModel]) -> bool:
    attrs = model._partitioning_meta.attrs
    return (
        attrs.get("retention_action") == RetentionAction.ARCHIVE.value and attrs.get("retention") is not None
    )


def _check_columns(model: type[PartitionedModel]) -> Iterator[CheckMessage]:
    """The types that the fields have in PostgreSQL; those of columns made by hand the command sees."""
    for alias in connections:
        connection = connections[alias]
        if connection.vendor != "postgresql":
            continue
        for field in model._meta.local_fields:
            type_ = field.db_type(connection)
            reason = columns.refusal(type_, "b") if type_ else None
            if reason is not None:
                yield Error(
                    f"{model._meta.label} cannot be archived because of its field {field.name!r}: {reason}.",
                    hint='Keep what it means as text, or use retention_action "detach".',
                    obj=field,
                    id="django_scaledb.E012",
                )
        return


def _check_uniqueness(model: type[PartitionedModel], key: models.Field[Any, Any]) -> Iterator[CheckMessage]:
    """PostgreSQL keeps uniqueness per partition, so the key must be part of every unique index."""
    hint = (
        f"Add {key.name!r} to it, or drop it: PostgreSQL can keep values unique within a partition only "
        '(its docs: "Partitioning Limitations").'
    )
    for field in model._meta.local_fields:
        if field.unique and not field.primary_key and field is not key:
            yield Error(
                f"{model._meta.label}.{field.name} is unique without the partition key.",
                hint=hint.replace("Add", "Use a UniqueConstraint with this field and", 1).replace(
                    " to it", "", 1
                ),
                obj=field,
                id="django_scaledb.E007",
            )
    groups = [("unique_together", tuple(fields)) for fields in model._meta.unique_together]
    groups += [
        (constraint.name, tuple(constraint.fields))
        for constraint in model._meta.constraints
        if isinstance(constraint, UniqueConstraint)
    ]
    for name, fields in groups:
        if key.name not in fields:
            yield Error(
                f"{model._meta.label}: the unique constraint {name} ({', '.join(fields) or 'expressions'}) "
                f"is without the partition key {key.name!r}.",
                hint=hint,
                obj=model,
                id="django_scaledb.E008",
            )


def check_relations(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Foreign keys to a partitioned model: real ones need a unique index on what they point at."""
    labels = {config.label for config in (app_configs or apps.get_app_configs())}
    found: list[CheckMessage] = []
    for model in apps.get_models(include_auto_created=True):
        if model._meta.app_label in labels and model._meta.managed:
            found += check_model_relations(model)
    return found


def check_model_relations(model: type[models.Model]) -> Iterator[CheckMessage]:
    """One model's foreign keys."""
    for field in model._meta.local_fields:
        target = field.related_model if isinstance(field, models.ForeignKey) else None
        if is_partitioned(target) and field.db_constraint and target._key_beside_pk() is not None:  # type: ignore[attr-defined]
            yield _unconstrainable(model, field, target)


def _unconstrainable(
    model: type[models.Model], field: models.Field[Any, Any], target: type[PartitionedModel]
) -> CheckMessage:
    where = f"{model._meta.label}.{field.name}"
    what = "Set db_constraint=False on it"
    if model._meta.auto_created:
        owner: Any = model._meta.auto_created
        where, what = (
            f"{owner._meta.label}'s many-to-many table {model._meta.db_table}",
            ("Set db_constraint=False on the ManyToManyField"),
        )
    return Error(
        f"{where} points at {target._meta.label}, whose database key is (id, "
        f"{target._partitioning_meta.key[0]}): no foreign key constraint can reference the id alone.",
        hint=f"{what}, or give {target._meta.label} a UUID7Field primary key as its partition key, which "
        "real foreign keys can reference.",
        obj=field,
        id="django_scaledb.E009",
    )


def check_backend(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Partitioned tables need our ENGINE, on every alias that is PostgreSQL."""
    if not registry.partitioned_models():
        return []
    found: list[CheckMessage] = []
    for alias in connections:
        connection = connections[alias]
        if connection.vendor == "postgresql" and not hasattr(connection, "accepts_any_period"):
            found.append(
                Error(
                    f"DATABASES[{alias!r}] has ENGINE {connection.settings_dict['ENGINE']!r}, which cannot "
                    "make partitioned tables.",
                    hint='Set "ENGINE": "django_scaledb.backend" (for PostGIS and other base backends see '
                    "POSTGRES_EXTRA_DB_BACKEND_BASE).",
                    id="django_scaledb.E010",
                )
            )
    return found


def check_database(
    app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """What the database says about the partition sets (``check --database default``)."""
    found: list[CheckMessage] = []
    for alias in databases or ():
        connection = connections[alias]
        by_alias = [
            model
            for model in _partitioned_in(app_configs)
            if router.allow_migrate_model(alias, model) and hasattr(connection, "accepts_any_period")
        ]
        if not by_alias:
            continue
        try:
            found += _check_partition_sets(connection, by_alias)
        except (DatabaseError, ScaleDBError) as error:
            found.append(
                Warning(
                    f"cannot look at the partition sets of {alias!r}: {error}".strip(),
                    hint="Is the server up, and does the role have CONNECT?",
                    id="django_scaledb.W001",
                )
            )
    return found


def _check_partition_sets(
    connection: BaseDatabaseWrapper, partitioned: list[type[PartitionedModel]]
) -> Iterator[CheckMessage]:
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version_num")
        version = int(cursor.fetchone()[0])
    if version < MINIMUM_POSTGRES:
        yield Warning(
            f"{connection.alias!r} is PostgreSQL {version // 10000}, and partitions need 14 or later.",
            hint="DETACH PARTITION .. CONCURRENTLY came with PostgreSQL 14.",
            id="django_scaledb.W002",
        )
        return
    sets = catalog.read(connection, [model._meta.db_table for model in partitioned])
    for model, found in zip(partitioned, sets, strict=True):
        if found is None:
            continue  # not migrated yet, which is migrate's to say
        yield from _check_conversion(connection, model, found)
        try:
            yield from _check_partition_set(model, found)
        except ScaleDBError as error:
            convert = (
                "" if found.is_partitioned else f" Run manage.py convert_to_partitioned {model._meta.label}."
            )
            yield Warning(
                f"{error} (database {connection.alias!r}).",
                hint="Rotation leaves this model alone until table and PartitioningMeta agree." + convert,
                obj=model,
                id="django_scaledb.W003",
            )


def _check_conversion(
    connection: BaseDatabaseWrapper, model: type[PartitionedModel], found: catalog.PartitionSet
) -> Iterator[CheckMessage]:
    """One that was left lying: rows above its ceiling are refused, or a second table grows along."""
    conversion = conversions.current(connection, found.table)
    if conversion is not None:
        yield Warning(
            f"{connection.alias}: {conversion}; it is not finished.",
            hint=f"See manage.py convert_to_partitioned {model._meta.label} --status.",
            obj=model,
            id="django_scaledb.W007",
        )


def _check_partition_set(
    model: type[PartitionedModel], found: catalog.PartitionSet
) -> Iterator[CheckMessage]:
    config = registry.config_for(model)
    partitions = found.partitions(config)
    rotate = f"Run manage.py rotate_partitions {model._meta.label}, and have it run by cron."
    lacking = missing(config, partitions, datetime.now(UTC))
    if lacking.runway:
        yield Warning(
            f"{model._meta.label} has fewer than {config.premake} future partitions of {config.interval}: "
            f"nothing takes rows of {', '.join(map(str, lacking.runway))}.",
            hint=rotate,
            obj=model,
            id="django_scaledb.W004",
        )
    if lacking.gaps:
        yield Warning(
            f"{model._meta.label} has no partition for {', '.join(map(str, lacking.gaps))}.",
            hint=rotate,
            obj=model,
            id="django_scaledb.W005",
        )
    pending = [str(p.table) for p in partitions if p.state is State.DETACH_PENDING]
    if pending:
        yield Warning(
            f"{model._meta.label}: the detaching of {', '.join(pending)} was interrupted; its rows are out "
            "of sight and its range refuses inserts.",
            hint=rotate,
            obj=model,
            id="django_scaledb.W006",
        )
