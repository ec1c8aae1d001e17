"""An index, or a unique constraint, written for the table and for each of its partitions.

The text is Django's own, taken from the index; only the names, ONLY and CONCURRENTLY are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.backends.ddl_references import Statement as DjangoStatement
from django.db.models import Index, Model, UniqueConstraint
from psycopg import sql

from django_scaledb.exceptions import DDLError
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

_NAMED = "INDEX %(name)s ON %(table)s"
_CONSTRAINED = "ALTER TABLE %(table)s ADD CONSTRAINT"

_MARK = "django_scaledb: built concurrently, "
"""Begins the comment on an index of ours; behind it stands a digest of what Django would have run."""


@dataclass(frozen=True)
class Definition:
    """What is called `name` on the table itself.

    `index` is the template of its CREATE INDEX; `constraint` that of ALTER TABLE .. ADD CONSTRAINT,
    where it is a constraint and not only an index. `parts` fill both.
    """

    name: str
    index: str
    constraint: str | None
    parts: Mapping[str, Any]
    mark: str

    @classmethod
    def of(
        cls, wanted: Index | UniqueConstraint, model: type[Model], editor: BaseDatabaseSchemaEditor
    ) -> Self | None:
        """None where Django has no SQL for it (``nulls_distinct`` on PostgreSQL 14).

        Raises `DDLError` for a kind of index whose SQL is not the usual.
        """
        statement: Any = wanted.create_sql(model, editor)
        if statement is None:
            return None
        template, constraint = (statement.template if isinstance(statement, DjangoStatement) else ""), None
        parts = dict(statement.parts) if template else {}
        if template.startswith(_CONSTRAINED):
            constraint = template
            template = editor.sql_create_unique_index
            parts |= {"condition": "", "include": ""}
        if _NAMED not in template:
            raise DDLError(
                f"cannot build {wanted.name} concurrently on a partitioned table: the SQL of "
                f"{type(wanted).__name__} is not known to be a CREATE INDEX ({statement})"
            )
        digest = hashlib.sha256(str(statement).encode()).hexdigest()[:16]
        return cls(wanted.name, template, constraint, parts, _MARK + digest)

    # -- steps (pure)

    def on_parent(self, table: TableName, name: str) -> Step:
        """Make it on the partitioned `table` alone: invalid until all partitions have theirs.

        From then on PostgreSQL gives it to every partition that is attached.
        """
        if self.constraint is None:
            lock = Lock(table, LockMode.SHARE, only=True)
            template = self.index.replace(" ON %(table)s", " ON ONLY %(table)s", 1)
        else:
            lock = Lock(table, LockMode.ACCESS_EXCLUSIVE, only=True)
            template = self.constraint.replace("TABLE %(table)s", "TABLE ONLY %(table)s", 1)
        comment = sql.SQL("COMMENT ON INDEX {} IS {}").format(table.sibling(name).sql, sql.Literal(self.mark))
        return Step(
            f"make {name} on {table} alone",
            (Statement(self._text(template, table, name), (lock,)), Statement(comment)),
            nowait=(lock,),
        )

    def build(self, table: TableName, name: str) -> Step:
        """Build it on a table with rows, while these are read and written."""
        template = self.index.replace("INDEX %(name)s", "INDEX CONCURRENTLY %(name)s", 1)
        lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
        return Step(
            f"build {name} on {table}",
            (Statement(self._text(template, table, name), (lock,)),),
            transactional=False,
        )

    def constrain(self, table: TableName, name: str) -> Statement:
        """Turn the index `name` of `table` into the constraint's."""
        assert self.constraint is not None
        deferrable = str(self.parts.get("deferrable", ""))
        query = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} UNIQUE USING INDEX {}{}").format(
            table.sql, sql.Identifier(name), sql.Identifier(name), _raw(deferrable)
        )
        return Statement(query, (Lock(table, LockMode.ACCESS_EXCLUSIVE),))

    def attach(self, parent: TableName, table: TableName, name: str, *, constrained: bool) -> Step:
        """Make the index `name` of the partition `table` a part of the index `parent`.

        It is ACCESS EXCLUSIVE on the partition's index, which everybody who uses the partition has
        locked; no LOCK statement can ask for that, so the executor looks before it tries.
        """
        index = table.sibling(name)
        query = sql.SQL("ALTER INDEX {} ATTACH PARTITION {}").format(parent.sql, index.sql)
        lock = Lock(index, LockMode.ACCESS_EXCLUSIVE, in_advance=False)
        attach = Statement(query, (Lock(parent, LockMode.SHARE_UPDATE_EXCLUSIVE, in_advance=False), lock))
        if self.constraint is None or constrained:
            return Step(f"attach {name} to {parent}", (attach,), nowait=(lock,))
        whole = Lock(table, LockMode.ACCESS_EXCLUSIVE)
        return Step(f"attach {name} to {parent}", (self.constrain(table, name), attach), nowait=(whole,))

    def _text(self, template: str, table: TableName, name: str) -> sql.Composed:
        names = {"table": table.sql.as_string(None), "name": sql.Identifier(name).as_string(None)}
        return sql.Composed([_raw(template % {**self.parts, **names})])


def drop_leftover(table: TableName, name: str) -> Step:
    """Drop an index of a table that is not part of a partitioned index, in nobody's way."""
    query = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(table.sibling(name).sql)
    lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    return Step(f"drop {name} of {table}", (Statement(query, (lock,)),), transactional=False)


def drop_whole(table: TableName, name: str, *, is_constraint: bool) -> Step:
    """Drop a partitioned index with all its parts.

    PostgreSQL has no CONCURRENTLY for that: it is ACCESS EXCLUSIVE on the table and every partition,
    for the milliseconds that it takes to forget them.
    """
    lock = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    query = sql.SQL("DROP INDEX {}").format(table.sibling(name).sql)
    if is_constraint:
        query = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(table.sql, sql.Identifier(name))
    return Step(f"drop {name} of {table}", (Statement(query, (lock,)),), nowait=(lock,))


def _raw(text: str) -> sql.SQL:
    """Django's text, names quoted; it is never formatted, so that braces in it are no placeholders."""
    return sql.SQL(text)
