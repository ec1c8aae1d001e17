"""The schema editor: django-postgres-extra's, with partitioned tables made our way."""

from __future__ import annotations

from django_scaledb.backend.psqlextra import PostgresSchemaEditor
from django_scaledb.counters.schema import CounterSchemaEditorMixin
from django_scaledb.partitions.schema import PartitionedSchemaEditorMixin


class DatabaseSchemaEditor(CounterSchemaEditorMixin, PartitionedSchemaEditorMixin, PostgresSchemaEditor):
    """Composes what each feature needs of a schema editor."""
