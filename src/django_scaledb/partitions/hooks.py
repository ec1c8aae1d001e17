"""Where other features take part when a partition comes or goes, in the very transaction that does it.

ATTACH and DETACH fire no trigger and send no signal; who keeps something beside the table (a total, a
trigger on every partition) says here what is to be run as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement

Builder = Callable[[BaseDatabaseWrapper, type[models.Model], TableName], Iterable[Statement]]


def _nothing(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterable[Statement]:
    return ()


@dataclass(frozen=True)
class Hook:
    """Statements for a partition of `model`, by what happens to it.

    `on_create`: on the new table, before it is attached. `on_settle`: on the table that has left
    the set, in the transaction that marks it as detached, so exactly once however often a run is
    killed. `on_restore` and `on_restored`: on a settled table that comes back, in the transaction
    that attaches it and marks it as attached, so exactly once again. The former stand before the
    ATTACH and may take long; the latter behind it, because what they lock besides comes last. They
    stand in for `on_create`: a table that is made and filled anew from an archive is filled first, and
    nothing of this feature's is on it meanwhile.

    They must not need a lock that stops others, save on that table.
    """

    on_create: Builder = _nothing
    on_settle: Builder = _nothing
    on_restore: Builder = _nothing
    on_restored: Builder = _nothing


_hooks: list[Hook] = []


def register(hook: Hook) -> None:
    """Have `hook` asked from now on; features do so when their application is ready."""
    if hook not in _hooks:
        _hooks.append(hook)


def unregister(hook: Hook) -> None:
    _hooks.remove(hook)


def on_create(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> tuple[Statement, ...]:
    return tuple(statement for hook in _hooks for statement in hook.on_create(connection, model, table))


def on_settle(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> tuple[Statement, ...]:
    return tuple(statement for hook in _hooks for statement in hook.on_settle(connection, model, table))


def on_restore(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> tuple[Statement, ...]:
    return tuple(statement for hook in _hooks for statement in hook.on_restore(connection, model, table))


def on_restored(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> tuple[Statement, ...]:
    return tuple(statement for hook in _hooks for statement in hook.on_restored(connection, model, table))
