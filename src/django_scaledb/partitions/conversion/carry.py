"""Giving a table what another one has: the statements (pure).

All texts from the catalog name the table by the name it had when they were read. They are run
when the new table has that name, so they mean the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from psycopg import sql

from django_scaledb.partitions.conversion.inventory import Column, Constraint, Grant, Index, Inventory
from django_scaledb.partitions.conversion.inventory import Sequence as OwnedSequence
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement

PARTITIONED_ACCESS_METHOD = 170000
"""Since this version a partitioned table can have an access method for its partitions."""

# Not IDENTITY: the sequence moves. Not INDEXES and STATISTICS: they get their own names.
_LIKE = sql.SQL(
    "CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING GENERATED "
    "INCLUDING STORAGE INCLUDING COMPRESSION INCLUDING COMMENTS){}"
)


def create_parent(
    inventory: Inventory, source: TableName, target: TableName, key: str, *, helpers: Iterable[str] = ()
) -> Iterator[Statement]:
    """The partitioned table `target`, empty, with the columns and checks of `source`.

    `helpers` are checks of `source` that the new table must not have.
    """
    where = sql.SQL(" PARTITION BY RANGE ({})").format(sql.Identifier(key))
    if inventory.access_method != "heap" and inventory.version >= PARTITIONED_ACCESS_METHOD:
        where += sql.SQL(" USING {}").format(sql.Identifier(inventory.access_method or "heap"))
    if inventory.tablespace is not None:
        where += sql.SQL(" TABLESPACE {}").format(sql.Identifier(inventory.tablespace))
    yield Statement(_LIKE.format(target.sql, source.sql, where), (Lock(source, LockMode.ACCESS_SHARE),))
    for name in helpers:
        yield Statement(drop_constraint(target, name))
    if inventory.owner != inventory.role:
        yield Statement(
            sql.SQL("ALTER TABLE {} OWNER TO {}").format(target.sql, sql.Identifier(inventory.owner))
        )


def create_indexes(
    inventory: Inventory, target: TableName, key_columns: Sequence[str], names: Mapping[str, str]
) -> Iterator[Statement]:
    """Primary key, unique constraints and indexes, under `names` (those that are missing keep theirs)."""
    for index in inventory.indexes:
        name = names.get(index.name, index.name)
        if index.is_primary:
            columns = sql.SQL(", ").join(map(sql.Identifier, key_columns))
            definition: sql.Composable = sql.SQL("PRIMARY KEY ({})").format(columns)
            yield Statement(_add_constraint(target, name, definition))
        elif index.constraint is not None:
            yield Statement(_add_constraint(target, name, raw(_with_options(index))))
        else:
            yield Statement(create_index(index, target, name))
        if index.tablespace is not None:
            yield Statement(
                sql.SQL("ALTER INDEX {} SET TABLESPACE {}").format(
                    target.sibling(name).sql, sql.Identifier(index.tablespace)
                )
            )
        for position, statistics in index.statistics:
            yield Statement(
                sql.SQL("ALTER INDEX {} ALTER COLUMN {} SET STATISTICS {}").format(
                    target.sibling(name).sql, sql.Literal(position), sql.Literal(statistics)
                )
            )


def create_index(index: Index, target: TableName, name: str) -> sql.Composed:
    unique = sql.SQL("UNIQUE ") if index.is_unique else sql.SQL("")
    return sql.SQL("CREATE {}INDEX {} ON {}{}").format(
        unique, sql.Identifier(name), target.sql, raw(index.definition)
    )


def belongings(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    """Grants, row security, comments, statistics, triggers, replica identity: under their own names."""
    yield from _grants(inventory, target)
    yield from _row_security(inventory, target)
    yield from _comments(inventory, target)
    for column in inventory.columns:
        yield from _column_settings(column, target)
    for statistics in inventory.statistics:
        yield Statement(raw(statistics.definition))
        name = sql.Identifier(statistics.schema, statistics.name)
        if statistics.target is not None:
            query = sql.SQL("ALTER STATISTICS {} SET STATISTICS {}")
            yield Statement(query.format(name, sql.Literal(statistics.target)))
        if statistics.comment is not None:
            yield Statement(
                sql.SQL("COMMENT ON STATISTICS {} IS {}").format(name, sql.Literal(statistics.comment))
            )
    yield from triggers(inventory, target)
    yield from replica_identity(inventory, target, {})


def triggers(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    """The triggers, created anew on the table that has the name now."""
    for trigger in inventory.triggers:
        name = sql.Identifier(trigger.name)
        yield Statement(raw(trigger.definition))
        if trigger.enabled != "O":
            how = {"D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}[trigger.enabled]
            query = sql.SQL("ALTER TABLE {} {} TRIGGER {}")
            yield Statement(query.format(target.sql, sql.SQL(how), name))
        if trigger.comment is not None:
            query = sql.SQL("COMMENT ON TRIGGER {} ON {} IS {}")
            yield Statement(query.format(name, target.sql, sql.Literal(trigger.comment)))


def drop_triggers(inventory: Inventory, table: TableName) -> Iterator[Statement]:
    """Those of them that `table` has: other features may have given a partition some of the same name."""
    for trigger in inventory.triggers:
        yield Statement(
            sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(trigger.name), table.sql),
        )


def replica_identity(inventory: Inventory, table: TableName, names: Mapping[str, str]) -> Iterator[Statement]:
    """REPLICA IDENTITY; an index is called as `names` says."""
    how: sql.Composable
    if inventory.replica_identity == "i":
        index = next((i for i in inventory.indexes if i.is_replica_identity), None)
        if index is None:
            return
        how = sql.SQL("USING INDEX {}").format(sql.Identifier(names.get(index.name, index.name)))
    elif inventory.replica_identity == "d":
        return
    else:
        how = sql.SQL({"f": "FULL", "n": "NOTHING"}[inventory.replica_identity])
    yield Statement(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(table.sql, how))


def partition_settings(inventory: Inventory, table: TableName) -> Iterator[Statement]:
    """What a partitioned table cannot hand down to its partitions: storage parameters, targets, identity."""
    if inventory.options:
        yield Statement(
            sql.SQL("ALTER TABLE {} SET ({})").format(table.sql, raw(", ".join(inventory.options)))
        )
    for column in inventory.columns:
        yield from _column_settings(column, table)
    if inventory.replica_identity in ("f", "n"):
        yield from replica_identity(inventory, table, {})


# -- sequences


def set_aside_sequences(inventory: Inventory, names: Mapping[str, str]) -> Iterator[Statement]:
    """Rename identity sequences; the lock lasts to the end of the transaction, so no value is lost."""
    for _, sequence in _sequences(inventory):
        if sequence.identity:
            name = TableName(sequence.schema, sequence.name)
            yield Statement(
                sql.SQL("ALTER SEQUENCE {} RENAME TO {}").format(
                    name.sql, sql.Identifier(names[sequence.name])
                ),
                (Lock(name, LockMode.ACCESS_EXCLUSIVE, in_advance=False),),
            )


def move_sequences(
    inventory: Inventory, giver: TableName, taker: TableName, names: Mapping[str, str]
) -> Iterator[Statement]:
    """Let the columns of `taker` own the sequences, which go on where they stand.

    A serial's sequence changes its owner. An identity's cannot: it gets one of the same name, set
    to where the old one (`set_aside_sequences`) stands, and the old one goes with its identity.
    """
    for column, sequence in _sequences(inventory):
        name = TableName(sequence.schema, sequence.name)
        if not sequence.identity:
            query = sql.SQL("ALTER SEQUENCE {} OWNED BY {}.{}")
            yield Statement(
                query.format(name.sql, taker.sql, sql.Identifier(column.name)),
                (Lock(name, LockMode.SHARE_ROW_EXCLUSIVE, in_advance=False),),
            )
            continue
        options = sql.SQL(
            "SEQUENCE NAME {} START {} INCREMENT {} MINVALUE {} MAXVALUE {} CACHE {} {}CYCLE"
        ).format(
            name.sql,
            *map(
                sql.Literal,
                (sequence.start, sequence.increment, sequence.minimum, sequence.maximum, sequence.cache),
            ),
            sql.SQL("" if sequence.cycle else "NO "),
        )
        yield Statement(
            sql.SQL("ALTER TABLE {} ALTER COLUMN {} ADD GENERATED {} AS IDENTITY ({})").format(
                taker.sql,
                sql.Identifier(column.name),
                sql.SQL("ALWAYS" if column.identity == "a" else "BY DEFAULT"),
                options,
            )
        )
        old = name.sibling(names[sequence.name])
        yield Statement(
            sql.SQL("SELECT setval({}::regclass, last_value, is_called) FROM {}").format(
                sql.Literal(name.sql.as_string(None)), old.sql
            )
        )
        yield Statement(
            sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP IDENTITY").format(
                giver.sql, sql.Identifier(column.name)
            )
        )
        yield from _sequence_belongings(inventory, name, sequence)


def _sequence_belongings(
    inventory: Inventory, name: TableName, sequence: OwnedSequence
) -> Iterator[Statement]:
    if sequence.comment is not None:
        yield Statement(
            sql.SQL("COMMENT ON SEQUENCE {} IS {}").format(name.sql, sql.Literal(sequence.comment))
        )
    for grant in sequence.grants:
        if grant.grantee != inventory.owner:
            yield Statement(_grant(sql.SQL("SEQUENCE {}").format(name.sql), grant))


def _sequences(inventory: Inventory) -> Iterator[tuple[Column, OwnedSequence]]:
    return ((c, c.sequence) for c in inventory.columns if c.sequence is not None)


# -- what hangs on the table from outside


def publish(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    """Add `target` to the publications that name the table."""
    for publication in inventory.publications:
        if publication.explicit:
            text = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(
                sql.Identifier(publication.name), target.sql
            )
            if publication.columns is not None:
                columns = sql.SQL(", ").join(map(sql.Identifier, publication.columns))
                text += sql.SQL(" ({})").format(columns)
            if publication.where is not None:
                text += sql.SQL(" WHERE ({})").format(raw(publication.where))
            yield Statement(text)


def unpublish(inventory: Inventory, table: TableName) -> Iterator[Statement]:
    for publication in inventory.publications:
        if publication.explicit:
            query = sql.SQL("ALTER PUBLICATION {} DROP TABLE {}")
            yield Statement(query.format(sql.Identifier(publication.name), table.sql))


def claim_views(inventory: Inventory) -> Iterator[Statement]:
    """Lock the views as `views` will, and change nothing: the owner is the one that they have now.

    Who reads a view locks it first and its tables afterwards. Once we had the table, each reader that
    was between the two would wait for us, and we for the view: such a swap never got through where a
    view is read all the time. LOCK TABLE would go on to all the tables of the view.
    """
    for view in inventory.views:
        name = TableName(view.schema, view.name)
        body = sql.SQL(
            "BEGIN EXECUTE (SELECT format('ALTER VIEW %s OWNER TO %I', oid::regclass, "
            "pg_get_userbyid(relowner)) FROM pg_class WHERE oid = {}::regclass); END"
        ).format(sql.Literal(name.sql.as_string()))
        yield Statement(
            sql.SQL("DO {}").format(sql.Literal(body.as_string())),
            (Lock(name, LockMode.ACCESS_EXCLUSIVE, in_advance=False),),
        )


def views(inventory: Inventory) -> Iterator[Statement]:
    """Make the views look at the table that has the name now; they keep grants, comments, dependents."""
    for view in inventory.views:
        name = TableName(view.schema, view.name)
        options: sql.Composable = sql.SQL("")
        if view.options:
            options = sql.SQL(" WITH ({})").format(raw(", ".join(view.options)))
        yield Statement(
            sql.SQL("CREATE OR REPLACE VIEW {}{} AS {}").format(
                name.sql, options, raw(view.definition.rstrip().removesuffix(";"))
            ),
            (Lock(name, LockMode.ACCESS_EXCLUSIVE, in_advance=False),),
        )


def add_foreign_key(inventory: Inventory, table: TableName, key: Constraint) -> Iterator[Statement]:
    """Make the parent's; PostgreSQL adopts those that its partitions have already, without a scan.

    Adopting drops the partition's own triggers on the target, which takes ACCESS EXCLUSIVE there.
    """
    assert key.target is not None
    locks = (
        Lock(table, LockMode.SHARE_ROW_EXCLUSIVE),
        Lock(TableName(*key.target), LockMode.ACCESS_EXCLUSIVE),
    )
    yield Statement(_add_constraint(table, key.name, raw(key.definition)), locks)
    if key.comment is not None:
        yield Statement(_comment_on_constraint(table, key.name, key.comment))


# -- pieces


def raw(text: str) -> sql.SQL:
    """A text that PostgreSQL itself wrote; braces in it are no placeholders, since it is never formatted."""
    return sql.SQL(text)


def drop_constraint(table: TableName, name: str, *, missing_ok: bool = False) -> sql.Composed:
    query = (
        "ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}" if missing_ok else "ALTER TABLE {} DROP CONSTRAINT {}"
    )
    return sql.SQL(query).format(table.sql, sql.Identifier(name))


def rename_index(schema: str, old: str, new: str) -> sql.Composed:
    return sql.SQL("ALTER INDEX {} RENAME TO {}").format(sql.Identifier(schema, old), sql.Identifier(new))


def rename_table(table: TableName, name: str) -> sql.Composed:
    return sql.SQL("ALTER TABLE {} RENAME TO {}").format(table.sql, sql.Identifier(name))


def rename_statistics(schema: str, old: str, new: str) -> sql.Composed:
    return sql.SQL("ALTER STATISTICS {} RENAME TO {}").format(
        sql.Identifier(schema, old), sql.Identifier(new)
    )


def comment_on_table(table: TableName, comment: str | None) -> sql.Composed:
    return sql.SQL("COMMENT ON TABLE {} IS {}").format(table.sql, sql.Literal(comment))


def _add_constraint(table: TableName, name: str, definition: sql.Composable) -> sql.Composed:
    return sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {}").format(table.sql, sql.Identifier(name), definition)


def _with_options(index: Index) -> str:
    """The constraint's definition with the index' storage parameters, which stand before DEFERRABLE."""
    definition = index.constraint or ""
    if not index.options:
        return definition
    head, deferrable, tail = definition.rpartition(" DEFERRABLE")
    if not deferrable or tail not in ("", " INITIALLY DEFERRED"):
        head, deferrable, tail = definition, "", ""
    return f"{head} WITH ({', '.join(index.options)}){deferrable}{tail}"


def _grants(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    on = sql.SQL("TABLE {}").format(target.sql)
    # ALTER DEFAULT PRIVILEGES may have given the new table more than the old one has.
    for grantee in inventory.default_grantees:
        yield Statement(sql.SQL("REVOKE ALL ON {} FROM {}").format(on, _role(grantee)))
    if inventory.has_acl:
        yield Statement(sql.SQL("REVOKE ALL ON {} FROM {}").format(on, sql.Identifier(inventory.owner)))
    for grant in inventory.grants:
        if grant.column is not None or inventory.has_acl or inventory.default_grantees:
            yield Statement(_grant(on, grant))


def _grant(on: sql.Composable, grant: Grant) -> sql.Composed:
    column = sql.SQL(" ({})").format(sql.Identifier(grant.column)) if grant.column else sql.SQL("")
    return sql.SQL("GRANT {}{} ON {} TO {}{}").format(
        raw(grant.privilege),
        column,
        on,
        _role(grant.grantee),
        sql.SQL(" WITH GRANT OPTION" if grant.grantable else ""),
    )


def _role(name: str | None) -> sql.Composable:
    return sql.SQL("PUBLIC") if name is None else sql.Identifier(name)


def _row_security(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    alter = sql.SQL("ALTER TABLE {} {} ROW LEVEL SECURITY")
    for policy in inventory.policies:
        text = sql.SQL("CREATE POLICY {} ON {} AS {} FOR {} TO {}").format(
            sql.Identifier(policy.name),
            target.sql,
            sql.SQL("PERMISSIVE" if policy.permissive else "RESTRICTIVE"),
            raw(policy.command),
            sql.SQL(", ").join(map(_role, policy.roles)),
        )
        if policy.using is not None:
            text += sql.SQL(" USING ({})").format(raw(policy.using))
        if policy.check is not None:
            text += sql.SQL(" WITH CHECK ({})").format(raw(policy.check))
        yield Statement(text)
        if policy.comment is not None:
            comment = sql.SQL("COMMENT ON POLICY {} ON {} IS {}")
            yield Statement(
                comment.format(sql.Identifier(policy.name), target.sql, sql.Literal(policy.comment))
            )
    if inventory.row_security:
        yield Statement(alter.format(target.sql, sql.SQL("ENABLE")))
    if inventory.force_row_security:
        yield Statement(alter.format(target.sql, sql.SQL("FORCE")))


def _comments(inventory: Inventory, target: TableName) -> Iterator[Statement]:
    if inventory.comment is not None:
        yield Statement(comment_on_table(target, inventory.comment))
    for index in inventory.indexes:
        if index.comment is not None:
            name = target.sibling(index.name).sql
            yield Statement(sql.SQL("COMMENT ON INDEX {} IS {}").format(name, sql.Literal(index.comment)))
        if index.constraint_comment is not None:
            yield Statement(_comment_on_constraint(target, index.name, index.constraint_comment))
    for constraint in inventory.constraints:
        if constraint.comment is not None and constraint.type != "f":
            yield Statement(_comment_on_constraint(target, constraint.name, constraint.comment))


def _comment_on_constraint(table: TableName, name: str, comment: str) -> sql.Composed:
    return sql.SQL("COMMENT ON CONSTRAINT {} ON {} IS {}").format(
        sql.Identifier(name), table.sql, sql.Literal(comment)
    )


def _column_settings(column: Column, target: TableName) -> Iterator[Statement]:
    alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} ").format(target.sql, sql.Identifier(column.name))
    if column.statistics is not None:
        yield Statement(alter + sql.SQL("SET STATISTICS {}").format(sql.Literal(column.statistics)))
    if column.options:
        yield Statement(alter + sql.SQL("SET ({})").format(raw(", ".join(column.options))))
