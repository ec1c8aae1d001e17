"""System checks for counters: one id, one mistake, one hint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.apps import AppConfig, apps
from django.core.checks import CheckMessage, Error, Warning  # Django's own names
from django.db import DatabaseError, connections, models, router

from django_scaledb.counters import registry
from django_scaledb.counters.models import CounterModel
from django_scaledb.counters.options import KNOWN, MECHANISMS, ON_DETACH
from django_scaledb.counters.rebuild import trigger_problems
from django_scaledb.exceptions import ConfigurationError

NULLS_NOT_DISTINCT = 150000


def check_counters(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """What one can get wrong in a CounterMeta."""
    found: list[CheckMessage] = []
    for counter in _counters_in(app_configs):
        found += _check_declaration(counter)
    return found


def _counters_in(app_configs: Sequence[AppConfig] | None) -> list[type[CounterModel]]:
    labels = {config.label for config in (app_configs or apps.get_app_configs())}
    return [counter for counter in registry.counters() if counter._meta.app_label in labels]


def _check_declaration(counter: type[CounterModel]) -> Iterator[CheckMessage]:
    options, label = counter._counter_meta, counter._meta.label
    for name in sorted(set(options.attrs) - set(KNOWN)):
        yield Error(
            f"{label}: CounterMeta has no option {name!r}.",
            hint=f"Its options are {', '.join(KNOWN)}.",
            obj=counter,
            id="django_scaledb.E040",
        )
    for name, value, choices in (
        ("mechanism", options.mechanism, MECHANISMS),
        ("on_detach", options.on_detach, ON_DETACH),
    ):
        if value not in choices:
            yield Error(
                f"{label}: CounterMeta.{name} is {value!r}.",
                hint=f"Use {' or '.join(repr(choice) for choice in choices)}.",
                obj=counter,
                id="django_scaledb.E041",
            )
    if options.problem is not None:
        yield Error(f"{options.problem}.", hint=None, obj=counter, id="django_scaledb.E042")
        return
    if not options.is_built:
        app_label, name = options.source_key
        yield Error(
            f"{label}: CounterMeta.source names {app_label}.{name}, which is no installed model.",
            hint='Write it as "app_label.ModelName", and add its app to INSTALLED_APPS.',
            obj=counter,
            id="django_scaledb.E043",
        )
        return
    source = counter.source()
    if source._meta.proxy or not source._meta.managed:
        yield Error(
            f"{label}: CounterMeta.source is {source._meta.label}, which has no table of its own.",
            hint="Name the model whose table holds the rows.",
            obj=counter,
            id="django_scaledb.E044",
        )
    keeps_in_database = [
        field.name
        for field in source._meta.local_fields
        if getattr(getattr(field.remote_field, "on_delete", None), "db_cascade", False)
        or type(getattr(field.remote_field, "on_delete", None)).__name__ == "DatabaseOnDelete"
    ]
    if keeps_in_database and options.mechanism == "signals":
        yield Error(
            f"{label}: the database itself deletes rows of {source._meta.label} "
            f"({', '.join(keeps_in_database)}), "
            "which the ORM cannot count.",
            hint='Set CounterMeta.mechanism = "trigger".',
            obj=counter,
            id="django_scaledb.E045",
        )
    written = {field.name for field in counter._meta.local_fields}
    known = {"id", *(group.name for group in options.groups), *options.totals}
    known |= {f"{name}{suffix}" for name in options.totals for suffix in ("_sum", "_count", "_kept")}
    known |= {f"{name}{suffix}_kept" for name in options.totals for suffix in ("_sum", "_count")}
    for name in sorted(written - known):
        field: Any = counter._meta.get_field(name)
        if not field.null and field.db_default is models.NOT_PROVIDED and not field.primary_key:
            yield Error(
                f"{counter._meta.label}.{name} has no default in the database.",
                hint="Rows are made by SQL: add db_default=.. or null=True.",
                obj=field,
                id="django_scaledb.E046",
            )


def check_backend(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Signals need our ENGINE on every alias that writes a source."""
    found: list[CheckMessage] = []
    for counter in _counters_in(app_configs):
        options = counter._counter_meta
        if not options.is_built or options.mechanism != "signals":
            continue
        for alias in connections:
            if not hasattr(connections[alias], "keeps_counters") and router.allow_migrate_model(
                alias, counter.source()
            ):
                found.append(
                    Error(
                        f"DATABASES[{alias!r}] has ENGINE "
                        f"{connections[alias].settings_dict['ENGINE']!r}, whose "
                        f"writes {counter._meta.label} does not see.",
                        hint='Set "ENGINE": "django_scaledb.backend".',
                        obj=counter,
                        id="django_scaledb.E047",
                    )
                )
    return found


def check_database(
    app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """What the database says about counters (``check --database default``)."""
    found: list[CheckMessage] = []
    for alias in databases or ():
        connection: Any = connections[alias]
        here = [
            counter
            for counter in _counters_in(app_configs)
            if counter._counter_meta.is_built and router.allow_migrate_model(alias, counter)
        ]
        if not here or not hasattr(connection, "keeps_counters"):
            continue
        try:
            for counter in here:
                found += _check_in_database(counter, connection)
        except (DatabaseError, ConfigurationError) as error:
            found.append(
                Warning(
                    f"cannot look at the counters of {alias!r}: {error}".strip(),
                    hint="Is the server up, and have the migrations been run?",
                    id="django_scaledb.W040",
                )
            )
    return found


def _check_in_database(counter: type[CounterModel], connection: Any) -> Iterator[CheckMessage]:
    nullable = [g.name for g in counter._counter_meta.groups if counter._meta.get_field(g.name).null]
    if nullable and connection.pg_version < NULLS_NOT_DISTINCT:
        yield Error(
            f"{counter._meta.label} groups by {', '.join(nullable)}, which may be NULL, "
            f"and {connection.alias!r} is "
            f"PostgreSQL {connection.pg_version // 10000}.",
            hint="One row for the group of NULL needs PostgreSQL 15 (NULLS NOT DISTINCT); "
            "before it, group by columns "
            "that are NOT NULL.",
            obj=counter,
            id="django_scaledb.E048",
        )
    if counter._counter_meta.mechanism == "trigger":
        for problem in trigger_problems(registry.definition(counter, connection), connection):
            yield Warning(problem, obj=counter, id="django_scaledb.W041")
