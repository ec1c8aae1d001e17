"""What an application imports: ``from django_scaledb.models import PartitionedModel``."""

from django_scaledb.counters.models import CounterModel
from django_scaledb.partitions.conversion.state import Conversion
from django_scaledb.partitions.fields import UUID7Field
from django_scaledb.partitions.models import PartitionedModel
from django_scaledb.partitions.querysets import PartitionedManager, PartitionedQuerySet

__all__ = [
    "Conversion",
    "CounterModel",
    "PartitionedManager",
    "PartitionedModel",
    "PartitionedQuerySet",
    "UUID7Field",
]
