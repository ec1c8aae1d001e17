"""PostgreSQL's words for a row that no partition takes, in the model's words."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime

import psycopg

from django_scaledb.exceptions import NoPartitionError
from django_scaledb.partitions import registry
from django_scaledb.partitions.uuid7 import timestamp_of

# DETAIL: Partition key of the failing row contains (uploaded_at) = (2031-05-01 00:00:00+00).
# The sentence is translated by the server's lc_messages, the parentheses are not.
_KEY_AND_VALUE = re.compile(r"\((?P<column>.*?)\) = \((?P<value>.*)\)")


def translate(error: BaseException) -> NoPartitionError | None:
    """The `NoPartitionError` that `error` means, or None when it means something else.

    PostgreSQL reports a missing partition as a check violation that names the partitioned table
    and no constraint (ExecFindPartition, PostgreSQL 14-18).
    """
    if not isinstance(error, psycopg.errors.CheckViolation) or error.diag.constraint_name:
        return None
    table = error.diag.table_name
    model = next(
        (m for m in registry.partitioned_models() if _unqualified(m._meta.db_table) == table),
        None,
    )
    if model is None:
        return None
    detail = _KEY_AND_VALUE.search(error.diag.message_detail or "")
    value = detail["value"] if detail else None
    day = _day_of(value) or "DATE"
    key = registry.key_field(model).name
    what = f"{key} = {value}" if value else f"this row's {key}"
    return NoPartitionError(
        f"no partition of {model._meta.label} takes {what}; make one with: "
        f"manage.py create_partitions {model._meta.label} --from {day} --to {day}",
        model=model,
        value=value,
    )


def _unqualified(db_table: str) -> str:
    return db_table.rpartition('"."')[2]


def _day_of(value: str | None) -> str | None:
    """The UTC day of a partition key as PostgreSQL prints it, or None when it is no such thing."""
    if value is None:
        return None
    try:
        try:
            moment = timestamp_of(uuid.UUID(value))
        except ValueError:
            moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.date().isoformat()
