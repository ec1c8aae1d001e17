"""The mark on the tables we made, kept as the table's COMMENT (pure).

A comment survives a dump and a rename, every role may read it, and ``\\d+`` in psql shows it::

    django_scaledb:{"v":1,"state":"detached","parent":["public","upload"],
                    "from":"2019-01-01T00:00:00+00:00","to":"2020-01-01T00:00:00+00:00",
                    "detached_at":"2027-01-05T03:00:00+00:00"}

Only a table with a mark is ever taken off a set or dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from psycopg import sql

from django_scaledb.partitions.bounds import Bound, Range, Unbounded
from django_scaledb.postgres.identifiers import TableName

PREFIX = "django_scaledb:"
PSQLEXTRA_COMMENT = "psqlextra_auto_partitioned"
"""django-postgres-extra's mark on the partitions it made; they count as ours."""

_VERSION = 1


class MarkState(Enum):
    ATTACHED = "attached"
    RETIRING = "retiring"
    """A rotation has begun to take it off the set."""
    DETACHED = "detached"
    """It is off the set, and its grace period runs."""
    LOADING = "loading"
    """It is being filled from an archive: worth nothing until it is verified."""
    RESTORING = "restoring"
    """It is complete, and on its way back onto the set."""


@dataclass(frozen=True)
class Marker:
    """What the mark says. Partitions that `migrate` made have neither parent nor range in theirs.

    `archived_at` is set once a verified copy lies in the archive, whose row of
    `partitions.archive.state` is `archive`; `held_since` once a restore has put the table back,
    which retention then leaves alone.
    """

    state: MarkState
    parent: TableName | None = None
    range: Range | None = None
    detached_at: datetime | None = None
    archive: int | None = None
    archived_at: datetime | None = None
    held_since: datetime | None = None

    def __str__(self) -> str:
        """The comment's text."""
        content: dict[str, Any] = {"v": _VERSION, "state": self.state.value}
        if self.parent is not None:
            content["parent"] = [self.parent.schema, self.parent.name]
        if self.range is not None:
            content["from"] = iso(self.range.lower)
            content["to"] = iso(self.range.upper)
        if self.detached_at is not None:
            content["detached_at"] = iso(self.detached_at)
        if self.archive is not None and self.archived_at is not None:
            content["archive"] = self.archive
            content["archived_at"] = iso(self.archived_at)
        if self.held_since is not None:
            content["held_since"] = iso(self.held_since)
        return PREFIX + json.dumps(content, separators=(",", ":"), ensure_ascii=False)

    def comment_on(self, table: sql.Identifier) -> sql.Composed:
        return sql.SQL("COMMENT ON TABLE {} IS {}").format(table, sql.Literal(str(self)))

    @classmethod
    def parse(cls, comment: str | None) -> Marker | None:
        """The mark in a table's comment; None when there is none, or none that we understand.

        What somebody wrote behind it is passed over.
        """
        if comment == PSQLEXTRA_COMMENT:
            return cls(MarkState.ATTACHED)
        if not comment or not comment.startswith(PREFIX):
            return None
        try:
            content, _ = json.JSONDecoder().raw_decode(comment, len(PREFIX))
            if content.get("v") != _VERSION:
                return None
            parent, lower = content.get("parent"), content.get("from")
            return cls(
                MarkState(content["state"]),
                TableName(*parent) if parent else None,
                Range(read_bound(lower), read_bound(content["to"])) if lower else None,
                _moment(content, "detached_at"),
                content.get("archive"),
                _moment(content, "archived_at"),
                _moment(content, "held_since"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def iso(bound: Bound) -> str:
    """`bound` for machines: ``2024-01-01T00:00:00+00:00``, or ``MINVALUE`` and ``MAXVALUE``."""
    return bound.value if isinstance(bound, Unbounded) else bound.astimezone(UTC).isoformat()


def _moment(content: dict[str, Any], name: str) -> datetime | None:
    text = content.get(name)
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def read_bound(text: str) -> Bound:
    """The opposite of `iso`; raises `ValueError`."""
    try:
        return Unbounded(text)
    except ValueError:
        return datetime.fromisoformat(text)
