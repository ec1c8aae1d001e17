"""The one place that touches django-postgres-extra (3.0.1).

Its metadata pins Django below 6.0; nothing else in the package depends on it, so that the pin can
be lifted here alone. What is used: its backend (hstore and conflict handling for those who have
its fields and managers, a configurable base backend such as PostGIS).
"""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.db import connections
from django.db.models import Manager
from psqlextra import compiler
from psqlextra.backend.base import DatabaseWrapper
from psqlextra.backend.schema import PostgresSchemaEditor
from psqlextra.manager import PostgresManager
from psqlextra.sql import PostgresInsertQuery, PostgresUpdateQuery

from django_scaledb.counters.compiler import refuse_uncounted_upsert

__all__ = [
    "DatabaseWrapper",
    "PostgresSchemaEditor",
    "compiler",
    "lift_engine_guard",
    "route_managers_through_the_engine",
    "uses_hstore",
]


def lift_engine_guard() -> None:
    """Let ``psqlextra.models`` be imported under an ENGINE whose path does not say "psqlextra".

    `PostgresManager` looks for that text in the settings when it is made. Our ENGINE is its
    backend under another name, and a system check of ours looks at what the ENGINE really is.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        Manager.__init__(self, *args, **kwargs)

    PostgresManager.__init__ = __init__  # type: ignore[method-assign]


def route_managers_through_the_engine() -> None:
    """Let the queries of its managers be compiled by the ENGINE, as all others are.

    They name its compilers directly. ``update()`` of a `PostgresManager`, and every ``save()`` of a
    `PostgresModel`, would write past the counters; what ``on_conflict()`` begins writes SQL of
    its own that cannot report, and is refused where a counter depends on it.
    """

    def update_compiler(self: Any, using: str | None = None, connection: Any = None) -> Any:
        connection = connections[using] if using else connection
        found = connection.ops.compiler("SQLUpdateCompiler")
        if not issubclass(found, compiler.SQLUpdateCompiler):
            found = compiler.SQLUpdateCompiler
        return found(self, connection, using)

    def insert_compiler(self: Any, using: str | None = None, connection: Any = None) -> Any:
        connection = connections[using] if using else connection
        refuse_uncounted_upsert(self.model, connection, updates=self.conflict_action.value == "UPDATE")
        return compiler.PostgresInsertOnConflictCompiler(self, connection, using)  # type: ignore[no-untyped-call]

    PostgresUpdateQuery.get_compiler = update_compiler  # type: ignore[method-assign]
    PostgresInsertQuery.get_compiler = insert_compiler  # type: ignore[method-assign]


def uses_hstore() -> bool:
    """Whether any installed model has an hstore column."""
    return any(
        getattr(field, "get_internal_type", str)() == "HStoreField" or type(field).__name__ == "HStoreField"
        for model in apps.get_models(include_auto_created=True)
        for field in model._meta.local_fields
    )
