"""The part of the schema editor that knows counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import models

from django_scaledb.counters import triggers
from django_scaledb.counters.definition import Definition, identity_of

if TYPE_CHECKING:
    from django.db.backends.postgresql.schema import DatabaseSchemaEditor as _SchemaEditor
else:
    _SchemaEditor = object


class CounterSchemaEditorMixin(_SchemaEditor):
    """Installs a counter's triggers, and takes them away before its table goes.

    Everything goes through `execute`, so that ``sqlmigrate`` shows it.
    """

    def set_counter_triggers(self, model: type[models.Model]) -> None:
        """Bring the triggers of a (historical) counter to what it records; none takes them away."""
        self._remove_triggers(model)
        if (found := historical_definition(model, self.connection)) is not None:
            for statement in triggers.install(found):
                self.execute(statement, params=None)

    def _remove_triggers(self, model: type[models.Model]) -> None:
        for statement in triggers.uninstall(identity_of(model._meta.label_lower)):
            self.execute(statement, params=None)

    def delete_model(self, model: type[models.Model]) -> None:
        # A trigger without its counter would make every write of the source fail.
        if getattr(model, "_counter_triggers", None) is not None:
            self._remove_triggers(model)
        super().delete_model(model)


def historical_definition(model: type[models.Model], connection: object) -> Definition | None:
    """The definition that a historical model records, or None when it has no triggers."""
    from django_scaledb.counters.options import CounterOptions, resolve_groups
    from django_scaledb.counters.resolve import define
    from django_scaledb.counters.state import triggers_of

    recorded = triggers_of(model)
    if recorded is None:
        return None
    options = CounterOptions(model._meta.label, model._meta.app_label, recorded)
    source = options.source_model(model._meta.apps)
    options.groups = resolve_groups(options, source, model._meta.apps)
    return define(model, connection, options=options, source=source)  # type: ignore[arg-type]
