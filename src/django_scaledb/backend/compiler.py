"""The compilers of our ENGINE: django-postgres-extra's above Django's for PostgreSQL, with counted writes.

Its compilers derive from those that Django has for every database. Put before Django's for
PostgreSQL, they keep what those add: ``bulk_create`` through ``UNNEST`` (Django 5.2) and the refusal
of ``$`` in an alias.
"""

from __future__ import annotations

from django.db.backends.postgresql import compiler as django_compiler

from django_scaledb.backend.psqlextra import compiler
from django_scaledb.counters.compiler import CountedDeleteMixin, CountedInsertMixin, CountedUpdateMixin


class SQLCompiler(compiler.SQLCompiler, django_compiler.SQLCompiler):
    """SELECT."""


class SQLAggregateCompiler(compiler.SQLAggregateCompiler, django_compiler.SQLAggregateCompiler):
    """SELECT from a subquery."""


class SQLInsertCompiler(CountedInsertMixin, compiler.SQLInsertCompiler, django_compiler.SQLInsertCompiler):
    """INSERT."""


class SQLUpdateCompiler(CountedUpdateMixin, compiler.SQLUpdateCompiler, django_compiler.SQLUpdateCompiler):
    """UPDATE."""


class SQLDeleteCompiler(CountedDeleteMixin, compiler.SQLDeleteCompiler, django_compiler.SQLDeleteCompiler):
    """DELETE."""
