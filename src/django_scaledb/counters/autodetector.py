"""What plain `makemigrations` has to know about counters by trigger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.apps import apps as global_apps
from django.core.management.commands import makemigrations, migrate
from django.db.migrations.autodetector import OperationDependency

from django_scaledb.counters.models import CounterModel
from django_scaledb.counters.operations import AlterCounterTriggers
from django_scaledb.counters.state import CounterModelState, recorded

if TYPE_CHECKING:
    from django.db.migrations.autodetector import MigrationAutodetector

    class _Autodetector(MigrationAutodetector):
        new_model_keys: set[tuple[str, str]]
        kept_model_keys: set[tuple[str, str]]

else:
    _Autodetector = object


class CounterAutodetectorMixin(_Autodetector):
    """Writes `AlterCounterTriggers` when what triggers count, or whether they do, has changed."""

    def __init__(self, from_state: Any, to_state: Any, questioner: Any = None) -> None:
        super().__init__(from_state, to_state, questioner)
        for model in global_apps.get_models(include_swapped=True):
            label = (model._meta.app_label, str(model._meta.model_name))
            if not issubclass(model, CounterModel) or label not in to_state.models:
                continue
            options = getattr(model, "_counter_meta", None)
            if options is not None and options.is_built and options.mechanism == "trigger":
                to_state.models[label] = CounterModelState.of(to_state.models[label], recorded(options))

    def generate_altered_managers(self) -> None:
        super().generate_altered_managers()
        for key, new in sorted(self.to_state.models.items()):
            old = self.from_state.models.get((key[0], self.renamed_models.get(key, key[1])))
            before = old.counter_options if isinstance(old, CounterModelState) else None
            after = new.counter_options if isinstance(new, CounterModelState) else None
            if key not in self.new_model_keys | self.kept_model_keys or before == after:
                continue
            needed: list[Any] = list(self._needed(key, after))
            self.add_operation(key[0], AlterCounterTriggers(new.name, after), dependencies=needed)

    def _needed(self, key: tuple[str, str], after: Any) -> Iterator[OperationDependency]:
        """The counter, its source and the parents on the way: tables and columns."""
        models = [key]
        if after is not None:
            counter: Any = global_apps.get_model(*key)
            steps = [step.model for group in counter._counter_meta.groups for step in group.path]
            for model in dict.fromkeys([counter.source(), *steps]):
                models.append((model._meta.app_label, model._meta.model_name))
        for app_label, name in models:
            yield OperationDependency(app_label, name, None, OperationDependency.Type.CREATE)
            for field in self.to_state.models[app_label, name].fields:
                yield OperationDependency(app_label, name, field, OperationDependency.Type.CREATE)


def install() -> None:
    """Give Django's commands, and whatever subclasses them, the extended autodetector."""
    extended: dict[type, Any] = {}  # Django wants one class for both (check commands.E001)
    for command in (makemigrations.Command, migrate.Command):
        base = command.autodetector
        if not issubclass(base, CounterAutodetectorMixin):
            if base not in extended:
                extended[base] = type(base.__name__, (CounterAutodetectorMixin, base), {})
            command.autodetector = extended[base]
