"""Counters by trigger in the migration state: a ModelState that keeps what the triggers count."""

from __future__ import annotations

from typing import Any, Self

from django.apps.registry import Apps
from django.db import models
from django.db.migrations.state import ModelState

from django_scaledb.counters.options import CounterOptions

RECORDED = ("source", "group_by", "where", "totals")


def recorded(options: CounterOptions) -> dict[str, Any]:
    """What a migration has to know of a CounterMeta to make its triggers."""
    app_label, name = options.source_key
    return {
        "source": f"{app_label}.{name}",
        # Pairs, because migrations are written with the keys of a dictionary sorted.
        "group_by": options.names(),
        "where": options.where,
        "totals": list(options.totals.items()),
    }


class CounterModelState(ModelState):
    """The state of a counter whose triggers are installed; `counter_options` is what they count."""

    counter_options: dict[str, Any]

    def __init__(self, *args: Any, counter_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counter_options = dict(counter_options or {})

    @classmethod
    def of(cls, state: ModelState, counter_options: dict[str, Any]) -> Self:
        """`state` with triggers."""
        return cls(
            state.app_label,
            state.name,
            list(state.fields.items()),
            dict(state.options),
            state.bases,
            list(state.managers),
            counter_options=counter_options,
        )

    def plain(self) -> ModelState:
        """The same without triggers."""
        return ModelState(
            self.app_label,
            self.name,
            list(self.fields.items()),
            dict(self.options),
            self.bases,
            list(self.managers),
        )

    def clone(self) -> Self:
        state: Any = super().clone()
        state.counter_options = dict(self.counter_options)
        return state  # type: ignore[no-any-return]

    def render(self, apps: Apps) -> Any:
        model: Any = super().render(apps)
        model._counter_triggers = self.counter_options
        return model


def triggers_of(model: type[models.Model]) -> dict[str, Any] | None:
    """The recorded options of a historical model whose triggers are installed."""
    found: dict[str, Any] | None = getattr(model, "_counter_triggers", None)
    return found
