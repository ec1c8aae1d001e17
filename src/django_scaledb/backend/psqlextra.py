"""The one place that touches django-postgres-extra (3.0.1).

Its metadata pins Django below 6.0; nothing else in the package depends on it, so that the pin can
be lifted here alone. What is used: its backend (hstore and conflict handling for those who have
its fields and managers, a configurable base backend such as PostGIS).
"""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.db.models import Manager
from psqlextra import compiler
from psqlextra.backend.base import DatabaseWrapper
from psqlextra.backend.schema import PostgresSchemaEditor
from psqlextra.manager import PostgresManager

__all__ = ["DatabaseWrapper", "PostgresSchemaEditor", "compiler", "lift_engine_guard", "uses_hstore"]


def lift_engine_guard() -> None:
    """Let ``psqlextra.models`` be imported under an ENGINE whose path does not say "psqlextra".

    `PostgresManager` looks for that text in the settings when it is made. Our ENGINE is its
    backend under another name, and a system check of ours looks at what the ENGINE really is.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        Manager.__init__(self, *args, **kwargs)

    PostgresManager.__init__ = __init__  # type: ignore[method-assign]


def uses_hstore() -> bool:
    """Whether any installed model has an hstore column."""
    return any(
        getattr(field, "get_internal_type", str)() == "HStoreField" or type(field).__name__ == "HStoreField"
        for model in apps.get_models(include_auto_created=True)
        for field in model._meta.local_fields
    )
