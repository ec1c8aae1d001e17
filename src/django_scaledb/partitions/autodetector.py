"""What plain `makemigrations` has to know about partitioned models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps as global_apps
from django.core.management.commands import makemigrations, migrate
from django.db.migrations.operations.base import Operation
from django.db.migrations.operations.models import CreateModel

from django_scaledb.partitions.models import PartitionedModel
from django_scaledb.partitions.operations import (
    AlterPartitioning,
    ConvertToPartitioned,
    CreatePartitionedModel,
)
from django_scaledb.partitions.state import PartitionedModelState

if TYPE_CHECKING:
    from django.db.migrations.autodetector import MigrationAutodetector as _Autodetector
else:
    _Autodetector = object


class PartitionedAutodetectorMixin(_Autodetector):
    """Makes `CreatePartitionedModel` of partitioned models, `ConvertToPartitioned` of those that have
    become so, and follows a renamed key.
    """

    if TYPE_CHECKING:  # Django's, unknown to django-stubs
        kept_model_keys: set[tuple[str, str]]

    def __init__(self, from_state: Any, to_state: Any, questioner: Any = None) -> None:
        super().__init__(from_state, to_state, questioner)
        for model in global_apps.get_models(include_swapped=True):
            label = (model._meta.app_label, model._meta.model_name)
            if issubclass(model, PartitionedModel) and label in to_state.models and not model._meta.proxy:
                to_state.models[label] = PartitionedModelState.from_model(model)

    def add_operation(
        self, app_label: str, operation: Operation, dependencies: Any = None, beginning: bool = False
    ) -> None:
        if isinstance(operation, CreateModel):
            state = self.to_state.models[app_label, operation.name_lower]
            if isinstance(state, PartitionedModelState):
                operation = CreatePartitionedModel(
                    operation.name,
                    fields=operation.fields,
                    options=operation.options,
                    bases=operation.bases,
                    managers=operation.managers,
                    partitioning_options=state.partitioning_options,
                )
        super().add_operation(app_label, operation, dependencies, beginning)

    def generate_altered_db_table(self) -> None:
        # Behind the fields' own operations: the key is to be found under its new name.
        super().generate_altered_db_table()
        for app_label, name in sorted(self.kept_model_keys):
            old_name = self.renamed_models.get((app_label, name), name)
            old = self.from_state.models[app_label, old_name]
            new = self.to_state.models[app_label, name]
            if not isinstance(new, PartitionedModelState):
                continue
            if not isinstance(old, PartitionedModelState):
                self.add_operation(app_label, ConvertToPartitioned(new.name, new.partitioning_options))
                continue
            if old.partitioning_options != new.partitioning_options:
                self.add_operation(app_label, AlterPartitioning(new.name, new.partitioning_options))


def install() -> None:
    """Give Django's commands, and whatever subclasses them, the extended autodetector.

    `autodetector` is the class attribute that Django 5.2 made for this; extending what stands
    there, instead of shipping commands of our own, keeps other packages' `makemigrations` working.
    """
    # Django checks that both commands have the same one (commands.E001), so it is made once.
    extended: dict[type, type] = {}
    for command in (makemigrations.Command, migrate.Command):
        base = command.autodetector
        if not issubclass(base, PartitionedAutodetectorMixin):
            if base not in extended:
                extended[base] = type(base.__name__, (PartitionedAutodetectorMixin, base), {})
            command.autodetector = extended[base]
