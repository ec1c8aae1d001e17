"""Celery: a task never reads older data than whoever sent it.

In the module that makes the Celery application, once::

    from django_scaledb.contrib import celery as scaledb_celery

    scaledb_celery.install()

The position travels in the message's header ``scaledb_position``. What a task wrote goes on to the tasks
that it sends; it does not stay with the worker's process. Send tasks from ``transaction.on_commit()``: there
the position is known.
"""

from __future__ import annotations

from typing import Any

from celery.signals import before_task_publish, task_postrun, task_prerun

from django_scaledb.routing.state import Frame, Scope, current, current_token, frame, leave

HEADER = "scaledb_position"


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
