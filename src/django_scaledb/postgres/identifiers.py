"""Names of tables and constraints, always with their schema, never longer than PostgreSQL keeps them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from psycopg import sql

MAX_BYTES = 62
"""PostgreSQL cuts names behind 63 bytes silently, so we never hand it a longer one.

One byte less, because each table has an array type of its name behind an underscore, cut in the same
way: dozens of names that differ in their last byte alone find no place there (an error on PostgreSQL 15).
"""


@dataclass(frozen=True, order=True)
class TableName:
    """A table's schema and name, as the catalog has them (no quoting, case kept)."""

    schema: str
    name: str

    @property
    def sql(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    def sibling(self, name: str) -> TableName:
        """Another table of the same schema."""
        return TableName(self.schema, name)


def fit(stem: str, suffix: str) -> str:
    """`stem` + `suffix` in at most `MAX_BYTES`.

    The suffix is kept whole; a stem that must be cut keeps a digest of itself, so that two long
    stems with the same beginning stay apart. Cuts never split a UTF-8 character.
    """
    whole = stem + suffix
    if len(whole.encode()) <= MAX_BYTES:
        return whole
    digest = "_" + hashlib.sha256(stem.encode()).hexdigest()[:8]
    room = MAX_BYTES - len((digest + suffix).encode())
    if room < 1:
        raise ValueError(f"the suffix {suffix!r} leaves no room for a name")
    return stem.encode()[:room].decode(errors="ignore") + digest + suffix
