"""System checks of all features; importing this module registers them."""

from __future__ import annotations

from typing import Any

from django.core import checks

from django_scaledb import conf
from django_scaledb.counters import checks as counter_checks
from django_scaledb.partitions import checks as partition_checks
from django_scaledb.partitions import migration_checks
from django_scaledb.routing import checks as routing_checks


def check_settings(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    """The SCALEDB setting: unknown keys and values that cannot be."""
    return [
        checks.Error(
            f"settings.SCALEDB[{problem.key!r}]: {problem.message}."
            if problem.key
            else f"{problem.message}.",
            hint=problem.hint,
            id="django_scaledb.E011",
        )
        for problem in conf.problems()
    ]


checks.register(check_settings)
checks.register(partition_checks.check_models, checks.Tags.models)
checks.register(partition_checks.check_relations, checks.Tags.models)
checks.register(partition_checks.check_archives, checks.Tags.models)
checks.register(partition_checks.check_backend, checks.Tags.models)
checks.register(partition_checks.check_database, checks.Tags.database)
checks.register(migration_checks.check_migrations, checks.Tags.database)
checks.register(counter_checks.check_counters, checks.Tags.models)
checks.register(counter_checks.check_backend, checks.Tags.models)
checks.register(counter_checks.check_database, checks.Tags.database)
checks.register(routing_checks.check_routing)
