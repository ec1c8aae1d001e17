"""Table-level lock modes and which of them conflict (PostgreSQL 14-18, "Explicit Locking")."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import total_ordering

from django_scaledb.postgres.identifiers import TableName


@total_ordering
class LockMode(Enum):
    """A table-level lock mode, in rising strength; the value is pg_locks.mode."""

    ACCESS_SHARE = "AccessShareLock"
    ROW_SHARE = "RowShareLock"
    ROW_EXCLUSIVE = "RowExclusiveLock"
    SHARE_UPDATE_EXCLUSIVE = "ShareUpdateExclusiveLock"
    SHARE = "ShareLock"
    SHARE_ROW_EXCLUSIVE = "ShareRowExclusiveLock"
    EXCLUSIVE = "ExclusiveLock"
    ACCESS_EXCLUSIVE = "AccessExclusiveLock"

    @property
    def sql(self) -> str:
        """The mode as LOCK TABLE writes it: ``SHARE UPDATE EXCLUSIVE``."""
        return self.name.replace("_", " ")

    @property
    def strength(self) -> int:
        return list(LockMode).index(self)

    def __lt__(self, other: LockMode) -> bool:
        return self.strength < other.strength

    def conflicts_with(self, other: LockMode) -> bool:
        return other in _CONFLICTS[self]


def _conflicts() -> dict[LockMode, frozenset[LockMode]]:
    m = LockMode
    upper = {
        m.ACCESS_SHARE: {m.ACCESS_EXCLUSIVE},
        m.ROW_SHARE: {m.EXCLUSIVE},
        m.ROW_EXCLUSIVE: {m.SHARE, m.SHARE_ROW_EXCLUSIVE, m.EXCLUSIVE},
        m.SHARE_UPDATE_EXCLUSIVE: {m.SHARE_UPDATE_EXCLUSIVE, m.SHARE, m.SHARE_ROW_EXCLUSIVE, m.EXCLUSIVE},
        m.SHARE: {m.SHARE_ROW_EXCLUSIVE, m.EXCLUSIVE},
        m.SHARE_ROW_EXCLUSIVE: {m.SHARE_ROW_EXCLUSIVE, m.EXCLUSIVE},
        m.EXCLUSIVE: {m.EXCLUSIVE},
        m.ACCESS_EXCLUSIVE: set(m),
    }
    # The relation is symmetric: writing each pair once keeps the table checkable.
    return {a: frozenset(b for b in m if b in upper[a] or a in upper[b]) for a in m}


_CONFLICTS = _conflicts()


@dataclass(frozen=True)
class Lock:
    """The strongest lock that a statement takes on one table.

    `in_advance` says whether LOCK TABLE can ask for it before the statement does: not of a sequence
    or an index, and of a view it would go down to all its tables. `only` says that the statement
    leaves the table's partitions alone (``ON ONLY``).
    """

    table: TableName
    mode: LockMode
    in_advance: bool = True
    only: bool = False

    def __str__(self) -> str:
        return f"{self.mode.sql} on {self.table}"
