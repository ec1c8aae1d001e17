"""The migration operation that installs, replaces and removes a counter's triggers."""

from __future__ import annotations

from typing import Any

from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import OperationCategory
from django.db.migrations.operations.models import ModelOperation
from django.db.migrations.state import ProjectState

from django_scaledb.counters.state import CounterModelState


class AlterCounterTriggers(ModelOperation):
    """Make the triggers of counter `name` count `counter_options`; None takes them away.

    `makemigrations` writes it for counters with ``mechanism = "trigger"``. Rows that are there
    already are counted by ``rebuild_counters``, while the application goes on.
    """

    category = OperationCategory.ALTERATION

    def __init__(self, name: str, counter_options: dict[str, Any] | None) -> None:
        self.counter_options = counter_options
        super().__init__(name)

    def deconstruct(self) -> Any:
        return type(self).__qualname__, [], {"name": self.name, "counter_options": self.counter_options}

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        found = state.models[app_label, self.name_lower]
        if self.counter_options is not None:
            state.models[app_label, self.name_lower] = CounterModelState.of(found, self.counter_options)
        elif isinstance(found, CounterModelState):
            state.models[app_label, self.name_lower] = found.plain()
        state.reload_model(app_label, self.name_lower, delay=False)

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        model = to_state.apps.get_model(app_label, self.name)
        if self.allow_migrate_model(schema_editor.connection.alias, model):
            schema_editor.set_counter_triggers(model)  # type: ignore[attr-defined]

    database_backwards = database_forwards

    def references_model(self, name: str, app_label: str) -> bool:
        """Whatever is optimised must not be moved across: the source and its parents matter, too."""
        return True

    def describe(self) -> str:
        if self.counter_options is None:
            return f"Remove the triggers of counter {self.name}"
        return f"Install the triggers of counter {self.name}"

    @property
    def migration_name_fragment(self) -> str:
        return f"{self.name_lower}_triggers"
