"""What a migration imports: ``from django_scaledb.operations import AddIndexConcurrently``."""

from django_scaledb.partitions.indexes.operations import (
    AddConstraintConcurrently,
    AddIndexConcurrently,
    RemoveConstraintConcurrently,
    RemoveIndexConcurrently,
)

__all__ = [
    "AddConstraintConcurrently",
    "AddIndexConcurrently",
    "RemoveConstraintConcurrently",
    "RemoveIndexConcurrently",
]
