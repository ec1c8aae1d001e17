"""Celery: a task never reads older data than whoever sent it; the rotation as a task.

In the module that makes the Celery application, once::

    from django_scaledb.contrib import celery as scaledb_celery

    scaledb_celery.install()

The position travels in the message's header ``scaledb_position``. What a task wrote goes on to the tasks
that it sends; it does not stay with the worker's process. Send tasks from ``transaction.on_commit()``: there
the position is known.

Importing this module registers the task `rotate_partitions` with every Celery application.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

from celery import shared_task
from celery.signals import before_task_publish, task_postrun, task_prerun
from django.core.management import call_command

from django_scaledb.exceptions import ScaleDBError
from django_scaledb.routing.state import Frame, Scope, current, current_token, frame, leave

HEADER = "scaledb_position"
#: Errors that the next try would meet again.
_FINAL = ("ConfigurationError", "PlanError")


class RotationFailed(ScaleDBError):
    """A rotation could not do all that it should; the message names each model with its reason."""


# Done again from the start it does what is left: a worker that is killed may lose nothing but time.
@shared_task(  # type: ignore[untyped-decorator]
    bind=True,
    name="django_scaledb.rotate_partitions",
    acks_late=True,
    reject_on_worker_lost=True,
    max_retries=3,
    default_retry_delay=60,
)
def rotate_partitions(task: Any, *models: str, **options: Any) -> dict[str, Any]:
    """``manage.py rotate_partitions`` as a task; the result is what ``--format json`` prints.

    `models` are ``app_label.ModelName`` or ``app_label`` (none: all partitioned models); `options` are those
    of the command: ``using="direct"``, ``lock_timeout=500``, ``no_retention=True``. Safe to run twice, also
    at once.

    Raises `RotationFailed` when a model's work is not done, after all models had their turn. What may pass
    (somebody held a lock, the database was away) is tried again three times, a minute apart; what will not
    (a model that is misdeclared) fails at once, and so does misuse, with `CommandError`.
    """
    out = StringIO()
    try:
        call_command("rotate_partitions", *models, format="json", verbosity=0, stdout=out, **options)
    except SystemExit as end:
        if end.code != 1:  # 1: the report says why
            raise
    report: dict[str, Any] = json.loads(out.getvalue())
    if report["ok"]:
        return report
    reasons = list(_reasons(report))
    error = RotationFailed("; ".join(dict.fromkeys(text for text, _ in reasons)))
    if any(kind not in _FINAL for _, kind in reasons):
        raise task.retry(exc=error)
    raise error


def _reasons(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was not done and why, and the type of each error."""
    if report["error"]:
        yield report["error"]["message"], report["error"]["type"]
    for model in report["models"]:
        for error in (model["error"], *(action["reason"] for action in model["actions"])):
            if error:
                yield f"{model['model']}: {error['message']}", error["type"]


def install() -> None:
    """Connect to Celery's signals; calling it again changes nothing."""
    before_task_publish.connect(attach, dispatch_uid="django_scaledb.attach")
    task_prerun.connect(begin, dispatch_uid="django_scaledb.begin")
    task_postrun.connect(end, dispatch_uid="django_scaledb.end")


def attach(headers: dict[str, Any] | None = None, **_: Any) -> None:
    """Give a message that is about to be sent the sender's position."""
    token = current_token()
    if token and headers is not None:
        headers.setdefault(HEADER, token)


def begin(task_id: str | None = None, task: Any = None, **_: Any) -> None:
    """Begin a task in a scope of its own, at its sender's position."""
    request = getattr(task, "request", None)
    token = getattr(request, HEADER, None)
    if token is None and request is not None:
        token = (getattr(request, "headers", None) or {}).get(HEADER)
    scope = Scope()
    scope.accept(token)
    current.set(Frame(scope, None, frame(), owner=_owner(task_id)))


def end(task_id: str | None = None, **_: Any) -> None:
    leave(_owner(task_id))


def _owner(task_id: str | None) -> object:
    """One object per running task, because frames are found by identity."""
    owner = current.get()
    while owner is not None:
        if isinstance(owner.owner, _Task) and owner.owner.id == task_id:
            return owner.owner
        owner = owner.parent
    return _Task(task_id)


class _Task:
    def __init__(self, task_id: str | None) -> None:
        self.id = task_id
