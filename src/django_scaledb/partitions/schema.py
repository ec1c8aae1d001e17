"""The part of the schema editor that knows partitioned tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.db import NotSupportedError, models

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import catalog, registry
from django_scaledb.partitions.first import first_partitions
from django_scaledb.partitions.indexes.builder import Builder, text_of
from django_scaledb.partitions.indexes.definition import Definition
from django_scaledb.partitions.options import is_partitioned, options_of
from django_scaledb.postgres.statements import Step

if TYPE_CHECKING:
    from django.db.backends.postgresql.schema import DatabaseSchemaEditor as _SchemaEditor
else:
    _SchemaEditor = object


class PartitionedSchemaEditorMixin(_SchemaEditor):
    """Creates partitioned tables with their first partitions, and guards the partition key.

    Everything goes through `execute`, so that ``sqlmigrate`` shows it.
    """

    def table_sql(self, model: type[models.Model]) -> tuple[str, list[Any]]:
        if not is_partitioned(model):
            return super().table_sql(model)
        pk, key = model._meta.pk, registry.key_field(model)
        assert pk.column is not None
        assert key.column is not None
        columns = ", ".join(self.quote_name(c) for c in dict.fromkeys([pk.column, key.column]))
        plain = self.sql_create_table
        # Written into the template, so that Django goes on making the columns, checks and tablespace.
        constraint = f"PRIMARY KEY ({columns})".replace("%", "%%")
        partition_by = f"PARTITION BY RANGE ({self.quote_name(key.column)})".replace("%", "%%")
        self.sql_create_table = f"CREATE TABLE %(table)s (%(definition)s, {constraint}) {partition_by}"
        try:
            return super().table_sql(model)
        finally:
            self.sql_create_table = plain

    def column_sql(
        self, model: type[models.Model], field: models.Field[Any, Any], include_default: bool = False
    ) -> Any:
        definition, params = super().column_sql(model, field, include_default)
        if definition is not None and field.primary_key and is_partitioned(model):
            definition = definition.replace(" PRIMARY KEY", "", 1)
        return definition, params

    def create_model(self, model: type[models.Model]) -> None:
        super().create_model(model)
        if is_partitioned(model):
            self.create_first_partitions(model)

    def create_partitioned_model(self, model: type[models.Model]) -> None:
        """What django-postgres-extra's operations call; its own partitioned models stay its own."""
        if is_partitioned(model):
            self.create_model(model)
        else:
            super().create_partitioned_model(model)  # type: ignore[misc]

    def create_first_partitions(self, model: type[models.Model]) -> None:
        """The current period and `premake` more, so that a fresh table takes rows at once."""
        config = registry.config_for_migration(model)
        with_default = config.default_partition or getattr(self.connection, "accepts_any_period", False)
        for statement in first_partitions(
            model._meta.db_table, config, datetime.now(UTC), with_default=with_default
        ):
            # params=None: the text is finished, a "%" in a name is no placeholder.
            self.execute(statement.as_string(None), params=None)

    # -- indexes: what Django's and our concurrent operations call

    def add_index(self, model: type[models.Model], index: models.Index, concurrently: bool = False) -> None:
        if concurrently and self._has_partitions(model):
            self._build(model, index)
        else:
            super().add_index(model, index, concurrently)

    def remove_index(
        self, model: type[models.Model], index: models.Index, concurrently: bool = False
    ) -> None:
        if concurrently and self._has_partitions(model):
            self._unbuild(model, index)
        else:
            super().remove_index(model, index, concurrently)

    def add_constraint_concurrently(
        self, model: type[models.Model], constraint: models.UniqueConstraint
    ) -> None:
        """Build a unique constraint, partition by partition, while the table is in use."""
        self._build(model, constraint)

    def remove_constraint_concurrently(
        self, model: type[models.Model], constraint: models.UniqueConstraint
    ) -> None:
        """Drop it under a lock that nobody waits behind for long."""
        self._unbuild(model, constraint)

    def _has_partitions(self, model: type[models.Model]) -> bool:
        """What the database says; the model, where there is no table yet (``sqlmigrate``)."""
        [found] = catalog.read(self.connection, [model._meta.db_table])
        return is_partitioned(model) if found is None else found.is_partitioned

    def _build(self, model: type[models.Model], wanted: models.Index | models.UniqueConstraint) -> None:
        builder = self._builder(model, wanted)
        if builder is None:
            return
        if self.collect_sql:
            self._show(builder.steps_to_add())
        else:
            builder.add()

    def _unbuild(self, model: type[models.Model], wanted: models.Index | models.UniqueConstraint) -> None:
        builder = self._builder(model, wanted)
        if builder is None:
            return
        if self.collect_sql:
            self._show(builder.steps_to_remove())
        else:
            builder.remove()

    def _builder(
        self, model: type[models.Model], wanted: models.Index | models.UniqueConstraint
    ) -> Builder | None:
        """None for what this PostgreSQL does not have, which Django's own operations leave out, too."""
        definition = Definition.of(wanted, model, self)
        if definition is None:
            return None
        return Builder(self.connection, model._meta.db_table, definition)

    def _show(self, steps: Iterable[Step]) -> None:
        try:
            for text in text_of(steps, self.connection):
                self.execute(text, params=None)
        except DDLError as error:  # the table is made by a migration before this one
            self.collected_sql.append(f"-- {error}: the statements depend on its partitions")

    def alter_db_table(self, model: type[models.Model], old_db_table: str, new_db_table: str) -> None:
        if not is_partitioned(model) or old_db_table == new_db_table:
            super().alter_db_table(model, old_db_table, new_db_table)
            return
        [found] = catalog.read(self.connection, [old_db_table])
        super().alter_db_table(model, old_db_table, new_db_table)
        if found is None:
            return
        # Tables that were taken off the set know it by name: their mark follows the rename.
        parent = found.table.sibling(new_db_table.rpartition('"."')[2])
        for member in (*found.detached, *found.orphans):
            if member.marker is not None:
                mark = replace(member.marker, parent=parent)
                self.execute(mark.comment_on(member.table.sql).as_string(None), params=None)

    def alter_field(
        self,
        model: type[models.Model],
        old_field: models.Field[Any, Any],
        new_field: models.Field[Any, Any],
        strict: bool = False,
    ) -> None:
        if is_partitioned(model) and _is_key(model, old_field, new_field):
            old_type = old_field.db_parameters(connection=self.connection)["type"]
            new_type = new_field.db_parameters(connection=self.connection)["type"]
            if old_type != new_type:
                raise NotSupportedError(
                    f"{model._meta.label}.{old_field.name} is the partition key; PostgreSQL cannot change "
                    f"its type from {old_type} to {new_type}. Make a new model with the new key and "
                    "copy the rows."
                )
        super().alter_field(model, old_field, new_field, strict)

    def remove_field(self, model: type[models.Model], field: models.Field[Any, Any]) -> None:
        if is_partitioned(model) and _is_key(model, field, field):
            raise NotSupportedError(
                f"{model._meta.label}.{field.name} is the partition key; PostgreSQL cannot drop it. Make a "
                "new model with another key and copy the rows."
            )
        super().remove_field(model, field)


def _is_key(model: type[models.Model], *fields: models.Field[Any, Any]) -> bool:
    return any(field.name in options_of(model).key for field in fields)
