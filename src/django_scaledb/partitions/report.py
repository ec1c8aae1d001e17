"""What a maintenance run did, or would do: for people and, in a stable form, for machines.

The JSON that ``--format json`` prints (version 1; keys may be added, none is taken away)::

    {
      "version": 1,
      "command": "rotate_partitions",
      "database": "default",
      "now": "2027-01-01T03:00:00+00:00",
      "dry_run": false,
      "ok": true,                       // false exactly when the exit code is 1
      "error": null,                    // what stopped the whole run: {"type": .., "message": ..}
      "models": [
        {
          "model": "pypi.Upload",
          "table": "public.pypi_upload",    // null when there is no such table
          "error": null,                    // what stopped this model: {"type": .., "message": ..}
          "actions": [
            {
              "action": "create",       // create, create default, finalize, detach, settle,
                                        // archive, drop, restore, release
              "partition": "public.pypi_upload_y2028",
              "from": "2028-01-01T00:00:00+00:00",  // or "MINVALUE"; null for a default partition
              "to": "2029-01-01T00:00:00+00:00",    // or "MAXVALUE"; null for a default partition
              "status": "done",         // planned (dry run), done, failed, skipped
              "reason": null,           // of a failure: {"type": .., "message": ..}
              "sql": [                  // all that was sent, or would be
                {
                  "sql": "ALTER TABLE ..",
                  "locks": [{"table": "public.pypi_upload", "mode": "SHARE UPDATE EXCLUSIVE"}]
                }
              ]
            }
          ]
        }
      ]
    }
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.marker import iso
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock

VERSION = 1
REASONS_SHOWN = 5


class Status(Enum):
    PLANNED = "planned"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not tried, because something that it needs has failed."""


@dataclass(frozen=True)
class Sent:
    """A statement's text and the strongest lock that it takes on each table."""

    sql: str
    locks: tuple[Lock, ...]

    def as_json(self) -> dict[str, Any]:
        locks = [{"table": str(lock.table), "mode": lock.mode.sql} for lock in self.locks]
        return {"sql": self.sql, "locks": locks}


@dataclass
class Result:
    """One action and what became of it."""

    action: str
    partition: TableName | None = None
    range: Range | None = None
    status: Status = Status.PLANNED
    reason: Exception | None = None
    sent: list[Sent] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "partition": str(self.partition) if self.partition else None,
            "from": iso(self.range.lower) if self.range else None,
            "to": iso(self.range.upper) if self.range else None,
            "status": self.status.value,
            "reason": error_as_json(self.reason),
            "sql": [sent.as_json() for sent in self.sent],
        }


@dataclass
class ModelReport:
    """One model: what was done, or why nothing could be."""

    label: str
    table: TableName | None = None
    error: Exception | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.error is None and all(
            result.status in (Status.PLANNED, Status.DONE) for result in self.results
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.label,
            "table": str(self.table) if self.table else None,
            "error": error_as_json(self.error),
            "actions": [result.as_json() for result in self.results],
        }


@dataclass
class Report:
    """A whole run. `error` is what stopped all of it: another run, no connection."""

    command: str
    database: str
    now: datetime
    dry_run: bool
    models: list[ModelReport] = field(default_factory=list)
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(model.ok for model in self.models)

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do, and nothing in the way of finding that out."""
        return self.ok and not any(model.results for model in self.models)

    def failures(self) -> Iterator[tuple[str, str]]:
        """Model and reason of what could not be done, a few for each model; each reason comes once."""
        for model in self.models:
            if model.error is not None:
                yield model.label, str(model.error)
            reasons = list(dict.fromkeys(str(result.reason) for result in model.results if result.reason))
            yield from ((model.label, reason) for reason in reasons[:REASONS_SHOWN])
            if len(reasons) > REASONS_SHOWN:
                yield model.label, f"and {len(reasons) - REASONS_SHOWN} more; --format json shows all"

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "command": self.command,
            "database": self.database,
            "now": iso(self.now),
            "dry_run": self.dry_run,
            "ok": self.ok,
            "error": error_as_json(self.error),
            "models": [model.as_json() for model in self.models],
        }


def error_as_json(error: Exception | None) -> dict[str, str] | None:
    """Type and sentence of an error."""
    return None if error is None else {"type": type(error).__name__, "message": str(error)}
