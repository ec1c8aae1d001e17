"""What a model's PartitioningMeta says, checked and as values (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from zoneinfo import ZoneInfo

from django_scaledb.partitions.intervals import Interval


class KeyKind(Enum):
    """How bounds of the partition key are written."""

    TIMESTAMP = "timestamptz"
    DATE = "date"
    UUID7 = "uuid"


class RetentionAction(Enum):
    """What becomes of a partition whose end is past retention."""

    DETACH = "detach"
    ARCHIVE = "archive"
    DROP = "drop"


@dataclass(frozen=True)
class PartitionConfig:
    """One model's partitioning, ready for the planner.

    `label` is ``app_label.ModelName``; `column` the partition key's column; `zone` the time zone
    in which calendar units are counted (UTC unless the model declares one).
    """

    label: str
    column: str
    key_kind: KeyKind
    interval: Interval
    premake: int
    retention: Interval | None
    retention_action: RetentionAction
    detached_for: Interval
    zone: ZoneInfo
    default_partition: bool
