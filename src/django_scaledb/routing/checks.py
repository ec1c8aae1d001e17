"""System checks of the routing keys of ``settings.SCALEDB``. Nothing is connected to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.apps import apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Warning
from django.db.utils import ConnectionRouter
from django.utils.module_loading import import_string

from django_scaledb import conf
from django_scaledb.conf import settings
from django_scaledb.routing import config as configuration
from django_scaledb.routing import registry as registries

_KEYS = frozenset(registries.KEYS)


def check_routing(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    if any(problem.key in _KEYS or not problem.key for problem in conf.problems()):
        return []  # reported with the setting's other problems
    config = configuration.build({key: getattr(settings, key) for key in registries.KEYS})
    return [
        *_aliases(config),
        *_labels(config),
        *_router(config),
        *_middleware(config),
    ]


def _aliases(config: configuration.RoutingConfig) -> Iterator[CheckMessage]:
    databases: dict[str, Any] = django_settings.DATABASES
    seen: dict[str, str] = {}
    for each in config.sets:
        for alias, role in [(each.primary, "primary"), *((a, "replica") for a in each.replicas)]:
            if role == "primary" and not each.replicas and alias not in databases:
                continue  # nothing is routed to it
            if alias not in databases:
                yield Error(
                    f"SCALEDB names the {role} {alias!r}, which DATABASES does not have.",
                    hint=f"The aliases are {', '.join(sorted(databases))}.",
                    id="django_scaledb.E021",
                )
            elif alias in seen:
                yield Error(
                    f"SCALEDB names {alias!r} twice, as {seen[alias]} and as {role}.",
                    hint="An alias is one primary, or a replica of one primary.",
                    id="django_scaledb.E022",
                )
            elif each.replicas and not _is_ours(databases[alias].get("ENGINE", "")):
                yield Error(
                    f"The ENGINE of the {role} {alias!r} is {databases[alias].get('ENGINE')!r}: its "
                    "connections neither recognise writes nor leave a server that fails.",
                    hint="Set it to 'django_scaledb.backend'.",
                    id="django_scaledb.E023",
                )
            seen.setdefault(alias, role)
        for alias in each.replicas:
            entry = databases.get(alias)
            if entry is not None and (entry.get("TEST") or {}).get("MIRROR") != each.primary:
                yield Warning(
                    f"Tests would give the replica {alias!r} a database of its own, which stays empty.",
                    hint=f"Add 'TEST': {{'MIRROR': {each.primary!r}}} to DATABASES[{alias!r}].",
                    id="django_scaledb.W024",
                )


def _is_ours(engine: str) -> bool:
    from django_scaledb.routing.connection import RoutedConnectionMixin

    if engine == "django_scaledb.backend":
        return True
    try:
        return issubclass(import_string(f"{engine}.base.DatabaseWrapper"), RoutedConnectionMixin)
    except (ImportError, TypeError):
        return False


def _labels(config: configuration.RoutingConfig) -> Iterator[CheckMessage]:
    for key, labels in [
        ("READ_FROM_PRIMARY", settings.READ_FROM_PRIMARY),
        *((f"MORE_PRIMARIES[{c.primary!r}]['MODELS']", sorted(c.models)) for c in config.sets[1:]),
    ]:
        for label in labels:
            app_label, _, model_name = label.partition(".")
            try:
                app = next(a for a in apps.get_app_configs() if a.label.lower() == app_label.lower())
                if model_name:
                    app.get_model(model_name)
            except (StopIteration, LookupError):
                yield Warning(
                    f"SCALEDB {key} names {label!r}, which is neither an installed app nor a model.",
                    hint="Write an app label such as 'auth', or 'auth.User'.",
                    id="django_scaledb.W025",
                )


def _router(config: configuration.RoutingConfig) -> Iterator[CheckMessage]:
    from django_scaledb.routing.router import ReplicaRouter

    if not any(each.replicas for each in config.sets):
        return
    if not any(isinstance(router, ReplicaRouter) for router in ConnectionRouter().routers):
        yield Warning(
            "SCALEDB names replicas, and no router sends reads to them.",
            hint="Add 'django_scaledb.routing.ReplicaRouter' to DATABASE_ROUTERS.",
            id="django_scaledb.W026",
        )


def _middleware(config: configuration.RoutingConfig) -> Iterator[CheckMessage]:
    from django_scaledb.routing.middleware import ReadYourWritesMiddleware

    if not django_settings.MIDDLEWARE or not any(each.replicas for each in config.sets):
        return
    for path in django_settings.MIDDLEWARE:
        try:
            found = import_string(path)
        except ImportError:
            continue
        if isinstance(found, type) and issubclass(found, ReadYourWritesMiddleware):
            return
    yield Warning(
        "Requests do not carry what they wrote to the next request, which may read older data.",
        hint="Add 'django_scaledb.routing.ReadYourWritesMiddleware' as the last entry of MIDDLEWARE.",
        id="django_scaledb.W027",
    )
