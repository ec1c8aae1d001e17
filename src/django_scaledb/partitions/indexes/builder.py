"""Builds an index on a table in use and removes it again, from wherever an earlier run left off.

All that is to be known stands in the catalog, and is read again before each step. So a run that was
killed is repeated, partitions that came meanwhile are seen, and those that went are not missed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.conf import settings
from django_scaledb.exceptions import AnotherRunInProgress, DDLError, LockNotAvailable
from django_scaledb.partitions import inspection
from django_scaledb.partitions.indexes import tree
from django_scaledb.partitions.indexes.definition import Definition, drop_leftover, drop_whole
from django_scaledb.partitions.indexes.tree import Found, Node
from django_scaledb.postgres.blockers import describe
from django_scaledb.postgres.executor import Executor, Waiting, script
from django_scaledb.postgres.identifiers import TableName, fit
from django_scaledb.postgres.session import only_one
from django_scaledb.postgres.statements import Step
from django_scaledb.progress import Progress

COMMAND = "migrate"

BUILDING_LOCK = 0x5CA1EDC
"""The advisory lock of a table whose indexes are being built: this, and the table's oid."""

_BUILD_SECONDS = 7 * 86400.0
_WAITING_LINE_SECONDS = 5.0
_TURN_SECONDS = 1.0
_NAMES_TRIED = 20
_TRIES = 3


class Builder:
    """One index, or unique constraint, of one table, partitioned or plain.

    Its methods raise `DDLError` with the reason where they cannot go on; what was done is kept, and
    calling them again goes on from there. None may be called inside a transaction.
    """

    def __init__(self, connection: BaseDatabaseWrapper, db_table: str, definition: Definition) -> None:
        self.connection = connection
        self.db_table = db_table
        self.definition = definition

    # -- what can be asked for

    def add(self) -> None:
        """Build it on each partition, then make these one index of the table."""
        with self._alone():
            self._refuse_strange(nodes := self._read())
            for _ in range(_TRIES):
                if self._is_done(nodes):
                    return
                self._build()
                self._attach()
                nodes = self._read()
                left = (*without_index(nodes, self.definition), *to_attach(nodes, self.definition))
                if not self._is_done(nodes) and not left:
                    # The partition that was to be attached last has left the set: nothing else makes
                    # PostgreSQL count again.
                    self._run(self._drop(nodes[0]))
        raise DDLError(
            f"{self.definition.name} on {nodes[0].table} is not valid yet, because its partitions "
            "change meanwhile; run again"
        )

    def remove(self) -> None:
        """Take it off the table and all partitions, whether it was finished or not."""
        with self._alone():
            nodes = self._read()
            for node, index in leftovers(nodes, self.definition):
                if node.has_partitions:
                    self._run(drop_whole(node.table, index.name, is_constraint=index.is_constraint))
                else:
                    self._run(drop_leftover(node.table, index.name), alone=False)
            if nodes[0].index(self.definition.name) is not None:
                self._run(self._drop(nodes[0]))

    def steps_to_add(self) -> Iterator[Step]:
        """All steps on the set as it is now; for ``sqlmigrate``."""
        nodes, definition = self._read(), self.definition
        names = {nodes[0].oid: definition.name}
        for node in nodes:
            names.setdefault(node.oid, self._free_name(node))
            if node.has_partitions:
                yield definition.on_parent(node.table, names[node.oid])
        for node in nodes:
            if not node.has_partitions:
                yield definition.build(node.table, names[node.oid])
        for node in reversed(nodes[1:]):
            assert node.parent is not None
            parent = node.table.sibling(names[node.parent])
            yield definition.attach(parent, node.table, names[node.oid], constrained=node.has_partitions)

    def steps_to_remove(self) -> Iterator[Step]:
        yield self._drop(self._read()[0])

    # -- building

    @property
    def _constrains(self) -> bool:
        return self.definition.constraint is not None

    def _drop(self, root: Node) -> Step:
        return drop_whole(root.table, self.definition.name, is_constraint=self._constrains)

    def _build(self) -> None:
        tries: Counter[int] = Counter()
        nodes = self._read()
        with Progress(len(nodes) - 1, f"partitions with {self.definition.name}") as progress:
            while True:
                nodes = self._read()
                tree.refuse_unsuitable(nodes, self.definition.name)
                lacking = list(without_index(nodes, self.definition))
                progress.total = len(nodes) - 1
                progress.advance(progress.total - len(lacking) - progress.done)
                if not lacking:
                    return
                node = lacking[0]
                tries[node.oid] += 1
                if tries[node.oid] > _TRIES:
                    raise DDLError(
                        f"{node.table} has an invalid index as its part of {self.definition.name}; mend it, "
                        "and run again: REINDEX INDEX CONCURRENTLY, or REINDEX TABLE CONCURRENTLY"
                    )
                try:
                    self._build_on(node, is_root=node is nodes[0])
                except DDLError:
                    # A partition that was dropped meanwhile is no failure.
                    if self._is_there(node):
                        raise

    def _build_on(self, node: Node, *, is_root: bool) -> None:
        definition = self.definition
        for index in unfinished(node, definition):
            self._run(drop_leftover(node.table, index.name), alone=False)
        name = definition.name if is_root else self._free_name(node)
        if node.has_partitions:
            self._run(definition.on_parent(node.table, name))
            return
        step = definition.build(node.table, name)
        try:
            self._run(step, alone=False, resume=lambda: self._rest(step, node.table, name))
        except DDLError:
            # What is left of a unique index refuses rows as if it were whole.
            if self._state(node.table, name) is False:
                self._run(drop_leftover(node.table, name), alone=False)
            raise

    def _rest(self, step: Step, table: TableName, name: str) -> Step | None:
        state = self._state(table, name)
        if state is None:
            return step
        return None if state else drop_leftover(table, name)

    def _free_name(self, node: Node) -> str:
        candidates = names_for(node.table, self.definition)
        taken = inspection.taken_names(self.connection, node.table.schema, candidates)
        free = next((name for name in candidates if name not in taken), None)
        if free is None:
            raise DDLError(
                f"cannot name an index of {node.table}: {candidates[0]} to {candidates[-1]} are taken"
            )
        return free

    # -- attaching

    def _attach(self) -> None:
        """One by one; those that are blocked are put off, until nothing has gone on for a while."""
        if not self._read()[0].has_partitions:
            self._constrain()
            return
        until = time.monotonic() + settings.DDL_DEADLINE
        while True:
            nodes = self._read()
            pending = next((node for node in nodes if node.is_pending), None)
            if pending is not None:
                raise DDLError(
                    f"{self.definition.name} is built and not attached yet, because the detaching of "
                    f"{pending.table} was interrupted; finish that and run again: manage.py rotate_partitions"
                )
            todo = list(to_attach(nodes, self.definition))
            if not todo:
                return
            done, blocked = self._attach_in_turns(todo)
            if done:
                until = time.monotonic() + settings.DDL_DEADLINE
            elif blocked is not None and time.monotonic() >= until:
                raise blocked

    def _attach_in_turns(self, steps: Sequence[Step]) -> tuple[int, DDLError | None]:
        """How many went well, and what is in the way of the others."""
        done, blocked = 0, None
        try:
            with self._executor() as executor:
                for step in steps:
                    try:
                        executor.run(step, patience=_TURN_SECONDS)
                        done += 1
                    except LockNotAvailable as error:
                        blocked = error
        except AnotherRunInProgress as error:
            return done, error
        return done, blocked

    def _constrain(self) -> None:
        """Make the index of a plain table its constraint."""
        [root] = self._read()
        index = root.index(self.definition.name)
        if index is not None and self._constrains and not index.is_constraint:
            statement = self.definition.constrain(root.table, index.name)
            summary = f"make {index.name} a constraint of {root.table}"
            self._run(Step(summary, (statement,), nowait=statement.locks))

    # -- looking

    def _read(self) -> list[Node]:
        nodes = tree.read(self.connection, self.db_table)
        if not nodes:
            raise DDLError(f"there is no table {self.db_table!r} in the database {self.connection.alias!r}")
        return nodes

    def _refuse_strange(self, nodes: Sequence[Node]) -> None:
        found = nodes[0].index(self.definition.name)
        if found is not None and nodes[0].has_partitions and found.comment != self.definition.mark:
            raise DDLError(
                f"{nodes[0].table} has an index {found.name} already, which this migration has not made "
                f"({found.definition}); rename or drop it, or record the migration with migrate --fake"
            )

    def _is_done(self, nodes: Sequence[Node]) -> bool:
        found = nodes[0].index(self.definition.name)
        return found is not None and found.is_valid and found.is_constraint is self._constrains

    def _is_there(self, node: Node) -> bool:
        return any(other.oid == node.oid for other in self._read())

    def _state(self, table: TableName, name: str) -> bool | None:
        """Whether the index is valid; None when there is none of that name."""
        with self.connection.cursor() as cursor:
            cursor.execute(
                "SELECT x.indisvalid FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
                "JOIN pg_namespace n ON n.oid = i.relnamespace WHERE n.nspname = %s AND i.relname = %s",
                [table.schema, name],
            )
            row = cursor.fetchone()
        return None if row is None else bool(row[0])

    # -- running

    def _alone(self) -> AbstractContextManager[None]:
        root = self._read()[0]
        key = (BUILDING_LOCK, root.oid if root.oid < 2**31 else root.oid - 2**32)
        return only_one(self.connection, key, f"building or removing an index of {root.table}")

    def _run(
        self, step: Step, *, alone: bool = True, resume: Callable[[], Step | None] | None = None
    ) -> None:
        """Do a short step with the patience of the settings, a long one however long it takes."""
        patience = settings.DDL_DEADLINE if alone else _BUILD_SECONDS
        until = time.monotonic() + patience
        while True:
            try:
                with self._executor(alone=alone) as executor:
                    executor.run(step, patience=patience, resume=resume)
            except AnotherRunInProgress:
                # Somebody rotates; that is over soon.
                if time.monotonic() >= until:
                    raise
            else:
                return

    def _executor(self, *, alone: bool = True) -> Executor:
        return Executor(
            self.connection,
            command=COMMAND,
            lock_timeout=settings.LOCK_TIMEOUT,
            deadline=_BUILD_SECONDS,
            on_wait=_Talk(),
            alone=alone,
        )


# -- what is left to do (pure)


def names_for(table: TableName, definition: Definition) -> list[str]:
    """What the index of a partition may be called, best first."""
    numbers = ("", *(str(number) for number in range(2, _NAMES_TRIED)))
    return [fit(f"{table.name}_{definition.name}", f"_idx{number}") for number in numbers]


def indexes_of_tree(nodes: Sequence[Node], definition: Definition) -> dict[int, Found | None]:
    """By table (oid): the index that is attached to ours, or is to be; for the root ours itself."""
    root = nodes[0].index(definition.name)
    found: dict[int, Found | None] = {nodes[0].oid: root}
    for node in nodes[1:]:
        assert node.parent is not None
        above = found.get(node.parent)
        attached = next((i for i in node.indexes if above is not None and i.part_of == above.oid), None)
        found[node.oid] = attached or next(
            (
                index
                for index in node.indexes
                if root is not None
                and index.part_of is None
                and (index.is_valid or node.has_partitions)
                and index.equals(root)
            ),
            None,
        )
    return found


def without_index(nodes: Sequence[Node], definition: Definition) -> Iterator[Node]:
    """Tables that lack it, from the top down; those that are about to leave the set are left alone."""
    found = indexes_of_tree(nodes, definition)
    for node in nodes:
        index = found[node.oid]
        if not node.is_pending and (index is None or not (index.is_valid or node.has_partitions)):
            yield node


def unfinished(node: Node, definition: Definition) -> Iterator[Found]:
    """What a build that was cut short has left on the table."""
    names = {definition.name, *names_for(node.table, definition)}
    return (
        index
        for index in node.indexes
        if not node.has_partitions and not index.is_valid and index.part_of is None and index.name in names
    )


def to_attach(nodes: Sequence[Node], definition: Definition) -> Iterator[Step]:
    """The steps that make the indexes of the partitions one, from the bottom up."""
    found = indexes_of_tree(nodes, definition)
    for node in reversed(nodes[1:]):
        assert node.parent is not None
        index, above = found[node.oid], found[node.parent]
        if index is not None and above is not None and index.part_of is None:
            yield definition.attach(
                node.table.sibling(above.name), node.table, index.name, constrained=index.is_constraint
            )


def leftovers(nodes: Sequence[Node], definition: Definition) -> Iterator[tuple[Node, Found]]:
    """Indexes that were built for ours and never attached."""
    root = nodes[0].index(definition.name)
    for node in nodes[1:]:
        names = set(names_for(node.table, definition))
        for index in node.indexes:
            mine = index.part_of is None and index.name in names
            if mine and root is not None and index.equals(root):
                yield node, index


class _Talk:
    """Says on standard error who is in the way, when that takes long."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, waiting: Waiting) -> None:
        if waiting.seconds - self._said >= _WAITING_LINE_SECONDS:
            self._said = waiting.seconds
            sys.stderr.write(
                f"waiting for {waiting.seconds:.0f} s to {waiting.summary}: {describe(waiting.blockers)}\n"
            )


def text_of(steps: Iterable[Step], connection: BaseDatabaseWrapper) -> Iterator[str]:
    """What the executor sends for `steps`, for ``sqlmigrate``."""
    connection.ensure_connection()
    for step in steps:
        for statement in script(step, settings.LOCK_TIMEOUT):
            yield statement.query.as_string(connection.connection)
