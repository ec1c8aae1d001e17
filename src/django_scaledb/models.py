"""What an application imports: ``from django_scaledb.models import PartitionedModel``."""

from django_scaledb.counters.models import CounterModel
from django_scaledb.overview.models import Overview
from django_scaledb.partitions.archive.state import Archive
from django_scaledb.partitions.conversion.state import Conversion
from django_scaledb.partitions.fields import UUID7Field
from django_scaledb.partitions.models import PartitionedModel
from django_scaledb.partitions.querysets import PartitionedManager, PartitionedQuerySet
from django_scaledb.runs import LastRun

__all__ = [
    "Archive",
    "Conversion",
    "CounterModel",
    "LastRun",
    "Overview",
    "PartitionedManager",
    "PartitionedModel",
    "PartitionedQuerySet",
    "UUID7Field",
]
