"""Test databases: their partitioned tables take rows of any date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_scaledb.backend import psqlextra
from django_scaledb.conf import settings
from django_scaledb.routing import registry

if TYPE_CHECKING:
    from django.db.backends.postgresql.creation import DatabaseCreation as _Creation
else:
    # Whatever the base backend has (PostGIS has its own).
    _Creation = psqlextra.DatabaseWrapper.creation_class


class DatabaseCreation(_Creation):
    """Gives partitioned tables a default partition while a test database is being made.

    A test suite saves rows of 1999 and of next century; it should not have to think of partitions
    (``SCALEDB["TEST_DEFAULT_PARTITION"] = False`` turns this off).
    """

    connection: Any

    def create_test_db(self, *args: Any, **kwargs: Any) -> str:
        self.connection.accepts_any_period = settings.TEST_DEFAULT_PARTITION
        try:
            name: str = super().create_test_db(*args, **kwargs)
            return name
        finally:
            self.connection.accepts_any_period = False

    def set_as_test_mirror(self, primary_settings_dict: dict[str, Any]) -> None:
        super().set_as_test_mirror(primary_settings_dict)
        # Its reads would wait for data that a test never commits: the primary serves them.
        registry.mirror(self.connection.alias)
