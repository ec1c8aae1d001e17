"""What may read every partition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

is_allowed: ContextVar[bool] = ContextVar("django_scaledb_allow_unpruned", default=False)


@contextmanager
def allow_unpruned() -> Iterator[None]:
    """Neither log nor refuse queries that read every partition: a context manager and a decorator.

    For what has to read everything (a yearly report, a look-up by id alone that is seldom made).
    Holds for this thread or task.
    """
    token = is_allowed.set(True)
    try:
        yield
    finally:
        is_allowed.reset(token)
