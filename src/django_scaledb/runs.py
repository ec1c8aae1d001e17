"""How the last run of each kind ended, in a small table that `migrate` made.

Written by ``rotate_partitions`` and ``check_counters``, read by the admin's overview page and by whoever
watches the project. One row for each kind and subject, so the table does not grow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.db import DatabaseError, InterfaceError, connections, models, transaction
from django.utils import timezone

logger = logging.getLogger("django_scaledb.runs")

ROTATE = "rotate_partitions"
CHECK_COUNTERS = "check_counters"

_LOCK_TIMEOUT = "1000ms"


class LastRun(models.Model):
    """The last run of one kind on one subject.

    `kind` is the command's name, `subject` an ``app_label.ModelName``. `succeeded_at` is when a run last
    ended well, which a later failure leaves as it was. `detail` says more, by kind:

    ``rotate_partitions``
        ``{"done": {"create": 2, "detach": 1}, "reasons": ["why something is not done", ..]}``
    ``check_counters``
        ``{"drifted_keys": 3, "reasons": [..]}``; without ``drifted_keys`` when it could not be counted
    """

    id = models.BigAutoField(primary_key=True)
    kind = models.TextField()
    subject = models.TextField()
    finished_at = models.DateTimeField()
    ok = models.BooleanField()
    succeeded_at = models.DateTimeField(null=True)
    detail = models.JSONField(default=dict)

    class Meta:
        app_label = "django_scaledb"
        db_table = "django_scaledb_last_run"
        default_permissions = ()
        constraints = [
            models.UniqueConstraint(fields=["kind", "subject"], name="django_scaledb_one_last_run")
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {'ok' if self.ok else 'failed'}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended for one subject."""

    subject: str
    ok: bool
    detail: dict[str, Any] = field(default_factory=dict)


def write_down(using: str, kind: str, outcomes: Iterable[Outcome]) -> bool:
    """Keep how a run of `kind` that ends now ended, in the database `using`; whether that worked.

    A run is worth more than the note of it: where the table is missing, the role may not write or a lock is
    in the way for more than a second, the log says so (at level INFO) and nothing is raised.
    """
    now = timezone.now()
    rows = [
        LastRun(
            kind=kind,
            subject=outcome.subject,
            finished_at=now,
            ok=outcome.ok,
            succeeded_at=now if outcome.ok else None,
            detail=outcome.detail,
        )
        # In one order, so that of two runs at once one waits and none is a deadlock's victim.
        for outcome in sorted(outcomes, key=lambda outcome: outcome.subject)
    ]
    connection = connections[using]
    try:
        bounded = not connection.in_atomic_block  # else the limit would stay with the caller's transaction
        with transaction.atomic(using=using):
            if bounded:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
            for ok in (True, False):
                LastRun.objects.using(using).bulk_create(
                    [row for row in rows if row.ok is ok],
                    update_conflicts=True,
                    unique_fields=["kind", "subject"],
                    update_fields=["finished_at", "ok", "detail", *(["succeeded_at"] if ok else [])],
                )
    except (DatabaseError, InterfaceError) as error:
        logger.info("how %s ended was not written down: %s", kind, error)
        return False
    return True


def last_runs(using: str, kind: str) -> dict[str, LastRun]:
    """The last run of `kind` on each subject, as the database `using` has it; one query.

    Raises `ProgrammingError` where ``migrate`` has not made the table, or the role may not read it.
    """
    return {run.subject: run for run in LastRun.objects.using(using).filter(kind=kind)}
