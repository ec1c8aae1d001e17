"""Which counters there are, and which of them a write of some model concerns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.apps import apps as global_apps
from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.counters.definition import Definition, Hop
from django_scaledb.counters.resolve import define
from django_scaledb.exceptions import ConfigurationError

if TYPE_CHECKING:
    # Not at run time: the backend is imported before there are models.
    from django_scaledb.counters.models import CounterModel


def counters() -> list[type[CounterModel]]:
    """The counters of all installed apps, in the order of their apps."""
    from django_scaledb.counters.models import CounterModel

    return [
        model
        for model in global_apps.get_models()
        if issubclass(model, CounterModel) and hasattr(model, "_counter_meta") and not model._meta.proxy
    ]


@dataclass(frozen=True)
class Watch:
    """What a write of one model concerns: counters of its rows, and spans that lead through it."""

    counted: tuple[type[CounterModel], ...]
    spanned: tuple[type[CounterModel], ...]


_watches: dict[str, Watch] | None = None
_by_signals: tuple[type[CounterModel], ...] = ()
_definitions: dict[tuple[str, str], Definition] = {}


def _all_watches() -> dict[str, Watch]:
    global _watches, _by_signals
    if _watches is None:
        by_signals: list[type[CounterModel]] = []
        counted: dict[str, list[type[CounterModel]]] = {}
        spanned: dict[str, list[type[CounterModel]]] = {}
        for counter in counters():
            options = counter._counter_meta
            if options.mechanism != "signals" or not options.is_built:
                continue
            by_signals.append(counter)
            counted.setdefault(".".join(options.source_key), []).append(counter)
            for group in options.groups:
                for step in group.path[1:]:
                    into = spanned.setdefault(step.model._meta.label_lower, [])
                    if counter not in into:
                        into.append(counter)
        _by_signals = tuple(by_signals)
        _watches = {
            label: Watch(tuple(counted.get(label, ())), tuple(spanned.get(label, ())))
            for label in {*counted, *spanned}
        }
    return _watches


def by_signals() -> tuple[type[CounterModel], ...]:
    """The counters that the ORM's writes keep; made once, because every COMMIT asks."""
    _all_watches()
    return _by_signals


def forget() -> None:
    """Look at the declarations again: models or settings have changed (tests)."""
    global _watches
    _watches = None
    _definitions.clear()
    _subscribers_forget()


_on_forget: list[Callable[[], None]] = []


def _subscribers_forget() -> None:
    for forget_also in _on_forget:
        forget_also()


def on_forget(function: Callable[[], None]) -> None:
    """Have `function` called whenever declarations are looked at again."""
    _on_forget.append(function)


def watch(model: type[models.Model]) -> Watch | None:
    """The counters that a write of `model` by the ORM concerns, or None; costs a look-up.

    Models of migrations count too, as soon as the counter is part of their state.
    """
    if not global_apps.models_ready:
        return None
    concrete: Any = model._meta.concrete_model or model
    found = _all_watches().get(concrete._meta.label_lower)
    if found is None or concrete._meta.apps is global_apps:
        return found
    known = concrete._meta.apps.all_models
    there = [
        tuple(c for c in group if c._meta.model_name in known.get(c._meta.app_label, ()))
        for group in (found.counted, found.spanned)
    ]
    return Watch(*there) if any(there) else None


def definition(counter: type[CounterModel], connection: BaseDatabaseWrapper) -> Definition:
    """The counter's definition for this alias; made once."""
    at = (counter._meta.label, connection.alias)
    if at not in _definitions:
        _definitions[at] = define(counter, connection)
    return _definitions[at]


def counter_by_label(label: str) -> type[CounterModel]:
    """The counter called ``app_label.ModelName``; raises `ConfigurationError` with those there are."""
    for counter in counters():
        if counter._meta.label_lower == label.lower():
            return counter
    known = ", ".join(counter._meta.label for counter in counters()) or "none"
    raise ConfigurationError(f"there is no counter {label!r}; the counters are: {known}")


def hops_of(
    counters_: tuple[type[CounterModel], ...], label: str, connection: BaseDatabaseWrapper
) -> list[Hop]:
    """The steps of these counters' spans that lead through the model `label`, once each."""
    return list(
        dict.fromkeys(
            hop for counter in counters_ for hop in definition(counter, connection).hops if hop.label == label
        )
    )
