"""The partitions a table is born with (pure): made by `migrate`, in the transaction that makes the table."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from psycopg import sql

from django_scaledb.partitions.bounds import label
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.plan import Create, plan
from django_scaledb.postgres.identifiers import fit

# Without the parent's schema, which only the database knows; nobody asks for it while it is attached.
ATTACHED = Marker(MarkState.ATTACHED)


def first_partitions(
    db_table: str, config: PartitionConfig, now: datetime, *, with_default: bool
) -> Iterator[sql.Composed]:
    """CREATE TABLE .. PARTITION OF for the current period and `premake` more.

    Nobody can be using a table that its own transaction has just made, so the strong lock that
    PARTITION OF takes on the parent stands in nobody's way; on a table in use it would.
    """
    parent = _table(db_table)
    for action in plan(config, (), now, retire=False).actions:
        if not isinstance(action, Create):
            continue
        suffix = "_" + label(action.range.lower, config.interval, config.period_zone)
        partition = _table(db_table, suffix)
        yield sql.SQL("CREATE TABLE {} PARTITION OF {} {}").format(
            partition, parent, action.range.for_values(config.key_kind)
        )
        yield ATTACHED.comment_on(partition)
    if with_default:
        partition = _table(db_table, "_default")
        yield sql.SQL("CREATE TABLE {} PARTITION OF {} DEFAULT").format(partition, parent)
        yield ATTACHED.comment_on(partition)


def _table(db_table: str, suffix: str = "") -> sql.Identifier:
    """`db_table` as Django writes it: maybe with a schema, as in ``schema"."table``."""
    *schema, name = db_table.split('"."')
    return sql.Identifier(*schema, fit(name, suffix) if suffix else name)
