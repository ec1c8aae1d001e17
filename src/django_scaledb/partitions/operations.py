"""Migration operations of partitioned models; `makemigrations` writes them."""

from __future__ import annotations

from typing import Any

from django.db import NotSupportedError
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import Operation
from django.db.migrations.operations.fields import RenameField
from django.db.migrations.operations.models import CreateModel, ModelOperation
from django.db.migrations.state import ProjectState

from django_scaledb.partitions.state import PartitionedModelState


class CreatePartitionedModel(CreateModel):
    """CreateModel for a partitioned table: ``partitioning_options={"key": ["uploaded_at"]}``.

    Makes the table with ``PARTITION BY RANGE``, the partition of the current period and as many
    more as the model's ``premake`` says today, and no default partition unless the model asks.
    """

    serialization_expand_args = [*CreateModel.serialization_expand_args, "partitioning_options"]

    def __init__(
        self,
        name: str,
        fields: Any,
        options: dict[str, Any] | None = None,
        bases: Any = None,
        managers: Any = None,
        partitioning_options: dict[str, Any] | None = None,
    ) -> None:
        self.partitioning_options = dict(partitioning_options or {})
        super().__init__(name, fields, options, bases, managers)

    def deconstruct(self) -> Any:
        name, args, kwargs = super().deconstruct()
        kwargs["partitioning_options"] = self.partitioning_options
        return name, args, kwargs

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        state.add_model(
            PartitionedModelState(
                app_label,
                self.name,
                list(self.fields),
                dict(self.options),
                tuple(self.bases or ()),
                list(self.managers or ()),
                partitioning_options=self.partitioning_options,
            )
        )

    def describe(self) -> str:
        return f"Create partitioned model {self.name}"

    def reduce(self, operation: Operation, app_label: str) -> bool | list[Operation]:
        if isinstance(operation, AlterPartitioning) and operation.name_lower == self.name_lower:
            return [_repartitioned(self, operation.partitioning_options)]
        reduced = super().reduce(operation, app_label)
        if not isinstance(reduced, list):
            return reduced
        options = dict(self.partitioning_options)
        if isinstance(operation, RenameField) and operation.model_name_lower == self.name_lower:
            renamed = {operation.old_name: operation.new_name}
            options["key"] = [renamed.get(name, name) for name in options.get("key", ())]
        # Django's own reductions answer with a plain CreateModel (5.2-6.1).
        return [_repartitioned(op, options) if isinstance(op, CreateModel) else op for op in reduced]


class AlterPartitioning(ModelOperation):
    """Records that the partition key's field has another name; the table knows it by then.

    A key that is another column is refused: PostgreSQL cannot repartition a table in place.
    """

    def __init__(self, name: str, partitioning_options: dict[str, Any]) -> None:
        self.partitioning_options = partitioning_options
        super().__init__(name)

    def deconstruct(self) -> Any:
        return (
            type(self).__qualname__,
            [],
            {"name": self.name, "partitioning_options": self.partitioning_options},
        )

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        model_state = state.models[app_label, self.name_lower]
        assert isinstance(model_state, PartitionedModelState)
        model_state.partitioning_options = dict(self.partitioning_options)
        state.reload_model(app_label, self.name_lower, delay=True)

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        model = to_state.apps.get_model(app_label, self.name)
        if not self.allow_migrate_model(schema_editor.connection.alias, model) or schema_editor.collect_sql:
            return
        column = model._meta.get_field(self.partitioning_options["key"][0]).column
        with schema_editor.connection.cursor() as cursor:
            cursor.execute(
                "SELECT a.attname FROM pg_partitioned_table p "
                "JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = ANY (p.partattrs::int2[]) "
                "WHERE p.partrelid = to_regclass(%s)",
                [schema_editor.quote_name(model._meta.db_table)],
            )
            current = [row[0] for row in cursor.fetchall()]
        if current != [column]:
            raise NotSupportedError(
                f"{model._meta.label} is partitioned by {', '.join(current) or 'nothing'} in the database; "
                f"PostgreSQL cannot change that to {column} in place. Make a new model with the new key "
                "and copy the rows."
            )

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Nothing: the field's own rename is undone by its own operation."""

    def describe(self) -> str:
        return f"Partition {self.name} by {', '.join(self.partitioning_options['key'])}"

    @property
    def migration_name_fragment(self) -> str:
        return f"partition_{self.name_lower}"


class ConvertToPartitioned(ModelOperation):
    """Records that a plain table has become a partitioned one.

    A small table is converted by the migration itself, a large one by `convert_to_partitioned`
    before it (`partitions.conversion.migrate`). Unapplied, it leaves the table partitioned.
    """

    def __init__(self, name: str, partitioning_options: dict[str, Any]) -> None:
        self.partitioning_options = partitioning_options
        super().__init__(name)

    def deconstruct(self) -> Any:
        return (
            type(self).__qualname__,
            [],
            {"name": self.name, "partitioning_options": self.partitioning_options},
        )

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        plain = state.models[app_label, self.name_lower]
        state.models[app_label, self.name_lower] = PartitionedModelState(
            app_label,
            plain.name,
            list(plain.fields.items()),
            dict(plain.options),
            tuple(plain.bases),
            list(plain.managers),
            partitioning_options=self.partitioning_options,
        )
        state.reload_model(app_label, self.name_lower, delay=True)

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        # Later than this module, which autodetector and apps import before there are models.
        from django_scaledb.partitions.conversion import migrate

        model = to_state.apps.get_model(app_label, self.name)
        if not self.allow_migrate_model(schema_editor.connection.alias, model):
            return
        if schema_editor.collect_sql:
            schema_editor.collected_sql.append(
                f"-- {model._meta.db_table}: see manage.py convert_to_partitioned {model._meta.label} "
                "--dry-run"
            )
            return
        migrate.convert(schema_editor.connection, model)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Nothing: plain models work on the partitioned table, and forwards finds it partitioned."""

    def describe(self) -> str:
        return f"Convert {self.name} to a partitioned model"

    @property
    def migration_name_fragment(self) -> str:
        return f"convert_{self.name_lower}_to_partitioned"


def _repartitioned(operation: CreateModel, partitioning_options: dict[str, Any]) -> CreatePartitionedModel:
    return CreatePartitionedModel(
        operation.name,
        fields=operation.fields,
        options=operation.options,
        bases=operation.bases,
        managers=operation.managers,
        partitioning_options=partitioning_options,
    )
