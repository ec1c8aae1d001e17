"""Where Django finds the compilers of our ENGINE."""

from __future__ import annotations

from django_scaledb.backend.psqlextra import DatabaseWrapper


class DatabaseOperations(DatabaseWrapper.ops_class):  # type: ignore[misc,valid-type]
    """django-postgres-extra's operations with our compilers."""

    compiler_module = "django_scaledb.backend.compiler"
