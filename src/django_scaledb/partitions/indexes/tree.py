"""A table with its partitions, at any depth, and the indexes that each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import DDLError, LockNotAvailable
from django_scaledb.partitions.catalog import pinned
from django_scaledb.partitions.inspection import LOOK_TIMEOUT
from django_scaledb.postgres.executor import sqlstate
from django_scaledb.postgres.identifiers import TableName

_LOCK_NOT_AVAILABLE = "55P03"


@dataclass(frozen=True)
class Found:
    """An index. `part_of` is the partitioned index (its oid) that it is attached to.

    `definition` is what stands behind the table's name in CREATE INDEX; None where nobody needs it.
    """

    name: str
    oid: int
    is_valid: bool
    is_unique: bool
    is_constraint: bool
    part_of: int | None
    definition: str | None
    comment: str | None

    def equals(self, other: Found) -> bool:
        return self.definition == other.definition and self.is_unique == other.is_unique


@dataclass(frozen=True)
class Node:
    """A table of the tree; `parent` is the oid of the table whose partition it is."""

    table: TableName
    oid: int
    kind: str
    parent: int | None
    is_pending: bool
    indexes: tuple[Found, ...]

    @property
    def has_partitions(self) -> bool:
        return self.kind == "p"

    @property
    def is_foreign(self) -> bool:
        return self.kind == "f"

    def index(self, name: str) -> Found | None:
        return next((index for index in self.indexes if index.name == name), None)


# The definition of an index is read where it may be one of ours that is not attached yet: reading it
# opens the table, and there may be thousands of others. Who asks for the root's needs them all.
_TREE = """
WITH RECURSIVE tree AS (
    SELECT to_regclass(%s)::oid AS oid, NULL::oid AS parent, false AS pending, 0 AS depth
    UNION ALL
    SELECT h.inhrelid, h.inhparent, h.inhdetachpending, t.depth + 1
    FROM tree t JOIN pg_inherits h ON h.inhparent = t.oid
)
SELECT n.nspname, c.relname, c.oid::int8, c.relkind::text, t.parent::int8, t.pending,
    coalesce((
        SELECT json_agg(json_build_array(
            i.relname, i.oid::int8, x.indisvalid, x.indisunique, k.oid IS NOT NULL, h.inhparent::int8,
            CASE WHEN h.inhparent IS NULL THEN substr(pg_get_indexdef(i.oid), 1 + length(format(
                'CREATE %%sINDEX %%I ON %%s%%I.%%I ', CASE WHEN x.indisunique THEN 'UNIQUE ' END, i.relname,
                CASE WHEN i.relkind = 'I' THEN 'ONLY ' END, n.nspname, c.relname
            ))) END,
            obj_description(i.oid, 'pg_class')
        ) ORDER BY i.oid)
        FROM pg_index x
        JOIN pg_class i ON i.oid = x.indexrelid
        LEFT JOIN pg_inherits h ON h.inhrelid = i.oid
        LEFT JOIN pg_constraint k
            ON k.conindid = i.oid AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x')
        WHERE x.indrelid = c.oid
    ), '[]')
FROM tree t
JOIN pg_class c ON c.oid = t.oid
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY t.depth, c.oid
"""


def read(connection: BaseDatabaseWrapper, db_table: str) -> list[Node]:
    """The table (first) and all below it, from the top down; empty where there is none.

    Raises `LockNotAvailable` when somebody has one of them for himself.
    """
    try:
        with pinned(connection) as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{LOOK_TIMEOUT}ms"])
            cursor.execute(_TREE, [connection.ops.quote_name(db_table)])
            rows = cursor.fetchall()
    except OperationalError as error:
        if sqlstate(error) != _LOCK_NOT_AVAILABLE:
            raise
        raise LockNotAvailable(f"cannot look at the indexes of {db_table}: {error}. Run again") from error
    return [_node(*row) for row in rows]


def _node(
    schema: str, name: str, oid: int, kind: str, parent: int | None, pending: bool, indexes: Any
) -> Node:
    return Node(
        TableName(schema, name), oid, kind, parent, pending, tuple(Found(*index) for index in indexes)
    )


def refuse_unsuitable(nodes: list[Node], name: str) -> None:
    """Raises `DDLError` where the index could never become valid."""
    foreign = next((node for node in nodes if node.is_foreign), None)
    if foreign is not None:
        raise DDLError(
            f"cannot build {name} on {nodes[0].table} concurrently: its partition {foreign.table} is a "
            "foreign table, which has no indexes; detach it first, or use a plain AddIndex at a quiet time"
        )
