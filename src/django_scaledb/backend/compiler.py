"""The compilers of our ENGINE: django-postgres-extra's, with counted writes."""

from __future__ import annotations

from django_scaledb.backend.psqlextra import compiler
from django_scaledb.counters.compiler import CountedDeleteMixin, CountedInsertMixin, CountedUpdateMixin

SQLCompiler = compiler.SQLCompiler
SQLAggregateCompiler = compiler.SQLAggregateCompiler


class SQLInsertCompiler(CountedInsertMixin, compiler.SQLInsertCompiler):
    """INSERT."""


class SQLUpdateCompiler(CountedUpdateMixin, compiler.SQLUpdateCompiler):
    """UPDATE."""


class SQLDeleteCompiler(CountedDeleteMixin, compiler.SQLDeleteCompiler):
    """DELETE."""
