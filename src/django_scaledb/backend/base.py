"""DatabaseWrapper: what ``ENGINE = "django_scaledb.backend"`` names."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from django.db.utils import DatabaseErrorWrapper
from django.utils.functional import cached_property

from django_scaledb.backend import psqlextra
from django_scaledb.backend.creation import DatabaseCreation
from django_scaledb.backend.features import DatabaseFeatures
from django_scaledb.backend.operations import DatabaseOperations
from django_scaledb.backend.schema import DatabaseSchemaEditor
from django_scaledb.counters.connection import CounterConnectionMixin
from django_scaledb.partitions import errors, watching
from django_scaledb.routing.connection import RoutedConnectionMixin


class DatabaseWrapper(CounterConnectionMixin, RoutedConnectionMixin, psqlextra.DatabaseWrapper):
    """PostgreSQL with partitioned models and counters, as a primary or as a replica."""

    SchemaEditorClass = DatabaseSchemaEditor
    creation_class = DatabaseCreation
    features_class = DatabaseFeatures
    ops_class = DatabaseOperations

    accepts_any_period = False
    """Whether new partitioned tables get a default partition (test databases do)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        watching.join(self)

    def prepare_database(self) -> None:
        """Make hstore only where a model has such a column: an ordinary role must do otherwise."""
        if psqlextra.uses_hstore():
            super().prepare_database()  # type: ignore[no-untyped-call]
        else:
            super(psqlextra.DatabaseWrapper, self).prepare_database()

    @property
    def is_followed(self) -> bool:
        # A primary with replicas recognises writes by what its cursors run.
        return self.routing_set is not None or super().is_followed

    @cached_property
    def wrap_database_errors(self) -> _ErrorWrapper:
        return _ErrorWrapper(self)


class _ErrorWrapper(DatabaseErrorWrapper):
    """Django's translation of driver errors, with ours before it."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        if exc_value is None:
            return None
        if (error := errors.translate(exc_value)) is not None:
            raise error.with_traceback(traceback) from exc_value
        return super().__exit__(exc_type, exc_value, traceback)
