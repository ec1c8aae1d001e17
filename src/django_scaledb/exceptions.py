"""Every error that django_scaledb raises, in one tree.

The docstring of a class is its default message; a raiser says more where it knows more.
"""

from __future__ import annotations

from typing import Any

# Only the exception classes: `NoPartitionError` is an IntegrityError to whoever catches those.
from django.db.utils import IntegrityError


class ScaleDBError(Exception):
    """django_scaledb could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(ScaleDBError):
    """The PartitioningMeta or the SCALEDB setting is not valid."""


class PlanError(ScaleDBError):
    """No plan can bring this partition set to what its PartitioningMeta says."""


class DDLError(ScaleDBError):
    """A schema change could not be finished; what was done before it stays valid."""


class LockNotAvailable(DDLError):
    """A lock was not granted before the deadline."""


class ArchiveError(DDLError):
    """A partition could not be archived, or not restored."""


class ArchiveOutdated(ArchiveError):
    """A table was written to since it was archived."""


class AnotherRunInProgress(DDLError):
    """Another django_scaledb run is changing this database's schema."""


class NoPartitionError(ScaleDBError, IntegrityError):
    """There is no partition for this row.

    `model` is the partitioned model's class; `value` the partition key as PostgreSQL printed it,
    or None when the role may not see the row's values.
    """

    def __init__(self, message: str | None = None, *, model: Any = None, value: str | None = None) -> None:
        super().__init__(message)
        self.model = model
        self.value = value


class UnprunedQueryError(ScaleDBError):
    """A query reads every partition, because nothing in it restricts the partition key."""
